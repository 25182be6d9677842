"""A verifier of the user's own, mine.py:score: finding it, loading it and calling it. Only workers load and call it."""

import functools
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ce_gppo.messages import UserError


def as_components(value, verifier: str) -> dict[str, float]:
    """A verifier's result as named components; a number becomes `correctness`. UserError for any other result."""
    components = value if isinstance(value, dict) else {"correctness": value}
    try:
        numbers = {name: float(number) for name, number in components.items() if not isinstance(number, str)}
    except (TypeError, ValueError, OverflowError):
        numbers = {}
    named = all(isinstance(name, str) and name.isprintable() and name not in ("", "mean") for name in components)
    complete = "correctness" in components and len(numbers) == len(components)
    if named and complete and all(map(math.isfinite, numbers.values())):
        return numbers
    raise UserError(
        f"verifier {verifier} returned {repr(value)[:80]}; a number is needed, or a dictionary of numbers by name with "
        "'correctness' among them ('mean' is taken)"
    )


def file_of(verifier: str) -> Path | None:
    """mine.py of mine.py:score; None for the name of a verifier."""
    path, _, function = verifier.rpartition(":")
    return Path(path) if path.endswith(".py") and function.isidentifier() else None


@functools.cache
def load(verifier: str) -> Callable:
    """The function of /path/mine.py:score. UserError if the file or the function is missing."""
    path, name = file_of(verifier), verifier.rpartition(":")[2]
    if not path.is_file():
        raise UserError(f"verifier {verifier}: there is no file {path}")
    # The files beside it hide no library, and this program's files (reward.py, loss.py) do not hide them.
    program = [folder for folder in sys.path if Path(folder, "ce_gppo").is_dir()]
    sys.path[:] = [folder for folder in sys.path if folder not in program] + [str(path.parent), *program]
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
    """The components that a user's function returns. UserError if it raises, or returns anything else."""
    function = load(verifier)
    try:
        value = function(response, answer)
    except (MemoryError, RecursionError, UserError):  # a hostile response can cause the first two; they end the worker
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"verifier {verifier} raised {told(error, file_of(verifier))}; a wrong response should be 0, not an error"
        ) from None
    return as_components(value, verifier)


def told(error: BaseException, path: Path) -> str:
    """An error as one line of text, with the number of the last line of the user's file in its traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}{': ' if text else ''}{text}" + (f" (line {lines[-1]})" if lines else "")
