"""The base policy of `arithmetic`: a 0.9 M parameter Qwen2, warm-started by supervised learning, and stopped early.

    python -m data.arithmetic.base           writes the folder base/ beside this file, in about a minute on two cores

It imitates right workings in random orders until about one sampled answer in four is right. Reinforcement learning can
then improve its accuracy, and can reduce its entropy. It never sees a held-out problem.
"""

import math
import random
from collections import Counter

import torch

from ce_gppo.config import command
from data.arithmetic.prepare import arguments, problem, prompt, show, splits, working
from data.base import Example, add_arguments, imitate, make_folder, make_model, make_tokenizer, sample


def least_loss(terms: list[int]) -> float:
    """The log of the number of right workings, which are equally likely. With equal terms there are fewer than n!."""
    return math.lgamma(len(terms) + 1) - sum(math.lgamma(times + 1) for times in Counter(terms).values())


def main() -> None:
    parser = arguments(__doc__)
    add_arguments(parser, excess=2.5, max_steps=900, batch_size=16)
    args = parser.parse_args()
    out = make_folder(parser, args.out / "base")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    _, held_out = splits(args.seed, args.terms, args.largest, args.train, args.held_out)
    forbidden = {show(terms) for terms in held_out}

    def draw(count: int) -> list[Example]:
        problems: list[list[int]] = []
        while len(problems) < count:
            terms = problem(rng, args.terms, args.largest)
            if show(terms) not in forbidden:
                problems.append(terms)
        return [Example(prompt(terms), working(rng, terms), least_loss(terms)) for terms in problems]

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    steps = imitate(model, tokenizer, draw, args.excess, args.max_steps, args.batch_size)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    limit = 16 * args.terms  # tokens: one line a term, none longer while totals have three digits
    responses, entropy = sample(model, tokenizer, [prompt(terms) for terms in held_out], limit)
    right = sum(
        response is not None and response.endswith(f"\\boxed{{{sum(terms)}}}")
        for terms, response in zip(held_out, responses, strict=True)
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{out}: {parameters / 1e6:.2f} M parameters, {steps} steps, pass rate {right / len(held_out):.2f} and entropy "
        f"{entropy:.2f} nats at temperature 1"
    )


if __name__ == "__main__":
    command(main)
