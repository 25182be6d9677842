"""A tiny policy and tiny data for the tests: made here in a second, without a download."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{Path(__file__).parent}"  # for preloaded.py

# A shell's background job ignores Ctrl-C, and nohup a closed terminal. The runs of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests run in two processes (pytest-xdist). With more threads than cores, they would wait for each other in busy loops.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))


def pytest_sessionstart(session):
    """Import train.py before any test file imports something, and keep the effects for `import_of_train`.

    The first of pytest-xdist's processes runs no test: the others wait for it, so it starts without torch.
    """
    if session.config.getoption("dist", "no") != "no":
        return
    before = set(os.environ)
    from transformers import AttentionInterface

    import train  # noqa: F401
    from ce_gppo.model import register_attention
    from rollout import prepare_environment

    session.import_of_train = set(sys.modules), set(os.environ) - before, set(AttentionInterface().valid_keys())
    prepare_environment()
    register_attention()


@pytest.fixture(scope="session")
def import_of_train(request):
    """After `import train`, in a process that had imported nothing else: (modules, new variables, attentions)."""
    return request.session.import_of_train


@pytest.fixture(scope="session")
def tokenizer():
    from data.base import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def tiny_model(tokenizer):
    """A random Qwen2 of 50 k parameters, the same every time."""
    import torch

    from data.base import make_model

    torch.manual_seed(0)
    model = make_model(tokenizer, hidden_size=64, num_layers=1)
    model.set_attn_implementation("packed")
    return model


@pytest.fixture
def tiny_folder(tiny_model, tokenizer, tmp_path):
    """The tiny model and its tokenizer as a Hugging Face folder."""
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path):
    """Write rows, dicts or raw lines, to a JSONL file; returns its path."""

    def write(*rows, name="problems.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def pytest_collection_modifyitems(items):
    """Tests that use the finished run are slow."""
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of four steps, with W&B offline: (folder, its output)."""
    from helpers import SMALL, run

    out = tmp_path_factory.mktemp("out")
    return out / "whole", run(out, "--run-name", "whole", *SMALL, mode="offline")


@pytest.fixture
def one_process():
    """Ends the process group that FSDP2 makes: later tests must not find it."""
    import torch

    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
