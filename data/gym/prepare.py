"""Tasks of the library reasoning-gym: a hundred procedural ones, made here without a download of data.

    .venv/bin/python -m data.gym.prepare chain_sum maze                     each at the library's own difficulty
    .venv/bin/python -m data.gym.prepare chain_sum --set min_terms=4 max_terms=8 --name chain_sum_long
    .venv/bin/python -m data.gym.prepare                                    lists the tasks, and those that are refused

Run it from the repository root. The first use installs the library, from requirements/gym.txt. Writes <name>.jsonl and
<name>-eval.jsonl beside this file. The source of the rows is gym/<task>, and the library's own scorer their verifier.
"""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from data.arithmetic.prepare import positive

from ce_gppo.config import command
from ce_gppo.messages import UserError
from ce_gppo.verifier import countdown, gym
from data.convert import write

HERE = Path(__file__).parent
LOCK = HERE.parents[1] / "requirements" / "gym.txt"
INSTRUCTION = "Think step by step, then give only the final answer between <answer> and </answer>."
NONSENSE = "<answer>no idea</answer>"


def install() -> None:
    """Install the library into this Python's environment, unless it is there."""
    if importlib.util.find_spec("reasoning_gym"):
        return
    print(f"installing reasoning-gym from {LOCK}, once", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(LOCK)]
    if subprocess.run(pip).returncode:
        raise UserError(
            "reasoning-gym cannot be installed; pip's output is above (pycosat, one of its packages, needs a C "
            f"compiler). The command: {' '.join(pip)}"
        )


def settings(task: str, given: list[str]) -> dict:
    """The task's configuration from NAME=VALUE, the values in JSON. UserError for an unknown name."""
    Config = gym.task_of(task)[1] if task != "countdown" else gym.tasks()[task][1]
    names = {field.name for field in dataclasses.fields(Config)} - {"seed", "size"}
    config = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise UserError(
                f"gym/{task}: --set {text}: NAME=VALUE is needed, with a NAME of {', '.join(sorted(names))}"
            )
        try:
            config[name] = json.loads(value)
        except ValueError:
            config[name] = value
    return config


def make(task: str, config: dict, seed: int, count: int, seen: set[str]) -> list[dict]:
    """Up to `count` rows whose question is not in `seen`, which grows by them. The same arguments give the same rows.

    A problem that the library fails to make is left out, and counted. UserError if it makes none, if it refuses the
    configuration, or if its scorer is wrong: about all of its own answers, or about a response without an answer.
    """
    ours = task == "countdown"
    Data, Config = gym.tasks()[task] if ours else gym.task_of(task)
    try:
        data = Data(config=Config(seed=seed, size=4 * count, **config))
    except Exception as error:  # the library checks by assert and by its own errors
        raise UserError(f"gym/{task}: the library refuses this configuration: {error}") from None
    score = (lambda *pair: countdown.score(*pair)["correctness"]) if ours else gym.scorer(f"gym/{task}")
    rows, unmade, unscored, fooled = [], 0, 0, 0
    for index in range(len(data)):
        if len(rows) == count or max(unmade, unscored) > count:
            break
        try:
            entry = data[index]
        except Exception:  # it gives up after some random tries: on one maze in 5,000, say
            unmade += 1
            continue
        if entry["question"] in seen:
            continue
        seen.add(entry["question"])
        answer = {"answer": entry["answer"], "metadata": entry["metadata"], "config": config}
        if ours:
            answer = {"numbers": entry["metadata"]["numbers"], "target": entry["metadata"]["target"]}
        answer = json.dumps(answer)
        if entry["answer"] is not None and score(f"<answer>{entry['answer']}</answer>", answer) != 1:
            unscored += 1
            continue
        fooled += score(NONSENSE, answer) == 1
        message = {"role": "user", "content": f"{entry['question']}\n{INSTRUCTION}"}
        rows.append({"prompt": [message], "answer": answer, "source": f"gym/{task}"})
    if not rows and unmade:
        raise UserError(f"gym/{task}: refused, since the library fails to make its problems")
    if not rows:
        raise UserError(f"gym/{task}: refused, since its scorer finds none of the library's own answers right")
    if fooled == len(rows):
        raise UserError(f"gym/{task}: refused, since its scorer finds {NONSENSE} right")
    if unmade or unscored or len(rows) < count:
        print(
            f"gym/{task}, seed {seed}: {len(rows)} distinct problems of {count}; left out: {unscored} whose answer is "
            f"not right, {unmade} that the library failed to make"
        )
    return rows


def listing() -> str:
    known = gym.tasks()
    refused = {name: by for name, (Data, _) in sorted(known.items()) if (by := gym.evaluates(Data))}
    refused.pop("countdown")
    lines = [
        f"tasks: {' '.join(sorted(known.keys() - refused.keys()))}",
        "refused, since the scorer evaluates answers:",
    ]
    return "\n".join(lines + [f"    {name}, by {by}" for name, by in refused.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="NAME", help="of reasoning-gym; without any they are listed")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of the task's configuration")
    parser.add_argument("--name", help="of the files (default: the task's)")
    parser.add_argument("--train", type=positive, default=8192, help="training problems")
    parser.add_argument("--held-out", type=positive, default=256, help="evaluation problems; training has none of them")
    parser.add_argument("--seed", type=positive, default=1, help="of training; the held-out problems have the next one")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    args = parser.parse_args()
    install()
    if not args.tasks:
        print(listing())
    if (args.set or args.name) and len(args.tasks) != 1:
        raise UserError("--set and --name are about one task; give exactly one NAME")
    for task in args.tasks:
        config, seen = settings(task, args.set), set()
        held_out = make(task, config, args.seed + 1, args.held_out, seen)
        train = make(task, config, args.seed, args.train, seen)
        name = args.name or task
        write(train, args.out / f"{name}.jsonl")
        write(held_out, args.out / f"{name}-eval.jsonl")


if __name__ == "__main__":
    command(main)
