"""Processes that can be killed, for verifiers that may hang; and a thread that scores while others are being sampled.

math-verify hangs on some answers, and a user's own function may. math-verify's time limit does not help: signal.alarm
fails outside the main thread, and does not interrupt C (Math-Verify#50, #55).
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from ce_gppo.messages import UserError
from ce_gppo.verifier import outside
from ce_gppo.verifier.answers import same

MAX_MEMORY = 4 * 2**30  # bytes of address space per worker
MAX_CACHED = 100_000  # results
PATIENCE = 10  # times its limit, at most, that a worker has on a busy machine
STARTUP_SECONDS = 60.0  # a worker needs about 1 s on an idle machine, most of it for sympy
MATH = "math"  # the name for math-verify; all other names are those of outside.load

Job = tuple[str, str, str]  # verifier, response (of math only its answer), true answer
Components = dict[str, float]
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

    def ask(self, job: Job, timeout: float) -> Components | None:
        """What the job's verifier gives. None if it takes more than `timeout` seconds, or crashes twice.

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

    def request(self, line: list, timeout: float) -> tuple[bool, Components | None]:
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
_cache: dict[Job, Components | None] = {}  # math-verify's, the least recently used first
_lock = threading.Lock()
os.register_at_fork(after_in_child=_workers.clear)  # a forked child must not talk to its parent's workers


@atexit.register
def _stop_workers():
    for worker in _workers:
        worker.kill()


def judge(jobs: list[Job], timeout: float, num_workers: int, budget: float) -> dict[Job, Components | None]:
    """The results of distinct jobs. None, which counts as wrong, if a verifier took too long or crashed.

    Jobs that were not reached within `budget` seconds are missing. UserError for a mistake in a user's verifier.
    """
    with _lock:
        results = {job: _cache.pop(job) for job in jobs if job in _cache}
        waiting = [job for job in jobs if job not in results]
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
                results[job] = worker.ask(job, timeout)

        num_workers = min(num_workers, len(waiting))
        _workers.extend(Worker() for _ in range(num_workers - len(_workers)))
        if waiting:
            with ThreadPoolExecutor(num_workers) as threads:
                try:
                    list(threads.map(work, _workers[:num_workers]))
                finally:
                    waiting.clear()  # also after an exception, so that no thread continues
        _cache.update({job: result for job, result in results.items() if job[0] == MATH})  # other jobs are too large
        for job in list(_cache)[: max(0, len(_cache) - MAX_CACHED)]:
            del _cache[job]
        return results


class BackgroundScorer:
    """`reward.score` in a thread. Groups of responses that arrive while it is busy are scored as one batch."""

    def __init__(self, score: Callable, problems: list, **options):
        """problems: one for each group to come, with `answer` and `verifier`. options: keyword arguments of `score`."""
        self.score, self.problems, self.options = score, problems, options
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.components: list[list[Components]] = [[] for _ in problems]
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, index: int, texts: list[str]) -> None:
        """A group of responses to the problem of this index."""
        self.waiting.put((index, texts))

    def finish(self) -> list[list[Components]]:
        """Wait, and return what each group's responses got. Raises the error that `score` raised, if any."""
        self.waiting.put(None)
        self.thread.join()
        if self.error:
            raise self.error
        return self.components

    def _work(self) -> None:
        last = False
        while not last and not self.error:
            groups = [self.waiting.get()]
            while not self.waiting.empty():
                groups.append(self.waiting.get())
            last = groups[-1] is None
            responses = [(index, text) for index, texts in filter(None, groups) for text in texts]
            problems = [self.problems[index] for index, _ in responses]
            answers, verifiers = [p.answer for p in problems], [p.verifier for p in problems]
            try:
                scores = self.score([text for _, text in responses], answers, verifiers, **self.options)
                for (index, _), components in zip(responses, scores, strict=True):
                    self.components[index].append(components)
            except Exception as error:
                self.error = error


def serve():
    """The worker's side: one "ready", then a JSON reply for each JSON line [verifier, response, answer, seconds].

    Without a response it only imports the verifier. A reply is the components, or a sentence about what is wrong.
    """
    for what, most in ((resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_CORE, 0)):
        allowed = resource.getrlimit(what)[1]
        resource.setrlimit(what, 2 * (most if allowed == resource.RLIM_INFINITY else min(most, allowed),))
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


def answer_to(verifier: str, response: str | None, answer: str) -> Components | str:
    if verifier == MATH and response is None:  # imports sympy, prepares the parser
        outside.math_verify(r"\frac{\sqrt{2}}{2}+x^{2}", r"x^2+\frac{1}{\sqrt{2}}")
        return {}
    if verifier == MATH:
        try:
            return {"correctness": float(same(response, answer, outside.math_verify))}
        except Exception:  # sympy can raise any error: the answers then count as different
            return {"correctness": 0.0}
    try:
        if response is not None:
            return outside.call(verifier, response, answer)
        outside.load(verifier)
        return {}
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    serve()
