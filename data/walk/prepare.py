"""Data set `walk`: reach a target from a start in at most six of 22 moves. There are many right ways.

    .venv/bin/python -m data.walk.prepare        writes train.jsonl and eval.jsonl beside this file

Run it from the repository root. Numbers are 0 to 59; the moves are +1 to +10, -1 to -10, *2 and *3. A problem is
"start =17, target =30" on two lines. A right response has a line for each move, with the number it leads to:

    +7 =24
    +6 =30

To the base policy each move is one token, and so is each number, " =24" with the end of its line. It imitates traces
that head for the target in 70 % of their moves, and move at random in the others. Half of them do not arrive.
"""

import random
from functools import cache
from pathlib import Path

from ce_gppo.config import command
from ce_gppo.verifier.puzzles import LARGEST, MAX_MOVES, MOVES, after, legal_moves
from data.common import arguments, split, splitting, write

WORDS = ("start", "target", *MOVES, *(f" ={number}\n" for number in range(LARGEST + 1)))  # one token each
MAX_TOKENS = 2 * MAX_MOVES + 1
HEADING = 0.7  # share of the moves that head for the target: they end nearer to it
EXCESS = 0.35  # nats per response above the traces' own entropy, at which the imitation stops


def row(start: int, target: int) -> dict:
    prompt = [{"role": "user", "content": f"start ={start}\ntarget ={target}\n"}]
    return {"prompt": prompt, "answer": f"{start} to {target}", "source": "walk"}


def splits(seed: int, held_out: int) -> tuple[list[tuple], list[tuple]]:
    """(training, held-out) problems: all pairs of different numbers."""
    numbers = range(LARGEST + 1)
    return split([(start, target) for start in numbers for target in numbers if start != target], held_out, seed)


@cache
def choices(number: int, target: int) -> dict[str, float]:
    """The probabilities of a trace's next move."""
    legal = legal_moves(number)
    heading = [move for move in legal if abs(after(move, number) - target) < abs(number - target)]
    return {move: HEADING * (move in heading) / len(heading) + (1 - HEADING) / len(legal) for move in legal}


def trace(rng: random.Random, number: int, target: int) -> list[tuple[str, dict[str, float]]]:
    """A response that arrives or runs out of moves, in parts: a text, and what could have stood there instead of it.

    The second is empty if nothing else could; else both are of one token each, and the probabilities add up to 1.
    """
    parts = []
    while number != target and len(parts) < 2 * MAX_MOVES:
        possible = choices(number, target)
        (move,) = rng.choices(list(possible), possible.values())
        number = after(move, number)
        parts += [(move, possible), (f" ={number}\n", {})]
    return parts


def main() -> None:
    args = splitting(arguments(__doc__, Path(__file__).parent), held_out=256).parse_args()
    for name, problems in zip(("train", "eval"), splits(args.seed, args.held_out), strict=True):
        write([row(*problem) for problem in problems], args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
