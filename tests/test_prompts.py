"""Bad data is named by file and line; prompts are rendered once."""

import copy
import types

import pytest
from tokenizers.processors import TemplateProcessing

from ce_gppo.messages import UserError
from ce_gppo.problems import Problem, check_thinking, check_vocabulary, load_problems, load_rows, load_sets
from helpers import resolved

GOOD = {"prompt": [{"role": "user", "content": "1+2=?"}], "answer": "3", "source": "test"}


def test_rows_come_back_in_order(write_rows):
    path = write_rows(GOOD, "", GOOD | {"answer": "4"})
    assert [row["answer"] for row in load_rows(path)] == ["3", "4"]


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"prompt": [', "not JSON"),
        ("[1, 2]", "a list, where an object"),
        ({"prompt": GOOD["prompt"], "source": "test"}, "the key 'answer' is missing"),
        (GOOD | {"answer": 3}, "'answer' is 3, where a string"),
        (GOOD | {"source": None}, "'source' is null, where a string"),
        (GOOD | {"prompt": "1+2=?"}, "'prompt' is not a list of messages"),
        (GOOD | {"prompt": []}, "'prompt' is not a list of messages"),
        (GOOD | {"prompt": [{"role": "user"}]}, "lacks a string for 'role' or 'content'"),
        (GOOD | {"answer": " "}, "'answer' is empty"),
        ('{"prompt": [], "answer": "3", "answer": "4"}', "the key 'answer' is there twice"),
        (GOOD | {"prompt": [{"role": "user", "content": "\n"}]}, "the last message of 'prompt' is empty"),
        (
            GOOD | {"prompt": [*GOOD["prompt"], {"role": "assistant", "content": "3"}]},
            "the last message of 'prompt' is the assistant's",
        ),
        (GOOD | {"prompt": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        (GOOD | {"prompt": [{"role": "\ud800", "content": "x"}]}, "half of a surrogate pair"),
        (GOOD | {"answer": "\ud800"}, "half of a surrogate pair"),
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
    with pytest.raises(UserError, match=r"klear\.jsonl: no such file; make it with .*-m data\.math\.prepare"):
        (tmp_path / "data" / "math").mkdir(parents=True)
        (tmp_path / "data" / "math" / "prepare.py").touch()
        load_rows(str(tmp_path / "data" / "math" / "klear.jsonl"))
    with pytest.raises(UserError, match=r"no rows"):
        load_rows(write_rows())


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
    [(None, "no chat template"), ("", "no tokens"), ("hello", "gives every problem the same prompt")]
    + [("{{ raise_exception('no') }}", "problem 1: the chat template refuses it: no")],
)
def test_a_chat_template_that_leaves_the_problem_out_is_refused(tokenizer, write_rows, monkeypatch, template, message):
    other = GOOD | {"prompt": [{"role": "user", "content": "2 + 2"}]}
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=message):
        load_problems(write_rows(GOOD, other), tokenizer, 64)


def test_several_files_are_one(write_rows, tokenizer):
    paths = [write_rows(GOOD, name="a.jsonl"), write_rows(GOOD | {"answer": "4"}, GOOD, name="b.jsonl")]
    problems, dropped = load_problems(",".join(paths), tokenizer, 64)
    assert [problem.answer for problem in problems] == ["3", "4", "3"] and dropped == 0


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


def test_thinking_needs_a_tokenizer_that_shows_its_end(tokenizer):
    check_thinking(tokenizer)
    hiding = copy.deepcopy(tokenizer)
    hiding.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(UserError, match="drops </think> as a special token"):
        check_thinking(hiding)


def test_a_template_that_prints_the_date_gives_the_same_prompts_every_day(write_rows, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    (problem,), _ = load_problems(write_rows(GOOD), tokenizer, 64)
    assert problem.prompt == "26 Jul 2024 1+2=?"


def test_held_out_problems_that_are_trained_on_and_problems_with_two_answers_are_told(tokenizer, write_rows, capsys):
    limits = types.SimpleNamespace(max_position_embeddings=512, vocab_size=len(tokenizer))
    path, other = write_rows(GOOD, GOOD | {"answer": " 3 "}), write_rows(GOOD, GOOD | {"answer": "4"}, name="e.jsonl")
    problems, held_out, sizes = load_sets(resolved(train_data=path, eval_data=path), tokenizer, limits)
    assert (len(problems), len(held_out)) == (2, 2) and "2 training and 2 held-out problems (0 and 0 dropped" in sizes
    told = capsys.readouterr().err
    assert "1 held-out problems are also trained on" in told and "several times" not in told
    load_sets(resolved(train_data=path, eval_data=other), tokenizer, limits)
    assert "1 problems are there several times, with different answers" in capsys.readouterr().err
    with pytest.raises(
        UserError, match="max_prompt_tokens . max_response_tokens = 128 is beyond the .* context of 127"
    ):
        limits.max_position_embeddings = 127
        load_sets(resolved(train_data=path, eval_data=path), tokenizer, limits)


def test_tokens_that_the_model_lacks():
    check_vocabulary([Problem("", [3, 9], "", "")], 10)
    with pytest.raises(UserError, match="has the token 10, and the model only has 10"):
        check_vocabulary([Problem("", [3, 9], "", ""), Problem("", [3, 10], "", "")], 10)
