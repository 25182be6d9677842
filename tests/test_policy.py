"""Logprobs, entropy, micro-batches and checkpoints, against naive float64 and against transformers itself."""

import copy
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loss
import train
from ce_gppo import entropy, forward, perf
from ce_gppo.entropy import token_statistics
from ce_gppo.forward import Policy
from ce_gppo.messages import UserError
from ce_gppo.model import load_model
from ce_gppo.perf import Meter
from ce_gppo.reference import load_reference, set_reference_logprobs
from ce_gppo.types import Response
from helpers import group_of, naive_statistics, resolved, responses_of
from tools import doctor
from tools.families import build


@pytest.mark.parametrize("width", [1, 7, 8, 53, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_head_matches_naive_float64_forward_and_backward(width, temperature):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, 16, generator=g), torch.randn(53, 16, generator=g) / 2
    targets = torch.randint(53, (24,), generator=g)
    to_logprobs, to_entropy = torch.randn(24, generator=g), torch.randn(24, generator=g)
    results = []
    for compute, args in ((token_statistics, (temperature, width)), (naive_statistics, (temperature,))):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy, S = compute(h, w, targets, *args)
        ((logprobs * to_logprobs).sum() + (entropy * to_entropy).sum()).backward()
        results.append([x.double() for x in (logprobs, entropy, S.detach(), h.grad, w.grad)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_head_with_one_gradient_only(which):
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 8, generator=g), torch.randn(11, 8, generator=g)
    targets = torch.randint(11, (5,), generator=g)
    grads = []
    for compute in (token_statistics, naive_statistics):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        args = (1.0, 2) if compute is token_statistics else (1.0,)
        compute(h, w, targets, *args)[which].sum().backward()
        grads.append((h.grad, w.grad))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_head_survives_extreme_logits():
    """Probabilities that underflow, and a certain token: no NaN, entropy 0."""
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    logprobs, entropy, S = token_statistics(hidden, weight, torch.tensor([0, 0]))
    (logprobs.sum() + entropy.sum()).backward()
    for values in (logprobs, entropy, S, hidden.grad, weight.grad):
        assert values.isfinite().all()
    assert entropy.abs().max() < 1e-6 and logprobs.tolist() == pytest.approx([0.0, -2000.0])


def test_on_a_gpu_each_function_is_compiled_once():
    """Not once for each of hundreds of tiles, as making the wrapper takes milliseconds."""
    on_gpu = types.SimpleNamespace(is_cuda=True)
    entropy._compiled.cache_clear()
    for function in (entropy._fold, entropy._grad_logits):
        assert len({id(entropy._on_device(function, on_gpu)) for _ in range(50)}) == 1
    assert entropy._compiled.cache_info().misses == 2


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
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with Watch():
        logprobs, entropy, _ = token_statistics(hidden, weight, torch.zeros(N, dtype=torch.long), 1.0, width)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest <= max(N * width, N * D, V * D)


def test_forward_matches_transformers_on_single_sequences(tiny_model):
    """Packed without padding, a shared prompt once, targets shifted by one, only response tokens."""
    responses = responses_of([(3, 5), (1, 1), (7, 2), (2, 9)])
    responses[2].prompt_ids = responses[1].prompt_ids
    batch = forward.collate(responses)
    assert len(batch.input_ids) == 3 + 1 + 2 + 5 + 1 + 2 + 9
    logprobs, entropy, _ = Policy(tiny_model)(batch, 0.7)
    assert batch.response_mask.sum() == 5 + 1 + 2 + 9
    assert (logprobs[~batch.response_mask] == 0).all()
    for i, r in enumerate(responses):
        log_p = torch.log_softmax(naive_logits(tiny_model, r).double() / 0.7, -1)
        expected = log_p.gather(1, torch.tensor(r.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[i][batch.response_mask[i]].double(), expected, atol=1e-5, rtol=0)
        H = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(entropy[i][batch.response_mask[i]].double(), H, atol=1e-5, rtol=0)


def test_mask_comes_from_lengths_not_from_token_ids(tokenizer):
    """End-of-sequence and padding ids inside and at the end of responses are tokens like any other."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    responses = [
        Response([5, pad], [7, eos], torch.zeros(2), False, ""),
        Response([eos], [pad] * 4, torch.zeros(4), True, ""),
    ]
    batch = forward.collate(responses)
    assert batch.response_mask.tolist() == [[True, True, False, False], [True, True, True, True]]


def test_micro_batches_hold_everything_once_within_the_budget():
    responses = [r for i in range(10) for r in group_of(i % 5 + 3, [(7 * i + j) % 13 + 1 for j in range(4)], seed=i)]
    batches = forward.micro_batches(responses, max_tokens=50)
    assert [i for batch in batches for i in batch] == list(range(40))
    sizes = [len(forward.collate([responses[i] for i in batch]).input_ids) for batch in batches]
    assert max(sizes) <= 50 and sum(sizes) / len(sizes) > 35
    assert forward.micro_batches(responses_of([(3, 90), (2, 90)]), max_tokens=50) == [[0], [1]]


def test_padding_is_bounded_in_attention_and_absent_elsewhere():
    responses = responses_of([(5, n) for n in (1, 2, 4, 8, 16, 17, 18, 19, 20, 40, 80)])
    batch = forward.collate(responses)
    real = sum(5 + len(r.response_ids) for r in responses)
    assert len(batch.input_ids) == real and len(batch.targets) == real - 5 * len(responses)
    assert real <= len(batch.packing.order) <= real / 0.85
    assert sum(b for b, _ in batch.packing.blocks) == len(responses) > len(batch.packing.blocks) > 1


def test_gradient_through_a_shared_prompt_is_that_of_single_sequences(tiny_model):
    """A group packed with its prompt once, against each response in a batch of its own."""
    responses = group_of(6, [3, 9, 1, 5])
    gradients = [update_gradient(tiny_model, responses, max_micro_batch_tokens=budget)[0] for budget in (10_000, 1)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 * gradients[0].abs().max()


def test_gradient_checkpointing_changes_only_memory(tiny_folder):
    responses = group_of(6, [3, 9, 1, 5])
    gradients, saved = [], []
    for checkpointing in (False, True):
        model, _ = load_model(str(tiny_folder), gradient_checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            Policy(model)(forward.collate(responses), 1.0)
        saved.append(sum(sizes))
        gradients.append(update_gradient(model, responses)[0])
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-6)
    assert saved[1] < saved[0] / 2


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
    responses = [*responses_of([(3, 9)]), *group_of(5, [7, 2], seed=1)]
    batch = forward.collate(responses)
    logprobs, _, _ = Policy(model)(batch, 1.0)
    for i, r in enumerate(responses):
        expected = torch.log_softmax(naive_logits(model, r), -1).gather(1, torch.tensor(r.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[i][batch.response_mask[i]], expected, atol=1e-5, rtol=1e-5)


def update_gradient(model, responses: list[Response], **changes) -> tuple[torch.Tensor, dict]:
    """The gradient that train.update applies, all parameters in a row, before clipping; and what it returns."""
    config = resolved(**changes)
    objective = train.objective_of_step(config, 1, (0.5, 0.0))
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "MAX_GRAD_NORM", 1e9)
        one = train.update(Policy(model), sgd, responses, objective, 0.0, config, "cpu")
    return torch.cat([p.grad.flatten() for p in model.parameters()]), one


def naive_logits(model, response: Response) -> torch.Tensor:
    """[R, V], by transformers with its own attention."""
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=ids).logits[0, len(response.prompt_ids) - 1 : -1]
    model.set_attn_implementation("packed")
    return logits


def test_entropy_bonus_is_exact_through_the_chunked_function(tiny_model):
    """Its gradient is that of the mean entropy of all tokens, by autograd over whole logits."""
    responses = responses_of([(4, i + 1) for i in range(6)])
    with_bonus, _ = update_gradient(tiny_model, responses, entropy_coef=0.5)
    without, _ = update_gradient(tiny_model, responses)
    log_p = torch.log_softmax(torch.cat([naive_logits(tiny_model, r) for r in responses]), -1)
    tiny_model.zero_grad()
    (-(log_p.exp() * log_p).sum(-1).mean() * -0.5).backward()
    expected = torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(with_bonus - without, expected, atol=1e-6, rtol=1e-4)


def test_positive_nll_is_the_mean_over_correct_responses(tiny_model):
    responses = responses_of([(4, i + 1) for i in range(6)])
    with_nll, _ = update_gradient(tiny_model, responses, positive_nll_coef=0.1)
    without, _ = update_gradient(tiny_model, responses)
    tiny_model.zero_grad()
    nll = [
        torch.nn.functional.cross_entropy(naive_logits(tiny_model, r), torch.tensor(r.response_ids), reduction="none")
        for r in responses
        if r.verdict > 0
    ]
    (0.1 * torch.cat(nll).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
    torch.testing.assert_close(with_nll - without, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"dual_clip": 1.5}, {"rollout_correction": "tis"}, {"rollout_correction": "mask"}, {"kl_coef": 0.3}],
    ids=str,
)
def test_options_through_the_real_update(tiny_model, changes):
    """The equation token by token, in Python, by autograd over whole logits."""
    responses = responses_of([(4, i + 1) for i in range(8)])
    g = torch.Generator().manual_seed(1)
    for r in responses:  # ratios on both sides of the interval, and other logprobs of vLLM
        r.old_logprobs = logprobs_of(tiny_model, r).detach() + 0.6 * torch.randn(len(r.response_ids), generator=g)
        r.rollout_logprobs = r.old_logprobs + torch.randn(len(r.response_ids), generator=g)
        r.ref_logprobs = r.old_logprobs + torch.randn(len(r.response_ids), generator=g)
        r.advantages = r.advantages * torch.randn(len(r.response_ids), generator=g)  # as a critic's: of each token
    found, _ = update_gradient(tiny_model, responses, objective="ce_gppo", max_micro_batch_tokens=30, **changes)
    tiny_model.zero_grad()
    total, kinds = torch.zeros(()), set()
    for r in responses:
        old_ones = r.old_logprobs, r.rollout_logprobs, r.ref_logprobs
        for logprob, A, old, vllm, reference in zip(logprobs_of(tiny_model, r), r.advantages, *old_ones, strict=True):
            delta = (logprob - old).exp()
            if delta < 0.8 and A < 0:
                kind, token = "low", -0.75 * 0.8 / delta.detach() * delta * A
            elif delta > 1.2 and A > 0:
                kind, token = "high", -1.0 * 1.2 / delta.detach() * delta * A
            else:
                kind, token = "inside", -delta * A
            if "dual_clip" in changes and A < 0 and token > -1.5 * A:
                kind, token = "dual", torch.tensor(-1.5 * A)
            correction = (old - vllm).exp()
            if changes.get("rollout_correction") == "tis":
                kind, token = kind + " cut" * (correction > 2).item(), token * min(correction, torch.tensor(2.0))
            elif changes.get("rollout_correction") == "mask" and not 0.5 <= correction <= 2:
                kind, token = "masked", 0 * token
            kinds.add(kind)
            if "kl_coef" in changes:
                kind, token = "kl", token + 0.3 * ((reference - logprob).exp() - (reference - logprob) - 1)
            kinds.add(kind)
            total = total + token
    (total / sum(len(r.response_ids) for r in responses)).backward()
    expected = torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
    assert {"low", "high", "inside"} <= kinds and len(kinds) >= 3 + bool(changes)
    torch.testing.assert_close(found, expected, atol=5e-6 * max(1.0, expected.abs().max().item()), rtol=1e-4)


def logprobs_of(model, response: Response) -> torch.Tensor:
    """[R], by transformers with its own attention."""
    log_p = torch.log_softmax(naive_logits(model, response), -1)
    return log_p.gather(1, torch.tensor(response.response_ids)[:, None])[:, 0]


def test_the_reference_is_the_base_policy(tiny_model, tiny_folder):
    """Its logprobs are those of the folder, also after the policy has changed. Without a kl_coef it is not loaded."""
    config = resolved(model=str(tiny_folder), kl_coef=0.1, max_micro_batch_tokens=20)
    assert load_reference(resolved(model="no/such/model"), "cpu") is None
    reference = load_reference(config, "cpu")
    mini_batches = [responses_of([(4, 9), (3, 5)]), responses_of([(2, 3)], seed=1)]
    expected = [logprobs_of(tiny_model, r).detach() for batch in mini_batches for r in batch]
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(1)
    set_reference_logprobs(reference, mini_batches, config, Meter(tiny_model, "cpu"))
    for r, logprobs in zip(sum(mini_batches, []), expected, strict=True):
        torch.testing.assert_close(r.ref_logprobs, logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aggregation", loss.AGGREGATIONS)
def test_gradient_does_not_depend_on_the_cut(tiny_model, aggregation):
    """One micro-batch or ten, through the real update: the same gradient, to a few roundings of its largest element."""
    responses = responses_of([(4, i + 1) for i in range(10)])
    gradients, cuts = [], []
    for budget in (10_000, 14):
        gradient, one = update_gradient(tiny_model, responses, max_micro_batch_tokens=budget, aggregation=aggregation)
        gradients.append(gradient)
        cuts.append((len(forward.micro_batches(responses, budget)), one.loss))
    assert cuts[0][0] == 1 and cuts[1][0] >= 9 and cuts[0][1] == pytest.approx(cuts[1][1], rel=1e-6)
    largest = gradients[0].abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], atol=5e-6 * max(1.0, largest), rtol=1e-5)


def test_compute_old_logprobs_fills_in_every_response(tiny_model):
    responses = responses_of([(2, 3), (5, 8), (1, 1)])
    for r in responses:
        r.old_logprobs = r.entropy = None
    forward.compute_old_logprobs(Policy(tiny_model), responses, 1.0, 12, "cpu")
    for r in responses:
        logprobs, entropy, _ = Policy(tiny_model)(forward.collate([r]), 1.0)
        torch.testing.assert_close(r.old_logprobs, logprobs[0].detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(r.entropy, entropy[0].detach(), atol=1e-5, rtol=0)


def test_float32_master_weights_take_small_steps(tiny_folder):
    """At the paper's learning rate a bfloat16 weight would not move at all."""
    model, _ = load_model(str(tiny_folder))
    weight = model.get_input_embeddings().weight
    assert weight.dtype == torch.float32
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    naive_logits(model, Response([1], [2, 3], torch.zeros(2), False, "")).square().sum().backward()
    optimizer.step()
    assert (weight != before).float().mean() > 0.9
    assert (weight.bfloat16() != before.bfloat16()).float().mean() < 0.1


def test_folders_without_a_usable_model_are_refused(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(tiny_folder))
    (tiny_folder / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="config.json cannot be read"):
        load_model(str(tiny_folder))


def test_a_head_with_softcapping_is_refused(tiny_model, tokenizer, tmp_path):
    tiny_model.config.final_logit_softcapping = 30.0
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="final_logit_softcapping = 30"):
        load_model(str(tmp_path))


def test_flops_are_those_of_the_matrix_products(tiny_model):
    """Against torch's own count over forward and backward; its attention is not halved for causality."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.randint(200, (2, 33))
    tiny_model.set_attn_implementation("sdpa")
    with FlopCounterMode(display=False) as counter:
        tiny_model(input_ids=ids).logits.sum().backward()
    ours = perf.flops(tiny_model, prompt_and_response=66, response=66, squares=2 * 33**2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_models_whose_layers_mix_neighbours_are_refused(tmp_path):
    """LFM2's convolution reaches over the border between two sequences of a packed pass."""
    path = build(str(tmp_path), "Lfm2")
    with pytest.raises(UserError, match="a Lfm2ForCausalLM change by .* nats when two sequences share a pass"):
        load_model(path)


def test_models_with_other_names_in_their_files_are_refused(tmp_path):
    """transformers fuses experts that the files hold one by one; vLLM would not find them."""
    path = build(str(tmp_path), "Qwen3Moe")
    with pytest.raises(UserError, match="of its weights, such as .*experts.*, have other names in its files"):
        load_model(path)


def test_a_chat_template_without_an_end_of_sequence_token_is_a_warning(tiny_folder, tokenizer, capsys):
    load_model(str(tiny_folder))
    assert "WARNING" not in capsys.readouterr().err
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    tokenizer.save_pretrained(tiny_folder)
    load_model(str(tiny_folder))
    assert "ends an answer with '!', which is no end-of-sequence token" in capsys.readouterr().err


def test_an_end_of_sequence_token_beyond_the_vocabulary_is_refused(tiny_folder):
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": [3, 9999]}')
    with pytest.raises(UserError, match="end-of-sequence token 9999 is beyond its vocabulary of 262 tokens"):
        load_model(str(tiny_folder))


def test_the_doctor_says_whether_a_model_trains(tiny_folder, capsys):
    doctor.main(doctor.Config(model=str(tiny_folder)))
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 25 and f"{tiny_folder}: 0.1 M parameters, trains" in shown
    (tiny_folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="because of the model"):
        doctor.main(doctor.Config(model=str(tiny_folder)))
    assert "model.safetensors cannot be read: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, message",
    [
        ("Falcon", "cannot replace the attention"),
        ("Nemotron", "does not pass the starts of sequences on"),
    ],
)
def test_architectures_whose_attention_is_not_ours_are_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=f"{message}.*docs/models.md"):
        load_model(build(str(tmp_path), name))
