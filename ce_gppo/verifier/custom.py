"""Verifiers that may hang or break: functions of the user's own, `mine.py:score`, and the scorers of reasoning-gym.

They run only in worker processes.
"""

import contextlib
import functools
import importlib.util
import math
import modulefinder
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ce_gppo.messages import UserError
from ce_gppo.verifier import gym


def as_parts(value, verifier: str) -> dict[str, float]:
    """A verifier's result as named parts; a number becomes `correctness`. UserError for any other result."""
    parts = value if isinstance(value, dict) else {"correctness": value}
    try:
        numbers = {name: float(part) for name, part in parts.items() if not isinstance(part, str)}
    except (TypeError, ValueError, OverflowError):
        numbers = {}
    named = all(isinstance(name, str) and name.isprintable() and name not in ("", "mean") for name in parts)
    if "correctness" in parts and named and len(numbers) == len(parts) and all(map(math.isfinite, numbers.values())):
        return numbers
    raise UserError(
        f"verifier {verifier} returned {repr(value)[:80]}; a number is needed, or a dictionary of numbers by name with "
        "'correctness' among them ('mean' is taken)"
    )


def file_of(verifier: str) -> Path | None:
    """mine.py of mine.py:score; None for the name of a verifier."""
    path, _, function = verifier.rpartition(":")
    return Path(path) if path.endswith(".py") and function.isidentifier() else None


def neighbours(path: Path) -> set[Path]:
    """The files in the folder of a user's file that it imports, and that these import. Nothing is run."""
    finder = modulefinder.ModuleFinder([str(path.parent)])
    with contextlib.suppress(OSError, SyntaxError, ValueError):  # `load` says what is wrong with the file
        finder.load_file(str(path))
    return {Path(module.__file__) for module in finder.modules.values() if module.__file__}


@functools.cache
def load(verifier: str) -> Callable:
    """The function of /path/mine.py:score, or of gym/<task>. UserError where the file or the function is missing."""
    if verifier.startswith(gym.KINDS):
        return gym.scorer(verifier)
    path, name = file_of(verifier), verifier.rpartition(":")[2]
    if not path.is_file():
        raise UserError(f"verifier {verifier}: there is no file {path}")
    sys.path.append(str(path.parent))  # for imports of files beside it; at the end, so that these hide no library
    spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"verifier {verifier}: {path} cannot be imported: {told(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"verifier {verifier}: {path} has no function {name}; it has: {', '.join(functions) or 'none'}")
    return function


def call(verifier: str, response: str, answer: str) -> dict[str, float]:
    """The parts that a user's function returns. UserError if it raises, or returns anything else."""
    function = load(verifier)
    try:
        value = function(response, answer)
    except (MemoryError, RecursionError, UserError):  # a hostile response can cause the first two; they end the worker
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"verifier {verifier} raised {told(error, file_of(verifier))}; a wrong response should be 0, not an error"
        ) from None
    return as_parts(value, verifier)


def told(error: BaseException, path: Path) -> str:
    """An error as one line of text, with the number of the last line of the user's file in its traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}{': ' if text else ''}{text}" + (f" (line {lines[-1]})" if lines else "")
