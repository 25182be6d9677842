"""One HTML file that shows what training did to single tokens, from the tokens.jsonl of a run.

    python -m tools.view out/<run>        or: make view RUN=out/<run>

The page needs no server and loads nothing. Every token is coloured by its entropy, its entropy velocity, the side on
which it was clipped, its probability or its advantage. view.html beside this file is the page without its data.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ce_gppo.config import command
from ce_gppo.messages import UserError

TEMPLATE = Path(__file__).with_suffix(".html")
VALUES = ("old_logprobs", "entropy", "advantage", "ratio", "clipped", "weight", "velocity")
MAX_STEPS = 20  # in a page: one button for each
MAX_TOKENS = 60_000  # in a page: about 4 MB


@dataclass
class Config:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a run
    steps: tuple[int, ...] = ()  # steps to show; empty: as many as fit into a page, spread over the run
    out: Path | None = None  # file to write; None: tokens.html in the run's folder


def is_list_of(value, kind) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def load(run: Path) -> dict[int, list[dict]]:
    """step -> its rows of tokens.jsonl. UserError if there are none, or if training did not write a row so."""
    path = run / "tokens.jsonl"
    if not path.exists():
        raise UserError(f"{run}: no tokens.jsonl there, so it is not the folder of a run, or an older one; train again")
    steps: dict[int, list[dict]] = {}
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            lists = is_list_of(row["tokens"], str) and all(is_list_of(row[name], float | int | None) for name in VALUES)
            whole = lists and type(row["step"]) is int and len({len(row[name]) for name in ("tokens", *VALUES)}) == 1
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole and 1 < number == len(lines) and not text.endswith("\n"):
            break  # training is writing it
        if not whole:
            raise UserError(f"{path}:{number}: not a row as training writes it; remove this line")
        steps.setdefault(row["step"], []).append(row)
    if not steps:
        raise UserError(f"{path}: empty, as no step of this run had an update; more steps are needed")
    return steps


def choose(steps: dict[int, list[dict]], wanted: tuple[int, ...]) -> list[int]:
    """The wanted steps; or the most that a page holds, evenly spread, the first and the last among them."""
    if missing := [step for step in wanted if step not in steps]:
        raise UserError(
            f"--steps {missing[0]}: tokens were kept in the steps {', '.join(map(str, sorted(steps)))} only"
        )
    if wanted:
        return sorted(set(wanted))
    numbers = sorted(steps)
    sizes = [sum(len(row["tokens"]) for row in steps[number]) for number in numbers]
    for count in range(min(len(numbers), MAX_STEPS), 1, -1):
        chosen = sorted({round(i * (len(numbers) - 1) / (count - 1)) for i in range(count)})
        if sum(sizes[i] for i in chosen) <= MAX_TOKENS:
            return [numbers[i] for i in chosen]
    return numbers[-1:]


def page(run: Path, steps: dict[int, list[dict]]) -> str:
    """The HTML. Tokens are text that a model wrote: the page gets them as JSON, and shows them as text only."""
    data = json.dumps({"run": run.resolve().name, "steps": [{"step": step, "rows": steps[step]} for step in steps]})
    for character in "<>&":  # a token must not end the script element or begin a comment in it
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, _, after = TEMPLATE.read_text().partition("{{DATA}}")
    return before + data + after


def main(config: Config) -> None:
    steps = load(config.run)
    chosen = choose(steps, config.steps)
    out = config.out or config.run / "tokens.html"
    try:
        out.write_text(page(config.run, {step: steps[step] for step in chosen}))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    left = f"; {len(steps) - len(chosen)} more with --steps" if len(chosen) < len(steps) else ""
    print(f"{out}: {len(chosen)} steps{left}")


if __name__ == "__main__":
    command(main, Config, __doc__)
