r"""Units after numbers: 60 \text{ km/h} has a unit, `4 \text{ is wrong}` has none.

A unit is made of the words below (km/h, cm^2, square feet, dollars per hour), or it is one plain plural noun that the
number counts: 5 apples, 12 people. Nothing else is a unit: no number word (million, dozens, thirds), no verb, no other
words. Outside \text a single letter is a variable, and 5m a product.
"""

import re
from collections import Counter
from fractions import Fraction

WORDS = """percent % pct percentage; degree deg; radian rad; second sec; minute min; hour hr hrs h; day; week; month;
year yr yrs; inch in inche; foot ft feet; yard yd; mile mi; acre; hectare ha; pound lb lbs; ounce oz; ton tonne;
gallon gal; quart qt; pint pt; cup; ohm; kelvin K; mole mol; dollar usd; cent; euro; sterling; yen; rupee rs; knot;
am; pm; ordinal th st nd rd; revolution"""
METRIC = """meter metre - m; gram gramme - g gm; second - s; liter litre - l L; watt - W; joule - J; newton - N;
volt - V; coulomb - C; tesla - T; hertz - Hz; pascal - Pa; byte - B; ampere amp - A; calorie - cal; electronvolt - eV"""
PREFIXES = "nano n -9; micro u -6; milli m -3; centi c -2; deci d -1; kilo k 3; mega M 6; giga G 9"
ABBREVIATIONS = {"mph": "mile/hour", "mpg": "mile/gallon", "kph": "km/h", "kmph": "km/h", "rpm": "revolution/minute"}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
BARE = {"%", "mm", "cm", "km", "in", "ft", "yd", "mi", "kg", "lb", "oz", "ml", "mL", "hr"}  # other pairs are products

UNITS = {"unit": "unit"}  # word -> its unit
CONVERSIONS = {  # unit -> (another unit, its size in this one)
    **{"minute": ("second", 60), "hour": ("second", 3600), "day": ("second", 86400), "week": ("second", 604800)},
    **{"foot": ("inch", 12), "yard": ("inch", 36), "mile": ("inch", 63360), "pound": ("ounce", 16)},
    **{"pint": ("cup", 2), "quart": ("cup", 4), "gallon": ("cup", 16), "dollar": ("cent", 100)},
}
for names in WORDS.split(";"):
    UNITS |= dict.fromkeys(names.split(), names.split()[0])
for names in METRIC.split(";"):
    words, symbols = map(str.split, names.split("-"))
    UNITS |= dict.fromkeys(words + symbols, words[0])
    for prefix in PREFIXES.split(";"):
        long, short, ten_to_the = prefix.split()
        UNITS |= dict.fromkeys([long + word for word in words] + [short + word for word in symbols], long + words[0])
        CONVERSIONS[long + words[0]] = words[0], Fraction(10) ** int(ten_to_the)

PLURALS = {"people", "men", "women", "children", "mice", "geese", "teeth", "sheep", "fish", "dice", "vertices"}
NO_NOUN = re.compile(  # ends in s, and counts nothing
    r".*([iu]s|ss)|was|has|as|does|goes|means|gives|makes|fails|equals|exceeds|remains|always|perhaps|sometimes|times"
    r"|ones|tens|dozens|hundreds|thousands|lakhs|crores|\w*illions|halves|quarters|thirds|fifths|eighths|ninths|twelfths"
    r"|(four|six|seven|ten|eleven|\w+teen|hundred|thousand|\w*illion|\w+tie)ths|(twen|thir|for|fif|six|seven|eigh|nine)ties"
)
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
QUANTITY = re.compile(
    r"(.*?)(?=\\text|%|(?<![\\a-zA-Z]) ?(?:[a-zA-Z]|\\text))((?:\\text ?\{[^{}]*\}|\\cdot|\^\{?-?\d\}?|[a-zA-Z%/. ])+)"
)
WORD_UNIT = r"(\\text ?\{[^{}]*\}|[a-zA-Z]{2,}) ?"
COMPOUND = re.compile(rf"(\d+) ?{WORD_UNIT}(\d+) ?{WORD_UNIT}")
CELSIUS = re.compile(r"(.*)\^\\circ ?(?:\\text ?\{)? ?([CF]?) ?\}?")

MODULO = re.compile(r"(.*?)(?:\\pmod|\( ?(?:\\text ?\{ ?mod ?\}|\\bmod|\\mod|mod)) ?\{?([^{}()]*)\}? ?\)?")


def measure(text: str) -> tuple[str, str]:
    """(value, unit); the unit is "" if there is none."""
    text = text.strip()
    if (match := CELSIUS.fullmatch(text)) and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return match[1].strip(), "degree" + match[2]
    if (match := MODULO.fullmatch(text)) and match[1].strip():
        return match[1].strip(), "mod " + match[2].strip()
    if (match := COMPOUND.fullmatch(text)) and (total := in_smaller_unit(*match.groups())):
        return total
    if (match := QUANTITY.fullmatch(text)) and match[1].strip(" +-"):
        unit = read_unit(match[2], counts=bool(re.fullmatch(r"[+-]?[\d.]+|.*\\frac.*", match[1].strip())))
        if unit is not None:
            return match[1].strip(), unit
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
            power = POWERS.get(word) or int(word.strip("^{}"))
            powers[last] += sign * (power - 1)
            power = 1
        elif word in POWERS:
            power = POWERS[word]
        elif (last := known(word)) is not None:
            powers[last] += sign * power
            power = 1
        else:
            return noun(word) if counts and len(words) == 1 else None
    if last is None:
        return None
    factors = [(unit, exponent) for unit, exponent in sorted(powers.items()) if exponent]
    return " ".join(unit if exponent == 1 else f"{unit}^{exponent}" for unit, exponent in factors)


def in_smaller_unit(count: str, unit: str, rest: str, smaller: str) -> tuple[str, str] | None:
    """1 hour 30 minutes as 90 minutes."""
    units = read_unit(unit, counts=False), read_unit(smaller, counts=False)
    if None in units:
        return None
    size = compare(*units)
    if size is None or int(rest) >= size or (int(count) * size).denominator > 1:
        return None
    return str(int(count) * size + int(rest)), units[1]


def compare(unit: str, other: str) -> Fraction | None:
    """How many of the other unit one unit is: 1000 g are a kg. None if they cannot be compared, as kg and cm."""
    generic = "unit" in (unit.partition("^")[0], other.partition("^")[0])  # 12 square units are 12 cm^2, but not 12 cm
    if generic and unit.partition("^")[1:] == other.partition("^")[1:]:
        return Fraction(1)
    (base, size), (other_base, other_size) = convert(unit), convert(other)
    return size / other_size if base == other_base else None


def convert(unit: str) -> tuple[str, Fraction]:
    """A unit in units that are the same for all lengths, times and so on, and its size in them: 1 km/h is 5/18 m/s."""
    factor, powers = Fraction(1), Counter()
    if unit.startswith("mod "):
        return unit, factor
    for name, _, exponent in (part.partition("^") for part in unit.split()):
        base, size = CONVERSIONS.get(name, (name, 1))
        powers[base] += int(exponent or 1)
        factor *= Fraction(size) ** int(exponent or 1)
    return " ".join(f"{base}^{power}" for base, power in sorted(powers.items()) if power), factor


def known(word: str) -> str | None:
    """The unit of a symbol, whose case matters (mW, MW), or of a word, in the plural too."""
    for spelling in (word, word.lower(), word.lower().removesuffix("s")):
        if spelling in UNITS and (spelling == word or len(word) > 3 or len(word) == len(spelling) == 3):
            return UNITS[spelling]
    return None


def noun(word: str) -> str | None:
    word = word.lower()
    plural = word in PLURALS or len(word) > 3 and word.endswith("s") and not NO_NOUN.fullmatch(word)
    return word if plural else None
