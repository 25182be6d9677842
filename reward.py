r"""The verifier: text in, number out. 1.0 if the last \boxed{} of a response equals the true answer, else 0.0.

Three stages, each for what the one before leaves open:
 1. answers.py        strings, numbers, units, words, and the structure of sets, tuples, intervals, equations
 2. a cheap look      what is too long, too deep, or a bomb such as 10^{10^{10}} scores 0
 3. math-verify       in worker processes that are killed when they overrun: its own time limit is signal.alarm, which
                      fails outside the main thread and does not interrupt C (Math-Verify#50, #55)
"""

import atexit
import json
import logging
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from multiprocessing.connection import wait

from answers import Undecided, is_bomb, normalize, same, squeeze

MAX_CHARS = 300  # of an answer, unless the truth is long itself
MAX_MEMORY = 4 * 2**30  # bytes of address space per worker
MAX_CACHED = 100_000  # verdicts
STARTUP_SECONDS = 60.0  # a worker needs about 1 s on an idle machine


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

    Of several boxes in a response the last one counts, alone: they are not joined into a list.

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
    """`score` in a thread of its own: answers are given to it as they come, while others are still being sampled.

    What has arrived while it was busy is scored as one batch, so that `budget` bounds the wait, not each addition.
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
    """What the last \\boxed{} or \\fbox{} holds; None if there is none, or it is empty, or it is never closed.

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


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0]. Lengths in tokens; buffer 0: none."""
    if buffer == 0:
        return 0.0
    return max(-1.0, min(0.0, (max_length - buffer - length) / buffer))


# ----------------------------------------------------------------------------------------------------------------------
# math-verify in processes that can be killed


class Worker:
    """This file as a child process that answers JSON lines. Not multiprocessing: fork would copy a process full of CUDA
    threads, and spawn would import the trainer's __main__ again."""

    process: subprocess.Popen | None = None

    def start(self):
        if self.process and self.process.poll() is None:
            return
        for _ in range(3):
            self.kill()
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__)],
                bufsize=0,
                stdin=subprocess.PIPE,  # ends when we end, however we end, and the worker with it
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for us alone
            )
            if self.read(STARTUP_SECONDS) == b"ready\n":
                return
        raise RuntimeError(f"the math-verify worker does not start; `{sys.executable} {__file__}` shows why")

    def read(self, timeout: float) -> bytes | None:
        """The next line; b"" if the worker has died, None if it took more than `timeout` seconds."""
        return self.process.stdout.readline() if wait([self.process.stdout], timeout) else None

    def ask(self, pair: tuple[str, str], timeout: float) -> bool:
        for _ in range(2):  # what killed the worker may have been somebody else, not this answer
            self.start()
            try:
                self.process.stdin.write(json.dumps([*pair, timeout]).encode() + b"\n")
                reply = self.read(timeout)
            except BrokenPipeError:
                reply = b""
            if reply:
                return json.loads(reply)
            self.kill()
            if reply is None:
                break
        return False

    def kill(self):
        if self.process:
            with self.process:  # closes the pipes, and waits
                self.process.kill()
            self.process = None


_workers: list[Worker] = []
_cache: dict[tuple[str, str], bool] = {}  # the least recently used first
_lock = threading.Lock()
os.register_at_fork(after_in_child=_workers.clear)  # a forked child must not talk to its parent's workers


@atexit.register
def _stop_workers():
    for worker in _workers:
        worker.kill()


def judge(pairs: list[tuple[str, str]], timeout: float, num_workers: int, budget: float) -> dict[tuple[str, str], bool]:
    """math-verify's verdicts on distinct (answer, truth) pairs; a pair that the budget left no time for is missing."""
    with _lock:
        verdicts = {pair: _cache.pop(pair) for pair in pairs if pair in _cache}
        waiting = [pair for pair in pairs if pair not in verdicts]
        waiting.sort(key=lambda pair: -abs(len(pair[0]) - len(pair[1])))  # first popped: what looks like its truth

        def work(worker: Worker):
            worker.start()
            end = time.monotonic() + budget
            while waiting and time.monotonic() < end:
                try:
                    pair = waiting.pop()
                except IndexError:  # another thread was faster
                    return
                verdicts[pair] = worker.ask(pair, timeout)

        num_workers = min(num_workers, len(waiting))
        _workers.extend(Worker() for _ in range(num_workers - len(_workers)))
        if waiting:
            with ThreadPoolExecutor(num_workers) as threads:
                try:
                    list(threads.map(work, _workers[:num_workers]))
                finally:
                    waiting.clear()  # after an exception too: no thread may go on
        _cache.update(verdicts)
        for pair in list(_cache)[: max(0, len(_cache) - MAX_CACHED)]:
            del _cache[pair]
        return verdicts


def sympy_equal(answer: str, truth: str) -> bool:
    r"""math-verify on two scalars. Only in a worker.

    Its pitfalls, and what is done: it compares floats to 6 places and drops small differences (decimals are made
    fractions, exact.py compares); it strips one-letter variables as units, takes any number out of what it cannot
    parse, and compares the raw strings then (all off); it does not know the imaginary unit i, and
    reads I^2 as I; it drops primes and the base of 101_2.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    import exact

    if answer.count("'") != truth.count("'") or re.search(r"\d_", f"{answer} {truth}"):
        return False
    normalization = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    parsed = []
    for text in (truth, answer):
        text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(r"\d*\.\d+", lambda m: "{{\\frac{{{}}}{{{}}}}}".format(*Fraction(m[0]).as_integer_ratio()), text)
        text = re.sub(r"(\d+)\s*\^\\circ", r"{\\frac{\1\\pi}{180}}", text)
        if not re.search(r"\\(?:sum|prod)|_\{?i", text):
            text = re.sub(r"(?<![\\a-zA-Z])i(?![a-zA-Z])", r"{\\sqrt{-1}}", text)
        modes = {"fallback_mode": "no_fallback", "extraction_mode": "first_match"}
        parsed.append(parse(f"${text}$", [config], parsing_timeout=None, **modes))
    gold, target = parsed
    return bool(gold and target and exact.equal(gold[0], target[0]))


def serve():
    """The worker's side: one "ready", then a JSON verdict for each JSON line [answer, truth, seconds]."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may pass for a reply
    logging.disable()
    assert sympy_equal(r"\frac{\sqrt{2}}{2}+x^{2}", r"x^2+\frac{1}{\sqrt{2}}")  # imports sympy, warms up the parser
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, truth, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # should our parent be gone, the kernel ends us
        try:
            verdict = same(answer, truth, sympy_equal)
        except Exception:  # sympy raises what it likes: here it means "not equal"
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    serve()
