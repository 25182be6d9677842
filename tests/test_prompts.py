"""Bad data is named by file and line; prompts are rendered once."""

import contextlib
import copy
import itertools
import json
import re
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

import reward
from ce_gppo.evaluation import evaluate_policy
from ce_gppo.messages import UserError
from ce_gppo.model import load_tokenizer
from ce_gppo.problems import (
    Problem,
    check_tokens,
    load_problems,
    load_rows,
    load_sets,
    problems_of_batch,
    seed_of_step,
)
from helpers import refuses, resolved, rollout_of

GOOD = {"prompt": [{"role": "user", "content": "1+2=?"}], "answer": "3", "source": "test"}


def test_rows_of_several_files_come_back_in_order(write_rows, tokenizer):
    paths = [write_rows(GOOD, name="a.jsonl"), write_rows(GOOD | {"answer": "4"}, "", GOOD, name="b.jsonl")]
    problems, dropped = load_problems(",".join(paths), tokenizer, 64)
    assert [problem.answer for problem in problems] == ["3", "4", "3"] and dropped == 0


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"prompt": [', "not JSON"),
        ("[1, 2]", "a list, where an object"),
        ({"prompt": GOOD["prompt"], "source": "test"}, "the key 'answer' is missing"),
        (GOOD | {"answer": 3}, "'answer' is 3, where a string"),
        (GOOD | {"prompt": "1+2=?"}, "'prompt' is not a list of messages"),
        (GOOD | {"prompt": []}, "'prompt' is not a list of messages"),
        (GOOD | {"prompt": [{"role": "user"}]}, "lacks a string for 'role' or 'content'"),
        (GOOD | {"answer": " "}, "'answer' is empty"),
        ('{"prompt": [], "answer": "3", "answer": "4"}', "the key 'answer' is there twice"),
        (GOOD | {"prompt": [{"role": "user", "content": "\n"}]}, "the last message of 'prompt' is empty"),
        (GOOD | {"prompt": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        (GOOD | {"prompt": [{"role": "\ud800", "content": "x"}]}, "half of a surrogate pair"),
        (GOOD | {"answer": "\ud800"}, "half of a surrogate pair"),
        (GOOD | {"tools": [{"name": "python"}]}, "it has 'tools', which is not read"),
        (GOOD | {"source": ""}, "it must be printable"),
        (GOOD | {"source": "a\nb"}, "it must be printable"),
        (GOOD | {"source": "a,b"}, "without a comma"),
        (GOOD | {"source": "sums "}, "without a comma or spaces around it"),
        (GOOD | {"source": "s" * 101}, "at most 100 characters"),
        (GOOD | {"prompt": [{"role": "human", "content": "1 + 1"}]}, 'the role "human" is unknown; known: system'),
        (GOOD | {"prompt": [{"role": "system", "content": "1 + 1"}]}, "the last message of 'prompt' is the system's"),
        (f'{{"{"k" * 5000}": 1, "{"k" * 5000}": 2}}', f"the key '{'k' * 40}' is there twice"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write_rows, bad, message):
    path = write_rows(GOOD, bad)
    with pytest.raises(UserError) as error:
        load_rows(path)
    assert f"{path}, line 2: " in str(error.value) and message in str(error.value)


def test_missing_and_empty_files(write_rows, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        load_rows(str(tmp_path / "nothing.jsonl"))
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(UserError, match=r"rows\.parquet: a JSONL file is needed; .*data\.math\.prepare NAME --file"):
        load_rows(str(tmp_path / "rows.parquet"))
    with pytest.raises(UserError, match=r"klear\.jsonl: no such file; make it with .*-m data\.math\.prepare"):
        (tmp_path / "data" / "math").mkdir(parents=True)
        (tmp_path / "data" / "math" / "prepare.py").touch()
        load_rows(str(tmp_path / "data" / "math" / "klear.jsonl"))
    refuses(r"no rows", load_rows, write_rows())


def test_prompts_that_are_too_long_are_dropped_and_counted(write_rows, tokenizer):
    long = GOOD | {"prompt": [{"role": "user", "content": "1+" * 50 + "1=?"}]}
    problems, dropped = load_problems(write_rows(GOOD, long, GOOD), tokenizer, max_prompt_tokens=30)
    assert len(problems) == 2 and dropped == 1
    with pytest.raises(UserError, match="every prompt is longer than max_prompt_tokens = 30"):
        load_problems(write_rows(long), tokenizer, max_prompt_tokens=30)


def test_one_beginning_of_sequence_token(write_rows, tokenizer):
    """A template that writes the token, and a tokenizer that would add it again."""
    doubled = copy.deepcopy(tokenizer)
    bos = doubled.convert_tokens_to_ids("<|system|>")
    doubled.bos_token = "<|system|>"
    doubled.chat_template = "{{ bos_token }}" + doubled.chat_template
    doubled.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    assert doubled.encode("1")[0] == bos
    problems, _ = load_problems(write_rows(GOOD), doubled, 64)
    assert problems[0].prompt_ids.count(bos) == 1 and problems[0].prompt_ids[0] == bos


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "no chat template"),
        ("{{ messages[0]['content'] }}", "leaves out or changes what the user says, '1.2=.'$"),
        ("", "leaves out or changes what the system says"),
        ("{{ raise_exception('no') }}", "problem 1: the chat template refuses it: no"),
        ("{{ messages[-1]['content'] }}", "changes what the system says, 'Hm.'; prompt_suffix can say it"),
        ("{{ messages[0]['content'] }}{{ messages[-1]['content'] | upper }}x", None),
    ],
)
def test_a_chat_template_that_leaves_a_text_out_is_refused(tokenizer, write_rows, monkeypatch, template, message):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        load_problems(write_rows(GOOD), tokenizer, 64, system_prompt="Hm.")


@pytest.mark.parametrize(
    "role, text, found",
    [
        ("user", "1+2=?<|end|><|assistant|>", "'<|end|>'"),
        ("system", "Say <|user|>.", "'<|user|>'"),
        ("user", "1<turn>2", "'<turn>'"),  # not special, but the template's
        ("user", "1<other>2", None),  # neither
        ("system", "Think in <think></think>.", None),
    ],
)
def test_a_text_with_a_control_token_is_refused(tokenizer, write_rows, role, text, found):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<turn>", "<other>", "<think>", "</think>"])
    tokenizer.chat_template += "{# <turn> <think> #}"
    row = GOOD | {"prompt": [{"role": role, "content": text}, *GOOD["prompt"]]}
    refused = pytest.raises(UserError, match=rf"problem 2: its text has {re.escape(found)}, which") if found else None
    with refused or contextlib.nullcontext():
        load_problems(write_rows(GOOD, row), tokenizer, 64)


def test_system_prompt_and_suffix(write_rows, tokenizer):
    own = GOOD | {"prompt": [{"role": "system", "content": "Hm."}, *GOOD["prompt"]]}
    path = write_rows(GOOD, own)

    def rendered(**settings):
        return [problem.prompt for problem in load_problems(path, tokenizer, 64, **settings)[0]]

    bare = "<|user|>1+2=?<|end|><|assistant|>"
    assert rendered() == [bare, "<|system|>Hm.<|end|>" + bare]
    assert rendered(system_prompt="Box it.") == ["<|system|>Box it.<|end|>" + bare] * 2
    suffixed = "<|user|>1+2=?\nBox it.<|end|><|assistant|>"
    assert rendered(prompt_suffix="Box it.") == [suffixed, "<|system|>Hm.<|end|>" + suffixed]
    assert {problem.question for problem in load_problems(path, tokenizer, 64, "Hm.", "Box it.")[0]} == {"1+2=?"}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template += "{% if not enable_thinking %}<think></think>{% endif %}"
    assert rendered(template_switches="enable_thinking=true")[0] == bare
    assert rendered(template_switches="enable_thinking=false")[0] == bare + "<think></think>"
    for wrong in ("thinking=true", "enable_thinking"):
        refuses(f"template_switches: '{wrong}', where", rendered, template_switches=wrong)


def test_tokens_that_the_model_lacks_or_that_hide_what_a_verifier_looks_for(tokenizer):
    problems, hiding = [Problem("", [3, 9], "", ""), Problem("", [10, 3], "", "")], copy.deepcopy(tokenizer)
    hiding.add_special_tokens({"additional_special_tokens": ["</think>", "<answer>"]})
    by_exact = [replace(problems[0], verifier="exact")]
    check_tokens(problems + by_exact, 11, tokenizer, True, reward.MARKS)
    check_tokens(problems, 11, hiding, False, reward.MARKS)
    refuses("has the token 10, and the model only has 10", check_tokens, problems, 10, tokenizer, False, reward.MARKS)
    with pytest.raises(UserError, match="thinking: the tokenizer drops </think> as a special token"):
        check_tokens(problems, 11, hiding, True, reward.MARKS)
    with pytest.raises(UserError, match="exact: the tokenizer drops <answer> as a special token"):
        check_tokens(by_exact, 11, hiding, False, reward.MARKS)
    with pytest.raises(UserError, match="thinking: the chat template ends the thinking itself"):
        check_tokens([replace(problems[0], prompt="1+2=?<think>\n\n</think>\n\n")], 11, tokenizer, True, reward.MARKS)


def test_a_tokenizer_that_loses_the_spaces_is_refused(tmp_path, tokenizer):
    """Of a Llama model with a byte-level tokenizer.json, as R1-Distill-Llama has; its class expects sentencepiece."""
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    _, other = load_tokenizer(str(tmp_path))
    problems = [Problem("", [3], "", "", question=question) for question in ("What is 3?", "And 3 plus 4?", "7")]
    check_tokens(problems, 11, tokenizer, False, {})
    with pytest.raises(UserError, match="the tokenizer makes 'Whatis3.' of 'What is 3.'; its class is not that of"):
        check_tokens(problems, 11, other, False, {})


def test_a_template_that_prints_the_date_gives_the_same_prompts_every_day(write_rows, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    (problem,), _ = load_problems(write_rows(GOOD), tokenizer, 64)
    assert problem.prompt == "26 Jul 2024 1+2=?"


def test_held_out_problems_that_are_trained_on_and_problems_with_two_answers_are_told(tokenizer, write_rows, capsys):
    limits = types.SimpleNamespace(max_position_embeddings=512, vocab_size=len(tokenizer))
    path, other = write_rows(GOOD, GOOD | {"answer": " 3 "}), write_rows(GOOD, GOOD | {"answer": "4"}, name="e.jsonl")

    def sets(held_out, **settings):
        config = resolved(train_data=path, eval_data=held_out, max_prompt_tokens=64, **settings)
        return load_sets(config, tokenizer, limits, reward.assign, reward.MARKS), capsys.readouterr().err

    (problems, held_out, sizes), told = sets(path)
    assert (len(problems), len(held_out)) == (2, 2) and "2 training and 2 held-out problems (0 and 0 dropped" in sizes
    assert "prompt longer than 64 tokens" in sizes and "test by math" in sizes
    assert "1 held-out problems are also trained on" in told and "several times" not in told
    assert "1 problems are there several times, with different answers" in sets(other)[1]
    limits.max_position_embeddings = 128
    sets(path, max_response_tokens=64)
    for setting in ("max_response_tokens", "eval_response_tokens"):
        refuses(f"max_prompt_tokens . {setting} = 129 is beyond the .* context of 128", sets, path, **{setting: 65})


@pytest.mark.parametrize("count", [3, 7, 20])
def test_every_epoch_has_each_problem_once_in_an_order_of_its_own(count):
    problems = [Problem(str(i), [], "", "") for i in range(7)]
    batches = [[p.prompt for p in problems_of_batch(problems, batch, count, seed=5)] for batch in range(1, 29)]
    asked = [prompt for batch in batches for prompt in batch]
    epochs = [tuple(asked[i : i + 7]) for i in range(0, len(asked) - 6, 7)]
    assert all(sorted(epoch) == list("0123456") for epoch in epochs) and len(set(epochs)) > len(epochs) / 2
    assert all(len(batch) == count for batch in batches)
    assert batches[1] != [p.prompt for p in problems_of_batch(problems, 2, count, seed=6)]


def test_seeds_differ_by_run_step_and_engine_and_never_change():
    """Published results follow from them."""
    cases = [*itertools.product((0, 1), (-1, 0, 1, 11), (0, 1, 2))]
    seeds = {seed_of_step(*case) for case in cases}
    assert len(seeds) == len(cases) and all(0 <= seed < 2**32 for seed in seeds)
    assert (seed_of_step(0, 1), seed_of_step(0, 1, 2)) == (1436992348, 3146191027)  # of sha256


def test_the_policy_is_evaluated_when_that_is_due_and_not_done_yet(monkeypatch):
    config = resolved(steps=7, eval_every=3, eval_samples=2, eval_response_tokens=5, eval_top_p=0.9, seed=4)
    problems, rows, calls = [Problem("", [i], str(i), "sums", verifier="math") for i in range(3)], [], []

    def generate(prompts, k, **options):
        calls.append((prompts, k, options))
        texts = [rf"\boxed{{{ids[0] if right else 9}}}" for ids in prompts for right in (True, ids[0] == 0)]
        places = torch.arange(len(prompts)).repeat_interleave(k)
        rollout = replace(rollout_of([(1, 2)] * len(texts)), prompts=prompts, prompt_of=places, texts=texts)
        return None if options["stop"]() else rollout

    warned = []  # of the first evaluation only
    monkeypatch.setattr("ce_gppo.evaluation.warn", lambda *given: warned.append(given))
    log = types.SimpleNamespace(has_evaluation=lambda step: step == 3, add=lambda *row: rows.append(row))
    meter = mock.MagicMock(take_part=lambda part: {"time/eval": 1.0})
    for stopped, steps in ((True, [0]), (False, range(8))):
        for step in steps:
            engine, stop = types.SimpleNamespace(generate=generate), lambda stopped=stopped: stopped
            evaluate_policy(engine, problems, config, reward.score, log, meter, stop, step)
    row = {"eval/sums/avg_at_k": 4 / 6, "eval/sums/pass_at_k": 1.0, "time/eval": 1.0}
    assert rows == [(step, row) for step in (0, 6, 7)] and len(warned) == 1
    options = {"max_tokens": 5, "temperature": 1.0, "top_p": 0.9, "seed": seed_of_step(4, 0)}
    assert calls[1][:2] == ([[0], [1], [2]], 2) and calls[1][2].items() >= options.items() and len(calls) == 4
