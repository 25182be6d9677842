"""The update at full size on one GPU: model flops utilization, peak memory, the head against its matrix products.

    python bench/gpu.py                                                  Qwen2 1.5B, sequences of 4 k to 17 k tokens
    python bench/gpu.py --device cpu --hidden-size 64 --layers 2 ...     the same code at a small size, on any machine

Forward through policy.forward, objective, entropy accounting, backward; bfloat16 over float32 weights, which are
random. Each micro-batch holds about as many tokens as the others, in sequences of one length; the last one mixes all
lengths. Needs torch and transformers alone: neither vLLM nor W&B, nor tyro, hence argparse.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import loss
import packing
import policy
from rollout import Response


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 17408], help="of prompt and response")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=34816, help="a micro-batch")
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
    """By way of a folder, so that the model is loaded as train.py loads it."""
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
        model, _ = policy.load_model(folder, options.device)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode alone; Qwen2 has no dropout
    return model


def make_responses(lengths: list[int], options: argparse.Namespace) -> list[Response]:
    generator = torch.Generator().manual_seed(0)
    responses = []
    for i, length in enumerate(lengths):
        ids = torch.randint(2, options.vocabulary, (length,), generator=generator).tolist()
        response = Response(
            ids[: options.prompt_tokens],
            ids[options.prompt_tokens :],
            torch.zeros(length - options.prompt_tokens),
            False,
            "",
            advantage=(1.0, -0.5)[i % 2],
        )
        responses.append(response)
    return responses


def update(model, responses: list[Response], device: str) -> None:
    """One micro-batch of train.update, on its first update: ratio 1."""
    batch = packing.collate(responses, device)
    logprobs, entropy, S = policy.forward(model, batch, 1.0)  # [B, R] each
    old_logprobs, old_entropy = logprobs.detach(), entropy.detach()
    batch_loss, info = loss.policy_loss(logprobs, old_logprobs, batch.advantages, batch.response_mask)
    batch_loss.backward()
    loss.update_sums(info, logprobs, entropy, S, old_logprobs, old_entropy, batch.advantages, batch.response_mask)


def head_inputs(model, responses: list[Response], device: str) -> tuple[torch.Tensor, ...]:
    """What forward really gives to the head function: hidden, weight, targets, in the types that it has them in."""
    seen, head_logprobs = [], policy.head_logprobs

    def remember(*inputs):
        seen.append(inputs[:3])
        return head_logprobs(*inputs)

    policy.head_logprobs = remember
    with torch.no_grad():
        policy.forward(model, packing.collate(responses, device), 1.0)
    policy.head_logprobs = head_logprobs
    return seen[0]


def measure(model, lengths: list[int], options: argparse.Namespace, rate: float) -> dict[str, float]:
    cuda = options.device.startswith("cuda")
    responses = make_responses(lengths, options)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = statistics.median(
        common.seconds(lambda: update(model, responses, options.device), options.repeats, cuda=cuda)
    )
    peak = policy.peak_memory_gib(options.device)
    response_tokens = sum(len(r.response_ids) for r in responses)
    flops = policy.flops(model, sum(lengths), response_tokens, sum(length**2 for length in lengths))
    model.zero_grad()
    head, products = common.head_seconds(*head_inputs(model, responses, options.device), options.repeats)
    return {
        "sequences": len(lengths),
        "tokens": sum(lengths),
        "seconds": taken,
        "tokens_per_s": sum(lengths) / taken,
        "mfu": flops / taken / rate,  # without the recomputation
        "peak_gib": peak,
        "logits_gib": response_tokens * options.vocabulary * 4 / 2**30,  # what [tokens, vocabulary] would add
        "head_s": head,
        "head_over_products": head / products,
    }


def main() -> None:
    options = arguments()
    model = make_model(options)
    rate = policy.matrix_rate(options.device)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    result = {"bench": "gpu", "date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__}
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "matrix_tflops": rate / 1e12}
    result["gradient_checkpointing"] = options.gradient_checkpointing
    weights = next(p.element_size() for p in model.parameters()) * result["parameters"] / 2**30
    result["weights_and_gradients_gib"] = 2 * weights
    cases = {str(length): [length] * max(1, options.tokens // length) for length in options.lengths}
    cases["mixed"] = options.lengths * max(1, options.tokens // sum(options.lengths))
    rows = {}
    for case, lengths in cases.items():
        rows[case] = measure(model, lengths, options, rate)
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
    main()
