"""Data set `arithmetic`: sums of several signed terms, to be worked out step by step.

    .venv/bin/python -m data.arithmetic.prepare        writes train.jsonl and eval.jsonl beside this file

Run it from the repository root. A problem is "3+8-2+9-4=?". A right working adds the terms one by one, in any order,
and boxes the total. Five terms have 5! = 120 orders. One of them:

    8-4=4
    4+3=7
    7+9=16
    16-2=14
    \\boxed{14}
"""

import argparse
import random
from pathlib import Path

from ce_gppo.config import command
from ce_gppo.messages import UserError
from data.convert import write

HERE = Path(__file__).parent


def problem(rng: random.Random, terms: int, largest: int) -> list[int]:
    """Random signed terms. None is 0; the first is positive, a third of the others are negative."""
    return [rng.choice((1, 1, -1 if i else 1)) * rng.randint(1, largest) for i in range(terms)]


def show(terms: list[int]) -> str:
    """[3, 8, -2] -> '3+8-2'"""
    return "".join(f"{term:+d}" for term in terms).removeprefix("+")


def working(rng: random.Random, terms: list[int]) -> str:
    """One of the right workings; all orders are equally likely."""
    order = rng.sample(terms, len(terms))
    total, lines = order[0], []
    for term in order[1:]:
        lines.append(f"{total}{term:+d}={total + term}")
        total += term
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def prompt(terms: list[int]) -> list[dict[str, str]]:
    return [{"role": "user", "content": show(terms) + "=?"}]


def splits(seed: int, terms: int, largest: int, train: int, held_out: int) -> tuple[list[list[int]], list[list[int]]]:
    """(training, held-out) problems, all distinct. The same arguments give the same problems."""
    if train + held_out > largest**terms * 2 ** (terms - 1) // 2:
        raise UserError(f"there are no {train + held_out} distinct sums of {terms} terms up to {largest}")
    rng = random.Random(seed)
    distinct: dict[str, list[int]] = {}
    while len(distinct) < train + held_out:
        terms_ = problem(rng, terms, largest)
        distinct[show(terms_)] = terms_
    problems = list(distinct.values())
    return problems[held_out:], problems[:held_out]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 upwards, not {text}")
    return int(text)


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line that prepare.py and base.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    parser.add_argument("--terms", type=positive, default=5, help="terms of a sum")
    parser.add_argument("--largest", type=positive, default=9, help="largest absolute value of a term")
    parser.add_argument("--train", type=positive, default=8192, help="training problems")
    parser.add_argument("--held-out", type=positive, default=256, help="evaluation problems; training has none of them")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    for name, problems in zip(
        ("train", "eval"), splits(args.seed, args.terms, args.largest, args.train, args.held_out), strict=True
    ):
        rows = [{"prompt": prompt(p), "answer": str(sum(p)), "source": "arithmetic"} for p in problems]
        write(rows, args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
