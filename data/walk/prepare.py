"""Data set `walk`: reach a target from a start in at most six of 22 moves. There are many right ways.

    .venv/bin/python -m data.walk.prepare        writes train.jsonl and eval.jsonl beside this file

Run it from the repository root. Numbers are 0 to 59; the moves are +1 to +10, -1 to -10, *2 and *3. A problem is
"start =17, target =30" on two lines. A right response has a line for each move, with the number it leads to:

    +7 =24
    +6 =30

To the base policy each move is one token, and so is each number, " =24" with the end of its line.
"""

import argparse
import random
from pathlib import Path

from ce_gppo.config import command
from ce_gppo.messages import UserError
from ce_gppo.verifier.puzzles import LARGEST, MOVES
from data.arithmetic.prepare import positive
from data.convert import write

HERE = Path(__file__).parent
WORDS = ("start", "target", *MOVES, *(f" ={number}\n" for number in range(LARGEST + 1)))  # one token each


def prompt(start: int, target: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"start ={start}\ntarget ={target}\n"}]


def answer(start: int, target: int) -> str:
    """The problem, in the form that ce_gppo/verifier/puzzles.py reads."""
    return f"{start} to {target}"


def splits(seed: int, held_out: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(training, held-out) problems: all pairs of different numbers. The same arguments give the same problems."""
    numbers = range(LARGEST + 1)
    problems = [(start, target) for start in numbers for target in numbers if start != target]
    if held_out >= len(problems):
        raise UserError(f"--held-out {held_out}: there are {len(problems)} problems, and training needs some")
    random.Random(seed).shuffle(problems)
    return problems[held_out:], problems[:held_out]


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line that prepare.py and base.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    parser.add_argument("--held-out", type=positive, default=256, help="evaluation problems; training has none of them")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    for name, problems in zip(("train", "eval"), splits(args.seed, args.held_out), strict=True):
        rows = [{"prompt": prompt(*pair), "answer": answer(*pair), "source": "walk"} for pair in problems]
        write(rows, args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
