"""The trained model: loading, exact logprobs and entropy without [tokens, vocabulary] tensors, packing, sharding."""

import contextlib
import dataclasses
import itertools
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

import ranks
from prompts import UserError
from rollout import Response

# Final transformations of the logits that some architectures apply (Gemma 2, Granite, Cohere) and this head does not.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_model(
    path: str, device: str = "cpu", gradient_checkpointing: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 (the master weights) and its tokenizer, from a folder or a hub name.

    gradient_checkpointing: keep only the input of each layer for backward, which computes the rest again.

    Only safetensors are read and no code of the folder is run. Raises UserError, in one sentence, for what is no model
    or has a head that `head_logprobs` would get wrong.
    """
    check_model(path)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="packed", use_safetensors=True, trust_remote_code=False
    ).to(device)
    if not model._supports_attention_backend:
        raise UserError(f"model '{path}': transformers cannot exchange the attention of a {type(model).__name__}")
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise UserError(f"model '{path}': its output head is not a plain linear layer without bias")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode alone; the ratio allows no dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
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


# ----------------------------------------------------------------------------------------------------------------------
# Logprob, entropy and S of tokens, in one pass over the vocabulary


class HeadLogprobs(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> logprobs, entropy, S, each [N] in float32.

    With z = hidden weight^T / temperature, p = softmax(z) and a the target:
        logprob = log p_a                       d logprob / dz = onehot(a) - p
        entropy H = - sum_k p_k log p_k         d H / dz       = - p (log p + H)
        S = sum_k p_k^2 (log p_k + H)           (no gradient)
    The logits exist for `width` entries of the vocabulary at a time, forward folds them into five sums a token, and
    backward computes them again. So the head's weight is read once and its gradient written once in either direction.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, width: int):
        # With m the largest logit so far: sum e, sum e (z - m), sum e^2, sum e^2 (z - m), where e = exp(z - m).
        m = torch.full_like(targets, -1e30, dtype=torch.float32)  # [N]; not -inf, whose products with 0 are NaN
        sums = tuple(torch.zeros_like(m) for _ in range(4))  # [N] each
        target_logits = torch.zeros_like(m)  # [N]
        for columns in _tiles(len(weight), width):
            z = _logits(hidden, weight[columns], temperature)  # [N, W]
            inside, place = _targets_in(columns, targets)
            target_logits += z.gather(1, place[:, None]).squeeze(1) * inside
            m, sums = _on_device(_fold, hidden)(z, m, sums)
        e, ez, ee, eez = sums
        log_z = m + e.log()
        entropy = e.log() - ez / e
        S = (eez - ez / e * ee) / e.square()
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.temperature, ctx.width = temperature, width
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        return target_logits - log_z, entropy, S

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _):
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # [N, D]
        grad_weight = torch.empty_like(weight)  # [V, D]
        for columns in _tiles(len(weight), ctx.width):
            z = _logits(hidden, weight[columns], ctx.temperature)  # [N, W]
            grad_z = _on_device(_grad_logits, hidden)(z, log_z, entropy, grad_logprobs, grad_entropy)
            if grad_logprobs is not None:
                inside, place = _targets_in(columns, targets)
                grad_z.scatter_add_(1, place[:, None], (grad_logprobs * inside)[:, None])
            grad_z = (grad_z / ctx.temperature if ctx.temperature != 1 else grad_z).to(hidden.dtype)
            grad_hidden += grad_z @ weight[columns].to(hidden.dtype)
            grad_weight[columns] = grad_z.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _tiles(length: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, length)) for start in range(0, length, width))


def _targets_in(columns: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in this tile, and their column in it (of the others some column). [N] each."""
    place = targets - columns.start
    inside = (place >= 0) & (targets < columns.stop)
    return inside, place.clamp(0, columns.stop - columns.start - 1)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[N, D], [W, D] -> [N, W] in float32; bfloat16 factors are not rounded again on a GPU."""
    weight = weight.to(hidden.dtype)
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.T).float()
    return logits if temperature == 1 else logits / temperature


def _fold(z: Tensor, m: Tensor, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add a tile of logits [N, W] to the sums [N] about their running maximum m [N]."""
    e, ez, ee, eez = sums
    new_m = torch.maximum(m, z.amax(1))
    shift = m - new_m
    scale = shift.exp()
    z = z - new_m[:, None]
    p = z.exp()
    pz = p * z
    return new_m, (
        e * scale + p.sum(1),
        (ez + shift * e) * scale + pz.sum(1),
        ee * scale**2 + (p * p).sum(1),
        (eez + shift * ee) * scale**2 + (p * pz).sum(1),
    )


def _grad_logits(z: Tensor, log_z: Tensor, entropy: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None):
    """The gradient of a tile of logits [N, W], but for the target's own 1."""
    log_p = z - log_z[:, None]
    factor = torch.zeros_like(log_z)[:, None] if grad_logprobs is None else -grad_logprobs[:, None]
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
    return log_p.exp() * factor


_compiled = {}


def _on_device(function, tensor: Tensor):
    """On a GPU the element-wise work of a tile becomes one kernel; on a CPU a compiler is not worth its wait."""
    if not tensor.is_cuda:
        return function
    return _compiled.setdefault(function, torch.compile(function, dynamic=True))


def head_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprob of `targets`, full-vocabulary entropy in nats, and S: [N, D], [V, D], [N] -> three times [N], float32.

    All three are of softmax(logits / temperature), the distribution that was sampled from. The first two have
    gradients. width bounds the memory: the entries of the vocabulary whose logits exist at a time. By default they take
    4 MiB on a CPU, so that they stay in its caches, and 64 MiB on a GPU.
    """
    if width is None:
        width = max(256, (2**24 if hidden.is_cuda else 2**20) // max(1, len(hidden)))
    return HeadLogprobs.apply(hidden, weight, targets, temperature, width)


# ----------------------------------------------------------------------------------------------------------------------
# Packed micro-batches: no padding, and the prompt of a group once


@dataclasses.dataclass
class Packing:
    """Where the packed tokens stand in their sequences. Only attention asks; all else in a model is by token."""

    order: Tensor  # [L]  the sequences' tokens one behind the other, shared prompts repeated, as packed indices
    places: Tensor  # [N]  the inverse: where each packed token stands in `order`, once
    starts: Tensor  # [B + 1]  int32, where the sequences start in `order`
    longest: int  # tokens
    blocks: list[tuple[int, int]]  # CPU: `order` as padded blocks [b, t] of sequences of like length


@dataclasses.dataclass
class Batch:
    """Responses one behind the other, without padding; a prompt that several neighbours share stands there once."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N]
    packing: Packing
    predecessors: Tensor  # [tokens of all responses]  packed index of the token before each response token
    targets: Tensor  # [tokens of all responses]  their ids
    response_mask: Tensor  # [B, R]  True for the response's tokens, end-of-sequence included; R of the longest response
    old_logprobs: Tensor  # [B, R]
    old_entropy: Tensor  # [B, R]
    rollout_logprobs: Tensor  # [B, R]
    advantages: Tensor  # [B, R]


def collate(responses: list[Response], device: str = "cpu") -> Batch:
    """The mask comes from lengths alone, never from token ids: padding may well be the end-of-sequence token.

    No responses at all make a batch that can be computed and has no response tokens, for a rank with nothing to do.
    """
    if not responses:
        batch = collate([Response([0], [0], torch.zeros(1), False, "")], device)
        return dataclasses.replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    ids, positions, predecessors, targets = [], [], [], []
    sequences: list[list[int]] = []  # packed indices of each sequence's tokens
    prompt_ids, prompt = None, range(0)
    for r in responses:
        if r.prompt_ids != prompt_ids:
            prompt_ids, prompt = r.prompt_ids, range(len(ids), len(ids) + len(r.prompt_ids))
            ids += prompt_ids
            positions += range(len(prompt_ids))
        own = range(len(ids), len(ids) + len(r.response_ids))
        ids += r.response_ids
        positions += range(len(prompt_ids), len(prompt_ids) + len(r.response_ids))
        predecessors += [prompt[-1], *own[:-1]] if own else []
        targets += r.response_ids
        sequences.append([*prompt, *own])
    lengths = torch.tensor([len(r.response_ids) for r in responses])
    response_mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, R]

    def padded(values: list[Tensor]) -> Tensor:
        return torch.zeros(response_mask.shape).masked_scatter(response_mask, torch.cat(values))

    unknown = [torch.zeros(len(r.response_ids)) for r in responses]
    measured = responses[0].old_logprobs is not None
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        packing=pack(sequences, len(ids), device),
        predecessors=torch.tensor(predecessors, device=device),
        targets=torch.tensor(targets, device=device),
        response_mask=response_mask.to(device),
        old_logprobs=padded([r.old_logprobs for r in responses] if measured else unknown).to(device),
        old_entropy=padded([r.entropy for r in responses] if measured else unknown).to(device),
        rollout_logprobs=padded([r.rollout_logprobs for r in responses]).to(device),
        advantages=padded([torch.full((len(r.response_ids),), r.advantage) for r in responses]).to(device),
    )


def pack(sequences: list[list[int]], tokens: int, device: str) -> Packing:
    """sequences: the packed indices of each sequence's tokens; `tokens` of them are distinct.

    On a GPU attention takes sequences of any lengths; on a CPU it takes blocks, so that some places are padding.
    """
    sequences = sorted(sequences, key=len)
    blocks = [] if device.startswith("cuda") else like_lengths([len(s) for s in sequences])
    lengths = [t for b, t in blocks for _ in range(b)] or [len(s) for s in sequences]
    starts = [0, *itertools.accumulate(lengths)]
    order = torch.zeros(starts[-1], dtype=torch.long)  # where there is padding it stays 0: a real token, never read
    places = torch.empty(tokens, dtype=torch.long)
    for sequence, start in zip(sequences, starts, strict=False):
        place = slice(start, start + len(sequence))
        order[place] = torch.tensor(sequence)
        places[order[place]] = torch.arange(place.start, place.stop)  # of a shared prompt's equal results any will do
    starts = torch.tensor(starts, dtype=torch.int32)
    return Packing(order.to(device), places.to(device), starts.to(device), max(lengths), blocks)


def like_lengths(lengths: list[int], waste: float = 0.15) -> list[tuple[int, int]]:
    """Ascending lengths -> blocks (sequences, longest) with at most this share of padding each."""
    blocks, first, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if (i - first + 1) * length * (1 - waste) > tokens + length:
            blocks.append((i - first, lengths[i - 1]))
            first, tokens = i, 0
        tokens += length
    return [*blocks, (len(lengths) - first, lengths[-1])]


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, packing: Packing, scaling=None, **options
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence, in the form transformers calls: [1, H, N, d] -> [1, N, H, d]."""
    if refused := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise UserError(f"{type(module).__name__}: attention with {refused[0]} is not supported")
    window = options.get("sliding_window")
    q, k, v = (_take(x[0].transpose(0, 1), packing.order) for x in (query, key, value))  # [L, H, d]
    if query.is_cuda:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        ends = {
            "max_q": packing.longest,
            "max_k": packing.longest,
            "cu_seq_q": packing.starts,
            "cu_seq_k": packing.starts,
        }
        sides = (-1 if window is None else window - 1, 0)
        out = varlen_attn(q, k, v, **ends, scale=scaling, window_size=sides, enable_gqa=True)  # [L, H, d]
    else:
        out, sizes = [], [b * t for b, t in packing.blocks]
        for (b, t), *qkv in zip(packing.blocks, *(x.split(sizes) for x in (q, k, v)), strict=True):
            qkv = (x.unflatten(0, (b, t)).transpose(1, 2) for x in qkv)  # [b, H, t, d]
            mask = None if window is None or window >= t else torch.ones(t, t, dtype=torch.bool).tril().triu(1 - window)
            block = F.scaled_dot_product_attention(
                *qkv, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
            out.append(block.transpose(1, 2).flatten(0, 1))
        out = torch.cat(out)  # [L, H, d]
    return _take(out, packing.places)[None], None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first of x's three dimensions; as an embedding, whose backward is the fast and exact one."""
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])


AttentionInterface.register("packed", packed_attention)


def micro_batches(responses: list[Response], max_tokens: int) -> list[list[int]]:
    """Indices of `responses`, cut so that no micro-batch holds more than max_tokens packed tokens.

    In their order, so that a group stays together and its prompt is computed once. A single response longer than
    max_tokens is a batch of its own.
    """
    batches: list[list[int]] = []
    tokens, prompt_ids = 0, None
    for i, r in enumerate(responses):
        added = len(r.response_ids) + (0 if r.prompt_ids == prompt_ids else len(r.prompt_ids))
        if not batches or tokens + added > max_tokens:
            batches.append([])
            tokens, added = 0, len(r.prompt_ids) + len(r.response_ids)
        batches[-1].append(i)
        tokens, prompt_ids = tokens + added, r.prompt_ids
    return batches


def forward(model: PreTrainedModel, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropy and S of the response's tokens, each [B, R], 0 elsewhere. Prompts never reach the head."""
    assert model.config._attn_implementation == "packed"  # any other would look across sequences
    mask = batch.response_mask
    with torch.autocast(mask.device.type, torch.bfloat16, enabled=mask.is_cuda):
        hidden = model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            packing=batch.packing,
            use_cache=False,
        ).last_hidden_state[0]  # [N, D]
    weight = model.get_output_embeddings().weight
    statistics = head_logprobs(F.embedding(batch.predecessors, hidden), weight, batch.targets, temperature)
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, entropy, S = (zeros.masked_scatter(mask, values) for values in statistics)
    return logprobs, entropy, S


@torch.no_grad()
def measure(policy: torch.nn.Module, responses: list[Response], temperature: float, max_tokens: int, device: str):
    """Fill in old_logprobs and entropy, [R] each, of every response under the weights as they are now. Collective."""
    for indices in even_passes(micro_batches(responses, max_tokens)):
        chosen = [responses[i] for i in indices]
        batch = collate(chosen, device)
        logprobs, entropy, _ = policy(batch, temperature)
        remember(chosen, logprobs, entropy, batch.response_mask)


def remember(responses: list[Response], logprobs: Tensor, entropy: Tensor, response_mask: Tensor) -> None:
    """Fill in old_logprobs and entropy from [B, R] tensors that the rollout weights gave."""
    lengths = [len(r.response_ids) for r in responses]
    old_logprobs = logprobs.detach()[response_mask].cpu().split(lengths)
    entropies = entropy.detach()[response_mask].cpu().split(lengths)
    for i, response in enumerate(responses):
        response.old_logprobs, response.entropy = old_logprobs[i], entropies[i]


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


class Policy(torch.nn.Module):
    """A model as the function from batches to logprobs, entropy and S: the unit that DDP and FSDP wrap."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        return forward(self.model, batch, temperature)


def distribute(model: PreTrainedModel, shard: bool) -> torch.nn.Module:
    """The model as a `Policy` over all ranks: copied (DDP), or sharded layer by layer (FSDP2), with its gradients
    averaged. Every rank must make the same number of forward and backward passes: see `even_passes`.
    """
    policy = Policy(model)
    if ranks.world() == 1:
        return policy
    if not shard:
        return DistributedDataParallel(policy, forward_sync_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (ranks.world(),))
    precision = MixedPrecisionPolicy(torch.bfloat16 if mesh.device_type == "cuda" else None, torch.float32)
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)  # embedding, last norm and head: whole until backward


def even_passes(batches: list[list[int]]) -> list[list[int]]:
    """As many micro-batches as the rank with the most has; the added ones are empty, and `collate` takes them."""
    return batches + [[]] * (max(ranks.gather(len(batches))) - len(batches))


def gradients_stay_here(actor: torch.nn.Module):
    """A context for all but the last backward pass of an update: DDP then sums over ranks once. FSDP always sums."""
    return actor.no_sync() if isinstance(actor, DistributedDataParallel) else contextlib.nullcontext()


def clip_gradients(actor: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients down to max_norm; returns their norm before that, over all shards."""
    norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights by their checkpoint names, tied ones once, one tensor at a time; of a sharded model each is whole."""
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


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


def work_of(mini_batches: list[list[Response]]) -> tuple[int, int, int, int]:
    """What updates on these responses have to compute: (tokens of prompts and responses, the same with the prompt of a
    group counted once, tokens of responses, sum of squared lengths)."""
    responses = [response for mini_batch in mini_batches for response in mini_batch]
    pairs = [(len(r.prompt_ids), len(r.response_ids)) for r in responses]
    prompts = sum(
        len(r.prompt_ids) for i, r in enumerate(responses) if i == 0 or r.prompt_ids != responses[i - 1].prompt_ids
    )
    tokens, response_tokens = sum(map(sum, pairs)), sum(R for _, R in pairs)
    return tokens, prompts + response_tokens, response_tokens, sum((P + R) ** 2 for P, R in pairs)


def speed(
    model: PreTrainedModel, sampled_tokens: float, work: list[float], seconds: dict, rate: float, device: str
) -> dict[str, float]:
    """perf/* of a step, from its time/* in `seconds`. sampled_tokens and work are of all ranks; rate is of one device.

    Update tokens are those of prompts and responses, not padding. mfu counts only what must be computed: a shared
    prompt once, no recomputation.
    """
    metrics = {
        "perf/rollout_tokens_per_s": sampled_tokens / seconds["time/rollout"],
        "perf/peak_memory_gib": peak_memory_gib(device),
    }
    tokens, *needed = work
    if tokens:
        metrics["perf/update_tokens_per_s"] = tokens / seconds["time/update"]
        metrics["perf/mfu"] = flops(model, *needed) / seconds["time/update"] / (rate * ranks.world())
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
