"""The paper's benchmarks, and OlympiadBench: evaluation only.

python data/benchmarks/prepare.py                          the five that the paper averages over
python data/benchmarks/prepare.py aime24 olympiadbench     these alone
python data/benchmarks/prepare.py aime24 --file aime.json  from a local file; data/convert.py says of which schemas

Writes <name>.jsonl beside this file for each. The readme says how many problems to expect.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from convert import Source, UserError, arguments, prepare, write

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
    try:
        main()
    except UserError as error:
        print(f"data/benchmarks/prepare.py: {error}", file=sys.stderr)
        sys.exit(2)
