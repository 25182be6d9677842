"""One policy update: ours against TRL's and against a plain transformers loop, in tokens/s and peak memory, on a CPU.

    .venv/bin/python -m bench.update                        eight responses of 30 to 256 tokens to prompts of 40
    .venv/bin/python -m bench.update --equal --rounds 1     the same number of tokens in equal responses: no padding
    .venv/bin/python -m bench.update --without-trl          without TRL, whose environment takes minutes to install
    .venv/bin/python -m bench.update --without-trl --against HEAD~20    and the update of that git revision: `before`

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
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from bench import common
from ce_gppo import perf
from ce_gppo import types as t
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
    without_trl: bool = False  # only `ours` and `plain`
    against: str = ""  # a git revision, checked out into a temporary folder, whose update runs in turn with the others
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
        "threads": config.threads,
        "max_micro_batch_tokens": config.max_micro_batch_tokens,
        "trl_gradient_checkpointing": config.trl_gradient_checkpointing,
    }
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
    process = subprocess.run(
        [python, "-m", "bench.contestants", name, folder],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RunEnded(f"the contestant '{contestant}' failed:\n{process.stderr}")
    (folder / f"{name}.pt").rename(folder / f"{contestant}.pt")
    return json.loads(process.stdout.splitlines()[-1])


def gradient_difference(folder: Path, a: str, b: str) -> float:
    """The largest relative difference between two contestants' saved gradients."""
    gradients, others = (torch.load(folder / f"{name}.pt") for name in (a, b))
    return max(((g - others[n]).norm() / others[n].norm()).item() for n, g in gradients.items())


def work(batch: dict, model_config: LlamaConfig, shared_prompt: bool) -> float:
    """Floating-point operations of forward and backward, without padding."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    prompts, responses = (list(map(len, batch[name])) for name in ("prompt_ids", "response_ids"))
    needed = sum(prompts[:1] if shared_prompt else prompts) + sum(responses)
    squares = sum((P + R) ** 2 for P, R in zip(prompts, responses, strict=True))
    return perf.flops(model, needed, sum(responses), squares)


def compete(
    contestants: list[str], model_config: LlamaConfig, config: Config
) -> tuple[dict, dict[str, dict[str, float]], dict[str, float]]:
    """(batch, medians of each contestant, difference of each other's gradients to ours). RunEnded if they differ."""
    with tempfile.TemporaryDirectory() as folder, checked_out(config.against) as before:
        folder = Path(folder)
        common.save_random_model(folder, model_config)
        batch = write_batch(folder, config)
        runs = {name: [] for name in contestants}
        for _ in range(config.rounds):
            for name in reversed(contestants):  # ours last, as `before` saves its gradients by the same name
                runs[name].append(run(name, folder, config.threads, before))
        differences = {name: gradient_difference(folder, "ours", name) for name in contestants[1:]}
    median = {n: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for n, rows in runs.items()}
    for name, difference in differences.items():
        if not (difference < 1e-3 and abs(median[name]["loss"] - median["ours"]["loss"]) < 1e-4):
            raise RunEnded(f"ours and '{name}' compute different gradients, by {difference:.2g}, or losses: {median}")
    return batch, median, differences


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    contestants = ["ours", *["before"] * bool(config.against), *["trl"] * (not config.without_trl), "plain"]
    model_config = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        vocab_size=config.vocabulary,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    rates = [perf.matrix_rate("cpu")]
    batch, median, differences = compete(contestants, model_config, config)
    rates.append(perf.matrix_rate("cpu"))
    tokens = sum(map(len, batch["prompt_ids"] + batch["response_ids"]))
    response_tokens = sum(map(len, batch["response_ids"]))
    floor = work(batch, model_config, config.shared_prompt) / max(rates)
    hidden = torch.randn(response_tokens, config.hidden_size)  # [N, D]
    weight = torch.randn(config.vocabulary, config.hidden_size) / config.hidden_size**0.5  # [V, D]
    head, products = common.head_seconds(hidden, weight, torch.randint(config.vocabulary, (response_tokens,)))

    result = {"bench": "update", "date": time.strftime("%Y-%m-%d"), "equal": config.equal, "tokens": tokens}
    result |= {"threads": config.threads, "rounds": config.rounds, "shared_prompt": config.shared_prompt}
    result["against"] = config.against
    for name in contestants:
        result[f"{name}/tokens_per_s"] = tokens / median[name]["seconds"]
        result |= {f"{name}/{key}": value for key, value in median[name].items()}
    bars = []
    for name in contestants[1:]:
        result[f"{name}/gradient_difference"] = differences[name]
        result[f"speed_over_{name}"] = median[name]["seconds"] / median["ours"]["seconds"]
        result[f"memory_of_{name}"] = median["ours"]["peak_gib"] / median[name]["peak_gib"]
        bar = (">= 1.5" if config.equal else ">= 2.5", "" if config.equal else "<= 0.4") if name == "trl" else ("", "")
        bars.append((f"tokens/s, ours over {name}", result[f"speed_over_{name}"], bar[0]))
        bars.append((f"peak memory, ours over {name}", result[f"memory_of_{name}"], bar[1]))
    result |= {"matrix_gflops": max(rates) / 1e9, "floor_s": floor, "over_floor": median["ours"]["seconds"] / floor}
    result |= {"head_s": head, "head_products_s": products, "head_overhead": head / products - 1}
    bars.append(("seconds at the matrix rate, the floor", floor, ""))
    bars.append(("seconds, ours over the floor", result["over_floor"], ""))
    bars.append(("head function, time beyond its matrix products", result["head_overhead"], "<= 0.15"))
    columns = ("seconds", "tokens_per_s", "peak_gib", "before_gib", "grad_norm")
    rows = [(name, *(result[f"{name}/{column}"] for column in columns)) for name in contestants]
    common.show(result, [("contestant", *columns), *rows], [("", "value", "bar"), *bars])


if __name__ == "__main__":
    command(main, Config, __doc__)
