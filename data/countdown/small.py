"""Small tasks of `countdown`, for a small base policy: three numbers from 1 to 9 and a short prompt.

    .venv/bin/python -m data.countdown.small        writes small-train.jsonl and small-eval.jsonl beside this file

Run it from the repository root. A problem is "numbers 5 7 9 target 44". A right response works with two numbers, then
with their result and the third, and ends with the whole expression. The base policy imitates such responses, and is
stopped early: its arithmetic is right, but it mostly misses the target.

    7*5=35
    35+9=44
    <answer>(7*5)+9</answer>
"""

import random
from functools import cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path

from ce_gppo.config import command
from data.common import arguments, split, splitting, write
from data.countdown.prepare import answer

LARGEST, LARGEST_RESULT = 9, 81
TARGETS = range(10, LARGEST_RESULT + 1)
WORDS = ("numbers", "target", "<answer>", "</answer>", *map(str, range(10, LARGEST_RESULT + 1)))  # one token each
MAX_TOKENS = 32
EXCESS = 3.3  # nats per response, at which the imitation stops


def results(a: int, b: int) -> dict[str, int]:
    """The steps that a number and another one allow: whole, positive results that are one token."""
    found = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else 0}
    return {sign: result for sign, result in found.items() if 1 <= result <= LARGEST_RESULT}


@cache
def workings(numbers: tuple[int, ...]) -> list[tuple[str, int]]:
    """Each way to work with three numbers: (response, its value)."""
    found = []
    for a, b, c in sorted(set(permutations(numbers))):
        for first, middle in results(a, b).items():
            inner = f"{a}{first}{b}"
            for x, y, left, right in ((middle, c, f"({inner})", f"{c}"), (c, middle, f"{c}", f"({inner})")):
                for second, value in results(x, y).items():
                    steps = f"{inner}={middle}\n{x}{second}{y}={value}\n"
                    found.append((f"{steps}<answer>{left}{second}{right}</answer>", value))
    return found


def splits(seed: int, held_out: int) -> tuple[list[tuple], list[tuple]]:
    """(training, held-out) tasks: all numbers with all targets that they reach."""
    tasks = []
    for numbers in combinations_with_replacement(range(1, LARGEST + 1), 3):
        tasks += [(numbers, value) for value in sorted({value for _, value in workings(numbers)}) if value in TARGETS]
    return split(tasks, held_out, seed)


def row(numbers: tuple[int, ...], target: int) -> dict:
    prompt = [{"role": "user", "content": f"numbers {' '.join(map(str, numbers))} target {target}"}]
    return {"prompt": prompt, "answer": answer(numbers, target), "source": "countdown"}


def trace(rng: random.Random, numbers: tuple[int, ...], target: int) -> list[tuple[str, dict[str, float]]]:
    """A right response, in the form of data/walk's traces; no probabilities are known."""
    return [(rng.choice([response for response, value in workings(numbers) if value == target]), {})]


def main() -> None:
    args = splitting(arguments(__doc__, Path(__file__).parent), held_out=256).parse_args()
    for name, tasks in zip(("train", "eval"), splits(args.seed, args.held_out), strict=True):
        write([row(*task) for task in tasks], args.out / f"small-{name}.jsonl")


if __name__ == "__main__":
    command(main)
