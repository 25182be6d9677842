r"""When two mathematical answers are the same: one spelling, then structure, then scalars. No process, no sympy.

How answers are read: 007 is 7, 1,234 is 1234, 1,2 is a list. Lists and {1, 2} have no order; (1, 2) has. Decimals are
exact: 0.333 is not 1/3. A unit may be left out, but not be a different one; 50% is 50 and also 1/2. `x = 3` and
`1 + 2 = 3` answer 3; `x^2 = 4` does not answer 4.
"""

import re
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

MAX_DEPTH = 12  # brackets; math-verify's parser takes 1.5 s for 16, and minutes for a few more

UNICODE = r"− - – - ÷ / × \times · \cdot π \pi √ \sqrt ° ^\circ ≤ \le ≥ \ge ≠ \ne ∞ \infty ∪ \cup ∈ \in ² ^2 ³ ^3"

# 1,234 or 1 234, where nothing else in the string makes it a list or a tuple
THOUSANDS = r"^([^\d,()\[\]{}]*[1-9]\d{0,2})((?:[, ]\d{3})+)(?![\d,])(?=[^,()\[\]]*$)"

REWRITES = [  # in this order
    (r"^[\s$]*\\\$(?!.*\\text)\s*(.+?)[\s$]*$", r"\1\\text{dollar}"),
    (r"\\!|(?<!\\)\\[()\[\]]|\\?\$|[£€]|\\displaystyle(?![a-z])|^\s*\*\*|\*\*\s*$", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
    (r"(?<!\\)\\[,;:>\s]|\\q?quad(?![a-z])|[~\s]+", " "),
    (r"\\(?:text|math)(?:rm|bf|it|sf|normal)\s*(?=\{)|\\(?:mbox|operatorname|boldsymbol)\s*(?=\{)", r"\\text"),
    (r"^\s*\\text\s*\{([^{}]*)\}\s*\.?\s*$", r"\1"),
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|infinity)(?![a-zA-Z])", r"\\\1 "),
    (r"\\infinity", r"\\infty"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\(?:leq?|leqslant)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geq?|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\langle(.*)\\rangle", r"(\1)"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\text\s*\{\s*(?:\\?%|percent)\s*\}|(?<![a-zA-Z])percent(?![a-zA-Z])|\\%", "%"),
    (r"\^\s*\{?\s*\\circ\s*\}?", r"^\\circ "),
    (r"(?<=[\d)}])\s*\\approx.*", ""),  # an exact value, followed by its approximation
    (r"\\approx|\\in(?![a-zA-Z])", "="),
    (r"\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:lor|vee)(?![a-z])|;", ","),
    (r"(?<=\d)\s*\{,\}\s*(?=\d{3})", ""),
    (THOUSANDS, lambda m: m[1] + re.sub("[, ]", "", m[2])),
    (r"(\d)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)(?<![_^]\d)\s+(?=\d)", ","),  # `4 5` is two numbers; math-verify would add them up
    (r"^\s*\(?([a-zA-Z])\s*[).:]+\s*$", r"\1"),  # multiple choice: (C), C) or C.
    (r"(?<!\.)\.\s*$", ""),
]
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]


@lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    symbols = UNICODE.split()
    for symbol, latex in zip(symbols[::2], symbols[1::2], strict=True):
        text = text.replace(symbol, f"{latex} ")
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def squeeze(text: str) -> str:
    r"""Equal squeezed strings are equal answers: without \text, the spaces that TeX ignores, and the case of words."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", text)
    text = re.sub(r"\{(\d)\}", r"\1", text)  # x^{2} is x^2
    return text if "\\" in text else text.casefold()


class Undecided(Exception):
    """Only math-verify can tell."""


def ask_math_verify(answer: str, truth: str) -> bool:
    raise Undecided


NAME = re.compile(  # what may stand to the left of `= 3`: x, x_1, f(x), f^{-1}(x), AB, \theta, \angle ABC, \text{Area}
    r"(?:[a-zA-Z]|[A-Z]{2,}|[a-zA-Z ]{4,}|\([a-z](?:, *[a-z])+\)|\\text\s*\{[^{}]*\}"
    r"|\\[a-z]+\s*(?:[A-Z]+|\{[A-Z]+\})?|\|[A-Z]{2}\|)"
    r"(?:_(?:\w|\{\w+\}))?(?:\^\{-1\})?(?:\([a-zA-Z, ]*\))?"
)
SET_VALUED = re.compile(r"[<>]|\\(?:le|ge|ne|cup|cap|setminus|mathbb)(?![a-zA-Z])")


def same(answer: str, truth: str, scalar_equal=ask_math_verify) -> bool:
    """Compares structures; what has none and is no number, unit or word is left to `scalar_equal(answer, truth)`."""
    if squeeze(answer) == squeeze(truth):
        return True
    (kind, parts), (truth_kind, truth_parts) = structure(answer), structure(truth)
    if kind and truth_kind:
        if len(parts) != len(truth_parts):
            return False
        if {kind, truth_kind} <= {"list", "{}"}:
            return same_unordered(parts, truth_parts, scalar_equal)
        comparable = kind == truth_kind or {kind, truth_kind} == {"list", "()"}
        return comparable and all(same(p, t, scalar_equal) for p, t in zip(parts, truth_parts, strict=True))

    sides = [answer] if kind else split(parts[0], "=")
    truth_sides = [truth] if truth_kind else split(truth_parts[0], "=")
    if len(sides) > 1 and len(truth_sides) > 1:
        if squeeze(sides[0]) == squeeze(truth_sides[0]):
            return all(same(side, truth_sides[-1], scalar_equal) for side in sides[1:])
        return scalar_equal(answer, truth)
    if len(sides) > 1 or len(truth_sides) > 1:
        sides, truth_sides = (s[1:] if len(s) > 1 and NAME.fullmatch(s[0]) else s for s in (sides, truth_sides))
        return all(same(side, truth_side, scalar_equal) for side in sides for truth_side in truth_sides)

    if kind or truth_kind:  # an interval can still equal x > 3
        possible = "list" not in (kind, truth_kind) and SET_VALUED.search(truth if kind else answer)
        return bool(possible) and scalar_equal(answer, truth)
    return same_scalar(parts[0], truth_parts[0], scalar_equal)


def same_unordered(parts: list[str], truth_parts: list[str], scalar_equal) -> bool:
    for part in parts:  # greedy is enough, for equality is transitive
        match = next((other for other in truth_parts if same(part, other, scalar_equal)), None)
        if match is None:
            return False
        truth_parts.remove(match)
    return True


def structure(text: str) -> tuple[str, list[str]]:
    """(kind, elements). The kind is "list", or a pair of brackets: "{}", "()", "[)", ...; or "", a scalar."""
    text = text.strip()
    is_set = text.startswith("\\{")
    body = text[is_set:]
    levels = depths(body)
    if body[:1] in ("(", "[", "{") and 0 in levels and levels.index(0) == len(body) - 1:
        inner = body[1:-1].removesuffix("\\")
        elements = split(inner)
        if len(elements) < 2 or body[0] == "{" and not is_set:  # only grouping
            return structure(inner)
        return "{}" if is_set else body[0] + body[-1], elements
    if len(elements := split(text)) > 1:
        return "list", elements
    if "\\pm" in text:
        return "list", [text.replace("\\pm", plus).replace("\\mp", minus) for plus, minus in ("+-", "-+")]
    return "", elements


def split(text: str, separator: str = ",") -> list[str]:
    """The parts between the separators that stand outside all brackets."""
    cuts = [i for i, depth in enumerate(depths(text)) if text[i] == separator and depth == 0]
    return [part for a, b in pairwise([-1, *cuts, len(text)]) if (part := text[a + 1 : b].strip())] or [""]


def depths(text: str) -> list[int]:
    """The bracket depth after each character. Any bracket closes any other: [1, 2) is an interval."""
    return list(accumulate((char in "([{") - (char in ")]}") for char in text))


UNITS = """% percent; degree deg; mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer
kilometre; in inch inche; ft foot feet; yd yard; mi mile; g gram; kg kilogram; lb pound; oz ounce; l liter litre;
ml milliliter; s sec second; min minute; h hr hour; day; week; month; yr year; dollar; cent; mph"""
UNITS = {word: words.split()[0] for words in UNITS.split(";") for word in words.split()}
UNIT = re.compile(
    r"(.*\d.*?)(?:\\text\s*\{\s*([a-zA-Z][a-zA-Z ./-]*)\}|(?<![\\a-zA-Z])([a-zA-Z][a-zA-Z ./]*))(?:\^\{?[23]\}?)?"
)
NO_UNIT = re.compile(  # words that change the number before them
    r"(?:dozen|hundred|thousand|[mbtr]+illion|hal(?:f|ve)|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth"
    r"|hundredth|thousandth)s?\b|(?:squared|cubed|factorial|times|plus|minus|over|mod|base|root)\b"
)
WORD = re.compile(r"(?<![\\{a-zA-Z])[a-zA-Z]{4,}")


def same_scalar(answer: str, truth: str, scalar_equal) -> bool:
    (answer, unit), (truth, truth_unit) = measure(answer), measure(truth)
    if unit != truth_unit and {unit, truth_unit} <= set(UNITS.values()):  # 5 cm is not 5 m, but may be 5 apples
        return False
    x, y = number(squeeze(answer)), number(squeeze(truth))
    if x is not None and y is not None:
        return x == y or (unit == "%" != truth_unit and x == 100 * y) or (truth_unit == "%" != unit and y == 100 * x)
    if squeeze(answer) == squeeze(truth):
        return True
    if WORD.search(answer) or WORD.search(truth):  # math-verify multiplies letters: east = seat
        return False
    return scalar_equal(answer, truth)


def measure(text: str) -> tuple[str, str]:
    """(value, unit), the unit "" where there is none."""
    if text.endswith("%"):
        return text[:-1], "%"
    if text.endswith("^\\circ") and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return text.removesuffix("^\\circ"), "degree"
    if match := UNIT.fullmatch(text):
        value, unit = match[1], (match[2] or match[3]).strip(" .").lower()
        known = UNITS.get(unit) or UNITS.get(unit.removesuffix("s"))
        # Without \text, 5m and 5xy are products, and only what looks like a word is a unit.
        plausible = (known or len(unit) > 1) if match[2] else len(unit) > 1 and (known or len(unit.split()[0]) > 3)
        if plausible and not NO_UNIT.match(unit):
            return value, known or unit
    return text, ""


DECIMAL = r"[+-]?(?:\d+\.?\d*|\.\d+)"
NUMBERS = {  # of squeezed strings: 3 or -.5; 2/3; -\frac23; 0.1\overline{6}; 101_2
    rf"({DECIMAL})": Fraction,
    rf"({DECIMAL})/({DECIMAL})": lambda a, b: Fraction(a) / Fraction(b),
    rf"([+-]?)\\frac(\d|\{{{DECIMAL}\}})(\d|\{{{DECIMAL}\}})": lambda sign, a, b: (
        int(sign + "1") * Fraction(a.strip("{}")) / Fraction(b.strip("{}"))
    ),
    r"([+-]?)(\d*)\.(\d*)\\overline\{?(\d+)\}?": lambda sign, whole, once, again: (
        int(sign + "1")
        * (Fraction(f"0{whole}.{once}") + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once)))
    ),
    r"(\d+)_\{?(\d\d?)\}?": lambda digits, base: Fraction(int(digits, int(base))),
}
NUMBERS = {re.compile(pattern, re.ASCII): value for pattern, value in NUMBERS.items()}


def number(text: str) -> Fraction | None:
    for pattern, value in NUMBERS.items():
        if match := pattern.fullmatch(text):
            try:
                return value(*match.groups())
            except (ValueError, ZeroDivisionError):  # 1/0; 9_2; more than Python's limit of 4,300 digits
                return None
    return None


# ----------------------------------------------------------------------------------------------------------------------
# What would only cost a worker its life.

BOMB = re.compile(  # factorials of factorials or large numbers, exponents of 5 digits, towers of 4 storeys
    r"!\W*!|\d{5,}\W*!|\\d?binom.*\d{5,}|\^[{(\s+-]*\d{5,}|\^\{[^{}^]*\^\{[^{}^]*\^"
)
TOWER = re.compile(r"\^[{(\s]*(\d+)\s*\^[{(\s]*(\d+)")


def is_bomb(text: str) -> bool:
    huge_exponent = any(int(base) ** min(int(power), 99) > 10_000 for base, power in TOWER.findall(text))
    return huge_exponent or bool(BOMB.search(text)) or max(depths(text), default=0) > MAX_DEPTH
