"""Exact equality of two sympy objects. Only in a worker: sympy may take any amount of time and memory.

math-verify drops differences below its precision: it finds 3/2^2023 equal to 5/2^2023, and e^-1000 to e^-2000. Here
rationals are compared as rationals, and other numbers with enough digits to resolve their smallest part.
"""

import re
from functools import partial

from latex2sympy2_extended import latex2sympy2
from math_verify import grader, parser
from sympy import (
    Add,
    Basic,
    Expr,
    MatrixBase,
    Rational,
    S,
    Set,
    expand,
    log,
    nan,
    oo,
    preorder_traversal,
    simplify,
    zoo,
)

MAX_DIGITS = 40_000  # numbers that need more count as different


def equal(truth: Basic | MatrixBase, answer: Basic | MatrixBase) -> bool:
    if all(isinstance(value, Expr | MatrixBase) for value in (truth, answer)):
        return equal_values(truth, answer)
    truth, answer = (value.doit() if isinstance(value, Set) else value for value in (truth, answer))
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}
    return grader.verify([truth], [answer], **options)


def equal_values(a: Expr | MatrixBase, b: Expr | MatrixBase) -> bool:
    a, b = a.doit(), b.doit()
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(map(equal_values, a.flat(), b.flat()))
    if a.has(nan, zoo) or b.has(nan, zoo):
        return False
    if a == b:
        return True
    if a.has(oo, -oo) or b.has(oo, -oo):
        return False
    if a.is_number and b.is_number:
        return equal_numbers(a, b)
    return equal_coefficients(a, b) or simplify(a - b).is_zero is True


# math-verify calls these inside sets, intervals and equations.
grader.sympy_numeric_eq = lambda a, b, *_: equal_values(a, b)
grader.sympy_symbolic_eq = lambda a, b: False
# It writes all variables in lower case: to it R - r is 0, and 2 \pi R is 2 \pi r.
cases_kept = latex2sympy2.ConversionConfig(lowercase_symbols=False)
parser.latex2sympy = partial(latex2sympy2.latex2sympy, conversion_config=cases_kept)

# latex2sympy adds up numbers side by side: to it (2)(3) is 5. Numbers that are mixed have been read by spelling.py.
Converter = latex2sympy2._Latex2Sympy
any_product = Converter.convert_postfix_list


def product(self, factors: list, i: int = 0):
    if i + 1 == len(factors) or not re.fullmatch(r"\W*\d+\W*", factors[i].getText()):
        return any_product(self, factors, i)
    first, rest = self.convert_postfix(factors[i]), self.convert_postfix_list(factors, i + 1)
    return (self.mat_mul_flat if getattr(rest, "is_Matrix", False) else self.mul_flat)(first, rest)


Converter.convert_postfix_list = product


def equal_numbers(a: Expr, b: Expr) -> bool:
    if a.is_Rational and b.is_Rational:
        return a == b
    terms = [*Add.make_args(a), *Add.make_args(-b)]
    for digits in (50, 100 + spread(terms)):  # most different numbers differ in the first 50
        if digits > MAX_DIGITS:
            return False
        values = [term.evalf(digits, maxn=2 * digits) for term in terms]
        if abs(sum(values)) > max(map(abs, values)) * S(10) ** (10 - digits):
            return False
    return True


def spread(terms: list[Expr]) -> int:
    """A number of digits that is enough to resolve the smallest part of a sum, power or fraction beside the largest."""
    digits = 0
    for part in (part for term in terms for part in preorder_traversal(term)):
        if isinstance(part, Rational):
            digits += (part.p.bit_length() + part.q.bit_length()) // 3
        elif isinstance(part, Expr) and part.is_number and (size := abs(part.evalf(15))):
            digits += abs(int(log(size, 10).evalf(15)))
    return digits


def equal_coefficients(a: Expr, b: Expr) -> bool:
    """Whether a and b have equal coefficients for each product of variables."""
    difference = expand(a - b)
    sums: dict[Expr, Expr] = {}
    for term in Add.make_args(difference):
        coefficient, variables = term.as_independent(*difference.free_symbols, as_Add=False)
        sums[variables] = sums.get(variables, S.Zero) + coefficient
    return all(total.is_number and equal_numbers(total, S.Zero) for total in sums.values())
