"""One policy update: ours against TRL's, or against another revision's, in tokens/s and peak memory, on a CPU.

    .venv/bin/python -m bench.update                        eight responses of 30 to 256 tokens to prompts of 40
    .venv/bin/python -m bench.update --equal --rounds 1     the same number of tokens in equal responses: no padding
    .venv/bin/python -m bench.update --against HEAD~20      instead of TRL's, that git revision's update: `before`
    .venv/bin/python -m bench.update --accounting           instead of TRL's, ours without the entropy accounting

Run it from the repository root. The contestants are in bench/contestants.py, that of another revision in its own. Each
runs in a process of its own, in turn, on the same weights and batch. If their losses or gradients differ, the bench
ends without a result. Tokens are those of prompts and responses, not padding.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaConfig

import train
from bench import common
from ce_gppo import ranges as t
from ce_gppo.config import command
from ce_gppo.messages import RunEnded, UserError

ROOT = Path(__file__).parents[1]
TRL = "trl==1.16.0"
TRL_ENVIRONMENT = ROOT / "bench" / ".venv-trl"
SAME_AS_OURS = ("transformers", "accelerate")  # the same versions in TRL's environment: only TRL differs


@dataclass
class Config:
    equal: bool = False  # responses of one length; the total number of tokens stays
    shared_prompt: bool = False  # one prompt for all responses, which are then one group; else one prompt each
    rounds: t.Count = 2  # of all contestants, in turn
    without_trl: bool = False  # only ours: TRL's environment takes minutes to install
    against: str = ""  # a git revision, checked out into a temporary folder, whose update runs in turn with ours
    accounting: bool = False  # compare ours with `entropy_only`: no moment, and no sums over tokens
    trl_gradient_checkpointing: bool = False  # TRL's own default is true, which is slower and takes less memory
    threads: t.Count = 2
    max_micro_batch_tokens: t.Count = train.Config.max_micro_batch_tokens  # ours
    prompt_tokens: t.Count = 40
    response_tokens: tuple[t.Count, ...] = (30, 40, 50, 60, 80, 100, 160, 256)
    # The shape of SmolLM2-135M. Random weights take the same time.
    hidden_size: t.Count = 576
    intermediate_size: t.Count = 1536
    layers: t.Count = 30
    heads: t.Count = 9
    kv_heads: t.Count = 3
    vocabulary: t.Count = 49152


def trl_python() -> Path:
    """The interpreter of TRL's environment, installed on first use. torch is first, else pip takes CUDA's build."""
    done = TRL_ENVIRONMENT / "installed"
    python = TRL_ENVIRONMENT / "bin" / "python"
    torch_pin = f"torch=={version('torch').partition('+')[0]}"
    pins = [torch_pin, TRL, *(f"{name}=={version(name)}" for name in SAME_AS_OURS)]
    if not done.exists() or done.read_text() != " ".join(pins):
        print(f"installing {TRL} into {TRL_ENVIRONMENT}, once: a few minutes and 1.5 GB", file=sys.stderr)
        venv.create(TRL_ENVIRONMENT, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        index = ["--index-url", "https://download.pytorch.org/whl/cpu"]
        own_index = [*install, "--no-deps", "--retries", "0", "--timeout", "15", torch_pin, *index]
        if subprocess.run(own_index, stderr=subprocess.DEVNULL).returncode:
            print("PyTorch's index cannot be reached; continuing without it", file=sys.stderr)
        subprocess.run([*install, *pins], check=True)
        done.write_text(" ".join(pins))
    return python


def write_batch(folder: Path, config: Config) -> dict:
    """Write batch.json: random tokens, and advantages that are positive and negative in turn."""
    lengths = list(config.response_tokens)
    if config.equal:
        lengths = [sum(lengths) // len(lengths)] * len(lengths)
    generator = torch.Generator().manual_seed(0)
    prompts = [common.random_ids(config.prompt_tokens, config.vocabulary, generator) for _ in lengths]
    batch = {
        "prompt_ids": prompts[:1] * len(lengths) if config.shared_prompt else prompts,
        "response_ids": [common.random_ids(length, config.vocabulary, generator) for length in lengths],
        "advantages": [(1.0, -0.5)[i % 2] for i in range(len(lengths))],
    }
    names = "threads", "max_micro_batch_tokens", "trl_gradient_checkpointing"
    batch |= {name: getattr(config, name) for name in names}
    (folder / "batch.json").write_text(json.dumps(batch))
    return batch


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with the repository as it was at a git revision; without one, the repository."""
    if not revision:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        worktree = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run([*worktree, "add", "--detach", folder, revision], capture_output=True, text=True)
        if added.returncode:
            raise UserError(f"--against {revision}: git cannot check it out: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield Path(folder)
        finally:
            subprocess.run([*worktree, "remove", "--force", folder], capture_output=True)


def run(contestant: str, folder: Path, threads: int, before: Path) -> dict[str, float]:
    """The numbers that a contestant prints. `before` is the contestant `ours` of the revision at the root `before`."""
    python = trl_python() if contestant == "trl" else sys.executable
    name, root = ("ours", before) if contestant == "before" else (contestant, ROOT)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    options = {"cwd": root, "env": environment | {"PYTHONPATH": str(root)}, "capture_output": True, "text": True}
    process = subprocess.run([python, "-m", "bench.contestants", name, folder], **options)
    if process.returncode:
        raise RunEnded(f"the contestant '{contestant}' failed:\n{process.stderr}")
    (folder / f"{name}.pt").rename(folder / f"{contestant}.pt")
    return json.loads(process.stdout.splitlines()[-1])


def compete(contestants: list[str], shape: LlamaConfig, config: Config) -> tuple[dict, dict, dict]:
    """(batch, medians of each contestant, difference of each other's gradients to ours). RunEnded if they differ."""
    with tempfile.TemporaryDirectory() as folder, checked_out(config.against) as before:
        folder = Path(folder)
        common.save_random_model(folder, shape)
        batch = write_batch(folder, config)
        runs = {name: [] for name in contestants}
        for _ in range(config.rounds):
            for name in reversed(contestants):  # ours last, as `before` saves its gradients by the same name
                runs[name].append(run(name, folder, config.threads, before))
        ours, *others = (torch.load(folder / f"{name}.pt") for name in contestants)  # gradients by name
    relative = [max(((ours[n] - g).norm() / g.norm()).item() for n, g in other.items()) for other in others]
    differences = dict(zip(contestants[1:], relative, strict=True))
    median = {n: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for n, rows in runs.items()}
    for name, difference in differences.items():
        if not (difference < 1e-3 and abs(median[name]["loss"] - median["ours"]["loss"]) < 1e-4):
            raise RunEnded(f"ours and '{name}' compute different gradients, by {difference:.2g}, or losses: {median}")
    return batch, median, differences


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    itself = ["before"] * bool(config.against) + ["entropy_only"] * config.accounting
    contestants = ["ours", *(itself or ["trl"] * (not config.without_trl))]
    shape = common.model_config(LlamaConfig, config, tie_word_embeddings=True, pad_token_id=0)
    batch, median, differences = compete(contestants, shape, config)
    tokens = sum(map(len, batch["prompt_ids"] + batch["response_ids"]))
    N = sum(map(len, batch["response_ids"]))
    hidden = torch.randn(N, config.hidden_size)  # [N, D]
    weight = torch.randn(config.vocabulary, config.hidden_size) / config.hidden_size**0.5  # [V, D]
    head, products = common.head_seconds(hidden, weight, torch.randint(config.vocabulary, (N,)))

    names = "equal", "shared_prompt", "threads", "rounds", "against"
    result = {"tokens": tokens} | {name: getattr(config, name) for name in names}
    result |= {"head_s": head, "head_products_s": products, "head_overhead": head / products - 1}
    bars = [("head function, time beyond its matrix products", result["head_overhead"], "<= 0.15")]
    for name in contestants:
        median[name]["tokens_per_s"] = tokens / median[name]["seconds"]
        result |= {f"{name}/{key}": value for key, value in median[name].items()}
    trl = (">= 1.5" if config.equal else ">= 2.5", "" if config.equal else "<= 0.4")
    bars_of = {"trl": trl, "before": (">= 0.98", "<= 1.02"), "entropy_only": (">= 0.97", "")}
    for name, difference in differences.items():
        result[f"{name}/gradient_difference"] = difference
        result[f"speed_over_{name}"] = median[name]["seconds"] / median["ours"]["seconds"]
        result[f"memory_of_{name}"] = median["ours"]["peak_gib"] / median[name]["peak_gib"]
        bars.append((f"tokens/s, ours over {name}", result[f"speed_over_{name}"], bars_of[name][0]))
        bars.append((f"peak memory, ours over {name}", result[f"memory_of_{name}"], bars_of[name][1]))
    columns = ("seconds", "tokens_per_s", "peak_gib", "before_gib", "grad_norm")
    rows = [(name, *(median[name][column] for column in columns)) for name in contestants]
    common.show("update", result, [("contestant", *columns), *rows], [("", "value", "bar"), *bars])


if __name__ == "__main__":
    command(main, Config, __doc__)
