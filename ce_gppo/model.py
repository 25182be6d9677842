"""The trained model: loading it, refusing what would train wrongly, and its weights by their checkpoint names."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
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

from ce_gppo import dist
from ce_gppo.forward import packed_attention
from ce_gppo.types import UserError

# Final transformations of the logits that some architectures apply (Gemma 2, Granite, Cohere) and ours does not.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def load_model(
    path: str, device: str = "cpu", gradient_checkpointing: bool = False, shard: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 (the master weights) and its tokenizer, from a folder or a hub name.

    gradient_checkpointing: keep only the input of each layer for backward, which computes the rest again.
    shard: the model will be sharded over several processes; it stays on the CPU, and its shards move to the devices.

    Only safetensors are read and no code of the folder is run. Raises UserError, in one sentence, for what is no model
    or has a head that `token_statistics` would get wrong.
    """
    check_model(path)
    device = "cpu" if shard and dist.world_size() > 1 else device
    disable_progress_bar()
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="packed", use_safetensors=True, trust_remote_code=False
    ).to(device)
    if not model._supports_attention_backend:
        raise UserError(f"model '{path}': transformers cannot replace the attention of a {type(model).__name__}")
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise UserError(f"model '{path}': its output head is not a plain linear layer without bias")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode only; the ratio allows no dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def register_attention() -> None:
    """Make attn_implementation "packed" known to transformers."""
    AttentionInterface.register("packed", packed_attention)


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


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights by their checkpoint names, tied ones once, one tensor at a time; of a sharded model each is whole."""
    for name, parameter in model.named_parameters():
        yield name, dist.whole(parameter.detach())
