"""The row of docs/leaderboard.md: minutes of training until the held-out accuracy on `walk` is 0.80.

make speedrun ARGS="--objective grpo"        settings as for train.py
"""

import subprocess
import sys
import time
from pathlib import Path

from ce_gppo.config import command, read_record
from ce_gppo.log import read_rows
from ce_gppo.messages import RunEnded

ROOT, MARK = Path(__file__).parents[1], 0.8


def main() -> None:
    arguments, folder = sys.argv[1:], ROOT / "out" / f"speedrun-{time.strftime('%m%d-%H%M%S')}"
    started = ["train.py", "--out", str(folder.parent), "--run-name", folder.name, "--eval-every", "4", *arguments]
    if subprocess.run([sys.executable, *started], cwd=ROOT).returncode:
        raise RunEnded("the run has failed, so there is no row")
    print(row_of(folder, " ".join(arguments) or "the defaults"))


def row_of(folder: Path, what: str) -> str:
    """RunEnded if the run never reached the mark. Evaluations count: they are part of finding out."""
    seconds = 0.0
    for row in read_rows(folder / "metrics.jsonl"):
        seconds += row.get("time/step", 0.0) + row.get("time/eval", 0.0)
        if row.get("eval/walk/avg_at_k", 0.0) >= MARK:
            commit = str(read_record(folder / "config.json")["git_commit"])[:7]
            return f"| {seconds / 60:.1f} | {row['step']} | `{what}` | {commit} | |"
    raise RunEnded(f"{folder}: the accuracy never reached {MARK}")


if __name__ == "__main__":
    command(main)
