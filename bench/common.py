"""Shared by the benches: random models and responses, timing, the cost of the head function, output."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from ce_gppo.entropy import token_statistics
from ce_gppo.types import Response


def save_random_model(folder: Path, config: PretrainedConfig, device: str = "cpu") -> int:
    """Save a model with random weights and a dummy tokenizer as a Hugging Face folder. Returns its parameter count."""
    disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def random_ids(length: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    """Token ids without 0 and 1, which are padding and end-of-sequence."""
    return torch.randint(2, vocabulary, (length,), generator=generator).tolist()


def response_of(prompt_ids: list[int], response_ids: list[int], advantage: float = 0.0, **fields) -> Response:
    """A response as rollout.py would give it; its vLLM logprobs are 0, which the objectives do not read."""
    R = len(response_ids)
    fields["advantages"] = torch.full((R,), advantage)
    return Response(prompt_ids, response_ids, torch.zeros(R), truncated=False, text="", **fields)


def timed(function: Callable[[], object], cuda: bool = False) -> float:
    """Seconds of one call."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds(function: Callable[[], object], repeats: int = 5, cuda: bool = False) -> list[float]:
    """Seconds of each of `repeats` calls. One more call, before them, warms up."""
    return [timed(function, cuda) for _ in range(repeats + 1)][1:]


def head_seconds(
    hidden: Tensor, weight: Tensor, targets: Tensor, repeats: int = 5, width: int | None = None
) -> tuple[float, float]:
    """Median seconds of token_statistics with backward, and of the four matrix products that it cannot avoid.

    hidden [N, D], weight [V, D], targets [N], in the dtypes that the update uses; width as in token_statistics. The
    four products are one in forward, its recomputation, and two in backward. They are in bfloat16 on a GPU and in
    float32 on a CPU, and they write into memory that is already allocated.
    """
    cuda, dtype = hidden.is_cuda, torch.bfloat16 if hidden.is_cuda else torch.float32
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def ours():
        logprobs, _, _ = token_statistics(hidden, weight, targets, width=width)  # [N]
        return torch.autograd.grad(logprobs.sum(), (hidden, weight))

    plain_hidden, plain_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    logits = plain_hidden.new_empty(len(hidden), len(weight))  # [N, V], also used as its own gradient
    grad_hidden, grad_weight = torch.empty_like(plain_hidden), torch.empty_like(plain_weight)

    def products():
        torch.mm(plain_hidden, plain_weight.T, out=logits)
        torch.mm(plain_hidden, plain_weight.T, out=logits)
        torch.mm(logits, plain_weight, out=grad_hidden)
        torch.mm(logits.T, plain_hidden, out=grad_weight)

    pairs = []  # in turn: if the machine slows down, it slows both
    for _ in range(repeats):
        pairs.append([seconds(function, 1, cuda)[0] for function in (ours, products)])
    ours_seconds, products_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours_seconds, products_seconds


def show(result: dict, *tables: list[tuple]) -> None:
    """Print one JSON line, then the tables. A table is a list of rows of cells; its first row is the header."""
    print(json.dumps(result))
    for rows in tables:
        cells = [[f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        print()
        for row in cells:
            print(
                row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            )
