"""math-verify in processes that can be killed: it hangs on some answers, and its own time limit does not help.

That limit is signal.alarm, which fails outside the main thread and does not interrupt C (Math-Verify#50, #55).
"""

import atexit
import json
import logging
import os
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
from pathlib import Path

from ce_gppo.verifier.answers import same

MAX_MEMORY = 4 * 2**30  # bytes of address space per worker
MAX_CACHED = 100_000  # verdicts
STARTUP_SECONDS = 60.0  # a worker needs about 1 s on an idle machine
COMMAND = [sys.executable, "-m", "ce_gppo.verifier.workers"]


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
                COMMAND,
                cwd=Path(__file__).parents[2],
                bufsize=0,
                stdin=subprocess.PIPE,  # ends when we end, however we end, and the worker with it
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the main process only
            )
            if self.read(STARTUP_SECONDS) == b"ready\n":
                return
        raise RuntimeError(f"the math-verify worker does not start; `{' '.join(COMMAND)}` shows why")

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

    Its pitfalls, and the remedies: it compares floats to 6 places and drops small differences (decimals become
    fractions, and exact.py compares). It strips one-letter variables as units, takes any number out of text that it
    cannot parse, and then compares the raw strings (all off). It has no imaginary unit i, and reads I^2 as I (i becomes
    the root of -1). It drops primes and the base of 101_2 (such answers are not equal).
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    from ce_gppo.verifier import exact  # here, as it imports sympy

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
