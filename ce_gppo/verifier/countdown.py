"""The task `countdown`: an expression that uses each given number exactly once and equals the target.

For the numbers 19, 36, 55, 7 and the target 65, for example: 55 + 36 - 7 - 19. The expression has whole numbers,
+ - * / and parentheses, and is computed with exact fractions. As model output it is untrusted: the grammar below reads
it, within bounds, and Python never evaluates it.
"""

import json
import re
from fractions import Fraction

from ce_gppo.messages import UserError
from ce_gppo.verifier.extract import last_tag

MAX_CHARS = 200
MAX_DEPTH = 20  # parentheses and signs
MAX_DIGITS = 9
MAX_NUMBERS = 20
FORMAT = 0.1  # reward for the format in GRPO-Zero and TinyZero

TOKEN = re.compile(r"[0-9]+|[-+*/()]")  # not \d, which matches the digits of every script


def score(response: str, answer: str) -> dict[str, float]:
    """Parts: `correctness`, 1 if the last <answer></answer> solves the task; `format`, 0.1 if the response ends with
    that tag and its expression can be read.

    answer: {"numbers": [19, 36, 55, 7], "target": 65}. UserError for any other form.
    """
    numbers, target = read_task(answer)
    expression = last_tag(response)
    value, used = evaluate(expression or "") or (None, [])
    right = value == target and sorted(used) == sorted(numbers)
    well_formed = value is not None and response.rstrip().endswith("</answer>")
    return {"correctness": float(right), "format": FORMAT * well_formed}


def read_task(answer: str) -> tuple[list[int], int]:
    try:
        task = json.loads(answer)
        numbers, target = task["numbers"], task["target"]
        whole = all(type(n) is int and abs(n) < 10**MAX_DIGITS for n in [*numbers, target])
        if whole and 1 <= len(numbers) <= MAX_NUMBERS and min(numbers) >= 0:
            return numbers, target
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        f"countdown: answer {answer[:60]!r}, where "
        '{"numbers": [19, 36, 55, 7], "target": 65} is needed: '
        f"at most {MAX_NUMBERS} whole numbers of at most {MAX_DIGITS} digits"
    )


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """(value, its numbers) of an expression. None if it is not valid, divides by 0, or exceeds a bound of this file.

    The bounds keep numerator and denominator of every value below MAX_CHARS digits.

        sum      product, then any number of: + or -, product
        product  factor, then any number of: * or /, factor
        factor   a number, ( sum ), or - factor
    """
    tokens = TOKEN.findall(text[: MAX_CHARS + 1])
    if len(text) > MAX_CHARS or "".join(tokens) != re.sub(r"[ \t\n]", "", text):
        return None
    tokens.reverse()  # the next one is the last
    numbers: list[int] = []

    def total(depth: int) -> Fraction:
        value = product(depth)
        while tokens and tokens[-1] in "+-":
            value = value + product(depth) if tokens.pop() == "+" else value - product(depth)
        return value

    def product(depth: int) -> Fraction:
        value = factor(depth)
        while tokens and tokens[-1] in "*/":
            value = value * factor(depth) if tokens.pop() == "*" else value / factor(depth)
        return value

    def factor(depth: int) -> Fraction:
        token = tokens.pop() if tokens and depth <= MAX_DEPTH else ""
        if token == "-":
            return -factor(depth + 1)
        if token == "(":
            value = total(depth + 1)
            if not tokens or tokens.pop() != ")":
                raise ValueError
            return value
        if not token.isdecimal() or len(token) > MAX_DIGITS:
            raise ValueError
        numbers.append(int(token))
        return Fraction(numbers[-1])

    try:
        value = total(0)
    except (ValueError, ZeroDivisionError):
        return None
    return None if tokens else (value, numbers)
