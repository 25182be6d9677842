"""Shared by the benches: random models and responses, timing, the cost of the head function, output."""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import train
from ce_gppo import parallel
from ce_gppo.batch import Rollout
from ce_gppo.policy import Policy, token_statistics
from loss import Objective

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def model_config(kind: type, options, **more) -> PretrainedConfig:
    """A configuration of transformers from the options of a bench that name a model's shape."""
    shape = options.hidden_size, options.intermediate_size, options.layers, options.heads, options.kv_heads
    return kind(**dict(zip(SHAPE, shape, strict=True)), vocab_size=options.vocabulary, eos_token_id=1, **more)


def save_random_model(folder: Path, config: PretrainedConfig, device: str = "cpu") -> None:
    """Save a model with random weights and a dummy tokenizer as a Hugging Face folder."""
    disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    special = {"pad_token": "<pad>", "unk_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def random_ids(length: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    """Token ids without 0 and 1, which are padding and end-of-sequence."""
    return torch.randint(2, vocabulary, (length,), generator=generator).tolist()


def rollout_of(prompts: list[list[int]], responses: list[list[int]], advantages: list[float]) -> Rollout:
    """A response to each of the prompts; equal neighbours are one prompt, with a group of responses.

    vLLM's logprobs, which the objective does not read, are 0. Old logprobs are missing, as in a rollout's first update.
    """
    new = (a != b for a, b in itertools.pairwise(prompts))
    lengths = torch.tensor(list(map(len, responses)))  # [B]
    tokens = torch.tensor(list(itertools.chain(*responses)))  # [N]
    return Rollout(
        prompts=[ids for ids, _ in itertools.groupby(prompts)],
        prompt_of=torch.tensor(list(itertools.accumulate(new, initial=0))),
        lengths=lengths,
        tokens=tokens,
        rollout_logprobs=torch.zeros(len(tokens)),
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        texts=[""] * len(lengths),
        advantages=torch.tensor(advantages).repeat_interleave(lengths),
    )


def update_passes(policy: Policy, rollout: Rollout, max_tokens: int, device: str = "cpu") -> float:
    """train.update, but without clipping the gradients and without the optimizer's step. Returns the loss."""
    idle = SimpleNamespace(param_groups=[], zero_grad=policy.zero_grad, step=lambda: None)
    config = train.Config(max_micro_batch_tokens=max_tokens)
    with mock.patch.object(parallel, "clip_gradients", lambda *_: 0.0):
        return train.update(policy, idle, rollout, Objective(), 0.0, config, device)[1].loss


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Of `repeats` calls. One more call, before them, warms up."""
    return statistics.median([timed(function) for _ in range(repeats + 1)][1:])


def head_seconds(hidden: Tensor, weight: Tensor, targets: Tensor, repeats: int = 5) -> tuple[float, float]:
    """Median seconds of token_statistics with backward, and of the four matrix products that it cannot avoid.

    hidden [N, D], weight [V, D], targets [N], in the dtypes that the update uses. The four products are one in
    forward, its recomputation, and two in backward. They are in bfloat16 on a GPU and in float32 on a CPU, and they
    write into memory that is already allocated.
    """
    dtype = torch.bfloat16 if hidden.is_cuda else torch.float32
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def ours():
        logprobs, _, _ = token_statistics(hidden, weight, targets)  # [N]
        return torch.autograd.grad(logprobs.sum(), (hidden, weight))

    plain_hidden, plain_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    logits = plain_hidden.new_empty(len(hidden), len(weight))  # [N, V], also used as its own gradient
    grad_hidden, grad_weight = torch.empty_like(plain_hidden), torch.empty_like(plain_weight)

    def products():
        torch.mm(plain_hidden, plain_weight.T, out=logits)
        torch.mm(plain_hidden, plain_weight.T, out=logits)
        torch.mm(logits, plain_weight, out=grad_hidden)
        torch.mm(logits.T, plain_hidden, out=grad_weight)

    # In turn: if the machine slows down, it slows both.
    pairs = [[median_seconds(function, 1) for function in (ours, products)] for _ in range(repeats)]
    ours_seconds, products_seconds = map(statistics.median, zip(*pairs, strict=True))
    return ours_seconds, products_seconds


def show(bench: str, result: dict, *tables: list[tuple]) -> None:
    """Print one JSON line, then the tables. A table is a list of rows of cells; its first row is the header."""
    print(json.dumps({"bench": bench, "date": time.strftime("%Y-%m-%d")} | result))
    for rows in tables:
        cells = [[f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print()
        for first, *others in cells:
            print(first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)))
