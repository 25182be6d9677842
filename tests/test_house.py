"""The structure: imports, lengths, and pages that are made from the code."""

import ast

import pytest

from ce_gppo import metrics
from helpers import ROOT

PACKAGE = [  # each may import those above it, and those on its own line
    {"types", "verifier", "objectives", "corrections"},
    {"parallel", "entropy", "betas", "selection"},
    {"forward", "tokens", "problems", "checkpoint", "metrics", "statistics", "advice"},
    {"model", "perf", "config", "runs", "report", "tracking", "evaluation", "reference", "critic"},
]
LOSS = ("loss.py", "ce_gppo/objectives.py", "ce_gppo/corrections.py")
SCRIPTS = {"train", "rollout", "reward", "loss"}


def imported(path) -> set[str]:
    """Top-level modules and ce_gppo's modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {
                f"{node.module}.{alias.name}" if node.module == "ce_gppo" else node.module for alias in node.names
            }
    return names


@pytest.mark.parametrize("path", sorted(ROOT.glob("ce_gppo/**/*.py")), ids=lambda path: path.stem)
def test_the_package_imports_downwards(path):
    module = path.relative_to(ROOT / "ce_gppo").parts[0].removesuffix(".py")
    names = imported(path)
    assert not {name.partition(".")[0] for name in names} & (SCRIPTS | {"tools", "bench", "results", "data"})
    used = {name.split(".")[1] for name in names if name.startswith("ce_gppo.")} - {module}
    level = next((i for i, line in enumerate(PACKAGE) if module in line), len(PACKAGE))
    assert used <= set().union(*PACKAGE[: level + 1])


def test_loss_is_functions_on_tensors():
    """loss.py and the two modules it takes from the package need torch and the standard library, nothing else."""
    names = set().union(*(imported(ROOT / path) for path in LOSS))
    assert names <= {"torch", "dataclasses", "math", "collections.abc", "ce_gppo.objectives", "ce_gppo.corrections"}


def test_a_step_is_short():
    files = ("train.py", "rollout.py", "reward.py", "loss.py", "ce_gppo/forward.py", "ce_gppo/entropy.py")
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in files}
    assert lines["train.py"] < 320 and sum(lines.values()) <= 1400
    functions = [node for node in ast.parse((ROOT / "train.py").read_text()).body if isinstance(node, ast.FunctionDef)]
    step = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert all(step[name] <= 40 for name in ("sample", "select", "learn", "report"))


def test_nothing_happens_on_import(import_of_train):
    """No vLLM, no W&B, no attention registered, no variables of the environment except torch's."""
    modules, variables, attentions = import_of_train
    assert "train" in modules and not {"vllm", "wandb", "tyro"} & modules
    assert not [name for name in variables if not name.startswith("TORCH")]
    assert "sdpa" in attentions and "packed" not in attentions


@pytest.mark.parametrize("path", sorted(ROOT.glob("ce_gppo/**/*.py")), ids=lambda path: path.stem)
def test_nothing_is_done_inside_an_assert(path):
    """`python -O` leaves asserts out."""
    asserts = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not [node.lineno for node in asserts for inner in ast.walk(node) if isinstance(inner, ast.Call)]


def test_the_page_of_metrics_is_the_list():
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics.markdown(), (
        "python -m ce_gppo.metrics > docs/metrics.md"
    )
