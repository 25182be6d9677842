"""Data set `countdown`: reach a target with three or four numbers. The task of TinyZero, GRPO-Zero and nano-aha-moment.

    .venv/bin/python -m data.countdown.prepare                      made here, without a download
    .venv/bin/python -m data.countdown.prepare --hub                from the hub: the data set that the three use
    .venv/bin/python -m data.countdown.prepare --file tasks.parquet     a local copy of it: .parquet, .json or .jsonl

Run it from the repository root. Writes train.jsonl and eval.jsonl beside this file. A problem is their prompt over the
numbers and the target, such as [19, 36, 55, 7] and 65; `countdown` in reward.py checks the expression.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from ce_gppo.config import command
from ce_gppo.messages import UserError
from data.common import arguments, positive, splitting, write
from data.convert import Source, read_file, read_hub

HUB = Source("Jiayi-Pan/Countdown-Tasks-3to4", "main", "train", 490_364)
SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in your mind and then provide the user "
    "with the answer."
)
PROMPT = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final "
    "answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
LARGEST = 99  # numbers are 1 to LARGEST
TARGETS = range(10, 101)

Task = tuple[tuple[int, ...], int]  # numbers, target


def make(rng: random.Random, count: int) -> Task:
    """A task with `count` numbers that has a solution in whole, positive numbers."""
    while True:
        numbers = tuple(rng.randint(1, LARGEST) for _ in range(count))
        left = list(numbers)
        while len(left) > 1:
            a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
            results = [a + b, a * b] + [a - b] * (a > b) + [a // b] * (a % b == 0)
            left.append(rng.choice(results))
        if left[0] in TARGETS:
            return numbers, left[0]


def make_all(total: int, seed: int) -> Iterator[Task]:
    """Tasks, three and four numbers in turn. The same arguments give the same tasks."""
    rng = random.Random(seed)
    for i in range(total):
        yield make(rng, 3 + i % 2)


def read(raw: Iterable[dict], where: str) -> Iterator[Task]:
    """Tasks of the hub's rows, {"nums": [19, 36, 55, 7], "target": 65}."""
    for number, row in enumerate(raw, start=1):
        numbers, target = (row.get("nums"), row.get("target")) if isinstance(row, dict) else (None, None)
        if not isinstance(numbers, list) or not numbers or not all(type(n) is int for n in [*numbers, target]):
            raise UserError(f"{where}, row {number}: whole numbers under 'nums' and 'target' are needed")
        yield tuple(numbers), target


def split(tasks: Iterable[Task], train: int, held_out: int) -> tuple[list[Task], list[Task]]:
    """(training, held-out) tasks, the last ones held out, as in TinyZero. The order of numbers does not count."""
    distinct: dict[Task, Task] = {}
    for numbers, target in tasks:
        distinct.setdefault((tuple(sorted(numbers)), target), (numbers, target))
        if len(distinct) == train + held_out:
            break
    if len(distinct) <= held_out:
        raise UserError(f"{len(distinct)} distinct tasks are too few for {held_out} held-out ones and some to train on")
    tasks = list(distinct.values())
    return tasks[:-held_out], tasks[-held_out:]


def answer(numbers: tuple[int, ...], target: int) -> str:
    """The task, in the form that ce_gppo/verifier/puzzles.py reads."""
    return json.dumps({"numbers": list(numbers), "target": target})


def row(numbers: tuple[int, ...], target: int, system: bool) -> dict:
    prompt = [{"role": "system", "content": SYSTEM}] if system else []
    prompt.append({"role": "user", "content": PROMPT.format(numbers=list(numbers), target=target)})
    return {"prompt": prompt, "answer": answer(numbers, target), "source": "countdown"}


def main() -> None:
    parser = splitting(arguments(__doc__, Path(__file__).parent), held_out=1_024)
    parser.add_argument("--train", type=positive, default=327_680, help="training problems, at most; TinyZero's number")
    parser.add_argument("--no-system", action="store_true", help="no system message; some chat templates refuse one")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--file", help="local .parquet, .json or .jsonl with nums and target")
    where.add_argument("--hub", action="store_true", help=f"read {HUB.hub}")
    parser.add_argument("--revision", default=HUB.revision, help="commit, branch or tag of the hub")
    args = parser.parse_args()
    if args.file:
        tasks = read(read_file(args.file), args.file)
    elif args.hub:
        tasks = read(read_hub(HUB, args.revision), HUB.hub)
    else:
        tasks = make_all(4 * (args.train + args.held_out), args.seed)
    for name, chosen in zip(("train", "eval"), split(tasks, args.train, args.held_out), strict=True):
        write([row(*task, not args.no_system) for task in chosen], args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
