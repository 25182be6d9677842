r"""When two mathematical answers are the same: a small grammar, and a comparison for each kind. No process, no sympy.

An answer is brought to one spelling (spelling.py), read into nodes (`read`), and compared kind by kind (`equal`); only
scalars that are no number, and sets of reals, are left to math-verify. How answers are read:

    number      007 is 7; 1,234 and 1,\!234 are 1234; 8.7e8; 2 1/2; 0.1\overline{6} is 1/6; 37_8 is 31. Decimals are
                exact: 0.333 is not 1/3. What follows \approx does not count: 36\pi \approx 113.1 is 36\pi.
    unit        A known unit may be left out, but not be a different one: 60 km/h is 60, not 60 mph. A number may also
                be followed by the one plain plural noun that it counts: 5 apples is 5, not 5 pears. With other words it
                is another answer: `4 million`, `4 is wrong`. 50% is 50 and also 1/2; 45^\circ is 45 and also \pi/4.
    list        1,2 or `1 and 2`, in any order, like the set \{1,2\}. \pm 1 is the list 1,-1.
    tuple       (1,2) has an order; [1,2) is an interval. So have the ratio 2:3 and the cells of a matrix.
    equation    `x = 3`, `f(2) = 3` and `1 + 2 = 3` answer 3: the left side is a name, or equal. `x^2 = 4` does not
                answer 4. \in is read as =.
    region      `x < 2 or x > 3` and \{x \mid x < 2 or x > 3\} are (-\infty,2)\cup(3,\infty).
    choice      (C), C. and \textbf{C} are C; `(C) 12` is C and also 12, but neither D nor `(C) 13`.
    words       are the same whatever their case, spaces and fonts.

A text of more than LONGEST characters is not read: it equals only itself.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from ce_gppo.verifier.spelling import LONGEST, TOKEN, normalize
from ce_gppo.verifier.units import measure

__all__ = ["Undecided", "is_bomb", "normalize", "same", "squeeze"]

MAX_PARTS = 100  # of a list: comparing two takes a time in the product of their lengths
MAX_DEPTH = 12  # brackets; math-verify's parser takes 1.5 s for 16, and minutes for a few more


def squeeze(text: str) -> str:
    r"""Equal squeezed strings are equal answers: without \text, the spaces that TeX ignores, and the case of words."""
    if len(text) > LONGEST:
        return text
    text = re.sub(r"\\text ?\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", text)
    text = re.sub(r"\{(\d)\}", r"\1", text)  # x^{2} is x^2
    return text if re.search(r"[\\\d]", text) else text.casefold()


class Undecided(Exception):
    """Only math-verify can tell."""


def ask_math_verify(answer: str, truth: str) -> bool:
    raise Undecided


def same(answer: str, truth: str, scalar_equal=ask_math_verify) -> bool:
    """Whether two normalized answers are equal; what the grammar cannot tell is asked of `scalar_equal`."""
    if squeeze(answer) == squeeze(truth):
        return True
    if max(len(answer), len(truth)) > LONGEST or max(depths(answer) + depths(truth), default=0) > MAX_DEPTH:
        return False
    return equal(read(answer), read(truth), scalar_equal)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Node:
    kind: str  # scalar, list, set, tuple, ratio, matrix, equation, region, choice
    text: str
    parts: tuple["Node", ...] = ()
    mark: str = ""  # of a scalar its unit, of a tuple its brackets, of a region its variable, of a choice its letter


@lru_cache(maxsize=4096)
def read(text: str) -> Node:
    text = text.strip()
    while text[:1] == "{" and enclosed(text):
        text = text[1:-1].strip()
    if match := re.fullmatch(r"\\text ?\{([^{}]*)\}", text):
        text = match[1].strip()
    if choice := read_choice(text):
        return choice
    if (levels := depths(text)) and (min(levels) < 0 or levels[-1]):
        return Node("scalar", "")  # equals nothing
    for reader in (read_region, read_list, read_equation, read_brackets, read_matrix, read_ratio):
        if node := reader(text):
            return node
    return read_scalar(text)


def split(text: str, *separators: str) -> list[str]:
    """The parts between the separators that stand outside all brackets, and every second one a separator."""
    parts, depth = [""], 0
    for token in TOKEN.findall(text):
        depth += (token[-1] in "([{") - (token[-1] in ")]}")
        if depth == 0 and token in separators:
            parts += [token, ""]
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def depths(text: str) -> list[int]:
    """The bracket depth after each character. Any bracket closes any other: [1, 2) is an interval."""
    return list(accumulate((char in "([{") - (char in ")]}") for char in text))


def enclosed(text: str) -> bool:
    """Whether the first bracket is closed by the last."""
    levels = depths(text)
    return text[:1] in ("(", "[", "{") and 0 in levels and levels.index(0) == len(text) - 1


def read_choice(text: str) -> Node | None:
    match = re.fullmatch(r"\(?([A-Ja-j])(?:\) ?|[.:] )([^(.:)].*)|\(?([a-zA-Z]) ?[).:]+", text)
    if not match:
        return None
    letter, value = match[1] or match[3], match[2] or ""
    words = re.findall(r"(?<!\\)\b[a-zA-Z]{2,}", value.replace("\\text", ""))
    if re.search(r"^[A-Ja-j](?:\)|[.:] )|\([A-Ja-j]\)", value) or len(words) > 1:  # other choices, or a sentence
        return None
    return Node("choice", text, (read(value),) if value else (), letter)


INTERVALS = {
    "<": r"(-\infty,{0})",
    r"\le": r"(-\infty,{0}]",
    ">": r"({0},\infty)",
    r"\ge": r"[{0},\infty)",
    r"\ne": r"(-\infty,{0})\cup({0},\infty)",
}
VARIABLE = re.compile(r"[a-zA-Z]|\\(?:alpha|beta|theta|lambda|phi|omega)")
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
REALS = re.compile(
    r"(?i)(?:([a-z]) ?= ?)?(?:\\mathbb ?\{? ?R ?\}?|all real(?:s| numbers| values)?(?: of| for)? ?[a-z]?)"
)
EXCEPT = re.compile(r"(?i)(?:\\text ?\{)? ?all real(?:s| numbers) except(?: for)? ?\}? ?(?:[a-z] ?= ?)?(.+)")
BUILDER = re.compile(r"\\\{ ?([a-z]|\\[a-z]+) ?(?:= ?\\mathbb ?\{? ?R ?\}? ?)?[|:](.*)\\\}")


def read_region(text: str) -> Node | None:
    r"""Conditions on one variable as a set of reals in LaTeX: 1 < x \le 2, x \ne 1, joined by `and` and `or`."""
    if match := REALS.fullmatch(text):
        return Node("region", r"(-\infty,\infty)", mark=match[1] or "")
    if match := EXCEPT.fullmatch(text):
        gaps = [INTERVALS[r"\ne"].format(gap) for gap in split(match[1], ",", r"\land")[::2]]
        return join_regions([Node("region", gap) for gap in gaps], r"\cap")
    if match := BUILDER.fullmatch(text):
        region = read_region(match[2].strip())
        return region if region and region.mark == match[1] else None
    for separator, joint in ((r"\lor", r"\cup"), (r"\land", r"\cap"), (",", r"\cap")):
        if len(pieces := split(text, separator)[::2]) > 1:
            # A comma may mean `and` or `or`: only before \ne it is clear.
            clear = separator != "," or all(split(piece, r"\ne")[1:] for piece in pieces[1:])
            return join_regions([read_region(piece) or unbounded(piece) for piece in pieces], joint) if clear else None
    sides = split(text, *INTERVALS)
    if len(sides) == 5:  # 1 < x < 2
        both = [read_region("".join(part)) for part in (sides[:3], sides[2:])]
        return join_regions(both, r"\cap") if FLIPPED[sides[1]] != sides[3] and VARIABLE.fullmatch(sides[2]) else None
    if len(sides) != 3:
        return None
    left, relation, right = sides
    if VARIABLE.fullmatch(right):
        left, relation, right = right, FLIPPED[relation], left
    if not VARIABLE.fullmatch(left) or not right or VARIABLE.fullmatch(right) or left in right or split(right, "=")[1:]:
        return None
    return Node("region", INTERVALS[relation].format(right), mark=left)


def join_regions(regions: list[Node | None], joint: str) -> Node | None:
    if None in regions or len({region.mark for region in regions}) > 1:
        return None
    parts = tuple(regions) if joint == r"\cup" else ()
    return Node("region", joint.join(f"({region.text})" for region in regions), parts, regions[0].mark)


def unbounded(text: str) -> Node | None:
    return Node("region", text) if enclosed(text) and r"\infty" in text else None


def read_list(text: str) -> Node | None:
    elements = [part for part in split(text, ",", r"\lor", r"\land")[::2] if part]
    parts = [variant for element in elements for variant in variants(element)]
    return several("list", text, parts)


def variants(text: str) -> list[str]:
    """Both readings of \\pm; a set has it read in each element."""
    if text.startswith("\\{") or not re.search(r"\\pm(?![a-z])", text):
        return [text]
    return [re.sub(r"\\pm ?(?![a-z])", a, re.sub(r"\\mp ?(?![a-z])", b, text)) for a, b in ("+-", "-+")]


# What may stand to the left of `= 3`: x_1, f(2), P(X=3), AB, m\angle ABC, \text{Area}, [ABC], a+b, V_1:V_2, \frac{a}{b}
FUNCTION = r"(?:\\lim_\{[^{}]*\} ?|\\(?:sin|cos|tan) ?(?=[A-Z\\]))?(?:m? ?\\(?:measured)?angle|\\triangle)? ?"
SYMBOL = (
    r"(?:[a-zA-Z]|[A-Z]{2,4}|\\text ?\{[^{}]*\}|\([a-z] ?\\circ ?[a-z]\)"
    r"|\\(?:overline|vec|bar|hat|overrightarrow|mathbb|mathcal) ?\{? ?[a-zA-Z]+ ?\}?"
    r"|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|rho|sigma|tau|omega|Delta|gcd|max|min|deg|det|Pr))"
)
INDEX = r"(?:_(?:\w|\{[^{}]*\}|\\[a-z]+))? ?'*(?:\^\{-1\})? ?"
ARGUMENTS = r"(?:\((?:[^()]|\([^()]*\))*\)|\[[A-Z]\])? ?"
SINGLE = r"(?!([a-z]) ?\([^()]*\1)" + FUNCTION + SYMBOL + INDEX + ARGUMENTS  # x(x+1) is a product
NEXT = FUNCTION + SYMBOL + INDEX + ARGUMENTS
OTHERS = r"[a-zA-Z ]{4,}|\([a-z](?:, ?[a-z])+\)|\[[A-Z]{3,}\]|\|(?:[A-Z]+|z|\\vec ?\{?[a-z]\}?)\|"
NAME = rf"{SINGLE}(?:(?:[:/+-]|\\cdot)? ?{NEXT}){{0,4}}|-?\\frac ?\{{ ?{NEXT}\}} ?\{{ ?{NEXT}\}}|{OTHERS}"
MAX_NAME = 80  # characters


def is_name(text: str, pattern: str = NAME) -> bool:
    return len(text) <= MAX_NAME and bool(re.fullmatch(pattern, text))


def read_equation(text: str) -> Node | None:
    sides = split(text, "=", r"\approx")
    for i in range(1, len(sides), 2):
        if sides[i] == r"\approx" and (sides[i - 1] == "e" or sides[i - 1] and not is_name(sides[i - 1])):
            sides = sides[:i]  # an exact value, followed by its approximation
            break
    return several("equation", text, [side for side in sides[::2] if side])


def several(kind: str, text: str, parts: list[str], mark: str = "") -> Node | None:
    """A node of two or more parts; a single part, if it is less than the text, instead of the text."""
    if len(parts) > MAX_PARTS:
        return Node(kind, "")  # equals nothing
    if len(parts) > 1:
        return Node(kind, text, tuple(map(read, parts)), mark)
    return read(parts[0]) if parts and len(parts[0]) < len(text) else None


def read_brackets(text: str) -> Node | None:
    body = text.removeprefix("\\")
    if not enclosed(body) or body[0] == "{" and body == text:
        return None
    elements = [part for part in split(body[1:-1].removesuffix("\\"), ",")[::2] if part]
    if body[0] == "{":
        return several("set", text, [variant for element in elements for variant in variants(element)])
    return several("tuple", text, elements, body[0] + body[-1])


def read_matrix(text: str) -> Node | None:
    match = re.fullmatch(r"\\begin ?\{[pbB]?matrix\}(.*)\\end ?\{[pbB]?matrix\}", text)
    if not match or "\\begin" in match[1]:
        return None
    rows = [split(row, "&")[::2] for row in split(match[1], r"\\")[::2] if row]
    shape = f"{len(rows)} {[len(row) for row in rows]}"
    return Node("matrix", text, tuple(read(cell) for row in rows for cell in row), shape)


def read_ratio(text: str) -> Node | None:
    parts = split(text, ":")[::2]
    return several("ratio", text, parts) if all(parts) else None


def read_scalar(text: str) -> Node:
    value, unit = measure(text)
    return Node("scalar", value, mark=unit)


# ----------------------------------------------------------------------------------------------------------------------
# Comparing

SET_VALUED = re.compile(r"[<>]|\\(?:le|ge|ne|cup|cap|setminus|mathbb|emptyset)(?![a-zA-Z])")


def equal(a: Node, b: Node, ask) -> bool:
    """a: the answer, b: the truth. `ask` is given two LaTeX strings."""
    kinds = {a.kind, b.kind}
    if not squeeze(a.text) or not squeeze(b.text):
        return False
    if "choice" in kinds:
        return same_choice(a, b, ask)
    if "equation" in kinds:
        return same_equation(a, b, ask)
    if kinds <= {"list", "set"}:
        return same_unordered(list(a.parts), list(b.parts), ask)
    if kinds == {"list", "region"}:  # x < 2, x > 3 is x < 2 or x > 3
        return same_unordered(list(a.parts), list(b.parts), ask)
    if "region" in kinds or kinds == {"tuple", "scalar"}:
        return same_region(a, b, ask)
    if kinds == {"scalar"}:
        return same_scalar(a, b, ask)
    if "ratio" in kinds and kinds <= {"ratio", "scalar"}:
        return same_ratio(a, b, ask)
    if kinds == {"tuple", "list"}:
        return "()" in (a.mark, b.mark) and same_ordered(a, b, ask)
    return a.kind == b.kind and a.mark == b.mark and same_ordered(a, b, ask)


def same_ordered(a: Node, b: Node, ask) -> bool:
    return len(a.parts) == len(b.parts) and all(equal(x, y, ask) for x, y in zip(a.parts, b.parts, strict=True))


def same_unordered(parts: list[Node], others: list[Node], ask) -> bool:
    if len(parts) != len(others):
        return False
    for part in parts:  # greedy is enough, for equality is transitive
        match = next((i for i, other in enumerate(others) if equal(part, other, ask)), None)
        if match is None:
            return False
        del others[match]
    return True


def same_choice(a: Node, b: Node, ask) -> bool:
    """Letters are compared where both have one, and so are values."""
    letters = [node.mark if node.kind == "choice" else node.text for node in (a, b)]
    values = [node.parts[0] if node.parts else None for node in (a, b)]
    if a.kind == b.kind:
        return letters[0].lower() == letters[1].lower() and (None in values or equal(*values, ask))
    if all(re.fullmatch("[a-zA-Z]", letter) for letter in letters):
        return letters[0].lower() == letters[1].lower()
    a, b = (node if node.kind != "choice" else value for node, value in zip((a, b), values, strict=True))
    return a is not None and b is not None and equal(a, b, ask)


def same_equation(a: Node, b: Node, ask) -> bool:
    if a.kind == b.kind:
        names = [node.parts[0].text for node in (a, b)]
        if squeeze(names[0]) == squeeze(names[1]):
            return all(equal(side, b.parts[-1], ask) for side in a.parts[1:])
        if all(is_name(name, SINGLE) for name in names) and names[0] not in b.text and names[1] not in a.text:
            return False  # x = 3 and y = 3
        return ask(a.text, b.text)
    return all(equal(x, y, ask) for x in values(a) for y in values(b))


def values(node: Node) -> tuple[Node, ...]:
    """The sides of an equation, without the names of what they are."""
    if node.kind != "equation":
        return (node,)
    return tuple(side for side in node.parts if not is_name(side.text)) or node.parts[-1:]


def same_region(a: Node, b: Node, ask) -> bool:
    """Sets of reals, of which at least one is not a mere interval."""
    for node in (a, b):
        if node.kind not in ("region", "tuple") and not (node.kind == "scalar" and SET_VALUED.search(node.text)):
            return False
    if a.mark != b.mark and a.kind == b.kind == "region" and a.mark and b.mark:
        return False  # x > 3 and y > 3
    return squeeze(a.text) == squeeze(b.text) or ask(a.text, b.text)


def same_ratio(a: Node, b: Node, ask) -> bool:
    """2:3 is also 4:6 and 2/3."""
    if a.kind == b.kind and len(a.parts) == len(b.parts) and all(map(equal, a.parts, b.parts, [ask] * len(a.parts))):
        return True
    if any(len(node.parts) not in (0, 2) or any(part.mark for part in node.parts) for node in (a, b)):
        return False
    a, b = (
        read(r"\frac{{{}}}{{{}}}".format(*(part.text for part in node.parts))) if node.parts else node
        for node in (a, b)
    )
    return equal(a, b, ask)


WORD = re.compile(r"(?<![\\{a-zA-Z])[a-zA-Z]{4,}|\\text ?\{[^{}]*[a-zA-Z]{2}[^{}]*\}")


def same_scalar(a: Node, b: Node, ask) -> bool:
    if a.mark and b.mark and a.mark != b.mark:
        return False
    if squeeze(a.text) == squeeze(b.text):
        return True
    x, y = number(squeeze(a.text)), number(squeeze(b.text))
    if x is not None and y is not None:
        percent = [100 if node.mark == "percent" else 1 for node in (a, b)]
        return x == y or x * percent[1] == y * percent[0]
    if WORD.search(a.text) or WORD.search(b.text):  # math-verify multiplies letters: east = seat
        return False
    if a.mark != b.mark and "degree" in (a.mark, b.mark):
        radians = [rf"\frac{{\pi}}{{180}}({node.text})" if node.mark == "degree" else node.text for node in (a, b)]
        return ask(a.text, b.text) or ask(*radians)
    return ask(a.text, b.text)


DECIMAL = r"[+-]?(?:\d+\.?\d*|\.\d+)"
NUMBERS = {  # of squeezed strings: 3 or -.5; 2/3; -\frac23 or 1\frac23
    rf"({DECIMAL})": Fraction,
    rf"({DECIMAL})/({DECIMAL})": lambda a, b: Fraction(a) / Fraction(b),
    rf"([+-]?)(\d*)\\frac(\d|\{{{DECIMAL}\}})(\d|\{{{DECIMAL}\}})": lambda sign, whole, a, b: (
        int(sign + "1") * (int(whole or 0) + Fraction(a.strip("{}")) / Fraction(b.strip("{}")))
    ),
}
NUMBERS = {re.compile(pattern, re.ASCII): value for pattern, value in NUMBERS.items()}


def number(text: str) -> Fraction | None:
    for pattern, value in NUMBERS.items():
        if match := pattern.fullmatch(text):
            try:
                return value(*match.groups())
            except ZeroDivisionError:
                return None
    return None


# ----------------------------------------------------------------------------------------------------------------------
# What would only cost a worker its life.

BOMB = re.compile(  # factorials of factorials or large numbers, exponents of 5 digits, towers of 4 storeys
    r"!\W*!|\d{5}\W*!|\\binom.*\d{5}|\^[{(\s+-]*\d{5}|\^\{[^{}^]*\^\{[^{}^]*\^"
)
TOWER = re.compile(r"\^[{(\s]*(\d+)\s*\^[{(\s]*(\d+)")


def is_bomb(text: str) -> bool:
    if len(text) > LONGEST or max(depths(text), default=0) > MAX_DEPTH:
        return True
    huge_exponent = any(int(base) ** min(int(power), 99) > 10_000 for base, power in TOWER.findall(text))
    return huge_exponent or bool(BOMB.search(text))
