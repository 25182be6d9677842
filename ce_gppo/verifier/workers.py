r"""Processes that can be killed, for what may hang or crash: math-verify, and a user's own function mine.py:score.

math-verify hangs on some answers. Its own time limit does not help: signal.alarm fails outside the main thread, and
does not interrupt C (Math-Verify#50, #55).
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from ce_gppo.messages import UserError, first_line
from ce_gppo.verifier.answers import math_verify, same

MAX_MEMORY = 4 * 2**30  # bytes of address space per worker
MAX_CACHED = 100_000  # results
PATIENCE = 10  # times its limit, at most, that a worker has on a busy machine
MAX_REWARD = 1e6  # far larger ones would not be finite in float32, and the fault would seem to be lr's
STARTUP_SECONDS = 60.0  # a worker needs about 1 s on an idle machine, most of it for sympy
MATH = "math"  # the name for math-verify; all other names are those of `load`

Job = tuple[str, str, str]  # verifier, response (of math only its answer), true answer
Components = dict[str, float]
COMMAND = [sys.executable, "-m", "ce_gppo.verifier.workers"]


class Worker:
    """This file as a child process that answers JSON lines. Not multiprocessing: fork would copy a process full of CUDA
    threads, and spawn would import the trainer's __main__ again."""

    process: subprocess.Popen | None = None
    loaded: set[str] = frozenset()  # verifiers that this process has imported

    def start(self, verifier: str) -> None:
        """Start the process and import this verifier there, which may take longer than to score. UserError if not."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        for _ in range(2):
            if self.process is None or self.process.poll() is not None:
                self.kill()
                # It ends when its stdin closes, which this process's end does. Ctrl-C is meant for this process only.
                folder, self.loaded = Path(__file__).parents[2], set()
                self.process = subprocess.Popen(COMMAND, cwd=folder, bufsize=0, start_new_session=True, **pipes)
            if verifier in self.loaded or self.request([verifier, None, "", STARTUP_SECONDS], STARTUP_SECONDS):
                self.loaded.add(verifier)
                return
        why = f"its process does not start, or its import crashes or takes over {STARTUP_SECONDS:g} s"
        raise UserError(f"verifier {verifier}: {why}; `{' '.join(COMMAND)}` must start and wait")

    def ask(self, job: Job, timeout: float) -> Components | None:
        """What the job's verifier gives. None if it takes more than `timeout` seconds, or crashes twice."""
        for _ in range(2):  # perhaps something else than this answer killed the worker
            self.start(job[0])
            if (reply := self.request([*job, timeout], timeout)) != {}:
                return reply
        return None

    def request(self, line: list, timeout: float) -> Components | None:
        """The reply; {} if the worker died; None after `timeout` seconds. UserError for a user's mistake."""
        try:
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            reply = self.read(timeout)
        except BrokenPipeError:
            reply = b""
        if not reply:
            self.kill()
            return None if reply is None else {}
        reply = json.loads(reply)
        if isinstance(reply, str):
            raise UserError(reply)
        return reply

    def read(self, timeout: float) -> bytes | None:
        """The next line; b"" if the worker has died, None if it took more than `timeout` seconds. The time in which
        it waits for a core does not count: a busy machine would make right answers wrong."""
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

    def kill(self):
        if self.process:
            with self.process, contextlib.suppress(ProcessLookupError):  # closes the pipes, and waits
                os.killpg(self.process.pid, signal.SIGKILL)  # with all processes that a verifier has started
            self.process = None


_workers: list[Worker] = []
_cache: dict[Job, Components | None] = {}  # math-verify's; those of other verifiers have whole responses
_lock = threading.Lock()
os.register_at_fork(after_in_child=_workers.clear)  # a forked child must not talk to its parent's workers


@atexit.register
def _stop_workers():
    for worker in _workers:
        worker.kill()


def judge(jobs: list[Job], timeout: float, num_workers: int, budget: float) -> dict[Job, Components | None]:
    """The results of distinct jobs: None, which counts as wrong, if a verifier took too long or crashed; none of jobs
    that were not reached within `budget` seconds. UserError for a mistake in a user's verifier."""
    with _lock:
        results = {job: _cache[job] for job in jobs if job in _cache}
        missing = [job for job in jobs if job not in results]
        missing.sort(key=lambda job: abs(len(job[1]) - len(job[2])))  # first: as long as the true answer
        waiting = iter(missing)  # for all threads

        def work(worker: Worker):
            for verifier in sorted({job[0] for job in missing}):
                worker.start(verifier)
            end = time.monotonic() + budget
            for job in waiting:
                if time.monotonic() >= end:
                    return
                results[job] = worker.ask(job, timeout)

        num_workers = min(num_workers, len(missing))
        _workers.extend(Worker() for _ in range(num_workers - len(_workers)))
        if missing:
            with ThreadPoolExecutor(num_workers) as threads:
                try:
                    list(threads.map(work, _workers[:num_workers]))
                finally:
                    list(waiting)  # also after an exception, so that no thread continues
        if len(_cache) > MAX_CACHED:
            _cache.clear()
        _cache.update({job: result for job, result in results.items() if job[0] == MATH})
        return results


class BackgroundScorer:
    """`reward.score` in a thread. Groups of responses that arrive while it is busy are scored as one batch."""

    def __init__(self, score: Callable, problems: list, **options):
        """problems: one for each group to come, with `answer` and `verifier`. options: keyword arguments of `score`."""
        self.score, self.problems = functools.partial(score, **options), problems
        self.components: list[list[Components]] = [[] for _ in problems]
        self.waiting: deque[tuple[int, str]] = deque()
        self.thread, self.batches = ThreadPoolExecutor(1), []

    def add(self, index: int, texts: list[str]) -> None:
        """A group of responses to the problem of this index."""
        self.waiting.extend((index, text) for text in texts)
        self.batches.append(self.thread.submit(self._score_waiting))

    def finish(self) -> list[list[Components]]:
        """Wait, and return what each group's responses got. Raises the error that `score` raised, if any."""
        self.thread.shutdown()
        for batch in self.batches:
            batch.result()
        return self.components

    def _score_waiting(self) -> None:
        batch = [self.waiting.popleft() for _ in range(len(self.waiting))]
        problems = [self.problems[index] for index, _ in batch]
        answers, verifiers = [p.answer for p in problems], [p.verifier for p in problems]
        scores = self.score([text for _, text in batch], answers, verifiers)
        for (index, _), components in zip(batch, scores, strict=True):
            self.components[index].append(components)


# ----------------------------------------------------------------------------------------------------------------------
# The worker's side


def serve():
    """A JSON reply for each JSON line [verifier, response, answer, seconds]: the components, or a sentence about what
    is wrong. Without a response the verifier is only imported."""
    for what, most in ((resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_CORE, 0)):
        allowed = resource.getrlimit(what)[1]
        resource.setrlimit(what, 2 * (most if allowed == resource.RLIM_INFINITY else min(most, allowed),))
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # so that a library cannot read requests
    os.dup2(nothing, 1)  # or print into the replies
    logging.disable()
    for line in requests:
        verifier, response, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds + 1)  # the kernel ends it if no parent does
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds + 1)
        try:
            reply = math_components(response, answer) if verifier == MATH else call(verifier, response, answer)
        except UserError as error:
            reply = str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def math_components(response: str | None, answer: str) -> Components:
    if response is None:  # imports sympy, prepares the parser
        response, answer = r"\frac{\sqrt{2}}{2}+x^{2}", r"x^2+\frac{1}{\sqrt{2}}"
    try:
        return {"correctness": float(same(response, answer, math_verify))}
    except Exception:  # sympy can raise any error: the answers then count as different
        return {"correctness": 0.0}


def file_of(verifier: str) -> Path | None:
    """mine.py of mine.py:score; None for the name of a verifier."""
    path, _, function = verifier.rpartition(":")
    return Path(path) if path.endswith(".py") and function.isidentifier() else None


@functools.cache
def load(verifier: str) -> Callable:
    """The function of /path/mine.py:score. UserError if the file or the function is missing."""
    path, name = file_of(verifier), verifier.rpartition(":")[2]
    # The files beside it hide no library, and this program's files (reward.py, loss.py) do not hide them.
    program = [folder for folder in sys.path if Path(folder, "ce_gppo").is_dir()]
    sys.path[:] = [folder for folder in sys.path if folder not in program] + [str(path.parent), *program]
    try:
        spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"verifier {verifier}: {path} cannot be imported: {told(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"verifier {verifier}: {path} has no function {name}; it has: {', '.join(functions) or 'none'}")
    return function


def call(verifier: str, response: str | None, answer: str) -> Components:
    """The components that a user's function returns. UserError if it raises, or returns anything else."""
    function = load(verifier)
    try:
        return as_components(0.0 if response is None else function(response, answer), verifier)
    except (MemoryError, RecursionError, UserError):  # a hostile response can cause the first two; they end the worker
        raise
    except (Exception, SystemExit) as error:
        what = told(error, file_of(verifier))
        raise UserError(f"verifier {verifier} raised {what}; a wrong response should be 0, not an error") from None


def told(error: BaseException, path: Path) -> str:
    """An error as one line of text, with the number of the last line of the user's file in its traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    lines = lines or [error.lineno] if isinstance(error, SyntaxError) else lines
    return f"{type(error).__name__}: {first_line(error)}" + (f" (line {lines[-1]})" if lines else "")


def as_components(value, verifier: str) -> Components:
    """A verifier's result as named components; a number becomes `correctness`. UserError for any other result."""
    components = value if isinstance(value, dict) else {"correctness": value}
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        numbers = {name: float(number) for name, number in components.items() if not isinstance(number, str)}
        named = all(isinstance(name, str) and name.isprintable() and name not in ("", "mean") for name in components)
        complete = "correctness" in numbers and len(numbers) == len(components)
        if named and complete and all(abs(number) <= MAX_REWARD for number in numbers.values()):
            return numbers
    needed = f"a number is needed, at most {MAX_REWARD:g} in size, or a dictionary of numbers by name"
    needed += ", 'correctness' among them ('mean' is taken)"
    raise UserError(f"verifier {verifier} returned {repr(value)[:80]}; {needed}")


if __name__ == "__main__":
    serve()
