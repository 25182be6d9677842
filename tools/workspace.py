"""A view of a W&B project in this project's order: entropy first, then reward and evaluation, then the rest.

    python -m tools.workspace --project my-name/ce-gppo        or: make workspace PROJECT=my-name/ce-gppo

W&B sorts the sections of its default workspace by name, `clip` before `entropy`, and a run cannot set their order by
its metrics. This saves a view beside it. It needs a key, and a project that has a run.
"""

from dataclasses import dataclass

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from ce_gppo.config import command
from ce_gppo.messages import UserError
from ce_gppo.metrics import METRICS


@dataclass
class Config:
    project: str  # entity/project


def workspace(entity: str, project: str) -> ws.Workspace:
    """One section for each section of the list of metrics, one chart for each of its lines."""
    sections = []
    for name, metrics in METRICS.items():
        panels = []
        for metric in metrics:
            if "<k>" in metric.names:
                continue  # by update within the step: too many for charts
            pattern = {"metric_regex": metric.pattern().pattern} if "<source>" in metric.names else {"y": metric.each()}
            panels.append(wr.LinePlot(title=", ".join(metric.names.split()), x="step", **pattern))
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
    command(main, Config, __doc__)
