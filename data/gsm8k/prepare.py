"""Data set `gsm8k`: grade school mathematics with answers after ####, training and test split.

    .venv/bin/python -m data.gsm8k.prepare                                              from the hub
    .venv/bin/python -m data.gsm8k.prepare --train train.parquet --test test.parquet    local copies: .parquet, .jsonl

Run it from the repository root. Writes train.jsonl and eval.jsonl beside this file. `gsm8k` in reward.py reads the
text after the last ####, which the prompt asks for.
"""

from pathlib import Path

from ce_gppo.config import command
from ce_gppo.messages import UserError
from data.common import arguments, write
from data.convert import Source, convert, read_file, read_hub
from data.math.prepare import KNOWN

SPLITS = {"train": KNOWN["gsm8k"], "test": Source(KNOWN["gsm8k"].hub, KNOWN["gsm8k"].revision, "test", 1319, ("main",))}
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


def rows_of(raw, where: str) -> list[dict]:
    """Rows with the instruction. UserError for a row without a question or an answer."""
    rows, repeated, unanswered = convert(raw, where, "gsm8k")
    if unanswered:
        raise UserError(f"{where}: {unanswered} rows have no answer; GSM8K has one in each, after ####")
    print(f"{where}: {len(rows)} problems, {repeated} repeated rows left out")
    for row in rows:
        row["prompt"][-1]["content"] += f" {INSTRUCTION}"
    return rows


def main() -> None:
    parser = arguments(__doc__, Path(__file__).parent)
    parser.add_argument("--train", help="local file instead of the hub")
    parser.add_argument("--test", help="local file instead of the hub")
    args = parser.parse_args()
    if bool(args.train) != bool(args.test):
        raise UserError("--train and --test go together: give both local files, or neither")
    for split, name in (("train", "train"), ("test", "eval")):
        source, file = SPLITS[split], getattr(args, split)
        rows = rows_of(read_file(file) if file else read_hub(source, source.revision), file or source.hub)
        if not file and len(rows) != source.rows:
            print(f"WARNING: {len(rows)} problems, {source.rows} were expected")
        write(rows, args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
