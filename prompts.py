"""Problems from JSONL files, as token ids for the engine. Whatever is wrong with a file is said in one sentence."""

import json
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's. The message is one sentence that says where it is and what would be right."""


@dataclass(frozen=True)
class Problem:
    prompt: str  # the chat template rendered once, for people
    prompt_ids: list[int]  # what the engine gets; one beginning-of-sequence token at most
    answer: str
    source: str
    question: str = ""  # the last message, as the file has it


def check_file(path: str) -> None:
    """UserError if there is no file of problems at `path`, with the script that makes it."""
    if not Path(path).is_file():
        script = Path(path).parent / "prepare.py"
        how = "a JSONL file of problems is needed (data/*/prepare.py make them)"
        if script.is_file():
            how = f"make it with .venv/bin/python {script} (--help lists what it makes)"
        raise UserError(f"{path}: no such file; {how}")


def load_rows(path: str) -> list[dict]:
    """Rows {"prompt": [{"role": str, "content": str}, ...], "answer": str, "source": str} of a JSONL file."""
    check_file(path)
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); one object a line is needed") from None
        if problem := _problem_with(row):
            raise UserError(f"{path}, line {number}: {problem}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: the file has no rows; at least one problem is needed")
    return rows


def _problem_with(row) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, where an object with prompt, answer and source is needed"
    for key in ("prompt", "answer", "source"):
        if key not in row:
            return f"the key '{key}' is missing; a row has prompt, answer and source"
    for key in ("answer", "source"):
        if not isinstance(row[key], str):
            return f"'{key}' is {json.dumps(row[key])[:40]}, where a string is needed"
    if not isinstance(row["prompt"], list) or not row["prompt"]:
        return "'prompt' is no list of messages {role, content}"
    for message in row["prompt"]:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return "a message of 'prompt' lacks a string for 'role' or 'content'"
    return None


def load_problems(
    path: str, tokenizer, max_prompt_tokens: int, system_prompt: str = "", prompt_suffix: str = ""
) -> tuple[list[Problem], int]:
    """The problems, and how many were dropped because their prompt is longer than max_prompt_tokens.

    path may name several files, with commas between them.
    system_prompt takes the place of a row's own system message; prompt_suffix is one more line of the last message.
    Empty, as in the authors' runs, they leave the rows as they are.
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
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs; they raise what they like
            raise UserError(f"{path}, problem {number}: the chat template refuses it: {error}") from None
        # The template writes its own beginning-of-sequence token; the tokenizer must not add a second one.
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if len(ids) <= max_prompt_tokens:
            problems.append(Problem(prompt, ids, row["answer"], row["source"], question))
    if not problems:
        raise UserError(f"{path}: every prompt is longer than max_prompt_tokens = {max_prompt_tokens}; raise it")
    return problems, len(rows) - len(problems)


def check_thinking(tokenizer) -> None:
    """UserError if a response's text would not show where thinking ends: then every answer would score 0."""
    ids = tokenizer.encode("</think>", add_special_tokens=False)
    if "</think>" not in tokenizer.decode(ids, skip_special_tokens=True):
        raise UserError("thinking: the tokenizer drops </think> as a special token, so no answer could follow it")
