r"""The first stage of reading an answer: many ways to write the same thing become one spelling.

Examples: \dfrac12 and ½, x**2 and x², 1,\!234, 8.7e8, 37_8, 0.\dot3, \textbf{(C)}. First Unicode is replaced
(BEFORE_TOKENS), then single tokens (SPELLING), then patterns of several tokens (AFTER_TOKENS). A new spelling is a new
pair in one of these tables.
"""

import math
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

LONGEST = 1_000  # characters; longer texts are not read

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+|[a-zA-Z]+|.", re.DOTALL)

SPELLINGS = r"""
− – — ‐ ‑                                                                            -> -
× · ⋅ ∙ • * \times                                                                   -> \cdot
÷ ∕ ⁄ \div                                                                           -> /
≤ ⩽ \leq \leqslant                                                                   -> \le
≥ ⩾ \geq \geqslant                                                                   -> \ge
≠ \neq                                                                               -> \ne
\lt                                                                                  -> <
\gt                                                                                  -> >
≈ \simeq                                                                             -> \approx
±                                                                                    -> \pm
∓                                                                                    -> \mp
° º ˚ \degree                                                                        -> ^\circ
% \% percent                                                                         -> %
√ sqrt                                                                               -> \sqrt
π pi                                                                                 -> \pi
θ theta                                                                              -> \theta
α                                                                                    -> \alpha
β                                                                                    -> \beta
γ                                                                                    -> \gamma
δ                                                                                    -> \delta
λ                                                                                    -> \lambda
μ                                                                                    -> \mu
φ                                                                                    -> \phi
ω                                                                                    -> \omega
Δ                                                                                    -> \Delta
“ ”                                                                                -> "
∛                                                                                     -> \sqrt[3]
\lg                                                                                   -> \log_{10}
\dots \cdots \dotsc                                                                   -> \ldots
\pmb \bold \mathop \rm \bf \it \sf \tt                                                ->
∞ \infinity infinity oo inf                                                          -> \infty
∪                                                                                    -> \cup
∩                                                                                    -> \cap
∈                                                                                    -> \in
∖ \backslash                                                                         -> \setminus
∅ \varnothing                                                                        -> \emptyset
ℝ \R \reals                                                                          -> \mathbb{R}
ℤ                                                                                    -> \mathbb{Z}
ℚ                                                                                    -> \mathbb{Q}
ℕ                                                                                    -> \mathbb{N}
ℂ                                                                                    -> \mathbb{C}
∠                                                                                    -> \angle
△                                                                                    -> \triangle
∶ \colon                                                                             -> :
∣ \mid \vert                                                                         -> |
’ ′                                                                                  -> '
; 、                                                                                  -> ,
。                                                                                    -> .
⌊                                                                                     -> \lfloor
⌋                                                                                     -> \rfloor
⌈                                                                                     -> \lceil
⌉                                                                                     -> \rceil
¢                                                                                     -> cents
⟨ \langle                                                                            -> (
⟩ \rangle                                                                            -> )
\lbrace                                                                              -> \{
\rbrace                                                                              -> \}
∨ \vee or                                                                            -> \lor
∧ \wedge and                                                                         -> \land
sin                                                                                  -> \sin
cos                                                                                  -> \cos
tan \tg                                                                              -> \tan
arcsin asin                                                                          -> \arcsin
arccos acos                                                                          -> \arccos
arctan atan                                                                          -> \arctan
log                                                                                  -> \log
ln                                                                                   -> \ln
\dfrac \tfrac \cfrac                                                                 -> \frac
\dbinom \tbinom                                                                      -> \binom
\textbf \textit \textrm \textsf \texttt \textsc \textup \textnormal \emph \textsl    -> \text
\mathrm \mathbf \mathit \mathsf \mathtt \mathnormal \mbox \hbox \operatorname        -> \text
\( \) \[ \] $ \! \left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr  ->
\displaystyle \textstyle \tiny \small \normalsize \large \Large \huge \Huge          ->
\underline \boldsymbol \bm \boxed \fbox \ensuremath \limits                          ->
"""
SPELLING = dict.fromkeys(["\\,", "\\;", "\\:", "\\>", "~", "\\ ", "\\quad", "\\qquad"], " ")
for line in SPELLINGS.strip().splitlines():
    tokens, spelling = line.split("->")
    SPELLING |= dict.fromkeys(tokens.split(), spelling.strip())

NUMERALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
NUMERALS = {word: value for value, word in enumerate(NUMERALS.split())}
for tens, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2):
    NUMERALS |= {word: 10 * tens} | {f"{word}-{unit}": 10 * tens + NUMERALS[unit] for unit in list(NUMERALS)[1:10]}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALE = rf"(?:{'|'.join(SCALES)})(?![a-zA-Z])"
CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
INNER = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # of braces, with two levels of braces in it
TEXT_START, TEXT_END = r"^(?:\\text ?\{ ?)?", r"(?: ?\})?$"  # of a whole answer, inside or outside \text
THOUSANDS = r"^((?:\(?[A-J]\) ?)?[^\d,()\[\]{}]*[1-9]\d{0,2})((?:[, ]\d{3})+)(?![\d,])(?=[^,()\[\]]*$)"
BASED = r"(?<![\w.^\\])([A-Z]*\d[\dA-Z]*|[A-F]{2,}(?=_\{16\}))(?:\.(\d+))?_(?:(\d)|\{ ?(?:base )?(\w+) ?\})"


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


def half_open(match: re.Match) -> str:
    """]0,1] as (0,1]"""
    return ("[" if match[1] == "[" else "(") + f"{match[2]},{match[3]}" + ("]" if match[4] == "]" else ")")


def noon(match: re.Match) -> str:
    return r"\text{" + (match[1] or match[2] or match[3]).lower() + "m}"


def arc(match: re.Match) -> str:
    """Degrees, minutes and seconds, in degrees."""
    whole, minutes, seconds = (int(part or 0) for part in match.groups())
    return latex(whole + Fraction(minutes, 60) + Fraction(seconds, 3600)) + r"^\circ "


def scaled(match: re.Match) -> str:
    """5 \\text{ million euros} as 5000000\\text{ euros}"""
    number, text, scale, end = match.groups()
    return latex(Fraction(number) * SCALES[scale]) + ("" if text and end else text or end or "")


def numeral(match: re.Match) -> str:
    return str(NUMERALS[match[1].lower().replace(" ", "-")]) + (f" {match[2]}" if match[2] else "")


def double_factorial(match: re.Match) -> str:
    return str(math.prod(range(int(match[1]), 0, -2)))


def modulo(match: re.Match) -> str:
    return str(int(match[1]) % int(match[2])) if int(match[2]) else match[0]


def mixed(match: re.Match) -> str:
    """2\\frac{1}{3} is 7/3, but 2\\frac{4}{3} is a product."""
    whole, above, below = map(int, match.groups())
    if above < below:
        return rf"\frac{{{whole * below + above}}}{{{below}}}"
    return rf"{whole}\cdot \frac{{{above}}}{{{below}}}"


def goes_on(match: re.Match) -> str:
    """0.1666\\ldots as 0.1\\overline{6}: the last digit is written three times, or several digits twice."""
    return f"{match[1]}\\overline{{{match[2] or match[3]}}}"


def repeating(match: re.Match) -> str:
    whole, once, again = match[1], match[2], match[3] or match[4]
    return latex(Fraction(f"0{whole}.{once}0") + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once)))


def latex(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


BEFORE_TOKENS = [  # in this order
    (r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    (r"[₀-₉₊₋ₙ]+", lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    (r"[^\x00-\x7f]", lambda m: to_ascii(m[0])),
    (r"\s+", " "),
    (r"\.{3,}", r"\\ldots "),
    # Commands and their arguments
    (r"\\(?:left|right)\.|\\(?:textcolor|color|colorbox|tag|label) ?\{[^{}]*\}", ""),
    (r"\\(?:h?phantom|hspace\*?) ?\{[^{}]*\}", " "),
    (r"\\begin ?\{(aligned|align\*?|equation\*?|gathered|split)\}([^&]*)(?:&([^&]*))?\\end ?\{\1\}", r"\2\3"),
    (r"(?:\\left ?)?[(\[] ?\\begin ?\{array\} ?\{[lcr]*\}", r"\\begin{pmatrix}"),
    (r"\\end ?\{array\} ?(?:\\right ?)?[)\]]", r"\\end{pmatrix}"),
    (r"\\(?:rm|bf|it|sf|tt) ?\{", r"\\text{"),
    (r"\{ ?\\(?:rm|bf|it|sf|tt)(?![a-zA-Z])", r"\\text{"),
    # Thousands, and spellings of keyboards, calculators and Python
    (r"(?<=\d)(?:, ?\\! ?|\{,\} ?)(?=\d{3}(?!\d))", ""),
    (r"^ ?(\*\*|[\"'`])(.*)\1 ?$", r"\2"),
    (r"\*\*", "^"),
    (r"(?<![\w.])0(?:x[\da-fA-F]+|b[01]+|o[0-7]+)(?![\w.^])", lambda m: str(int(m[0], 0))),
    (r"per cent\b", "percent"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
    (r"(?<![a-zA-Z.\\])\\?exp ?(?=(?:\\left ?)?\()", "e^"),
    (r"(?<![a-zA-Z.])abs ?\(([^()]*)\)", r"|\1|"),
    (r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"\\cdot 10^{\1}"),
    (r"(?<=\d) ?x ?(?=10\^)", r"\\cdot "),
]
AFTER_TOKENS = [
    # Spaces, and line breaks at both ends
    (r" +", " "),
    (r"(?<!\\)((?:\\\\)*)\\? *$", r"\1"),  # the space of a last `\ ` has been stripped
    (r"^(?:\\\\| )+|(?:\\\\| )+$", ""),
    # Words, exponents and indices
    (r"^\\text ?\{ ?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is:?|:) ?\} ?(?=.)", ""),
    (r"^(\\text ?\{ ?)?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is:?|:) (?=.)", r"\1"),
    (rf"\\text ?\{{({INNER})\}}", text_or_not),
    (r" ?([_^]) ?", r"\1"),
    (r"\\mu ?\\text\{ ?", r"\\text{u"),
    (r"\\frac ?\{ ?\\text\{([^{}]*)\} ?\} ?\{ ?\\text\{([^{}]*)\}(\^\d)? ?\}", r"\\text{\1/\2}\3"),
    (r"_\\text\{", "_{"),
    (r"_\{\\text\{([^{}]*)\}\}", r"_{\1}"),
    (r"(?<=[_^])(\d\d+|[+-]\d+)", r"{\1}"),
    (r"\^\{ ?\\circ ?\}", r"^\\circ "),
    (r"\^(?:\\prime|\{ ?((?:\\prime ?)+)\})", lambda m: "'" * m[0].count("prime")),
    (r"(?<![\d.])(\d{1,9})\^\\circ ?(\d\d?)'(?: ?(\d\d?)(?:''|\"))?", arc),
    (r"(?:^|(?<=[=, ])|(?<=\\c[au]p))([\[\]])([^\[\](),]+),([^\[\](),]+)([\[\]])(?= ?(?:$|\\c[au]p))", half_open),
    (r"\\sqrt\[(\d?[13579])\] ?\{ ?- ?(\d+) ?\}", r"(-\\sqrt[\1]{\2})"),  # the real root
    # The time of day, ordinals
    (r"^(\d\d?):00(?= ?(?:\\text\{ ?)?[AaPp]\.?[Mm])", r"\1"),
    (r"\\text\{ ?([AaPp])\.? ?[Mm]\.? ?\}|(?<=\d) ?([AP])M$|(?<=\d) ?([ap])\.m\.?$", noon),
    (r"\^\{? ?\\text\{ ?(st|nd|rd|th) ?\} ?\}?|\^\{ ?(st|nd|rd|th) ?\}", r"\\text{\1\2}"),
    (r"(?<![\w.])(\d+)(st|nd|rd|th)$", r"\1\\text{\2}"),
    # Numerals in other bases, repeating decimals
    (r"(?<=\w) ?(?:\\text\{ ?(?:in )?base ?\}|base) ?(\d+)", r"_{\1}"),
    (r"(?<=\w) *\( ?base (\d+) ?\)", r"_{\1}"),
    (r"\((\d+)\)_", r"\1_"),
    (BASED, based),
    (r"(?<!\d)(\d*)\.(\d*)\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?", r"\1.\2\\overline{\3\4\5}"),
    (r"(?<![\d.])(\d+\.\d{0,12}?)(?:(\d)\2\2+|(\d{2,12}?)\3+) ?\\ldots(?! ?\d)", goes_on),
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar) ?(?:\{ ?(\d+) ?\}|(\d))(?: ?\\ldots)?", repeating),
    (r"(?<!\d)(\d*)\.()\((\d+)\)()", repeating),
    # Commands
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (rf"(\\frac ?\{{{INNER}\}}) ?(\w)", r"\1{\2}"),
    (r"(?<![\w.^}!])(\d{1,2})!!(?!!)", double_factorial),
    (r"^(-?\d{1,9}) ?\\bmod ?(\d{1,9})$", modulo),
    (r"(?<![\w}^'])(?:\{ ?\} ?)?_\{?(\d+)\}? ?C_\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"^(\d+) ?(?:\\text\{ ?to ?\}|to) ?(\d+)$", r"\1:\2"),
    (r"\\sqrt(\[\d\])? ?(\d)", r"\\sqrt\1{\2}"),
    (r"(?<![a-zA-Z\\])C_\{?(\d+)\}?\^\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"\( ?(\\approx [^()]*)\) ?$", r"\1"),  # 36\pi (\approx 113.1)
    (r"(?i)^(?:\\text ?\{)? ?(?:option|choice) \(?([A-J])\)? ?\}?$", r"\1"),
    (r"\\log_(?:e|\{e\})", r"\\ln "),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\\{ ?\\\}", r"\\emptyset "),
    (rf"{TEXT_START}(?:(?:[Tt]he|[Aa]n) )?[Ee]mpty set\.?{TEXT_END}", r"\\emptyset "),
    (rf"{TEXT_START}(?:[Tt]here (?:is|are) )?[Nn]o solutions?(?: exists?)?\.?{TEXT_END}", r"\\emptyset "),
    (r"(?<=[Nn]o )(real |integer |positive )solutions", r"\1solution"),
    (rf"{TEXT_START}DNE{TEXT_END}", r"\\text{does not exist}"),
    (r"\\in(?![a-zA-Z])", "="),
    (r"\\mathbb ?([A-Z])(?![a-zA-Z])", r"\\mathbb{\1}"),
    (r"(?<=.)(?:, ?| (?=\())\(?[a-zA-Z] ?= ?\\mathbb\{Z\} ?\)?$", ""),  # \frac{\pi}{2} + k\pi, k \in \mathbb{Z}
    (r", ?(?=\\l(?:or|and)\b)", ""),
    # 1'000; 1,000 also in brackets and lists, where 000 is no element; 5 million; five
    (r"(?<![\d'.])\d{1,3}(?:'\d{3})+(?![\d'])", lambda m: m[0].replace("'", "")),
    (r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})*,0\d\d(?:,\d{3})*(?!\d|,\d)", lambda m: m[0].replace(",", "")),
    # 1,234 or 1 234, where nothing else in the string makes it a list or a tuple; 2 1/2
    (THOUSANDS, lambda m: m[1] + re.sub("[, ]", "", m[2])),
    (rf"(?ai){TEXT_START}({'|'.join(NUMERALS).replace('-', '[- ]')})(?: ({SCALE}))?\.?{TEXT_END}", numeral),
    (rf"(?<![\w.,^_])(\d+(?:\.\d+)?) ?(\\text ?\{{ ?)?({SCALE})( ?\}})?", scaled),
    (r"(?<![\d/])(\d+) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<![\w.^}])(\d{1,9}) ?\\frac ?\{ ?(\d{1,9}) ?\} ?\{ ?(\d{1,9}) ?\}", mixed),
    (r"(?<=\d)(?<![_^]\d) +(?=\d)", ","),  # `4 5` is two numbers; math-verify would add them up
    (r"(?<!\.)\. ?$", ""),
    (r"(?<=[a-zA-Z])\. ?\}$", "}"),
    # \$5 is 5\text{dollar}
    (r"(\\\$|[€£¥₹]) ?(-?(?:\d+\.?\d*|\.\d+))(?! ?(?:\\frac|[/^\d]))", lambda m: rf"{m[2]}\text{{{CURRENCIES[m[1]]}}}"),
    (r"\\\$|[€£¥₹]", ""),
]
BEFORE_TOKENS = [(re.compile(pattern), replacement) for pattern, replacement in BEFORE_TOKENS]
AFTER_TOKENS = [(re.compile(pattern), replacement) for pattern, replacement in AFTER_TOKENS]


def normalize(text: str) -> str:
    return rewrite(text) if len(text) <= LONGEST else text.strip()


@lru_cache(maxsize=4096)
def rewrite(text: str) -> str:
    for pattern, replacement in BEFORE_TOKENS:
        text = pattern.sub(replacement, text)
    text = "".join(brace_arguments([spell(token) for token in TOKEN.findall(text)]))
    for pattern, replacement in AFTER_TOKENS:
        text = pattern.sub(replacement, text)
    return text.strip()


def to_ascii(char: str) -> str:
    """The ASCII or LaTeX spelling of fractions, full-width forms and other Unicode characters."""
    if char in SPELLING:
        return spell(char)
    if unicodedata.category(char) == "Cf":  # zero-width spaces and the like
        return ""
    if char.isdecimal():  # of every script
        return str(unicodedata.decimal(char))
    how, _, _ = unicodedata.decomposition(char).partition(" ")
    plain = unicodedata.normalize("NFKC", char)
    if how == "<fraction>" and plain[-1] != "⁄":
        return r"\frac{{{}}}{{{}}}".format(*plain.split("⁄"))
    return spell(plain)


def spell(token: str) -> str:
    spelling = SPELLING.get(token, token)
    return spelling + " " if spelling != token and "\\" in spelling else spelling


def brace_arguments(tokens: list[str]) -> list[str]:
    r"""sqrt(2) and x^(1/2) as \sqrt{2} and x^{1/2}."""
    written, closing = [], []
    for token in tokens:
        if token == "(":
            before = "".join(written[-2:]).rstrip()
            closing.append("}" if before.endswith(("\\sqrt", "^", "_")) else ")")
            token = "{" if closing[-1] == "}" else "("
        elif token == ")" and closing:
            token = closing.pop()
        written.append(token)
    return written
