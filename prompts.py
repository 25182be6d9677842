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


def load_rows(path: str) -> list[dict]:
    """Rows {"prompt": [{"role": str, "content": str}, ...], "answer": str, "source": str} of a JSONL file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a JSONL file of problems is needed (data/*/prepare.py make them)")
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


def load_problems(path: str, tokenizer, max_prompt_tokens: int) -> tuple[list[Problem], int]:
    """The file's problems, and how many were dropped because their prompt is longer than max_prompt_tokens."""
    rows = load_rows(path)
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: the model's tokenizer has no chat template, so its prompts cannot be rendered")
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs; they raise what they like
            raise UserError(f"{path}, problem {number}: the chat template refuses it: {error}") from None
        # The template writes its own beginning-of-sequence token; the tokenizer must not add a second one.
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if len(ids) <= max_prompt_tokens:
            problems.append(Problem(prompt, ids, row["answer"], row["source"]))
    if not problems:
        raise UserError(f"{path}: every prompt is longer than max_prompt_tokens = {max_prompt_tokens}; raise it")
    return problems, len(rows) - len(problems)
