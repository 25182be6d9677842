r"""What may hang or break, and therefore runs only in workers: math-verify, and the user's own mine.py:score."""

import functools
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from ce_gppo.messages import UserError


def as_components(value, verifier: str) -> dict[str, float]:
    """A verifier's result as named components; a number becomes `correctness`. UserError for any other result."""
    components = value if isinstance(value, dict) else {"correctness": value}
    try:
        numbers = {name: float(number) for name, number in components.items() if not isinstance(number, str)}
    except (TypeError, ValueError, OverflowError):
        numbers = {}
    named = all(isinstance(name, str) and name.isprintable() and name not in ("", "mean") for name in components)
    complete = "correctness" in components and len(numbers) == len(components)
    if named and complete and all(map(math.isfinite, numbers.values())):
        return numbers
    raise UserError(
        f"verifier {verifier} returned {repr(value)[:80]}; a number is needed, or a dictionary of numbers by name with "
        "'correctness' among them ('mean' is taken)"
    )


def file_of(verifier: str) -> Path | None:
    """mine.py of mine.py:score; None for the name of a verifier."""
    path, _, function = verifier.rpartition(":")
    return Path(path) if path.endswith(".py") and function.isidentifier() else None


@functools.cache
def load(verifier: str) -> Callable:
    """The function of /path/mine.py:score. UserError if the file or the function is missing."""
    path, name = file_of(verifier), verifier.rpartition(":")[2]
    if not path.is_file():
        raise UserError(f"verifier {verifier}: there is no file {path}")
    # The files beside it hide no library, and this program's files (reward.py, loss.py) do not hide them.
    program = [folder for folder in sys.path if Path(folder, "ce_gppo").is_dir()]
    sys.path[:] = [folder for folder in sys.path if folder not in program] + [str(path.parent), *program]
    spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"verifier {verifier}: {path} cannot be imported: {told(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"verifier {verifier}: {path} has no function {name}; it has: {', '.join(functions) or 'none'}")
    return function


def call(verifier: str, response: str, answer: str) -> dict[str, float]:
    """The components that a user's function returns. UserError if it raises, or returns anything else."""
    function = load(verifier)
    try:
        value = function(response, answer)
    except (MemoryError, RecursionError, UserError):  # a hostile response can cause the first two; they end the worker
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"verifier {verifier} raised {told(error, file_of(verifier))}; a wrong response should be 0, not an error"
        ) from None
    return as_components(value, verifier)


def told(error: BaseException, path: Path) -> str:
    """An error as one line of text, with the number of the last line of the user's file in its traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}{': ' if text else ''}{text}" + (f" (line {lines[-1]})" if lines else "")


MAX_DIGITS = 40_000  # numbers that need more count as different


def math_verify(answer: str, truth: str) -> bool:
    r"""math-verify on two scalars or sets.

    Its pitfalls, and in brackets the remedies: it compares floats to 6 places and drops small differences (decimals
    become fractions, and `equal_values` compares). It strips one-letter variables as units, takes any number out of
    text that it cannot parse, compares the raw strings, and writes variables in lower case (all turned off). It has no
    imaginary unit i, and reads I^2 as I (i becomes the root of -1). It adds up numbers side by side (a \cdot between
    them). It drops primes and the base of 101_2 (such answers count as different).
    """
    from functools import partial

    from latex2sympy2_extended import NormalizationConfig, latex2sympy2
    from math_verify import LatexExtractionConfig, grader, parse, parser
    from sympy import Expr, MatrixBase, Set

    grader.sympy_numeric_eq = lambda a, b, *_: equal_values(a, b)  # in sets, intervals and equations
    grader.sympy_symbolic_eq = lambda a, b: False
    cases_kept = latex2sympy2.ConversionConfig(lowercase_symbols=False)
    parser.latex2sympy = partial(latex2sympy2.latex2sympy, conversion_config=cases_kept)
    if answer.count("'") != truth.count("'") or re.search(r"\d_", f"{answer} {truth}"):
        return False
    normalization = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    parsed = []
    for text in (truth, answer):
        text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(r"\d*\.\d+", lambda m: "{{\\frac{{{}}}{{{}}}}}".format(*Fraction(m[0]).as_integer_ratio()), text)
        text = re.sub(r"(\d+)\s*\^\\circ", r"{\\frac{\1\\pi}{180}}", text)
        text = re.sub(r"(?<![\w^{.])\d+ ?(?=[(\[])|[(\[] ?-?\d+ ?[)\]] ?(?=[(\[\d])", r"\g<0>\\cdot ", text)
        if not re.search(r"\\(?:sum|prod)|_\{?i", text):
            text = re.sub(r"(?<![\\a-zA-Z])i(?![a-zA-Z])", r"{\\sqrt{-1}}", text)
        modes = {"fallback_mode": "no_fallback", "extraction_mode": "first_match"}
        found = parse(f"${text}$", [config], parsing_timeout=None, **modes)
        if not found:
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
