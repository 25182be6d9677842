"""Rollouts, their parts and packed form, and the policy: against naive float64 and against transformers itself."""

import contextlib
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loss
import train
from ce_gppo import batch as B
from ce_gppo import policy as P
from ce_gppo.messages import UserError
from ce_gppo.model import load_model, load_reference
from ce_gppo.policy import Policy, token_statistics
from helpers import naive_outputs, naive_statistics, resolved, rollout_of

# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and their parts


def groups_of(prompts: int, lengths: list[int], seed: int = 0) -> B.Rollout:
    """For each prompt, of 3 tokens and more, responses of these lengths; with all columns."""
    whole = None
    for p in range(prompts):
        whole = B.append(whole, rollout_of([(3 + p, n) for n in lengths], seed + p, shared=True))
    N = len(whole.tokens)
    columns = {name: torch.rand(N) for name in ("reference_logprobs", "values", "returns")}
    whole = replace(whole, **columns, token_mask=torch.rand(N) < 0.5, texts=[f"text {i}" for i in range(len(whole))])
    return replace(whole, index=torch.arange(len(whole)))


def records(rollout: B.Rollout) -> list[dict]:
    """Each response with its prompt and its part of every column, by plain Python."""
    ends, out = [0, *rollout.lengths.cumsum(0).tolist()], []
    for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        row = {"prompt": rollout.prompts[rollout.prompt_of[i]]}
        for name, column in vars(rollout).items():
            if column is not None and name not in ("prompts", "prompt_of"):
                value = column[a:b] if name in B.BY_TOKEN else column[i]
                row[name] = value.tolist() if isinstance(value, torch.Tensor) else value
        out.append(row)
    return out


def as_ranks(function, count: int) -> list:
    """The results of function(rank) as each of `count` ranks, which all_gather once: each first gives its value."""
    given = []

    def give(value):
        given.append(value)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(B.parallel, "world_size", lambda: count)
        for gather in (give, lambda value: given):
            results = []
            patch.setattr(B.parallel, "all_gather", gather)
            for rank in range(count):
                patch.setattr(B.parallel, "rank", lambda rank=rank: rank)
                with contextlib.suppress(InterruptedError):
                    results.append(function(rank))
    return results


@pytest.mark.parametrize("rows", [[2, 0, 5], slice(1, 4), slice(0, 0), [], torch.tensor([4, 4]), "mask"], ids=str)
def test_a_part_has_the_columns_of_its_responses(rows):
    whole = groups_of(3, [4, 1])
    numbers = rows if not isinstance(rows, str) else torch.tensor([True, False, False, True, False, True])
    part = whole[numbers if not isinstance(numbers, list) else torch.tensor(numbers, dtype=torch.long)]
    expected = [records(whole)[i] for i in torch.arange(6)[numbers if numbers != [] else slice(0, 0)].tolist()]
    assert records(part) == expected and len(part) == len(expected) and part.prompts == whole.prompts
    assert part.sequence.tolist() == [i for i, row in enumerate(expected) for _ in row["tokens"]]
    assert part.sizes.tolist() == [len(row["prompt"] + row["tokens"]) for row in expected]


def test_parts_and_other_rollouts_are_joined():
    whole, other = groups_of(2, [4, 1]), groups_of(1, [2, 3], seed=9)
    assert records(B.concat([whole[:1], whole[:0], whole[1:]])) == records(whole)
    assert records(B.append(whole, other)) == records(whole) + records(other) and B.append(None, other) is other
    assert B.append(whole, other).prompts == whole.prompts + other.prompts
    without = B.concat([whole[:1], replace(whole[1:], values=None)])
    assert without.values is None and without.returns.tolist() == whole.returns.tolist()
    assert whole.without([torch.tensor([2]), torch.tensor([0])]).tolist() == [1, 3]
    assert whole.without([]).tolist() == [0, 1, 2, 3]
    assert whole.by_group(whole.index).tolist() == [[0, 1], [2, 3]]
    filled = replace(whole, entropy=None).with_missing(entropy=whole.values, old_logprobs=whole.values)
    assert filled.entropy is whole.values and filled.old_logprobs is whole.old_logprobs
    assert whole.to("meta").tokens.is_meta and whole.to("meta").texts == whole.texts


@pytest.mark.parametrize("per_engine", [1, 2])
def test_all_ranks_rollouts_are_gathered_in_the_order_of_the_prompts(per_engine):
    """Prompts are dealt to engines; the ranks of one engine all have its rollout."""
    whole, engines = groups_of(5, [4, 1]), 2
    own = [list(range(engine, 5, engines)) for engine in range(engines) for _ in range(per_engine)]

    def of_rank(rank):
        responses = torch.tensor([2 * prompt + i for prompt in own[rank] for i in range(2)])
        part = replace(whole[responses], prompts=[whole.prompts[prompt] for prompt in own[rank]])
        part = replace(part, prompt_of=torch.arange(len(own[rank])).repeat_interleave(2))
        return B.gather(part, whole.prompts, own[rank])

    for found in as_ranks(of_rank, engines * per_engine):
        assert records(found) == records(whole) and found.prompt_of.tolist() == whole.prompt_of.tolist()
        assert found.prompts == whole.prompts
    none = B.gather(whole[[]], [], [])
    assert len(none) == 0


def test_ranks_have_every_response_once_and_nearly_equal_tokens():
    whole = groups_of(6, [9, 2, 5, 30])
    shares = as_ranks(lambda rank: B.local_batch(whole), 3)
    assert sorted(i for share in shares for i in share.index.tolist()) == list(range(24))
    assert all(share.index.tolist() == sorted(share.index.tolist()) for share in shares)
    tokens = [int(share.sizes.sum()) for share in shares]
    assert max(tokens) - min(tokens) < 10


@pytest.mark.parametrize("max_tokens", [1, 20, 33, 50, 10_000])
def test_micro_batches_hold_everything_once_within_the_budget(max_tokens):
    """In order, and greedily: no response would still fit into the part before it. Attention sees a shared prompt as
    often as it has responses, and a repetition takes a quarter of a token's memory."""

    def memory(part):
        packed = len(B.pack(part).input_ids)
        return packed + (int(part.sizes.sum()) - packed) / 4

    whole = B.append(groups_of(5, [7, 1, 13, 4]), groups_of(1, [60, 3], seed=5))
    parts = B.micro_batches(whole, max_tokens)
    assert records(B.concat(parts)) == records(whole)
    assert all(memory(part) <= max_tokens or len(part) == 1 for part in parts)
    end = 0
    for part in parts[:-1]:
        start, end = end, end + len(part)
        assert memory(whole[start : end + 1]) > max_tokens


def test_every_rank_has_the_same_number_of_micro_batches():
    whole = groups_of(1, [5, 5, 5])
    parts = as_ranks(lambda rank: B.micro_batches(whole[: [3, 1, 0][rank]], 8), 3)
    assert [[len(part) for part in own] for own in parts] == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert B.micro_batches(whole[:0], 8) == []


@pytest.mark.parametrize("name", ["high_entropy", "clip_cov", "kl_cov"])
def test_two_ranks_pick_the_same_tokens_as_one(name):
    whole = groups_of(4, [300, 500, 10])
    whole = replace(whole, old_logprobs=-3 * torch.rand(3240), advantages=torch.randn(3240), token_mask=None)
    token_filter = loss.OBJECTIVES[name].token_filter
    one = B.with_token_mask(whole, token_filter).token_mask
    assert one.tolist() == token_filter(whole.old_logprobs, whole.entropy, whole.advantages).tolist() and one.any()
    shares = as_ranks(
        lambda rank: B.with_token_mask(whole[[slice(0, 5), slice(5, 5), slice(5, 12)][rank]], token_filter), 3
    )
    assert torch.cat([share.token_mask for share in shares]).tolist() == one.tolist()
    assert B.with_token_mask(whole, None) is whole


def test_packed_prompts_are_shared_and_nothing_is_padded_but_attention(tokenizer):
    """End-of-sequence and padding ids are tokens like any other: lengths decide."""
    whole = B.append(rollout_of([(2, 3), (2, 1)], shared=True), rollout_of([(4, 2)], 1))
    whole = replace(whole, tokens=torch.tensor([tokenizer.pad_token_id] * 3 + [tokenizer.eos_token_id] * 3))
    packed = B.pack(whole)
    expected = [*whole.prompts[0], *[tokenizer.pad_token_id] * 3, tokenizer.eos_token_id]
    assert packed.input_ids.tolist() == [*expected, *whole.prompts[1], *[tokenizer.eos_token_id] * 2]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2, 3, 4, 5]
    assert packed.predecessors.tolist() == [1, 2, 3, 1, 9, 10] and packed.targets.tolist() == whole.tokens.tolist()
    sequences = sorted([[0, 1, 2, 3, 4], [0, 1, 5], [6, 7, 8, 9, 10, 11]], key=len)
    order, starts = packed.packing.order.tolist(), packed.packing.starts.tolist()
    assert [order[a : a + len(s)] for a, s in zip(starts, sequences, strict=False)] == sequences
    assert [order[i] for i in packed.packing.inverse.tolist()] == list(range(12)) and not packed.packing.is_identity
    assert B.pack(rollout_of([(2, 3)])).packing.is_identity
    empty = B.pack(whole[:0])
    assert len(empty.input_ids) == 2 and len(empty.targets) == 0 and empty.predecessors.dtype == torch.long


def test_padding_in_attention_is_bounded():
    whole = rollout_of([(5, n) for n in (80, 40, 20, 19, 18, 17, 16, 8, 4, 2, 1)])
    packing, real = B.pack(whole).packing, int(whole.sizes.sum())
    assert real <= len(packing.order) == packing.starts[-1] <= real / 0.85 and packing.longest == 85
    assert sum(b for b, _ in packing.blocks) == len(whole) > len(packing.blocks) > 1
    assert B.similar_lengths([85, 100]) == [(2, 100)] and B.similar_lengths([69, 100]) == [(1, 69), (1, 100)]


# ----------------------------------------------------------------------------------------------------------------------
# Logprob, entropy and moment


def head_case(seed: int, N: int, D: int, V: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g, dtype=dtype), torch.randn(V, D, generator=g, dtype=dtype) / 2
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), generator=g)


@pytest.mark.parametrize("width", [1, 7, 8, 53, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_head_matches_naive_float64_forward_and_backward(width, temperature, dtype, tolerance):
    hidden, weight, targets = head_case(0, 24, 16, 53, dtype)
    factors = torch.randn(2, 24, generator=torch.Generator().manual_seed(1), dtype=dtype)
    results = []
    for compute, arguments in ((token_statistics, (temperature, width)), (naive_statistics, (temperature,))):
        outputs = compute(hidden, weight, targets, *arguments)
        gradients = torch.autograd.grad((torch.stack(outputs[:2]) * factors).sum(), (hidden, weight))
        assert compute is naive_statistics or all(x.dtype == dtype for x in (*outputs, *gradients))
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("transform", [{"scale": 0.3}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 4.0}], ids=str)
def test_heads_with_a_bias_a_scale_or_a_softcap_match_naive_float64(transform):
    hidden, weight, targets = head_case(5, 24, 16, 53)
    bias = torch.randn(53, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    factors, results = torch.randn(2, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64), []
    for compute, width in ((token_statistics, (20,)), (naive_statistics, ())):
        outputs = compute(hidden, weight, targets, 0.6, *width, bias=bias, **transform)
        gradients = torch.autograd.grad((torch.stack(outputs[:2]) * factors).sum(), (hidden, weight, bias))
        results.append([*outputs, *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def test_head_passes_gradcheck_with_one_gradient_or_both():
    hidden, weight, targets = head_case(2, 4, 3, 7)
    for which in (slice(0, 1), slice(1, 2), slice(0, 2)):
        assert torch.autograd.gradcheck(
            lambda h, w, s=which: token_statistics(h, w, targets, 0.7, 3)[s], (hidden, weight)
        )
    assert not token_statistics(hidden, weight, targets)[2].requires_grad


def test_bfloat16_weights_on_a_cpu_get_their_gradient():
    hidden, weight, targets = head_case(3, 6, 5, 11, torch.float32)
    rounded = weight.detach().bfloat16().requires_grad_()
    full = rounded.detach().float().requires_grad_()
    token_statistics(hidden, rounded, targets, 1.0, 4)[0].sum().backward()
    naive_statistics(hidden.detach(), full, targets, 1.0)[0].sum().backward()
    assert rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.grad.float(), full.grad.float(), atol=1e-2, rtol=1e-2)


def test_head_survives_extreme_logits():
    """Probabilities that underflow, and a certain token: no NaN, entropy 0."""
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    logprobs, entropy, S = token_statistics(hidden, weight, torch.tensor([0, 0]))
    (logprobs.sum() + entropy.sum()).backward()
    assert all(values.isfinite().all() for values in (logprobs, entropy, S, hidden.grad, weight.grad))
    assert entropy.abs().max() < 1e-6 and logprobs.tolist() == pytest.approx([0.0, -2000.0])


def test_on_a_gpu_each_function_is_compiled_once(monkeypatch):
    """Not once for each of hundreds of tiles, as making the wrapper takes milliseconds. On a CPU not at all."""
    P._on_device.cache_clear()
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: made.append((function, dynamic)) or object())
    for function in (P._fold, P._grad_logits):
        assert len({id(P._on_device(function, True)) for _ in range(50)}) == 1
        assert P._on_device(function, False) is function
    P._on_device.cache_clear()
    assert made == [(P._fold, True), (P._grad_logits, True)]


@pytest.mark.parametrize("N, width", [(512, 2048), (1, 2**20), (3000, 256), (10**6, 256), (0, 2**20)])
def test_tiles_are_as_wide_as_the_memory_allows(N, width, monkeypatch):
    monkeypatch.setattr(P.TokenStatistics, "apply", lambda *arguments: arguments[4])
    assert token_statistics(torch.zeros(N, 1), None, None) == width
    on_gpu = mock.MagicMock(is_cuda=True)
    on_gpu.__len__.return_value = 1024
    assert token_statistics(on_gpu, None, None) == 2**17 and token_statistics(on_gpu, None, None, width=5) == 5


def test_head_never_allocates_tokens_by_vocabulary():
    """The largest tensor that forward and backward make is a tile's logits or the head's gradient."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    N, D, V, width = 512, 8, 300, 32
    hidden, weight, targets = head_case(4, N, D, V, torch.float32)
    with Watch():
        logprobs, entropy, _ = token_statistics(hidden, weight, targets, 1.0, width)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest <= max(N * width, N * D, V * D)


# ----------------------------------------------------------------------------------------------------------------------
# The policy


def test_forward_matches_transformers_on_single_sequences(tiny_model):
    """Packed without padding, a shared prompt once, in one pass or several; only response tokens."""
    whole = B.append(rollout_of([(3, 5), (1, 1), (7, 2)]), rollout_of([(2, 9), (2, 4), (2, 30)], 1, shared=True))
    assert len(B.pack(whole).input_ids) == 3 + 5 + 1 + 1 + 7 + 2 + 2 + 9 + 4 + 30
    expected = naive_outputs(tiny_model, whole, 0.7)
    found = Policy(tiny_model)(B.pack(whole), 0.7)[:2]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
    blank = replace(whole, old_logprobs=None, entropy=None)
    parts = P.with_old_logprobs(Policy(tiny_model), [blank[:2], blank[:0], blank[2:]], 0.7, 12, "cpu")
    for name, theirs in zip(("old_logprobs", "entropy"), expected, strict=True):
        ours = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
        assert not ours.requires_grad and [len(part) for part in parts] == [2, 0, 4]
    assert P.logprobs_and_entropy(Policy(tiny_model), [], 1.0, 12, "cpu") == []


def test_passes_without_gradients_fit_a_cpus_cache(monkeypatch):
    """They are at most 2,048 tokens there, and never more than asked for."""
    seen = []
    monkeypatch.setattr(P, "micro_batches", lambda rollout, max_tokens, _: seen.append(max_tokens) or [])
    monkeypatch.setattr(P, "concat", lambda parts: None)
    for device, budget in (("cpu", 9999), ("cpu", 100), ("cuda", 9999)):
        P.logprobs_and_entropy(torch.nn.Linear(1, 1), [rollout_of([])], 1.0, budget, device)
    assert seen == [2048, 100, 9999]


ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "smollm3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_attention_in_other_architectures(name):
    """Fewer key heads than query heads, sliding windows, norms of queries: the same as transformers' own attention."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(name, **sizes, **heads, **ARCHITECTURES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("packed")
    whole = B.append(rollout_of([(3, 9)]), rollout_of([(5, 7), (5, 2)], 1, shared=True))
    found = Policy(model)(B.pack(whole), 1.0)
    for ours, theirs in zip(found[:2], naive_outputs(model, whole), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_an_attention_that_is_not_ours_is_refused(option):
    packing, x = B.pack(rollout_of([(1, 1)])).packing, torch.zeros(1, 1, 2, 4)
    with pytest.raises(UserError, match=f"Linear: attention with {option} is not supported"):
        P.packed_attention(torch.nn.Linear(1, 1), x, x, x, None, packing=packing, **{option: 1.0})
    out, _ = P.packed_attention(torch.nn.Linear(1, 1), x, x, x, None, packing=packing, **{option: None})
    assert out.shape == (1, 2, 1, 4)


def update_gradient(model, batch: B.Rollout, **changes) -> tuple[torch.Tensor, float]:
    """The gradient that train.update applies, all parameters in a row, before clipping; and the loss it returns."""
    config = resolved(**changes)
    objective = train.objective_of_step(config, types.SimpleNamespace(step=0, control=(0.5, 0.0)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "MAX_GRAD_NORM", 1e9)
        _, one = train.update(Policy(model), sgd, batch, objective, 0.0, config, "cpu")
    return torch.cat([p.grad.flatten() for p in model.parameters()]), one.loss


@pytest.mark.parametrize("aggregation", loss.AGGREGATIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "gspo"},
        {"objective": "clip_cov"},
        {"dual_clip": 1.5, "entropy_coef": 0.5, "positive_nll_coef": 0.1},
        {"rollout_correction": "seq-tis", "kl_coef": 0.3},
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_loss_over_whole_logits(tiny_model, changes, aggregation):
    """By the real update, in one micro-batch and in many; by autograd over transformers' logits."""
    shared = rollout_of([(6, n) for n in (3, 9, 1, 5)], 1, shared=True)
    batch = B.append(rollout_of([(4, i + 1) for i in range(6)]), shared)
    g, N = torch.Generator().manual_seed(1), len(batch.tokens)
    old = naive_outputs(tiny_model, batch)[0].detach().float() + 0.6 * torch.randn(N, generator=g)
    gaps = torch.randn(2, N, generator=g)
    batch = replace(batch, old_logprobs=old, rollout_logprobs=old + gaps[0], reference_logprobs=old + gaps[1])
    batch = B.with_token_mask(batch, loss.OBJECTIVES[changes.get("objective", "ce_gppo")].token_filter)
    changes = changes | {"aggregation": aggregation}
    found = [update_gradient(tiny_model, batch, **changes, max_micro_batch_tokens=n) for n in (10_000, 30, 1)]
    config = resolved(**changes)
    objective = train.objective_of_step(config, types.SimpleNamespace(step=0, control=(0.5, 0.0)))
    tiny_model.zero_grad()
    value, _ = loss.policy_loss(batch, *naive_outputs(tiny_model, batch), objective)
    value.backward()
    expected = torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
    largest = expected.abs().max().item()
    assert largest > 1e-4
    for gradient, ours in found:
        torch.testing.assert_close(gradient, expected, atol=5e-6 * max(1.0, largest), rtol=1e-4)
        assert ours == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


def test_gradient_checkpointing_changes_only_memory(tiny_folder):
    batch, gradients, saved = rollout_of([(6, n) for n in (3, 9, 1, 5)], shared=True), [], []
    for checkpointing in (False, True):
        model, _ = load_model(str(tiny_folder), gradient_checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            Policy(model)(B.pack(batch), 1.0)
        saved.append(sum(sizes))
        gradients.append(update_gradient(model, batch)[0])
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-6)
    assert saved[1] < saved[0] / 2


def test_the_reference_is_the_base_policy(tiny_model, tiny_folder):
    """Its logprobs are those of the folder, also after the policy has changed. Without a kl_coef it is not loaded."""
    assert load_reference(resolved(model="no/such/model"), "cpu") is None
    reference = load_reference(resolved(model=str(tiny_folder), kl_coef=0.1), "cpu")
    whole = rollout_of([(4, 9), (3, 5), (2, 3)])
    expected = naive_outputs(tiny_model, whole)[0].detach()
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(1)
    parts = P.with_reference_logprobs(reference, [whole[:2], whole[2:]], 1.0, 20, "cpu")
    found = torch.cat([part.reference_logprobs for part in parts])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([part.old_logprobs for part in parts]), whole.old_logprobs)
