"""A small base policy for `countdown`, with tasks of its own: three numbers from 1 to 9 and a short prompt.

    python -m data.countdown.base      writes base/, small-train.jsonl and small-eval.jsonl beside this file

Run it from the repository root. It takes a minute and a half of one core. A problem is "numbers 5 7 9 target 44". A
right response works with two numbers, then with their result and the third, and ends with the whole expression:

    7*5=35
    35+9=44
    <answer>(7*5)+9</answer>

The policy imitates such responses, and is stopped early: its arithmetic is right, but it mostly misses the target. Each
number is one token. It never sees a held-out task.
"""

import argparse
import json
import random
from functools import cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path

import torch

from ce_gppo.config import command
from ce_gppo.verifier.puzzles import countdown as score
from data.arithmetic.prepare import positive
from data.base import Example, add_arguments, imitate, make_folder, make_model, make_tokenizer, sample, summary
from data.convert import write

HERE = Path(__file__).parent
LARGEST, LARGEST_RESULT = 9, 81
TARGETS = range(10, LARGEST_RESULT + 1)
WORDS = ("numbers", "target", "<answer>", "</answer>", *map(str, range(10, LARGEST_RESULT + 1)))  # one token each
SAMPLES = 8  # of each held-out task, for pass@8

Task = tuple[tuple[int, ...], int]  # numbers, target


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


def splits(seed: int, held_out: int) -> tuple[list[Task], list[Task]]:
    """(training, held-out) tasks: all numbers with all targets that they reach. The same seed gives the same tasks."""
    tasks = []
    for numbers in combinations_with_replacement(range(1, LARGEST + 1), 3):
        tasks += [(numbers, value) for value in sorted({value for _, value in workings(numbers)}) if value in TARGETS]
    random.Random(seed).shuffle(tasks)
    return tasks[held_out:], tasks[:held_out]


def prompt(numbers: tuple[int, ...], target: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"numbers {' '.join(map(str, numbers))} target {target}"}]


def answer(numbers: tuple[int, ...], target: int) -> str:
    """The task, in the form that ce_gppo/verifier/puzzles.py reads."""
    return json.dumps({"numbers": list(numbers), "target": target})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    parser.add_argument("--held-out", type=positive, default=256, help="evaluation tasks; training has none of them")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser, excess=3.3, max_steps=1500, batch_size=32)
    args = parser.parse_args()
    out = make_folder(parser, args.out / "base")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    training, held_out = splits(args.seed, args.held_out)
    for name, tasks in (("small-train", training), ("small-eval", held_out)):
        rows = [{"prompt": prompt(*task), "answer": answer(*task), "source": "countdown"} for task in tasks]
        write(rows, args.out / f"{name}.jsonl")

    def draw(count: int) -> list[Example]:
        examples = []
        for numbers, target in rng.choices(training, k=count):
            response = rng.choice([response for response, value in workings(numbers) if value == target])
            examples.append(Example(prompt(numbers, target), response, least=0.0))
        return examples

    tokenizer = make_tokenizer(WORDS)
    model = make_model(tokenizer, hidden_size=192, num_layers=2)
    steps = imitate(model, tokenizer, draw, args.excess, args.max_steps, args.batch_size)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    tasks = [task for task in held_out for _ in range(SAMPLES)]
    responses, entropy = sample(model, tokenizer, [prompt(*task) for task in tasks], 32)
    scores = [score(text or "", answer(*task))["correctness"] for task, text in zip(tasks, responses, strict=True)]
    print(summary(out, model, steps, scores, SAMPLES, entropy))


if __name__ == "__main__":
    command(main)
