"""What several test files share: random responses, and whole runs of train.py in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import loss
from ce_gppo import config
from ce_gppo.types import Response
from train import Config

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "data" / "arithmetic" / "base")
DATA = str(ROOT / "data" / "arithmetic" / "eval.jsonl")
SMALL = [
    *("--steps", "4", "--prompts-per-step", "16", "--max-kept-prompts", "8", "--mini-batch-prompts", "2"),
    *("--eval-every", "2", "--eval-samples", "2", "--checkpoint-every", "2", "--max-micro-batch-tokens", "2048"),
    *("--entropy-target", "0.2"),  # every test of a run is one of the controller, too
]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def resolved(**settings) -> Config:
    """train.py's configuration, checked, with the values of the objective's paper filled in."""
    return config.resolve(Config(**settings), loss.PUBLISHED)


def environment(**variables: str) -> dict[str, str]:
    """That of a child process, which finds the project whatever its script."""
    return os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | variables


def start(out: Path, *arguments: str, mode: str = "disabled") -> subprocess.Popen:
    where = [] if "--resume" in arguments else ["--out", str(out)]
    command = [sys.executable, "train.py", *where, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment(WANDB_MODE=mode), **PIPES)


def run(out: Path, *arguments: str, mode: str = "disabled") -> str:
    process = start(out, *arguments, mode=mode)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def torchrun(processes: int, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), **PIPES | options)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def responses_of(lengths: list[tuple[int, int]], seed: int = 0, vocabulary: int = 200) -> list[Response]:
    """Random responses with prompts; (prompt tokens, response tokens) each."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i, (P, R) in enumerate(lengths):
        ids = torch.randint(vocabulary, (P + R,), generator=g).tolist()
        response = Response(ids[:P], ids[P:], -torch.rand(R, generator=g), False, "")
        response.old_logprobs = -5 - torch.rand(R, generator=g)
        response.entropy = torch.rand(R, generator=g)
        response.advantage = (-1.0) ** i * (1 + i)
        response.verdict = float(response.advantage > 0)
        out.append(response)
    return out


def group_of(prompt: int, lengths: list[int], seed: int = 0) -> list[Response]:
    """Responses to one prompt."""
    responses = responses_of([(prompt, length) for length in lengths], seed)
    for r in responses:
        r.prompt_ids = responses[0].prompt_ids
    return responses
