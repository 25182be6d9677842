"""What people read: errors that are one sentence, messages of rank 0, and output streams that may be closed."""

import contextlib
import errno
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a full disk


class UserError(Exception):
    """A mistake of the user's. The message is one sentence: where the mistake is and what would be right."""


class RunEnded(Exception):
    """The run cannot continue. The message says why, and what to do."""


def exit_code(error: BaseException | None) -> int:
    """Of the process, and of its run in W&B: 0 if it is finished or was stopped, 2 for a user's mistake, else 1."""
    return 0 if error is None else 2 if isinstance(error, UserError) else 1


@contextlib.contextmanager
def explained(problem: str) -> Iterator[None]:
    """An unexpected error inside, as of a library given bad input, becomes a UserError: `problem`, error, traceback."""
    try:
        yield
    except (UserError, RunEnded):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:  # no mistake: config.command tells it
            raise
        try:
            with tempfile.NamedTemporaryFile("w", prefix="ce-gppo-", suffix=".txt", delete=False) as file:
                traceback.print_exception(error, file=file)
            where = f"{file.name} has the whole traceback"
        except OSError as unwritten:
            where = f"its traceback cannot be kept ({unwritten})"
        raise UserError(f"{problem}: {type(error).__name__}: {first_line(error)}; {where}") from error


def first_line(error: Exception) -> str:
    """The first line of a library's error; the second too, where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])[:300]


def say(message: str, warning: bool = False) -> None:
    """Print a message from rank 0; a warning goes to stderr. Output that cannot be written never ends a run."""
    stream = sys.stderr if warning else sys.stdout
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(RuntimeError), silenced(stream):  # in a signal handler, while the stream is being written
        print(f"WARNING: {message}" if warning else message, file=stream, flush=True)


@contextlib.contextmanager
def silenced(stream) -> Iterator[None]:
    """After a failure inside (a full disk, a closed pipe or terminal) the stream goes to /dev/null."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_streams() -> None:
    """Closed outputs (`2>&-`) become /dev/null. Otherwise the next file that is opened would get all printed text.

    Characters that a terminal's encoding lacks are printed as escapes.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is that of the closed stream
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
        if name != "stdin":
            with contextlib.suppress(OSError):  # if the stream was redirected after it was opened
                getattr(sys, name).reconfigure(errors="backslashreplace")


def flush_streams() -> None:
    """Called at the end: text that a library printed into a closed pipe must not make Python exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        with silenced(stream):
            stream.flush()


def nobody_reads() -> bool:
    """Whether the output is a pipe whose reader has gone, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are always reported
    return bool(poll.poll(0))
