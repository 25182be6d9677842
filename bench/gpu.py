"""To run first on a GPU: a short run from end to end, and the speed of an update at full size.

    .venv/bin/python -m bench.gpu                        all parts, one JSON line each; one that fails stops no other
    .venv/bin/python -m bench.gpu --part update          one part
    .venv/bin/python -m bench.gpu --train "--model Qwen/Qwen2.5-1.5B-Instruct --lr 1e-6"       a larger model in `run`
    .venv/bin/python -m bench.gpu --device cpu --part update --hidden-size 64 --layers 2 ...   the same code, small

Run it from the repository root. Each part runs in a process of its own, for --minutes at most:

    run      train.py for two steps (rollout, update, new weights in vLLM, checkpoint), and its second step again from
             the checkpoint of the first: seconds by part, vLLM against trainer, how many responses are the same again
    update   forward and backward of train.update, without the optimizer's step, in bfloat16 over float32 weights, which
             are random: model flops utilization, peak memory against bench.scaling's, the head against its matrix
             products. A case is one micro-batch of about --tokens tokens, in sequences of one length or of all lengths
    layers   forward and backward of the same model's decoder layers, compiled as model.py does on a GPU and not, and
             the seconds of the first pass of each case, in which they are compiled
    head     token_statistics over its matrix products by width of a tile, and the memory on top of its arguments
    offload  the passes of `update` and the optimizer's step, with weights, gradients and moments in the host's memory:
             seconds, peak memory of the GPU, and pinned memory of the host over its exact size

All parts except `run` need torch and transformers, but not vLLM, W&B, tyro or scipy. Options are therefore argparse's.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config

import train
from bench import common
from ce_gppo import forward, parallel, perf
from ce_gppo.config import command
from ce_gppo.entropy import token_statistics
from ce_gppo.forward import Policy, accumulate_gradients, collate
from ce_gppo.messages import RunEnded
from ce_gppo.model import compile_layers, load_model
from ce_gppo.types import Response
from data.arithmetic.prepare import positive
from loss import Objective

ROOT = Path(__file__).parents[1]
PARTS = ("run", "update", "layers", "head", "offload")
WIDTHS = (1024, 2048, 4096, 8192, 16384)  # of tiles, for `head`


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--minutes", type=float, default=15.0, help="time limit of a part")
    parser.add_argument("--train", default="", help="more settings for the two steps of `run`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[4096, 8192, 17408], help="tokens of a sequence")
    parser.add_argument("--prompt-tokens", type=positive, default=1024)
    parser.add_argument("--tokens", type=positive, default=34816, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--backend", default="inductor", help="of torch.compile in `layers`")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    # The shape of DeepSeek-R1-Distill-Qwen-1.5B, whose embedding is not its head.
    parser.add_argument("--hidden-size", type=positive, default=1536)
    parser.add_argument("--intermediate-size", type=positive, default=8960)
    parser.add_argument("--layers", type=positive, default=28)
    parser.add_argument("--heads", type=positive, default=12)
    parser.add_argument("--kv-heads", type=positive, default=2)
    parser.add_argument("--vocabulary", type=positive, default=151936)
    return parser.parse_args()


def header(part: str, options: argparse.Namespace) -> dict:
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    of_today = {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__}
    return {"bench": "gpu", "part": part} | of_today


# ----------------------------------------------------------------------------------------------------------------------
# run


def run_part(options: argparse.Namespace) -> None:
    """Two steps, and the second one again after a resume."""
    result = header("run", options)
    with tempfile.TemporaryDirectory() as out:
        settings = ["--steps", "2", "--checkpoint-every", "1", "--eval-every", "2", "--eval-samples", "1"]
        whole, again = Path(out) / "whole", Path(out) / "again"
        minutes = 0.45 * options.minutes  # train.py must end before the time limit of this process
        run_train(minutes, *settings, "--out", out, "--run-name", "whole", *shlex.split(options.train))
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoint-000002")
        run_train(minutes, "--resume", str(again))
        result |= summary(whole, again)
    rows = [(name, value) for name, value in result.items() if isinstance(value, float)]
    common.show(result, [("", "value"), *rows])


def run_train(minutes: float, *words: str) -> None:
    options = {"cwd": ROOT, "env": os.environ | {"WANDB_MODE": "disabled"}, "text": True, "timeout": 60 * minutes}
    with tempfile.TemporaryFile("w+") as output:
        try:
            train_py = [sys.executable, "train.py", *words]
            code = subprocess.run(train_py, stdout=output, stderr=output, **options).returncode
        except subprocess.TimeoutExpired:
            code = "no result in time"
        output.seek(0)
        if code:
            raise RuntimeError(f"train.py {shlex.join(words)} ended with {code}: {output.read().strip()[-2000:]}")


def summary(whole: Path, again: Path) -> dict:
    """Metrics of the second step, in which everything is warm, and how much of it a resumed run repeats.

    On a GPU the tokens may differ: vLLM's results depend on the requests that share a batch.
    """
    last, resumed = (json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (whole, again))
    wanted = ("time/", "perf/", "mismatch/", "entropy/mean", "reward/mean", "optim/updates", "kl/old")
    found = {name: value for name, value in last.items() if name.startswith(wanted)}
    texts = [
        [
            row["response"]
            for row in map(json.loads, (run / "samples.jsonl").read_text().splitlines())
            if row["step"] == 2
        ]
        for run in (whole, again)
    ]
    found["resume/same_responses"] = sum(a == b for a, b in zip(*texts, strict=True)) / len(texts[0])
    found["resume/entropy_difference"] = abs(last["entropy/mean"] - resumed["entropy/mean"])
    return found


# ----------------------------------------------------------------------------------------------------------------------
# update


def make_model(options: argparse.Namespace, shard: str = "no"):
    """A random model, loaded from a folder as train.py loads it."""
    config = Qwen2Config(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=max(options.lengths),
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        common.save_random_model(Path(folder), config, options.device)
        model, _ = load_model(folder, options.device, options.gradient_checkpointing, shard)
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
    responses = [replace(r) for r in responses]  # copies: this pass gives them old logprobs
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


def expected_gib(options: argparse.Namespace, tokens: int) -> float | None:
    """Peak memory as bench.scaling estimates it, without AdamW's moments; None without tyro."""
    try:
        from bench import scaling
    except ImportError:
        return None
    shape = options.layers, options.hidden_size, options.intermediate_size, options.heads, options.kv_heads
    scaling.SHAPES["bench"] = (*shape, options.vocabulary)
    config = scaling.Config(micro_batch_tokens=tokens, prompt_tokens=0, max_length=0)
    moments = 8 * scaling.parameters("bench")[0] / 2**30
    return scaling.memory("bench", 1, "no", 1, config)["update"] - moments


def cases_of(options: argparse.Namespace) -> dict[str, list[int]]:
    """Tokens of the sequences of one micro-batch each."""
    cases = {str(length): [length] * max(1, options.tokens // length) for length in options.lengths}
    return cases | {"mixed": options.lengths * max(1, options.tokens // sum(options.lengths))}


def update_part(options: argparse.Namespace) -> None:
    policy = Policy(make_model(options))
    rate = perf.matrix_rate(options.device)
    result = header("update", options)
    result |= {"parameters": sum(p.numel() for p in policy.parameters()), "matrix_tflops": rate / 1e12}
    result["gradient_checkpointing"] = options.gradient_checkpointing
    weights = next(p.element_size() for p in policy.parameters()) * result["parameters"] / 2**30
    result["weights_and_gradients_gib"] = 2 * weights
    rows = {}
    for case, lengths in cases_of(options).items():
        rows[case] = measure(policy, lengths, options, rate)
        if options.gradient_checkpointing and (expected := expected_gib(options, sum(lengths))):
            rows[case]["peak_over_model"] = rows[case]["peak_gib"] / expected
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


# ----------------------------------------------------------------------------------------------------------------------
# layers, head, offload


def layers_part(options: argparse.Namespace) -> None:
    model, cuda = make_model(options), options.device.startswith("cuda")
    compile_layers(model, backend=options.backend)
    result, rows = header("layers", options), []
    for case, lengths in cases_of(options).items():
        batch = collate(make_responses(lengths, options), options.device)

        def passes(batch=batch):
            with torch.autocast(options.device, torch.bfloat16, enabled=cuda):
                inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
                hidden = model.base_model(**inputs, packing=batch.packing, use_cache=False).last_hidden_state
            hidden.sum().backward()

        first = common.timed(passes, cuda)
        compiled = statistics.median(common.seconds(passes, options.repeats, cuda))
        with torch.compiler.set_stance("force_eager"):
            eager = statistics.median(common.seconds(passes, options.repeats, cuda))
        rows.append((case, eager, compiled, eager / compiled, first))
        names = "eager_s", "compiled_s", "eager_over_compiled", "first_s"
        result |= {f"{case}/{name}": value for name, value in zip(names, rows[-1][1:], strict=True)}
    common.show(result, [("length", "eager s", "compiled s", "eager over compiled", "first pass s"), *rows])


def head_part(options: argparse.Namespace) -> None:
    device, cuda = options.device, options.device.startswith("cuda")
    generator = torch.Generator(device).manual_seed(0)
    shapes = (options.tokens, options.hidden_size), (options.vocabulary, options.hidden_size)
    hidden, weight = (torch.randn(shape, generator=generator, device=device) for shape in shapes)  # [N, D], [V, D]
    hidden, weight = hidden.to(torch.bfloat16 if cuda else torch.float32), weight / options.hidden_size**0.5
    targets = torch.randint(options.vocabulary, (options.tokens,), generator=generator, device=device)  # [N]
    result, rows = header("head", options), []
    for width in (width for width in WIDTHS if width <= max(options.vocabulary, WIDTHS[0])):
        memory = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            token_statistics(hidden.requires_grad_(), weight.requires_grad_(), targets, width=width)[0].sum().backward()
            memory = (torch.cuda.max_memory_allocated() - before) / 2**30
            hidden.grad = weight.grad = None
        seconds, products = common.head_seconds(hidden, weight, targets, options.repeats, width)
        rows.append((width, seconds, seconds / products, memory))
        result |= {f"{width}/head_s": seconds, f"{width}/over_products": seconds / products, f"{width}/gib": memory}
    common.show(result, [("width of a tile", "seconds", "over its products", "GiB"), *rows])


def offload_part(options: argparse.Namespace) -> None:
    cuda = options.device.startswith("cuda")
    model = make_model(options, "offload")
    policy = parallel.distribute(Policy(model), "offload", model._no_split_modules)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda, **train.ADAMW)
    lengths = cases_of(options)["mixed"]
    responses = make_responses(lengths, options)

    def step():
        with parallel.host_threads():
            optimizer.step()
        parallel.zero_gradients(policy, optimizer)

    passes, steps = [], []
    for _ in range(options.repeats + 1):  # the first one compiles, and makes the moments
        passes.append(common.timed(lambda: update(policy, responses, options.device), cuda))
        steps.append(common.timed(step, cuda))
    result = header("offload", options) | {"tokens": sum(lengths)}
    result |= {"passes_s": statistics.median(passes[1:]), "step_s": statistics.median(steps[1:])}
    result |= {"peak_gib": perf.peak_memory_gib(options.device), "pinned_gib": None, "pinned_over_exact": None}
    if cuda:
        pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
        exact = 2 * 4 * sum(p.numel() for p in model.parameters())  # weights and gradients
        result |= {"pinned_gib": pinned / 2**30, "pinned_over_exact": pinned / exact}
    common.show(result, [("", "value"), *((name, result[name]) for name in list(result)[-5:])])


def main() -> None:
    options = arguments()
    if options.part:
        return globals()[f"{options.part}_part"](options)
    failed = []
    for part in PARTS:  # each in its own process: its memory is then free for the next, even after a crash
        command = [sys.executable, "-m", "bench.gpu", "--part", part, *sys.argv[1:]]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=60 * options.minutes).returncode
        except subprocess.TimeoutExpired:
            code = f"no result in {options.minutes:g} minutes"
        if code:
            print(json.dumps({"bench": "gpu", "part": part, "failed": code}), flush=True)
            failed.append(part)
    if failed:
        raise RunEnded(f"failed: {', '.join(failed)}; their output is above")


if __name__ == "__main__":
    command(main)
