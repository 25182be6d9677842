"""Code that runs only on a GPU, as far as a CPU can test it: with stand-ins that have the real signatures."""

import importlib.util
import inspect
import itertools
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM, Exaone4Config

import loss
import train
from ce_gppo import advantages, checkpoint, parallel, perf
from ce_gppo import policy as policy_py
from ce_gppo.batch import pack
from ce_gppo.model import compile_layers, load_model, load_reference
from ce_gppo.policy import Policy
from data.base import make_model, make_tokenizer
from helpers import naive_statistics, resolved, rollout_of


class LikeGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU, and has the matrix products that exist only there."""

    is_cuda = True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.mm, torch.addmm) and (dtype := kwargs.pop("out_dtype", None)):
            assert [x.dtype for x in args[-2:]] == [torch.bfloat16] * 2, "the factors must be in bfloat16"
            args = [x.to(dtype) for x in args]
        return super().__torch_function__(func, types, args, kwargs)


def head_like_gpu(hidden, weight, targets, temperature, width, to_logprobs, to_entropy):
    """token_statistics and its gradients by the branches for a GPU."""
    hidden, weight, targets = (x.as_subclass(LikeGpu) for x in (hidden, weight, targets))
    context = types.SimpleNamespace(
        needs_input_grad=(True, True, *[False] * 6),
        mark_non_differentiable=lambda _: None,
        set_materialize_grads=lambda _: None,
    )
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    with torch.no_grad():  # in the place of autograd's context, which would turn LikeGpu tensors into plain ones
        values = policy_py.TokenStatistics.forward(context, hidden, weight, targets, temperature, width)
        gradients = policy_py.TokenStatistics.backward(context, to_logprobs, to_entropy, None)
    return [x.as_subclass(torch.Tensor) for x in (*values, *gradients[:2])]


@pytest.mark.parametrize("width", [16, 53])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_head_on_a_gpu_matches_naive_float64(width, temperature):
    """From bfloat16 hidden states and weights, with float32 logits; one target is nearly certain."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, 16, generator=g).bfloat16(), torch.randn(53, 16, generator=g) / 4
    targets = torch.randint(53, (24,), generator=g)
    weight[targets[0]] = hidden[0].float() / hidden[0].float().square().sum() * 9.8 * temperature  # this target's logit
    to_logprobs, to_entropy = torch.randn(24, generator=g), torch.randn(24, generator=g)
    h, w = hidden.double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    logprobs, H, S = naive_statistics(h, w, targets, temperature)
    assert -0.02 < logprobs[0] < -0.0002
    ((logprobs * to_logprobs).sum() + (H * to_entropy).sum()).backward()
    found = head_like_gpu(hidden, weight, targets, temperature, width, to_logprobs, to_entropy)
    values = torch.stack([logprobs, H, S]).detach()
    torch.testing.assert_close(torch.stack(found[:3]).double(), values, atol=1e-5, rtol=1e-5)
    for ours, expected in zip(found[3:], (h.grad, w.grad), strict=True):  # backward's products are in bfloat16
        torch.testing.assert_close(ours.double(), expected, atol=0.02 * expected.abs().max().item(), rtol=0)
    sure = head_like_gpu(hidden[:1], weight, targets[:1], temperature, width, to_logprobs[:1], None)[3].double()
    logprob = naive_statistics(h[:1], w, targets[:1], temperature)[0]
    (expected,) = torch.autograd.grad(logprob * to_logprobs[0], h)
    assert (sure - expected[:1]).norm() < 0.02 * expected.norm(), "1 - p is taken before p is rounded to bfloat16"


def test_on_a_gpu_all_elementwise_work_on_logits_is_compiled(monkeypatch):
    """Outside of the compiled functions nothing as large as a tile is made, except by matrix products."""
    N, D, V, width = 128, 8, 512, 256
    outside = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            product = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            if not product and isinstance(out, torch.Tensor) and out.numel() >= N * width:
                outside.append(str(func))
            return out

    def compiled(function, is_cuda):
        assert is_cuda
        return _disable_current_modes()(function)

    monkeypatch.setattr(policy_py, "_on_device", compiled)
    hidden, weight, ones = torch.randn(N, D).bfloat16(), torch.randn(V, D), torch.ones(N)
    with Watch():
        head_like_gpu(hidden, weight, torch.zeros(N, dtype=torch.long), 0.7, width, ones, ones)
    views = [name for name in outside if not name.startswith(("aten.permute", "aten.t.", "aten.detach"))]
    to_float = "aten._to_copy.default"  # our stand-in for out_dtype
    assert [name for name in views if name != to_float] == [] and len(views) <= 2 * V // width


def test_torch_has_products_with_a_wider_result():
    """Without a GPU only their signatures can be tested."""
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 5), (5, 7)))
    product = torch.mm(a, b, out_dtype=torch.float32)
    assert product.dtype == torch.addmm(product, a, b, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_compiled_functions_are_whole_graphs_and_compiled_for_all_tiles(temperature):
    """No part of them is left to Python, and they are compiled at most once more, for the narrower last tile."""
    g, N, width = torch.Generator().manual_seed(0), 6, 16
    m, zeros, ones = torch.full((N,), -1e30), torch.zeros(N), torch.ones(N)
    counters, functions, results = (CompileCounter(), CompileCounter()), (policy_py._fold, policy_py._grad_logits), []
    with torch.compiler.set_stance("default"):
        options = {"dynamic": True, "fullgraph": True}
        compiled = [torch.compile(f, backend=c, **options) for f, c in zip(functions, counters, strict=True)]
        for fold, gradient in (compiled, functions):
            g.manual_seed(1)
            running = m, (zeros,) * 4, zeros
            for start, columns in ((0, width), (16, width), (32, width), (48, 5)):
                z, place = torch.randn(N, columns, generator=g), torch.arange(N) * 9 - start
                running = fold(z.clone(), *running, place, temperature)
                found = gradient(z, ones * 3, ones, ones, ones, place, temperature, torch.bfloat16, True)
                results.append((running, found))
    half = len(results) // 2
    torch.testing.assert_close(results[:half], results[half:])
    assert all(counter.frame_count <= 2 for counter in counters), "a second time at most, for the narrower tile"


@pytest.mark.parametrize("options", [{}, {"positive_nll_coef": 0.1, "entropy_coef": 0.1, "dual_clip": 3.0}], ids=str)
def test_the_loss_touches_the_model_s_graph_once(options):
    """FSDP2 begins its backward in a hook of the outputs: a gradient taken inside the loss would start it early."""
    outputs, calls = [torch.rand(6).requires_grad_() for _ in range(2)], []
    for output in outputs:
        output.register_hook(lambda gradient: calls.append(gradient) or gradient)
    result, _ = loss.policy_loss(rollout_of([(1, 3), (1, 3)]), *outputs, loss.Objective(**options))
    assert not calls
    result.backward()
    assert len(calls) == 1 + bool(options)


class CpuLikeGpu(str):
    """The device cpu, which says that it is a GPU."""

    def startswith(self, prefix, *_):
        return prefix == "cuda"


def varlen_attention(*args, **options):
    """torch's varlen_attn by its definition, called with its real signature."""
    call = inspect.signature(varlen_attn).bind(*args, **options).arguments
    assert call["query"].dtype == torch.bfloat16 and call["cu_seq_q"].dtype == torch.int32
    starts, out = call["cu_seq_q"].tolist(), []
    assert max(b - a for a, b in itertools.pairwise(starts)) == call["max_q"] == call["max_k"]
    for a, b in itertools.pairwise(starts):
        q, k, v = (call[name][a:b].float().transpose(0, 1) for name in ("query", "key", "value"))  # [H, t, d]
        left, right = call["window_size"]
        assert right == 0
        mask = torch.ones(b - a, b - a, dtype=torch.bool).tril().triu(-left if left >= 0 else a - b)
        out.append(F.scaled_dot_product_attention(q, k, v, mask, scale=call["scale"], enable_gqa=call["enable_gqa"]))
    return torch.cat([x.transpose(0, 1) for x in out])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_on_a_gpu(monkeypatch, window, shared):
    """The branch for a GPU gives the same as that for a CPU, and moves no tensors if no prompt is shared."""
    rollout = rollout_of([(3, 4), (2, 9), (5, 1)], shared=shared)
    on_cpu, on_gpu = (pack(rollout, device) for device in ("cpu", CpuLikeGpu("cpu")))
    L, g = len(on_cpu.input_ids), torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, heads, L, 8, generator=g).bfloat16().float() for heads in (4, 2, 2)]
    call = {"attention_mask": None, "scaling": 0.3, "sliding_window": window}
    expected, _ = policy_py.packed_attention(None, *qkv, packing=on_cpu.packing, **call)
    moved = []
    monkeypatch.setattr(policy_py, "varlen_attn", varlen_attention)
    take = policy_py.take
    monkeypatch.setattr(policy_py, "take", lambda *args: moved.append(1) or take(*args))
    pretending = [x.as_subclass(LikeGpu) for x in qkv]
    found, _ = policy_py.packed_attention(None, *pretending, packing=on_gpu.packing, **call)
    torch.testing.assert_close(found.as_subclass(torch.Tensor).float(), expected, atol=1e-5, rtol=1e-5)
    assert len(moved) == (4 if shared else 0)


def save_model(folder, layers: int) -> str:
    torch.manual_seed(0)
    make_model(make_tokenizer(), hidden_size=64, num_layers=layers).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def unsharded(model) -> int:
    """Parameters that are whole now; shards, in the host's memory, are DTensors."""
    return sum(p.numel() for p in model.parameters() if not isinstance(p, DTensor))


ROLLOUTS = [
    *(rollout_of([(3, 4), (3, 9)], shared=True), rollout_of([(2, 5), (3, 1)]), rollout_of([(8, 30)])),
    *(rollout_of([(5, 60), (5, 7), (5, 2)], shared=True), rollout_of([])),
]


@pytest.mark.parametrize("shard", ["no", pytest.param("offload", marks=pytest.mark.slow)])
def test_compiled_layers_share_a_few_graphs_for_all_lengths(tmp_path, one_process, shard):
    """Three layers and micro-batches of any length: no graph is made after the third. Gradients stay the same."""
    path, batches = save_model(tmp_path, 3), list(map(pack, ROLLOUTS))
    counter, counts, found = CompileCounter(), [], []
    for compiled in (True, False):
        model, _ = load_model(path, gradient_checkpointing=True, shard=shard)
        names = [name for name, _ in model.named_parameters()]
        if compiled:
            compile_layers(model, backend=counter)
        policy = parallel.distribute(Policy(model), shard, model._no_split_modules)
        assert [name for name, _ in model.named_parameters()] == names, "checkpoints and vLLM use these names"
        for batch in batches:
            with torch.compiler.set_stance("default"):
                with torch.no_grad():
                    measured = policy(batch, 1.0)
                policy.zero_grad()
                logprobs, entropy, _ = policy(batch, 1.0)
                (logprobs.sum() + 0.1 * entropy.sum()).backward()
            gradients = {name: parallel.full_tensor(p.grad).clone() for name, p in model.named_parameters()}
            found.append((measured, logprobs.detach(), gradients))
            counts.append(counter.frame_count)
    half = len(batches)
    torch.testing.assert_close(found[:half], found[half:], atol=2e-5, rtol=1e-4)
    assert 0 < counts[2] < 20 and set(counts[2:]) == {counts[2]}, counts


@pytest.mark.slow
def test_layers_of_two_kinds_stay_compiled(tmp_path, one_process, recwarn):
    """Sliding and full attention with and without rotary embedding, in policy, critic and reference, all sharded.

    These share their code, of which dynamo compiles 8 variants at most: it leaves further ones to Python in silence.
    """
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 128, "sliding_window": 4}
    config = Exaone4Config(**shape, layer_types=["sliding_attention", "full_attention"] * 2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    counter, wrapped = CompileCounter(), []
    for make, checkpointing in ((Policy, True), (advantages.ValueModel, True), (Policy, False)):
        model, _ = load_model(str(tmp_path), gradient_checkpointing=checkpointing)
        compile_layers(model, backend=counter)
        wrapped.append(parallel.distribute(make(model), "offload", model._no_split_modules))
    policy, values, frozen = wrapped
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in map(pack, ROLLOUTS):
            with torch.no_grad():
                policy(batch, 1.0), frozen(batch, 1.0), values(batch)
            policy(batch, 1.0)[0].sum().backward()
            values(batch).sum().backward()
    assert 0 < counter.frame_count < 30
    assert not [str(w.message) for w in recwarn if "view tensor" in str(w.message)], "FSDP2 could lose its hooks"


@pytest.mark.parametrize("ranks, responses", [(2, 80), (64, 512)])
@pytest.mark.parametrize("prompt, most", [(200, 1.025), (4000, 1.37)])
def test_ranks_have_nearly_the_same_number_of_tokens(ranks, responses, prompt, most):
    """Long-tailed lengths: at most 2.5 % above an even load, or with long prompts, in many parts, 37 %."""
    groups = [i // 8 for i in range(responses)]
    for seed in range(20):
        normal = torch.randn(responses, generator=torch.Generator().manual_seed(seed))
        lengths = ((0.8 * normal).exp() * 4000).clamp(1, 16384).long().tolist()
        owners = parallel.deal(groups, [prompt + length for length in lengths], lengths, ranks)
        loads = torch.zeros(ranks).index_add(0, torch.tensor(owners), torch.tensor(lengths).float())
        for rank, _ in {*zip(owners, groups, strict=True)}:
            loads[rank] += prompt
        assert loads.max() <= most * loads.new_tensor(sum(lengths) + prompt * responses / 8) / ranks, "one by one 1.67"


def test_offload_in_one_process_changes_nothing_but_memory(tmp_path, tokenizer, one_process):
    """Gradient, step and checkpoint are the same. At most embedding, head and one layer are whole at a time."""
    path, config = save_model(tmp_path / "tiny", 4), resolved(max_micro_batch_tokens=20, entropy_coef=0.01)
    objective = train.objective_of_step(config, checkpoint.State("id"))
    rollout, found, whole = rollout_of([(5, 3), (5, 9), (5, 1), (5, 5)], shared=True), {}, []
    for index, shard in enumerate(("no", "offload"), start=1):
        model, _ = load_model(path, shard=shard)
        policy = parallel.distribute(Policy(model), shard, model._no_split_modules)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=shard == "offload")  # as with a GPU
        if shard == "offload":
            layers = sum(p.numel() for p in model.model.layers.parameters())
            everything = sum(p.numel() for p in model.parameters())
            for module in model.model.layers:
                module.register_forward_hook(lambda *_, m=model: whole.append(unsharded(m)))
                module.register_full_backward_pre_hook(lambda *_, m=model: whole.append(unsharded(m)))
        _, done = train.update(policy, optimizer, rollout, objective, 1e-3, config, "cpu")
        checkpoint.Saver(tmp_path, model, tokenizer, optimizer).finish(checkpoint.State("id", index))
        gradients = {name: parallel.full_tensor(p.grad) for name, p in model.named_parameters()}
        folder = tmp_path / f"checkpoint-{index:06d}"
        moments = torch.load(folder / "trainer.pt", weights_only=True)["optimizer"]["state"]
        found[shard] = gradients, load_file(folder / "model.safetensors"), moments, done.grad_norm
    torch.testing.assert_close(found["offload"], found["no"], atol=1e-7, rtol=1e-6)
    assert len(whole) == 2 * 4 * 2, "four layers, forward and backward, two micro-batches"
    assert max(whole) <= everything - layers + layers // 4, "parameters whole at a time"
    assert checkpoint.load(tmp_path / "checkpoint-000001", model, optimizer).step == 1


def test_pinned_memory_is_not_rounded_up(monkeypatch):
    """torch rounds each pinned tensor up to a power of two: 51 GiB for 7B. It has the setting, and keeps the user's."""
    for name in ("pinned_max_cached_size_mb", "garbage_collection_threshold"):
        with pytest.raises((ValueError, RuntimeError)):  # it ignores names that it does not know
            torch._C._accelerator_setAllocatorSettings(f"{name}:x")
    torch._C._accelerator_setAllocatorSettings("garbage_collection_threshold:0.5")
    policies = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_: types.SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(parallel, "fully_shard", lambda policy, offload_policy, **_: policies.append(offload_policy))
    for _ in range(2):  # the policy and a critic
        parallel.distribute(torch.nn.Linear(1, 1), "offload", [])
    assert [policy.pin_memory for policy in policies] == [True, True]
    settings = f"garbage_collection_threshold:0.5,pinned_max_cached_size_mb:{parallel.PINNED_CACHED_MIB}"
    assert torch._C._accelerator_getAllocatorSettings() == settings


def test_a_checkpoint_copies_only_what_training_changes(tiny_model):
    """Gathered tensors are copies already; a second copy of an offloaded 7B model would take 85 GiB."""
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    Policy(tiny_model)(pack(rollout_of([(3, 2)])), 1.0)[0].sum().backward()
    optimizer.step()
    weight, gathered = tiny_model.model.norm.weight, torch.zeros(3)
    moments = optimizer.state[weight]
    record = {"a": [weight.detach()], "b": moments, "c": (gathered, 5), "d": {"step": moments["step"]}}
    copies = checkpoint._apart(record, [(tiny_model, optimizer)])
    assert copies["c"][0] is gathered and copies["c"][1] == 5
    for copy, used in ((copies["a"][0], weight), (copies["b"]["exp_avg"], moments["exp_avg"])):
        assert torch.equal(copy, used) and copy.data_ptr() != used.data_ptr()
    step = copies["d"]["step"].item()
    optimizer.step()
    assert copies["d"]["step"].item() == step, "the moments of one step with the count of another"


def test_peak_memory_is_the_trainer_s(monkeypatch):
    """torch also counts vLLM's pools, even while vLLM sleeps and has freed their memory."""
    sizes = {(0, 0): 7, (0, 1): 30, (0, 2): 2}  # GiB, by pool
    segments = [{"segment_pool_id": pool, "allocated_size": size * 2**30} for pool, size in sizes.items()]
    signature = inspect.signature(torch.cuda.memory_snapshot)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda **options: signature.bind(**options) and segments)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 52 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert perf.peak_memory_gib() == 20
    assert "segment_pool_id" in inspect.getsource(torch.cuda.memory)


def test_all_passes_and_steps_have_all_threads_of_the_host(monkeypatch, tiny_model, tiny_folder):
    """vLLM sets the number of threads of its process to 1: too few for an offloaded optimizer's step.

    With different numbers torch.compile makes more variants of a function: the head would be compiled twice.
    """
    vllm = Path(importlib.util.find_spec("vllm").origin).parent  # not imported, which takes 10 s
    assert "torch.set_num_threads(1)" in (vllm / "utils" / "torch_utils.py").read_text()
    config = resolved(objective="ppo", kl_coef=0.1, warmup_steps=0)
    critic, reference = advantages.Critic(config, str(tiny_folder), "cpu"), Policy(tiny_model)
    policy, meter = Policy(load_model(str(tiny_folder))[0]), perf.Meter(tiny_model, "cpu")
    optimizer, threads, seen = torch.optim.AdamW(policy.parameters()), [1], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    monkeypatch.setattr(parallel, "THREADS", 16)
    for name, module in {"policy": policy, "reference": reference, "critic": critic.wrapped}.items():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append((name, threads[0])))
    for name, each in {"policy's step": optimizer, "critic's step": critic.optimizer}.items():
        each.register_step_pre_hook(lambda *_, name=name: seen.append((name, threads[0])))
    rollout = replace(rollout_of([(3, 2), (3, 4), (3, 3)], shared=True), index=torch.arange(3))
    state, learner = checkpoint.State("id"), (policy, optimizer, reference, critic)
    objective, mini_batches = train.objective_of_step(config, state), [torch.tensor([0]), torch.tensor([1])]
    train.learn(*learner, rollout, mini_batches, objective, 1e-3, state, config, Path("x"), meter)
    names = ["reference", "critic", *["critic", "critic's step"] * 2, "policy", *["policy", "policy's step"] * 2]
    assert seen == [(name, 16) for name in names] and threads == [1]


def test_a_reference_is_not_kept_whole(tiny_folder, one_process):
    """It has no backward pass, after which FSDP2 would free the embedding and the head."""
    policy = load_reference(resolved(kl_coef=0.1, shard="offload", model=str(tiny_folder)), "cpu")
    rollout = rollout_of([(3, 2), (3, 4)])
    (measured,) = policy_py.with_reference_logprobs(policy, [rollout], 1.0, 100, "cpu")
    assert len(measured.reference_logprobs) == len(rollout.tokens) == 6
    assert unsharded(policy) == 0


def test_a_critic_on_a_gpu(monkeypatch, tiny_folder):
    """The step is fused, which needs no extra memory. A sharded head is bfloat16, the values are float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    critic = advantages.Critic(resolved(advantages="gae"), str(tiny_folder), "cpu")
    assert critic.optimizer.defaults["fused"]
    g = torch.Generator().manual_seed(0)
    critic.model.head.data = torch.randn(1, 64, generator=g).bfloat16()
    hidden = torch.randn(5, 64, generator=g)
    monkeypatch.setattr(advantages, "hidden_states", lambda *_: hidden)
    values = critic.model(types.SimpleNamespace(predecessors=torch.arange(5)))
    torch.testing.assert_close(values, hidden @ critic.model.head.data.float()[0], atol=1e-5, rtol=1e-5)
