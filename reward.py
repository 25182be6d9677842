r"""What a response is worth. A problem's source chooses its verifier, unless the setting `rewards` names another:

    math            the last \boxed{} equals the answer; for all sources that have no verifier of their name
    math_dapo       the rest of the last line with "Answer:" equals the answer, as DAPO's data ask for
    gsm8k           the rest of the line after the last ####, or else the last box, equals the answer
    choice          the letter in the last box, or else after the last "answer is", "Answer:" or ####
    countdown       an expression in <answer></answer> that uses each number once and hits the target
    walk            lines of moves from a start to a target, each move and its result right
    exact           the last <answer></answer>, or else the last box, or else the whole response, equals the answer
    mine.py:score   a function of your own. It runs in processes that are killed if they take too long

A verifier takes a response and the true answer. It returns a number, 1 for right and 0 for wrong, or named components
whose sum is the reward, such as {"correctness": 1.0, "format": 0.1}: it is correct if `correctness` is 1 or more.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ce_gppo import messages
from ce_gppo.messages import UserError
from ce_gppo.verifier import puzzles
from ce_gppo.verifier.answers import Undecided, can_be_given, equal_now, last_box
from ce_gppo.verifier.workers import BackgroundScorer, as_components, file_of, judge


def after_hashes(response: str) -> str | None:
    """The rest of the line after the last ####, as in GSM8K. Without ####: the last box."""
    _, hashes, rest = response.rpartition("####")
    return rest.partition("\n")[0].strip() or None if hashes else last_box(response)


def choice_letter(response: str) -> str | None:
    """The letter in the last box, `C` or `(C) its text`, or else after the last "answer is", "answer:" or ####.
    None if two letters stand there: `C or D`, `C, D`."""
    box = last_box(response) or ""
    if TWO_LETTERS.search(box):
        return None
    if found := BOXED_LETTER.match(box):
        return found[1]
    letters = re.findall(
        r"(?:[Aa]nswer(?: is)?:?|ANSWER:?|####)[ \t*$]{0,4}(?:\\(?:text|textbf|mathrm)\{|\\\()?\(?([A-Z])(?![A-Za-z])"
        r"([)*$} ]{0,4}(?:,|/|&|or|and) ?(?:or |and )?[(*$]{0,4}[A-HJ-Z](?![A-Za-z]))?",
        response,
    )
    return letters[-1][0] if letters and not letters[-1][1] else None


COMMAND = r"(?:\\(?:text|textbf|mathrm|mathbf|textit)\s*\{\s*)*"
BOXED_LETTER = re.compile(rf"\s*{COMMAND}(?:[Oo]ption |[Cc]hoice )?\(?([A-Z])\s*(?:[).:]|\}}*\s*$)")
ALONE = r"(?<![A-Za-z\\])[A-Z](?![A-Za-z])"
TWO_LETTERS = re.compile(rf"{ALONE}[).:}}\s]*(?:,|/|&|;|or\b|and\b).*{ALONE}|{ALONE}[):].*[;,]\s*\(?{ALONE}[):]")


def answer_line(response: str) -> str | None:
    """What follows "Answer:" in the last line that has it, as DAPO's prompts ask for."""
    lines = re.findall(r"(?im)^.*\banswer\s*:[*\s]*([^\n]+?)[*\s]*$", response)
    return lines[-1].strip() or None if lines else None


def any_answer(response: str) -> str | None:
    return puzzles.last_tag(response) or last_box(response)


def after_thinking(response: str) -> str:
    """The text after the last </think>; "" if it was opened again, or never closed (the prompt may have opened it)."""
    _, end, rest = response.rpartition("</think>")
    return rest if end and "<think>" not in rest else ""


EXTRACT = {"math": last_box, "math_dapo": answer_line, "gsm8k": after_hashes, "choice": choice_letter}
# What they look for in a response.
MARKS = {"math": r"\boxed{", "math_dapo": "Answer:", "gsm8k": "####", "countdown": "<answer>", "exact": "<answer>"}


def extract_answer(response: str, verifier: str = "math", *, thinking: bool = False) -> str | None:
    """The answer as the verifier reads it, for logs and majority votes. None if there is none."""
    return EXTRACT.get(verifier, any_answer)(after_thinking(response) if thinking else response)


def choice(response: str, answer: str) -> float:
    if not re.fullmatch(r"\(?[A-Z]\)?", answer):
        raise UserError(f"choice: answer {answer[:40]!r}, where one capital letter is needed")
    return float(choice_letter(response) == answer.strip("()"))


VERIFIERS: dict[str, Callable[[str, str], float | dict[str, float]]] = {
    "math": lambda response, answer: equal_now(last_box(response), answer),  # several boxes are not joined into a list
    "math_dapo": lambda response, answer: equal_now(answer_line(response), answer),
    "gsm8k": lambda response, answer: equal_now(after_hashes(response), answer),
    "choice": choice,
    "countdown": puzzles.countdown,
    "exact": lambda response, answer: float((any_answer(response) or response.strip()) == answer.strip()),
    "walk": puzzles.walk,
}


def score(
    responses: list[str],
    answers: list[str],
    verifiers: list[str] | None = None,
    *,
    timeout: float = 3.0,
    workers: int | None = None,
    budget: float = math.inf,
    thinking: bool = False,
) -> list[dict[str, float]]:
    """The components of each response's reward, in their order; {"correctness": 1.0} where a verifier gives a number.

    answers   the true ones, one per response; they may have LaTeX, $ and \\boxed{}
    verifiers names in VERIFIERS, or of users' functions as `assign` writes them, one per response; None: math for all
    timeout   seconds that a worker may have a core for one response; then it is killed, and the response scores 0
    workers   processes, at most (default: up to 4); started when first needed, kept between calls
    budget    seconds in workers for the whole batch; responses not reached by then score 0, and a line says how many
    thinking  a verifier gets only the text after the last </think>, and none if the thinking does not end
    Raises UserError if no worker can be started, or for a mistake in a user's own verifier.
    """
    components = [{"correctness": 0.0} for _ in responses]
    jobs: dict[tuple[str, str, str], list[int]] = {}  # for workers: (verifier, response, answer) -> response indices
    for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
        verifier = verifiers[i] if verifiers else "math"
        job = verifier, after_thinking(response) if thinking else response, answer
        if verifier in VERIFIERS:
            try:
                components[i] = as_components(VERIFIERS[verifier](*job[1:]), verifier)
                continue
            except Undecided as undecided:  # only math-verify can decide
                job = "math", *undecided.args
        jobs.setdefault(job, []).append(i)
    results = judge(list(jobs), timeout, workers or min(4, os.cpu_count() or 1), budget)
    for i, job in ((i, job) for job, indices in jobs.items() for i in indices):
        components[i] = results.get(job) or components[i]
    unread = sum(len(indices) for job, indices in jobs.items() if job not in results)
    late = sum(len(jobs[job]) for job, result in results.items() if result is None and job[0] != "math")
    for count, why in ((unread, f"unread: a batch has {budget:g} s"), (late, f"after {timeout:g} s, or a crash")):
        if count:
            messages.say(f"reward: {count} of {len(responses)} answers scored 0 {why}", warning=True)
    return components


# Takes problems and options of `score`. Scores groups of responses while others are still being sampled.
in_background = functools.partial(BackgroundScorer, score)


def with_rewards(rollout, components: list[list[dict[str, float]]], max_tokens: int, overlong: str):
    """The rollout with `components`, `correct` [B] and `rewards` [B]: the sum of the components and DAPO's penalty.
    components: of each prompt's responses, as a BackgroundScorer's `finish` returns them."""
    flat = list(itertools.chain(*components))
    pairs = zip(flat, rollout.lengths.tolist(), strict=True)
    rewards = [sum(each.values()) + overlong_penalty(length, max_tokens, overlong) for each, length in pairs]
    correct = torch.tensor([each["correctness"] >= 1 for each in flat], dtype=torch.bool)  # [B]
    return replace(rollout, components=flat, correct=correct, rewards=torch.tensor(rewards, dtype=torch.float64))


def unequal(rollout):
    """Whether the responses to each prompt differ in their rewards, without the penalty for length: bool [P]."""
    scores = torch.tensor([sum(each.values()) for each in rollout.components], dtype=torch.float64)  # [B]
    lowest, highest = rollout.by_group(scores).aminmax(dim=1)  # [P] each
    return highest - lowest > 1e-6


def overlong_penalty(length: int, max_length: int, overlong: str) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0], if `overlong` is a number of tokens."""
    excess = (max_length - int(overlong) - length) / int(overlong) if overlong.isdecimal() else 0.0
    return max(-1.0, min(0.0, excess))


def read_truth(answer: str) -> str | None:
    """A true answer as data sets have it: also a JSON list of texts, or a whole solution that ends in #### 7.

    None if no response could equal it: it is empty, has an extra brace, or is a proof.
    """
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(parts := json.loads(answer), list) and all(isinstance(part, str) for part in parts):
            answer = ", ".join(parts)
    answer = answer.rpartition("####")[2].strip()
    is_proof = re.fullmatch(r"\W*(?:text)?\W*(?:see )?(?:the )?proof\W*", answer, re.IGNORECASE)
    return answer if can_be_given(answer) and not is_proof else None


MATHEMATICAL = ("math", "math_dapo", "gsm8k")  # these compare values, and read the truth by `read_truth`
EVERY = ""  # stands for every source that has no entry of its own


def read_setting(rewards: str) -> dict[str, str]:
    """{source: verifier} from "source=verifier,source2=mine.py:score". An entry without a source is for all others."""
    chosen = {}
    for entry in filter(None, map(str.strip, rewards.split(","))):
        source, equals, verifier = entry.rpartition("=")
        source = source.strip() or EVERY
        if not verifier.strip() or (equals and source == EVERY):
            raise UserError(f"rewards: '{entry}', where source=verifier is needed, or a verifier for every source")
        if source in chosen:
            raise UserError(f"rewards: two verifiers for {f'source {source!r}' if source else 'every source'}")
        chosen[source] = verifier.strip()
    return chosen


def full_name(name: str, source: str) -> str:
    """A name in VERIFIERS, or <path of the user's file>:<function>. UserError for any other name."""
    path = file_of(name)
    if name not in VERIFIERS and not path:
        known = ", ".join([*VERIFIERS, "or mine.py:score, your own"])
        raise UserError(f"rewards: verifier '{name}' of source {source or '(any)'} is unknown; known: {known}")
    if path and not path.is_file():
        raise UserError(f"rewards: verifier {name}: there is no file {path}")
    return f"{path.resolve()}:{name.rpartition(':')[2]}" if path else name


def files(rewards: str) -> list[Path]:
    """The files of the user's own functions. UserError for what is wrong with `rewards` whatever the data are."""
    paths = (file_of(full_name(name, source)) for source, name in read_setting(rewards).items())
    return sorted(set(filter(None, paths)))


def with_verifier(problem, verifier: str):
    truth = read_truth(problem.answer) if verifier in MATHEMATICAL else problem.answer
    if truth is None:
        what = "no response could equal it; a value is needed, with as many closing braces as opening ones"
        raise UserError(f"answer {problem.answer[:60]!r} of source {problem.source}: {what}")
    return replace(problem, verifier=verifier, answer=truth)


def assign(rewards: str, *sets: list) -> tuple[str, list[list]]:
    """(a text with the verifier of each source; the sets of problems, each problem with its `verifier`).

    UserError, before the run starts, for an unknown source or verifier, for a function that cannot be imported or fails
    on an empty response, and for a true answer that its verifier cannot read, or that no response could give.
    """
    chosen, sources = read_setting(rewards), sorted({problem.source for problem in itertools.chain(*sets)})
    if unknown := sorted(chosen.keys() - {EVERY, *sources}):
        raise UserError(f"rewards: no problem has the source '{unknown[0]}'; the data's: {', '.join(sources)}")
    names = {}
    for source in sources:
        names[source] = chosen.get(source) or chosen.get(EVERY) or (source if source in VERIFIERS else "math")
        if not {source, EVERY} & chosen.keys() and source not in VERIFIERS and (lower := source.lower()) in VERIFIERS:
            known = f"'{lower}', which has a verifier; say --rewards {source}={lower}, or {source}=math"
            raise UserError(f"source '{source}' is not {known}")
    full = {source: full_name(name, source) for source, name in names.items()}
    assigned = [[with_verifier(problem, full[problem.source]) for problem in problems] for problems in sets]
    own = {p.verifier: (p.verifier, "", p.answer) for p in itertools.chain(*assigned) if p.verifier not in VERIFIERS}
    tried = judge(sorted(own.values()), timeout=3.0, num_workers=1, budget=60.0)
    if failed := [name for (name, *_), result in tried.items() if result is None]:
        raise UserError(f"verifier {failed[0]} takes over 3 s for an empty response, or ends its process")
    for problem in itertools.chain(*assigned):
        if problem.verifier in VERIFIERS:
            VERIFIERS[problem.verifier]("", problem.answer)
    return ", ".join(f"{source} by {name}" for source, name in names.items()), assigned
