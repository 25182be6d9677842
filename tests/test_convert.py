r"""Small files in the hub's schemas become the project's rows. No network."""

import hashlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ce_gppo.problems import load_rows
from data import convert
from helpers import refuses, run_here

BRIEF = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1=?"}]
AIME = r"Let $x$ be real. Find $\dfrac{x}{2}$, if $x = 3.5$."


def verl(problem, answer):
    row = {"data_source": "math_longcot_math_verify", "prompt": [{"content": problem, "role": "user"}]}
    return row | {"reward_model": {"ground_truth": answer, "style": "rule"}, "__index_level_0__": 7.0}


BENCHMARKS, MATH = "data/benchmarks/prepare.py", "data/math/prepare.py"


def converted(*raw):
    return convert.convert(raw, "here", "mine")


@pytest.mark.parametrize(
    "raw, problem, answer",
    [
        (verl("1+1=?", "2"), "1+1=?", "2"),
        ({"problem": " 1+1=? ", "answer": " 2 "}, "1+1=?", "2"),
        ({"problem": "1+1=?", "answer": 2}, "1+1=?", "2"),
        ({"id": 0, "problem": "1+1=?", "solution": r"so \boxed{3}", "answer": "2", "year": "2024"}, "1+1=?", "2"),
        ({"question": "Half of 2468?", "answer": "2468/2 = <<2468/2=1234>>1234\n#### 1,234"}, "Half of 2468?", "1,234"),
        ({"problem": "1+1=?", "level": "Level 1", "type": "Algebra", "solution": r"\boxed{1}, \boxed{\frac{4}{2}}"},
         "1+1=?", r"\frac{4}{2}"),
        ({"question": "Roots?", "final_answer": ["$1$", "$2$"], "answer": None}, "Roots?", "$1$, $2$"),
        ({"prompt": BRIEF, "answer": "2"}, BRIEF, "2"),
        ({"prompt": "1+1=?", "solution": "two", "reward_model": {"ground_truth": "2"}}, "1+1=?", "2"),
    ],
)  # fmt: skip
def test_schemas(raw, problem, answer):
    rows, repeated, unanswered = converted(raw)
    messages = problem if isinstance(problem, list) else [{"role": "user", "content": problem}]
    assert rows == [{"prompt": messages, "answer": answer, "source": "mine"}] and repeated == unanswered == 0


def test_the_text_around_a_problem_of_dapo_is_removed():
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is\n\n$1+1$?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    assert converted(verl(wrapped, "2"))[0][0]["prompt"][0]["content"] == "What is\n\n$1+1$?"
    half = wrapped.partition("Remember")[0].strip()
    assert converted(verl(half, "2"))[0][0]["prompt"][0]["content"] == half


def test_repeated_problems_and_those_without_an_answer_are_counted():
    raw = [verl(str(i % 3), str(i)) for i in range(12)] + [{"problem": "5", "solution": r"\boxed{}"}, {"problem": "6"}]
    rows, repeated, unanswered = converted(*raw)
    assert [(row["prompt"][0]["content"], row["answer"]) for row in rows] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert (repeated, unanswered) == (9, 2)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"text": "1+1=?", "answer": "2"}, r"row 1: no problem found; .* \(its keys: text, answer\)"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "row 1: no problem found"),
        ({"prompt": [3], "answer": "2"}, "row 1: no problem found"),
        ("1+1=?", "row 1: a str, where an object"),
        ({"problem": "1+1=?"}, "no row with an answer"),
    ],
)
def test_rows_that_cannot_be_read(raw, message):
    refuses(f"here.*{message}", converted, raw)


def test_file_formats(tmp_path):
    raw = [verl("1+1=?", "2"), verl("2+2=?", "4")]
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps(raw, indent=1))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, raw)) + "\n")  # as the authors' benchmarks/*.json
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, raw)) + "\n\n")
    for path in sorted(tmp_path.iterdir()):
        assert list(convert.read_file(str(path))) == raw, path.name


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"problem,answer", "must end in .parquet, .json or .jsonl"),
        ("a.jsonl", b'{"problem": "1"}\n{"pro', "a.jsonl, line 2: not JSON"),
        ("a.parquet", b"PAR2", "a.parquet: not a readable parquet file"),
        ("missing.json", None, "missing.json: no such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refuses(message, list, convert.read_file(str(tmp_path / name)))


def test_training_problems_that_a_benchmark_has_are_dropped_and_counted(tmp_path):
    """The same problem in another spelling goes, problems that differ in a digit, a sign or a point stay."""
    (tmp_path / "aime.json").write_text(json.dumps(verl(AIME, "1.75")))
    made = run_here(BENCHMARKS, "aime24", "--file", tmp_path / "aime.json", "--out", tmp_path / "benchmarks")
    assert made.returncode == 0
    same = [AIME, AIME.upper().replace("DFRAC", "frac") + "\n"]
    same += [r"let \(x\) be real; find \[\frac{x}{2}\,\] if   $x=3.5$"]
    other = [AIME.replace("3.5", "35"), AIME.replace("= 3", "= -3"), AIME.replace("2", "3"), "1+1=?", "1-1=?"]
    raw = [{"problem": problem, "answer": "1"} for problem in [*same, *other]]
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "mine.parquet")
    arguments = ["mine", "--file", tmp_path / "mine.parquet", "--out", tmp_path]
    arguments += ["--benchmarks", tmp_path / "benchmarks"]
    done = run_here(MATH, *arguments)
    assert done.returncode == 0, done.stderr
    assert "mine: 3 dropped because a benchmark has them (aime24 3)" in done.stdout
    rows = load_rows(str(tmp_path / "mine.jsonl"))
    assert [row["prompt"][0]["content"] for row in rows] == other and {row["source"] for row in rows} == {"mine"}
    assert hashlib.sha256((tmp_path / "mine.jsonl").read_bytes()).hexdigest() in done.stdout
    assert run_here(MATH, *arguments).stdout == done.stdout


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (MATH, ["gsm9k", "--unchecked"], "'gsm9k' is unknown; known: klear, dapo, gsm8k, math"),
        (BENCHMARKS, ["aime23"], "'aime23' is unknown; known: aime24"),
        (BENCHMARKS, ["aime24", "aime25", "--file", "a.json"], "give exactly one name"),
        (MATH, ["gsm8k", "--benchmarks", "nowhere"], "nowhere has no benchmarks .* -m data.benchmarks.prepare"),
        (BENCHMARKS, ["aime24"], "HuggingFaceH4/aime_2024 at 2fe88a2.* cannot be read .*--file.*HF_ENDPOINT"),
        (BENCHMARKS, ["aime24", "--revision", "main"], "at main cannot be read from the hub"),
    ],
)
def test_mistakes_and_a_hub_out_of_reach(tmp_path, monkeypatch, script, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    done = run_here(script, *arguments, "--out", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_hub_is_read_at_the_pinned_commit(tmp_path, monkeypatch):
    """Every configuration, the split and the commit of the table reach `datasets`; the rows come back converted."""
    import datasets

    calls = []

    def load_dataset(hub, config, *, split, revision):
        calls.append((hub, config, split, revision))
        return datasets.Dataset.from_list([{"question": f"{config}?", "answer": "so\n#### 7"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = convert.Source("some/set", "0123456789" * 4, "test", 2, ("a", "b"))
    args = convert.arguments("", {"set": source}, ["set"], tmp_path).parse_args([])
    rows = convert.prepare("set", {"set": source}, args)
    assert calls == [("some/set", "a", "test", source.revision), ("some/set", "b", "test", source.revision)]
    found = [(row["prompt"][0]["content"], row["answer"], row["source"]) for row in rows]
    assert found == [("a?", "7", "set"), ("b?", "7", "set")]
