"""Write docs/metrics.md from the rows in the docstrings of the functions that compute the metrics.

python -m tools.metrics
"""

import inspect
import re
from pathlib import Path

from ce_gppo import advantages, evaluation, metrics, perf

SECTIONS = ("Entropy", "Reward", "Evaluation", "Rollout", "Clipping", "Optimization", "Critic", "vLLM against trainer")
PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# The metrics

One row per step, the same in W&B and in `metrics.jsonl`. `python -m tools.metrics` makes this page from the code.

**PA** and **NA** are tokens of positive and negative advantage. **LP** and **HP** are tokens of low and high
probability under the rollout weights: LP where log p < -H, with H the entropy there. The four quadrants are
`pa_hp`, `pa_lp`, `na_hp`, `na_lp`.
"""


def rows() -> list[list[str]]:
    """[section, names, unit, meaning, healthy] of each row, in the order of the code."""
    functions = [value for module in (metrics, perf, evaluation) for value in vars(module).values()]
    found = [inspect.getdoc(f) or "" for f in (*functions, perf.Meter.take, advantages.Critic.learn) if callable(f)]
    lines = re.findall(r"^([A-Zv][\w ]+): (.+(?:\n    .+)*)", "\n".join(dict.fromkeys(found)), re.M)
    cells = [[section, *(" ".join(cell.split()) for cell in row.split("|"))] for section, row in lines]
    return [row for row in cells if len(row) == 5]


def page() -> str:
    text = HEAD
    for section in (*SECTIONS, "Speed"):
        text += f"\n## {section}\n\n| metric | unit | meaning | healthy |\n|---|---|---|---|\n"
        for names, *cells in [row[1:] for row in rows() if row[0] == section]:
            text += f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
