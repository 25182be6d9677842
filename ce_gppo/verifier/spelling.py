r"""Spelling: many ways to write the same thing become one, as \dfrac12 and ½, x**2 and x², 37_8, 0.\dot3, \textbf{C}.

Unicode and keyboards' spellings are replaced first, then single tokens (SPELLING), then patterns of several tokens.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

LONGEST = 1_000  # characters; longer texts are not read

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+|[a-zA-Z]+|.", re.DOTALL)

# Groups are two spaces apart: a spelling, and the tokens that become it.
SPELLINGS = r"""
- − – — ‐ ‑  \cdot × · ⋅ ∙ • * \times  / ÷ ∕ ⁄ \div  \pm ±  \mp ∓  \sqrt √ sqrt  \sqrt[3] ∛  ^\circ ° º ˚ \degree
\le ≤ ⩽ \leq \leqslant  \ge ≥ ⩾ \geq \geqslant  \ne ≠ \neq  < \lt  > \gt  \approx ≈ \simeq  % \% percent
\infty ∞ \infinity infinity oo inf  \cup ∪  \cap ∩  \in ∈  \setminus ∖ \backslash  \emptyset ∅ \varnothing
\mathbb{R} ℝ \R \reals  \mathbb{Z} ℤ  \mathbb{Q} ℚ  \mathbb{N} ℕ  \mathbb{C} ℂ  \angle ∠  \triangle △
: ∶ \colon  | ∣ \mid \vert  ' ’ ′  " “ ”  , ; 、  . 。  ( ⟨ \langle  ) ⟩ \rangle  \{ \lbrace  \} \rbrace
\lfloor ⌊  \rfloor ⌋  \lceil ⌈  \rceil ⌉  \lor ∨ \vee or 或  \land ∧ \wedge and 和 与 且
\ldots \dots \cdots \dotsc  cents ¢
\sin sin  \cos cos  \tan tan \tg  \arcsin arcsin asin  \arccos arccos acos  \arctan arctan atan  \log log  \ln ln
\alpha α  \beta β  \gamma γ  \delta δ  \theta θ theta  \lambda λ  \mu μ  \pi π pi  \rho ρ  \sigma σ  \tau τ  \phi φ
\omega ω  \Delta Δ  \log_{10} \lg  \frac \dfrac \tfrac \cfrac  \binom \dbinom \tbinom
\text \textbf \textit \textrm \textsf \texttt \textsc \textup \textnormal \emph \textsl
\text \mathrm \mathbf \mathit \mathsf \mathtt \mathnormal \mbox \hbox \operatorname
"""
NOTHING = r"""\( \) \[ \] $ \! \left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle
\textstyle \tiny \small \normalsize \large \Large \huge \Huge \underline \boldsymbol \bm \bold \pmb \rm \bf \it \sf \tt
\mathop \boxed \fbox \ensuremath \limits"""
SPELLING = dict.fromkeys(NOTHING.split(), "")
SPELLING |= dict.fromkeys(["\\,", "\\;", "\\:", "\\>", "~", "\\ ", "\\quad", "\\qquad"], " ")
for group in re.split("\n|  ", SPELLINGS.strip()):
    spelling, *tokens = group.split()
    SPELLING |= dict.fromkeys(tokens, spelling)

NUMERALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
NUMERALS = {word: value for value, word in enumerate(NUMERALS.split())}
for tens, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2):
    NUMERALS |= {word: 10 * tens} | {f"{word}-{unit}": 10 * tens + NUMERALS[unit] for unit in list(NUMERALS)[1:10]}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALE = rf"(?:{'|'.join(SCALES)})(?![a-zA-Z])"
CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
CHINESE = """元 yuan, 美元 dollar, 米 m, 厘米 cm, 毫米 mm, 千米 km, 公里 km, 千克 kg, 公斤 kg, 克 g, 吨 ton, 升 liter,
毫升 ml, 小时 hour, 分钟 minute, 秒 second, 天 day, 周 week, 个月 month, 年 year, 度 degree"""
CHINESE = dict(entry.split() for entry in CHINESE.split(","))
INNER = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # of braces, with two levels of braces in it
ARGUMENT = r"(\\sqrt ?|[\^_] ?)\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"
TEXT_START, TEXT_END = r"^(?:\\text ?\{ ?)?", r"(?: ?\})?$"  # of a whole answer, inside or outside \text
THOUSANDS = r"^((?:\(?[A-J]\) ?)?[^\d,()\[\]{}]*[1-9]\d{0,2})((?:[, ]\d{3})+)(?![\d,])(?=[^,()\[\]]*$)"
BASED = r"(?<![\w.^\\])([A-Z]*\d[\dA-Z]*|[A-F]{2,}(?=_\{16\}))(?:\.(\d+))?_(?:(\d)|\{ ?(?:base )?(\w+) ?\})"


def latex(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def text_or_not(match: re.Match) -> str:
    r"""\text stays around words and units; other content is read as if it were outside."""
    words = re.fullmatch(r"[a-zA-Z .'/-]*", match[1]) and not re.fullmatch(r" ?[A-J][.:] ?", match[1])
    return match[0] if words and match[1].strip() or re.fullmatch("[a-zA-Z]", match[1]) else match[1]


def based(match: re.Match) -> str:
    """The value of a numeral in a base from 2 to 36. Any other text is left as it is."""
    whole, part, base = match[1], match[2] or "", match[3] or match[4]
    base = int(base) if re.fullmatch("[0-9]{1,2}", base) else NUMERALS.get(base.lower(), 0)
    try:
        return latex(Fraction(int(whole + part, base), base ** len(part))) if base > 1 else match[0]
    except ValueError:  # 5_2, 3_{40}
        return match[0]


def chinese(match: re.Match) -> str:
    """The unit or noun that a number counts: 15元 is 15 \\text{ yuan}. Of an unknown word, one of Latin letters."""
    power, word = {"平方": "^2", "立方": "^3"}.get(match[1], ""), match[2]
    letters = "".join(chr(ord("a") + int(digit, 16)) for char in word for digit in f"{ord(char):x}")
    return rf" \text{{{CHINESE.get(word, letters + 'xs')}}}{power}"


def scaled(match: re.Match) -> str:
    """5 \\text{ million euros} as 5000000\\text{ euros}"""
    number, text, scale, end = match.groups()
    return latex(Fraction(number) * SCALES[scale]) + ("" if text and end else text or end or "")


def mixed(match: re.Match) -> str:
    """2\\frac{1}{3} is 7/3, but 2\\frac{4}{3} is a product."""
    whole, above, below = map(int, match.groups())
    return latex(whole + Fraction(above, below)) if above < below else rf"{whole}\cdot \frac{{{above}}}{{{below}}}"


def repeating(match: re.Match) -> str:
    whole, once, again = match[1], match[2], match[3] or match[4]
    return latex(Fraction(f"0{whole}.{once}0") + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once)))


BEFORE_TOKENS = [  # in this order
    (r"(?<=[\d}]) ?(?:\\text ?\{ ?)?(平方|立方)?([\u4e00-\u9fff]{1,4}) ?\}?$", chinese),
    (r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    (r"[₀-₉₊₋ₙ]+", lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    (r"[^\x00-\x7f]", lambda m: to_ascii(m[0])),
    (r"\s+", " "),
    (r"\.{3,}", r"\\ldots "),
    # Commands and their arguments
    (r"\\(?:left|right)\.|\\(?:textcolor|color|colorbox|tag|label) ?\{[^{}]*\}", ""),
    (r"\\begin ?\{(aligned|align\*?|equation\*?|gathered|split)\}([^&]*)(?:&([^&]*))?\\end ?\{\1\}", r"\2\3"),
    (r"(?:\\left ?)?[(\[] ?\\begin ?\{array\} ?\{[lcr]*\}", r"\\begin{pmatrix}"),
    (r"\\end ?\{array\} ?(?:\\right ?)?[)\]]", r"\\end{pmatrix}"),
    # Thousands, and spellings of keyboards, calculators and Python
    (r"(?<=\d)(?:, ?\\! ?|\{,\} ?)(?=\d{3}(?!\d))", ""),
    (r"^ ?(\*\*|[\"'`])(.*)\1 ?$", r"\2"),
    (r"\*\*", "^"),
    (r"[<>!]=", lambda m: {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne "}[m[0]]),
    (r"(?<![a-zA-Z.\\])\\?exp ?(?=(?:\\left ?)?\()", "e^"),
    (r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"\\cdot 10^{\1}"),
    (r"(?<=\d) ?x ?(?=10\^)", r"\\cdot "),
]
AFTER_TOKENS = [
    *[(ARGUMENT, r"\1{\2}")] * 3,  # sqrt(2), x^(1/2); thrice, for those inside others
    # Spaces, and line breaks at both ends
    (r" +", " "),
    (r"(?<!\\)((?:\\\\)*)\\? *$", r"\1"),  # the space of a last `\ ` has been stripped
    (r"^(?:\\\\| )+|(?:\\\\| )+$", ""),
    # Words, exponents and indices
    (r"^(\\text ?\{ ?)?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is:?|:) (?=.)", r"\1"),
    (r"(?<=[\d})]) ?\\text ?\{ ?\( ?([a-zA-Z0-9^/ .]+) ?\) ?\}$", r"\\text{ \1}"),  # 180 (days)
    (r"(?<=[\d})]) ?\( ?(?:\\text ?\{ ?([a-zA-Z^/ .]+)\}|([a-zA-Z]{3,}|[a-zA-Z]+/[a-z]+)) ?\)$", r"\\text{ \1\2}"),
    (r"\\(max|min|gcd|text\{lcm\}) ?(?:\\\{([^{}]*)\\\}|\[([^\[\]]*)\])", r"\\\1(\2\3)"),
    (rf"\\text ?\{{({INNER})\}}", text_or_not),
    (r"_\{\\text\{([^{}]*)\}\}", r"_{\1}"),
    (r"(?<=[_^])(\d\d+|[+-]\d+)", r"{\1}"),
    (r"\^\{ ?\\circ ?\}", r"^\\circ "),
    (r"\^(?:\\prime|\{ ?((?:\\prime ?)+)\})", lambda m: "'" * m[0].count("prime")),
    (r"\\sqrt\[(\d?[13579])\] ?\{ ?- ?(\d+) ?\}", r"(-\\sqrt[\1]{\2})"),  # the real root
    (r"(?<=\d)(?:\^\{? ?)?(?:\\text\{ ?)?(st|nd|rd|th)[ }]*$", r"\\text{\1}"),
    # Numerals in other bases, repeating decimals: \dot{3} and 0.1666\ldots are \overline first
    (BASED, based),
    (r"(?<!\d)(\d*)\.(\d*)\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?", r"\1.\2\\overline{\3\4\5}"),
    (
        r"(?<![\d.])(\d+\.\d{0,12}?)(?:(\d)\2\2+|(\d{2,12}?)\3+) ?\\ldots(?! ?\d)",
        lambda m: rf"{m[1]}\overline{{{m[2] or m[3]}}}",
    ),
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar) ?(?:\{ ?(\d+) ?\}|(\d))(?: ?\\ldots)?", repeating),
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (rf"(\\frac ?\{{{INNER}\}}) ?(\w)", r"\1{\2}"),
    (r"(?<![a-zA-Z\\])C_\{?(\d+)\}?\^\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"^(\d+) ?(?:\\text\{ ?to ?\}|to) ?(\d+)$", r"\1:\2"),
    (r"\\sqrt(\[\d\])? ?(\d)", r"\\sqrt\1{\2}"),
    (r"\( ?(\\approx [^()]*)\) ?$", r"\1"),  # 36\pi (\approx 113.1)
    (r"(?i)^(?:\\text ?\{)? ?(?:option|choice) \(?([A-J])\)? ?\}?$", r"\1"),
    (r"\\log_(?:e|\{e\})", r"\\ln "),
    (rf"(?i){TEXT_START}(?:the |an )?empty set\.?{TEXT_END}|\\\{{ ?\\\}}", r"\\emptyset "),
    (rf"(?i){TEXT_START}(?:there (?:is|are) )?no solutions?(?: exists?)?\.?{TEXT_END}", r"\\emptyset "),
    (r"(?<=[)\]]) *\\lor *(?=[(\[].*\\infty)", r"\\cup "),  # (-\infty,2) or (3,\infty)
    (r"\\in(?![a-zA-Z])", "="),
    (r"\\mathbb ?([A-Z])(?![a-zA-Z])", r"\\mathbb{\1}"),
    (rf"(?i){TEXT_START}all real(?:s| numbers) except(?: for)? ?\}}? ?(?:[a-z] ?= ?)?", r"x \\ne "),
    (rf"(?i:{TEXT_START}(?:the set of )?(?:all|any) real(?:s| numbers?| values)?{TEXT_END})", r"\\mathbb{R}"),
    (r"([a-z]) ?= ?\\mathbb\{R\} ?(?:,|\\land) ?(?=\1)", ""),
    (r"^\\\{ ?([a-z])(?: ?= ?\\mathbb\{R\})? ?[|:](?=.*\1)(.*(?:[<>]|\\[lgn]e(?![a-z])).*)\\\}$", r"\2"),
    (r"(?<=.)(?:, ?| (?=\())\(?[a-zA-Z] ?= ?\\mathbb\{Z\} ?\)?$", ""),  # \frac{\pi}{2} + k\pi, k \in \mathbb{Z}
    # 1,000 also in brackets and lists, where 000 is no element; 5 million; five
    (r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})*,0\d\d(?:,\d{3})*(?!\d|,\d)", lambda m: m[0].replace(",", "")),
    # 1,234 or 1 234, where nothing else in the string makes it a list or a tuple; 2 1/2
    (THOUSANDS, lambda m: m[1] + re.sub("[, ]", "", m[2])),
    (
        rf"(?ai){TEXT_START}({'|'.join(NUMERALS).replace('-', '[- ]')})( {SCALE})?\.?{TEXT_END}",
        lambda m: str(NUMERALS[m[1].lower().replace(" ", "-")]) + (m[2] or ""),
    ),
    (rf"(?<![\w.,^_])(\d+(?:\.\d+)?) ?(\\text ?\{{ ?)?({SCALE})( ?\}})?", scaled),
    (r"(?<![\d/])(\d+) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<![\w.^}])(\d{1,9}) ?\\frac ?\{ ?(\d{1,9}) ?\} ?\{ ?(\d{1,9}) ?\}", mixed),
    (r"(?<=\d)(?<![_^]\d) +(?=\d)", ","),  # `4 5` is two numbers; math-verify would add them up
    (r"(?<!\.)\. ?(\}?)$", r"\1"),
    # \$5 is 5\text{dollar}
    (r"(\\\$|[€£¥₹]) ?(-?(?:\d+\.?\d*|\.\d+))(?! ?(?:\\frac|[/^\d]))", lambda m: rf"{m[2]}\text{{{CURRENCIES[m[1]]}}}"),
    (r"\\\$|[€£¥₹]", ""),
]


@lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    if len(text) > LONGEST:
        return text.strip()
    for pattern, replacement in BEFORE_TOKENS:
        text = re.sub(pattern, replacement, text)
    text = "".join(map(spell, TOKEN.findall(text)))
    for pattern, replacement in AFTER_TOKENS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def to_ascii(char: str) -> str:
    """The ASCII or LaTeX spelling of fractions, full-width forms and other Unicode characters."""
    if char in SPELLING:
        return spell(char)
    if unicodedata.category(char) == "Cf":  # zero-width spaces and the like
        return ""
    plain = unicodedata.normalize("NFKC", char)
    if "<fraction>" in unicodedata.decomposition(char):
        return r"\frac{{{}}}{{{}}}".format(*plain.split("⁄"))
    return spell(plain)


def spell(token: str) -> str:
    spelling = SPELLING.get(token, token)
    return spelling + " " if spelling != token and "\\" in spelling else spelling


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
