"""W&B, online or offline, and its environment variables; rows of samples.jsonl and tokens.jsonl."""

import contextlib
import dataclasses
import hashlib
import json
import math
import netrc
import os
import secrets
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ce_gppo import __version__
from ce_gppo.batch import Rollout
from ce_gppo.entropy import entropy_velocity
from ce_gppo.messages import UserError, say

SHOWN = 4  # responses of a step in samples.jsonl and in W&B, and updates with rows in tokens.jsonl
MAX_TOKENS = 2000  # of a response in a row of tokens.jsonl; the middle of a longer one is left out


def new_id() -> str:
    """The id of a new run in W&B. A sweep's run has one from `wandb agent`, and W&B ignores any other there."""
    return ("WANDB_SWEEP_ID" in os.environ and os.environ.get("WANDB_RUN_ID")) or secrets.token_hex(4)


def start_wandb(folder: Path, config, run_id: str):
    """A W&B run in WANDB_PROJECT (default ce-gppo); None if WANDB_MODE=disabled, or if W&B fails.

    Without a key it is offline: no account is needed. A resumed run continues the one with the same run_id.
    """
    if (mode := wandb_mode()) == "disabled":
        return None
    import wandb

    os.environ.pop("WANDB_SERVICE", None)  # the W&B process of a parent: there, the id of a killed run stays taken
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_X_SERVICE_WAIT", "120")  # seconds; its process starts late on a busy machine
    for part in ("DATA", "CACHE", "CONFIG") if not os.access(Path.home(), os.W_OK) else ():
        os.environ.setdefault(f"WANDB_{part}_DIR", str(folder / "wandb"))
    options = {"project": os.environ.get("WANDB_PROJECT", "ce-gppo"), "group": group_of(config), "name": folder.name}
    options |= {"dir": folder, "id": run_id, "config": dataclasses.asdict(config) | {"version": __version__}}
    for attempt in dict.fromkeys((mode, "offline")):
        online = {} if attempt == "offline" else {"resume": "allow", "settings": wandb.Settings(init_timeout=30)}
        try:
            run = wandb.init(mode=attempt, **options, **online)
            break
        except Exception as error:  # no network, a key that is not valid; a full disk
            then = "logging offline" if online else "it is off, metrics.jsonl goes on"
            say(f"W&B cannot be reached, {then} ({error})", warning=True)
            wandb.teardown()  # otherwise W&B refuses the run's id as taken
    else:
        return None
    run.define_metric("step", hidden=True)
    run.define_metric("update_*", step_metric="step", hidden=True)  # logged, without charts of their own
    run.define_metric("*", step_metric="step")
    return run


def log_wandb(run, row: dict, samples: list[dict], histograms: dict[str, Tensor]) -> bool:
    """Log a row, samples, and histograms: counts [64] over [0, 1]. False if W&B has failed, which ends no run.

    Charts are over the row's "step". Of a step that was done again the last row counts.
    """
    import wandb

    try:
        edges = [i / 64 for i in range(65)]
        media = {k: wandb.Histogram(np_histogram=(counts.tolist(), edges)) for k, counts in histograms.items()}
        if samples:  # each table is an artifact of its own
            columns = list(dict.fromkeys(name for sample in samples for name in sample))  # components differ by source
            data = [[sample.get(name) for name in columns] for sample in samples]
            media["samples"] = wandb.Table(columns=columns, data=data)
        run.log(row | media)  # by a counter of W&B's own: it ignores a step that is done again after a kill
    except Exception as error:
        say(f"W&B has failed and is off now ({error}); metrics.jsonl goes on", warning=True)
        return False
    return True


def finish_wandb(run, exit_code: int) -> dict[str, str]:
    """End the run. Returns a row of the table at the end: a label, and the run's address or its upload command."""
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:  # everything else is on the disk already
        return {"W&B has failed": str(error)}
    if run.settings.mode != "offline":
        return {"W&B": run.url} if run.url else {}
    command = os.path.relpath(Path(sys.executable).with_name("wandb"))
    # Each start of a resumed run has left a folder. All folders, in order, make up the run.
    parts = sorted(Path(run.dir).parents[1].glob("offline-run-*"))
    return {"W&B, offline; upload with": f"{command} sync --id {run.id} {shlex.join(map(str, parts))}"}


def group_of(config) -> str:
    """The W&B group: the same for runs that differ only in their seed, name and folder."""
    settings = dataclasses.asdict(config) | dict.fromkeys(("seed", "run_name", "out"))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{config.objective}-{digest[:6]}"


def wandb_mode() -> str | None:
    """WANDB_MODE. If it is unset: offline without a key, and None with one, which means online to W&B."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # W&B refuses an empty value; it means unset
    mode = os.environ.get("WANDB_MODE")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):  # W&B's older switch
        return "disabled"
    if mode not in (None, "online", "offline", "shared", "disabled"):
        raise UserError(f"WANDB_MODE={mode}: online, offline, shared or disabled is needed, or none")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file, key = os.environ.get("NETRC"), os.environ.get("WANDB_API_KEY")
    with contextlib.suppress(OSError, ValueError, netrc.NetrcParseError):  # the last one: others may read the file
        key = key or host in netrc.netrc(file and os.path.expanduser(file)).hosts
    return mode if mode or key else "offline"


def check_wandb() -> None:
    """UserError for a WANDB_MODE or WANDB_PROJECT that W&B refuses."""
    if wandb_mode() != "disabled" and (project := os.environ.get("WANDB_PROJECT")):
        import wandb

        try:
            wandb.Settings(project=project)
        except Exception as error:
            raise UserError(f"WANDB_PROJECT={project}: {error}; WANDB_ENTITY names its owner") from None


def sample_rows(rollout: Rollout, problems: list, entropies: dict[int, float], extract: Callable) -> list[dict]:
    """The first response to each of the first problems. entropies: of measured responses, in nats."""
    rows = []
    for problem, i in zip(problems[:SHOWN], rollout.by_group(torch.arange(len(rollout)))[:, 0].tolist(), strict=False):
        row = {"prompt": problem.prompt, "response": rollout.texts[i], "answer": problem.answer}
        row |= {"extracted": extract(rollout.texts[i], problem.verifier), "reward": rollout.rewards[i].item()}
        row |= {f"reward/{name}": value for name, value in rollout.components[i].items()}
        rows.append(row | {"entropy": rounded(entropies.get(i, math.nan)), "tokens": int(rollout.lengths[i])})
    return rows


def follow(part: Rollout, info: dict, logprobs: Tensor, entropy: Tensor, moment: Tensor) -> list[dict]:
    """An update's effect on each token of the first right and the first wrong response; arguments as token_sums."""
    columns = {"old_logprobs": part.old_logprobs, "entropy": part.entropy, "advantage": part.advantages}
    columns |= {"ratio": info["ratio"], "clipped": info["clipped_high"].float() - info["clipped_low"].float()}
    columns["weight"] = info["weight"]
    columns["velocity"] = entropy_velocity(info["weight"], logprobs, entropy, moment).detach()  # [N] each
    firsts = [i for right in (True, False) for i in (part.correct == right).nonzero()[:1, 0].tolist()]
    own = [{name: column[part.sequence == i].cpu() for name, column in columns.items()} for i in firsts]
    return [{"response": part.to("cpu")[[i]], "columns": each} for i, each in zip(firsts, own, strict=True)]


def token_rows(by_rank: list[list], problems: list, tokenizer) -> list[dict]:
    """Rows of tokens.jsonl: a right and a wrong response of the first, the last and some updates between.

    by_rank: every rank's updates. A row has lists with a number for each token that is kept, None if not finite:
    old_logprobs, entropy (of the weights that sampled it; with a bypass the entropy is the update's),
    advantage, ratio, clipped (-1 below the interval with A < 0, 1 above it with A > 0), weight, velocity.
    """
    rows, updates = [], list(zip(*by_rank, strict=True))
    for number in sorted({round(i * (len(updates) - 1) / (SHOWN - 1)) for i in range(SHOWN)} if updates else ()):
        found = {bool(each["response"].correct): each for part in updates[number][::-1] for each in part.followed[::-1]}
        for one in [found[right] for right in (True, False) if right in found]:
            rows.append({"update": number + 1, "updates": len(updates)} | token_row(**one, problems=problems))
            rows[-1]["tokens"] = token_texts(tokenizer, rows[-1]["tokens"])
    return rows


def token_row(response: Rollout, columns: dict[str, Tensor], problems: list) -> dict:
    problem, length = problems[int(response.prompt_of)], len(response.tokens)
    ends = torch.tensor([i for i in range(length) if min(i, length - 1 - i) < MAX_TOKENS // 2])  # the tokens kept
    row = {"prompt": problem.prompt, "answer": problem.answer, "correct": bool(response.correct)}
    row |= {"reward": response.rewards.item(), "components": response.components[0], "length": length}
    row["tokens"] = response.tokens[ends].tolist()
    return row | {name: [rounded(x) for x in column[ends].tolist()] for name, column in columns.items()}


def rounded(x: float) -> float | None:
    """To five digits; None for what is not finite, as JSON has no NaN."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Each token's text, special tokens too; the last of several that form one character has it. [R] -> R strings."""
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts, before, pending = [], [], []  # decoded after the token before: some tokenizers drop a space at the start
    for token in ids:
        pending += [token] * (token < len(tokenizer))
        text = decode(before + pending)[len(decode(before)) :]
        whole = not text.endswith("\ufffd") or len(pending) == 4
        texts.append(text if whole else "")
        before, pending = (pending[-1:] or before, []) if whole else (before, pending)
    return texts
