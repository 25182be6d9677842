"""The rules of the puzzles, `countdown` and `walk`, and their verifiers. Model output is read here, never evaluated."""

import ast
import json
import operator
import re
from fractions import Fraction

from ce_gppo.messages import UserError

# ----------------------------------------------------------------------------------------------------------------------
# countdown: an expression that uses each given number exactly once and equals the target. For 19, 36, 55, 7 and the
# target 65, for example: 55 + 36 - 7 - 19. It has whole numbers, + - * / and parentheses, and fractions are exact.

MAX_CHARS = 200
MAX_DEPTH = 20  # signs, and right sides in right sides
MAX_DIGITS = 9
MAX_NUMBERS = 20
FORMAT = 0.1  # reward for the format in GRPO-Zero and TinyZero

EXPRESSION = re.compile(rf"(?:[0-9]{{1,{MAX_DIGITS}}}(?![0-9])|[-+*/() \t\n])+")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown(response: str, answer: str) -> dict[str, float]:
    """Components: `correctness`, 1 if the last <answer></answer> solves the puzzle; `format`, 0.1 if the response ends
    with that tag and its expression can be read. answer: {"numbers": [19, 36, 55, 7], "target": 65}."""
    try:
        task = json.loads(answer)
        numbers, target = task["numbers"], task["target"]
        valid = all(type(n) is int and abs(n) < 10**MAX_DIGITS for n in [*numbers, target])
        valid = valid and 1 <= len(numbers) <= MAX_NUMBERS and min(numbers) >= 0
    except (ValueError, TypeError, KeyError):
        valid = False
    if not valid:
        needed = f"at most {MAX_NUMBERS} whole numbers of at most {MAX_DIGITS} digits"
        example = '{"numbers": [19, 36, 55, 7], "target": 65} is needed'
        raise UserError(f"countdown: answer {answer[:60]!r}, where {example}: {needed}")
    value, used = evaluate(last_tag(response) or "") or (None, [])
    right = value == target and sorted(used) == sorted(numbers)
    well_formed = value is not None and response.rstrip().endswith("</answer>")
    return {"correctness": float(right), "format": FORMAT * well_formed}


def last_tag(response: str) -> str | None:
    """The text between the last <answer></answer>, without white space around it. None if it is empty or missing."""
    before, end, _ = response.rpartition("</answer>")
    _, begin, answer = before.rpartition("<answer>")
    return (end and begin and answer.strip()) or None


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """(value, its numbers) of an expression, from the tree that Python's parser makes of it: nothing is executed.

    None if it is not valid, divides by 0, or exceeds a bound of this file, so that numbers stay short.
    """
    if len(text) > MAX_CHARS or not EXPRESSION.fullmatch(text):
        return None
    numbers: list[int] = []

    def value(node: ast.expr, depth: int) -> Fraction:
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        if depth > MAX_DEPTH:
            raise ValueError
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand, depth + 1)
        return OPERATORS[type(node.op)](value(node.left, depth), value(node.right, depth + 1))

    try:
        return value(ast.parse(" ".join(text.split()), mode="eval").body, 0), numbers
    except (ValueError, SyntaxError, KeyError, AttributeError, ZeroDivisionError):  # AttributeError: of other nodes
        return None


# ----------------------------------------------------------------------------------------------------------------------
# walk: from a start to a target in at most six moves. A response is one line per move, the move and the number it leads
# to. From 17 to 30, for example, "+7 =24" and "+6 =30".

LARGEST = 59  # numbers are 0 to LARGEST
MAX_MOVES = 6
MOVES = (*(f"+{n}" for n in range(1, 11)), *(f"-{n}" for n in range(1, 11)), "*2", "*3")
LINE = re.compile(r"([-+*][0-9]{1,2}) =(0|[1-9][0-9]?)")
START_AND_TARGET = re.compile(r"(0|[1-9][0-9]?) to (0|[1-9][0-9]?)")


def after(move: str, number: int) -> int:
    """The number after a move. It may be out of range."""
    n = int(move[1:])
    return {"+": number + n, "-": number - n, "*": number * n}[move[0]]


def legal_moves(number: int) -> list[str]:
    """The moves from `number` that stay in range."""
    return [move for move in MOVES if 0 <= after(move, number) <= LARGEST]


def walk(response: str, answer: str) -> float:
    """1.0 if there are at most six lines, each a legal move with its right result, and the last reaches the target.

    Else 0.0. Spaces and newlines around the response are ignored. answer: "17 to 30", start and target.
    """
    numbers = [int(number) for number in match.groups()] if (match := START_AND_TARGET.fullmatch(answer)) else []
    if not numbers or max(numbers) > LARGEST:
        needed = f"'<start> to <target>' is needed, each from 0 to {LARGEST}"
        raise UserError(f"walk: answer '{answer[:40]}', where {needed}")
    number, target = numbers
    if len(response) > MAX_MOVES * len("+10 =59\n") + 2:  # a longer response has too many lines
        return 0.0
    lines = response.strip(" \n").split("\n")
    for line in lines:
        step = LINE.fullmatch(line)
        if not step or step[1] not in legal_moves(number) or after(step[1], number) != int(step[2]):
            return 0.0
        number = int(step[2])
    return float(number == target and len(lines) <= MAX_MOVES)
