"""What several benches share: random models on the disk, the head function against its bare matrix products, output."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[1]))

import head


def save_random_model(folder: Path, config: PretrainedConfig, device: str = "cpu") -> int:
    """Random weights and a tokenizer that is there to be loaded, as a Hugging Face folder; returns the parameters."""
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


def seconds(function: Callable[[], object], repeats: int = 5, cuda: bool = False) -> list[float]:
    """Of each of `repeats` calls, after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[1:]


def head_seconds(hidden: Tensor, weight: Tensor, targets: Tensor, repeats: int = 5) -> tuple[float, float]:
    """Median seconds of head.head_logprobs with backward, and of the four matrix products that it cannot avoid.

    hidden [N, D], weight [V, D], targets [N], of the types that the update has. The products are those of forward, of
    its recomputation and two of backward: bfloat16 on a GPU, float32 on a CPU, into memory that is there already.
    """
    cuda, dtype = hidden.is_cuda, torch.bfloat16 if hidden.is_cuda else torch.float32
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def ours():
        logprobs, _, _ = head.head_logprobs(hidden, weight, targets)  # [N]
        return torch.autograd.grad(logprobs.sum(), (hidden, weight))

    plain_hidden, plain_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    logits = plain_hidden.new_empty(len(hidden), len(weight))  # [N, V], in place of its gradient too
    grad_hidden, grad_weight = torch.empty_like(plain_hidden), torch.empty_like(plain_weight)

    def products():
        torch.mm(plain_hidden, plain_weight.T, out=logits)
        torch.mm(plain_hidden, plain_weight.T, out=logits)
        torch.mm(logits, plain_weight, out=grad_hidden)
        torch.mm(logits.T, plain_hidden, out=grad_weight)

    pairs = []  # in turn, so that a machine that slows down slows both
    for _ in range(repeats):
        pairs.append([seconds(function, 1, cuda)[0] for function in (ours, products)])
    ours_seconds, products_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours_seconds, products_seconds


def show(result: dict, *tables: list[tuple]) -> None:
    """One JSON line, then tables: rows of cells, the first row being the header."""
    print(json.dumps(result))
    for rows in tables:
        cells = [[f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        print()
        for row in cells:
            print(
                row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            )
