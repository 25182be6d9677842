"""The update at full size on one GPU: model flops utilization, peak memory, the head against its matrix products.

    .venv/bin/python -m bench.gpu                                              Qwen2 1.5B, sequences of 4k to 17k tokens
    .venv/bin/python -m bench.gpu --device cpu --hidden-size 64 --layers 2 ... the same code at a small size

Run it from the repository root. It measures the forward and backward passes of train.update, without the optimizer's
step, in bfloat16 over float32 weights, which are random. Each case is one micro-batch of about --tokens tokens, in
sequences of one length; the last case mixes all lengths. It needs torch and transformers, but not vLLM, W&B, tyro or
scipy; therefore argparse.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config

import train
from bench import common
from ce_gppo import forward, perf
from ce_gppo.config import command
from ce_gppo.forward import Policy, accumulate_gradients, collate
from ce_gppo.model import load_model
from ce_gppo.types import Response
from loss import Objective


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 17408], help="tokens of a sequence")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=34816, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    # The shape of Qwen2 1.5B.
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--intermediate-size", type=int, default=8960)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=151936)
    return parser.parse_args()


def make_model(options: argparse.Namespace):
    """A random model, loaded from a folder as train.py loads it."""
    config = Qwen2Config(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=max(options.lengths),
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        common.save_random_model(Path(folder), config, options.device)
        model, _ = load_model(folder, options.device, options.gradient_checkpointing)
    return model


def make_responses(lengths: list[int], options: argparse.Namespace) -> list[Response]:
    """One for each length, which is that of prompt and response together."""
    generator = torch.Generator().manual_seed(0)
    prompt_tokens, responses = options.prompt_tokens, []
    for i, length in enumerate(lengths):
        ids = common.random_ids(length, options.vocabulary, generator)
        advantage = (1.0, -0.5)[i % 2]
        responses.append(common.response_of(ids[:prompt_tokens], ids[prompt_tokens:], advantage=advantage))
    return responses


def update(policy: Policy, responses: list[Response], device: str) -> None:
    """The passes of train.update over one micro-batch, as in the first update of a rollout: ratio 1."""
    responses = [replace(r) for r in responses]  # copies, as they get old logprobs here
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in responses)
    accumulate_gradients(policy, responses, train.loss_of(responses, Objective()), 1.0, tokens, device)


def head_inputs(policy: Policy, responses: list[Response], device: str) -> tuple[torch.Tensor, ...]:
    """The arguments of token_statistics in a forward pass: hidden, weight, targets, in their dtypes there."""
    seen, original = [], forward.token_statistics

    def remember(*arguments):
        seen.append(arguments[:3])
        return original(*arguments)

    forward.token_statistics = remember
    try:
        with torch.no_grad():
            policy(collate(responses, device), 1.0)
    finally:
        forward.token_statistics = original
    return seen[0]


def measure(policy: Policy, lengths: list[int], options: argparse.Namespace, rate: float) -> dict[str, float]:
    device = options.device
    cuda = device.startswith("cuda")
    responses = make_responses(lengths, options)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = statistics.median(common.seconds(lambda: update(policy, responses, device), options.repeats, cuda))
    peak = perf.peak_memory_gib(device)
    response_tokens = sum(len(r.response_ids) for r in responses)
    flops = perf.flops(policy.model, sum(lengths), response_tokens, sum(length**2 for length in lengths))
    policy.zero_grad()
    head, products = common.head_seconds(*head_inputs(policy, responses, device), options.repeats)
    return {
        "sequences": len(lengths),
        "tokens": sum(lengths),
        "seconds": taken,
        "tokens_per_s": sum(lengths) / taken,
        "mfu": flops / taken / rate,  # without the recomputation
        "peak_gib": peak,
        "logits_gib": response_tokens * options.vocabulary * 4 / 2**30,  # of a [tokens, vocabulary] tensor, for scale
        "head_s": head,
        "head_over_products": head / products,
    }


def main() -> None:
    options = arguments()
    policy = Policy(make_model(options))
    rate = perf.matrix_rate(options.device)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    result = {"bench": "gpu", "date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__}
    result |= {"parameters": sum(p.numel() for p in policy.parameters()), "matrix_tflops": rate / 1e12}
    result["gradient_checkpointing"] = options.gradient_checkpointing
    weights = next(p.element_size() for p in policy.parameters()) * result["parameters"] / 2**30
    result["weights_and_gradients_gib"] = 2 * weights
    cases = {str(length): [length] * max(1, options.tokens // length) for length in options.lengths}
    cases["mixed"] = options.lengths * max(1, options.tokens // sum(options.lengths))
    rows = {}
    for case, lengths in cases.items():
        rows[case] = measure(policy, lengths, options, rate)
        result |= {f"{case}/{key}": value for key, value in rows[case].items()}
    columns = list(next(iter(rows.values())))
    table = [("length", *columns), *((case, *row.values()) for case, row in rows.items())]
    bars = [
        ("least mfu", min(row["mfu"] for row in rows.values()), ">= 0.45"),
        ("head over its matrix products, most", max(row["head_over_products"] for row in rows.values()), "<= 1.3"),
        ("weights and gradients, GiB", result["weights_and_gradients_gib"], ""),
        ("matrix rate, TFLOP/s", result["matrix_tflops"], ""),
    ]
    common.show(result, table, [("", "value", "bar"), *bars])


if __name__ == "__main__":
    command(main)
