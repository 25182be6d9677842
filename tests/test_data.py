"""The arithmetic data set: right answers, right workings, no overlap, the same every time."""

import json
import random

import pytest
from transformers import AutoConfig, AutoTokenizer

from ce_gppo.messages import UserError
from data.arithmetic import prepare
from helpers import run_here


def test_workings_are_right_and_many():
    rng = random.Random(0)
    for _ in range(200):
        terms = prepare.problem(rng, 5, 9)
        text = prepare.working(rng, terms)
        *lines, box = text.split("\n")
        assert box == f"\\boxed{{{sum(terms)}}}" and len(lines) == 4
        for line in lines:
            left, right = line.split("=")
            first = left[0] + left[1:].replace("-", "+-").replace("++", "+")
            assert sum(int(x) for x in first.split("+") if x) == int(right)
    assert len({prepare.working(rng, [1, 2, 3, 4, 5]) for _ in range(2000)}) > 60


def test_splits_do_not_overlap_and_repeat_exactly():
    train, held_out = prepare.splits(0, terms=5, largest=9, train=500, held_out=100)
    assert len(train) == 500 and len(held_out) == 100
    assert not {prepare.show(t) for t in train} & {prepare.show(t) for t in held_out}
    assert (train, held_out) == prepare.splits(0, terms=5, largest=9, train=500, held_out=100)
    assert train != prepare.splits(1, terms=5, largest=9, train=500, held_out=100)[0]


def test_more_problems_than_there_are(tmp_path):
    with pytest.raises(UserError, match="there are no 20 distinct sums of 2 terms up to 2"):
        prepare.splits(0, terms=2, largest=2, train=15, held_out=5)
    refused = run_here("data/arithmetic/prepare.py", "--out", tmp_path, "--terms", "2", "--largest", "2")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not list(tmp_path.glob("*.jsonl"))


def test_the_saved_tokenizer_fits_the_model(tiny_folder, tokenizer):
    """AutoTokenizer reads the same ids from the folder, and none beyond the embedding."""
    loaded = AutoTokenizer.from_pretrained(tiny_folder)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len(loaded) == AutoConfig.from_pretrained(tiny_folder).vocab_size
    text = "<|user|>3+8-2=?<|end|><|assistant|>3+8=11\n11-2=9\n\\boxed{9}<|end|>"
    ids = loaded.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False) and loaded.decode(ids) == text


def test_command_writes_both_files(tmp_path):
    done = run_here("data/arithmetic/prepare.py", "--out", tmp_path, "--train", "50", "--held-out", "20")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 50 and len((tmp_path / "eval.jsonl").read_text().splitlines()) == 20
    for row in rows:
        expression = row["prompt"][0]["content"].removesuffix("=?")
        terms = expression.replace("-", "+-").split("+")
        assert sum(int(term) for term in terms) == int(row["answer"])


def test_sums_in_words(tmp_path):
    """Right answers, no held-out problem in training, and no problem among the worked examples."""
    done = run_here("data/words/prepare.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = {}
    for name in ("train", "eval"):
        rows[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    asked = [row["prompt"][-1]["content"] for row in rows["train"] + rows["eval"]]
    assert (len(rows["train"]), len(rows["eval"])) == (297, 100) and len(set(asked)) == 397
    shown = {message["content"] for row in rows["train"] for message in row["prompt"][:-1]}
    assert not shown & set(asked)
    (one,) = [row for row in rows["train"] + rows["eval"] if "seven plus nine?" in row["prompt"][-1]["content"]]
    assert one["answer"] == str(numbers.index("seven") + numbers.index("nine"))
