r"""Mathematics to train on. Problems that are also in a benchmark are dropped, and counted.

.venv/bin/python -m data.math.prepare                        klear, the paper's training data
.venv/bin/python -m data.math.prepare dapo gsm8k math        these three
.venv/bin/python -m data.math.prepare mine --file mine.json  a local file; data/convert.py lists the schemas

Run it from the repository root. Writes <name>.jsonl beside this file for each. The readme has the numbers to expect.
"""

import json
import re
from pathlib import Path

from ce_gppo.config import command
from ce_gppo.messages import UserError
from data.common import write
from data.convert import Source, arguments, prepare

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
KNOWN = {
    "klear": Source("Kwai-Klear/KlearReasoner-MathSub-30K", "972d1bd91843936551f0ee2bc2bd5ea259c9397f", "train", None),
    "dapo": Source("BytedTsinghua-SIA/DAPO-Math-17k", "65877096c24ffa7abc4e4fa5edb95cf3413a5674", "train", 1_791_700),
    "gsm8k": Source("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "train", 7473, ("main",)),
    "math": Source("EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3", "train", 7500, SUBJECTS),
}


def essence(problem: str) -> str:
    """The problem without case, white space, dollars, LaTeX's spacing, and punctuation, for comparisons."""
    text = problem.casefold().replace("’", "'")
    text = re.sub(r"\\(?:left|right|displaystyle|qquad|quad)(?![a-z])|\\[,;:! ()\[\]]|\\?\$|~", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[:;?\"“”`]", "", text)  # 3.5 is not 35
    return re.sub(r"\s+", "", text)


def without_benchmarks(rows: list[dict], benchmarks: list[Path]) -> tuple[list[dict], dict[str, int]]:
    """(rows whose problem is in none of the benchmark files, number of rows dropped because of each file)."""
    rows, taken = list(rows), {}
    for path in benchmarks:
        lines = path.read_text().splitlines()
        problems = {essence(json.loads(line)["prompt"][-1]["content"]) for line in lines}
        clean = [row for row in rows if essence(row["prompt"][-1]["content"]) not in problems]
        taken[path.stem] = len(rows) - len(clean)
        rows = clean
    return rows, taken


def main() -> None:
    here = Path(__file__).parent
    parser = arguments(__doc__, KNOWN, ["klear"], out=here)
    parser.add_argument(
        "--benchmarks", type=Path, default=here.parent / "benchmarks", help="folder of their JSONL files"
    )
    parser.add_argument("--unchecked", action="store_true", help="keep benchmark problems")
    args = parser.parse_args()
    benchmarks = [] if args.unchecked else sorted(args.benchmarks.glob("*.jsonl"))
    if not benchmarks and not args.unchecked:
        raise UserError(
            f"{args.benchmarks} has no benchmarks to compare with; make them with .venv/bin/python -m "
            "data.benchmarks.prepare, or train on their problems, too, with --unchecked"
        )
    for name in args.names:
        rows, taken = without_benchmarks(prepare(name, KNOWN, args), benchmarks)
        counts = ", ".join(f"{benchmark} {count}" for benchmark, count in taken.items())
        print(f"{name}: {sum(taken.values())} dropped because a benchmark has them ({counts or 'not compared'})")
        write(rows, args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
