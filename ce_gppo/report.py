"""The output of a run: metrics, samples and tokens as JSONL, W&B, a progress bar or lines, the table at the end."""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from ce_gppo import messages, parallel
from ce_gppo.advice import advice
from ce_gppo.entropy import quadrants
from ce_gppo.forward import flatten
from ce_gppo.problems import max_batches, updates_of_step
from ce_gppo.tokens import token_rows
from ce_gppo.tracking import finish_wandb, start_wandb
from ce_gppo.types import Problem, Response, starting

LOGGED_SAMPLES = 4  # responses per step in samples.jsonl and in W&B


class Report:
    """The files of a run and its W&B run. `log` is called once per step; when it returns, all is on the disk."""

    def __init__(self, folder: Path, config, step: int, wandb_id: str, tokenizer=None):
        """step: the last one that is kept, 0 for a new run. wandb_id: one id for all parts of a resumed run in W&B.

        tokenizer: for the texts in tokens.jsonl.
        """
        starting(f"the files in {folder} cannot be written")
        self.folder, self.config = folder, config
        self.path = folder / "metrics.jsonl"
        # Steps after the checkpoint will be done again. Without a checkpoint so will the evaluation before step 1.
        self.history = drop_later_steps(self.path, step or -1, only_numbers=True)
        drop_later_steps(folder / "samples.jsonl", step or -1)
        drop_later_steps(folder / "tokens.jsonl", step or -1)
        self.file = self.path.open("a")
        self.samples = (folder / "samples.jsonl").open("a")
        self.tokens = (folder / "tokens.jsonl").open("a")
        self.tokenizer = tokenizer
        self.incomplete = False  # True if a write failed, or if the last line is out of date
        self.wandb = start_wandb(folder, config, wandb_id)
        # A bar on a terminal, plain lines in a file.
        self.bar = tqdm(total=config.steps, initial=step, unit="step") if sys.stderr.isatty() else None
        starting("")

    def log_step(self, step: int, metrics: dict, groups, mini_batches, problems, extract: Callable) -> None:
        """Add a step of training, with samples and histograms, and at some steps with tokens. See sample_rows."""
        samples = sample_rows(groups, problems, extract)
        tokens = []
        if step == 1 or step % self.config.eval_every == 0 or step == self.config.steps:
            tokens = token_rows(groups, mini_batches, problems, self.tokenizer)
        self.log(step, metrics, samples, probability_histograms(flatten(mini_batches)), tokens)

    def log(
        self, step: int, metrics: dict, samples=(), histograms: dict[str, torch.Tensor] | None = None, tokens=()
    ) -> None:
        """Add a step, or add metrics to the last step.

        Metrics that are not finite, such as the loss of a skipped update, are left out: JSON has no NaN.
        """
        row = {"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}}
        if self.history and self.history[-1]["step"] == step:
            self.history[-1] |= row
            self.incomplete = True  # the last line on the disk is out of date
        else:
            self.history.append(row)
        self._write(row, samples, tokens)
        self._show(row)
        if self.wandb:
            try:
                self._log_wandb(row, samples, histograms)
            except Exception as error:  # no error of W&B may end the run
                messages.say(f"W&B has failed and is off now ({error}); {self.path} goes on", warning=True)
                self.wandb = None

    def _write(self, row: dict, samples: list[dict], tokens: list[dict]) -> None:
        try:
            if self.incomplete:  # write all rows again, to a new file
                aside = self.path.with_suffix(".partial")
                aside.write_text("".join(json.dumps(row) + "\n" for row in self.history))
                aside.replace(self.path)
                self.file, self.incomplete = self.path.open("a"), False
            else:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            for file, more in ((self.samples, samples), (self.tokens, tokens)):
                file.writelines(strict_json({"step": row["step"], **each}) + "\n" for each in more)
                file.flush()
        except OSError as error:
            messages.say(f"{self.path} is not written ({error}); trying again after the next step", warning=True)
            self.incomplete = True

    def _log_wandb(self, row: dict, samples: list[dict], histograms: dict[str, torch.Tensor] | None) -> None:
        import wandb

        media = {name: wandb.Histogram(values.numpy()) for name, values in (histograms or {}).items()}
        if samples and (row["step"] % self.config.eval_every == 0 or row["step"] == self.config.steps):
            columns = list(dict.fromkeys(name for sample in samples for name in sample))  # parts differ by source
            data = [[sample.get(name) for name in columns] for sample in samples]
            media["samples"] = wandb.Table(columns=columns, data=data)  # each is an artifact of its own
        self.wandb.log(row | media, step=row["step"])

    def has_evaluation(self, step: int) -> bool:
        return any(row["step"] == step and any(name.startswith("eval/") for name in row) for row in self.history)

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
        if self.bar is None:
            return messages.say(
                " ".join([f"step {row['step']}/{self.config.steps}", *(f"{k} {v}" for k, v in text.items())])
            )
        try:
            self.bar.update(row["step"] - self.bar.n)
            self.bar.set_postfix(text)
        except OSError:  # the terminal was closed
            self.bar = None

    def close(self, checkpoints: list[Path]) -> None:
        """Print the table at the end (accuracy, entropy, speed, time, files), then the advice. Close the files."""
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed
                self.bar.close()
        rows = []
        for name in self.accuracy_names():
            rows.append((f"accuracy, {name}", f"{self.first(name):.3f} -> {self.latest(name):.3f}"))
        if self.latest("entropy/mean") is not None:
            first, last = self.first("entropy/mean"), self.latest("entropy/mean")
            rows.append(("entropy, nats per token", f"{first:.3f} -> {last:.3f}"))
        for name in ("rollout", "update"):
            speeds = [row[f"perf/{name}_tokens_per_s"] for row in self.history if f"perf/{name}_tokens_per_s" in row]
            if speeds:
                rows.append((f"{name} tokens/s, median", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
        total = sum(row.get("time/step", 0.0) + row.get("time/eval", 0.0) for row in self.history)
        parts, with_critic = {}, self.latest("time/critic") is not None
        for part in ("rollout", "reward", "old_logprobs", *["critic"] * with_critic, "update", "sync", "eval"):
            parts[part] = sum(row.get(f"time/{part}", 0.0) for row in self.history)
        shares = ", ".join(f"{part} {seconds / max(total, 1e-9):.0%}" for part, seconds in parts.items())
        rows.append((f"time, {total:.0f} s", shares))
        if checkpoints:
            rows.append(("checkpoint", str(checkpoints[-1])))
        rows.append(("curves", str(self.path)))
        if self.wandb:
            try:
                rows.append(finish_wandb(self.wandb))
            except Exception as error:  # everything else is on the disk already
                messages.say(f"W&B has failed at the end ({error})", warning=True)
        width = max(len(name) for name, _ in rows)
        messages.say("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
        if sentences := advice(self.history, self.config):
            messages.say("\n" + "\n".join(f"- {sentence}" for sentence in sentences))
        for file in (self.file, self.samples, self.tokens):
            with contextlib.suppress(OSError):  # a full disk, reported before
                file.close()


def strict_json(value) -> str:
    """JSON with null for numbers that are not finite, as in the row of a token with NaN logprobs: JSON has no NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))


def drop_later_steps(path: Path, last_step: int, only_numbers: bool = False) -> list[dict]:
    """Rewrite a JSONL file with only its rows up to last_step, and return them. A half-written line is dropped."""
    if not path.exists():
        return []
    rows = [row for row in read_rows(path, only_numbers) if row["step"] <= last_step]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)
    return rows


def read_rows(path: Path, only_numbers: bool = False) -> list[dict]:
    """The rows of a run's file that have a step. Lines that training did not write, or only in part, are left out.

    only_numbers: of these rows, only the finite numbers, which is all that metrics.jsonl has.
    """
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            if type(row["step"]) is int:
                numbers = {k: v for k, v in row.items() if type(v) in (int, float) and math.isfinite(v)}
                rows.append(numbers if only_numbers else row)
    return rows


# ----------------------------------------------------------------------------------------------------------------------


def plan(config, folder: Path, model: torch.nn.Module, device: str, problems: str, step: int) -> str:
    """The text printed before the first step: the run's folder and the sizes that follow from the settings."""
    parameters = sum(p.numel() for p in model.parameters())
    responses = config.prompts_per_step * config.responses_per_prompt
    critic = f", and a critic with learning rate {config.critic_lr:g}" if config.critic_lr else ""
    betas = "no betas" if config.beta1 is None else f"beta1 {config.beta1}, beta2 {config.beta2}"
    world = parallel.world_size()
    return (
        f"run          {folder}" + (f", continued after step {step}" if step else "") + "\n"
        f"model        {config.model}, {parameters / 1e6:,.2f} M parameters, on {device}{critic}\n"
        f"data         {problems}\n"
        f"objective    {config.objective}, {betas}, clip interval [{1 - config.eps_low:g}, {1 + config.eps_high:g}]\n"
        f"step         {config.prompts_per_step} prompts x {config.responses_per_prompt} = {responses} responses"
        + (f", up to {max_batches(config)} times" if max_batches(config) > 1 else "")
        + ", "
        f"then up to {updates_of_step(config)} updates of {config.mini_batch_prompts * config.responses_per_prompt} "
        f"responses; {config.steps} steps"
        + ("; nothing is clipped, as a step's only update has ratio 1" if one_update(config) else "")
        + (f"; on {world} processes, {'copied' if config.shard == 'no' else 'sharded'}" if world > 1 else "")
        + ("; weights, gradients and optimizer in the host's memory" if config.shard == "offload" else "")
        + ("; shard does nothing, with one process" if config.shard == "yes" and world == 1 else "")
    )


def one_update(config) -> bool:
    """Whether every ratio is 1, so that the clip interval and the betas do nothing."""
    return updates_of_step(config) == 1 and config.old_logprobs == "trainer"


def probability_histograms(responses: list[Response]) -> dict[str, torch.Tensor]:
    """Probabilities of the sampled tokens under the rollout weights, by quadrant, of responses with old logprobs."""
    responses = [r for r in responses if r.entropy is not None]
    if not responses:
        return {}
    old_logprobs = torch.cat([r.old_logprobs for r in responses])  # [N]
    entropy = torch.cat([r.entropy for r in responses])  # [N]
    advantages = torch.cat([r.advantages for r in responses])  # [N]
    members = quadrants(old_logprobs, entropy, advantages)
    return {f"probability/{name}": old_logprobs[mask].exp() for name, mask in members.items() if mask.any()}


def sample_rows(
    groups: list[list[Response]], problems: list[Problem], extract: Callable[[str, str], str | None]
) -> list[dict]:
    """Rows of samples.jsonl: the first response to each of the first problems. extract: reward.extract_answer."""
    return [
        {
            "prompt": problem.prompt,
            "response": group[0].text,
            "answer": problem.answer,
            "extracted": extract(group[0].text, problem.verifier),
            "reward": group[0].reward,
            **{f"reward/{name}": value for name, value in group[0].parts.items()},
            "entropy": None if group[0].entropy is None else group[0].entropy.mean().item(),
            "tokens": len(group[0].response_ids),
        }
        for group, problem in zip(groups[:LOGGED_SAMPLES], problems[:LOGGED_SAMPLES], strict=True)
    ]
