"""The table of an evaluation, its file, and that a stopped evaluation ends with the same file."""

import dataclasses
import fcntl
import json
import random
import re
from pathlib import Path

import pytest
import torch

from ce_gppo import evaluation
from ce_gppo.batch import Rollout
from ce_gppo.problems import Problem
from ce_gppo.ranges import check_ranges
from helpers import BASE, refuses, resolved, rollout_of, score
from tools import evaluate, tables


def problem(question: str, answer: str, source: str) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "answer": answer, "source": source}


def row(answer: str | None, truth: str = "4", number: int = 0, sample: int = 0, source: str = "test") -> dict:
    """A row of a result file; `answer` is what its response boxes."""
    correct = answer is not None and score([rf"\boxed{{{answer}}}"], [truth]) == [1.0]
    where = {"problem": number, "sample": sample, "source": source, "question": f"{source} {number}?"}
    verdict = {"answer": truth, "extracted": answer, "correct": correct}
    return where | verdict | {"tokens": 10 + sample, "truncated": sample == 1, "response": ""}


def says(prompts: list[list[int]], texts: list[str], cut: int = 0) -> Rollout:
    """The texts as responses, equally many to each prompt; the first `cut` of them are truncated."""
    B, prompt_of = len(texts), torch.arange(len(prompts)).repeat_interleave(len(texts) // len(prompts))
    columns = {"prompts": prompts, "prompt_of": prompt_of, "texts": texts, "truncated": torch.arange(B) < cut}
    return dataclasses.replace(rollout_of([(1, 2)] * B), **columns)


SAYS = {None: "hm</think> no box", "open": r"so far \boxed{4}"}


class FakeEngine:
    """Boxes 1, 2, 3 or 4, or nothing, or 4 before </think>. The seed and the place in the call decide."""

    calls_left = 1000
    seen: list[str] = []

    def __init__(self, model, tokenizer, **options):
        self.tokenizer = tokenizer

    def generate(self, prompts, k, *, max_tokens, temperature, top_p, seed):
        FakeEngine.calls_left -= 1
        if FakeEngine.calls_left < 0:
            raise KeyboardInterrupt
        FakeEngine.seen += [self.tokenizer.decode(ids) for ids in prompts]
        rng = random.Random(seed)
        boxes = [rng.choice(["1", "2", "3", "4", None, "open"]) for _ in range(k * len(prompts))]
        return says(prompts, [SAYS.get(box, rf"hm</think>\boxed{{{box}}}") for box in boxes])


@pytest.fixture
def fake(monkeypatch, tmp_path, tiny_folder):
    """evaluate.main with a fake engine, in a folder of its own with two benchmarks: fake(**settings)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "calls_left", 1000)
    monkeypatch.setattr(FakeEngine, "seen", [])
    for name, count in (("aime24", 5), ("amc23", 6)):
        path = Path("data/benchmarks") / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(problem(f"{name} {i}?", "4", name)) + "\n" for i in range(count)))

    def run(**settings):
        settings = {"model": str(tiny_folder), "bench": "aime24,amc23", "k": 4, "write_every": 8} | settings
        evaluate.main(evaluate.Config(**settings))

    return run


def rows_in(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()[1:]]


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers, truth, right",
    [
        (["4", "4", "3"], "4", True),
        (["3", "4"], "4", False),  # a tie: first seen
        ([None, None, None, "4"], "4", True),  # responses without a box do not vote
        ([None, None], "4", False),
        (["3", "6/2", "4", "4", "3.0"], "4", False),  # three spellings of 3, three votes for 3
        (["4", "8/2", "3", "3", "12/3"], "4", True),
        ([r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}", "1"], "1", False),  # only math-verify finds them equal
        (["(1,2)", "(2,1)", "(1,2)", r"\{1,2\}"], r"\{1,2\}", False),
    ],
)
def test_majority(answers, truth, right):
    assert tables.majority([row(answer, truth) for answer in answers]) is right


def test_bootstrap():
    """Close to the normal interval for many values; the same every time."""
    values = [1.0] * 120 + [0.0] * 280
    low, high = tables.bootstrap(values)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.004) and high == pytest.approx(0.3 + half, abs=0.004)
    assert tables.bootstrap(values) == (low, high)
    assert tables.bootstrap([0.25] * 7) == (0.25, 0.25)


def test_a_run_s_checkpoint_is_evaluated_as_the_run_does(tmp_path):
    """What is given on the command line counts, also a temperature of 0; any other folder gets the usual values."""
    saved = resolved(
        eval_samples=3, eval_temperature=1.0, eval_response_tokens=12, prompt_suffix="Box it.", thinking=True
    )
    (tmp_path / "config.json").write_text(json.dumps({"config": vars(saved)}))
    found = evaluate.complete(evaluate.Config(str(tmp_path / "checkpoint-000020"), temperature=0.0, top_p=0.9))
    assert (found.k, found.temperature, found.top_p, found.max_response_tokens) == (3, 0, 0.9, 12)
    assert (found.bench, found.prompt_suffix, found.thinking) == (saved.eval_data, "Box it.", True)
    usual = evaluate.complete(evaluate.Config(str(tmp_path / "copy")))
    assert (usual.k, usual.temperature, usual.top_p, usual.prompt_suffix, usual.thinking) == (8, 0.6, 0.95, "", False)


def test_the_table(capsys):
    samples = {0: ["4", "4", "3"], 1: ["3", "3", "4"], 2: [None, "5", "6"], 3: ["4", "4", "4"]}
    rows = [row(answer, number=n, sample=s) for n, answers in samples.items() for s, answer in enumerate(answers)]
    rows += [row("4", number=4, source="other")]
    tables.print_table(rows, 3)
    header, test, other, average = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "benchmark",
        "problems",
        "avg@3",
        "95",
        "%",
        "interval",
        "pass@3",
        "majority@3",
        "tokens",
        "truncated",
    ]
    low, high = tables.bootstrap([2 / 3, 1 / 3, 0, 1])
    assert test.split() == f"test 4 0.5000 {low:.4f} - {high:.4f} 0.7500 0.5000 11.0 0.3333".split()
    assert other.split()[:3] == ["other", "1", "1.0000"] and average.split() == ["average", "0.7500"]


# ----------------------------------------------------------------------------------------------------------------------


def test_every_response_is_written_with_its_verdict(fake, capsys):
    fake(prompt_suffix="Box it.", system_prompt="Hm.")
    (path,) = Path("out/eval").iterdir()
    assert path.name.endswith(".aime24-amc23.k4-t0.6.jsonl")
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["settings"]["k"] == 4 and header["problems"] == 11
    assert [(r["problem"], r["sample"]) for r in rows] == [(i, j) for i in range(11) for j in range(4)]
    assert {r["source"] for r in rows} == {"aime24", "amc23"} and rows[0]["question"] == "aime24 0?"
    for r in rows:
        assert r["correct"] is (r["extracted"] == "4") and (r["extracted"] or "no box") in r["response"]
    assert FakeEngine.seen[5] == "<|system|>Hm.<|end|><|user|>amc23 0?\nBox it.<|end|><|assistant|>"
    printed = capsys.readouterr().out
    rates = []
    for source, samples in (("aime24", 20), ("amc23", 24)):
        rates.append(sum(r["correct"] for r in rows if r["source"] == source) / samples)
        assert re.search(rf"{source} .* {rates[-1]:.4f} ", printed)
    assert re.search(rf"average +{sum(rates) / 2:.4f}\n", printed)


@pytest.mark.parametrize("calls, half_line", [(0, ""), (1, ""), (3, ""), (3, '{"problem": 6, "sam'), (5, '{"pro')])
def test_a_stopped_evaluation_continues_and_ends_with_the_same_file(fake, monkeypatch, calls, half_line, capsys):
    fake(out="whole.jsonl")
    table = capsys.readouterr().out.splitlines()[3:]
    monkeypatch.setattr(FakeEngine, "calls_left", calls)
    with pytest.raises(KeyboardInterrupt):
        fake(out="cut.jsonl")
    with open("cut.jsonl", "a") as file:
        file.write(half_line)
    monkeypatch.setattr(FakeEngine, "calls_left", 6 - calls)  # 6 chunks in all: only the missing ones are sampled
    fake(out="cut.jsonl")
    assert Path("cut.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(FakeEngine, "calls_left", 0)  # finished: only the table is printed
    fake(out="cut.jsonl")
    assert capsys.readouterr().out.splitlines()[3:] == table


def test_another_verifier_gives_other_verdicts_and_belongs_to_the_settings(fake, tmp_path):
    """A user's function, for one of two benchmarks. Its file must not change between two parts of an evaluation."""
    mine = tmp_path / "mine.py"
    mine.write_text("def score(response, answer): return {'correctness': float('3' in response), 'other': 7}")
    fake(rewards=f"amc23={mine}:score", out="own.jsonl")
    for r in rows_in("own.jsonl"):
        assert r["correct"] is (r["extracted"] == ("3" if r["source"] == "amc23" else "4"))
    mine.write_text(mine.read_text() + "\n")
    refuses("made with other settings .data: ", fake, rewards=f"amc23={mine}:score", out="own.jsonl")
    refuses("no problem has the source 'aime'; the data's: aime24, amc23", fake, rewards="aime=exact", out="own.jsonl")


def test_an_evaluation_that_another_rank_gave_up_has_no_metrics():
    """The signal may have reached only that rank, so `stop` may be False here."""

    class GivenUp:
        def generate(self, prompts, k, **options):
            return None

    assert evaluation.evaluate(GivenUp(), [], 2, score=evaluate.score, thinking=False) is None


def test_a_seed_is_another_sample_and_only_answers_after_thinking_count(fake):
    for name, settings in (("a", {}), ("b", {"seed": 1}), ("c", {"thinking": True})):
        fake(out=f"{name}.jsonl", **settings)
    first, second, thinking = (rows_in(f"{name}.jsonl") for name in "abc")
    texts, others = ([r["response"] for r in rows] for rows in (first, second))
    assert texts != others and texts[:8] != texts[8:16], "each chunk has its own seed"
    for r, without in zip(thinking, first, strict=True):
        assert without["correct"] is ("4" in r["response"]) and r["correct"] is ("</think>\\boxed{4}" in r["response"])
    assert 0 < sum(r["correct"] for r in thinking) < sum(r["correct"] for r in first)


def test_a_file_of_other_settings_is_not_touched(fake, tiny_model, tiny_folder, monkeypatch):
    fake(out="a.jsonl")
    before = Path("a.jsonl").read_bytes()
    for settings in ({"k": 2}, {"temperature": 1.0}, {"thinking": True}, {"bench": "aime24"}, {"prompt_suffix": "!"}):
        name = "data" if "bench" in settings else next(iter(settings))
        refuses(rf"a\.jsonl was made with other settings \(.*{name}.*--out", fake, out="a.jsonl", **settings)
    with torch.no_grad():
        tiny_model.model.norm.weight += 1
    tiny_model.save_pretrained(tiny_folder)
    refuses("weights", fake, out="a.jsonl")
    assert Path("a.jsonl").read_bytes() == before
    Path("notes.jsonl").write_text('{"mine": 1}\n')
    refuses(r"notes\.jsonl: not a result file", fake, out="notes.jsonl")
    assert Path("notes.jsonl").read_text() == '{"mine": 1}\n'


def test_benchmarks_that_are_not_there(fake):
    Path("data/benchmarks/prepare.py").touch()
    refuses(r"hmmt25\.jsonl: no such file; make it with .*data\.benchmarks\.prepare", fake, bench="aime24,hmmt25")
    refuses(r"mine\.jsonl: no such file", fake, bench="mine.jsonl")


def test_settings_out_of_range():
    for name in ("k", "temperature", "top_p", "max_response_tokens", "write_every"):
        value = 0.005 if name == "temperature" else 0
        refuses(f"{name} = {value}", check_ranges, evaluate.Config(**{name: value}))


def test_one_evaluation_writes_a_file_at_a_time(fake):
    fake(out="a.jsonl")
    with open("a.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses(r"a\.jsonl: another evaluation is writing it", fake, out="a.jsonl")
    fake(out="a.jsonl")


# ----------------------------------------------------------------------------------------------------------------------


def results(path: Path, answers: dict[int, list[str]], problems: int) -> str:
    rows = [row(answer, number=n, sample=s) for n, given in answers.items() for s, answer in enumerate(given)]
    lines = [{"settings": {}, "problems": problems}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_compare(tmp_path, capsys):
    first = results(tmp_path / "a.jsonl", {0: ["4", "3"], 1: ["3", "3"], 2: ["4", "4"], 3: ["4", "4"]}, 4)
    second = results(tmp_path / "b.jsonl", {0: ["4", "3"], 1: ["4", "4"], 2: ["3", "4"], 3: ["4", "4"]}, 4)
    evaluate.main(evaluate.Config(compare=(first, second)))
    header, test, *changed = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["gained", "lost"]
    low, high = tables.bootstrap([0, 1, -0.5, 0])
    assert test.split() == f"test 4 0.6250 0.7500 +0.1250 {low:+.4f} - {high:+.4f} 1 1".split()
    found = [" ".join(line.split()) for line in changed]
    assert found == ["test 0.000 -> 1.000 test 1?", "test 1.000 -> 0.500 test 2?"]


def test_files_that_cannot_be_compared(tmp_path):
    a = results(tmp_path / "a.jsonl", {0: ["4"], 1: ["3"]}, 2)
    b = results(tmp_path / "b.jsonl", {0: ["4"], 2: ["3"]}, 2)
    refuses("have different problems, 2 in only one of them, such as 'test 1", tables.compare, a, b)
    unfinished = results(tmp_path / "c.jsonl", {0: ["4"]}, 2)
    refuses(r"c\.jsonl: not finished", tables.compare, a, unfinished)
    refuses(r"d\.jsonl: no such file", tables.compare, a, str(tmp_path / "d.jsonl"))


@pytest.mark.slow
def test_with_vllm_a_stopped_evaluation_ends_with_the_same_responses(tmp_path, write_rows, capsys):
    pairs = [(1, 5), (17, 30), (40, 3), (59, 0), (2, 51)]
    rows = [problem(f"start ={start}\ntarget ={target}\n", f"{start} to {target}", "walk") for start, target in pairs]
    bench = write_rows(*rows)
    path = tmp_path / "responses.jsonl"
    config = evaluate.Config(model=BASE, bench=bench, k=4, max_response_tokens=16, write_every=8, out=str(path))
    evaluate.main(config)
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()[1:]]
    assert len(rows) == 20 and len({r["response"] for r in rows}) > 5, "more than one response to some problem"
    path.write_bytes(whole[: whole.index(b'"problem": 3') + 40])  # killed in the second chunk of three
    evaluate.main(config)
    assert path.read_bytes() == whole and "2 problems were there already" in capsys.readouterr().out


def test_many_cut_or_unboxed_responses_in_the_first_evaluation_are_a_warning(capsys):
    def warn(cut: int, text: str, verifier: str) -> None:
        evaluation.warn(says([[1]] * 20, [text] * 20, cut), [verifier] * 20)

    warn(18, "\\boxed{1}", "math")
    warn(18, "1", "countdown")
    assert not capsys.readouterr().err
    warn(19, "1", "math")
    warned = capsys.readouterr().err
    assert "95% of the first evaluation's responses are cut" in warned
    assert "100%" in warned and "prompt_suffix" in warned


def test_accuracies_are_by_source():
    """Two problems of one source with two samples each, and one of another, which is no puzzle."""
    problems = [Problem("", [], "", source, verifier=name) for source, name in (("a", "walk"), ("b", "math"))]
    found = evaluation.accuracy([*problems, problems[0]], [(2, 1), (0, 0), (1, 1)], k=2)  # (right, of these different)
    walk = {"a/avg_at_k": 0.75, "a/pass_at_k": 1.0, "a/distinct_at_k": 1.0}
    assert found == walk | {"b/avg_at_k": 0.0, "b/pass_at_k": 0.0}
