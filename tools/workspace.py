"""A view of a W&B project in this project's order: entropy first, then reward and evaluation, then the rest.

    python workspace.py --project my-name/ce-gppo        or: make workspace PROJECT=my-name/ce-gppo

W&B sorts the sections of its default workspace by name, `clip` before `entropy`, and a run cannot set their order by
what it logs. This saves a view beside it; it needs a key, and a project that has a run.
"""

import sys
from dataclasses import dataclass

import tyro
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from prompts import UserError

# Section: charts of one or more metrics each.
SECTIONS = {
    "Entropy": [
        ["entropy/mean", "entropy/p10", "entropy/p90"],
        ["velocity/pa_hp", "velocity/pa_lp", "velocity/na_hp", "velocity/na_lp", "velocity/total"],
        ["velocity/clipped_low", "velocity/clipped_high"],
        ["entropy/pa_hp", "entropy/pa_lp", "entropy/na_hp", "entropy/na_lp"],
        ["entropy/delta", "velocity/total"],
        ["tokens/pa_hp", "tokens/pa_lp", "tokens/na_hp", "tokens/na_lp"],
    ],
    "Reward and evaluation": [
        ["reward/mean", "reward/pass_at_g"],
        ["reward/group_solved_all", "reward/group_solved_none"],
        [r"eval/.*/avg_at_k"],
        [r"eval/.*/pass_at_k"],
        ["response/length_mean", "response/length_max"],
        ["response/truncated"],
    ],
    "Clipping": [
        ["clip/low", "clip/high"],
        ["clip/prob_low", "clip/prob_high"],
        ["weight/low", "weight/high", "weight/inside"],
        ["optim/beta1", "optim/beta2"],
        ["ratio/min", "ratio/max"],
        ["kl/old"],
    ],
    "Optimization": [["optim/loss"], ["optim/grad_norm"], ["optim/lr"], ["optim/skipped"], ["optim/updates"]],
    "vLLM against trainer": [["mismatch/kl"], ["mismatch/ratio_p99", "mismatch/ratio_max"]],
    "Speed": [
        ["time/rollout", "time/reward", "time/old_logprobs", "time/update", "time/sync", "time/eval"],
        ["perf/rollout_tokens_per_s", "perf/update_tokens_per_s"],
        ["perf/mfu"],
        ["perf/peak_memory_gib"],
    ],
}


@dataclass
class Config:
    project: str  # entity/project


def workspace(entity: str, project: str) -> ws.Workspace:
    sections = []
    for name, charts in SECTIONS.items():
        panels = []
        for metrics in charts:
            pattern = {"metric_regex": metrics[0]} if "*" in metrics[0] else {"y": metrics}
            panels.append(wr.LinePlot(title=", ".join(metrics), x="step", **pattern))
        sections.append(ws.Section(name=name, panels=panels, is_open=name in ("Entropy", "Reward and evaluation")))
    return ws.Workspace(entity=entity, project=project, name="ce-gppo", sections=sections)


def main(config: Config) -> None:
    entity, slash, project = config.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise UserError(f"--project {config.project}: must be ENTITY/PROJECT, as in my-name/ce-gppo")
    try:
        print(workspace(entity, project).save().url)
    except Exception as error:  # no key, no network, no such project: W&B's errors are of many classes
        raise UserError(f"W&B did not take the view of {config.project}: {error}; log in with `wandb login`") from None


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"workspace.py: {error}", file=sys.stderr)
        sys.exit(2)
