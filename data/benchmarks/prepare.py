"""The paper's benchmarks, and OlympiadBench: evaluation only.

.venv/bin/python -m data.benchmarks.prepare                          the five that the paper averages over
.venv/bin/python -m data.benchmarks.prepare aime24 olympiadbench     only these
.venv/bin/python -m data.benchmarks.prepare aime24 --file aime.json  a local file; data/convert.py lists the schemas

Run it from the repository root. Writes <name>.jsonl beside this file for each. The readme has the numbers to expect.
"""

from pathlib import Path

from ce_gppo.config import command
from data.common import write
from data.convert import Source, arguments, prepare

KNOWN = {
    "aime24": Source("HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train", 30),
    "aime25": Source("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test", 30),
    "hmmt25": Source("MathArena/hmmt_feb_2025", "6fdc4277120810ff75aa22d2d5489b91f7a262a1", "train", 30),
    "math500": Source("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test", 500),
    "amc23": Source("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", "test", 40),
    "olympiadbench": Source("math-ai/olympiadbench", "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84", "test", 674),
}
PAPER = ["aime24", "aime25", "hmmt25", "math500", "amc23"]


def main() -> None:
    args = arguments(__doc__, KNOWN, PAPER, out=Path(__file__).parent).parse_args()
    for name in args.names:
        write(prepare(name, KNOWN, args), args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
