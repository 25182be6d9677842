"""The trained model: loading it, refusing models that would train wrongly, and its weights by checkpoint names."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch._dynamo
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from ce_gppo import parallel
from ce_gppo.batch import Rollout, pack
from ce_gppo.checkpoint import try_saving
from ce_gppo.messages import UserError, explained, say
from ce_gppo.policy import Policy, register_attention

# Final transformations of the logits in some architectures (Gemma 2, Granite, Cohere). token_statistics has none.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
JSON = ("config", "generation_config", "tokenizer_config", "tokenizer", "special_tokens_map", "model.safetensors.index")


def load_model(path: str, device: str = "cpu", gradient_checkpointing: bool = False, shard: str = "no") -> tuple:
    """A causal language model in float32 (the master weights) and its tokenizer, from a folder or a hub name.

    gradient_checkpointing: keep only the input of each layer for backward, which computes the rest again.
    shard: as in parallel.distribute. A model that will be sharded stays on the CPU; its shards move to the devices.

    Only safetensors are read, and no code of the folder is run. Raises UserError for a folder that is not a model, and
    for a model that this program would train wrongly.
    """
    with explained(f"model '{path}' cannot be loaded"):
        config = check_config(path)
        disable_progress_bar()
        register_attention()
        options = {"attn_implementation": "packed", "use_safetensors": True, "trust_remote_code": False}
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # check_loaded refuses them
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        check_loaded(info, path)
        head = model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear) or head.bias is not None:
            raise UserError(f"model '{path}': its output head is not a plain linear layer without bias")
        try_saving(model, tokenizer)
        check_names(model, path)
        check_packing(model, path)
        check_end(tokenizer, path, config.vocab_size)
    for module in model.modules():  # vLLM's transformers backend changes the model's class, which this model shares;
        module.do_not_compile = True  # with this attribute the changed class leaves this model as it is
    model = model.to("cpu" if shard == "offload" or (shard == "yes" and parallel.world_size() > 1) else device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode only; the ratio allows no dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if device.startswith("cuda"):
        compile_layers(model)
    return model, tokenizer


def compile_layers(model: PreTrainedModel, **options) -> None:
    """Fuse the element-wise work of each decoder layer: its norms, rotary embedding, SwiGLU and sums. On a GPU only.

    In place, so that weights keep their names, and before FSDP2 wraps the layers. All layers and all lengths of
    micro-batches share the same few graphs. Attention is called between the graphs, because it needs the sequences.
    options: of torch.compile. TORCH_COMPILE_DISABLE=1 in the environment turns all compiling off.
    """
    torch._dynamo.config.optimize_ddp = False  # otherwise dynamo splits the graphs at the ends of DDP's buckets
    # Policy, critic and reference share their layers' code. Beyond 8 variants of it dynamo would compile no more.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or []):
            module.compile(dynamic=True, **options)


def load_reference(config, device: str) -> Policy | None:
    """The frozen policy of config.model, also in a resumed run, for the KL term; None if kl_coef is 0. Collective.

    It takes 4 bytes a parameter on each device (with shard: over all devices).
    """
    if not config.kl_coef:
        return None
    model, _ = load_model(config.model, device, shard=config.shard)
    policy = Policy(model)  # without gradients there is nothing for DDP to do
    return policy if config.shard == "no" else parallel.distribute(policy, config.shard, model._no_split_modules or [])


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, tensor) of each weight and of each buffer that checkpoints have; shards are gathered."""
    saved = model.state_dict(keep_vars=True).keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in [*model.named_parameters(), *buffers]:
        yield name, parallel.full_tensor(tensor.detach())


# ----------------------------------------------------------------------------------------------------------------------
# Checks: what the libraries do not report, or not by the name of the file


def check_config(path: str):
    """The model's configuration. UserError if `path` is no model that can be trained, as far as its config tells."""
    if Path(path).is_dir():
        check_files(Path(path))
    elif path.count("/") != 1 or path.startswith((".", "/")):
        raise UserError(f"model '{path}': no such folder, and not a hub name like 'Qwen/Qwen2.5-1.5B'")
    with explained(f"model '{path}': cannot read its config"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for name in LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(f"model '{path}': {name} = {getattr(config, name)} changes its logits; not supported")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model '{path}': its weights are quantized, and only floating-point ones train")
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if architecture and not architecture._supports_attention_backend:
        raise UserError(
            f"model '{path}': transformers cannot replace the attention of a {architecture.__name__}; docs/models.md "
            "lists the families that train"
        )
    return config


def check_files(folder: Path) -> None:
    """UserError for a file of the model that is missing, cut or no JSON. The libraries' errors do not name the file."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model '{folder}': the folder has no config.json, so it is not a Hugging Face model")
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model '{folder}': the folder has no .safetensors weights (pickled ones are not read)")
    for path in filter(Path.is_file, [*(folder / f"{name}.json" for name in JSON), *weights]):
        try:
            if path in weights:
                with safe_open(path, "pt"):
                    continue
            content = json.loads(path.read_bytes())
            named = content.get("weight_map", {}).values()
        except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            raise UserError(f"model '{folder}': {path.name} cannot be read: {error}; copy it again") from None
        if missing := sorted(name for name in set(map(str, named)) if not (folder / name).is_file()):
            raise UserError(f"model '{folder}': {path.name} names {missing[0]}, which is not there")


def check_loaded(info: dict, path: str) -> None:
    """UserError for weights that the files lack or have in another shape; transformers has made random ones instead.

    A warning for weights that the model leaves out, such as layers beyond num_hidden_layers.
    """
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        shapes = f"{list(stored)} in the files, and {list(wanted)} by config.json"
        raise UserError(f"model '{path}': config.json does not fit the weights: {name} has the shape {shapes}")
    for kind, problem in (("missing", "are not in its files"), ("unexpected", "have no place in the model")):
        if names := sorted(info[f"{kind}_keys"]):
            message = f"model '{path}': {len(names)} weights, such as {names[0]}, {problem} that config.json describes"
            if kind == "missing":
                raise UserError(message)
            say(f"{message}: they are left out, and checkpoints will lack them", warning=True)


def check_names(model: PreTrainedModel, path: str) -> None:
    """UserError if a weight has different names in the model's files and in the model, as fused experts have.

    vLLM gets new weights by their names in the files. transformers may leave out or add the body's prefix.
    """
    stored = set()
    for file in Path(cached_file(path, "config.json")).parent.glob("*.safetensors"):  # also of a hub name
        with safe_open(file, "pt") as opened:
            stored.update(opened.keys())
    prefix = model.base_model_prefix + "."
    known = {name.removeprefix(prefix) for name in stored}
    missing = [name for name, _ in model.named_parameters() if name.removeprefix(prefix) not in known]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if stored and missing and not (tied and len(missing) == 1):
        raise UserError(
            f"model '{path}': {len(missing)} of its weights, such as {missing[0]}, have other names in its files, so "
            "they could not be sent to vLLM; a dense model trains"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, path: str) -> None:
    """UserError if two sequences in one pass change each other's logprobs: layers other than attention mix them."""
    lengths, tokens = torch.tensor([5, 3]), torch.tensor([3, 4, 5, 6, 7, 5, 6, 7])  # [B], [N]
    no_values, cut = torch.zeros(len(tokens)), torch.zeros(2, dtype=torch.bool)
    rollout = Rollout([[1, 2], [3, 4]], torch.tensor([0, 1]), lengths, tokens, no_values, cut, ["", ""])
    policy = Policy(model)
    together = policy(pack(rollout), 1.0)[0]  # [N]
    alone = torch.cat([policy(pack(rollout[[i]]), 1.0)[0] for i in range(2)])  # [N]
    if not alone.std() > 0:  # NaN, or the same everywhere
        raise UserError(
            f"model '{path}': its logprobs are {alone[0].item():.3g} for every token, so its weights are damaged, or "
            "stored in a format that config.json does not mention"
        )
    difference = (together - alone).abs().max().item()
    if not difference < 1e-4 * alone.std():  # rounding gives 1e-5 at most, a convolution 1e-3 and more
        raise UserError(
            f"model '{path}': the logprobs of a {type(model).__name__} change by {difference:.2g} nats when two "
            "sequences share a pass; only models that mix tokens in attention and nowhere else can be trained"
        )


def stop_token_ids(path: str, tokenizer) -> list[int]:
    """Every end-of-sequence id that the tokenizer, the configuration or the generation configuration names."""
    named = [tokenizer.eos_token_id, AutoConfig.from_pretrained(path, trust_remote_code=False).eos_token_id]
    try:
        named.append(GenerationConfig.from_pretrained(path).eos_token_id)
    except OSError as error:  # a missing file is fine, but an unreadable one may name another end token
        if (Path(path) / "generation_config.json").exists():
            raise UserError(f"model '{path}': generation_config.json cannot be read: {error}") from None
    ids = {i for entry in named for i in (entry if isinstance(entry, list) else [entry]) if i is not None}
    if wrong := [i for i in ids if type(i) is not int]:
        raise UserError(f"model '{path}': eos_token_id {wrong[0]!r} in generation_config.json is no number of a token")
    return sorted(ids)


def check_end(tokenizer, path: str, vocabulary: int) -> None:
    """UserError for an end-of-sequence token beyond the vocabulary.

    A warning if the chat template ends an answer with another token: responses would run to the length limit.
    """
    ends = stop_token_ids(path, tokenizer)
    if beyond := [i for i in ends if not 0 <= i < vocabulary]:
        raise UserError(
            f"model '{path}': its end-of-sequence token {beyond[0]} is beyond its vocabulary of {vocabulary} tokens; "
            "correct eos_token_id in config.json, generation_config.json or the tokenizer's files"
        )
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "The answer."}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # no template, or one that refuses these turns; load_problems reports it
        return
    end = tokenizer.encode(text.rpartition("The answer.")[2], add_special_tokens=False)
    if end and not set(end) & set(ends):
        say(
            f"model '{path}': its chat template ends an answer with {tokenizer.convert_ids_to_tokens(end[0])!r}, which "
            "is no end-of-sequence token; if responses run to max_response_tokens, add it to eos_token_id in "
            "generation_config.json",
            warning=True,
        )
