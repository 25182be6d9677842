"""The trained model: loading, exact logprobs and entropy without [tokens, vocabulary] tensors, batches, checkpoints."""

import dataclasses
import os
import resource
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from prompts import UserError
from rollout import Response

# Final transformations of the logits that some architectures apply (Gemma 2, Granite, Cohere) and this head does not.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_model(path: str, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 (the master weights) and its tokenizer, from a folder or a hub name.

    Only safetensors are read and no code of the folder is run. Raises UserError, in one sentence, for what is no model
    or has a head that `head_logprobs` would get wrong.
    """
    check_model(path)
    disable_progress_bar()
    attention = "flash_attention_2" if device.startswith("cuda") and _has_flash_attention() else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention, use_safetensors=True, trust_remote_code=False
    ).to(device)
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise UserError(f"model '{path}': its output head is not a plain linear layer without bias")
    return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def check_model(path: str) -> PretrainedConfig:
    """Its configuration; UserError if `path` is no model folder (nor a hub name), or its logits are transformed."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"model '{path}': the folder has no config.json, so it is no Hugging Face model")
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith((".", "/"))):
        raise UserError(f"model '{path}': no such folder, and not a hub name like 'Qwen/Qwen2.5-1.5B'")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model '{path}': cannot read its config: {str(error).splitlines()[0]}") from None
    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise UserError(f"model '{path}': the folder has no .safetensors weights (pickled ones are not read)")
    for name in LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(f"model '{path}': {name} = {getattr(config, name)} changes its logits; not supported")
    return config


def context_of(path: str) -> int:
    """Tokens that prompt and response may have together."""
    return check_model(path).max_position_embeddings


def _has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()


# ----------------------------------------------------------------------------------------------------------------------
# Logprob, entropy and S of tokens, in one pass over the vocabulary


class HeadLogprobs(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> logprobs, entropy, S, each [N] in float32.

    With z = hidden weight^T / temperature, p = softmax(z) and a the target:
        logprob = log p_a                       d logprob / dz = onehot(a) - p
        entropy H = - sum_k p_k log p_k         d H / dz       = - p (log p + H)
        S = sum_k p_k^2 (log p_k + H)           (no gradient)
    Logits exist for `chunk_size` tokens at a time, and are computed again in backward.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        logprobs, entropy, S = hidden.new_empty(3, len(hidden), dtype=torch.float32)  # [N] each
        for chunk in _chunks(len(hidden), chunk_size):
            log_p = _log_softmax(hidden[chunk], weight, temperature)  # [C, V]
            p = log_p.exp()
            logprobs[chunk] = log_p.gather(1, targets[chunk, None]).squeeze(1)
            entropy[chunk] = -torch.linalg.vecdot(p, log_p)
            S[chunk] = torch.linalg.vecdot(p, p) * entropy[chunk] + torch.linalg.vecdot(p.square_(), log_p)
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, S

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)  # [N, D]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # [V, D]
        for chunk in _chunks(len(hidden), ctx.chunk_size):
            log_p = _log_softmax(hidden[chunk], weight, ctx.temperature)  # [C, V]
            p = log_p.exp()
            grad_logits = torch.zeros_like(p) if grad_logprobs is None else p * -grad_logprobs[chunk, None]
            if grad_logprobs is not None:
                grad_logits.scatter_add_(1, targets[chunk, None], grad_logprobs[chunk, None])
            if grad_entropy is not None:
                H = -torch.linalg.vecdot(p, log_p)[:, None]
                grad_logits -= grad_entropy[chunk, None] * p * (log_p + H)
            grad_logits = (grad_logits / ctx.temperature).to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight.to(hidden.dtype)
            grad_weight += grad_logits.T @ hidden[chunk]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((hidden @ weight.to(hidden.dtype).T).float() / temperature, dim=-1)


def head_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprob of `targets`, full-vocabulary entropy in nats, and S: [N, D], [V, D], [N] -> three times [N], float32.

    All three are of softmax(logits / temperature), the distribution that was sampled from. The first two have
    gradients. chunk_size (tokens) bounds the memory; by default a chunk's logits take about 64 MiB.
    """
    if chunk_size is None:
        chunk_size = max(1, 2**24 // len(weight))
    return HeadLogprobs.apply(hidden, weight, targets, temperature, chunk_size)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@dataclasses.dataclass
class Batch:
    """Responses padded to the right. Everything but input_ids is aligned with targets: place t is about token t + 1."""

    input_ids: Tensor  # [B, T]
    response_mask: Tensor  # [B, T - 1]  True for the response's tokens, end-of-sequence included
    old_logprobs: Tensor  # [B, T - 1]
    old_entropy: Tensor  # [B, T - 1]
    rollout_logprobs: Tensor  # [B, T - 1]
    advantages: Tensor  # [B, T - 1]


def collate(responses: list[Response], device: str = "cpu") -> Batch:
    """The mask comes from lengths alone, never from token ids: padding may well be the end-of-sequence token."""
    length = max(len(r.prompt_ids) + len(r.response_ids) for r in responses)
    batch = Batch(
        input_ids=torch.zeros(len(responses), length, dtype=torch.long),
        response_mask=torch.zeros(len(responses), length - 1, dtype=torch.bool),
        old_logprobs=torch.zeros(len(responses), length - 1),
        old_entropy=torch.zeros(len(responses), length - 1),
        rollout_logprobs=torch.zeros(len(responses), length - 1),
        advantages=torch.zeros(len(responses), length - 1),
    )
    for i, r in enumerate(responses):
        ids = r.prompt_ids + r.response_ids
        place = slice(len(r.prompt_ids) - 1, len(ids) - 1)
        batch.input_ids[i, : len(ids)] = torch.tensor(ids)
        batch.response_mask[i, place] = True
        batch.rollout_logprobs[i, place] = r.rollout_logprobs
        batch.advantages[i, place] = r.advantage
        if r.old_logprobs is not None:
            batch.old_logprobs[i, place] = r.old_logprobs
            batch.old_entropy[i, place] = r.entropy
    return Batch(**{field.name: getattr(batch, field.name).to(device) for field in dataclasses.fields(batch)})


def micro_batches(responses: list[Response], max_tokens: int) -> list[list[int]]:
    """Indices of `responses`, cut so that no micro-batch holds more than max_tokens tokens, padding included.

    Sorted by length, so that little of it is padding. A single response longer than max_tokens is a batch of its own.
    """
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in responses]
    batches: list[list[int]] = []
    for i in sorted(range(len(responses)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def forward(model: PreTrainedModel, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropy and S of the response's tokens, each [B, T - 1], 0 elsewhere. Prompts never reach the head.

    Right padding and causal attention: no token sees padding, so no attention mask is needed.
    """
    mask = batch.response_mask
    autocast = torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=batch.input_ids.is_cuda)
    with autocast:
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
    statistics = head_logprobs(
        hidden[:, :-1][mask], model.get_output_embeddings().weight, batch.input_ids[:, 1:][mask], temperature
    )
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, entropy, S = (zeros.masked_scatter(mask, values) for values in statistics)
    return logprobs, entropy, S


@torch.no_grad()
def measure(model: PreTrainedModel, responses: list[Response], temperature: float, max_tokens: int, device: str):
    """Fill in old_logprobs and entropy, [R] each, of every response under the model's weights as they are now."""
    for indices in micro_batches(responses, max_tokens):
        chosen = [responses[i] for i in indices]
        batch = collate(chosen, device)
        logprobs, entropy, _ = forward(model, batch, temperature)
        lengths = [len(r.response_ids) for r in chosen]
        old_logprobs = logprobs[batch.response_mask].cpu().split(lengths)
        entropies = entropy[batch.response_mask].cpu().split(lengths)
        for i, response in enumerate(chosen):
            response.old_logprobs, response.entropy = old_logprobs[i], entropies[i]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def named_weights(model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
    """Weights by their checkpoint names, tied ones once: what save_pretrained would write, one tensor at a time."""
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def save_checkpoint(folder: Path, model: PreTrainedModel, tokenizer, optimizer, state: dict) -> None:
    """A Hugging Face folder that vLLM and transformers load as it is, with trainer.pt (optimizer and `state`) inside.

    Written aside, flushed to the disk and renamed: a folder of this name is always whole.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    torch.save({"optimizer": optimizer.state_dict(), "state": state}, aside / "trainer.pt")
    for path in [*aside.iterdir(), aside]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load_trainer_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer of a checkpoint, in place; returns its `state`. Its weights are `load_model`'s to load."""
    saved = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def flops(model: PreTrainedModel, prompt_and_response: int, response: int, squares: int) -> float:
    """Floating-point operations of forward and backward (6 a weight and token; arXiv 2204.02311, appendix B).

    prompt_and_response: tokens through the blocks. response: tokens through the head. squares: the sum of the squared
    sequence lengths, for causal attention, which sees half of each square.
    """
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - embedding - (0 if config.tie_word_embeddings else head)
    attention = 6 * config.num_hidden_layers * config.hidden_size * squares
    return 6.0 * (blocks * prompt_and_response + head * response) + attention


def speed(
    model: PreTrainedModel,
    sampled: list[Response],
    trained: list[Response],
    seconds: dict[str, float],
    matrix_rate: float,
    device: str,
) -> dict[str, float]:
    """perf/* of a step, from its time/* in `seconds`. Update tokens are those of prompts and responses, not padding."""
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in trained]
    response_tokens = sum(len(r.response_ids) for r in trained)
    metrics = {
        "perf/rollout_tokens_per_s": sum(len(r.response_ids) for r in sampled) / seconds["time/rollout"],
        "perf/peak_memory_gib": peak_memory_gib(device),
    }
    if trained:
        work = flops(model, sum(lengths), response_tokens, sum(length**2 for length in lengths))
        metrics["perf/update_tokens_per_s"] = sum(lengths) / seconds["time/update"]
        metrics["perf/mfu"] = work / seconds["time/update"] / matrix_rate
    return metrics


def matrix_rate(device: str) -> float:
    """Floating-point operations a second of one large matrix product, measured: what MFU is a share of."""
    size, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib(device: str) -> float:
    """Of this process: allocated by torch on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
