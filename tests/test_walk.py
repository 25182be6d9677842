"""The task `walk`: its verifier against a naive one, hostile responses, its data, its base policy's tokenizer."""

import functools
import json
import math
import random
import statistics
from collections import Counter

import pytest
from transformers import AutoTokenizer

from ce_gppo.messages import UserError
from ce_gppo.verifier.puzzles import MOVES
from ce_gppo.verifier.puzzles import walk as score
from data.base import make_model, make_tokenizer
from data.walk import base, prepare
from helpers import run_here


def naive(response: str, start: int, target: int) -> bool:
    """Plays the game by Python's own arithmetic. Only for well-formed lines."""
    number, lines = start, response.splitlines()
    for line in lines:
        move, result = line.split(" =")
        if move not in {f"{sign}{n}" for sign in "+-" for n in range(1, 11)} | {"*2", "*3"}:
            return False
        number = eval(f"{number}{move}")
        if number != int(result) or number not in range(60):
            return False
    return number == target and 1 <= len(lines) <= 6


def test_the_verifier_agrees_with_python():
    """Traces, and traces with one change: a move, a result, a line more or less."""
    rng = random.Random(0)
    verdicts = Counter()
    for _ in range(4000):
        start, target = rng.sample(range(60), 2)
        lines = base.trace(rng, start, target)[0].splitlines()
        place = rng.randrange(len(lines))
        move, result = lines[place].split(" =")
        changed = {
            "nothing": [lines[place]],
            "move": [f"{rng.choice([*MOVES, '+0', '+11', '*1', '*4', '-11'])} ={result}"],
            "result": [f"{move} ={rng.randrange(70)}"],
            "without": [],
            "twice": [lines[place]] * 2,
        }
        kind = rng.choice(list(changed))
        response = "".join(f"{line}\n" for line in [*lines[:place], *changed[kind], *lines[place + 1 :]])
        verdict = score(response, f"{start} to {target}")
        assert verdict == naive(response, start, target), (response, start, target)
        verdicts[kind, verdict] += 1
    assert verdicts["nothing", 1.0] > 200 and verdicts["nothing", 0.0] > 200
    assert all(verdicts[kind, 0.0] > 200 for kind in ("move", "result", "without", "twice"))


def test_more_than_six_moves_are_too_many():
    moves = "".join(f"+10 ={number}\n" for number in (10, 20, 30, 40, 50))
    assert score(moves + "+1 =51\n", "0 to 51") == 1
    assert score(moves + "+1 =51\n+1 =52\n", "0 to 52") == 0


def test_passing_the_target_is_not_reaching_it():
    assert score("+7 =24\n+6 =30\n", "17 to 24") == 0


@pytest.mark.parametrize("response", ["+7 =24\n+6 =30\n", "+7 =24\n+6 =30", " \n+7 =24\n+6 =30\n\n", "+10 =27\n+3 =30"])
def test_right_responses(response):
    assert score(response, "17 to 30") == 1


@pytest.mark.parametrize(
    "response",
    [
        *("", "\n", "30", "=30", "+13 =30", "+7 =24\n+6", "+7 =24\n\n+6 =30", "+7 =24 +6 =30", "+7=24\n+6=30"),
        *(
            "I think:\n+7 =24\n+6 =30",
            "+7 =24\n+6 =30\nDone.",
            "+7 =24\r\n+6 =30",
            "+7 =24\v+6 =30",
            "+7 =24\x00\n+6 =30",
        ),
        *(
            "+07 =24\n+6 =30",
            "+7 =024\n+6 =30",
            "+7 =+24\n+6 =30",
            "+7  =24\n+6 =30",
            "+7 =24\n+6 =30.0",
            "+７ =24\n+6 =30",
        ),
        *(
            "+7 =２４\n+6 =30",
            "+٧ =24\n+6 =30",
            "-0 =17\n+13 =30",
            "*1 =17\n+10 =27\n+3 =30",
            "/1 =17\n+10 =27\n+3 =30",
        ),
        *(
            "**2 =289",
            "+__import__('os') =30",
            "+1e1 =27\n+3 =30",
            "*3 =51\n+10 =61\n-10 =51\n-10 =41\n-10 =31\n-1 =30",
        ),
        *("+7 =24\n" * 10**6, "9" * 10**7, "(" * 10**6, "\n" * 10**6, "\u2028", "\ud800", "+" + "9" * 5000 + " =30"),
    ],
    ids=lambda response: repr(response[:30]),
)
def test_hostile_responses_score_nothing(response):
    assert score(response, "17 to 30") == 0


@pytest.mark.parametrize(
    "answer", ["", "30", "17 to 60", "17 to -3", "17-30", "17 to 30 to 40", "017 to 30", "17 to ３0"]
)
def test_an_answer_of_another_form_is_the_users_mistake(answer):
    with pytest.raises(UserError, match="'<start> to <target>' is needed, each from 0 to 59"):
        score("+7 =24", answer)


def test_the_data(tmp_path):
    """All pairs once, none of them both in training and held out, the same every time; answers are the prompt's."""
    done = run_here("data/walk/prepare.py", "--held-out", "100", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    }
    assert len(rows["eval"]) == 100
    pairs = [tuple(map(int, row["answer"].split(" to "))) for row in rows["train"] + rows["eval"]]
    assert sorted(pairs) == [(a, b) for a in range(60) for b in range(60) if a != b]
    for (start, target), row in zip(pairs, rows["train"] + rows["eval"], strict=True):
        assert row["prompt"][0]["content"] == f"start ={start}\ntarget ={target}\n" and row["source"] == "walk"
    assert prepare.splits(0, 100) == prepare.splits(0, 100) != prepare.splits(1, 100)
    with pytest.raises(UserError, match="--held-out 3540: there are 3540 problems"):
        prepare.splits(0, 3540)


def test_the_cost_of_a_trace_is_minus_its_log_probability():
    """Their mean cost is the entropy of the walk, computed here from the probabilities of all moves."""

    @functools.cache
    def entropy(number: int, moves: int) -> float:
        if number == 30 or moves == 0:
            return 0.0
        legal = {move: eval(f"{number}{move}") for move in MOVES if eval(f"{number}{move}") in range(60)}
        nearer = [move for move, after in legal.items() if abs(after - 30) < abs(number - 30)]
        p = {move: 0.3 / len(legal) + 0.7 * (move in nearer) / len(nearer) for move in legal}
        return sum(q * (entropy(legal[move], moves - 1) - math.log(q)) for move, q in p.items())

    rng = random.Random(0)
    costs = [base.trace(rng, 17, 30)[1] for _ in range(5000)]
    assert statistics.mean(costs) == pytest.approx(entropy(17, 6), abs=4 * statistics.stdev(costs) / 5000**0.5)


def test_moves_and_numbers_are_one_token_each(tmp_path):
    """Also in the tokenizer that AutoTokenizer loads, which decodes the ids to the same text."""
    tokenizer = make_tokenizer(prepare.WORDS)
    make_model(tokenizer, hidden_size=32, num_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"<|user|>{prepare.prompt(17, 30)[0]['content']}<|end|><|assistant|>+10 =27\n-1 =26\n*2 =52\n+1 =53\n<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 1 + 4 + 1 + 1 + 8 + 1
    assert loaded.encode(text, add_special_tokens=False) == ids and loaded.decode(ids) == text
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for move in MOVES:
        assert len(tokenizer.encode(f"{move} =9\n", add_special_tokens=False)) == 2
