"""The effect of an update on single tokens: recorded, written, and shown on a page that no token can break out of."""

import html.parser
import itertools
import json

import pytest
import torch

import train
from ce_gppo import forward, report, tokens
from ce_gppo.forward import Policy
from ce_gppo.messages import UserError
from ce_gppo.statistics import sums_to_metrics
from ce_gppo.types import Problem, Response
from helpers import resolved, responses_of
from loss import Objective
from tools import view

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</script x",
    "<!--<script ",
    "<script>",
    "]]>",
    "&lt;",
    '"',
    "\\",
    "\u2028",
    "\x00",
    "\n",
    "",
    "é",
]


def updated(model, responses: list[Response], max_tokens: int) -> dict[str, float]:
    """The metrics of one mini-batch, whose responses then have `changes`."""
    batch_loss = train.loss_of(responses, Objective())
    _, sums, _ = forward.accumulate_gradients(Policy(model), responses, batch_loss, 1.0, max_tokens, "cpu")
    return sums_to_metrics(sums)


@pytest.mark.parametrize("max_tokens", [200, 50])  # one micro-batch, two
def test_tokens_add_up_to_the_metrics(tiny_model, max_tokens):
    """A mini-batch of one right and one wrong response: all its tokens are recorded."""
    responses = responses_of([(5, 40), (7, 30)])
    metrics = updated(tiny_model, responses, max_tokens)
    values = {name: torch.cat([r.changes[name] for r in responses]).double() for name in responses[0].changes}
    assert values["velocity"].mean().item() == pytest.approx(metrics["velocity/total"], rel=1e-4)
    assert values["ratio"].mean().item() == pytest.approx(metrics["ratio/mean"], rel=1e-5)
    for name, side in (("low", -1), ("high", 1)):
        members = values["clipped"] == side
        assert members.double().mean().item() == pytest.approx(metrics[f"clip/{name}"])
        assert values["velocity"][members].mean().item() * metrics[f"clip/{name}"] == pytest.approx(
            metrics[f"velocity/clipped_{name}"], rel=1e-4
        )
        share = values["weight"][members].abs().sum() / values["weight"].abs().sum()
        assert share.item() == pytest.approx(metrics[f"weight/{name}"], rel=1e-4)
    assert 0 < metrics["clip/low"] < 1 and 0 < metrics["clip/high"] < 1
    assert values["advantage"].unique().tolist() == [-2, 1]


def test_one_right_and_one_wrong_response_of_each_mini_batch_is_recorded(tiny_model):
    """In any micro-batch, each with its own numbers. The other responses have none."""
    responses = responses_of([(3, 4 + i) for i in range(6)])
    for i, response in enumerate(responses):
        response.verdict = float(i >= 2)
    updated(tiny_model, responses, max_tokens=16)
    assert [r.changes is not None for r in responses] == [True, False, True, False, False, False]
    for r in (responses[0], responses[2]):
        batch = forward.collate([r])
        logprobs, _, _ = Policy(tiny_model)(batch, 1.0)
        expected = (logprobs[0].detach() - r.old_logprobs).exp()
        torch.testing.assert_close(r.changes["ratio"], expected, rtol=1e-4, atol=0)


def test_a_row_has_the_entropy_of_the_update_if_none_was_computed_before(tiny_model, tokenizer):
    """As with old_logprobs = sampler, from the second update of a rollout on."""
    measured, unmeasured = responses_of([(5, 40)]), responses_of([(5, 40)])
    unmeasured[0].entropy = None
    for responses in (measured, unmeasured):
        updated(tiny_model, responses, 200)
    rows = [tokens.row(r[0], Problem("p", [1], "1", "test"), tokenizer) for r in (measured, unmeasured)]
    assert rows[0]["entropy"] == pytest.approx(measured[0].entropy.tolist(), rel=1e-4)
    policy = Policy(tiny_model)
    batch = forward.collate(unmeasured, "cpu")
    assert rows[1]["entropy"] == pytest.approx(policy(batch, 1.0)[1][0].tolist(), rel=1e-4)
    assert rows[0]["velocity"] == rows[1]["velocity"]


def test_texts_of_tokens_are_the_text(tokenizer):
    """Characters of several tokens, special ones, and ids beyond the vocabulary."""
    text = "-3 + 4\n= é∑🙂 \\boxed{1}<|end|>"
    ids = tokenizer.encode(text)
    texts = tokens.token_texts(tokenizer, [*ids, len(tokenizer) + 7])
    assert len(texts) == len(ids) + 1 and "".join(texts) == text
    assert {"\\boxed{", "<|end|>", "é", "∑", "🙂"} <= set(texts) and len(ids) > len(text.replace("<|end|>", "")) - 6


def test_rows_of_a_step(tokenizer):
    """From up to four updates, with the first and the last. Numbers are valid JSON. Long rows lose their middle."""
    groups, problems = [], []
    for p in range(12):
        response = Response([1], [65] * (2001 if p == 11 else 3), torch.zeros(1), False, "")
        R = len(response.response_ids)
        response.old_logprobs = -torch.rand(R)
        names = "entropy", "ratio", "clipped", "weight", "velocity"
        response.changes = {name: torch.arange(R).float() for name in names}
        response.changes["ratio"][0] = torch.nan
        response.parts = {"correctness": 0.0, "format": p / 8}
        groups.append([response, Response([1], [65], torch.zeros(1), False, "")])
        problems.append(Problem(f"prompt {p}", [1], str(p), "test"))
    mini_batches = [groups[p] for p in range(12)]
    rows = tokens.token_rows(groups, mini_batches, problems, tokenizer)
    assert [(row["update"], row["answer"]) for row in rows] == [(1, "0"), (5, "4"), (8, "7"), (12, "11")]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows and rows[0]["ratio"] == [None, 1, 2]
    assert [row["parts"]["format"] for row in rows] == [0, 0.5, 0.875, 1.375]
    long = rows[-1]
    assert long["length"] == 2001 and len(long["tokens"]) == 2000 and long["velocity"][999:1001] == [999, 1001]
    assert tokens.token_rows(groups, [], problems, tokenizer) == []


def test_a_report_keeps_tokens_at_the_first_step_and_at_evaluations(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    response = Response([1], [65, 66], torch.zeros(2), False, "ab", old_logprobs=torch.zeros(2), entropy=torch.ones(2))
    response.changes, response.advantages = {"ratio": torch.ones(2)}, torch.ones(2)
    log = report.Report(tmp_path, resolved(steps=7, eval_every=3), 0, "id", tokenizer)
    what = [[response]], [[response]], [Problem("p", [1], "1", "test")], lambda text, verifier: None
    for step in range(1, 8):
        log.log_step(step, {"entropy/mean": 0.5}, *what)
    again = report.Report(tmp_path, resolved(steps=7, eval_every=3), 5, "id", tokenizer)
    again.log_step(6, {"entropy/mean": 0.5}, *what)
    rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6], "a step that a resumed run repeats is there once"


@pytest.mark.slow
def test_a_finished_run_can_be_viewed(finished, tmp_path, capsys):
    view.main(view.Config(finished[0], out=tmp_path / "page.html"))
    rows = [row for step in read_page(tmp_path / "page.html")["steps"] for row in step["rows"]]
    assert len(rows) >= 6 and {row["right"] for row in rows} == {True, False}
    samples = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert all("".join(row["tokens"]).endswith("<|end|>") or row["length"] == 64 for row in rows)
    assert {row["prompt"][:8] for row in rows} == {sample["prompt"][:8] for sample in samples}
    first = [row for row in rows if row["update"] == 1]
    assert all(abs(ratio - 1) < 1e-4 for row in first for ratio in row["ratio"]), "the first update is at ratio 1"


# ----------------------------------------------------------------------------------------------------------------------
# The page


def row_of(texts: list[str], step: int, update: int = 1) -> dict:
    g = torch.Generator().manual_seed(step)
    values = {name: torch.randn(len(texts), generator=g).tolist() for name in view.VALUES}
    values["clipped"] = [-1, 0, 1, *[0] * (len(texts) - 3)]
    row = {"step": step, "update": update, "updates": 8, "prompt": "</script>?", "answer": "<b>4</b>", "right": True}
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
    assert (
        len(view.choose(long, ())) == 12 and len(view.page(tmp_path, {s: long[s] for s in view.choose(long, ())})) < 1e7
    )
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
        (json.dumps(row_of(["a", "b", "c"], 7)), "--steps 8: tokens were kept in the steps 7 only"),
    ],
)
def test_runs_without_tokens_get_a_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "tokens.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        view.main(view.Config(tmp_path, steps=(8,)))
