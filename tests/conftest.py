"""A tiny policy and tiny data for the tests: made here in a second, nothing is downloaded."""

import os
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{Path(__file__).parent}"  # for preloaded.py

# Tests run in two processes (pytest-xdist). Threads of two processes that share cores wait for each other in loops.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import json

import pytest
import torch

from ce_gppo.model import register_attention
from data.arithmetic.base import make_model, make_tokenizer
from rollout import prepare_environment

prepare_environment()
register_attention()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tiny_model(tokenizer):
    """A random Qwen2 of 50 k parameters, the same every time."""
    torch.manual_seed(0)
    model = make_model(tokenizer, hidden_size=64, num_layers=1)
    model.set_attn_implementation("packed")
    return model


@pytest.fixture
def tiny_folder(tiny_model, tokenizer, tmp_path):
    """The same as a Hugging Face folder."""
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
    """Tests of the finished run are slow, too."""
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of four steps, with W&B offline: (folder, what it printed)."""
    from helpers import SMALL, run

    out = tmp_path_factory.mktemp("out")
    return out / "whole", run(out, "--run-name", "whole", *SMALL, mode="offline")
