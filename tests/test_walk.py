"""The task `walk`: its verifier against a naive one, hostile responses, its data, and what its base policy imitates."""

import random
from collections import Counter, defaultdict

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from ce_gppo.problems import load_rows
from ce_gppo.verifier.puzzles import MOVES
from ce_gppo.verifier.puzzles import walk as score
from data import base
from data.walk import prepare
from helpers import refuses, run_here


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
        lines = "".join(text for text, _ in prepare.trace(rng, start, target)).splitlines()
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


def test_right_responses_have_up_to_six_moves_and_end_at_the_target():
    for response in ("+7 =24\n+6 =30\n", "+7 =24\n+6 =30", " \n+7 =24\n+6 =30\n\n", "+10 =27\n+3 =30"):
        assert score(response, "17 to 30") == 1
    assert score("+7 =24\n+6 =30\n", "17 to 24") == 0, "it passes the target"
    moves = "".join(f"+10 ={number}\n" for number in (10, 20, 30, 40, 50))
    assert score(moves + "+1 =51\n", "0 to 51") == 1 and score(moves + "+1 =51\n+1 =52\n", "0 to 52") == 0


HOSTILE = [
    *("", "\n", "30", "=30", "+13 =30", "+7 =24\n+6", "+7 =24\n\n+6 =30", "+7 =24 +6 =30", "+7=24\n+6=30"),
    *("I think:\n+7 =24\n+6 =30", "+7 =24\n+6 =30\nDone.", "+7 =24\r\n+6 =30", "+7 =24\v+6 =30", "+7 =24\x00\n+6 =30"),
    *("+07 =24\n+6 =30", "+7 =024\n+6 =30", "+7 =+24\n+6 =30", "+7  =24\n+6 =30", "+7 =24\n+6 =30.0"),
    *("+７ =24\n+6 =30", "+7 =２４\n+6 =30", "-0 =17\n+13 =30", "*1 =17\n+13 =30", "/1 =17\n+13 =30"),
    *("**2 =289", "+__import__('os') =30", "+1e1 =27\n+3 =30", "*3 =51\n+10 =61\n-10 =51\n-10 =41\n-10 =31\n-1 =30"),
    *("+7 =24\n" * 10**6, "9" * 10**7, "(" * 10**6, "\n" * 10**6, "\u2028", "\ud800", "+" + "9" * 5000 + " =30"),
]


@pytest.mark.parametrize("response", HOSTILE, ids=lambda response: repr(response[:30]))
def test_hostile_responses_score_nothing(response):
    assert score(response, "17 to 30") == 0


BAD_ANSWERS = ["", "30", "17 to 60", "17 to -3", "17-30", "17 to 30 to 40", "017 to 30", "17 to ３0"]


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_an_answer_of_another_form_is_the_users_mistake(answer):
    refuses("'<start> to <target>' is needed, each from 0 to 59", score, "+7 =24", answer)


def test_the_data(tmp_path):
    """All pairs once, none of them both in training and held out, the same every time; answers are the prompt's."""
    done = run_here("data/walk/prepare.py", "--held-out", "100", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    train, held_out = (load_rows(str(tmp_path / f"{name}.jsonl")) for name in ("train", "eval"))
    assert len(held_out) == 100
    pairs = [tuple(map(int, row["answer"].split(" to "))) for row in train + held_out]
    assert sorted(pairs) == [(a, b) for a in range(60) for b in range(60) if a != b]
    for (start, target), row in zip(pairs, train + held_out, strict=True):
        assert row["prompt"][0]["content"] == f"start ={start}\ntarget ={target}\n" and row["source"] == "walk"
    assert prepare.splits(0, 100) == prepare.splits(0, 100) != prepare.splits(1, 100)
    refuses("--held-out 3540: there are 3540 problems", prepare.splits, 0, 3540)


def test_a_trace_has_the_probabilities_by_which_it_was_drawn():
    """Against the definition, for every token; drawn moves are as frequent as their probabilities say."""
    rng, expected, drawn = random.Random(0), defaultdict(float), Counter()
    for _ in range(3000):
        number, tokens = 17, prepare.trace(rng, 17, 30)
        for (move, choices), (result, certain) in zip(tokens[::2], tokens[1::2], strict=True):
            legal = {move: eval(f"{number}{move}") for move in MOVES if eval(f"{number}{move}") in range(60)}
            nearer = [move for move, after in legal.items() if abs(after - 30) < abs(number - 30)]
            p = {move: 0.3 / len(legal) + 0.7 * (move in nearer) / len(nearer) for move in legal}
            assert choices == pytest.approx(p) and sum(choices.values()) == pytest.approx(1)
            number = legal[move]
            assert result == f" ={number}\n" and not certain
            drawn[move] += 1
            for each, q in choices.items():
                expected[each] += q
        assert len(tokens) == 12 or number == 30
    for move, count in expected.items():
        assert drawn[move] == pytest.approx(count, abs=5 * count**0.5)


def test_moves_and_numbers_are_one_token_each(tmp_path):
    """Also in the tokenizer that AutoTokenizer loads, which decodes the ids to the same text and fits the model."""
    tokenizer = base.make_tokenizer(prepare.WORDS)
    base.make_model(tokenizer, hidden_size=32, num_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    asked = prepare.row(17, 30)["prompt"][0]["content"]
    text = f"<|user|>{asked}<|end|><|assistant|>+10 =27\n-1 =26\n*2 =52\n+1 =53\n<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 1 + 4 + 1 + 1 + 8 + 1
    assert loaded.encode(text, add_special_tokens=False) == ids and loaded.decode(ids) == text
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len(loaded) == AutoConfig.from_pretrained(tmp_path).vocab_size
    for move in MOVES:
        assert len(tokenizer.encode(f"{move} =9\n", add_special_tokens=False)) == 2


def test_the_targets_of_the_imitation():
    """At each place before a token of the trace: the probabilities of all tokens that could stand there; else 0."""
    tokenizer, rng = base.make_tokenizer(prepare.WORDS), random.Random(0)
    vocabulary = tokenizer.get_vocab()
    traces = [[*prepare.trace(rng, *problem), (tokenizer.eos_token, {})] for problem in ((17, 18), (0, 59))]
    prompts = [[1, 2, 3], [4, 5]]
    pairs = list(zip(prompts, traces, strict=True))
    input_ids, target = base.batch(pairs, lambda text: [vocabulary[text]], len(vocabulary))
    assert len(traces[0]) != len(traces[1])
    for i, (prompt, trace) in enumerate(pairs):
        assert input_ids[i, : len(prompt)].tolist() == prompt
        expected = torch.zeros_like(target[i])
        for place, (text, choices) in enumerate(trace, start=len(prompt)):
            assert input_ids[i, place] == vocabulary[text]
            for choice, p in (choices or {text: 1.0}).items():
                expected[place - 1, vocabulary[choice]] = p
        assert torch.equal(target[i], expected)
