"""The task `walk`: from a start to a target in at most six moves. Its rules, and its verifier, which checks every line.

A response is one line per move, the move and the number it leads to. From 17 to 30, for example:

    +7 =24
    +6 =30
"""

import re

from ce_gppo.messages import UserError

LARGEST = 59  # numbers are 0 to LARGEST
MAX_MOVES = 6
MOVES = (*(f"+{n}" for n in range(1, 11)), *(f"-{n}" for n in range(1, 11)), "*2", "*3")
MAX_CHARS = MAX_MOVES * len("+10 =59\n") + 2  # a longer response has too many lines

LINE = re.compile(r"([-+*][0-9]{1,2}) =(0|[1-9][0-9]?)")
ANSWER = re.compile(r"(0|[1-9][0-9]?) to (0|[1-9][0-9]?)")


def after(move: str, number: int) -> int:
    """The number after a move. It may be out of range."""
    operand = int(move[1:])
    return {"+": number + operand, "-": number - operand, "*": number * operand}[move[0]]


def legal_moves(number: int) -> list[str]:
    """The moves from `number` that stay in range."""
    return [move for move in MOVES if 0 <= after(move, number) <= LARGEST]


def score(response: str, answer: str) -> float:
    """1.0 if there are at most six lines, each a legal move with its right result, and the last reaches the target.

    Else 0.0. Spaces and newlines around the response are ignored. answer: "17 to 30", start and target. UserError for
    any other form.
    """
    numbers = [int(number) for number in match.groups()] if (match := ANSWER.fullmatch(answer)) else []
    if not numbers or max(numbers) > LARGEST:
        raise UserError(
            f"walk: answer '{answer[:40]}', where '<start> to <target>' is needed, each from 0 to {LARGEST}"
        )
    number, target = numbers
    if len(response) > MAX_CHARS:
        return 0.0
    lines = response.strip(" \n").split("\n")
    for line in lines:
        step = LINE.fullmatch(line)
        if not step or step[1] not in legal_moves(number) or after(step[1], number) != int(step[2]):
            return 0.0
        number = int(step[2])
    return float(number == target and len(lines) <= MAX_MOVES)
