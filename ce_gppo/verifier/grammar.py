r"""A grammar of answers: reads a normalized text as a tree of nodes, by recursive descent.

`read` tries one reader after the other, from the loosest binding to the tightest: a choice such as `(C) 12`, a region
such as `x < 2 or x > 3`, a list, an equation, brackets, a matrix, a ratio. Each returns a node, or None if the text is
not of its kind. Any other text is a scalar, with its unit. Readers split a text only outside all brackets, so the
recursion is as deep as the brackets are nested, which `same` limits.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from ce_gppo.verifier.spelling import TOKEN
from ce_gppo.verifier.units import measure

MAX_PARTS = 100  # of a list: the time to compare two lists grows with the product of their lengths


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
    """The text split at separators outside all brackets: parts and separators in turn."""
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
    match = re.fullmatch(r"\(?([A-Ja-j])(?:\)[.:]? ?|[.:] )([^.:)].*)|\(?([a-zA-Z]) ?[).:]+", text)
    if not match:
        return None
    letter, value = match[1] or match[3], match[2] or ""
    words = re.findall(r"(?<!\\)\b[a-zA-Z]{2,}", value.replace("\\text", ""))
    if match[2] and re.search(r"[A-Ja-j]\)\(", text):  # a product
        return None
    if re.search(r"^[A-Ja-j](?:\)|[.:] )|\([A-Ja-j]\)", value) or len(words) > 1:  # other choices, or a sentence
        return None
    return Node("choice", text, (read(value),) if value else (), letter)


def read_list(text: str) -> Node | None:
    elements = [part for part in split(text, ",", r"\lor", r"\land")[::2] if part]
    parts = [variant for element in elements for variant in variants(element)]
    return several("list", text, parts)


def variants(text: str) -> list[str]:
    """Both readings of a text with \\pm or \\mp. (A set is not read here, as its elements are read one by one.)"""
    if text.startswith("\\{") or not re.search(r"\\(?:pm|mp)(?![a-z])", text):
        return [text]
    return [re.sub(r"\\pm ?(?![a-z])", a, re.sub(r"\\mp ?(?![a-z])", b, text)) for a, b in ("+-", "-+")]


def read_equation(text: str) -> Node | None:
    sides = split(text, "=", r"\approx")
    for i in range(1, len(sides), 2):
        if sides[i] == r"\approx" and (sides[i - 1] == "e" or sides[i - 1] and not is_name(sides[i - 1])):
            sides = sides[:i]  # an exact value, followed by its approximation
            break
    return several("equation", text, [side for side in sides[::2] if side])


def several(kind: str, text: str, parts: list[str], mark: str = "") -> Node | None:
    """A node of two or more parts. A single part that is shorter than the text is read instead of the text."""
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
        return read_set(text, elements)
    if len(elements) == 1 and body[0] + body[-1] not in ("()", "[]"):
        return Node("tuple", text, tuple(map(read, elements)), body[0] + body[-1])  # [5) is not 5
    return several("tuple", text, elements, body[0] + body[-1])


def read_set(text: str, elements: list[str]) -> Node | None:
    r"""\{5\} is read as 5, but with a set among its elements it stays a set: \{\emptyset\} is not \emptyset."""
    members = list(dict.fromkeys(variant for element in elements for variant in variants(element)))
    if not any(member.startswith(("\\{", r"\emptyset")) for member in members) or len(members) > MAX_PARTS:
        return several("set", text, members)
    nodes = (Node("set", m, (read(m),)) if m.startswith("\\{") and read(m).kind != "set" else read(m) for m in members)
    return Node("set", text, tuple(nodes))


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
    sides = split(text, *INTERVALS)
    if sides[1:2] and sides[1] in (">", r"\ge"):  # c > b > a is a < b < c
        text = " ".join(FLIPPED.get(side, side) for side in reversed(sides))
    value, unit = measure(text)
    return Node("scalar", value, mark=unit)


# ----------------------------------------------------------------------------------------------------------------------
# Sets of reals

INTERVALS = {
    "<": r"(-\infty,{0})",
    r"\le": r"(-\infty,{0}]",
    ">": r"({0},\infty)",
    r"\ge": r"[{0},\infty)",
    r"\ne": r"(-\infty,{0})\cup({0},\infty)",
}
VARIABLE = re.compile(r"[a-zA-Z]|\\(?:alpha|beta|theta|lambda|phi|omega)")
RELATIONS = ("=", r"\approx", *INTERVALS)
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
REALS = re.compile(
    r"(?i)(?:([a-z]) ?= ?)?(?:\\mathbb ?\{? ?R ?\}?"
    r"|(?:the set of )?(?:all|any) real(?:s| numbers?| values)?(?: of| for)? ?[a-z]?)"
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
    left, *gaps = split(text, r"\ne", ",")
    if len(gaps) > 1 and gaps[0] == r"\ne" and set(gaps[2::2]) <= {","}:  # x \ne 0, 1 and x \ne \pm 1
        gaps = [variant for gap in gaps[1::2] for variant in variants(gap)]
        if VARIABLE.fullmatch(left) and len(gaps) > 1 and all(gap and len(split(gap, *RELATIONS)) == 1 for gap in gaps):
            return join_regions([Node("region", INTERVALS[r"\ne"].format(gap), mark=left) for gap in gaps], r"\cap")
    for separator, joint in ((r"\lor", r"\cup"), (r"\land", r"\cap"), (",", r"\cap")):
        if len(pieces := split(text, separator)[::2]) > 1:
            # A comma may mean `and` or `or`. Only before \ne the meaning is clear.
            clear = separator != "," or all(split(piece, r"\ne")[1:] for piece in pieces[1:])
            return join_regions([read_region(piece) or unbounded(piece) for piece in pieces], joint) if clear else None
    sides = split(text, *INTERVALS)
    if len(sides) == 5:  # 1 < x < 2
        both = [read_region(" ".join(part)) for part in (sides[:3], sides[2:])]
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


# ----------------------------------------------------------------------------------------------------------------------
# Names

# Left sides of `= 3`: x_1, f(2), P(X=3), AB, m\angle ABC, \text{Area}, [ABC], a+b, V_1:V_2, \frac{a}{b}
# Spaces are removed first: a pattern with many optional spaces would take exponential time.
FUNCTION = r"(?:\\lim_\{[^{}]*\}|\\(?:sin|cos|tan) ?\d?(?=[A-Z\\]))?(?:m?\\(?:measured)?angle ?|\\triangle ?)?"
SYMBOL = (
    r"(?:[a-zA-Z]|[A-Z]{2,4}|\\text\{[^{}]*\}|\([a-z]\\circ ?[a-z]\)|[A-Z]{2}\^2|\\sigma\^2"
    r"|\\(?:sin|cos|tan)\((?:[A-Z+-]|\\[a-z]+)+\)"
    r"|\\(?:overline|vec|bar|hat|dot|overrightarrow|mathbb|mathcal)(?: [a-zA-Z]|\{[a-zA-Z]+\})"
    r"|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|rho|sigma|tau|omega|Delta|gcd|max|min|deg|det|Pr) ?)"
)
INDEX = r"(?:_(?:\w|\{[^{}]*\}|\\[a-z]+))?"
ARGUMENTS = r"'{0,3}(?:\^\{-1\})?(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\])?"
NAME = FUNCTION + SYMBOL + INDEX + ARGUMENTS + INDEX
SINGLE_NAME = r"(?!([a-z])\([^()]*\1)" + NAME  # x(x+1) is a product
FRACTION = rf"-?\\frac\{{(?:{NAME}){{1,2}}\}}\{{(?:{NAME}){{1,2}}\}}"
SUM_OF_NAMES = rf"{SINGLE_NAME}(?:(?:[:/+-]|\\c(?:dot|ap|up) ?)?{NAME}){{0,4}}|{FRACTION}"
COORDINATE = r"(?:[a-zA-Z]|\\[a-z]+ ?)(?:_\w)?"
DERIVATIVE = r"\\frac\{(?:d|\\partial )(?:\^\d)?\w\}\{(?:(?:d|\\partial )\w(?:\^\d)?)+\}"
OTHER_NAMES = (
    rf"[a-zA-Z]{{4,}}|\({COORDINATE}(?:,{COORDINATE})+\)|{DERIVATIVE}|\[(?:\\triangle ?)?[A-Z]{{3,}}\]"
    r"|\\begin\{[pb]matrix\}[a-z](?:_\d)?(?:\\\\[a-z](?:_\d)?)+\\end\{[pb]matrix\}"
    r"|\|(?:[A-Z]+|z|\\(?:vec ?|text)\{?[a-z]\}?)\|"
)
MAX_NAME = 60  # characters


def is_name(text: str, pattern: str = f"{SUM_OF_NAMES}|{OTHER_NAMES}") -> bool:
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", text)
    return len(text) <= MAX_NAME and bool(re.fullmatch(pattern, text))
