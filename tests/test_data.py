"""Generated data: right answers, no overlap, a tokenizer that fits its model."""

import json

from transformers import AutoConfig, AutoTokenizer

from helpers import run_here


def test_the_saved_tokenizer_fits_the_model(tiny_folder, tokenizer):
    """AutoTokenizer reads the same ids from the folder, and none beyond the embedding."""
    loaded = AutoTokenizer.from_pretrained(tiny_folder)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len(loaded) == AutoConfig.from_pretrained(tiny_folder).vocab_size
    text = "<|user|>3+8-2=?<|end|><|assistant|>3+8=11\n11-2=9\n\\boxed{9}<|end|>"
    ids = loaded.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False) and loaded.decode(ids) == text


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
