"""Problems from JSONL files, as token ids for the engine, and the problems of each batch."""

import datetime
import hashlib
import json
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ce_gppo import messages
from ce_gppo.messages import UserError

# Some chat templates print the date. A run that is resumed tomorrow must have the same prompts, so the date is always
# this one, the default of Llama 3.2's template.
TODAY = datetime.date(2024, 7, 26)

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Problem:
    prompt: str  # the chat template rendered once, for people
    prompt_ids: list[int]  # for the engine; one beginning-of-sequence token at most
    answer: str
    source: str
    question: str = ""  # the last message, as it is in the file
    verifier: str = "math"  # see reward.py


def check_files(*paths: str) -> None:
    """UserError, with the script that makes the file, if there is none; a path may be several, with commas."""
    for path in map(Path, ",".join(paths).split(",")):
        if not path.is_file():
            how = "a JSONL file of problems is needed (data/*/prepare.py make them)"
            if path.with_name("prepare.py").is_file():
                how = f"make it with .venv/bin/python -m data.{path.parent.name}.prepare (--help lists what it makes)"
            raise UserError(f"{path}: no such file; {how}")


def load_rows(path: str) -> list[dict]:
    """Rows {"prompt": [{"role": str, "content": str}, ...], "answer": str, "source": str} of a JSONL file."""
    check_files(path)
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); one object a line is needed") from None
        if problem := _problem_with(row):
            raise UserError(f"{path}, line {number}: {problem}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: the file has no rows; at least one problem is needed")
    return rows


def _object(pairs: list[tuple[str, typing.Any]]) -> dict:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:  # Python would take the last one, without a word
            raise ValueError(f"the key '{key[:40]}' is there twice")
    return dict(pairs)


def _problem_with(row) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, where an object with prompt, answer and source is needed"
    for key in ("prompt", "answer", "source"):
        if key not in row:
            return f"the key '{key}' is missing; a row has prompt, answer and source"
    prompt, answer, source = row["prompt"], row["answer"], row["source"]
    for key in ("answer", "source"):
        if not isinstance(row[key], str):
            return f"'{key}' is {json.dumps(row[key])[:40]}, where a string is needed"
    if not answer.strip():
        return "'answer' is empty: no response could ever be right"
    if not source.isprintable() or source != source.strip() or "," in source or not 1 <= len(source) <= 100:
        return (
            f"'source' is {json.dumps(source)[:40]}; metrics and the setting `rewards` have this name, so it must be "
            "printable, at most 100 characters, without a comma or spaces around it"
        )
    if not isinstance(prompt, list) or not prompt:
        return "'prompt' is not a list of messages {role, content}"
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return "a message of 'prompt' lacks a string for 'role' or 'content'"
    texts = [answer, *(message[key] for message in prompt for key in ("role", "content"))]
    if any("\ud800" <= character <= "\udfff" for character in "".join(texts)):
        return "it has half of a surrogate pair, which is not valid text"
    if not prompt[-1]["content"].strip():
        return "the last message of 'prompt' is empty, so there is no problem in it"
    if unknown := [message["role"] for message in prompt if message["role"] not in ROLES]:  # some templates drop those
        return f"the role {json.dumps(unknown[0])[:40]} is unknown; known: {', '.join(ROLES)}"
    if prompt[-1]["role"] not in ("user", "tool"):
        return f"the last message of 'prompt' is the {prompt[-1]['role']}'s; the policy answers a user or tool"
    return None


def load_problems(
    path: str, tokenizer, max_prompt_tokens: int, system_prompt: str = "", prompt_suffix: str = ""
) -> tuple[list[Problem], int]:
    """(problems, number of those dropped because their prompt is longer than max_prompt_tokens).

    path: one file, or several with commas. system_prompt replaces a row's own system message; prompt_suffix adds a line
    to the last message. If they are empty, as in the authors' runs, the rows are used as they are.
    """
    rows = [row for file in path.split(",") for row in load_rows(file)]
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: the model's tokenizer has no chat template, so its prompts cannot be rendered")
    problems = []
    for number, row in enumerate(rows, start=1):
        messages = [message for message in row["prompt"] if not (system_prompt and message["role"] == "system")]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        question = messages[-1]["content"]
        if prompt_suffix:
            messages[-1] = messages[-1] | {"content": f"{question}\n{prompt_suffix}"}
        try:
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, strftime_now=TODAY.strftime
            )
        except Exception as error:  # templates are programs, and can raise any error
            raise UserError(f"{path}, problem {number}: the chat template refuses it: {error}") from None
        # The template writes its own beginning-of-sequence token; the tokenizer must not add a second one.
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if not ids:
            raise UserError(f"{path}, problem {number}: its prompt has no tokens; the tokenizer's files are damaged")
        if len(ids) <= max_prompt_tokens:
            problems.append(Problem(prompt, ids, row["answer"], row["source"], question))
    if len({problem.prompt for problem in problems}) == 1 < len({problem.question for problem in problems}):
        raise UserError(f"{path}: the chat template gives every problem the same prompt, {problems[0].prompt[:60]!r}")
    if not problems:
        raise UserError(f"{path}: every prompt is longer than max_prompt_tokens = {max_prompt_tokens}; raise it")
    return problems, len(rows) - len(problems)


def load_sets(config, tokenizer, model_config, assign: Callable) -> tuple[list[Problem], list[Problem], str]:
    """(training problems, held-out problems, a text with their numbers and verifiers) for train.py's settings.

    model_config: of transformers. assign: reward.assign. UserError if prompts and responses do not fit into the model's
    context or its vocabulary, or its tokenizer hides </think>.
    """
    for name in ("max_response_tokens", "eval_response_tokens"):
        longest = config.max_prompt_tokens + getattr(config, name)
        if longest > (context := model_config.max_position_embeddings):
            raise UserError(f"max_prompt_tokens + {name} = {longest} is beyond the model's context of {context}")
    if config.thinking:
        check_thinking(tokenizer)
    limits = config.max_prompt_tokens, config.system_prompt, config.prompt_suffix
    with messages.explained(f"problems of {config.train_data} and {config.eval_data} cannot be read"):
        problems, dropped = load_problems(config.train_data, tokenizer, *limits)
        held_out, held_out_dropped = load_problems(config.eval_data, tokenizer, *limits)
    check_vocabulary(problems + held_out, model_config.vocab_size)
    if trained := len({problem.prompt for problem in held_out} & {problem.prompt for problem in problems}):
        messages.say(f"{trained} held-out problems are also trained on, so their accuracy says little", warning=True)
    pairs = {(problem.prompt, problem.answer.strip()) for problem in problems + held_out}
    if contradicting := sum(count > 1 for count in Counter(prompt for prompt, _ in pairs).values()):
        messages.say(f"{contradicting} problems are there several times, with different answers", warning=True)
    verifiers, (problems, held_out) = assign(config.rewards, problems, held_out)
    about = (
        f"{len(problems)} training and {len(held_out)} held-out problems ({dropped} and {held_out_dropped} dropped: "
        f"prompt longer than {config.max_prompt_tokens} tokens)\nrewards      {verifiers}"
    )
    return problems, held_out, about


def check_vocabulary(problems: list[Problem], size: int) -> None:
    """UserError for a prompt with a token that the model does not have, as where tokens were added to its tokenizer."""
    for problem in problems:
        if (largest := max(problem.prompt_ids)) >= size:
            raise UserError(
                f"the prompt {problem.prompt[:60]!r} has the token {largest}, and the model only has {size}: its "
                "tokenizer's files are another model's, or have tokens that the model's embedding lacks"
            )


def check_thinking(tokenizer) -> None:
    """UserError if the text of a response would not have </think>: every answer would then score 0."""
    ids = tokenizer.encode("</think>", add_special_tokens=False)
    if "</think>" not in tokenizer.decode(ids, skip_special_tokens=True):
        raise UserError("thinking: the tokenizer drops </think> as a special token, so no answer could follow it")


def problems_of_batch(problems: list[Problem], batch: int, count: int, seed: int) -> list[Problem]:
    """The `count` problems of a batch (from 1), a function of seed and batch only. Each epoch has a new order."""
    chosen, order, epoch = [], None, None
    for position in range((batch - 1) * count, batch * count):
        if position // len(problems) != epoch:
            epoch = position // len(problems)
            generator = torch.Generator().manual_seed(seed_of_step(seed, -1 - epoch))
            order = torch.randperm(len(problems), generator=generator).tolist()
        chosen.append(problems[order[position % len(problems)]])
    return chosen


def seed_of_step(seed: int, step: int, engine: int = 0) -> int:
    """A 32-bit seed for this step and engine, so that a resumed run samples the same as an uninterrupted one."""
    text = f"{seed} {step}" + (f" {engine}" if engine else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
