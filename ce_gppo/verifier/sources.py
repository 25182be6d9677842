"""The verifier of each problem: by the setting `rewards`, by the name of its source, or else `math`."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ce_gppo.messages import UserError
from ce_gppo.types import Problem
from ce_gppo.verifier import custom
from ce_gppo.verifier.answers import can_be_given
from ce_gppo.verifier.workers import check, judge

EVERY = ""  # stands for every source that has no entry of its own


def read_rewards(rewards: str) -> dict[str, str]:
    """{source: verifier} from "source=verifier,source2=mine.py:score". An entry without a source is for all others."""
    chosen = {}
    for entry in filter(None, map(str.strip, rewards.split(","))):
        source, equals, verifier = entry.rpartition("=")
        source = source.strip() or EVERY
        if not verifier.strip() or (equals and source == EVERY):
            raise UserError(f"rewards: '{entry}', where source=verifier is needed, or a verifier for every source")
        if source in chosen:
            raise UserError(f"rewards: two verifiers for {f'source {source!r}' if source else 'every source'}")
        chosen[source] = verifier.strip()
    return chosen


def check_names(rewards: str, verifiers: dict[str, Callable]) -> None:
    """UserError for what is wrong with `rewards` whatever the data are. verifiers: reward.VERIFIERS."""
    for source, name in read_rewards(rewards).items():
        if name not in verifiers and not (path := custom.file_of(name)):
            outside(name, source or "gym/<task>", verifiers)
        elif name not in verifiers and not path.is_file():
            raise UserError(f"rewards: verifier {name}: there is no file {path}")


def files(rewards: str) -> list[Path]:
    """The files of the user's own functions, and those beside them that they import."""
    own = [path for verifier in read_rewards(rewards).values() if (path := custom.file_of(verifier))]
    return sorted({file for path in own for file in (path, *custom.neighbours(path))})


def assign(rewards: str, verifiers: dict[str, Callable], *sets: list[Problem]) -> tuple[str, list[list[Problem]]]:
    """(a text with the verifier of each source; the sets of problems, each problem with its verifier).

    verifiers: reward.VERIFIERS. UserError, before the run starts, for an unknown source or verifier, for a function
    that cannot be imported, or that raises or returns nonsense for an empty response, and for a true answer that its
    verifier cannot read, or that no response could give.
    """
    chosen, sources = read_rewards(rewards), sorted({problem.source for problem in itertools.chain(*sets)})
    if unknown := sorted(chosen.keys() - {EVERY, *sources}):
        raise UserError(f"rewards: no problem has the source '{unknown[0]}'; the data's: {', '.join(sources)}")
    for source in sources:
        if not {source, EVERY} & chosen.keys() and source not in verifiers and source.lower() in verifiers:
            raise UserError(
                f"source '{source}' is not '{source.lower()}', which has a verifier; say --rewards "
                f"{source}={source.lower()}, or {source}=math"
            )
    names = {source: chosen.get(source) or chosen.get(EVERY) or by_name(source, verifiers) for source in sources}
    full = {source: name if name in verifiers else outside(name, source, verifiers) for source, name in names.items()}
    check(set(full.values()) - verifiers.keys())
    some = {full[p.source]: p.answer for p in itertools.chain(*sets) if full[p.source] not in verifiers}
    tried = judge([(name, "", answer) for name, answer in some.items()], timeout=3.0, num_workers=1, budget=60.0)
    if failed := [name for (name, *_), parts in tried.items() if parts is None]:
        raise UserError(
            f"verifier {failed[0]} takes over 3 s for an empty response, or ends its process: all rewards would be 0"
        )
    assigned = [[replace(p, verifier=full[p.source]) for p in problems] for problems in sets]
    for problem in itertools.chain(*assigned):
        if problem.verifier in verifiers:
            verifiers[problem.verifier]("", problem.answer)
        if problem.verifier in ("math", "gsm8k") and not can_be_given(problem.answer):
            raise UserError(
                f"answer {problem.answer[:60]!r} of source {problem.source}: no response could equal it; something is "
                "needed, with as many closing braces as opening ones"
            )
    return ", ".join(f"{source} by {name}" for source, name in names.items()), assigned


def by_name(source: str, verifiers: dict[str, Callable]) -> str:
    """The verifier of a source that `rewards` does not name. Unknown names such as aime24 have `math`."""
    if source == "gym/countdown":  # the library's own scorer evaluates the answer as code
        return "countdown"
    return "gym" if source.startswith("gym/") else source if source in verifiers else "math"


def outside(name: str, source: str, verifiers: dict[str, Callable]) -> str:
    """The full name of a verifier that runs in workers: <path of the user's file>:<function>, or gym/<task>."""
    if path := custom.file_of(name):
        return f"{path.resolve()}:{name.rpartition(':')[2]}"
    if name in ("gym", "gym_partial") and source.startswith("gym/"):
        return name + source.removeprefix("gym")
    known = ", ".join([*verifiers, "gym and gym_partial (of sources gym/<task>)", "or mine.py:score, your own"])
    raise UserError(f"rewards: verifier '{name}' of source {source} is unknown; known: {known}")
