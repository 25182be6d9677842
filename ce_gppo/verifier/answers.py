r"""Answers: whether two of them are the same. The grammar's one door; spelling.py and grammar.py read them.

Numbers are exact: 0.333 is not 1/3, but 0.333\ldots is. A unit may be left out, but not be a different one. The order
of a list or set does not count, that of a tuple does. `x = 3` is 3, as its left side is a name; `x^2 = 4` is not 4.
Scalars that are no number, and sets of reals, are left to math-verify: it may hang, and is asked only in a worker.
"""

import functools
import re
from fractions import Fraction
from itertools import pairwise

from ce_gppo.verifier.grammar import SINGLE_NAME, Node, compare, is_name, read
from ce_gppo.verifier.spelling import LONGEST, depths, normalize

MAX_CHARS = 300  # of an answer, unless the true answer is long
MAX_DEPTH = 12  # brackets; math-verify's parser takes 1.5 s for 16, and minutes for a few more
MAX_DIGITS = 40_000  # numbers that need more count as different


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

    def ask(*_):
        raise Undecided(answer, truth)

    return float(same(answer, truth, ask))


def last_box(response: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{}; None if there is none, or it is empty, or it is never closed."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", response))
    start, depth = boxes[-1].end() if boxes else len(response), 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(response, start):  # \\. steps over escaped braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return response[start : brace.start()].strip() or None
    return None


def can_be_given(truth: str) -> bool:
    """False for a true answer that no response can equal: empty except for LaTeX, or with an extra brace."""
    text = normalize(last_box(truth) or truth)
    return bool(squeeze(text).strip("{}")) and last_box(rf"\boxed{{{text}}}") == text


def squeeze(text: str) -> str:
    r"""Equal squeezed strings are equal answers: without \text, the spaces that TeX ignores, and the case of words."""
    if len(text) > LONGEST:
        return text
    text = re.sub(r"\\text ?\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", text)
    text = re.sub(r"\{(\d)\}", r"\1", text)  # x^{2} is x^2
    return text if re.search(r"[\\\d]", text) else re.sub(r"[^\W_]{2,}|^\w$", lambda word: word[0].casefold(), text)


BOMB = re.compile(  # factorials of factorials or large numbers, exponents of 5 digits, towers of 4 storeys
    r"!\W*!|\d{5}\W*!|\\binom.*\d{5}|\^[{(\s+-]*\d{5}|\^\{[^{}^]*\^\{[^{}^]*\^"
)
TOWER = re.compile(r"\^[{(\s]*(\d+)\s*\^[{(\s]*(\d+)")


def same(answer: str, truth: str, ask) -> bool:
    """Of two normalized answers. ask: compares two LaTeX strings, where the grammar cannot decide."""
    answer, truth = without_comment(answer, truth), without_comment(truth, answer)
    if squeeze(answer) == squeeze(truth):
        return squeeze(truth) != ""
    if max(len(answer), len(truth)) > LONGEST or max(depths(answer) + depths(truth), default=0) > MAX_DEPTH:
        return False
    if BOMB.search(answer) or any(int(a) ** min(int(b), 99) > 10_000 for a, b in TOWER.findall(answer)):
        return False  # it would hang or crash math-verify
    return equal(read(answer), read(truth), ask)


QUALIFIER = re.compile(  # f(x) = 2x for all real x; but not 1 for even n, 2 for odd n
    r"(.*?\S),? ?(?:\\text ?\{[ ,]*)?(?<![a-zA-Z])(?:for|where)(?![a-zA-Z])(?!.*\b(?:for|where|if|otherwise|else)\b).*"
)
YES_OR_NO = re.compile(r"(?i)(?:\\text ?\{ ?)?(yes|no)\}?[,.;:](?! *because).*")


def without_comment(text: str, other: str) -> str:
    """Without a qualifier behind it, or the reason of a yes or no, where the other answer has none."""
    if (found := QUALIFIER.fullmatch(text)) and re.search(r"for (?:all|any|every)", text[found.end(1) :]):
        return found[1]
    for comment in (QUALIFIER, YES_OR_NO):
        if (found := comment.fullmatch(text)) and not comment.fullmatch(other):
            return found[1]
    return text


SET_VALUED = re.compile(r"[<>]|\\(?:le|ge|ne|cup|cap|setminus|mathbb|emptyset)(?![a-zA-Z])")


def equal(a: Node, b: Node, ask) -> bool:
    """a: the answer, b: the truth. One comparison for each kind of node."""
    kinds = {a.kind, b.kind}
    if not squeeze(a.text) or not squeeze(b.text):
        return False
    if "choice" in kinds:
        return same_choice(a, b, ask)
    if "equation" in kinds:
        return same_equation(a, b, ask)
    if kinds <= {"list", "set"} or kinds == {"list", "region"}:  # x < 2, x > 3 is x < 2 or x > 3
        return same_unordered(a.parts, b.parts, ask)
    if "region" in kinds or kinds in ({"tuple", "scalar"}, {"set", "scalar"}):
        comparable = all(
            n.kind in ("region", "set", "tuple") or n.kind == "scalar" and SET_VALUED.search(n.text) for n in (a, b)
        )
        variables = {node.mark for node in (a, b) if node.kind == "region" and node.mark}  # not x > 3 and y > 3
        return comparable and len(variables) < 2 and (squeeze(a.text) == squeeze(b.text) or ask(a.text, b.text))
    if kinds == {"scalar"}:
        return same_scalar(a, b, ask)
    if "ratio" in kinds and kinds <= {"ratio", "scalar"}:
        return same_ratio(a, b, ask)
    alike = "()" in (a.mark, b.mark) if kinds == {"tuple", "list"} else a.kind == b.kind and a.mark == b.mark
    return alike and same_ordered(a.parts, b.parts, ask)


def same_ordered(parts: tuple[Node, ...], others: tuple[Node, ...], ask) -> bool:
    return len(parts) == len(others) and all(equal(x, y, ask) for x, y in zip(parts, others, strict=True))


def same_unordered(parts: tuple[Node, ...], others: tuple[Node, ...], ask) -> bool:
    left = list(others)
    for part in parts if len(parts) == len(others) else ():  # greedy is enough, for equality is transitive
        match = next((other for other in left if equal(part, other, ask)), None)
        if match is None:
            return False
        left.remove(match)
    return len(parts) == len(others)


def same_choice(a: Node, b: Node, ask) -> bool:
    """Letters are compared if both have one, and values if both have one."""
    letters = [node.mark.lower() if node.kind == "choice" else node.text.lower() for node in (a, b)]
    x, y = (node if node.kind != "choice" else node.parts[0] if node.parts else None for node in (a, b))
    if a.kind == b.kind:
        return letters[0] == letters[1] and (x is None or y is None or equal(x, y, ask))
    if all(re.fullmatch("[a-z]", letter) for letter in letters):
        return letters[0] == letters[1]
    return x is not None and y is not None and equal(x, y, ask)


def same_equation(a: Node, b: Node, ask) -> bool:
    if a.kind != b.kind:
        equation, other = (a, b) if a.kind == "equation" else (b, a)
        name = equation.parts[0].text
        if other.kind == "region" and other.mark and is_name(name, SINGLE_NAME) and squeeze(name) != other.mark:
            return False  # k \in (0,1) and 0 < m < 1
        # Of an equation, the sides that are not just a name, or else the last one.
        sides = tuple(side for side in equation.parts if not is_name(side.text)) or equation.parts[-1:]
        return all(equal(side, b, ask) if equation is a else equal(a, side, ask) for side in sides)
    names = [node.parts[0].text for node in (a, b)]
    if squeeze(names[0]) == squeeze(names[1]):
        return all(equal(side, b.parts[-1], ask) for side in a.parts[1:])
    if all(is_name(name, SINGLE_NAME) for name in names) and names[0] not in b.text and names[1] not in a.text:
        return False  # x = 3 and y = 3
    return ask(a.text, b.text)


def same_ratio(a: Node, b: Node, ask) -> bool:
    """2:3 is also 4:6 and 2/3, and 1:2:3 is 2:4:6. What may be times of day is not reduced: 3:30 is not 1:10."""
    if a.kind == b.kind and same_ordered(a.parts, b.parts, ask):
        return re.findall(r":0\d", squeeze(a.text)) == re.findall(r":0\d", squeeze(b.text))  # 9:05 is not 9:5
    times = all(re.fullmatch(r"\d\d?:[0-5]\d", squeeze(node.text)) for node in (a, b))
    if times or any(part.mark for part in a.parts + b.parts):
        return False
    x, y = ([rf"\frac{{{i.text}}}{{{j.text}}}" for i, j in pairwise(n.parts)] or [n.text] for n in (a, b))
    return same_ordered(tuple(map(read, x)), tuple(map(read, y)), ask)


WORD = re.compile(r"(?<![\\{a-zA-Z])[a-zA-Z]{4,}|\\text ?\{[^{}]*[a-zA-Z]{2}[^{}]*\}")
NOT_EVALUATED = re.compile(r"\\ldots|\\int(?! ?_)")  # math-verify leaves out the dots, and the constant


def same_scalar(a: Node, b: Node, ask) -> bool:
    x, y = number(squeeze(a.text)), number(squeeze(b.text))
    if a.mark and b.mark and a.mark != b.mark:
        size = compare(a.mark, b.mark)
        if size is None or None not in (x, y):
            return size is not None and x * size == y
        a = Node("scalar", rf"\frac{{{size.numerator}}}{{{size.denominator}}}\cdot({a.text})", mark=b.mark)
    if x is not None and y is not None:
        percents = [100 if node.mark == "percent" else 1 for node in (a, b)]
        alike = percents[0] == percents[1] or not 0 < abs(x) < 1
        return x == y and alike or x * percents[1] == y * percents[0]
    if squeeze(a.text) == squeeze(b.text):
        return True
    texts = f"{a.text} {b.text}"
    if NOT_EVALUATED.search(texts) or WORD.search(texts):  # math-verify multiplies letters: east = seat
        return False
    radians = (rf"\frac{{\pi}}{{180}}({node.text})" if node.mark == "degree" else node.text for node in (a, b))
    return ask(a.text, b.text) or a.mark != b.mark and "degree" in (a.mark, b.mark) and ask(*radians)


DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = re.compile(
    rf"([+-]?)(?:({DECIMAL})(?:/([+-]?{DECIMAL}))?|\\frac(\d|\{{[+-]?{DECIMAL}\}})(\d|\{{[+-]?{DECIMAL}\}}))", re.ASCII
)


def number(text: str) -> Fraction | None:
    """The value of a squeezed string: 3, -.5, 2/3, -\\frac23."""
    if not (match := NUMBER.fullmatch(text)):
        return None
    above, below = (Fraction((part or "1").strip("{}")) for part in (match[2] or match[4], match[3] or match[5]))
    return int(match[1] + "1") * above / below if below else None


def math_verify(answer: str, truth: str) -> bool:
    r"""math-verify on two scalars or sets. It is imported only here, in a worker.

    Its pitfalls, and the remedies: it compares floats to 6 places (decimals become fractions; `equal_values`), takes
    single letters for units, numbers out of any text, and small for capital letters (turned off). It has no unit i (a
    root), adds up numbers side by side (\cdot), and drops primes and the base of 101_2 (such answers are different).
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy2
    from math_verify import LatexExtractionConfig, grader, parse, parser
    from sympy import Expr, MatrixBase, Set

    grader.sympy_numeric_eq = lambda a, b, *_: equal_values(a, b)  # in sets, intervals and equations
    grader.sympy_symbolic_eq = lambda a, b: False
    cases_kept = latex2sympy2.ConversionConfig(lowercase_symbols=False)
    parser.latex2sympy = functools.partial(latex2sympy2.latex2sympy, conversion_config=cases_kept)
    if answer.count("'") != truth.count("'") or re.search(r"\d_", f"{answer} {truth}"):
        return False
    normal = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)
    modes = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}
    parsed = []
    for text in (truth, answer):
        text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(r"\d*\.\d+", lambda m: "{{\\frac{{{}}}{{{}}}}}".format(*Fraction(m[0]).as_integer_ratio()), text)
        text = re.sub(r"(\d+)\s*\^\\circ", r"{\\frac{\1\\pi}{180}}", text)
        text = re.sub(r"(?<![\w^{.])\d+ ?(?=[(\[])|[(\[] ?-?\d+ ?[)\]] ?(?=[(\[\d])", r"\g<0>\\cdot ", text)
        if not re.search(r"\\(?:sum|prod)|_\{?i", text):
            text = re.sub(r"(?<![\\a-zA-Z])i(?![a-zA-Z])", r"{\\sqrt{-1}}", text)
        if not (found := parse(f"${text}$", [config], **modes)):
            return False
        parsed.append(found[0].doit() if isinstance(found[0], Set) else found[0])
    if all(isinstance(value, Expr | MatrixBase) for value in parsed):
        return equal_values(*parsed)
    return grader.verify(parsed[:1], parsed[1:], timeout_seconds=None, allow_set_relation_comp=True)


def equal_values(a, b) -> bool:
    """Exact equality of two sympy expressions or matrices: rationals as rationals, others with enough digits."""
    import sympy

    a, b = a.doit(), b.doit()
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(equal_values, a.flat(), b.flat()))
    if a == b or a.has(sympy.oo, sympy.nan, sympy.zoo) or b.has(sympy.oo, sympy.nan, sympy.zoo):
        return a == b and not a.has(sympy.nan, sympy.zoo)
    if not (a.is_number and b.is_number):
        return sympy.simplify(a - b).is_zero is True
    if a.is_Rational and b.is_Rational:
        return False
    terms = [*sympy.Add.make_args(a), *sympy.Add.make_args(-b)]
    # Most different numbers differ in the first 50 digits. Else as many as resolve the smallest part of a term.
    spread = 0
    for part in (part for term in terms for part in sympy.preorder_traversal(term)):
        if isinstance(part, sympy.Rational):
            spread += (part.p.bit_length() + part.q.bit_length()) // 3
        elif isinstance(part, sympy.Expr) and part.is_number and (size := abs(part.evalf(15))):
            spread += abs(int(sympy.log(size, 10).evalf(15)))
    for digits in (50, 100 + spread):
        if digits > MAX_DIGITS:
            return False
        values = [term.evalf(digits, maxn=2 * digits) for term in terms]
        if abs(sum(values)) > max(map(abs, values)) * sympy.S(10) ** (10 - digits):
            return False
    return True
