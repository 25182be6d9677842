"""Data set `words`: sums of two numbers in words, for a real language model that is too small for real mathematics.

    .venv/bin/python -m data.words.prepare        writes train.jsonl and eval.jsonl beside this file

Run it from the repository root. A problem is "What is seven plus twelve?", after three worked examples in the same
chat. They show the form of an answer:

    7 + 12 = 19
    \\boxed{19}
"""

from pathlib import Path

from ce_gppo.config import command
from data.common import arguments, split, splitting, write

NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
WORDS = NAMES.split()
EXAMPLES = [(2, 1), (4, 3), (5, 5)]


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is {WORDS[a]} plus {WORDS[b]}?"}


def prompt(a: int, b: int) -> list[dict[str, str]]:
    messages = []
    for x, y in EXAMPLES:
        messages += [question(x, y), {"role": "assistant", "content": f"{x} + {y} = {x + y}\n\\boxed{{{x + y}}}"}]
    return [*messages, question(a, b)]


def main() -> None:
    args = splitting(arguments(__doc__, Path(__file__).parent), held_out=100).parse_args()
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 21) if (a, b) not in EXAMPLES]
    for name, chosen in zip(("train", "eval"), split(pairs, args.held_out, args.seed), strict=True):
        rows = [{"prompt": prompt(a, b), "answer": str(a + b), "source": "words"} for a, b in chosen]
        write(rows, args.out / f"{name}.jsonl")


if __name__ == "__main__":
    command(main)
