r"""From published mathematics to the project's rows: the common part of data/math and data/benchmarks.

A row may have any of these schemas, from the hub or from a local .parquet, .json or .jsonl file:

    problem   a list of messages {"role", "content"} under "prompt" (verl's schema), or a string under "problem",
              "question" or "prompt"
    answer    {"ground_truth": ...} under "reward_model" (verl's schema), or else "final_answer", "answer", or the last
              \boxed{} of "solution"; if the answer has "####" (GSM8K), the text after the last one

Downloaded files are neither run nor unpickled: `datasets` reads parquet and JSON, and no longer has loading scripts.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ce_gppo.messages import UserError
from ce_gppo.verifier.answers import last_box
from data import common
from reward import read_truth


@dataclass(frozen=True)
class Source:
    """A data set on the hub."""

    hub: str  # owner/name
    revision: str  # commit
    split: str
    rows: int | None  # at that commit, repeated ones included; None: not known exactly
    configs: tuple[str | None, ...] = (None,)  # read one after another


# The text around each problem of DAPO-Math-17k. It asks for "Answer:", but the verifier reads the last box.
WRAPPER = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the form Answer: "
    r"\$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*(.*?)\s*"
    r'Remember to put your answer on its own line after "Answer:"\.',
    re.DOTALL,
)


def arguments(description: str, known: dict[str, Source], default: list[str], out: Path) -> argparse.ArgumentParser:
    """The command line of both scripts."""
    parser = common.arguments(description, out)
    names = f"known: {', '.join(known)} (default: {' '.join(default)})"
    parser.add_argument("names", nargs="*", default=default, metavar="NAME", help=names)
    parser.add_argument("--file", help="local .parquet, .json or .jsonl to read instead of the hub; for one NAME")
    parser.add_argument("--revision", help="another commit, branch or tag of the hub; for one NAME")
    return parser


def prepare(name: str, known: dict[str, Source], args: argparse.Namespace) -> list[dict]:
    """The rows of a known data set, or of a local file. Prints what was read, and how much was left out."""
    if (args.file or args.revision) and len(args.names) != 1:
        raise UserError("--file and --revision are about one data set; give exactly one name")
    if args.file:
        where, raw = args.file, read_file(args.file)
    elif name in known:
        where, raw = known[name].hub, read_hub(known[name], args.revision or known[name].revision)
    else:
        raise UserError(f"data set '{name}' is unknown; known: {', '.join(known)}; with --file any name will do")
    rows, repeated, unanswered = convert(raw, where, name)
    print(f"{name}: {len(rows)} problems, {repeated} repeated rows and {unanswered} without an answer left out")
    read = len(rows) + repeated + unanswered
    if not args.file and known[name].rows not in (None, read):
        print(f"{name}: WARNING: {read} rows were read, {known[name].rows} were expected", file=sys.stderr)
    return rows


def convert(raw: Iterable[dict], where: str, name: str) -> tuple[list[dict], int, int]:
    """(rows, number of repeated problems, number of rows without an answer). The first of equal problems is kept."""
    rows: dict[str, dict] = {}
    repeated = unanswered = 0
    for number, row in enumerate(raw, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{where}, row {number}: a {type(row).__name__}, where an object is needed")
        messages, answer = messages_of(row, f"{where}, row {number}"), answer_of(row)
        problem = messages[-1]["content"]
        if answer is None:
            unanswered += 1
        elif problem in rows:
            repeated += 1
        else:
            rows[problem] = {"prompt": messages, "answer": answer, "source": name}
    if not rows:
        raise UserError(
            f"{where}: no row with an answer (read: reward_model.ground_truth, final_answer, answer, solution)"
        )
    return list(rows.values()), repeated, unanswered


def messages_of(row: dict, where: str) -> list[dict[str, str]]:
    prompt = next((row[key] for key in ("prompt", "problem", "question") if row.get(key)), None)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    ):
        raise UserError(
            f"{where}: no problem found; a string under 'problem', 'question' or 'prompt' is needed, or a list of "
            f"messages under 'prompt' (its keys: {', '.join(map(str, row))})"
        )
    messages = []
    for message in prompt:
        content = message["content"].strip()
        wrapped = WRAPPER.fullmatch(content)
        messages.append({"role": message["role"], "content": wrapped[1] if wrapped else content})
    return messages


def answer_of(row: dict) -> str | None:
    """The true answer as a string; None if the row has none, or one that no response could equal."""
    reward_model = row.get("reward_model")
    given = [reward_model.get("ground_truth") if isinstance(reward_model, dict) else None]
    given += [row.get("final_answer"), row.get("answer")]
    answer = next((a for a in given if a is not None and a != []), None)
    if answer is None:
        return last_box(row["solution"]) if isinstance(row.get("solution"), str) else None
    parts = answer if isinstance(answer, list) else [answer]  # OlympiadBench: the answers to the parts of a problem
    if not all(isinstance(part, str | int | float) and part == part for part in parts):  # a dictionary, NaN
        return None
    return read_truth(", ".join(read_truth(str(part)) or "" for part in parts))


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing


def read_file(path: str) -> Iterator[dict]:
    """Rows of a local .parquet, .jsonl or .json file. A .json file is one list, or one object per line (verl)."""
    suffix = Path(path).suffix
    if suffix not in (".parquet", ".json", ".jsonl"):
        raise UserError(f"{path}: its name must end in .parquet, .json or .jsonl")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if suffix == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
        return
    text = Path(path).read_bytes()
    lines = [text] if text.lstrip()[:1] == b"[" else text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows = json.loads(line) if line.strip() else []
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); one object per line, or one list, is needed"
            ) from None
        yield from rows if isinstance(rows, list) else [rows]


def read_hub(source: Source, revision: str) -> Iterator[dict]:
    """Rows of a data set at this commit, branch or tag. UserError if the hub does not give it."""
    import datasets
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # or each of five retries gives a warning
    try:
        if not re.fullmatch("[0-9a-f]{40}", revision):  # a branch or tag: find its commit
            revision = huggingface_hub.HfApi().dataset_info(source.hub, revision=revision).sha
        print(f"{source.hub}: commit {revision}, split {source.split}", flush=True)
        parts = [
            datasets.load_dataset(source.hub, config, split=source.split, revision=revision)
            for config in source.configs
        ]
    except Exception as error:  # five libraries have their own errors
        raise UserError(
            f"{source.hub} at {revision} cannot be read from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); give a local copy with --file, a mirror with HF_ENDPOINT=<address>, or "
            "HF_HUB_OFFLINE=1 if an earlier download is in the cache"
        ) from None
    for part in parts:
        for batch in part.with_format("arrow").iter(batch_size=10_000):
            yield from batch.to_pylist()
