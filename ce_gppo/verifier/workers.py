"""Processes, which can be killed, for verifiers that may hang: math-verify, users' own functions and reasoning-gym.

math-verify hangs on some answers. Its own time limit does not help: signal.alarm fails outside the main thread, and
does not interrupt C (Math-Verify#50, #55).
"""

import atexit
import contextlib
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

from ce_gppo.messages import UserError
from ce_gppo.verifier import custom
from ce_gppo.verifier.answers import same

MAX_MEMORY = 4 * 2**30  # bytes of address space per worker
MAX_CACHED = 100_000  # verdicts
PATIENCE = 10  # times its limit, at most, that a worker has on a busy machine
STARTUP_SECONDS = 60.0  # a worker needs about 1 s on an idle machine, most of it for sympy
MATH = "math"  # the name for math-verify; all other names are those of custom.load

Job = tuple[str, str, str]  # verifier, response (of math only its answer), true answer
Parts = dict[str, float]
COMMAND = [sys.executable, "-m", "ce_gppo.verifier.workers"]


class Worker:
    """This file as a child process that answers JSON lines. Not multiprocessing: fork would copy a process full of CUDA
    threads, and spawn would import the trainer's __main__ again."""

    process: subprocess.Popen | None = None
    loaded: set[str] = frozenset()  # verifiers that this process has imported

    def start(self):
        if self.process and self.process.poll() is None:
            return
        for _ in range(3):
            self.kill()
            self.loaded = set()
            self.process = subprocess.Popen(
                COMMAND,
                cwd=Path(__file__).parents[2],
                bufsize=0,
                stdin=subprocess.PIPE,  # closes when this process ends in any way, and the worker then ends
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the main process only
            )
            if self.read(STARTUP_SECONDS) == b"ready\n":
                return
        raise RuntimeError(f"the verifiers' worker does not start; `{' '.join(COMMAND)}` shows why")

    def read(self, timeout: float) -> bytes | None:
        """The next line; b"" if the worker has died, None if it took more than `timeout` seconds.

        The time in which it waits for a core does not count: a busy machine would make right answers wrong.
        """
        began, _ = self.usage()
        for _ in range(PATIENCE):
            if wait([self.process.stdout], timeout):
                return self.process.stdout.readline()
            used, is_running = self.usage()
            if not is_running or used - began > 0.8 * timeout:
                break
        return None

    def usage(self) -> tuple[float, bool]:
        """(seconds of a core that the worker has had, whether it computes or waits for a core)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] == "R"

    def ask(self, job: Job, timeout: float) -> Parts | None:
        """The parts that the job's verifier gives. None if it takes more than `timeout` seconds, or crashes twice.

        UserError for a mistake in a user's verifier.
        """
        for _ in range(2):  # perhaps something else than this answer killed the worker
            self.load(job[0])
            died, reply = self.request([*job, timeout], timeout)
            if not died:
                return reply
        return None

    def load(self, verifier: str) -> None:
        """Start, and import this verifier, which may take longer than to score a response. UserError if that fails."""
        for _ in range(2):  # as in `ask`
            self.start()
            if verifier in self.loaded:
                return
            died, reply = self.request([verifier, None, None, STARTUP_SECONDS], STARTUP_SECONDS)
            if not died:
                break
        if reply is None:
            raise UserError(f"verifier {verifier}: its import crashes, or takes over {STARTUP_SECONDS:g} s")
        self.loaded.add(verifier)

    def request(self, line: list, timeout: float) -> tuple[bool, Parts | None]:
        """(whether the worker died, its reply). After `timeout` seconds it is killed, and the reply is None."""
        try:
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            reply = self.read(timeout)
        except BrokenPipeError:
            reply = b""
        if not reply:
            self.kill()
            return reply is not None, None
        reply = json.loads(reply)
        if isinstance(reply, str):
            raise UserError(reply)
        return False, reply

    def kill(self):
        if self.process:
            with self.process, contextlib.suppress(ProcessLookupError):  # closes the pipes, and waits
                os.killpg(self.process.pid, signal.SIGKILL)  # with all processes that a verifier has started
            self.process = None


_workers: list[Worker] = []
_cache: dict[Job, Parts | None] = {}  # math-verify's, the least recently used first
_lock = threading.Lock()
os.register_at_fork(after_in_child=_workers.clear)  # a forked child must not talk to its parent's workers


@atexit.register
def _stop_workers():
    for worker in _workers:
        worker.kill()


def check(verifiers: set[str]) -> None:
    """UserError for a verifier that cannot be imported."""
    with _lock:
        if verifiers and not _workers:
            _workers.append(Worker())
        for verifier in sorted(verifiers):
            _workers[0].load(verifier)


def judge(jobs: list[Job], timeout: float, num_workers: int, budget: float) -> dict[Job, Parts | None]:
    """The verdicts on distinct jobs. None, which counts as wrong, if a verifier took too long or crashed.

    Jobs that were not reached within the budget are missing. UserError for a mistake in a user's verifier.
    """
    with _lock:
        verdicts = {job: _cache.pop(job) for job in jobs if job in _cache}
        waiting = [job for job in jobs if job not in verdicts]
        waiting.sort(key=lambda job: -abs(len(job[1]) - len(job[2])))  # popped first: lengths like the true answer's

        verifiers = sorted({job[0] for job in waiting})

        def work(worker: Worker):
            for verifier in verifiers:
                worker.load(verifier)
            end = time.monotonic() + budget
            while waiting and time.monotonic() < end:
                try:
                    job = waiting.pop()
                except IndexError:  # another thread was faster
                    return
                verdicts[job] = worker.ask(job, timeout)

        num_workers = min(num_workers, len(waiting))
        _workers.extend(Worker() for _ in range(num_workers - len(_workers)))
        if waiting:
            with ThreadPoolExecutor(num_workers) as threads:
                try:
                    list(threads.map(work, _workers[:num_workers]))
                finally:
                    waiting.clear()  # also after an exception, so that no thread continues
        _cache.update({job: parts for job, parts in verdicts.items() if job[0] == MATH})  # other jobs are too large
        for job in list(_cache)[: max(0, len(_cache) - MAX_CACHED)]:
            del _cache[job]
        return verdicts


def sympy_equal(answer: str, truth: str) -> bool:
    r"""math-verify on two scalars. Only in a worker.

    Its pitfalls, and in brackets the remedies: it compares floats to 6 places and drops small differences (decimals
    become fractions, and exact.py compares). It strips one-letter variables as units, takes any number out of text that
    it cannot parse, and then compares the raw strings (all turned off). It has no imaginary unit i, and reads I^2 as I
    (i becomes the root of -1). It adds up numbers side by side (exact.py multiplies them). It drops primes and the base
    of 101_2 (such answers count as different).
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
    """The worker's side: one "ready", then a JSON reply for each JSON line [verifier, response, answer, seconds].

    Without a response it only imports the verifier. A reply is the parts, or a sentence about what is wrong.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # so that a library cannot read requests or print into the replies
        os.dup2(nothing, stream)
    logging.disable()
    print("ready", file=replies, flush=True)
    for line in requests:
        verifier, response, answer, seconds = json.loads(line)
        limit(seconds)
        reply = answer_to(verifier, response, answer)
        limit(0)
        print(json.dumps(reply), file=replies, flush=True)


def limit(seconds: float) -> None:
    """Without a parent to kill it, the kernel ends this process. 0: it does not."""
    signal.setitimer(signal.ITIMER_PROF, seconds and 2 * seconds + 1)  # of a core
    signal.setitimer(signal.ITIMER_REAL, seconds and PATIENCE * seconds + 1)


def answer_to(verifier: str, response: str | None, answer: str) -> Parts | str:
    if verifier == MATH and response is None:  # imports sympy, prepares the parser
        sympy_equal(r"\frac{\sqrt{2}}{2}+x^{2}", r"x^2+\frac{1}{\sqrt{2}}")
        return {}
    if verifier == MATH:
        try:
            return {"correctness": float(same(response, answer, sympy_equal))}
        except Exception:  # sympy can raise any error: the answers then count as different
            return {"correctness": 0.0}
    try:
        if response is not None:
            return custom.call(verifier, response, answer)
        custom.load(verifier)
        return {}
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    serve()
