"""The structure: how many files and lines a run has, what imports what, and that nothing happens on import."""

import ast
import functools
from pathlib import Path

import pytest

from helpers import ROOT

SCRIPTS = {"train", "rollout", "reward", "loss"}
OUTSIDE = SCRIPTS | {"tools", "bench", "results", "data", "tests"}
PACKAGE = sorted((ROOT / "ce_gppo").rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
CODE = [
    *ROOT.glob("*.py"),
    *PACKAGE,
    *(p for d in ("tools", "bench", "results", "data") for p in (ROOT / d).rglob("*.py")),
]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.rglob("readme.md")]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """All modules and names that a file imports, also inside functions: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def files_of(path: Path) -> set[Path]:
    """The files of the repository that a file imports, without empty ones."""
    places = [ROOT / name.replace(".", "/") for name in imported(path)]
    found = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return {file for file in found if file.stat().st_size}


def closure(path: Path) -> set[Path]:
    """A file and those that it imports, at any depth."""
    seen, pending = set(), {path}
    while pending:
        seen |= pending
        pending = set().union(*map(files_of, pending)) - seen
    return seen


def test_a_run_is_small_enough_to_be_read():
    run = closure(ROOT / "train.py")
    assert {ROOT / f"{name}.py" for name in SCRIPTS} < run and ROOT / "ce_gppo/batch.py" in run
    assert len(run) <= 28, sorted(path.name for path in run)
    assert sum(map(lines, run)) <= 5850, {path.name: lines(path) for path in run}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short(path):
    most = {ROOT / "train.py": 330, ROOT / "loss.py": 350}  # a step in one view; every objective in one place
    assert lines(path) < most.get(path, 300)


def test_the_whole_is_small():
    assert sum(map(lines, CODE)) <= 9600 and sum(map(lines, TESTS)) <= 9400
    pages = {path for path in PAGES if not {"results", "out", ".venv"} & set(path.relative_to(ROOT).parts)}
    assert sum(len(path.read_text().split()) for path in pages) <= 12_000


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_the_package_imports_no_script_and_no_tool(path):
    assert not {name.partition(".")[0] for name in imported(path)} & OUTSIDE


def test_no_import_goes_in_a_circle():
    assert not {path for path in CODE if path in closure_below(path)}


def closure_below(path: Path) -> set[Path]:
    return set().union(*map(closure, files_of(path)))


def test_loss_is_functions_on_tensors():
    """loss.py needs torch and the standard library, nothing else."""
    assert {name.partition(".")[0] for name in imported(ROOT / "loss.py")} <= {
        "torch",
        "collections",
        "dataclasses",
        "math",
        "typing",
    }


def test_nothing_happens_on_import(import_of_train):
    """No vLLM, no W&B, no attention registered, no variables of the environment except torch's."""
    modules, variables, attentions = import_of_train
    assert "train" in modules and not {"vllm", "wandb", "tyro"} & modules
    assert not [name for name in variables if not name.startswith("TORCH")]
    assert "sdpa" in attentions and "packed" not in attentions


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_nothing_is_done_inside_an_assert(path):
    """`python -O` leaves asserts out."""
    asserts = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not [node.lineno for node in asserts for inner in ast.walk(node) if isinstance(inner, ast.Call)]
