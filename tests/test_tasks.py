"""Data sets that are made here, countdown, gsm8k and words: from tasks and small files to scores; base policies."""

import itertools
import json
from fractions import Fraction
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from ce_gppo.config import parse
from ce_gppo.messages import UserError
from ce_gppo.problems import load_rows
from data import base
from data.countdown import prepare as countdown
from data.countdown import small
from data.gsm8k import prepare as gsm8k
from data.words import prepare as words
from helpers import refuses, score
from train import Config


def written(module, monkeypatch, out, *arguments) -> dict[str, list[dict]]:
    monkeypatch.setattr("sys.argv", ["prepare", "--out", str(out), *map(str, arguments)])
    module.main()
    return {name: load_rows(str(out / f"{name}.jsonl")) for name in ("train", "eval")}


def solutions(values: tuple[tuple[Fraction, str], ...]) -> dict[Fraction, str]:
    """Every value that can be reached from all of these, with an expression for it."""
    if len(values) == 1:
        return {values[0][0]: values[0][1]}
    found = {}
    for (a, x), (b, y) in itertools.permutations(values, 2):
        rest = list(values)
        rest.remove((a, x))
        rest.remove((b, y))
        results = [(a + b, f"({x} + {y})"), (a - b, f"({x} - {y})"), (a * b, f"({x} * {y})")]
        results += [(a / b, f"({x} / {y})")] if b else []
        for result in results:
            found |= solutions((*rest, result))
    return found


def test_countdown_tasks_can_be_solved_and_their_solutions_score(tmp_path, monkeypatch):
    """By brute force over all expressions, of every task with three numbers and some with four."""
    rows = written(countdown, monkeypatch, tmp_path, "--train", 60, "--held-out", 20)
    assert (len(rows["train"]), len(rows["eval"])) == (60, 20)
    tasks = [json.loads(row["answer"]) for row in rows["train"] + rows["eval"]]
    assert {len(task["numbers"]) for task in tasks} == {3, 4}
    assert len({(tuple(sorted(task["numbers"])), task["target"]) for task in tasks}) == 80, "a task is there twice"
    for row, task in [*zip(rows["train"], tasks, strict=False)][:12]:
        reached = solutions(tuple((Fraction(n), str(n)) for n in task["numbers"]))
        assert 10 <= task["target"] <= 100 and all(1 <= n <= 99 for n in task["numbers"])
        right, wrong = reached[task["target"]], reached[next(v for v in reached if v != task["target"])]
        texts = [f"<answer>{text}</answer>" for text in (right, wrong)]
        assert score(texts, [row["answer"]] * 2, ["countdown"] * 2) == [1, 0]
        asked = row["prompt"][-1]["content"]
        assert f"numbers {task['numbers']}, create an equation that equals {task['target']}." in asked
    first = (tmp_path / "train.jsonl").read_bytes()
    written(countdown, monkeypatch, tmp_path, "--train", 60, "--held-out", 20)
    assert (tmp_path / "train.jsonl").read_bytes() == first
    assert written(countdown, monkeypatch, tmp_path, "--train", 60, "--held-out", 20, "--seed", 1) != rows


def test_workings_of_the_small_countdown():
    """Every one is right in each line."""
    for numbers in [(1, 1, 2), (5, 7, 9), (2, 8, 9)]:
        ways = small.workings(numbers)
        assert len({response for response, _ in ways}) == len(ways) > 20
        for response, value in ways:
            first, second, last = response.split("\n")
            for line in (first, second):
                left, right = line.split("=")
                assert eval(left) == int(right) <= 81
            assert eval(last.removeprefix("<answer>").removesuffix("</answer>")) == value == int(second.split("=")[1])
            assert score([response], [countdown.answer(numbers, value)], ["countdown"]) == [1]
        assert score([ways[0][0]], [countdown.answer(numbers, ways[0][1] + 1)], ["countdown"]) == [0]
    assert {value for _, value in small.workings((5, 7, 9))} >= {21, 44, 26, 80, 68, 38, 58, 28, 18}


@pytest.mark.parametrize("task", base.TASKS)
def test_a_base_policy_is_made(tmp_path, monkeypatch, capsys, task):
    """In few steps here. Prompts and traces fit into the lengths of the recipe; held-out problems are not imitated."""
    monkeypatch.setattr(base, "SAMPLES", 1)
    monkeypatch.setattr("sys.argv", ["base", task, "--out", str(tmp_path), "--held-out", "8", "--excess", "40"])
    base.main()
    assert "1.0" in capsys.readouterr().out
    tokenizer, recipe, rng = AutoTokenizer.from_pretrained(tmp_path), parse(Config, ["--recipe", task])[0], Random(0)
    problems, held_out = base.TASKS[task].splits(0, 8)
    assert len(held_out) == 8 and not set(problems) & set(held_out)
    for problem in problems[:500]:
        prompt = base.prompt_ids(tokenizer, base.TASKS[task].row(*problem)["prompt"])
        text = "".join(text for text, _ in base.TASKS[task].trace(rng, *problem))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and len(ids) < base.TASKS[task].MAX_TOKENS <= recipe.max_response_tokens
        assert len(prompt) <= recipe.max_prompt_tokens


def test_the_tasks_of_the_small_countdown(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["small", "--out", str(tmp_path), "--held-out", "8"])
    small.main()
    rows = {name: load_rows(str(tmp_path / f"small-{name}.jsonl")) for name in ("train", "eval")}
    tasks = [json.loads(row["answer"]) for row in rows["train"] + rows["eval"]]
    assert len(rows["eval"]) == 8 and len({json.dumps(task) for task in tasks}) == len(tasks) > 1000
    assert all(task["target"] in {value for _, value in small.workings(tuple(task["numbers"]))} for task in tasks)


def test_countdown_from_the_hubs_file(tmp_path, monkeypatch):
    raw = [{"target": 98, "nums": [44, 19, 35]}, {"target": 64, "nums": [63, 95, 96]}]
    raw += [{"target": 98, "nums": [19, 35, 44]}]  # the first one again
    raw += [{"target": 50 + i, "nums": [i, 50, 7, 7]} for i in range(1, 7)]
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "tasks.parquet")
    arguments = ["--file", tmp_path / "tasks.parquet", "--train", 5, "--held-out", 2]
    rows = written(countdown, monkeypatch, tmp_path, *arguments, "--no-system")
    tasks = [json.loads(row["answer"]) for row in rows["train"] + rows["eval"]]
    kept = raw[:2] + raw[3:8]  # in the file's order, without the repeated one
    assert tasks == [{"numbers": task["nums"], "target": task["target"]} for task in kept]
    assert [message["role"] for message in rows["train"][0]["prompt"]] == ["user"]
    with pytest.raises(UserError, match="8 distinct tasks are too few for 8 held-out ones"):
        written(countdown, monkeypatch, tmp_path, *arguments[:2], "--held-out", 8)


@pytest.mark.parametrize(
    "row", [{"nums": [1, 2]}, {"target": 3}, {"nums": ["1"], "target": 3}, {"nums": [], "target": 3}, 7]
)
def test_rows_that_are_no_tasks(row):
    with pytest.raises(UserError, match="here, row 2: whole numbers under 'nums' and 'target' are needed"):
        list(countdown.read([{"nums": [1, 2], "target": 3}, row], "here"))


def test_gsm8k_from_local_files(tmp_path, monkeypatch):
    sums = {f"{i} and {i}?": f"{i}+{i} = <<{i}+{i}={2 * i}>>\n#### {2 * i}" for i in range(5)}
    raw = {"train": [{"question": question, "answer": answer} for question, answer in sums.items()]}
    raw["test"] = [{"question": "Half of 2468?", "answer": "so\n#### 1,234"}]
    for name, rows in raw.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    files = ["--train", tmp_path / "train.parquet", "--test", tmp_path / "test.parquet"]
    rows = written(gsm8k, monkeypatch, tmp_path, *files)
    assert [row["answer"] for row in rows["train"]] == ["0", "2", "4", "6", "8"]
    (held_out,) = rows["eval"]
    assert held_out["prompt"][0]["content"].startswith("Half of 2468? Let's think step by step")
    texts = ["#### 1234", "#### 1,234.00", "#### 1235", "1234"]
    assert score(texts, [held_out["answer"]] * 4, [held_out["source"]] * 4) == [1, 1, 0, 0]
    refuses("--train and --test go together", written, gsm8k, monkeypatch, tmp_path, *files[:2])
    refuses("1 rows have no answer", gsm8k.rows_of, [*raw["test"], {"question": "?"}], "here")


def test_sums_in_words(tmp_path, monkeypatch):
    """Right answers, no held-out problem in training, and no problem among the worked examples."""
    rows = written(words, monkeypatch, tmp_path)
    asked = [row["prompt"][-1]["content"] for row in rows["train"] + rows["eval"]]
    assert (len(rows["train"]), len(rows["eval"])) == (297, 100) and len(set(asked)) == 397
    shown = {message["content"] for row in rows["train"] for message in row["prompt"][:-1]}
    assert not shown & set(asked)
    (one,) = [row for row in rows["train"] + rows["eval"] if "seven plus nine?" in row["prompt"][-1]["content"]]
    assert one["answer"] == "16"
