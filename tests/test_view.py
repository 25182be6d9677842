"""The effect of an update on single tokens: recorded, written, and shown on a page that no token can break out of."""

import html.parser
import itertools
import json

import pytest
import torch

import train
from ce_gppo import metrics, tracking
from ce_gppo.policy import Policy
from helpers import refuses, resolved, rollout_of
from loss import Objective
from tools import view

SCRIPT = ["</script><script>alert(1)</script>", "</script x", "<!--<script ", "<script>", "]]>", "&lt;"]
HOSTILE = [*SCRIPT, '"', "\\", "\u2028", "\x00", "\n", "", "é"]


def updated(model, rollout, max_tokens: int) -> metrics.Update:
    """The record of an update on these responses, which changes no weight."""
    config = resolved(max_micro_batch_tokens=max_tokens)
    optimizer = torch.optim.SGD(model.parameters())
    return train.update(Policy(model), optimizer, rollout, Objective(), 0.0, config, "cpu", follows=True)[1]


@pytest.mark.parametrize("max_tokens", [200, 50])  # one micro-batch, two
def test_tokens_add_up_to_the_metrics(tiny_model, max_tokens):
    """A mini-batch of one right and one wrong response: all its tokens are recorded."""
    update = updated(tiny_model, rollout_of([(5, 40), (7, 30)]), max_tokens)
    whole, columns = metrics.update_metrics([[update]])[0], [each["columns"] for each in update.followed]
    values = {name: torch.cat([column[name] for column in columns]).double() for name in columns[0]}
    assert values["velocity"].mean().item() == pytest.approx(whole["velocity/total"], rel=1e-4)
    assert values["ratio"].mean().item() == pytest.approx(whole["ratio/mean"], rel=1e-5)
    for name, side in (("low", -1), ("high", 1)):
        members = values["clipped"] == side
        assert members.double().mean().item() == pytest.approx(whole[f"clip/{name}"]) and members.sum() > 0
        velocity = values["velocity"][members].sum() / len(members)
        assert velocity.item() == pytest.approx(whole[f"velocity/clipped_{name}"], rel=1e-4)
        share = values["weight"][members].abs().sum() / values["weight"].abs().sum()
        assert share.item() == pytest.approx(whole[f"weight/{name}"], rel=1e-4)
    assert values["advantage"].unique().tolist() == [-2, 1]


def test_texts_of_tokens_are_the_text(tokenizer):
    """Characters of several tokens, special ones, and ids beyond the vocabulary."""
    text = "-3 + 4\n= é∑🙂 \\boxed{1}<|end|>"
    ids = tokenizer.encode(text)
    texts = tracking.token_texts(tokenizer, [*ids, len(tokenizer) + 7])
    assert len(texts) == len(ids) + 1 and "".join(texts) == text
    assert {"\\boxed{", "<|end|>", "é", "∑", "🙂"} <= set(texts) and len(ids) > len(text.replace("<|end|>", "")) - 6


@pytest.mark.slow
def test_a_finished_run_can_be_viewed(finished, tmp_path):
    view.main(view.Config(finished[0], out=tmp_path / "page.html"))
    rows = [row for step in read_page(tmp_path / "page.html")["steps"] for row in step["rows"]]
    assert len(rows) >= 6 and {row["correct"] for row in rows} == {True, False}
    assert {row["step"] for row in rows} == {1, 2, 4}, "the first step, and those with an evaluation"
    samples = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert all("".join(row["tokens"]).endswith("<|end|>") or row["length"] == 16 for row in rows)
    assert {row["prompt"][:8] for row in rows} == {sample["prompt"][:8] for sample in samples}
    first = [row for row in rows if row["update"] == 1]
    assert all(abs(ratio - 1) < 1e-4 for row in first for ratio in row["ratio"]), "the first update is at ratio 1"


# ----------------------------------------------------------------------------------------------------------------------
# The page


def row_of(texts: list[str], step: int, update: int = 1) -> dict:
    g = torch.Generator().manual_seed(step)
    values = {name: torch.randn(len(texts), generator=g).tolist() for name in view.VALUES}
    values["clipped"] = [-1, 0, 1, *[0] * (len(texts) - 3)]
    row = {"step": step, "update": update, "updates": 8, "prompt": "</script>?", "answer": "<b>4</b>", "correct": True}
    return row | {"reward": 1.0, "length": len(texts), "tokens": texts} | values


def write_run(folder, rows: list[dict]):
    folder.mkdir(exist_ok=True)
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of its scripts, as a browser's parser finds them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.comments = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_comment(self, data):
        self.comments += 1

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        if tag == "script":
            self.elements.append(("/script", {}))


def read_page(path) -> dict:
    """The data of a page that has two scripts, the data and the program, and that loads nothing."""
    page = Page()
    page.feed(path.read_text())
    page.close()
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert [s.get("type") for s in scripts] == ["application/json", None] and page.comments == 0
    assert not [a for _, a in page.elements if {"src", "href", "srcset", "data", "action"} & a.keys()]
    assert page.scripts[1] and page.scripts[1] in view.TEMPLATE.read_text()
    assert not set("<>&") & set(page.scripts[0])
    return json.loads(page.scripts[0])


def test_a_page_has_every_token_and_number_and_no_token_breaks_out(tmp_path, capsys):
    rows = [row_of(HOSTILE, 1), row_of(HOSTILE[::-1], 1, update=8), row_of(["4", "2", "."], 2)]
    run = write_run(tmp_path / "run", rows)
    view.main(view.Config(run))
    found = read_page(run / "tokens.html")
    assert found == {"run": "run", "steps": [{"step": 1, "rows": rows[:2]}, {"step": 2, "rows": rows[2:]}]}
    text = (run / "tokens.html").read_text()
    assert "alert(1)</script>" not in text and "http" not in text.replace("http-equiv", "")
    assert "innerHTML" not in text and "2 steps" in capsys.readouterr().out


def test_a_page_is_bounded_and_keeps_the_first_and_the_last_step(tmp_path):
    steps = view.load(write_run(tmp_path, [row_of(["a"] * 10, step) for step in range(10, 10001, 10)]))
    chosen = view.choose(steps, ())
    assert len(steps) == 1000 and len(chosen) == 20 and chosen[0] == 10 and chosen[-1] == 10000
    assert {b - a for a, b in itertools.pairwise(chosen)} <= {520, 530}
    assert view.choose(steps, (50, 20)) == [20, 50]
    long = {step: [row_of(["a"] * 5000, step)] for step in range(1, 41)}
    chosen = view.choose(long, ())
    assert len(chosen) == 12 and len(view.page(tmp_path, {step: long[step] for step in chosen})) < 1e7
    assert view.choose({step: [row_of(["a"] * 50_000, step)] for step in (1, 2)}, ()) == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no tokens.jsonl there"),
        ("", "empty, as no step of this run had an update"),
        ('{"step": 1}\n', "tokens.jsonl:1: not a row"),
        (json.dumps(row_of(["a", "b", "c"], 1) | {"ratio": [1.0]}), "tokens.jsonl:1: not a row"),
        (json.dumps(row_of(["a", "b", "c"], 7) | {"step": "7"}), "tokens.jsonl:1: not a row"),
        (json.dumps(row_of(["a", "b", "c"], 7) | {"entropy": ["x"] * 3}), "tokens.jsonl:1: not a row"),
        (json.dumps(row_of(["a", "b", "c"], 7) | {"tokens": "abc"}), "tokens.jsonl:1: not a row"),
        ("\ufffd\n", "tokens.jsonl:1: not a row"),
        (json.dumps(row_of(["a", "b", "c"], 7)) + '\n{"st', "--steps 8: tokens were kept in the steps 7 only"),
    ],
)
def test_runs_without_tokens_get_a_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "tokens.jsonl").write_text(text)
    refuses(message, view.main, view.Config(tmp_path, steps=(8,)))
