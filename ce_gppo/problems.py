"""Problems: rows of files as token ids, what is wrong with them, and their order in batches."""

import datetime
import hashlib
import json
import re
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ce_gppo import messages
from ce_gppo.messages import UserError

# Some chat templates print the date. A run that is resumed tomorrow must have the same prompts, so the date is always
# this one, the default of Llama 3.2's template.
TODAY = datetime.date(2024, 7, 26)
ROLES = ("system", "developer", "user", "assistant", "tool")
CONVERTED = {".parquet": ".venv/bin/python -m data.math.prepare NAME --file {}", ".gz": "gunzip --keep {}"}
NEITHER = ("tools", "chat_template_kwargs", "images", "videos", "audios")  # keys that other trainers give a meaning
CHECKED = 100  # problems of each file whose text must survive the tokenizer


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
        if path.suffix in CONVERTED:
            raise UserError(f"{path}: a JSONL file is needed; {CONVERTED[path.suffix].format(path)} makes one of it")


def load_rows(path: str) -> list[dict]:
    """Rows {"prompt": [{"role": str, "content": str}, ...], "answer": str, "source": str} of a JSONL file."""
    check_files(path)
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=_object))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); one object a line is needed") from None
            for problem in _problems_with(rows[-1]):
                raise UserError(f"{path}, line {number}: {problem}")
    if not rows:
        raise UserError(f"{path}: the file has no rows; at least one problem is needed")
    return rows


def _object(pairs: list[tuple[str, typing.Any]]) -> dict:
    if len(row := dict(pairs)) < len(pairs):  # Python would take the last one, without a word
        (key, _), *_ = Counter(key for key, _ in pairs).most_common()
        raise ValueError(f"the key '{key[:40]}' is there twice")
    return row


def _problems_with(row) -> Iterator[str]:
    """What is wrong with a row. Only the first one counts: those after it may take for granted that it is right."""
    if not isinstance(row, dict):
        yield f"a {type(row).__name__}, where an object with prompt, answer and source is needed"
    for key in ("prompt", "answer", "source"):
        if key not in row:
            yield f"the key '{key}' is missing; a row has prompt, answer and source"
        if key != "prompt" and not isinstance(row[key], str):
            yield f"'{key}' is {json.dumps(row[key])[:40]}, where a string is needed"
    if unread := [key for key in NEITHER if row.get(key)]:
        yield f"it has '{unread[0]}', which is not read, so the prompt would not be what the row means"
    prompt, answer, source = row["prompt"], row["answer"], row["source"]
    if not answer.strip():
        yield "'answer' is empty: no response could ever be right"
    if not source.isprintable() or source != source.strip() or "," in source or not 1 <= len(source) <= 100:
        must = "must be printable, at most 100 characters, without a comma or spaces around it"
        yield f"'source' is {json.dumps(source)[:40]}; metrics and the setting `rewards` have this name, so it {must}"
    if not isinstance(prompt, list) or not prompt:
        yield "'prompt' is not a list of messages {role, content}"
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            yield "a message of 'prompt' lacks a string for 'role' or 'content'"
    if re.search("[\ud800-\udfff]", answer + "".join(message["role"] + message["content"] for message in prompt)):
        yield "it has half of a surrogate pair, which is not valid text"
    if not prompt[-1]["content"].strip():
        yield "the last message of 'prompt' is empty, so there is no problem in it"
    if unknown := [message["role"] for message in prompt if message["role"] not in ROLES]:  # some templates drop those
        yield f"the role {json.dumps(unknown[0])[:40]} is unknown; known: {', '.join(ROLES)}"
    if prompt[-1]["role"] not in ("user", "tool"):
        yield f"the last message of 'prompt' is the {prompt[-1]['role']}'s; the policy answers a user or tool"


def read_switches(text: str, template: str) -> dict[str, bool | str]:
    """The switches of a chat template from "enable_thinking=false,name=value". UserError for one that it has not."""
    switches = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, equals, value = entry.partition("=")
        if not equals or not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"template_switches: '{entry}', where name=value of the model's chat template is needed")
        switches[name] = {"true": True, "false": False}.get(value.lower(), value)
    return switches


def load_problems(
    path: str,
    tokenizer,
    max_prompt_tokens: int,
    system_prompt: str = "",
    prompt_suffix: str = "",
    template_switches: str = "",
) -> tuple[list[Problem], int]:
    """(problems, number of those dropped because their prompt is longer than max_prompt_tokens).

    path: one file, or several with commas. system_prompt replaces a row's own system message; prompt_suffix adds a line
    to the last message. Without them, as in the authors' runs, the rows are used as they are. template_switches: see
    read_switches.
    """
    rows = [row for file in path.split(",") for row in load_rows(file)]
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: the model's tokenizer has no chat template, so its prompts cannot be rendered")
    problems, control = [], control_tokens(tokenizer)
    switches = read_switches(template_switches, str(tokenizer.chat_template))
    for number, row in enumerate(rows, start=1):
        messages = [message for message in row["prompt"] if not (system_prompt and message["role"] == "system")]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        question = messages[-1]["content"]
        if prompt_suffix:
            messages[-1] = messages[-1] | {"content": f"{question}\n{prompt_suffix}"}
        options = switches | {"tokenize": False, "add_generation_prompt": True, "strftime_now": TODAY.strftime}
        try:
            prompt = tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates are programs, and can raise any error
            cure = "; if it takes no system role, prompt_suffix can say it" if messages[0]["role"] == "system" else ""
            raise UserError(f"{path}, problem {number}: the chat template refuses it: {error}{cure}") from None
        for problem in _problems_with_prompt(prompt, messages, control):
            raise UserError(f"{path}, problem {number}: {problem}")
        # The template writes its own beginning-of-sequence token; the tokenizer must not add a second one.
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if len(ids) <= max_prompt_tokens:
            problems.append(Problem(prompt, ids, row["answer"], row["source"], question))
    if not problems:
        raise UserError(f"{path}: every prompt is longer than max_prompt_tokens = {max_prompt_tokens}; raise it")
    return problems, len(rows) - len(problems)


def control_tokens(tokenizer) -> re.Pattern:
    """Texts that structure a prompt: special tokens, and those of the chat template, such as the begin of a turn."""
    known = ((str(token), token.special) for token in tokenizer.added_tokens_decoder.values())
    found = [text for text, special in known if special or text in str(tokenizer.chat_template)]
    return re.compile("|".join(re.escape(text) for text in found if text not in ("<think>", "</think>")) or "(?!)")


def _problems_with_prompt(prompt: str, messages: list[dict], control: re.Pattern) -> Iterator[str]:
    for role, text in ((message["role"], message["content"].strip()) for message in messages):
        if found := control.search(text):
            yield f"its text has {found[0]!r}, which the model would read as a control token; take it out"
        if role in ("system", "developer", "user") and text not in prompt:  # some templates shorten the assistant's
            cure = "; prompt_suffix can say it" if role == "system" else ""
            yield f"the chat template leaves out or changes what the {role} says, {text[:60]!r}{cure}"


def load_sets(config, tokenizer, model_config, assign: Callable, marks: dict) -> tuple[list, list, str]:
    """(training problems, held-out problems, a text with their numbers and verifiers) for train.py's settings.

    model_config: of transformers. assign, marks: reward.py's. UserError if they do not fit the model or its tokenizer.
    """
    for name in ("max_response_tokens", "eval_response_tokens"):
        longest = config.max_prompt_tokens + getattr(config, name)
        if longest > (context := model_config.max_position_embeddings):
            raise UserError(f"max_prompt_tokens + {name} = {longest} is beyond the model's context of {context}")
    limits = config.max_prompt_tokens, config.system_prompt, config.prompt_suffix, config.template_switches
    with messages.explained(f"problems of {config.train_data} and {config.eval_data} cannot be read"):
        problems, dropped = load_problems(config.train_data, tokenizer, *limits)
        held_out, held_out_dropped = load_problems(config.eval_data, tokenizer, *limits)
    if trained := len({problem.prompt for problem in held_out} & {problem.prompt for problem in problems}):
        messages.say(f"{trained} held-out problems are also trained on, so their accuracy says little", warning=True)
    pairs = {(problem.prompt, problem.answer.strip()) for problem in problems + held_out}
    if contradicting := sum(count > 1 for count in Counter(prompt for prompt, _ in pairs).values()):
        messages.say(f"{contradicting} problems are there several times, with different answers", warning=True)
    verifiers, (problems, held_out) = assign(config.rewards, problems, held_out)
    for part in (problems, held_out):
        check_tokens(part, model_config.vocab_size, tokenizer, config.thinking, marks)
    sizes = f"{len(problems)} training and {len(held_out)} held-out problems ({dropped} and {held_out_dropped} dropped:"
    return problems, held_out, f"{sizes} prompt longer than {limits[0]} tokens)\nrewards      {verifiers}"


def check_tokens(problems: list[Problem], vocabulary: int, tokenizer, thinking: bool, marks: dict[str, str]) -> None:
    """UserError where tokens are not what they seem: the model lacks one, or they do not give back the text.

    marks: by verifier, what it looks for in a response. The tokenizer must not drop it, as it does special tokens.
    """

    def back(text: str) -> list[str]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return unicodedata.normalize("NFKC", tokenizer.decode(ids, skip_special_tokens=True)).split()

    asked = [problem.question for problem in problems[:CHECKED]]
    lost = [text for text in asked if back(text) != unicodedata.normalize("NFKC", text).split()]
    if len(lost) > len(asked) / 2:
        found = " ".join(back(lost[0]))
        raise UserError(f"the tokenizer makes {found[:60]!r} of {lost[0][:60]!r}; its class is not that of its files")
    for problem in problems:
        if (largest := max(problem.prompt_ids)) >= vocabulary:
            told = f"the prompt {problem.prompt[:60]!r} has the token {largest}, and the model only has {vocabulary}"
            raise UserError(f"{told}: its tokenizer's files are another model's, or were extended without the weights")
    sought = {name: marks[name] for name in sorted({problem.verifier for problem in problems} & marks.keys())}
    for name, mark in (sought | ({"thinking": "</think>"} if thinking else {})).items():
        if mark not in "".join(back(mark)):
            raise UserError(f"{name}: the tokenizer drops {mark} as a special token, so that no response can have it")
    if thinking and problems[0].prompt.rstrip().endswith("</think>"):
        raise UserError("thinking: the chat template ends the thinking itself, so that no response has </think>")


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
