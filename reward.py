r"""What a response is worth: 1.0 if the last \boxed{} of a response equals the true answer, else 0.0.

Three stages, each for what the one before leaves open:
 1. answers.py        strings, numbers, units, words, and the structure of sets, tuples, intervals, equations
 2. a cheap look      an answer that is too long, too deep, or a bomb such as 10^{10^{10}} scores 0
 3. workers.py        math-verify, in worker processes that are killed when they overrun
"""

import os
import queue
import re
import threading

from ce_gppo.types import Response
from ce_gppo.verifier.answers import Undecided, is_bomb, normalize, same, squeeze
from ce_gppo.verifier.workers import judge

MAX_CHARS = 300  # of an answer, unless the truth is long itself


def score(
    responses: list[str],
    answers: list[str],
    *,
    timeout: float = 3.0,
    workers: int | None = None,
    budget: float = 60.0,
    thinking: bool = False,
) -> list[float]:
    """1.0 or 0.0 for each response, in their order. `answers` are the true ones; LaTeX, $ and \\boxed{} are welcome.

    Of several boxes in a response only the last one counts; they are not joined into a list.

    timeout   seconds math-verify may take for one answer; then its worker is killed and the answer scores 0
    workers   processes for math-verify, at most (default: up to 4); started when first needed, kept between calls
    budget    seconds of math-verify for the whole batch; answers not reached by then score 0, and a line says how many
    thinking  count only what follows the last </think>; a response that is still thinking when it ends scores 0
    Raises ValueError if the lengths differ, RuntimeError if no worker can be started.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
    rewards = [0.0] * len(responses)
    undecided: dict[tuple[str, str], list[int]] = {}  # (answer, truth) -> which responses gave it
    for i, (response, truth) in enumerate(zip(responses, answers, strict=True)):
        answer = extract_answer(response, thinking=thinking)
        if answer is None or len(answer) > max(MAX_CHARS, 2 * len(truth)):
            continue
        pair = answer, truth = normalize(answer), normalize(extract_answer(truth) or truth)
        try:
            rewards[i] = float(squeeze(answer) == squeeze(truth) != "" or not is_bomb(answer) and same(answer, truth))
        except Undecided:
            undecided.setdefault(pair, []).append(i)
    verdicts = judge(list(undecided), timeout, workers or min(4, os.cpu_count() or 1), budget)
    for pair, indices in undecided.items():
        for i in indices:
            rewards[i] = float(verdicts.get(pair, False))
    if unread := sum(len(indices) for pair, indices in undecided.items() if pair not in verdicts):
        print(f"reward: WARNING: {unread} of {len(responses)} answers scored 0 unread, {budget:g} s a batch were over")
    return rewards


class BackgroundScorer:
    """`score` in a thread of its own, which scores each group while others are still being sampled.

    Groups that arrive while it is busy are scored as one batch: `budget` then bounds the wait for all of them.
    """

    def __init__(self, answers: list[str], **options):
        """answers: the true one of each group to come. options: the keyword arguments of `score`."""
        self.answers, self.options = answers, options
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.rewards: list[list[float]] = [[] for _ in answers]
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, index: int, group: list) -> None:
        """A group of responses, which have a `text`, to the problem of this index."""
        self.waiting.put((index, [response.text for response in group]))

    def finish(self) -> list[list[float]]:
        """The rewards of every group, once all are scored. Raises what `score` raised."""
        self.waiting.put(None)
        self.thread.join()
        if self.error:
            raise self.error
        return self.rewards

    def _work(self) -> None:
        last = False
        while not last:
            batch = [self.waiting.get()]
            while not self.waiting.empty():
                batch.append(self.waiting.get())
            last = None in batch
            batch = [item for item in batch if item is not None]
            texts = [text for _, group in batch for text in group]
            answers = [self.answers[index] for index, group in batch for _ in group]
            try:
                rewards = iter(score(texts, answers, **self.options))
            except Exception as error:
                self.error = error
                return
            for index, group in batch:
                self.rewards[index] = [next(rewards) for _ in group]


def extract_answer(response: str, *, thinking: bool = False) -> str | None:
    """The content of the last \\boxed{} or \\fbox{}; None if there is none, or it is empty, or it is never closed.

    With `thinking` only the text after the last </think> is searched, and none of it if <think> was opened again. No
    </think> at all is thinking cut short: the prompt may have opened it, as DeepSeek-R1's chat template does.
    """
    if thinking:
        _, end, response = response.rpartition("</think>")
        if not end or "<think>" in response:
            return None
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", response))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(response, start):  # \\. steps over escaped braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return response[start : brace.start()].strip() or None
    return None


def set_rewards(
    groups: list[list[Response]], verdicts: list[list[float]], max_tokens: int, overlong_buffer: int
) -> None:
    """Set `verdict` and `reward` of every response: the reward is the verdict, and DAPO's penalty for length if set."""
    for group, group_verdicts in zip(groups, verdicts, strict=True):
        for response, verdict in zip(group, group_verdicts, strict=True):
            response.verdict = verdict
            response.reward = verdict + overlong_penalty(len(response.response_ids), max_tokens, overlong_buffer)


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0]. Lengths in tokens; buffer 0: none."""
    if buffer == 0:
        return 0.0
    return max(-1.0, min(0.0, (max_length - buffer - length) / buffer))
