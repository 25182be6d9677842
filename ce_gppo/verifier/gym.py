"""Tasks of the library reasoning-gym (arXiv 2505.24760), and their scorers, which run only in worker processes.

A row's true answer is JSON: {"answer": ..., "metadata": {...}, "config": {...}}, as data/gym/prepare.py writes it. The
verifier `gym/<task>` gives 1 if the library's score is 1, else 0; `gym_partial/<task>` gives the score itself, which is
often 0.01 to 0.1 for any answer of the right form.

Some of the scorers evaluate the model's text as code, by eval or by sympy, whose parser calls eval. A response could
then run any code. Such tasks are refused: `evaluates` finds them by reading the syntax trees.
"""

import ast
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ce_gppo.messages import UserError
from ce_gppo.verifier.extract import any_answer

KINDS = ("gym/", "gym_partial/")
INSTALL = "-m pip install --no-deps -r requirements/gym.txt"
# Functions that run a text as code, or build the objects that it names.
EVALUATES = {"eval", "exec", "compile", "__import__", "literal_eval", "parse_expr", "sympify", "parse_latex"}
LIBRARIES = {"sympy", "pickle", "subprocess", "importlib"}  # nor any function of these


def tasks() -> dict[str, tuple[type, type]]:
    """The library's tasks: name -> (data set, its configuration). UserError if the library is not installed."""
    try:
        factory = importlib.import_module("reasoning_gym.factory")
    except ModuleNotFoundError:
        raise UserError(f"reasoning-gym is not installed; install it with {sys.executable} {INSTALL}") from None
    return factory.DATASETS


def task_of(name: str) -> tuple[type, type]:
    """The data set and configuration of a task. UserError if it is unknown, or if its scorer evaluates answers."""
    known = tasks()
    if name not in known:
        raise UserError(f"gym/{name}: reasoning-gym has no task '{name}'; it has: {', '.join(sorted(known))}")
    if by := evaluates(known[name][0]):
        raise UserError(
            f"gym/{name}: refused, since its scorer would evaluate the model's text by {by}; take another task"
        )
    return known[name]


def scorer(verifier: str) -> Callable[[str, str], float]:
    """The function behind `gym/<task>` or `gym_partial/<task>`, for custom.py."""
    kind, _, name = verifier.partition("/")
    task_of(name)

    def score(response: str, answer: str) -> float:
        try:
            entry = json.loads(answer)
            data = data_set(name, json.dumps(entry["config"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{verifier}: answer {answer[:60]!r} is not what data/gym/prepare.py writes") from error
        try:
            value = float(data.score_answer(any_answer(response), entry))
        except Exception:  # the library's scorers raise on some wrong answers
            return 0.0
        if not 0 <= value <= 1:
            return 0.0
        return value if kind == "gym_partial" else float(math.isclose(value, 1))

    return score


@functools.lru_cache(maxsize=64)
def data_set(name: str, config: str):
    """The library's data set; its scorer may depend on the configuration, which is JSON here."""
    Data, Config = task_of(name)
    return Data(config=Config(**json.loads(config)))


# ----------------------------------------------------------------------------------------------------------------------
# Reading the scorers


def evaluates(Data: type) -> str:
    """The function by which the scorer of a data set would evaluate text as code, "" if there is none.

    From score_answer on, every name is followed to its definition in the library: in the same file, in the files of the
    classes that the data set inherits from, and through imports. A name that cannot be followed is compared with
    EVALUATES. This refuses too much rather than too little: it does not matter whose text would be evaluated.
    """
    package = Data.__module__.partition(".")[0]
    files = [cls.__module__ for cls in Data.__mro__ if cls.__module__.partition(".")[0] == package]
    owner = next(cls.__module__ for cls in Data.__mro__ if "score_answer" in vars(cls))
    todo, seen = [(owner, "score_answer")], set()
    while todo:
        module, name = todo.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        definitions, imports = outline(module)
        for used in names_in(definitions[name]) if name in definitions else ():
            places = [file for file in dict.fromkeys([module, *files]) if used in outline(file)[0]]
            if places:
                todo += [(place, used) for place in places]
            elif used in imports:
                origin, original = imports[used]
                if origin.partition(".")[0] == package:
                    todo.append((origin, original))
                elif origin.partition(".")[0] in LIBRARIES or original in EVALUATES:
                    return f"{origin}.{original}".removesuffix(".")
            elif used in EVALUATES:
                return used
    return ""


def names_in(nodes: list[ast.AST]) -> Iterator[str]:
    """Every name and attribute, except the compile of regular expressions."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node) != "re.compile":
            yield node.attr


@functools.cache
def outline(module: str) -> tuple[dict[str, list[ast.AST]], dict[str, tuple[str, str]]]:
    """(functions, classes and global values by name, imported names: name -> (module, name there)) of a module."""
    loaded = importlib.import_module(module)
    tree = ast.parse(Path(loaded.__file__).read_text())
    package = module if Path(loaded.__file__).name == "__init__.py" else module.rpartition(".")[0]
    definitions: dict[str, list[ast.AST]] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            definitions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                imports[alias.asname or alias.name.partition(".")[0]] = alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                imports[alias.asname or alias.name] = origin, alias.name
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    definitions.setdefault(target.id, []).append(node)
    return definitions, imports
