"""What a run leaves behind: metrics.jsonl, samples.jsonl, W&B, a line or a bar on the terminal, a table at the end."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import loss
from prompts import Problem
from reward import extract_answer
from rollout import Response


class Report:
    """One run's folder and its W&B run. `log` is called once a step and everything is on the disk when it returns."""

    def __init__(self, folder: Path, config, state: dict):
        """state: the trainer's, with the step to go on from and the id of the W&B run."""
        self.folder, self.config = folder, config
        self.path = folder / "metrics.jsonl"
        # Resumed: what was logged after the checkpoint will be done again, the evaluation before the first step too.
        last_step = state["step"] or -1
        self.history = drop_later_steps(self.path, last_step)
        drop_later_steps(folder / "samples.jsonl", last_step)
        self.file = self.path.open("a")
        self.samples = (folder / "samples.jsonl").open("a")
        self.incomplete = False  # a write has failed: the disk is full, perhaps
        self.wandb = start_wandb(folder, config, state["wandb_id"])
        # A bar where somebody watches, plain lines where a file does.
        self.bar = tqdm(total=config.steps, initial=state["step"], unit="step") if sys.stderr.isatty() else None

    def log(self, step: int, metrics: dict, samples: list[dict], histograms: dict[str, torch.Tensor]) -> None:
        row = {"step": step, **metrics}
        self.history.append(row)
        self._write(row, samples)
        self._show(row)
        if self.wandb:
            try:
                self._log_wandb(row, samples, histograms)
            except Exception as error:  # whatever it is, it must not end the run
                print(f"WARNING: W&B has failed and is off now ({error}); {self.path} goes on", file=sys.stderr)
                self.wandb = None

    def _write(self, row: dict, samples: list[dict]) -> None:
        try:
            if self.incomplete:  # all of it again, aside, now that there may be room
                aside = self.path.with_suffix(".partial")
                aside.write_text("".join(json.dumps(row) + "\n" for row in self.history))
                aside.replace(self.path)
                self.file, self.incomplete = self.path.open("a"), False
            else:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            self.samples.writelines(json.dumps({"step": row["step"], **sample}) + "\n" for sample in samples)
            self.samples.flush()
        except OSError as error:
            print(f"WARNING: {self.path} is not written ({error}); trying again after the next step", file=sys.stderr)
            self.incomplete = True

    def _log_wandb(self, row: dict, samples: list[dict], histograms: dict[str, torch.Tensor]) -> None:
        import wandb

        media = {name: wandb.Histogram(values.numpy()) for name, values in histograms.items()}
        if samples:
            columns = list(samples[0])
            media["samples"] = wandb.Table(columns=columns, data=[[s[c] for c in columns] for s in samples])
        self.wandb.log(row | media, step=row["step"])

    def latest(self, name: str) -> float | None:
        return next((row[name] for row in reversed(self.history) if name in row), None)

    def first(self, name: str) -> float | None:
        return next((row[name] for row in self.history if name in row), None)

    def accuracy_names(self) -> list[str]:
        return sorted({name for row in self.history for name in row if name.endswith("/avg_at_k")})

    def _show(self, row: dict) -> None:
        shown = {
            "reward": row.get("reward/mean"),
            "entropy": row.get("entropy/mean"),
            "accuracy": next((self.latest(name) for name in self.accuracy_names()), None),
        }
        text = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
        if self.bar is not None:
            self.bar.update(row["step"] - self.bar.n)
            self.bar.set_postfix(text)
        else:
            print(f"step {row['step']}/{self.config.steps}", *(f"{k} {v}" for k, v in text.items()), flush=True)

    def close(self, checkpoints: list[Path]) -> None:
        """The table at the end: what changed, how fast, where the time went, where things are."""
        if self.bar is not None:
            self.bar.close()
        rows = []
        for name in self.accuracy_names():
            rows.append((f"accuracy, {name}", f"{self.first(name):.3f} -> {self.latest(name):.3f}"))
        if self.latest("entropy/mean") is not None:
            first, last = self.first("entropy/mean"), self.latest("entropy/mean")
            rows.append(("entropy, nats a token", f"{first:.3f} -> {last:.3f}"))
        pairs = [
            (row["velocity/total"], after["entropy/delta"])
            for row, after in itertools.pairwise(self.history)
            if "velocity/total" in row and "entropy/delta" in after
        ]
        if len(pairs) > 2:
            rows.append(
                ("velocity against entropy", f"rank correlation {spearman(pairs):+.2f} over {len(pairs)} steps")
            )
        for name in ("rollout", "update"):
            speeds = [row[f"perf/{name}_tokens_per_s"] for row in self.history if f"perf/{name}_tokens_per_s" in row]
            if speeds:
                rows.append((f"{name} tokens/s, median", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
        total = sum(row.get("time/step", 0.0) for row in self.history)
        parts = {}
        for part in ("rollout", "reward", "old_logprobs", "update", "sync", "eval"):
            parts[part] = sum(row.get(f"time/{part}", 0.0) for row in self.history)
        shares = ", ".join(f"{part} {seconds / max(total, 1e-9):.0%}" for part, seconds in parts.items())
        rows.append((f"time, {total:.0f} s", shares))
        if checkpoints:
            rows.append(("checkpoint", str(checkpoints[-1])))
        rows.append(("curves", str(self.path)))
        if self.wandb:
            offline = self.wandb.settings.mode == "offline"
            self.wandb.finish()
            wandb_command = os.path.relpath(Path(sys.executable).with_name("wandb"))
            synced = f"{wandb_command} sync {Path(self.wandb.dir).parent}" if offline else self.wandb.url
            rows.append(("W&B, offline; upload with" if offline else "W&B", synced))
        width = max(len(name) for name, _ in rows)
        print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows), flush=True)
        self.file.close()
        self.samples.close()


def drop_later_steps(path: Path, last_step: int) -> list[dict]:
    """Rewrite a JSONL file with its rows up to last_step alone, and return them. A half-written line is dropped."""
    rows = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= last_step]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)
    return rows


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank correlation: does the velocity of a step's updates predict by how much entropy changes?"""
    ranks = torch.tensor(pairs, dtype=torch.float64).T.argsort(1).argsort(1).double()  # [2, N]
    return torch.corrcoef(ranks)[0, 1].item()


def start_run_folder(folder: Path, config) -> None:
    """config.json with the git commit, and a copy of the sources: what is needed to know later what this run was."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    record = {"config": dataclasses.asdict(config), "git_commit": commit or None, "command": sys.argv}
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "source").mkdir(exist_ok=True)
    for source in here.glob("*.py"):
        shutil.copy(source, folder / "source")


def start_wandb(folder: Path, config, run_id: str):
    """A W&B run, or None where WANDB_MODE=disabled. Offline without a key: nothing here asks for an account.

    A resumed run has the run_id of before, and goes on in the same W&B run.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return None
    import wandb

    if mode is None and not _has_wandb_key():
        mode = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    options = {"project": config.wandb_project, "name": folder.name, "dir": folder, "id": run_id, "mode": mode}
    if mode != "offline":
        options |= {"resume": "allow", "settings": wandb.Settings(init_timeout=30)}
    try:
        run = wandb.init(**options, config=dataclasses.asdict(config))
    except Exception as error:  # no network, a key that is not valid
        print(f"WARNING: W&B cannot be reached, logging offline ({error})", file=sys.stderr)
        wandb.teardown()  # or the run's id counts as taken
        run = wandb.init(**options | {"mode": "offline", "resume": None}, config=dataclasses.asdict(config))
    run.define_metric("step", hidden=True)
    for name in (
        "entropy",
        "velocity",
        "tokens",
        "clip",
        "weight",
        "reward",
        "eval",
        "response",
        "optim",
        "ratio",
        "kl",
    ):
        run.define_metric(f"{name}/*", step_metric="step")
    for name in ("mismatch", "time", "perf"):
        run.define_metric(f"{name}/*", step_metric="step")
    for index in range(1, config.max_kept_prompts // config.mini_batch_prompts + 1):
        run.define_metric(f"update_{index}/*", step_metric="step", hidden=True)  # logged, but no charts of their own
    return run


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        import netrc

        return "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, ValueError, SyntaxError):
        return False


# ----------------------------------------------------------------------------------------------------------------------
# What is logged of a rollout


def rollout_values(rewards: torch.Tensor, responses: list[Response]) -> dict[str, torch.Tensor]:
    """What the metrics of a rollout are computed from, small enough to be gathered from all ranks. rewards: [P, G]."""
    return {
        "rewards": rewards,
        "lengths": torch.tensor([len(r.response_ids) for r in responses]),  # [P G]
        "truncated": torch.tensor([r.truncated for r in responses]),  # [P G]
        "entropy": torch.cat([r.entropy for r in responses]),  # [N]
        # From the sampler to the trainer: log(pi_old / pi_vllm) of the sampled tokens, the same weights on both sides.
        "gap": torch.cat([r.old_logprobs - r.rollout_logprobs for r in responses]),  # [N]
    }


def rollout_metrics(parts: list[dict[str, torch.Tensor]], previous_entropy: float | None) -> dict[str, float]:
    """Metrics of all the step's responses, those of dropped groups included, from every rank's `rollout_values`."""
    values = {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}
    rewards, lengths, truncated, entropy, gap = values.values()
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item(),
        "reward/group_solved_all": (rewards.amin(1) >= 1).double().mean().item(),
        "reward/group_solved_none": (rewards.amax(1) <= 0).double().mean().item(),
        "reward/pass_at_g": (rewards.amax(1) > 0).double().mean().item(),
        "response/length_mean": lengths.mean().item(),
        "response/length_max": lengths.max().item(),
        "response/truncated": truncated.mean().item(),
        "entropy/mean": entropy.mean().item(),
        "entropy/p10": quantile(entropy, 0.1),
        "entropy/p90": quantile(entropy, 0.9),
        "mismatch/mean": gap.abs().mean().item(),
        "mismatch/kl": (gap.exp() - 1 - gap).mean().item(),
        "mismatch/ratio_max": gap.abs().max().exp().item(),
        "mismatch/ratio_p99": math.exp(quantile(gap.abs(), 0.99)),
    }
    if previous_entropy is not None:
        metrics["entropy/delta"] = metrics["entropy/mean"] - previous_entropy
    return metrics


BY_UPDATE = ("clip/low", "clip/high", "weight/low", "weight/high", "ratio/min", "ratio/max", "kl/old")


def update_metrics(parts: list[list[dict]]) -> dict[str, float]:
    """A step's updates as one: means over all their tokens, then the same shares by index of the update.

    parts: the updates of each rank. Their sums and losses are of its own tokens, everything else is alike on all.
    """
    own = parts[0]
    metrics = {"optim/updates": len(own), "optim/skipped": sum(u["skipped"] for u in own)}
    if not own:  # no group had unequal rewards
        return metrics
    by_update = [loss.add_sums([u["sums"] for u in same]) for same in zip(*parts, strict=True)]
    metrics |= loss.update_metrics(loss.add_sums(by_update))
    metrics["optim/loss"] = sum(u["loss"] for updates in parts for u in updates) / len(own)
    metrics["optim/grad_norm"] = sum(u["grad_norm"] for u in own) / len(own)
    metrics["perf/padding"] = sum(u["padding"] for u in own) / len(own)
    for index, sums in enumerate(by_update, start=1):
        shares = loss.update_metrics(sums)
        metrics |= {f"update_{index}/{k.replace('/', '_')}": v for k, v in shares.items() if k in BY_UPDATE}
    return metrics


def quantile(values: torch.Tensor, q: float) -> float:
    """The nearest-rank quantile; torch.quantile refuses more than 16 M values."""
    return values.kthvalue(max(1, math.ceil(q * len(values)))).values.item()


def histograms(responses: list[Response]) -> dict[str, torch.Tensor]:
    """Probabilities of the sampled tokens under the rollout weights, by quadrant."""
    if not responses:
        return {}
    old_logprobs = torch.cat([r.old_logprobs for r in responses])  # [N]
    entropy = torch.cat([r.entropy for r in responses])  # [N]
    advantages = torch.cat([torch.full_like(r.entropy, r.advantage) for r in responses])  # [N]
    members = loss.quadrants(old_logprobs, entropy, advantages)
    return {f"probability/{name}": old_logprobs[mask].exp() for name, mask in members.items() if mask.any()}


def sample_rows(groups: dict[int, list[Response]], problems: list[Problem], count: int, thinking: bool) -> list[dict]:
    """The first response to each of `count` problems, to be read by people. groups: by index of the problem."""
    return [
        {
            "prompt": problems[i].prompt,
            "response": group[0].text,
            "answer": problems[i].answer,
            "extracted": extract_answer(group[0].text, thinking=thinking),
            "reward": group[0].reward,
            "entropy": group[0].entropy.mean().item(),
            "tokens": len(group[0].response_ids),
        }
        for i, group in itertools.islice(groups.items(), count)
    ]


class Timer:
    """Seconds spent in each part of a step: `with timer("rollout"): ...`, then `take` once a step."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.seconds: dict[str, float] = {}
        self.start = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str):
        start = self._now()
        yield
        self.seconds[f"time/{part}"] = self._now() - start

    def take(self) -> dict[str, float]:
        now = self._now()
        taken = self.seconds | {"time/step": now - self.start}
        self.seconds, self.start = {}, now
        return taken
