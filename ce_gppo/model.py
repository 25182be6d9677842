"""The trained model: loading it, and refusing models that would train wrongly."""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._dynamo
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ce_gppo import parallel
from ce_gppo.batch import Packed, Rollout, pack
from ce_gppo.checkpoint import try_saving
from ce_gppo.lora import WithoutAdapters, add_adapters
from ce_gppo.messages import UserError, explained, first_line, say
from ce_gppo.policy import Policy, register_attention

WAYS = ("packed", "sdpa", "eager")  # of attention: policy.packed_attention, or the model's own, for rows
JSON = ("config", "generation_config", "tokenizer_config", "tokenizer", "special_tokens_map", "model.safetensors.index")


def load_tokenizer(path: str) -> tuple[transformers.PretrainedConfig, PreTrainedTokenizerBase]:
    """A model's configuration and tokenizer, before its weights. UserError where they are known to be wrong."""
    config = check_config(path)
    with explained(f"model '{path}': its tokenizer cannot be loaded"):
        return config, transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_model(
    path: str,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    shard: str = "no",
    prepare: Callable = lambda model: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 (the master weights) and its tokenizer, from a folder or a hub name.

    gradient_checkpointing: keep only the input of each layer for backward, which computes the rest again.
    shard: as in parallel.distribute. A model that will be sharded stays on the CPU; its shards move to the devices.
    prepare: called with the checked model before it moves to the device.
    Only safetensors are read, and no code of the folder is run. UserError for a model that would be trained wrongly.
    """
    with explained(f"model '{path}' cannot be loaded (docs/models.md lists the families that train)"):
        _, tokenizer = load_tokenizer(path)
        transformers.utils.logging.disable_progress_bar()
        model = load_checked(path)
        check_names(model, path)
        check_end(tokenizer, path)
        try_saving(model, tokenizer)
    for module in model.modules():  # vLLM's transformers backend changes the model's class, which this model shares;
        module.do_not_compile = True  # with this attribute the changed class leaves this model as it is
        for name, value in vars(module).items():  # dropout and layerdrop: the ratio allows none
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    prepare(model)
    model = model.to("cpu" if shard == "offload" or (shard == "yes" and parallel.world_size() > 1) else device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers recomputes in training mode only
    if device.startswith("cuda") and model.config._attn_implementation == "packed":
        compile_layers(model)
    return model, tokenizer


def load_checked(path: str) -> PreTrainedModel:
    """The model with packed attention, or, where its layers mix tokens in another way too, with its own, for rows."""
    register_attention()
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # check_loaded refuses them
    load, refused = transformers.AutoModelForCausalLM.from_pretrained, ""
    for attention in WAYS:
        try:
            model, info = load(path, attn_implementation=attention, **options)
        except (ValueError, KeyError) as error:  # it has no such attention
            refused = refused or f"it has no {attention} attention ({first_line(error)})"
            continue
        check_loaded(info, path)
        if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
            raise UserError(f"model '{path}': its output head is not a linear layer")
        if not (problem := problem_with(model)):
            if attention != "packed":
                say(f"model '{path}': its sequences are rows with a prompt each, padded; not packed, as {refused}")
            return model
        refused = refused or problem
    raise UserError(f"model '{path}': {refused}")


def load_policy(config, last: Path | None, device: str) -> PreTrainedModel:
    """The model to train: of the checkpoint `last`, or config.model. With lora_rank the latter, with adapters."""
    options = device, config.gradient_checkpointing, config.shard
    if config.lora_rank:
        return load_model(config.model, *options, partial(add_adapters, config=config, last=last))[0]
    return load_model(str(last or config.model), *options)[0]


def compile_layers(model: PreTrainedModel, **options) -> None:
    """Fuse the element-wise work of each decoder layer: its norms, rotary embedding, SwiGLU and sums. On a GPU only.

    In place, so that weights keep their names, and before FSDP2 wraps the layers. All layers and all lengths of
    micro-batches share a few graphs; attention, which needs the sequences, is called between these. options: of
    torch.compile, which TORCH_COMPILE_DISABLE=1 in the environment turns off.
    """
    torch._dynamo.config.optimize_ddp = False  # otherwise dynamo splits the graphs at the ends of DDP's buckets
    # Policy, critic and reference share their layers' code. Beyond 8 variants of it dynamo would compile no more.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or []):
            module.compile(dynamic=True, **options)


def load_reference(config, device: str, policy: torch.nn.Module | None = None) -> Callable | None:
    """The frozen policy of config.model, also in a resumed run, for the KL term; None if kl_coef is 0. Collective.

    policy: the one being trained. With lora_rank it is its own reference, without its adapters.
    """
    if not config.kl_coef:
        return None
    if config.lora_rank:
        return WithoutAdapters(policy)
    try:
        model, _ = load_model(config.model, device, shard=config.shard)
    except UserError as error:  # of a resumed run, whose own weights are in its checkpoint
        raise UserError(f"kl_coef = {config.kl_coef:g} needs the model that the run began with; {error}") from None
    policy = Policy(model)  # without gradients there is nothing for DDP to do
    return policy if config.shard == "no" else parallel.distribute(policy, config.shard, model._no_split_modules or [])


# ----------------------------------------------------------------------------------------------------------------------
# Checks: what the libraries do not report, or not by the name of the file


def check_config(path: str) -> transformers.PretrainedConfig:
    """The model's configuration. UserError if `path` is no model that can be trained, as far as its files tell."""
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith((".", "/"))):
        raise UserError(f"model '{path}': no such folder, and not a hub name like 'Qwen/Qwen2.5-1.5B'")
    for file in Path(path).glob("*"):
        with explained(f"model '{path}': {file.name} cannot be read"):  # it may be cut, or a pointer of git-lfs
            if file.suffix == ".safetensors":
                safe_open(file, "pt").keys()
            if file.suffix == ".json" and file.stem in JSON:
                dict(**json.loads(file.read_bytes()))
    if Path(path, "adapter_config.json").is_file():
        raise UserError(f"model '{path}': it has an adapter (adapter_config.json); merge it into its base model first")
    with explained(f"model '{path}': cannot read its config"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if (value := getattr(config, "quantization_config", None)) is not None:
        raise UserError(f"model '{path}': quantization_config = {value!s:.60} in its config.json: it cannot be trained")
    return config


def check_loaded(info: dict, path: str) -> None:
    """UserError for weights that transformers made at random; a warning for weights in the files that it left out."""
    if wrong := info["missing_keys"] | {name for name, _, _ in info["mismatched_keys"]}:
        found = f"{len(wrong)} of its weights, such as {min(wrong)}, are not in its files, or not in the shape"
        raise UserError(f"model '{path}': {found} that config.json gives them")
    if unused := info["unexpected_keys"]:
        found = f"{len(unused)} weights in its files, such as {min(unused)}, are not in a model of its config.json"
        say(f"model '{path}': {found}: they are left out, and checkpoints will lack them", warning=True)


def check_names(model: PreTrainedModel, path: str) -> None:
    """UserError if weights have other names in the files: vLLM gets weights by these names."""
    folder = Path(transformers.utils.cached_file(path, "config.json")).parent  # of a hub name in the cache
    prefix = model.base_model_prefix + "."  # of the body's weights, which transformers may leave out or add
    stored = sum((safe_open(file, "pt").keys() for file in folder.glob("*.safetensors")), [])
    stored = {name.removeprefix(prefix) for name in stored}
    head = model.get_output_embeddings().weight  # if it is tied, either name may be in the files
    own = {name: weight.to("meta") for name, weight in model.named_parameters() if weight is not head}
    own = [name.removeprefix(prefix) for one in own.items() for name in revert_weight_conversion(model, dict([one]))]
    if missing := [name for name in own if name not in stored]:
        found = f"{len(missing)} of its weights, such as {missing[0]}, have other names in its files"
        raise UserError(f"model '{path}': {found}, so they could not be sent to vLLM")


def logprobs_of_model(model: PreTrainedModel, packed: Packed) -> torch.Tensor:
    """Of one sequence, by the model's own head and all that it does to its logits: [N]."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that has all that a model's attention may do
    logits = model(input_ids=packed.input_ids[None], use_cache=False).logits[0]  # [L, V]
    model.set_attn_implementation(attention)
    return logits[packed.predecessors].log_softmax(1).gather(1, packed.targets[:, None])[:, 0]


@torch.no_grad()
def problem_with(model: PreTrainedModel) -> str | None:
    """What is wrong if two sequences in one pass change each other's logprobs, or if the model itself gives others."""
    lengths, tokens = torch.tensor([5, 3]), torch.tensor([3, 4, 5, 6, 7, 5, 6, 7])  # [B], [N]
    no_values, cut = torch.zeros(len(tokens)), torch.zeros(2, dtype=torch.bool)
    rollout = Rollout([[1, 2], [3, 4]], torch.tensor([0, 1]), lengths, tokens, no_values, cut, ["", ""])
    policy, parts = Policy(model), [pack(rollout[[i]]) for i in range(2)]
    try:
        together = policy(pack(rollout), 1.0)[0]  # [N]
        alone = torch.cat([policy(part, 1.0)[0] for part in parts])  # [N]
    except Exception as error:  # of the model's own code, or of packed_attention
        return f"{type(error).__name__}: {first_line(error)}"
    if not alone.std() > 0:  # NaN, or the same everywhere
        return f"its logprobs are {alone[0]:.3g} for every token, so its weights are damaged or quantized"
    own = torch.cat([logprobs_of_model(model, part) for part in parts])  # [N]
    for other, what in ((together, "two sequences share a pass"), (own, "the model makes logits of its head's itself")):
        difference = (other - alone).abs().max().item()
        if not difference < 1e-4 * alone.std():  # rounding gives 1e-5 at most, a convolution 1e-3 and more
            return f"its logprobs change by {difference:.2g} nats when {what}"
    return None


def stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every end-of-sequence id that the tokenizer, the configuration or the generation configuration names."""
    config = check_config(path)
    named = [tokenizer.eos_token_id, config.eos_token_id]
    with contextlib.suppress(OSError):  # a model may have no such file
        named.append(transformers.GenerationConfig.from_pretrained(path).eos_token_id)
    ids = {i for entry in named for i in (entry if isinstance(entry, list) else [entry]) if i is not None}
    if beyond := [i for i in ids if i not in range(config.vocab_size)]:
        found = f"its end-of-sequence token {beyond[0]!r} is not in its vocabulary of {config.vocab_size} tokens"
        raise UserError(f"model '{path}': {found}; correct eos_token_id in its files")
    return sorted(ids)


def check_end(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Warn if the chat template ends an answer with another token: responses would run to the length limit."""
    ends, end = stop_token_ids(path, tokenizer), []
    with contextlib.suppress(Exception):  # no template, or one that refuses these turns: load_problems reports it
        turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "The answer."}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        end = tokenizer.encode(text.rpartition("The answer.")[2], add_special_tokens=False)
    if end and not set(end) & set(ends):
        found = f"its chat template ends an answer with {tokenizer.convert_ids_to_tokens(end[0])!r}"
        cure = "which is no end-of-sequence token; add it to eos_token_id in generation_config.json"
        say(f"model '{path}': {found}, {cure}", warning=True)
