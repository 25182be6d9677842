"""Loading a model: what is refused and by which sentence, compiled layers, weights by their names in checkpoints."""

import json
import math
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from ce_gppo import checkpoint, model, parallel
from ce_gppo.batch import pack
from ce_gppo.lora import named_weights
from ce_gppo.messages import UserError
from ce_gppo.model import check_config, compile_layers, load_model, load_reference, stop_token_ids
from ce_gppo.policy import Policy, repeated
from helpers import resolved, rollout_of
from test_models import build


def refused(path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(path))
    assert str(caught.value).startswith(f"model '{path}'")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "./a", "/a"])
def test_what_is_no_folder_and_no_hub_name_is_refused(path):
    refused(path, "no such folder, and not a hub name like 'Qwen/Qwen2.5-1.5B'")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", None, "cannot read its config: .*config.json"),
        ("config.json", "null", "config.json cannot be read: .*NoneType"),
        ("config.json", "{broken", "config.json cannot be read: JSONDecodeError"),
        ("config.json", "[" * 100_000, "config.json cannot be read: RecursionError"),
        ("generation_config.json", "[]", "generation_config.json cannot be read: .* not list"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "\0", "tokenizer_config.json cannot be read"),
        ("special_tokens_map.json", "[", "special_tokens_map.json cannot be read"),
        ("model.safetensors.index.json", "{", "model.safetensors.index.json cannot be read"),
        ("model.safetensors", None, r"cannot be loaded \(docs/models.md .*no file named model.safetensors"),
        (
            "model.safetensors",
            "version https://git-lfs.github.com/spec/v1\n",
            "model.safetensors cannot be read: Safet",
        ),
        ("more.safetensors", "", "more.safetensors cannot be read: SafetensorError"),
        ("adapter_config.json", "{}", r"has an adapter \(adapter_config.json\); merge it"),
    ],
)
def test_a_damaged_or_missing_file_of_a_model_is_named(tiny_folder, name, content, message):
    (tiny_folder / name).unlink() if content is None else (tiny_folder / name).write_text(content)
    refused(tiny_folder, message)


def test_a_missing_shard_is_named_and_other_files_are_not_read(tiny_folder):
    weights = tiny_folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "other.safetensors")}
    (tiny_folder / "notes.json").write_text("no JSON, but no file of the model either")
    load_model(str(tiny_folder))
    weights.rename(tiny_folder / "pytorch_model.bin")
    refused(tiny_folder, "no file named model.safetensors")
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tiny_folder, "other.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"vocab_size": 400},
            "1 of its weights, such as model.embed_tokens.weight, are not in its files, or not in the",
        ),
        ({"num_hidden_layers": 2, "layer_types": None}, "12 of its weights, such as model.layers.1.*shape that config"),
        ({"tie_word_embeddings": False}, "1 of its weights, such as lm_head.weight, are not in its files"),
        (
            {"final_logit_softcapping": 30.0},
            "logprobs change by .* nats when the model makes logits of its head's itself",
        ),
        ({"logits_scaling": 2}, "when the model makes logits of its head's itself"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config = {'quant_method': 'awq'"),
        ({"quantization_config": {}}, "quantization_config = {} in its config.json: it cannot be trained"),
        ({"hidden_size": "64"}, "cannot read its config: .*'hidden_size': TypeError: .* expected int"),
        ({"model_type": ["qwen2"]}, "cannot read its config"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tiny_folder, changes, message):
    edit(tiny_folder / "config.json", logit_scale=1.0, logits_scaling=None)
    assert check_config(str(tiny_folder)).vocab_size == 262
    edit(tiny_folder / "config.json", **changes)
    refused(tiny_folder, message)


def test_weights_that_the_model_leaves_out_are_told(tiny_folder, capsys):
    weights = load_file(tiny_folder / "model.safetensors")
    extra = {name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in weights.items()}
    save_file(weights | extra, tiny_folder / "model.safetensors", {"format": "pt"})
    load_model(str(tiny_folder))
    told = (
        "WARNING: .* 12 weights in its files, such as model.layers.1.*they are left out, and checkpoints will lack them"
    )
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("factor, shown", [(math.nan, "nan"), (0.0, "-5.57")])
def test_damaged_weights_are_refused(tiny_folder, factor, shown):
    """Of 0: all 262 tokens have the same probability."""
    path = tiny_folder / "model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    refused(tiny_folder, f"its logprobs are {shown} for every token, so its weights are damaged or quantized")


@pytest.mark.parametrize("name", ["Falcon", "Nemotron", "StableLm", "Bloom", "Lfm2", "Qwen3_5Text", "GptOss"])
def test_what_cannot_be_packed_is_rows(tmp_path, name, capsys):
    """Attention that cannot be replaced, or has sinks; convolutions and delta networks, which reach over a border."""
    build(str(tmp_path), name)
    policy = Policy(load_model(str(tmp_path))[0])
    assert (
        policy.model.config._attn_implementation != "packed"
        and "are rows with a prompt each" in capsys.readouterr().out
    )
    assert repeated(policy) == 1


@pytest.mark.parametrize("together", [False, True])
def test_rows_have_the_gradients_of_packing(tiny_folder, monkeypatch, together):
    """Of responses of many lengths, some with one prompt; by similar lengths, or, as if sharded, in one pass."""
    (packed, _), (rows, _) = load_model(str(tiny_folder)), load_model(str(tiny_folder))
    rows.set_attn_implementation("sdpa")
    monkeypatch.setattr(parallel, "is_sharded", lambda module: together)
    rollout, found = rollout_of([(4, n) for n in (9, 1, 5)], 1, shared=True), []
    for one in (packed.double(), rows.double()):
        values = Policy(one)(pack(rollout), 0.7)
        sum((v * torch.arange(1, 16)).sum() for v in values[:2]).backward()
        found.append([*(v.detach() for v in values), *(p.grad for p in one.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max(), "norms and positions are float32"


@pytest.mark.parametrize("name, changes", [("Phi", {}), ("Granite", {"logits_scaling": 4.0}), ("Cohere2", {})])
def test_heads_with_a_bias_or_a_scale_train(tmp_path, name, changes):
    """The start compares the logprobs with the model's own."""
    build(str(tmp_path), name)
    edit(tmp_path / "config.json", **changes)
    load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "Olmoe"])
def test_experts_have_the_names_of_their_files(tmp_path, name):
    """They are fused only in memory: in vLLM and in checkpoints each has its weights by its name."""
    build(str(tmp_path), name)
    trained, tokenizer = load_model(str(tmp_path))
    stored, sent = load_file(tmp_path / "model.safetensors"), dict(named_weights(trained))
    assert sent.keys() == stored.keys() and all(torch.equal(sent[name], stored[name]) for name in stored)
    optimizer = torch.optim.AdamW(trained.parameters())
    checkpoint.Saver(tmp_path, trained, tokenizer, optimizer).finish(checkpoint.State("", 1))
    saved = load_file(tmp_path / "checkpoint-000001" / "model.safetensors")
    assert saved.keys() == stored.keys() and all(torch.equal(saved[name], stored[name]) for name in stored)


def test_a_hub_name_is_checked_as_a_folder_is(tmp_path, monkeypatch):
    """By the files in the cache."""
    snapshot = tmp_path / "models--some--moe" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--moe" / "refs").mkdir()
    (tmp_path / "models--some--moe" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    build(str(snapshot), "Qwen3Moe")
    experts, _ = load_model("some/moe")
    weights = load_file(snapshot / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.experts.2." not in name}
    save_file(weights, snapshot / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="3 of its weights, such as .*experts.2.* have other names in its files"):
        model.check_names(experts, "some/moe")
    shutil.rmtree(snapshot)
    build(str(snapshot), "Qwen3")
    assert load_model("some/moe")[0].config.model_type == "qwen3"


@pytest.mark.parametrize("prefix, tied", [("", True), ("model.", True), ("", False), ("model.", False)])
def test_names_in_the_files_may_lack_the_prefix_and_a_tied_head(tiny_folder, prefix, tied):
    path = tiny_folder / "model.safetensors"
    weights = {name.replace("model.", prefix): tensor for name, tensor in load_file(path).items()}
    if not tied:
        weights["lm_head.weight"] = weights[f"{prefix}embed_tokens.weight"] + 1
        edit(tiny_folder / "config.json", tie_word_embeddings=False)
    save_file(weights, path, {"format": "pt"})
    loaded, _ = load_model(str(tiny_folder))
    assert torch.equal(loaded.model.norm.weight, weights[f"{prefix}norm.weight"])
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_end_of_sequence_tokens_are_those_of_all_files(tiny_folder, tokenizer):
    """The tokenizer's, the configuration's and generation_config.json's, which may be missing."""
    eos, file = tokenizer.eos_token_id, tiny_folder / "generation_config.json"
    file.write_text(f'{{"eos_token_id": [9, 5, {eos}, 0, 261]}}')
    assert stop_token_ids(str(tiny_folder), tokenizer) == [0, 5, 9, eos, 261]
    file.unlink()
    edit(tiny_folder / "config.json", eos_token_id=7)
    assert stop_token_ids(str(tiny_folder), tokenizer) == [7, eos]
    tokenizer = type("", (), {"eos_token_id": None})
    assert stop_token_ids(str(tiny_folder), tokenizer) == [7]
    file.write_text("{")
    with pytest.raises(UserError, match="generation_config.json cannot be read"):
        stop_token_ids(str(tiny_folder), tokenizer)


@pytest.mark.parametrize("wrong", [262, -1, "x", 9999])
def test_an_end_of_sequence_token_beyond_the_vocabulary_is_refused(tiny_folder, wrong):
    (tiny_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, wrong]}))
    refused(
        tiny_folder, f"its end-of-sequence token {wrong!r} is not in its vocabulary of 262 tokens; correct eos_token"
    )


@pytest.mark.parametrize("template", ["{{ m['content'] }}!", "{{ m['content'] }}", "{{ raise_exception('no') }}", None])
def test_a_chat_template_without_an_end_of_sequence_token_is_a_warning(tiny_folder, template, capsys):
    load_model(str(tiny_folder))
    assert "WARNING" not in capsys.readouterr().err
    file = tiny_folder / "chat_template.jinja"
    file.unlink() if template is None else file.write_text(f"{{% for m in messages %}}{template}{{% endfor %}}")
    load_model(str(tiny_folder))
    told = "its chat template ends an answer with '!', which is no end-of-sequence token; add it to eos_token_id in"
    assert (told in capsys.readouterr().err) == (template == "{{ m['content'] }}!")


def test_weights_are_float32_and_packed_and_take_small_steps(tiny_model, tiny_folder):
    """At the paper's learning rate a bfloat16 weight would not move at all."""
    tiny_model.bfloat16().save_pretrained(tiny_folder)
    loaded, _ = load_model(str(tiny_folder))
    weight = loaded.get_input_embeddings().weight
    assert weight.dtype == torch.float32 and loaded.config._attn_implementation == "packed"
    assert all(module.do_not_compile is True for module in loaded.modules()), "vLLM's backend leaves it as it is"
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-6, weight_decay=0.0)
    Policy(loaded)(pack(rollout_of([(1, 2)])), 1.0)[0].sum().backward()
    optimizer.step()
    assert (weight != before).float().mean() > 0.9
    assert (weight.bfloat16() != before.bfloat16()).float().mean() < 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_and_recomputing_trains(tmp_path, checkpointing):
    build(str(tmp_path), "Phi3")
    edit(tmp_path / "config.json", resid_pdrop=0.5)
    loaded, _ = load_model(str(tmp_path), gradient_checkpointing=checkpointing)
    assert loaded.training == loaded.is_gradient_checkpointing == checkpointing
    assert {module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_layers_and_functions_drop_nothing(tmp_path):
    """OPT drops whole layers, and calls F.dropout itself, in the training mode that recomputing needs."""
    build(str(tmp_path), "OPT")
    edit(tmp_path / "config.json", layerdrop=0.5, dropout=0.5, attention_dropout=0.5)
    loaded, _ = load_model(str(tmp_path), gradient_checkpointing=True)
    packed = pack(rollout_of([(3, 4)]))
    first, *others = [Policy(loaded)(packed, 1.0)[0] for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)


CASES = "cpu no 1 cpu", "cuda no 2 cuda", "cuda:1 yes 1 cuda:1", "cuda yes 2 cpu", "cuda offload 1 cpu"


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_will_be_sharded_stays_on_the_host(monkeypatch, tiny_folder, case):
    """device, shard and ranks -> where the model is. On a GPU its layers are compiled."""
    (device, shard, ranks, moved), calls = case.split(), []
    monkeypatch.setattr(parallel, "world_size", lambda: int(ranks))
    monkeypatch.setattr(parallel, "all_gather", lambda value: [value])
    monkeypatch.setattr(model, "compile_layers", lambda _: calls.append("compiled"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, to: calls.append(to) or module)
    load_model(str(tiny_folder), device, shard=shard)
    assert calls == [moved, *["compiled"] * (device != "cpu")]


@torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True)  # and restored: monkeypatch would delete these
def test_only_the_layers_are_compiled(tiny_model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    compile_layers(tiny_model, backend="eager")
    assert compiled == [(tiny_model.model.layers[0], {"dynamic": True, "backend": "eager"})]
    assert torch._dynamo.config.recompile_limit == 64 and torch._dynamo.config.optimize_ddp is False
    tiny_model._no_split_modules = None
    compile_layers(tiny_model)
    assert len(compiled) == 1


def test_the_reference_is_the_base_policy_if_it_is_needed(tiny_model, tiny_folder, monkeypatch):
    sharded = []
    monkeypatch.setattr(parallel, "distribute", lambda policy, *options: sharded.append(options) or policy)
    load_reference(resolved(model=str(tiny_folder), kl_coef=0.1, shard="offload"), "cpu")
    assert [(shard, [*layers]) for shard, layers in sharded] == [("offload", ["Qwen2DecoderLayer"])]
    reference = load_reference(resolved(model=str(tiny_folder), kl_coef=0.1), "cpu")
    assert len(sharded) == 1, "it has no gradients for DDP"
    packed = pack(rollout_of([(4, 9), (3, 5)]))
    torch.testing.assert_close(reference(packed, 1.0), Policy(tiny_model)(packed, 1.0), atol=1e-6, rtol=1e-6)


def test_named_weights_are_those_of_a_checkpoint(tiny_model, tiny_folder):
    """Tied weights once; buffers only if a checkpoint has them, unlike the rotary frequencies."""
    saved = load_file(tiny_folder / "model.safetensors")
    found = dict(named_weights(tiny_model))
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    tiny_model.register_buffer("kept", torch.ones(2))
    tiny_model.register_buffer("left", torch.ones(2), persistent=False)
    again = dict(named_weights(tiny_model))
    assert again.keys() == saved.keys() | {"kept"} and not any(tensor.requires_grad for tensor in again.values())
