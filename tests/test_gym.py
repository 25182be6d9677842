"""reasoning-gym: tests with a stand-in for the library, which always run, and tests with the library.

The tests with the library are skipped if it is not installed; the summary of the tests says so.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
import time

import pytest

import reward
from ce_gppo.messages import UserError
from ce_gppo.problems import load_rows
from ce_gppo.types import Problem
from ce_gppo.verifier import custom, gym, sources, workers
from data.gym import prepare
from helpers import ROOT, score

COMMON = """
from dataclasses import dataclass
@dataclass
class Config:
    seed: int = 0
    size: int = 10
    largest: int = 500
    def validate(self):
        assert self.largest > 1, "largest must be above 1"
class Base:
    def __init__(self, config):
        config.validate()
        self.config = config
    def __len__(self):
        return self.config.size
    def __getitem__(self, i):
        n = (self.config.seed * 7919 + 37 * i) % self.config.largest
        return {"question": f"Double {n}?", "answer": str(2 * n), "metadata": {"n": n}}
    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])
    def inherited(self, text):
        return eval(text)
"""
GIVES_UP = "class Data(Base):\n def __getitem__(self, i): return super().__getitem__(i // (i % {} > 0))"
SCORE = "class Data(Base):\n def score_answer(self, a, e): return "
TASKS = {  # name -> (body of the module, the function by which its scorer evaluates text)
    "plain": ("class Data(Base): pass", ""),
    "partial": (SCORE + "1.0 if a == e['answer'] else 0.05", ""),
    "hangs": ("import time\n" + SCORE + "time.sleep(600) if a == 'hang' else float(a == e['answer'])", ""),
    "raises": (SCORE + "float(int(a) == int(e['answer']))", ""),
    "fooled": (SCORE + "1.0", ""),
    "never": (SCORE + "0.0", ""),
    "gives_up": (GIVES_UP.format(3), ""),
    "unmade": (GIVES_UP.format(1), ""),
    "makes": ("class Data(Base):\n def __getitem__(self, i): return eval('1')", ""),
    "regex": ("import re\nP = re.compile('a')\n" + SCORE + "re.compile('a') and P", ""),
    "local": ("def parse_expr(a): return 1\n" + SCORE + "parse_expr(a)", ""),
    "direct": (SCORE + "eval(a)", "eval"),
    "helper": ("def help(a): return exec(a)\n" + SCORE + "help(a)", "exec"),
    "method": (SCORE + "self.inherited(a)", "eval"),
    "other": ("from .tools import deep\n" + SCORE + "deep(a)", "ast.literal_eval"),
    "value": ("F = {'x': eval}\n" + SCORE + "F['x'](a)", "eval"),
    "nested": (SCORE + "[compile(b, '', 'eval') for b in (lambda c: [c])(a)]", "compile"),
    "symbols": ("from sympy import Symbol as S\n" + SCORE + "S(a)", "sympy.Symbol"),
    "module": ("import sympy as sp\n" + SCORE + "sp.Poly(a)", "sympy"),
    "attribute": ("import builtins\n" + SCORE + "builtins.eval(a)", "eval"),
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package reasoning_gym with TASKS, found by this process and by the workers."""
    package = tmp_path / "library" / "reasoning_gym"
    package.mkdir(parents=True)
    files = {
        "__init__": "",
        "common": COMMON,
        "tools": "from ast import literal_eval\ndef deep(a): return literal_eval(a)",
    }
    files |= {name: f"from .common import Base, Config\n{body}" for name, (body, _) in TASKS.items()}
    imports = "".join(f"from . import {name}\n" for name in TASKS)
    files["factory"] = imports + "DATASETS = {" + ", ".join(f"'{n}': ({n}.Data, {n}.Config)" for n in TASKS) + "}"
    for name, text in files.items():
        (package / f"{name}.py").write_text(text + "\n")
    yield from fresh(monkeypatch, package.parent)


def fresh(monkeypatch, path=None):
    """Forget any imported reasoning_gym, here and in the workers, before and after."""
    if path:
        monkeypatch.syspath_prepend(str(path))
        monkeypatch.setenv("PYTHONPATH", str(path), prepend=":")
    for before in (True, False):
        for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        for cache in (gym.outline, gym.data_set, custom.load):
            cache.cache_clear()
        workers._stop_workers()
        if before:
            yield


def row(task: str, n: int = 21) -> Problem:
    answer = {"answer": str(2 * n), "metadata": {"n": n}, "config": {}}
    return Problem("", [], json.dumps(answer), f"gym/{task}")


def test_scorers_that_evaluate_text_are_found_by_reading_their_code(stand_in):
    """Directly, through helpers, methods, bases, other files and values. Evaluating to make questions is allowed."""
    found = {name: gym.evaluates(Data) for name, (Data, _) in gym.tasks().items()}
    assert found == {name: by for name, (_, by) in TASKS.items()}


def test_from_the_row_to_the_score(stand_in, capsys):
    """Through the workers, with a hostile answer for each."""
    said, (problems,) = sources.assign(
        "gym/partial=gym_partial", reward.VERIFIERS, [row(n) for n in ("partial", "hangs")]
    )
    assert said == "gym/hangs by gym, gym/partial by gym_partial"
    partial, hangs = problems
    says = {"42": partial, "<answer>42</answer>": partial, r"\boxed{42}": partial, "<answer>41</answer>": partial}
    says |= dict.fromkeys(["<answer>hang</answer>", "<answer> 42 </answer>", "<answer>eval('42')</answer>"], hangs)
    answers, verifiers = zip(*[(problem.answer, problem.verifier) for problem in says.values()], strict=True)
    start = time.monotonic()
    assert score(list(says), answers, verifiers, timeout=2.0) == [0.05, 1, 1, 0.05, 0, 1, 0]
    assert time.monotonic() - start < 60 and "1 of 7 answers scored 0 after 2 s" in capsys.readouterr().err


def test_full_credit_only_and_errors_are_wrong(stand_in):
    says = [
        "<answer>42</answer>",
        "<answer>41</answer>",
        "<answer>x</answer>",
        "",
        "<answer>" + "9" * 100_000 + "</answer>",
    ]
    for task, expected in (("partial", [1, 0, 0, 0, 0]), ("raises", [1, 0, 0, 0, 0]), ("plain", [1, 0, 0, 0, 0])):
        scorer = gym.scorer(f"gym/{task}")
        assert [scorer(text, row(task).answer) for text in says] == expected, task
    with pytest.raises(UserError, match="gym/plain: answer '42' is not what data/gym/prepare.py writes"):
        gym.scorer("gym/plain")(says[0], "42")


def test_refused_tasks_get_a_sentence_before_the_run(stand_in, monkeypatch):
    with pytest.raises(
        UserError, match="gym/direct: refused, since its scorer would evaluate the model's text by eval"
    ):
        sources.assign("", reward.VERIFIERS, [row("direct")])
    with pytest.raises(UserError, match="gym/nope: reasoning-gym has no task 'nope'; it has: attribute, "):
        sources.assign("", reward.VERIFIERS, [row("nope")])
    with pytest.raises(UserError, match="verifier 'gym_partial' of source mine is unknown"):
        sources.assign("gym_partial", reward.VERIFIERS, [row("plain"), Problem("", [], "4", "mine")])
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(UserError, match="is not installed; install it with .* -r requirements/gym.txt"):
        gym.tasks()


def written(monkeypatch, out, *arguments) -> tuple[list[dict], list[dict]]:
    monkeypatch.setattr("sys.argv", ["prepare", "--out", str(out), *arguments])
    prepare.main()
    name = arguments[arguments.index("--name") + 1] if "--name" in arguments else arguments[0]
    return load_rows(str(out / f"{name}.jsonl")), load_rows(str(out / f"{name}-eval.jsonl"))


def test_rows_do_not_overlap_and_repeat_exactly(stand_in, tmp_path, monkeypatch):
    options = ["--train", "50", "--held-out", "10", "--name", "small"]
    train, held_out = written(monkeypatch, tmp_path, "plain", *options, "--set", "largest=300")
    assert (len(train), len(held_out)) == (50, 10) and train[0]["source"] == "gym/plain"
    questions = [row["prompt"][0]["content"] for row in train + held_out]
    assert len(set(questions)) == 60 and json.loads(train[0]["answer"])["config"] == {"largest": 300}
    assert all(json.loads(row["answer"])["metadata"]["n"] < 300 for row in train)
    assert written(monkeypatch, tmp_path, "plain", *options, "--set", "largest=300") == (train, held_out)
    assert written(monkeypatch, tmp_path, "plain", *options, "--seed", "5") != (train, held_out)


def test_problems_that_the_library_fails_to_make_are_left_out(stand_in, tmp_path, monkeypatch, capsys):
    train, held_out = written(monkeypatch, tmp_path, "gives_up", "--train", "30", "--held-out", "8")
    assert (len(train), len(held_out)) == (30, 8)
    said = capsys.readouterr().out
    assert "8 distinct problems of 8; left out: 0 whose answer is not right, 4 that the library failed to make" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["direct"], "gym/direct: refused, since its scorer would evaluate"),
        (["fooled"], "gym/fooled: refused, since its scorer finds <answer>no idea</answer> right"),
        (["unmade"], "gym/unmade: refused, since the library fails to make its problems"),
        (["never"], "gym/never: refused, since its scorer finds none of the library's own answers right"),
        (["nope"], "has no task 'nope'"),
        (["plain", "--set", "smallest=3"], "--set smallest=3: NAME=VALUE is needed, with a NAME of largest"),
        (["plain", "--set", "largest=1"], "refuses this configuration: largest must be above 1"),
        (["plain", "partial", "--set", "largest=9"], "give exactly one NAME"),
    ],
)
def test_mistakes_of_the_command(stand_in, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        written(monkeypatch, tmp_path, *arguments)
    assert not list(tmp_path.glob("*.jsonl"))


# ----------------------------------------------------------------------------------------------------------------------
# The library itself

installed = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is not installed: -m data.gym.prepare does it",
)
CANARY = (
    "<answer>__import__('os').getpid() + 4242</answer>",
    "<answer>[[4242]]</answer>",
    "<answer>" + "(" * 9_000 + "</answer>",
)


@installed
def test_the_libraries_scorers_that_are_not_refused_compile_no_response(monkeypatch):
    """Independent of gym.evaluates: Python itself reports all text that is compiled while a scorer reads a response."""
    compiled, listening = [], [True]
    sys.addaudithook(lambda event, args: event == "compile" and listening[0] and compiled.append(str(args[0])))

    def caught(Data, Config) -> bool:
        compiled.clear()
        data = Data(config=Config(seed=3, size=2))
        entry = data[0]
        for text in CANARY[:2]:
            with contextlib.suppress(Exception):  # some raise
                data.score_answer(text.removeprefix("<answer>").removesuffix("</answer>"), entry)
        return any("4242" in text for text in compiled)

    tasks = gym.tasks()
    refused = {name for name, (Data, _) in tasks.items() if gym.evaluates(Data)}
    assert {"n_queens", "spiral_matrix", "binary_matrix", "string_insertion", "countdown"} <= refused and len(
        refused
    ) < 20
    for name in tasks.keys() - refused - {"composite", "knight_swap"}:  # the first is no task, the other takes seconds
        assert not caught(*tasks[name]), name
    assert all(caught(*tasks[name]) for name in ("n_queens", "spiral_matrix", "binary_matrix", "countdown", "puzzle24"))
    listening[0] = False


@installed
@pytest.mark.parametrize("task", ["chain_sum", "graph_color", "countdown"])
def test_tasks_of_the_library_from_command_to_score(tmp_path, monkeypatch, task):
    workers._stop_workers()
    train, held_out = written(monkeypatch, tmp_path, task, "--train", "12", "--held-out", "4")
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in held_out}
    problems = [Problem("", [], row["answer"], row["source"]) for row in held_out]
    _, (problems,) = sources.assign("", reward.VERIFIERS, problems)
    answers, verifiers = [p.answer for p in problems] * 3, [p.verifier for p in problems] * 3
    hostile = [text for text in CANARY for _ in problems]
    assert score(hostile, answers, verifiers, timeout=20) == [0] * 12
    if task == "chain_sum":
        right = [f"so <answer>{json.loads(p.answer)['answer']}</answer>" for p in problems]
        assert score(right + right[1:] + right[:1], answers[:8], verifiers[:8], timeout=20)[:4] == [1] * 4
        truths = [json.loads(p.answer)["answer"] for p in problems]
        shifted = [float(a == b) for a, b in zip(truths[1:] + truths[:1], truths, strict=True)]
        assert score(right[1:] + right[:1], answers[:4], verifiers[:4], timeout=20) == shifted


def test_the_lock_pins_the_version_that_was_read():
    pins = [line for line in (ROOT / "requirements" / "gym.txt").read_text().splitlines() if not line.startswith("#")]
    assert "reasoning-gym==0.1.25" in pins and all("==" in line for line in pins)
