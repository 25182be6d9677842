r"""Mathematics to train on. Problems that a benchmark has too are dropped, and counted.

python data/math/prepare.py                        klear, what the paper trains on
python data/math/prepare.py dapo gsm8k math        these
python data/math/prepare.py mine --file mine.json  from a local file; data/convert.py says of which schemas

Writes <name>.jsonl beside this file for each. The readme says how many problems to expect.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from convert import Source, UserError, arguments, prepare, write

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
    """Equal essences are the same problem: without case, white space, dollars, LaTeX's spacing, and punctuation."""
    text = problem.casefold().replace("’", "'")
    text = re.sub(r"\\(?:left|right|displaystyle|qquad|quad)(?![a-z])|\\[,;:! ()\[\]]|\\?\$|~", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[:;?\"“”`]", "", text)  # 3.5 is not 35
    return re.sub(r"\s+", "", text)


def without_benchmarks(rows: list[dict], benchmarks: list[Path]) -> tuple[list[dict], dict[str, int]]:
    """The rows whose problem is in none of the benchmark files, and how many each file took."""
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
    parser.add_argument("--unchecked", action="store_true", help="do not look for benchmark problems")
    args = parser.parse_args()
    benchmarks = [] if args.unchecked else sorted(args.benchmarks.glob("*.jsonl"))
    if not benchmarks and not args.unchecked:
        raise UserError(
            f"{args.benchmarks} has no benchmarks to compare with; make them with data/benchmarks/prepare.py, or keep "
            "what may be in them with --unchecked"
        )
    for name in args.names:
        rows, taken = without_benchmarks(prepare(name, KNOWN, args), benchmarks)
        counts = ", ".join(f"{benchmark} {count}" for benchmark, count in taken.items())
        print(f"{name}: {sum(taken.values())} dropped that a benchmark has too ({counts or 'not looked for'})")
        write(rows, args.out / f"{name}.jsonl")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"data/math/prepare.py: {error}", file=sys.stderr)
        sys.exit(2)
