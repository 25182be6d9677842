"""LoRA (arXiv 2106.09685): the model is frozen, and every linear layer of its body trains two small matrices.

A layer with weight W computes W x + alpha / r B (A x), with A [r, in] and B [out, r]. peft has these layers. vLLM and
the checkpoint's folder get W + alpha / r B A; the adapters alone are in the folder inside it, in peft's form.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ce_gppo import parallel

FILE = "adapter/adapter_model.safetensors"  # in a checkpoint


@torch.no_grad()
def add_adapters(model, config, last: Path | None) -> None:
    """Freeze the weights, in the engine's precision, and add adapters in float32: new ones, or those of `last`."""
    import peft  # takes 2 s

    torch.manual_seed(config.seed)  # the same A on every rank; B is 0
    options = {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "base_model_name_or_path": config.model}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options), model)
    if torch.cuda.is_available():
        for parameter in model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
        embedding = model.get_input_embeddings()  # the residual stream is float32, as without adapters
        embedding.register_forward_hook(lambda module, inputs, output: output.float())
    saved = load_file(last / FILE) if last else {}
    for name, parameter in adapters(model).items() if last else ():
        parameter.copy_(saved[name])


def adapters(model) -> dict[str, torch.nn.Parameter]:
    """The adapters by their names in peft's files. Empty without LoRA."""
    named = ((name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name)
    return {f"base_model.model.{name.replace('.default', '')}": parameter for name, parameter in named}


def write_adapters(folder: Path, model, weights: dict[str, Tensor]) -> None:
    model.peft_config["default"].save_pretrained((folder / FILE).parent)
    save_file(weights, folder / FILE, {"format": "pt"})


class WithoutAdapters(torch.nn.Module):
    """The policy's forward pass as it was before training."""

    def __init__(self, policy: torch.nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, *inputs):
        from peft.helpers import rescale_adapter_scale

        with rescale_adapter_scale(self.policy, 0.0):
            return self.policy(*inputs)


@torch.no_grad()
def named_weights(model) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, tensor) of each weight and of each buffer that checkpoints have. Collective.

    Shards are gathered, and adapters are merged in float32 and rounded once, one tensor at a time.
    """
    saved = model.state_dict(keep_vars=True).keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in [*model.named_parameters(), *buffers]:
        weight, (layer, adapted, _) = parallel.full_tensor(tensor.detach()), name.rpartition(".base_layer.weight")
        if adapted:
            delta = parallel.full_tensor(model.get_submodule(layer).get_delta_weight("default"))  # alpha / r B A
            weight = (weight + delta).to(weight.dtype)
        if ".lora_" not in name:  # transformers keeps a layer's experts as one weight, their files have one of each
            yield from revert_weight_conversion(model, {name.replace(".base_layer", ""): weight}).items()
