"""What the scripts that make data share: their command line, held-out problems, and the file that they write."""

import argparse
import contextlib
import hashlib
import json
import random
from pathlib import Path

from ce_gppo.messages import UserError


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 upwards, not {text}")
    return int(text)


def arguments(description: str, out: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder to write to (default: beside this file)")
    return parser


def splitting(parser: argparse.ArgumentParser, held_out: int) -> argparse.ArgumentParser:
    """The parser with the options of `split`."""
    help = "evaluation problems; training has none of them"
    parser.add_argument("--held-out", type=positive, default=held_out, help=help)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def split(problems: list[tuple], held_out: int, seed: int) -> tuple[list[tuple], list[tuple]]:
    """(training, held-out) problems. Shuffles the list. The same arguments give the same problems."""
    if held_out >= len(problems):
        raise UserError(f"--held-out {held_out}: there are {len(problems)} problems, and training needs some")
    random.Random(seed).shuffle(problems)
    return problems[held_out:], problems[:held_out]


def write(rows: list[dict], path: Path) -> None:
    """Write one object per line, all or none. Prints the count and a checksum, to compare the data of two machines."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    aside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(text)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()  # it may be what fills the disk
        raise UserError(f"--out {path.parent}: cannot be written ({error})") from None
    print(f"{path}: {len(rows)} problems, sha256 {hashlib.sha256(text).hexdigest()}")
