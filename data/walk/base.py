"""The base policy of `walk`: a 1.0 M parameter Qwen2, warm-started by supervised learning.

    python -m data.walk.base           writes the folder base/ beside this file, in about four minutes on one slow core

It imitates traces that head for the target in 70 % of their moves, and move at random in the others. A move heads
for the target if it ends nearer to it. Many traces do not arrive within six moves, so there is much for reinforcement
learning to improve. It never sees a held-out problem.
"""

import math
import random

import torch

from ce_gppo.config import command
from ce_gppo.verifier.puzzles import MAX_MOVES, after, legal_moves
from ce_gppo.verifier.puzzles import walk as score
from data.base import Example, add_arguments, imitate, make_folder, make_model, make_tokenizer, sample, summary
from data.walk.prepare import WORDS, answer, arguments, prompt, splits

HEADING = 0.7  # share of the moves that head for the target
SAMPLES = 8  # of each held-out problem, for pass@8


def trace(rng: random.Random, start: int, target: int) -> tuple[str, float]:
    """(a response, arrived or out of moves; minus the log of its probability under this way of walking)"""
    number, lines, nats = start, [], 0.0
    while number != target and len(lines) < MAX_MOVES:
        legal = legal_moves(number)
        heading = [move for move in legal if abs(after(move, number) - target) < abs(number - target)]
        move = rng.choice(heading if rng.random() < HEADING else legal)
        nats -= math.log(HEADING * (move in heading) / len(heading) + (1 - HEADING) / len(legal))
        number = after(move, number)
        lines.append(f"{move} ={number}\n")
    return "".join(lines), nats


def main() -> None:
    parser = arguments(__doc__)
    add_arguments(parser, excess=0.4, max_steps=1500, batch_size=32)
    args = parser.parse_args()
    out = make_folder(parser, args.out / "base")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    training, held_out = splits(args.seed, args.held_out)

    def draw(count: int) -> list[Example]:
        problems = rng.choices(training, k=count)
        return [Example(prompt(*problem), *trace(rng, *problem)) for problem in problems]

    tokenizer = make_tokenizer(WORDS)
    model = make_model(tokenizer, hidden_size=192, num_layers=2)  # wide and flat learns this task faster than 4 of 128
    steps = imitate(model, tokenizer, draw, args.excess, args.max_steps, args.batch_size)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    problems = [problem for problem in held_out for _ in range(SAMPLES)]
    responses, entropy = sample(model, tokenizer, [prompt(*p) for p in problems], 2 * MAX_MOVES + 1)
    scores = [score(text or "", answer(*problem)) for problem, text in zip(problems, responses, strict=True)]
    print(summary(out, model, steps, scores, SAMPLES, entropy))


if __name__ == "__main__":
    command(main)
