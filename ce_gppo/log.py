"""What a run writes and prints: its plan, JSONL files, a bar or lines, and at the end a table and advice."""

import contextlib
import functools
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ce_gppo import parallel
from ce_gppo.batch import Rollout
from ce_gppo.config import max_batches, updates_of_step
from ce_gppo.messages import explained, say
from ce_gppo.metrics import Details
from ce_gppo.tracking import finish_wandb, log_wandb, sample_rows, start_wandb, token_rows

FILES = ("metrics", "samples", "tokens")
DRAWN = 10  # steps, at least, of a run whose curves are drawn


def plan(config, folder: Path, model, device: str, problems: str, step: int) -> str:
    """The run's folder and the sizes that follow from the settings."""
    c, world, group, updates = config, parallel.world_size(), config.responses_per_prompt, updates_of_step(config)
    parameters, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= t) / 1e6 for t in (0, 1))
    adapters = f", of which {trained:,.2f} M in adapters of rank {c.lora_rank} are trained" if c.lora_rank else ""
    betas = "no betas" if c.beta1 is None else f"beta1 {c.beta1}, beta2 {c.beta2}"
    interval = f"clip interval [{1 - c.eps_low:g}, {1 + c.eps_high:g}]"
    step_ = f"{c.prompts_per_step} prompts x {group} = {c.prompts_per_step * group} responses"
    step_ += f", up to {max_batches(c)} times" * (max_batches(c) > 1)
    step_ += f", then up to {updates} updates of {c.mini_batch_prompts * group} responses; {c.steps} steps"
    step_ += "; nothing is clipped, as a step's only update has ratio 1" * (updates == 1)
    step_ += f"; on {world} processes, {'copied' if c.shard == 'no' else 'sharded'}" * (world > 1)
    step_ += "; weights, gradients and optimizer in the host's memory" * (c.shard == "offload")
    step_ += "; shard does nothing, with one process" * (c.shard == "yes" and world == 1)
    critic = f", and a critic with learning rate {c.critic_lr:g}" if c.critic_lr else ""
    return f"""\
run          {folder}{f", continued after step {step}" * bool(step)}
model        {c.model}, {parameters:,.2f} M parameters{adapters}, on {device}{critic}
data         {problems}
objective    {c.objective}, {betas}, {interval}, learning rate {c.lr:g}, seed {c.seed}
step         {step_}"""


class Log:
    """The files of a run and its W&B run. When `step` or `add` returns, all is on the disk."""

    def __init__(self, folder: Path, config, state, tokenizer, extract: Callable):
        """state: of the checkpoint that the run goes on from, or a new one. extract: reward.extract_answer."""
        self.folder, self.config, self.tokenizer = folder, config, tokenizer
        self.extract = functools.partial(extract, thinking=config.thinking)
        with explained(f"the files in {folder} cannot be written"):
            # Without a checkpoint the evaluation before step 1 is done again, too.
            rows, *_ = [keep_until(folder / f"{name}.jsonl", state.step or -1) for name in FILES]
        self.history = [numbers(row) for row in rows]
        self.incomplete = False  # True if a write failed, or if the last line is out of date
        self.wandb = start_wandb(folder, config, state.wandb_id)
        for row in self.history[-config.checkpoint_every :] if self.wandb else ():
            log_wandb(self.wandb, row, (), {})  # once more: W&B writes late, and a kill may have lost them
        # A bar on a terminal, plain lines in a file.
        self.bar = tqdm(total=config.steps, initial=state.step, unit="step") if sys.stderr.isatty() else None
        self.drawing: subprocess.Popen | None = None

    def step(self, step: int, metrics: dict, rollout: Rollout, problems: list, details: Details) -> None:
        """Add a step of training, with samples, and at some steps with tokens and histograms."""
        full = step == 1 or step % self.config.eval_every == 0 or step == self.config.steps
        tokens = token_rows(details.updates, problems, self.tokenizer) if full else []
        samples = sample_rows(rollout, problems, details.entropies, self.extract)
        self.add(step, metrics, samples, tokens, details.histograms if full else {})

    def add(self, step: int, metrics: dict, samples=(), tokens=(), histograms: dict[str, Tensor] | None = None) -> None:
        """Add a step, or add metrics to the last step.

        Metrics that are not finite, as those of a policy that an update has broken, are left out: JSON has no NaN.
        """
        row = {"step": step, **numbers(metrics)}
        if self.history and self.history[-1]["step"] == step:
            self.history[-1] |= row
            self.incomplete = True  # the last line on the disk is out of date
        else:
            self.history.append(row)
        self._write(row, samples, tokens)
        self._show(row)
        if DRAWN <= step < self.config.steps and any(name.startswith("eval/") for name in row):
            self._draw()
        if self.wandb and not log_wandb(self.wandb, row, samples if histograms else (), histograms or {}):
            self.wandb = None

    def _write(self, row: dict, samples: list[dict], tokens: list[dict]) -> None:
        rows = {"metrics": [row], "samples": samples, "tokens": tokens}
        try:
            if self.incomplete:  # write all rows again, to a new file
                rewrite(self.folder / "metrics.jsonl", self.history)
                rows["metrics"], self.incomplete = [], False
            for name in FILES:
                with (self.folder / f"{name}.jsonl").open("a") as file:
                    file.writelines(json.dumps({"step": row["step"], **each}) + "\n" for each in rows[name])
        except OSError as error:
            say(f"{self.folder}: not written ({error}); trying again after the next step", warning=True)
            self.incomplete = True

    def _draw(self) -> None:
        """Draw curves.png, in a process of its own that can neither slow the run down nor end it."""
        if self.drawing:
            self.drawing.wait()
        command = ["nice", sys.executable, "-m", "tools.figures", folder := str(self.folder.resolve()), "--out", folder]
        nothing, root = subprocess.DEVNULL, Path(__file__).parents[1]
        with contextlib.suppress(OSError):
            self.drawing = subprocess.Popen(command, cwd=root, stdout=nothing, stderr=nothing)

    def has_evaluation(self, step: int) -> bool:
        return any(row["step"] == step and any(name.startswith("eval/") for name in row) for row in self.history)

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.history if name in row]

    def accuracies(self) -> dict[int, float]:
        """The mean accuracy on held-out problems by step."""
        means = {row["step"]: mean_accuracy(row) for row in self.history}
        return {step: value for step, value in means.items() if value is not None}

    def accuracy_names(self) -> list[str]:
        return sorted({name for row in self.history for name in row if name.endswith("/avg_at_k")})

    def _show(self, row: dict) -> None:
        """A line for each step and evaluation; on a terminal the bar is below it."""
        shown = {"reward": row.get("reward/mean"), "entropy": row.get("entropy/mean"), "accuracy": mean_accuracy(row)}
        parts = {name.split("/")[-1]: value for name, value in row.items() if re.fullmatch("reward/.+/.+", name)}
        shown |= {name: value for name, value in parts.items() if name not in ("mean", "correctness")}
        text = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
        line = " ".join([f"step {row['step']}/{self.config.steps}", *text])
        if self.bar is None:
            return say(line)
        try:
            self.bar.write(line)
            self.bar.update(row["step"] - self.bar.n)
        except OSError:  # the terminal was closed
            self.bar = None

    def doing(self, part: str) -> None:
        """Show on the bar what the run does now: a part of a step, as perf.Meter names it."""
        with contextlib.suppress(OSError):
            if self.bar is not None:
                self.bar.set_description(part)

    def close(self, checkpoints: list[Path], exit_code: int, sentence: str) -> None:
        """Print the table at the end (accuracy, entropy, speed, time, files), the advice, and this sentence."""
        curves = {f"accuracy, {name}": self.values(name) for name in self.accuracy_names()}
        curves["entropy, nats per token"] = self.values("entropy/mean")
        table = {name: f"{values[0]:.3f} -> {values[-1]:.3f}" for name, values in curves.items() if values}
        for name in ("rollout", "update"):
            if speeds := sorted(self.values(f"perf/{name}_tokens_per_s")):
                table[f"{name} tokens/s, median"] = f"{speeds[len(speeds) // 2]:,.0f}"
        total = sum(self.values("time/step") + self.values("time/eval"))
        parts = ("rollout", "reward", "old_logprobs", "critic", "update", "sync", "eval", "checkpoint")
        seconds = {part: sum(self.values(f"time/{part}")) for part in parts}
        table[f"time, {total:.0f} s"] = ", ".join(f"{part} {s / total:.0%}" for part, s in seconds.items() if s)
        table |= {"checkpoint": checkpoints[-1]} if checkpoints else {}
        table["metrics"] = self.folder / "metrics.jsonl"
        if self.history and self.history[-1]["step"] >= DRAWN:
            self._draw()
            if self.drawing and self.drawing.wait() == 0:
                table["curves"] = self.folder / "curves.png"
        table |= finish_wandb(self.wandb, exit_code) if self.wandb else {}
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed
                self.bar.close()
        width = max(map(len, table))
        say("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in table.items()))
        if sentences := advice(self.history, self.config):
            say("\n" + "\n".join(f"- {sentence}" for sentence in sentences))
        if sentence:
            say(sentence)


# ----------------------------------------------------------------------------------------------------------------------
# JSONL files


def keep_until(path: Path, last_step: int) -> list[dict]:
    """Rewrite a JSONL file with only its rows up to last_step, and return them. A half-written line is dropped.

    If rows go, the whole file stays beside it, as <name>.until-step-<its last step>.jsonl, or <...>-2.jsonl.
    """
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= last_step]
    if len(kept) < len(rows):
        names = (f"{path.stem}.until-step-{rows[-1]['step']:06d}{again}.jsonl" for again in ("", *range(-2, -99, -1)))
        path.replace(next(aside for name in names if not (aside := path.with_name(name)).exists()))
    if rows or not path.exists():
        rewrite(path, kept)
    return kept


def rewrite(path: Path, rows: list[dict]) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def read_rows(path: Path) -> list[dict]:
    """The rows of a run's file that have a step. Lines that training did not write, or only in part, are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            rows += [row] if type(row["step"]) is int else []
    return rows


def numbers(row: dict) -> dict:
    """Only the finite numbers, which is all that metrics.jsonl has."""
    return {name: v for name, v in row.items() if type(v) in (int, float) and math.isfinite(v)}


# ----------------------------------------------------------------------------------------------------------------------
# What a run says before its first step, and at its end

LAST = 10  # "at the end" is the mean of this many steps, or of the second half of a shorter run
MAX_KL, MAX_MISMATCH = 0.01, 1e-3  # nats
MAX_TRUNCATED, MAX_WITHOUT_SIGNAL, MIN_CLIPPED = 0.1, 0.9, 0.001  # shares
CHANGED = 0.05  # of accuracy; less may be chance


def advice(history: list[dict], config) -> list[str]:
    """At most two faults with what to change, the gravest first, and a sentence on entropy and accuracy.

    history: the rows of metrics.jsonl, in any of which a metric may be missing. config: train.py's, resolved.
    """
    steps = [row for row in history if "entropy/mean" in row]  # without the evaluation before the first step
    return [*itertools.islice(faults(steps, config), 2), summary(history, steps)] if steps else []


def faults(steps: list[dict], c) -> Iterator[str]:
    def at_end(name: str, default: float = 0.0) -> float:
        values = [row[name] for row in steps[-min(LAST, (len(steps) + 1) // 2) :] if name in row]
        return sum(values) / len(values) if values else default

    if (kl := at_end("mismatch/kl")) > MAX_MISMATCH and c.rollout_correction in ("none", "bypass"):
        gap = f"vLLM and the trainer gave tokens different probabilities (mismatch/kl {kl:.2g} nats)"
        yield f"{gap}: set rollout_correction to tis."

    trained = [row for row in steps if "kl/approx" in row]
    far = [row for row in trained if row["kl/approx"] > MAX_KL]
    highest = max((row["kl/approx"] for row in far), default=0.0)
    if highest > 10 * MAX_KL or len(far) >= max(2, len(trained) / 20):  # one step at ten times the limit can be enough
        names = ["lr", *["beta1"] * bool(c.spec.has_betas and c.beta1), *["epochs"] * (c.epochs > 1)]
        cure = " or ".join(f"{name} ({getattr(c, name):g})" for name in names)
        cure += ", or take objective ce_gppo with a lower beta1" * (c.objective == "gppo")
        where = f"In {len(far)} of {len(trained)} steps, first in step {far[0]['step']}"
        gap = f"(kl/approx up to {highest:.2g} nats)"
        yield f"{where}, the updates moved far from the policy that sampled {gap}: lower {cure}."

    if (share := at_end("response/truncated")) > MAX_TRUNCATED:
        cure = f"raise max_response_tokens ({c.max_response_tokens})"
        if steps[0].get("response/truncated", share) <= MAX_TRUNCATED:  # it has grown
            cure = f"if they go on after the answer (samples.jsonl), lower lr ({c.lr:g}), otherwise {cure}"
        yield f"At the end {share:.0%} of the responses were cut at the length limit: {cure}."

    right, wrong = at_end("reward/group_solved_all"), at_end("reward/group_solved_none")
    if c.dynamic_sampling != "off":  # then groups are used whose right answers differ in another component
        right, wrong = (share * (at_end("rollout/unused", 1.0) > MAX_WITHOUT_SIGNAL) for share in (right, wrong))
    if right + wrong > MAX_WITHOUT_SIGNAL and c.advantages != "gae":
        cure = "train on harder problems" if right > wrong else "train on easier problems"
        if min(right, wrong) > 0.2:
            cure = f"the answers to one problem hardly differ, so raise temperature ({c.temperature:g})"
        yield f"At the end {right:.0%} of the groups had only right answers, {wrong:.0%} only wrong ones: {cure}."

    shares = [row["clip/low"] + row["clip/high"] for row in steps if "clip/low" in row and "clip/high" in row]
    if c.beta1 is not None and shares and (share := sum(shares) / len(shares)) < MIN_CLIPPED:
        cure = f"raise lr ({c.lr:g}), or lower mini_batch_prompts ({c.mini_batch_prompts}) for more updates"
        if len(steps) <= c.warmup_steps:
            cure = f"train for more steps, as lr still grew in all of them (warmup_steps {c.warmup_steps})"
        yield f"The betas did almost nothing, as {share:.2%} of the tokens were outside the clip interval: {cure}."


def summary(history: list[dict], steps: list[dict]) -> str:
    said = f"Entropy went from {steps[0]['entropy/mean']:.3f} to {steps[-1]['entropy/mean']:.3f} nats per token"
    accuracies = [accuracy for row in history if (accuracy := mean_accuracy(row)) is not None]
    if len(accuracies) < 2:
        return f"{said}."
    first, last, best = accuracies[0], accuracies[-1], max(accuracies)
    said += f", and held-out accuracy from {first:.3f} to {last:.3f}"
    if last < best - CHANGED:
        return f"{said}, after {best:.3f} at its best: the policy became worse; lower lr."
    return f"{said}." if last > first + CHANGED else f"{said}: no gain that chance would not explain."


def mean_accuracy(row: dict) -> float | None:
    """avg@k of an evaluation, over all its sources; None for a row without one."""
    values = [value for name, value in row.items() if name.endswith("/avg_at_k")]
    return sum(values) / len(values) if values else None
