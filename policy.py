"""The trained model: loading, the forward pass, one process or many, its weights for vLLM, its speed."""

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

import ranks
from head import head_logprobs
from packing import Batch, collate, micro_batches, take
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
# Forward


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
        ).last_hidden_state[0]  # [N, D], of float32 under autocast, as the residual stream is
    hidden = hidden.to(torch.bfloat16) if hidden.is_cuda else hidden  # what vLLM's head sees
    weight = model.get_output_embeddings().weight
    statistics = head_logprobs(take(hidden, batch.predecessors), weight, batch.targets, temperature)
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
