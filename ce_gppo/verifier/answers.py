r"""When two mathematical answers are the same: a small grammar, and a comparison for each kind. No process, no sympy.

An answer is brought to one spelling (spelling.py), read as a tree (grammar.py, units.py), and compared kind by kind
(`equal`); only scalars that are no number, and sets of reals, are left to math-verify. How answers are read:

    number      007 is 7; 1,234 and 1,\!234 are 1234; 8.7e8; 2 1/2; 0.1\overline{6} is 1/6; 37_8 is 31; five million.
                Decimals are exact: 0.333 is not 1/3, but 0.333\ldots is. What follows \approx does not count:
                36\pi \approx 113.1 is 36\pi. Numbers side by side are mixed, 2\frac12, or else multiplied, 2\frac32.
    unit        A known unit may be left out, but not be a different one: 60 km/h is 60, not 60 mph. Exact conversions
                count: 1 hour 30 minutes is 1.5 hours. A number may also be followed by the one plain plural noun that
                it counts: 5 apples is 5, not 5 pears. With other words it is another answer: `4 is wrong`.
                45^\circ is 45 and also \pi/4; 30^\circ 30' is 30.5^\circ. 17 \pmod{20} is 17, and 37 \pmod{20}, but not
                17 \pmod{21}.
    percent     25\% is \frac14, and also 25: the sign may be left out of numbers that are no fraction of 1. A number
                between 0 and 1 is such a fraction, so 0.25\% is neither 0.25 nor \frac14.
    list        1,2 or `1 and 2`, in any order, like the set \{1,2\}. \pm 1 is the list 1,-1. \{5\} is 5,
                but a set in a set is one: \{\emptyset\} is not \emptyset, nor \{1,\{2\}\} \{1,2\}.
    tuple       (1,2) has an order, as have the ratio 2:3 and the cells of a matrix. [1,2) and [1,2[ are intervals.
    equation    `x = 3`, `f(2) = 3` and `1 + 2 = 3` are 3: the left side is a name, or equal. `x^2 = 4` is not 4. \in is
                read as =. f(n) = 2n is f(x) = 2x.
    region      `x < 2 or x > 3` and \{x \mid x < 2 or x > 3\} are (-\infty,2)\cup(3,\infty).
    choice      (C), C. and \textbf{C} are C; `(C) 12` is C and also 12, but neither D nor `(C) 13`.
    words       are compared without case, spaces and fonts.

A text of more than LONGEST characters is not read: it equals only itself.
"""

import re
from fractions import Fraction

from ce_gppo.verifier.extract import last_box
from ce_gppo.verifier.grammar import SINGLE_NAME, Node, depths, is_name, read
from ce_gppo.verifier.spelling import LONGEST, normalize
from ce_gppo.verifier.units import compare

__all__ = ["Undecided", "equal_now", "is_bomb", "normalize", "same", "squeeze"]

MAX_CHARS = 300  # of an answer, unless the true answer is long
MAX_DEPTH = 12  # brackets; math-verify's parser takes 1.5 s for 16, and minutes for a few more


def squeeze(text: str) -> str:
    r"""Equal squeezed strings are equal answers: without \text, the spaces that TeX ignores, and the case of words.

    A letter by itself is a word only if it is the whole text: yes is YES, and a is A, but r/R is not R/r.
    """
    if len(text) > LONGEST:
        return text
    text = re.sub(r"\\text ?\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", text)
    text = re.sub(r"\{(\d)\}", r"\1", text)  # x^{2} is x^2
    if re.search(r"[\\\d]", text):
        return text
    return re.sub(r"[^\W_]{2,}|^\w$", lambda word: word[0].casefold(), text)


class Undecided(Exception):
    """Only math-verify can decide whether these answers are equal."""


def equal_now(answer: str | None, truth: str) -> float:
    r"""1.0 if an answer equals the true one, else 0.0. Both may be LaTeX, with $; the truth may be in a \boxed{}.

    An answer that is too long, too deep, or a bomb such as 10^{10^{10}} scores 0. Raises Undecided(answer, truth), both
    normalized, if only math-verify can decide.
    """
    if answer is None or len(answer) > max(MAX_CHARS, 2 * len(truth)):
        return 0.0
    answer, truth = normalize(answer), normalize(last_box(truth) or truth)
    try:
        return float(squeeze(answer) == squeeze(truth) != "" or not is_bomb(answer) and same(answer, truth))
    except Undecided:
        raise Undecided(answer, truth) from None


def can_be_given(truth: str) -> bool:
    """False for a true answer that no response can equal: empty except for LaTeX, or with an extra brace."""
    text = last_box(truth) or truth.strip()
    if re.search(r"\w", re.sub(r"\\[a-zA-Z]+", "", text)) and last_box(rf"\boxed{{{text}}}") == text:
        return True
    text = normalize(text)  # takes longer, and only few get here
    return bool(squeeze(text).strip("{}")) and last_box(rf"\boxed{{{text}}}") == text


def ask_math_verify(answer: str, truth: str) -> bool:
    raise Undecided


def same(answer: str, truth: str, scalar_equal=ask_math_verify) -> bool:
    """Whether two normalized answers are equal. `scalar_equal` decides where the grammar cannot."""
    if squeeze(answer) == squeeze(truth):
        return True
    if max(len(answer), len(truth)) > LONGEST or max(depths(answer) + depths(truth), default=0) > MAX_DEPTH:
        return False
    return equal(read(answer), read(truth), scalar_equal)


# ----------------------------------------------------------------------------------------------------------------------
# One comparison for each kind

SET_VALUED = re.compile(r"[<>]|\\(?:le|ge|ne|cup|cap|setminus|mathbb|emptyset)(?![a-zA-Z])")


def equal(a: Node, b: Node, ask) -> bool:
    """a: the answer, b: the truth. ask: compares two LaTeX strings, as `scalar_equal` of `same`."""
    kinds = {a.kind, b.kind}
    if not squeeze(a.text) or not squeeze(b.text):
        return False
    if "choice" in kinds:
        return same_choice(a, b, ask)
    if "equation" in kinds:
        return same_equation(a, b, ask)
    if kinds <= {"list", "set"} or kinds == {"list", "region"}:  # x < 2, x > 3 is x < 2 or x > 3
        return same_unordered(list(a.parts), list(b.parts), ask)
    if "region" in kinds or kinds in ({"tuple", "scalar"}, {"set", "scalar"}):
        return same_region(a, b, ask)
    if kinds == {"scalar"}:
        return same_scalar(a, b, ask)
    if "ratio" in kinds and kinds <= {"ratio", "scalar"}:
        return same_ratio(a, b, ask)
    if kinds == {"matrix", "scalar"}:  # 2 \\begin{pmatrix} ...
        return any(node.kind == "scalar" and "matrix}" in node.text for node in (a, b)) and ask(a.text, b.text)
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
    """Letters are compared if both have one, and values if both have one."""
    letters = [node.mark if node.kind == "choice" else node.text for node in (a, b)]
    values = [node.parts[0] if node.parts else None for node in (a, b)]
    if a.kind == b.kind:
        return letters[0].lower() == letters[1].lower() and (None in values or equal(*values, ask))
    if all(re.fullmatch("[a-zA-Z]", letter) for letter in letters):
        return letters[0].lower() == letters[1].lower()
    a, b = (node if node.kind != "choice" else value for node, value in zip((a, b), values, strict=True))
    return a is not None and b is not None and equal(a, b, ask)


FUNCTION_OF = re.compile(r"([a-zA-Z])\(([a-z])\)")
COMMAND = re.compile(r"\\[a-zA-Z]+")


def same_equation(a: Node, b: Node, ask) -> bool:
    if a.kind == b.kind:
        b = same_argument(a, b)
        names = [node.parts[0].text for node in (a, b)]
        if squeeze(names[0]) == squeeze(names[1]):
            return all(equal(side, b.parts[-1], ask) for side in a.parts[1:])
        if all(is_name(name, SINGLE_NAME) for name in names) and names[0] not in b.text and names[1] not in a.text:
            return False  # x = 3 and y = 3
        return ask(a.text, b.text)
    equation, other = (a, b) if a.kind == "equation" else (b, a)
    name = equation.parts[0].text
    if other.kind == "region" and other.mark and is_name(name, SINGLE_NAME) and squeeze(name) != other.mark:
        return False  # k \in (0,1) and 0 < m < 1
    return all(equal(x, y, ask) for x in values(a) for y in values(b))


def same_argument(a: Node, b: Node) -> Node:
    """b with the variable of a's function: f(n) = 2n + 1 is f(x) = 2x + 1."""
    f, g = (FUNCTION_OF.fullmatch(squeeze(node.parts[0].text)) for node in (a, b))
    if not (f and g and f[1] == g[1] and f[2] != g[2]) or f[2] in COMMAND.sub("", b.text) or "\\text" in b.text:
        return b
    return read(re.sub(rf"{COMMAND.pattern}|{g[2]}", lambda m: f[2] if m[0] == g[2] else m[0], b.text))


def values(node: Node) -> tuple[Node, ...]:
    """The sides of an equation that are not just a name, or the last side."""
    if node.kind != "equation":
        return (node,)
    return tuple(side for side in node.parts if not is_name(side.text)) or node.parts[-1:]


def same_region(a: Node, b: Node, ask) -> bool:
    """Two sets of reals, not both of them plain intervals."""
    for node in (a, b):
        if node.kind not in ("region", "tuple", "set") and not (node.kind == "scalar" and SET_VALUED.search(node.text)):
            return False
    if a.mark != b.mark and a.kind == b.kind == "region" and a.mark and b.mark:
        return False  # x > 3 and y > 3
    return squeeze(a.text) == squeeze(b.text) or ask(a.text, b.text)


TIME = re.compile(r"\d\d?:[0-5]\d")


def same_ratio(a: Node, b: Node, ask) -> bool:
    """2:3 is also 4:6 and 2/3, and 1:2:3 is 2:4:6. What may be times of day is not reduced: 3:30 is not 1:10."""
    later_parts = zip(a.parts[1:], b.parts[1:], strict=False)
    if any(re.fullmatch(r"0\d \d|\d 0\d", f"{x.text} {y.text}") for x, y in later_parts):
        return False  # 9:05 and 9:5
    if a.kind == b.kind and same_ordered(a, b, ask):
        return True
    if TIME.fullmatch(squeeze(a.text)) and TIME.fullmatch(squeeze(b.text)):
        return False
    if a.kind == b.kind and len(a.parts) == len(b.parts) > 2:
        x, y = ([number(squeeze(part.text)) for part in node.parts] for node in (a, b))
        return None not in x + y and all(x[0] * j == i * y[0] != 0 for i, j in zip(x, y, strict=True))
    if any(len(node.parts) not in (0, 2) or any(part.mark for part in node.parts) for node in (a, b)):
        return False
    a, b = (
        read(r"\frac{{{}}}{{{}}}".format(*(part.text for part in node.parts))) if node.parts else node
        for node in (a, b)
    )
    return equal(a, b, ask)


WORD = re.compile(r"(?<![\\{a-zA-Z])[a-zA-Z]{4,}|\\text ?\{[^{}]*[a-zA-Z]{2}[^{}]*\}")
NOT_EVALUATED = re.compile(r"\\ldots|\\int(?! ?_)")  # math-verify leaves out the dots, and the constant


def same_scalar(a: Node, b: Node, ask) -> bool:
    x, y = number(squeeze(a.text)), number(squeeze(b.text))
    radians = [rf"\frac{{\pi}}{{180}}({node.text})" if node.mark == "degree" else node.text for node in (a, b)]
    if {a.mark, b.mark} == {"degree", "radian"}:
        return ask(*radians)
    if a.mark and b.mark and a.mark != b.mark:
        size = compare(a.mark, b.mark)
        if size is None:
            return False
        if None not in (x, y):
            return x * size == y
        a = Node("scalar", rf"\frac{{{size.numerator}}}{{{size.denominator}}}\cdot({a.text})", mark=b.mark)
    if x is not None and y is not None:
        if a.mark == b.mark and (modulus := re.fullmatch(r"mod ([1-9]\d{0,8})", a.mark)):
            return (x - y) % int(modulus[1]) == 0
        percent = [100 if node.mark == "percent" else 1 for node in (a, b)]
        alike = percent[0] == percent[1] or not 0 < abs(x) < 1
        return x == y and alike or x * percent[1] == y * percent[0]
    if squeeze(a.text) == squeeze(b.text):
        return True
    if NOT_EVALUATED.search(f"{a.text} {b.text}"):
        return False
    if WORD.search(a.text) or WORD.search(b.text):  # math-verify multiplies letters: east = seat
        return False
    if a.mark != b.mark and "percent" in (a.mark, b.mark):
        return ask(*(rf"\frac{{{node.text}}}{{100}}" if node.mark == "percent" else node.text for node in (a, b)))
    if a.mark != b.mark and "degree" in (a.mark, b.mark):
        return ask(a.text, b.text) or ask(*radians)
    return ask(a.text, b.text)


DECIMAL = r"[+-]?(?:\d+\.?\d*|\.\d+)"
NUMBERS = {  # of squeezed strings: 3 or -.5; 2/3; -\frac23
    rf"({DECIMAL})": Fraction,
    rf"({DECIMAL})/({DECIMAL})": lambda a, b: Fraction(a) / Fraction(b),
    rf"([+-]?)\\frac(\d|\{{{DECIMAL}\}})(\d|\{{{DECIMAL}\}})": lambda sign, a, b: (
        int(sign + "1") * Fraction(a.strip("{}")) / Fraction(b.strip("{}"))
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
# Inputs that would hang or crash math-verify.

BOMB = re.compile(  # factorials of factorials or large numbers, exponents of 5 digits, towers of 4 storeys
    r"!\W*!|\d{5}\W*!|\\binom.*\d{5}|\^[{(\s+-]*\d{5}|\^\{[^{}^]*\^\{[^{}^]*\^"
)
TOWER = re.compile(r"\^[{(\s]*(\d+)\s*\^[{(\s]*(\d+)")


def is_bomb(text: str) -> bool:
    if len(text) > LONGEST or max(depths(text), default=0) > MAX_DEPTH:
        return True
    huge_exponent = any(int(base) ** min(int(power), 99) > 10_000 for base, power in TOWER.findall(text))
    return huge_exponent or bool(BOMB.search(text))
