r"""Grammar: an answer in one spelling is read as a tree of nodes, by recursive descent, and a scalar with its unit.

`read` tries one reader after the other, from the loosest binding to the tightest, such as a choice, a list, an equation
and brackets. Each returns a node, or None if the text is not of its kind.
"""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from ce_gppo.verifier.spelling import depths, enclosed, split

MAX_PARTS = 100  # of a list: the time to compare two lists grows with the product of their lengths


@dataclass(frozen=True)
class Node:
    kind: str  # scalar, list, set, tuple, ratio, equation, region, choice
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
    for reader in (read_region, read_list, read_equation, read_brackets):
        if node := reader(text):
            return node
    if all(parts := split(text, ":")[::2]) and (ratio := several("ratio", text, parts)):
        return ratio
    value, unit = measure(text)
    return Node("scalar", value, mark=unit)


def read_choice(text: str) -> Node | None:
    match = re.fullmatch(r"\(?([A-Ja-j])(?:\)[.:]? ?|[.:] )([^.:)].*)|\(?([a-zA-Z]) ?[).:]+", text)
    if not match:
        return None
    letter, value = match[1] or match[3], match[2] or ""
    words = re.findall(r"(?<!\\)\b[a-zA-Z]{2,}", value.replace("\\text", ""))
    product = value and re.search(r"[A-Ja-j]\)\(", text)
    if product or len(words) > 1 or re.search(r"^[A-Ja-j](?:\)|[.:] )|\([A-Ja-j]\)", value):  # a sentence, two choices
        return None
    return Node("choice", text, (read(value),) if value else (), letter)


def read_list(text: str) -> Node | None:
    elements = [part for part in split(text, ",", r"\lor", r"\land")[::2] if part]
    return several("list", text, [variant for element in elements for variant in variants(element)])


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
    r"""\{5\} is read as 5, and (5) too."""
    body = text.removeprefix("\\")
    if not enclosed(body) or body[0] == "{" and body == text:
        return None
    elements = [part for part in split(body[1:-1].removesuffix("\\"), ",")[::2] if part]
    brackets = body[0] + body[-1]
    if body[0] != "{":
        return several("tuple", text, elements, brackets) if elements[1:] or brackets in ("()", "[]") else None
    members = list(dict.fromkeys(variant for element in elements for variant in variants(element)))
    if any(member.startswith(("\\{", r"\emptyset")) for member in members):  # \{\emptyset\} is not \emptyset
        inner = (Node("set", m, (read(m),)) if m.startswith("\\{") else read(m) for m in members[:MAX_PARTS])
        return Node("set", text, tuple(inner))
    return several("set", text, members)


# Regions: conditions on one variable as a set of reals in LaTeX. 1 < x \le 2, x \ne 1, joined by `and` and `or`

INTERVALS = {
    "<": r"(-\infty,{0})",
    r"\le": r"(-\infty,{0}]",
    ">": r"({0},\infty)",
    r"\ge": r"[{0},\infty)",
    r"\ne": r"(-\infty,{0})\cup({0},\infty)",
}
VARIABLE = re.compile(r"[a-zA-Z]|\\(?:alpha|beta|theta|lambda|phi|omega)")
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def read_region(text: str) -> Node | None:
    left, *gaps = split(text, r"\ne", ",", r"\land")
    if gaps[:1] == [r"\ne"] and set(gaps[2::2]) <= {",", r"\land"}:  # x \ne 0, 1 and x \ne \pm 1
        gaps = [variant for gap in gaps[1::2] for variant in variants(gap)]
        if len(gaps) > 1 and not any(split(gap, "=", r"\approx", *INTERVALS)[1:] for gap in gaps):
            return join_regions([read_region(rf"{left} \ne {gap}") for gap in gaps], r"\cap")
    for separator, joint in ((r"\lor", r"\cup"), (r"\land", r"\cap"), (",", r"\cap")):
        if len(pieces := split(text, separator)[::2]) > 1:
            # A comma may mean `and` or `or`. Only before \ne the meaning is clear.
            clear = separator != "," or all(split(piece, r"\ne")[1:] for piece in pieces[1:])
            return join_regions([read_region(piece) for piece in pieces], joint) if clear else None
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


# Names: left sides of `= 3`, as x_1, f(2), P(X=3), AB, m\angle ABC, \text{Area}, a+b, V_1:V_2. Matched without spaces

FUNCTION = r"(?:\\lim_\{[^{}]*\}|\\(?:sin|cos|tan) ?\d?(?=[A-Z\\]))?(?:m?\\(?:measured)?angle ?|\\triangle ?)?"
SYMBOL = (
    r"(?:[a-zA-Z]|[A-Z]{2,4}|\\text\{[^{}]*\}|[A-Z]{2}\^2|\\sigma\^2"
    r"|\\(?:overline|vec|bar|hat|dot|overrightarrow|mathbb|mathcal)(?: [a-zA-Z]|\{[a-zA-Z]+\})"
    r"|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|rho|sigma|tau|omega|Delta|gcd|max|min|deg|det|Pr) ?)"
)
INDEX = r"(?:_(?:\w|\{[^{}]*\}|\\[a-z]+))?"
NAME = FUNCTION + SYMBOL + INDEX + r"'{0,3}(?:\^\{-1\})?(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\])?" + INDEX
SINGLE_NAME = r"(?!([a-z])\([^()]*\1)" + NAME  # x(x+1) is a product
COORDINATE = r"(?:[a-zA-Z]|\\[a-z]+ ?)(?:_\w)?"
ANY_NAME = (
    rf"{SINGLE_NAME}(?:(?:[:/+-]|\\c(?:dot|ap|up) ?)?{NAME}){{0,4}}|[a-zA-Z]{{4,}}"
    rf"|-?\\frac\{{(?:{NAME}){{1,2}}\}}\{{(?:{NAME}){{1,2}}\}}"
    rf"|\({COORDINATE}(?:,{COORDINATE})+\)|\[(?:\\triangle ?)?[A-Z]{{3,}}\]"
    r"|\\frac\{(?:d|\\partial )(?:\^\d)?\w\}\{(?:(?:d|\\partial )\w(?:\^\d)?)+\}"
    r"|\|(?:[A-Z]+|z|\\(?:vec ?|text)\{?[a-z]\}?)\|"
)


TERM = r"\d{0,4}(?:\\cdot)?[a-zA-Z]{1,2}(?:_\w)?(?:\^\{?\d\}?)?"
SUM = rf"{TERM}(?:[+-]{TERM}){{1,5}}"  # 10a+b and x^2+y^2, of two or more variables


def is_name(text: str, pattern: str = ANY_NAME) -> bool:
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", text)
    if pattern is ANY_NAME:
        text = re.sub(r"\\bmod ?\d+$", "", text)
        inner = re.sub(r"^[|(]([^|()\\]*)[|)]$", r"\1", text)
        if len(set(re.findall("[a-zA-Z]", inner))) > 1 and re.fullmatch(SUM, inner):
            return len(text) <= 60
    return len(text) <= 60 and bool(re.fullmatch(pattern, text))


# Units: words of a table (60 \text{ km/h}), or one plain plural noun that a number counts (5 apples). Nothing else is a
# unit: no number word (dozens, thirds), no other words (4 \text{ is wrong}). Outside \text one letter is a variable.

WORDS = """percent % pct percentage; degree deg; radian rad; second sec; minute min = 60 second; day = 86400 second;
hour hr hrs h = 3600 second; week = 604800 second; month; year yr yrs; inch in inche; foot ft feet = 12 inch;
yard yd = 36 inch; mile mi = 63360 inch; acre; ounce oz; pound lb lbs = 16 ounce; ton; kelvin K; ohm; cup; unit;
pint pt = 2 cup; quart qt = 4 cup; gallon gal = 16 cup; cent; dollar usd = 100 cent; euro; sterling; yen; yuan; am AM;
pm PM; ordinal th st nd rd"""
METRIC = """meter metre - m; gram gramme - g gm; second - s; liter litre - l L; watt - W; joule - J; newton - N;
volt - V; coulomb - C; tesla - T; hertz - Hz; pascal - Pa; byte - B; ampere amp - A; calorie - cal; electronvolt - eV"""
PREFIXES = "nano n -9; micro u -6; milli m -3; centi c -2; deci d -1; kilo k 3; mega M 6; giga G 9"
ABBREVIATIONS = {"mph": "mile/hour", "mpg": "mile/gallon", "kph": "km/h", "kmph": "km/h"}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
BARE = {"%", "mm", "cm", "km", "in", "ft", "yd", "mi", "kg", "lb", "oz", "ml", "hr", "AM", "PM"}  # others are products

UNITS: dict[str, str] = {}  # word -> its unit
CONVERSIONS: dict[str, tuple[str, Fraction]] = {}  # unit -> (another unit, its size in this one)
for entry in WORDS.split(";"):
    names, _, size = entry.partition("=")
    UNITS |= dict.fromkeys(names.split(), names.split()[0])
    if size:
        CONVERSIONS[names.split()[0]] = size.split()[1], Fraction(size.split()[0])
for names in METRIC.split(";"):
    words, symbols = map(str.split, names.split("-"))
    UNITS |= dict.fromkeys(words + symbols, words[0])
    for prefix in PREFIXES.split(";"):
        long, short, ten_to_the = prefix.split()
        UNITS |= dict.fromkeys([long + word for word in words] + [short + word for word in symbols], long + words[0])
        CONVERSIONS[long + words[0]] = words[0], Fraction(10) ** int(ten_to_the)

NOUN = re.compile(  # a plural; but not what ends in s and counts nothing
    r"people|men|women|children|mice|geese|teeth|sheep|fish|dice|vertices"
    r"|(?!(?:.*([iu]s|ss|ths|illions)|does|goes|means|gives|makes|fails|equals|exceeds|remains|always|perhaps|times|ones"
    r"|sometimes|tens|dozens|hundreds|thousands|lakhs|crores|halves|quarters|thirds"
    r"|(twen|thir|for|fif|six|seven|eigh|nine)ties)$)[a-z]{3,}s"
)
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
QUANTITY = re.compile(
    r"(.*?)(?=\\text|%|(?<![\\a-zA-Z]) ?(?:[a-zA-Z]|\\text))((?:\\text ?\{[^{}]*\}|\\cdot|\^\{?-?\d\}?|[a-zA-Z%/. ])+)"
)
CELSIUS = re.compile(r"(?!.*\\(?:sin|cos|tan|cot|sec|csc))(.*)\^\\circ ?(?:\\text ?\{)? ?([CF]?) ?\}?")
MODULO = re.compile(r"(.*?\S) *(?:\\pmod|\( ?(?:\\text ?\{ ?mod ?\}|\\bmod|\\mod|mod)) ?\{?([^{}()]*)\}? ?\)?")


def measure(text: str) -> tuple[str, str]:
    """(value, unit); the unit is "" if there is none."""
    for pattern, unit in ((CELSIUS, "degree"), (MODULO, "mod")):
        if match := pattern.fullmatch(text):
            return match[1].strip(), unit + match[2].replace("^", "**").strip()
    if (match := QUANTITY.fullmatch(text)) and match[1].strip(" +-"):
        value = match[1].strip()
        unit = read_unit(match[2], counts=bool(re.fullmatch(r"[+-]?[\d.]+|.*\\frac.*", value)))
        return (text, "") if unit is None else (value, unit)
    return text, ""


def read_unit(text: str, counts: bool) -> str | None:
    """The unit as a product of powers in a fixed order, or None. counts: the text before it is a number."""
    plain = TEXT.sub(r" \1 ", text).replace("\\cdot", " ").replace(".", "")
    plain = re.sub(r"[a-zA-Z]+", lambda word: ABBREVIATIONS.get(word[0], word[0]), plain)
    words = re.findall(r"[a-zA-Z]+|\^\{?-?\d\}?|[%/]", plain)
    if not words or not TEXT.match(text.strip()) and len(words[0]) < 3 and words[0] not in BARE and words[1:2] != ["/"]:
        return None
    powers, last, sign, power = Counter(), None, 1, 1
    for word in words:
        if word in ("/", "per"):
            sign = -1
        elif last is not None and (word in ("squared", "cubed") or word[0] == "^"):
            powers[last] += sign * ((POWERS.get(word) or int(word.strip("^{}"))) - 1)
        elif word in POWERS:
            power = POWERS[word]
        elif (last := known(word)) is not None:
            powers[last] += sign * power
            power = 1
        else:
            return word.lower() if counts and len(words) == 1 and NOUN.fullmatch(word.lower()) else None
    factors = [unit if n == 1 else f"{unit}^{n}" for unit, n in sorted(powers.items()) if n]
    return " ".join(factors) if last else None


def known(word: str) -> str | None:
    """The unit of a symbol, whose case matters (mW, MW), or of a word, in the plural too."""
    spellings = [word, word.lower(), word.lower().removesuffix("s")][: max(1, len(word) - 1)]
    return next((UNITS[spelling] for spelling in spellings if spelling in UNITS), None)


def compare(unit: str, other: str) -> Fraction | None:
    """How many of the other unit one unit is: 1000 g are a kg. None if they cannot be compared, as kg and cm."""
    size, dimensions = Fraction(1), Counter()
    for text, sign in ((unit, 1), (other, -1)):
        for name, _, exponent in (part.partition("^") for part in text.split()):
            base, base_size = CONVERSIONS.get(name, (name, 1))
            dimensions[base] += sign * int(exponent or 1)
            size *= Fraction(base_size) ** (sign * int(exponent or 1))
    return None if any(dimensions.values()) else size
