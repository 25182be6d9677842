"""Helpers of several test files: random rollouts, and whole runs of train.py in their own processes."""

import atexit
import contextlib
import functools
import io
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import reward
from ce_gppo import config
from ce_gppo.batch import Rollout
from ce_gppo.messages import UserError
from data.base import make_model, make_tokenizer
from train import Config

ROOT = Path(__file__).parents[1]
BASE, DATA = (str(ROOT / "data" / "walk" / name) for name in ("base", "eval.jsonl"))
SMALL = [
    *("--steps", "4", "--prompts-per-step", "8", "--max-kept-prompts", "8", "--mini-batch-prompts", "2"),
    *("--eval-every", "2", "--eval-samples", "2", "--checkpoint-every", "2", "--max-micro-batch-tokens", "2048"),
    *("--entropy-target", "1.0", "--dynamic-sampling", "refill"),  # all tests of a run also test these
]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def resolved(**settings) -> Config:
    """train.py's configuration, checked, with the values of the objective's paper filled in."""
    return config.resolve(Config(**settings))


def refuses(message: str, function, *arguments, **options) -> None:
    """The call ends with a UserError whose sentence has this pattern."""
    with pytest.raises(UserError, match=message):
        function(*arguments, **options)


def score(responses: list[str], answers: list[str], *verifiers, **options) -> list[float]:
    """The correctness that reward.score gives."""
    return [parts["correctness"] for parts in reward.score(responses, answers, *verifiers, **options)]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child process: any script in it can import the project."""
    return os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | variables


def run_here(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a script in this process, which has done the imports: its exit code and output."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    words, code = [script, *map(str, arguments)], 0
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(ROOT), mock.patch.object(sys, "argv", words), streams[0], streams[1]:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    stdout, stderr = ((stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (out, err))
    return subprocess.CompletedProcess(words, code, stdout, stderr)


FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["preloaded"])


class Forked:
    """train.py, or another script or module, in a process forked from one that has done the imports (preloaded.py).

    It has the methods of subprocess.Popen that the tests use. output: file for stdout and stderr.
    """

    def __init__(self, script: str, *arguments: str, output: str | Path = "", **variables: str):
        if not output:
            file, output = tempfile.mkstemp(prefix="output-", dir=scratch())
            os.close(file)
        self.output = Path(output)
        call = script, [str(argument) for argument in arguments], environment(**variables), str(output)
        self.process = FORKING.Process(target=_run_as_main, args=call)
        self.process.start()
        atexit.register(self.process.kill)  # it may still run if a test failed
        self.kill, self.terminate = self.process.kill, self.process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(self.output.read_text())
        return self.output.read_text() if self.output.is_file() else "", None


def _run_as_main(script: str, arguments: list[str], variables: dict[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__") if script.endswith(".py") else runpy.run_module(
            script, run_name="__main__", alter_sys=True
        )
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not run them


@functools.cache
def scratch() -> str:
    folder = tempfile.mkdtemp(prefix="ce-gppo-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def rows_of(name: str, count: int) -> str:
    """A file with the first rows of train or eval of the default data: reading all problems takes half a second."""
    path = Path(scratch()) / f"{name}-{count}.jsonl"
    rows = (ROOT / "data" / "walk" / f"{name}.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:count]))
    return str(path)


def quick(out: Path) -> list[str]:
    """Settings that make a run short and that no test looks at."""
    return ["--out", str(out), "--train-data", rows_of("train", 256), "--eval-data", rows_of("eval", 16)]


def start(out: Path, *arguments: str, mode: str = "disabled") -> Forked:
    return Forked("train.py", *([] if "--resume" in arguments else quick(out)), *arguments, WANDB_MODE=mode)


def run(out: Path, *arguments: str, mode: str = "disabled") -> str:
    process = start(out, *arguments, mode=mode)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def wandb_of(folder: Path) -> tuple[list[dict], list[int]]:
    """(rows, exit codes) that W&B has of an offline run, all its parts in order. A file is a header and a log of
    records, as LevelDB's."""
    from wandb.proto import wandb_internal_pb2

    rows, codes = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, place, record = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            size, kind = struct.unpack_from("<HB", data, place + 4)
            record, place = record + data[place + 7 : place + 7 + size], place + 7 + size
            if kind in (1, 4):  # the whole of a record, or its end
                found, record = wandb_internal_pb2.Record.FromString(record), b""
                rows += [{".".join(item.nested_key): json.loads(item.value_json) for item in found.history.item}]
                codes += [found.exit.exit_code] if found.HasField("exit") else []
            place += (left := -place % 2**15) * (left < 7)  # the rest of a block
    return [row for row in rows if "step" in row], codes


def ranks(processes: int, script: str, *arguments: str, **variables: str) -> list[Forked]:
    """The processes that torchrun would start, without its own start and its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"} | variables
    return [Forked(script, *arguments, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


def outputs_of(processes: list[Forked], timeout: float) -> str:
    """The output of all processes, after they have ended without an error."""
    outputs = [process.communicate(timeout)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return "\n".join(outputs)


def by_ranks(folder: Path, code: str, cases: dict[str, tuple], timeout: float) -> dict[str, dict]:
    """{name: content of result-<name>.pt}, which the script `code` writes, run once for each case.

    cases: {name: (processes, argument, ...)}. The script gets the folder, in which `tiny` is a model of two layers,
    then these arguments and the name.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    make_model(tokenizer, hidden_size=64, num_layers=2).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    script = folder / "script.py"
    script.write_text(code)
    for name, (processes, *arguments) in cases.items():
        outputs_of(ranks(processes, str(script), str(folder), *arguments, name), timeout)
    return {name: torch.load(folder / f"result-{name}.pt", weights_only=True) for name in cases}


def torchrun(processes: int, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), **PIPES | options)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def rollout_of(sizes: list[tuple[int, int]], seed: int = 0, vocabulary: int = 200, shared: bool = False) -> Rollout:
    """A Rollout of random columns; (prompt tokens, response tokens) of each response, every second one right.

    shared: all are responses to the first one's prompt; else each has its own.
    """
    g = torch.Generator().manual_seed(seed)
    B, lengths = len(sizes), torch.tensor([length for _, length in sizes], dtype=torch.long)
    N = int(lengths.sum())
    correct = torch.arange(B) % 2 == 0
    prompts = [torch.randint(vocabulary, (length,), generator=g).tolist() for length, _ in sizes]
    return Rollout(
        prompts=prompts[:1] if shared else prompts,
        prompt_of=torch.zeros(B, dtype=torch.long) if shared else torch.arange(B),
        lengths=lengths,
        tokens=torch.randint(vocabulary, (N,), generator=g),
        rollout_logprobs=-torch.rand(N, generator=g),
        truncated=torch.zeros(B, dtype=torch.bool),
        texts=[""] * B,
        components=[{"correctness": float(right)} for right in correct],
        correct=correct,
        rewards=correct.double(),
        advantages=torch.tensor([(-1.0) ** i * (1 + i) for i in range(B)]).repeat_interleave(lengths),
        old_logprobs=-5 - torch.rand(N, generator=g),
        entropy=torch.rand(N, generator=g),
    )


def naive_statistics(hidden, weight, targets, temperature, bias=0.0, scale=1.0, softcap=None):
    """The definitions, with the whole [N, V] in float64."""
    logits = (hidden.double() @ weight.double().T + bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    p = log_p.exp()
    H = -(p * log_p).sum(-1)
    S = (p**2 * (log_p + H[:, None])).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], H, S


def naive_outputs(model, rollout: Rollout, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs, entropy) [N] in float64, by transformers' own attention, without packing: a pass for each response."""
    model.set_attn_implementation("sdpa")
    logits = []
    for number, tokens in zip(rollout.prompt_of.tolist(), rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        prompt = rollout.prompts[number]
        logits.append(model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1])
    model.set_attn_implementation("packed")
    log_p = torch.log_softmax(torch.cat(logits).double() / temperature, -1)  # [N, V]
    return log_p.gather(1, rollout.tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
