r"""Rewards of responses. A problem's source chooses its verifier, unless the setting `rewards` names another:

    math            the last \boxed{} equals the answer; for all sources that have no verifier of their name
    gsm8k           the rest of the line after the last ####, or else the last box, equals the answer
    choice          the letter in the last box, or else after the last "answer is", "Answer:" or ####
    countdown       an expression in <answer></answer> that uses each number once and hits the target
    walk            lines of moves from a start to a target, each move and its result right
    exact           the last <answer></answer>, or else the last box, or else the whole response, equals the answer
    gym             reasoning-gym's own scorer, for sources gym/<task>; gym_partial keeps its partial credit
    mine.py:score   a function of your own. It and gym run in processes that are killed if they take too long

A verifier takes a response and the true answer. It returns a number, 1 for right and 0 for wrong, or named parts whose
sum is the reward, such as {"correctness": 1.0, "format": 0.1}: the response is right where `correctness` is 1 or more.
"""

import os
import re
from collections.abc import Callable

from ce_gppo import messages
from ce_gppo.messages import UserError
from ce_gppo.types import Problem, Response
from ce_gppo.verifier import countdown, custom, extract, walk
from ce_gppo.verifier.answers import Undecided, equal_now
from ce_gppo.verifier.background import BackgroundScorer
from ce_gppo.verifier.workers import judge


def math(response: str, answer: str) -> float:
    """Of several boxes only the last one counts; they are not joined into a list."""
    return equal_now(extract.last_box(response), answer)


def gsm8k(response: str, answer: str) -> float:
    return equal_now(extract.after_hashes(response), answer)


def choice(response: str, answer: str) -> float:
    if not re.fullmatch(r"\(?[A-Z]\)?", answer):
        raise UserError(f"choice: answer {answer[:40]!r}, where one capital letter is needed")
    return equal_now(extract.choice_letter(response), answer)


def exact(response: str, answer: str) -> float:
    return float((extract.any_answer(response) or response.strip()) == answer.strip())


VERIFIERS: dict[str, Callable[[str, str], float | dict[str, float]]] = {
    "math": math,
    "gsm8k": gsm8k,
    "choice": choice,
    "countdown": countdown.score,
    "exact": exact,
    "walk": walk.score,
}


def score(
    responses: list[str],
    answers: list[str],
    verifiers: list[str] | None = None,
    *,
    timeout: float = 3.0,
    workers: int | None = None,
    budget: float = 60.0,
    thinking: bool = False,
) -> list[dict[str, float]]:
    """The parts of each response's reward, in their order; {"correctness": 1.0} where a verifier returns a number.

    answers   the true ones, one per response; they may have LaTeX, $ and \\boxed{}
    verifiers names in VERIFIERS, or of verifiers in custom.py, one per response; None: math for all
    timeout   seconds that a worker may have a core for one response; then it is killed, and the response scores 0
    workers   processes, at most (default: up to 4); started when first needed, kept between calls
    budget    seconds in workers for the whole batch; responses not reached by then score 0, and a line says how many
    thinking  a verifier gets only the text after the last </think>, and none if the thinking does not end
    Raises ValueError if the lengths differ, RuntimeError if no worker can be started, UserError for a verifier of the
    user's own that raises or returns anything but numbers.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
    parts = [{"correctness": 0.0} for _ in responses]
    jobs: dict[tuple[str, str, str], list[int]] = {}  # for workers: (verifier, response, answer) -> response indices
    for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
        verifier = verifiers[i] if verifiers else "math"
        response = extract.after_thinking(response) if thinking else response
        job = verifier, response, answer
        if verifier in VERIFIERS:
            try:
                parts[i] = custom.as_parts(VERIFIERS[verifier](response, answer), verifier)
                continue
            except Undecided as undecided:  # only math-verify can decide
                job = "math", *undecided.args
        jobs.setdefault(job, []).append(i)
    verdicts = judge(list(jobs), timeout, workers or min(4, os.cpu_count() or 1), budget)
    unread = late = 0
    for job, indices in jobs.items():
        for i in indices:
            parts[i] = verdicts.get(job) or parts[i]
        unread += len(indices) * (job not in verdicts)
        late += len(indices) * (verdicts.get(job, {}) is None and job[0] != "math")
    for count, why in ((unread, f"unread: a batch has {budget:g} s"), (late, f"after {timeout:g} s, or a crash")):
        if count:
            messages.say(f"reward: {count} of {len(responses)} answers scored 0 {why}", warning=True)
    return parts


def in_background(problems: list[Problem], **options) -> BackgroundScorer:
    """Scores groups of responses to these problems while others are still being sampled. options: those of `score`."""
    return BackgroundScorer(score, problems, **options)


EXTRACT = {"math": extract.last_box, "gsm8k": extract.after_hashes, "choice": extract.choice_letter}


def extract_answer(response: str, verifier: str = "math", *, thinking: bool = False) -> str | None:
    """The answer as the verifier reads it, for logs and majority votes. None if there is none."""
    return EXTRACT.get(verifier, extract.any_answer)(extract.after_thinking(response) if thinking else response)


def set_rewards(
    groups: list[list[Response]], scores: list[list[dict[str, float]]], max_tokens: int, overlong: str
) -> None:
    """Set `parts`, `verdict` and `reward` of every response. The reward is the sum of the parts and DAPO's penalty."""
    for group, group_scores in zip(groups, scores, strict=True):
        for response, parts in zip(group, group_scores, strict=True):
            response.parts, response.verdict = parts, float(parts["correctness"] >= 1)
            penalty = overlong_penalty(len(response.response_ids), max_tokens, overlong)
            response.reward = sum(parts.values()) + penalty


def overlong_penalty(length: int, max_length: int, overlong: str) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0], if `overlong` is a number of tokens."""
    if not overlong.isdecimal():
        return 0.0
    return max(-1.0, min(0.0, (max_length - int(overlong) - length) / int(overlong)))
