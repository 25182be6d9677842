"""LoRA: adapters against their definition in float64, memory, checkpoints, runs with real vLLM, two processes."""

import dataclasses
import json
import signal
import time
import types

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ce_gppo import checkpoint, lora, perf
from ce_gppo.batch import pack
from ce_gppo.messages import UserError
from ce_gppo.model import load_model, load_policy, load_reference
from ce_gppo.policy import Policy
from helpers import SMALL, by_ranks, metrics_of, resolved, rollout_of, run, start, without_timings

FACTOR = 24 / 4  # alpha / r


def settings(folder, **others):
    return resolved(model=str(folder), lora_rank=4, lora_alpha=24.0, **others)


def trained_model(config, last=None):
    """With adapters that are not 0, as if it had been trained."""
    model = load_policy(config, last, "cpu")
    torch.manual_seed(1)
    for name, parameter in lora.adapters(model).items():
        parameter.data.add_(0.05 * torch.randn_like(parameter) if "lora_B" in name else 0)
    return model


def pairs_of(model):
    """{name of a linear layer: (A [r, in], B [out, r])}"""
    own = {name.removeprefix("base_model.model."): p for name, p in lora.adapters(model).items()}
    layers = {name.partition(".lora_")[0] for name in own}
    return {name: (own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"]) for name in layers}


def objective_of(policy, seed=0):
    logprobs, entropy, _ = policy(pack(rollout_of([(4, 9), (3, 5)], seed)), 0.7)
    return (logprobs * torch.arange(len(logprobs))).sum() + entropy.square().sum()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_are_those_of_the_definition(tiny_folder, checkpointing):
    """In float64. With W + alpha / r B A as the weight, and G as its gradient: alpha / r times G A^T and B^T G."""
    config = settings(tiny_folder, gradient_checkpointing=checkpointing)
    model, whole = trained_model(config).double(), load_model(str(tiny_folder))[0].double()
    pairs = pairs_of(model)
    linear = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    assert pairs.keys() == linear - {"lm_head"} and len(pairs) == 7
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            whole.get_submodule(name).weight.add_(FACTOR * B @ A)
    sent = dict(lora.named_weights(model))
    assert sent.keys() == {name for name, _ in whole.named_parameters()}
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(sent[name], weight.detach(), rtol=1e-12, atol=1e-12)
    values = [objective_of(Policy(each)) for each in (model, whole)]
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
    for value in values:
        value.backward()
    for name, (A, B) in pairs.items():
        gradient = whole.get_submodule(name).weight.grad
        torch.testing.assert_close(B.grad, FACTOR * gradient @ A.T, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(A.grad, FACTOR * B.T @ gradient, rtol=1e-8, atol=1e-10)
    trained = [parameter for pair in pairs.values() for parameter in pair]
    assert sum(p.grad is not None for p in model.parameters()) == len(trained) == 14, "the head is frozen, too"


def test_the_reference_is_the_model_without_adapters(tiny_folder):
    """Bit for bit, and no second model: afterwards the policy is what it was."""
    config = settings(tiny_folder, kl_coef=0.1)
    policy, base = Policy(trained_model(config)), Policy(load_model(str(tiny_folder))[0])
    reference, before = load_reference(config, "cpu", policy), objective_of(policy)
    assert torch.equal(objective_of(reference), objective_of(base)) and not torch.equal(before, objective_of(base))
    assert torch.equal(objective_of(policy), before)
    new = load_policy(config, None, "cpu")
    assert torch.equal(objective_of(Policy(new)), objective_of(base)), "a new adapter changes nothing"
    assert load_reference(settings(tiny_folder), "cpu", policy) is None


def test_bytes_of_a_trained_and_of_a_frozen_parameter(tiny_folder):
    """16 with gradient and moments, and 4. Operations are counted accordingly: 6 and 4 a token."""
    model = trained_model(settings(tiny_folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective_of(Policy(model)).backward()
    optimizer.step()

    def size(p):
        moments = [optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq")] if p in optimizer.state else []
        return sum(t.numel() * t.element_size() for t in (p, p.grad, *moments) if t is not None) / p.numel()

    assert {(p.requires_grad, size(p)) for p in model.parameters()} == {(True, 16), (False, 4)}
    part, trained = rollout_of([(4, 9)]), sum(p.numel() for p in lora.adapters(model).values())
    base = load_model(str(tiny_folder))[0]
    full, blocks = perf.flops(base, part), sum(p.numel() for p in base.model.layers.parameters()) + 64
    assert full - perf.flops(model, part) == 13 * 2 * blocks + 9 * 2 * base.lm_head.weight.numel() - 13 * 6 * trained


def test_on_a_gpu_the_frozen_weights_are_bfloat16(tiny_folder, monkeypatch):
    """As vLLM's. Adapters and the residual stream are float32; a merged weight is rounded once."""
    base, gpu = load_model(str(tiny_folder))[0], types.SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = trained_model(settings(tiny_folder))
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    assert model.get_input_embeddings()(torch.tensor([3])).dtype == torch.float32, "the residual stream"
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, weight in lora.named_weights(model):
        A, B = pairs_of(model).get(name.removesuffix(".weight"), (torch.zeros(1), torch.zeros(1)))
        expected = base.state_dict()[name].bfloat16().double() + FACTOR * B.detach().double() @ A.detach().double()
        assert weight.dtype == torch.bfloat16 and weight.shape == expected.shape
        off = (weight.double() - expected).abs() / expected.abs().clamp(min=1e-3)
        assert off.max() <= 2**-8 * 1.0001, "rounded once"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    sizes = {True: 8_000_000, False: 1_540_000_000}
    model.parameters = lambda: [torch.empty(n, device="meta", requires_grad=own) for own, n in sizes.items()]
    perf.check_memory(settings(tiny_folder, gpu_memory_utilization=0.7), model, "cuda")  # 3 + 0.1 GiB
    with pytest.raises(UserError, match="keeps 20 while"):  # and a critic, which is trained whole
        perf.check_memory(settings(tiny_folder, gpu_memory_utilization=0.7, advantages="gae"), model, "cuda")


def test_a_checkpoint_is_a_merged_folder_with_an_adapter_inside(tiny_folder, tmp_path, tokenizer):
    """transformers loads the one, peft the other on the base; a resumed run gets the adapters bit for bit."""
    config = settings(tiny_folder)
    model = trained_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective_of(Policy(model)).backward()
    optimizer.step()
    checkpoint.Saver(tmp_path, model, tokenizer, optimizer).finish(checkpoint.State("id", 3))
    folder = checkpoint.newest(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    merged = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
    assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(objective_of(Policy(load_model(str(folder))[0])), objective_of(Policy(model)))

    again = load_policy(config, folder, "cpu")
    new = torch.optim.AdamW(again.parameters(), lr=1e-3)
    assert checkpoint.load(folder, again, new) == checkpoint.State("id", 3)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and (p in optimizer.state) == (q in new.state) == p.requires_grad
        assert not p.requires_grad or torch.equal(optimizer.state[p]["exp_avg"], new.state[q]["exp_avg"])


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"lora_rank": -1}, "lora_rank = -1: must be at least 0"),
        ({"lora_rank": 5000}, "lora_rank = 5000: must be at least 0 and at most 4096"),
        ({"lora_rank": 8, "lora_alpha": 0.0}, "lora_alpha = 0.0: must be above 0"),
        ({"lora_alpha": 16.0}, "lora_alpha = 16: it is the factor of adapters; set lora_rank"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(UserError, match=said):
        resolved(**wrong)


@pytest.mark.slow
def test_a_run_and_the_same_run_resumed(tmp_path):
    """vLLM gets what the trainer computes, the adapters learn, and a resumed run is the same bit for bit."""
    arguments = [*SMALL, "--lora-rank", "4", "--lr", "1e-3", "--kl-coef", "0.01"]
    output = run(tmp_path, "--run-name", "whole", *arguments)
    assert "M in adapters of rank 4 are trained" in output
    rows = metrics_of(tmp_path / "whole")
    assert all(row["mismatch/mean"] < 3e-6 for row in rows[1:]) and rows[-1]["kl/reference"] > 1e-4
    process, written = start(tmp_path, "--run-name", "cut", *arguments), tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not (written.exists() and '"step": 1,' in written.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 0 and len(metrics_of(tmp_path / "cut")) < 5
    run(tmp_path, "--resume", str(tmp_path / "cut"))
    assert without_timings(metrics_of(tmp_path / "cut")) == without_timings(rows)
    for name in ("model.safetensors", lora.FILE):
        ours, expected = (load_file(tmp_path / run / "checkpoint-000004" / name) for run in ("cut", "whole"))
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


ONE_UPDATE = """
import json, sys, torch, train
from ce_gppo import checkpoint, parallel
checkpoint.KEEP = 9
from ce_gppo.model import load_model
from ce_gppo.policy import Policy
from pathlib import Path
from test_lora import groups, settings, trained_model, lora, objective_of
folder, shard, shares, name = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
parallel.init()
config = settings(folder / "tiny", shard=shard, max_micro_batch_tokens=24, kl_coef=0.1)
model = trained_model(config)
policy = parallel.distribute(Policy(model), shard, model._no_split_modules)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
own = groups()[torch.tensor([4 * i + j for i in shares[parallel.rank()] for j in range(4)], dtype=torch.long)]
[own] = train.with_reference_logprobs(train.load_reference(config, "cpu", policy), [own], 1.0, 24, "cpu")
objective = train.objective_of_step(config, checkpoint.State(""))
_, done = train.update(policy, optimizer, own, objective, 1e-3, config, "cpu")
gradients = {key: parallel.full_tensor(p.grad).clone() for key, p in lora.adapters(model).items()}
sent = {key: weight.clone() for key, weight in lora.named_weights(model)}
_, tokenizer = load_model(str(folder / "tiny"))
checkpoint.Saver(folder, model, tokenizer, optimizer).finish(checkpoint.State("id", int(name)))
if parallel.is_main():
    torch.save({"gradients": gradients, "sent": sent, "norm": done.grad_norm}, folder / f"result-{name}.pt")
"""


def groups():
    """Six groups of four responses."""
    part = rollout_of([(5, (3 * i + j) % 11 + 1) for i in range(6) for j in range(4)])
    return dataclasses.replace(part, prompts=part.prompts[::4], prompt_of=torch.arange(6).repeat_interleave(4))


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    """Copied, sharded and offloaded: gradients, what vLLM gets, and the checkpoint."""
    cases = {
        "000001": (1, "no", [[0, 1, 2, 3, 4, 5]]),
        "000002": (2, "no", [[0, 1, 2, 3, 4], [5]]),
        "000003": (2, "yes", [[0, 1, 2, 3, 4], [5]]),
        "000004": (2, "offload", [[0, 1, 2], [3, 4, 5]]),
    }
    cases = {name: (processes, how, json.dumps(shares)) for name, (processes, how, shares) in cases.items()}
    one, *others = by_ranks(tmp_path, ONE_UPDATE, cases, timeout=100).values()
    assert max(gradient.abs().max() for gradient in one["gradients"].values()) > 1e-3 and len(one["gradients"]) == 28
    whole = load_file(tmp_path / "checkpoint-000001" / lora.FILE)
    for name, two in zip(list(cases)[1:], others, strict=True):
        assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
        for key, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][key], gradient, atol=1e-6, rtol=1e-4, msg=f"{name} {key}")
        saved = load_file(tmp_path / f"checkpoint-{name}" / "model.safetensors")
        assert saved.keys() == two["sent"].keys() == one["sent"].keys()
        for key, weight in one["sent"].items():
            torch.testing.assert_close(two["sent"][key], weight, atol=1e-5, rtol=1e-5)
            assert torch.equal(saved[key], two["sent"][key])
        ours = load_file(tmp_path / f"checkpoint-{name}" / lora.FILE)
        assert ours.keys() == whole.keys()
        for key in whole:
            torch.testing.assert_close(ours[key], whole[key], atol=1e-5, rtol=1e-5)
