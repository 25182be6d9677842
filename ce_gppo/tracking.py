"""W&B: starting a run there, online or offline, and the environment variables for it."""

import dataclasses
import hashlib
import json
import netrc
import os
import secrets
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from ce_gppo.messages import UserError, say

PROJECT = "ce-gppo"


def new_id() -> str:
    """The id of a new run in W&B. A sweep's run has one from `wandb agent`, and W&B ignores any other there."""
    return ("WANDB_SWEEP_ID" in os.environ and os.environ.get("WANDB_RUN_ID")) or secrets.token_hex(4)


def start_wandb(folder: Path, config, run_id: str):
    """A W&B run; None if WANDB_MODE=disabled, or if W&B fails. Without a key it is offline: no account is needed.

    It belongs to the project WANDB_PROJECT, by default ce-gppo, of WANDB_ENTITY, by default the key's owner.

    A resumed run has the same run_id as before, and continues the same W&B run.
    """
    mode = wandb_mode()
    if mode == "disabled":
        return None
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    options = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "group": group_of(config), "name": folder.name}
    options |= {"dir": folder, "id": run_id, "mode": mode}
    if mode != "offline":
        options |= {"resume": "allow", "settings": wandb.Settings(init_timeout=30)}
    try:
        run = wandb.init(**options, config=dataclasses.asdict(config))
    except Exception as error:  # no network, or a key that is not valid
        say(f"W&B cannot be reached, logging offline ({error})", warning=True)
        wandb.teardown()  # otherwise W&B refuses the run's id as taken
        try:
            run = wandb.init(**options | {"mode": "offline", "resume": None}, config=dataclasses.asdict(config))
        except Exception as again:  # a full disk, an environment variable that it cannot read
            say(f"W&B fails and is off, metrics.jsonl goes on ({again})", warning=True)
            return None
    run.define_metric("step", hidden=True)
    run.define_metric("update_*", step_metric="step", hidden=True)  # logged, without charts of their own
    run.define_metric("*", step_metric="step")
    return run


def log_wandb(run, row: dict, samples: list[dict], histograms: dict[str, Tensor]) -> None:
    """A row of metrics.jsonl, with a table of samples and histograms of probabilities, counts [bins] over [0, 1]."""
    import wandb

    media = {}
    for name, counts in histograms.items():
        edges = [i / len(counts) for i in range(len(counts) + 1)]
        media[name] = wandb.Histogram(np_histogram=(counts.tolist(), edges))
    if samples:  # each table is an artifact of its own
        columns = list(dict.fromkeys(name for sample in samples for name in sample))  # components differ by source
        data = [[sample.get(name) for name in columns] for sample in samples]
        media["samples"] = wandb.Table(columns=columns, data=data)
    run.log(row | media, step=row["step"])


def finish_wandb(run, failed: bool) -> tuple[str, str]:
    """End the run. Returns a row of the table at the end: a label, and the run's address or its upload command."""
    offline = run.settings.mode == "offline"
    run.finish(exit_code=int(failed))
    if not offline:
        return "W&B", run.url
    command = os.path.relpath(Path(sys.executable).with_name("wandb"))
    # Each start of a resumed run has left a folder. All folders, in order, make up the run.
    parts = sorted(Path(run.dir).parents[1].glob("offline-run-*"))
    return "W&B, offline; upload with", f"{command} sync --id {run.id} {shlex.join(map(str, parts))}"


def group_of(config) -> str:
    """The W&B group: the same for runs that differ only in their seed, name and folder."""
    settings = dataclasses.asdict(config)
    for name in ("seed", "run_name", "out"):
        del settings[name]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{config.objective}-{digest[:6]}"


def wandb_mode() -> str | None:
    """WANDB_MODE. If it is unset: offline without a key, and None with one, which means online to W&B."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # W&B refuses an empty value; it means unset
    mode = os.environ.get("WANDB_MODE")
    if mode not in (None, "online", "offline", "shared", "disabled"):
        raise UserError(f"WANDB_MODE={mode}: online, offline, shared or disabled is needed, or none")
    return mode if mode or _has_wandb_key() else "offline"


def check_wandb() -> None:
    """UserError for a WANDB_MODE or WANDB_PROJECT that W&B refuses."""
    if wandb_mode() != "disabled" and (project := os.environ.get("WANDB_PROJECT")):
        import wandb

        try:
            wandb.Settings(project=project)
        except Exception as error:
            raise UserError(f"WANDB_PROJECT={project}: {error}; WANDB_ENTITY names its owner") from None


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = os.environ.get("NETRC")
    try:
        return host in netrc.netrc(file and os.path.expanduser(file)).hosts
    except (OSError, ValueError, netrc.NetrcParseError):  # the last one also where others may read the file
        return False
