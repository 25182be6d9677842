"""What a run writes and prints: metrics, samples and tokens as JSONL, W&B, a bar or lines, the table at the end."""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ce_gppo.advice import advice, mean_accuracy
from ce_gppo.batch import Rollout
from ce_gppo.entropy import entropy_velocity
from ce_gppo.messages import explained, say
from ce_gppo.metrics import Details
from ce_gppo.tracking import finish_wandb, log_wandb, start_wandb

SHOWN = 4  # responses of a step in samples.jsonl and in W&B, and updates with rows in tokens.jsonl
MAX_TOKENS = 2000  # of a response in a row of tokens.jsonl; the middle of a longer one is left out
FILES = ("metrics", "samples", "tokens")


class Log:
    """The files of a run and its W&B run. When `step` or `evaluation` returns, all is on the disk."""

    def __init__(self, folder: Path, config, state, tokenizer, extract: Callable[[str, str], str | None]):
        """state: of the checkpoint that the run goes on from, or a new one. extract: reward.extract_answer."""
        self.folder, self.config, self.tokenizer, self.extract = folder, config, tokenizer, extract
        with explained(f"the files in {folder} cannot be written"):
            # Without a checkpoint the evaluation before step 1 is done again, too.
            kept = [keep_until(folder / f"{name}.jsonl", state.step or -1) for name in FILES]
            self.files = {name: (folder / f"{name}.jsonl").open("a") for name in FILES}
        self.history = [numbers(row) for row in kept[0]]
        self.incomplete = False  # True if a write failed, or if the last line is out of date
        self.wandb = start_wandb(folder, config, state.wandb_id)
        # A bar on a terminal, plain lines in a file.
        self.bar = tqdm(total=config.steps, initial=state.step, unit="step") if sys.stderr.isatty() else None

    def step(self, step: int, metrics: dict, rollout: Rollout, problems: list, details: Details) -> None:
        """Add a step of training, with samples, and at some steps with tokens and histograms."""
        full = step == 1 or step % self.config.eval_every == 0 or step == self.config.steps
        tokens = token_rows(details.updates, problems, self.tokenizer) if full else []
        samples = sample_rows(rollout, problems, details.entropies, self.extract)
        self.add(step, metrics, samples, tokens, details.histograms if full else {})

    def add(self, step: int, metrics: dict, samples=(), tokens=(), histograms: dict[str, Tensor] | None = None) -> None:
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
                log_wandb(self.wandb, row, samples if histograms else (), histograms or {})
            except Exception as error:  # no error of W&B may end the run
                say(f"W&B has failed and is off now ({error}); {self.folder}/metrics.jsonl goes on", warning=True)
                self.wandb = None

    def _write(self, row: dict, samples: list[dict], tokens: list[dict]) -> None:
        path = self.folder / "metrics.jsonl"
        try:
            if self.incomplete:  # write all rows again, to a new file
                rewrite(path, self.history)
                self.files["metrics"], self.incomplete = path.open("a"), False
            else:
                self.files["metrics"].write(json.dumps(row) + "\n")
            for name, more in (("samples", samples), ("tokens", tokens)):
                self.files[name].writelines(strict_json({"step": row["step"], **each}) + "\n" for each in more)
            for file in self.files.values():
                file.flush()
        except OSError as error:
            say(f"{path} is not written ({error}); trying again after the next step", warning=True)
            self.incomplete = True

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
        accuracy = next((self.values(name)[-1] for name in self.accuracy_names()), None)
        shown = {"reward": row.get("reward/mean"), "entropy": row.get("entropy/mean"), "accuracy": accuracy}
        text = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
        if self.bar is None:
            return say(" ".join([f"step {row['step']}/{self.config.steps}", *(f"{k} {v}" for k, v in text.items())]))
        try:
            self.bar.update(row["step"] - self.bar.n)
            self.bar.set_postfix(text)
        except OSError:  # the terminal was closed
            self.bar = None

    def close(self, checkpoints: list[Path], failed: bool) -> None:
        """Print the table at the end (accuracy, entropy, speed, time, files), then the advice. Close the files."""
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed
                self.bar.close()
        rows = [(f"accuracy, {name}", self.values(name)) for name in self.accuracy_names()]
        rows += [("entropy, nats per token", self.values("entropy/mean"))]
        rows = [(label, f"{values[0]:.3f} -> {values[-1]:.3f}") for label, values in rows if values]
        for name in ("rollout", "update"):
            if speeds := sorted(self.values(f"perf/{name}_tokens_per_s")):
                rows.append((f"{name} tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
        total = sum(self.values("time/step") + self.values("time/eval"))
        parts = ("rollout", "reward", "old_logprobs", "critic", "update", "sync", "eval", "checkpoint")
        seconds = {part: sum(self.values(f"time/{part}")) for part in parts}
        shares = ", ".join(f"{part} {s / max(total, 1e-9):.0%}" for part, s in seconds.items() if s)
        rows.append((f"time, {total:.0f} s", shares))
        rows += [("checkpoint", str(checkpoints[-1]))] if checkpoints else []
        rows.append(("curves", str(self.folder / "metrics.jsonl")))
        if self.wandb:
            try:
                rows.append(finish_wandb(self.wandb, failed))
            except Exception as error:  # everything else is on the disk already
                say(f"W&B has failed at the end ({error})", warning=True)
        width = max(len(name) for name, _ in rows)
        say("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
        if sentences := advice(self.history, self.config):
            say("\n" + "\n".join(f"- {sentence}" for sentence in sentences))
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk, reported before
                file.close()


# ----------------------------------------------------------------------------------------------------------------------
# JSONL files


def keep_until(path: Path, last_step: int) -> list[dict]:
    """Rewrite a JSONL file with only its rows up to last_step, and return them. A half-written line is dropped.

    If rows go, the whole file stays beside it, as <name>.until-step-<its last step>.jsonl.
    """
    rows = read_rows(path) if path.exists() else []
    kept = [row for row in rows if row["step"] <= last_step]
    if len(kept) < len(rows):
        path.replace(path.with_suffix(f".until-step-{rows[-1]['step']:06d}.jsonl"))
    if rows:
        rewrite(path, kept)
    return kept


def rewrite(path: Path, rows: list[dict]) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def read_rows(path: Path) -> list[dict]:
    """The rows of a run's file that have a step. Lines that training did not write, or only in part, are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            rows += [row] if type(row["step"]) is int else []
    return rows


def numbers(row: dict) -> dict:
    """Only the finite numbers, which is all that metrics.jsonl has."""
    return {name: v for name, v in row.items() if type(v) in (int, float) and math.isfinite(v)}


def strict_json(value) -> str:
    """JSON with null for numbers that are not finite, as in the row of a token with NaN logprobs: JSON has no NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))


# ----------------------------------------------------------------------------------------------------------------------
# Rows of samples.jsonl and tokens.jsonl


def sample_rows(rollout: Rollout, problems: list, entropies: dict[int, float], extract: Callable) -> list[dict]:
    """The first response to each of the first problems. entropies: of measured responses, in nats."""
    rows = []
    firsts = rollout.by_group(torch.arange(len(rollout)))[:SHOWN, 0].tolist()
    for problem, i in zip(problems[:SHOWN], firsts, strict=True):
        rows.append(
            {
                "prompt": problem.prompt,
                "response": rollout.texts[i],
                "answer": problem.answer,
                "extracted": extract(rollout.texts[i], problem.verifier),
                "reward": rollout.rewards[i].item(),
                **{f"reward/{name}": value for name, value in rollout.components[i].items()},
                "entropy": entropies.get(i),
                "tokens": int(rollout.lengths[i]),
            }
        )
    return rows


def follow(part: Rollout, info: dict, logprobs: Tensor, entropy: Tensor, moment: Tensor) -> list[dict]:
    """The effect of an update on every token of the first right and the first wrong response of a micro-batch.

    info: of loss.policy_loss. logprobs, entropy, moment: [N], those of the update.
    """
    velocity = entropy_velocity(info["weight"], logprobs, entropy, moment).detach()
    columns = {"old_logprobs": part.old_logprobs, "entropy": part.entropy, "advantage": part.advantages}
    columns |= {"ratio": info["ratio"], "clipped": info["clipped_high"].float() - info["clipped_low"].float()}
    columns |= {"weight": info["weight"], "velocity": velocity}  # [N] each
    rows, sequence = [], part.sequence
    for right in (True, False):
        if (found := (part.correct == right).nonzero()[:1, 0]).numel():
            own = {name: column[sequence == found].cpu() for name, column in columns.items()}
            rows.append({"response": part.to("cpu")[found.cpu()], "columns": own})
    return rows


def token_rows(by_rank: list[list], problems: list, tokenizer) -> list[dict]:
    """Rows of tokens.jsonl: a right and a wrong response of the first, the last and some updates between.

    by_rank: every rank's updates. The lists of a row have a number for each token that is kept, None if not finite:
    old_logprobs, entropy    under the weights that sampled it, with old_logprobs = sampler those of the update; nats
    advantage, ratio         of the token; ratio: pi / pi_old in this update
    clipped                  -1 below the clip interval with A < 0, 1 above it with A > 0, 0 elsewhere
    weight, velocity         the gradient weight, and the rate at which it raises or lowers the token's entropy
    """
    rows, updates = [], list(zip(*by_rank, strict=True))
    for number in sorted({round(i * (len(updates) - 1) / (SHOWN - 1)) for i in range(SHOWN)} if updates else ()):
        followed = [each for update in updates[number] for each in update.followed]
        for right in (True, False):
            if one := next((each for each in followed if bool(each["response"].correct) == right), None):
                rows.append(
                    {"update": number + 1, "updates": len(updates)}
                    | token_row(**one, problems=problems, tokenizer=tokenizer)
                )
    return rows


def token_row(response: Rollout, columns: dict[str, Tensor], problems: list, tokenizer) -> dict:
    problem, length = problems[int(response.prompt_of)], int(response.lengths)
    kept = torch.arange(length)
    if length > MAX_TOKENS:
        kept = torch.cat([kept[: MAX_TOKENS // 2], kept[-MAX_TOKENS // 2 :]])
    return {
        "prompt": problem.prompt,
        "answer": problem.answer,
        "correct": bool(response.correct),
        "reward": response.rewards.item(),
        "components": response.components[0],
        "length": length,
        "tokens": token_texts(tokenizer, response.tokens[kept].tolist()),
        **{name: [float(f"{x:.5g}") for x in column[kept].tolist()] for name, column in columns.items()},
    }


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, special tokens included. They join to the whole text. [R] -> R strings.

    If several tokens form one character, the last one has it, and the others are empty. Ids beyond the tokenizer's
    vocabulary (padded embeddings have them) are empty as well.
    """

    def decode(some: list[int]) -> str:
        known = [i for i in some if i < len(tokenizer)]
        return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    before, pending = [], []  # decoded after the token before, as some tokenizers drop a space at the start of a text
    for token in ids:
        pending.append(token)
        text = decode(before + pending)[len(decode(before)) :]
        if text.endswith("\ufffd") and len(pending) < 4:
            texts.append("")
        else:
            texts.append(text)
            before, pending = [token], []
    return texts
