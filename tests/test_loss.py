"""The objectives and the entropy accounting, against golden vectors, float64 autograd and the equations themselves."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import loss as L
from ce_gppo import betas, corrections, selection
from ce_gppo import entropy as E
from ce_gppo.statistics import sums_to_metrics
from helpers import resolved, responses_of

GOLDEN = np.load(Path(__file__).parent / "golden" / "objectives.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files}, key=int)
PICKS = {name: spec.picks for name, spec in L.OBJECTIVES.items() if spec.picks}


def random_case(seed: int = 0, B: int = 5, T: int = 11, spread: float = 0.6) -> dict[str, torch.Tensor]:
    """policy_loss's arguments, [B, T] in float64. Many ratios are out of the interval, and many tokens are LP."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3 - 0.05
    lengths = torch.randint(1, T + 1, (B, 1), generator=g)
    return {
        "logprobs": old + spread * torch.randn(B, T, generator=g, dtype=torch.float64),
        "old_logprobs": old,
        "advantages": torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T).clone(),
        "mask": torch.arange(T) < lengths,
        "chosen": (torch.rand(B, T, generator=torch.Generator().manual_seed(seed + 2000)) < 0.3).double(),
        "old_entropy": torch.rand(B, T, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64) * 3,
    }


def policy_loss(logprobs, old_logprobs, advantages, mask, *, objective: str = "ce_gppo", **settings):
    """L.policy_loss with the objective's settings given one by one."""
    of_objective = {name: value for name, value in settings.items() if name in L.Objective.__dataclass_fields__}
    others = {name: value for name, value in settings.items() if name in ("entropy", "denominator", "correct_tokens")}
    records = dict.fromkeys(("old_entropy", "chosen", "rollout_logprobs", "ref_logprobs", "correct"))
    records |= {name: value for name, value in settings.items() if name not in of_objective | others}
    batch = SimpleNamespace(response_mask=mask, old_logprobs=old_logprobs, advantages=advantages, **records)
    entropy = others.pop("entropy", None)
    return L.policy_loss(batch, logprobs, entropy, L.Objective(objective, **of_objective), **others)


def gradient(case: dict[str, torch.Tensor], **settings) -> torch.Tensor:
    logprobs = case["logprobs"].clone().requires_grad_()
    policy_loss(**case | {"logprobs": logprobs}, **settings)[0].backward()
    return logprobs.grad


@pytest.mark.parametrize("k", CASES)
def test_golden(k):
    """objectives.npz was made with the authors' released loss (gppo_general) and, for cispo and gspo, with reference
    implementations of their papers' equations, in float64; no code of this project was involved."""
    case = {name: torch.tensor(GOLDEN[f"{k}/{name}"]) for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    case["logprobs"].requires_grad_()
    value, _ = policy_loss(**case, **json.loads(str(GOLDEN[f"{k}/meta"])))
    value.backward()
    assert abs(value.item() - GOLDEN[f"{k}/loss"]) < 1e-9
    np.testing.assert_allclose(case["logprobs"].grad, GOLDEN[f"{k}/grad"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("beta1, beta2", [(0.75, 1.0), (0.5, 1.0), (0.0, 0.0), (1.0, 1.0), (0.3, 0.2)])
@pytest.mark.parametrize("eps_low, eps_high", [(0.2, 0.2), (0.1, 0.28)])
def test_ce_gppo_is_the_equation(beta1, beta2, eps_low, eps_high):
    """The paper's cases, token by token, with its own delta / sg(delta)."""
    case = random_case(1)
    logprobs = case["logprobs"].clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, t in case["mask"].nonzero().tolist():
        A = case["advantages"][i, t]
        delta = (logprobs[i, t] - case["old_logprobs"][i, t]).exp()
        if delta < 1 - eps_low and A < 0:
            total = total - beta1 * (1 - eps_low) / delta.detach() * delta * A
        elif delta > 1 + eps_high and A > 0:
            total = total - beta2 * (1 + eps_high) / delta.detach() * delta * A
        else:
            total = total - delta * A
    expected = total / case["mask"].sum()
    expected.backward()
    settings = {"beta1": beta1, "beta2": beta2, "eps_low": eps_low, "eps_high": eps_high}
    value, _ = policy_loss(**case, **settings)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradient(case, **settings), logprobs.grad, atol=1e-12, rtol=0)


def test_betas_zero_have_the_gradient_of_ppo_clip_and_another_value():
    case = random_case(2)
    torch.testing.assert_close(gradient(case, beta1=0.0, beta2=0.0), gradient(case, objective="grpo"))
    values = [policy_loss(**case, objective=o, beta1=0.0, beta2=0.0)[0].item() for o in ("ce_gppo", "grpo")]
    assert values[0] != pytest.approx(values[1])


def test_gppo_has_the_value_of_ppo_clip_and_another_gradient():
    """gppo ignores the betas. Its gradient outside the interval is bounded: computed here by hand."""
    case = random_case(3)
    value = policy_loss(**case, objective="gppo", beta1=0.3, beta2=0.2)[0].item()
    assert value == pytest.approx(policy_loss(**case, objective="grpo")[0].item())
    ratio = (case["logprobs"] - case["old_logprobs"]).exp()
    weight = torch.where(case["advantages"] < 0, ratio.clamp(min=0.8), ratio.clamp(max=1.2))
    expected = -weight * case["advantages"] * case["mask"] / case["mask"].sum()
    torch.testing.assert_close(gradient(case, objective="gppo", beta1=0.3, beta2=0.2), expected)
    assert not torch.allclose(expected, gradient(case, objective="grpo"))


@pytest.mark.parametrize("objective", ["lp_only", "lp_only_half"])
def test_lp_only_is_ce_gppo_for_lp_tokens_and_ppo_clip_for_the_others(objective):
    """Token by token. LP and other tokens of both signs are below, inside and above the interval."""
    case = random_case(16, B=40)
    logprobs, kinds = case["logprobs"].clone().requires_grad_(), set()
    total = torch.zeros((), dtype=torch.float64)
    for i, t in case["mask"].nonzero().tolist():
        A, old = case["advantages"][i, t], case["old_logprobs"][i, t]
        delta = (logprobs[i, t] - old).exp()
        lp = old < -case["old_entropy"][i, t] if objective == "lp_only" else math.exp(old) < 0.5
        if delta < 0.8 and A < 0:
            total = total - (0.6 * 0.8 / delta.detach() * delta * A if lp else 0.8 * A)
        elif delta > 1.2 and A > 0:
            total = total - (0.9 * 1.2 / delta.detach() * delta * A if lp else 1.2 * A)
        else:
            total = total - delta * A
        kinds.add((bool(lp), bool(delta < 0.8), bool(delta > 1.2), bool(A < 0)))
    assert len(kinds) == 12
    expected = total / case["mask"].sum()
    expected.backward()
    settings = {"objective": objective, "beta1": 0.6, "beta2": 0.9}
    assert policy_loss(**case, **settings)[0].item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradient(case, **settings), logprobs.grad, atol=1e-12, rtol=0)


def test_each_beta_moves_its_own_boundary_only():
    """beta1: left boundary, negative advantage. beta2: right boundary, positive advantage. The rest never changes."""
    case = random_case(4)
    ratio = (case["logprobs"] - case["old_logprobs"]).exp()
    low = case["mask"] & (ratio < 0.8) & (case["advantages"] < 0)
    high = case["mask"] & (ratio > 1.2) & (case["advantages"] > 0)
    assert low.any() and high.any() and (case["mask"] & (ratio < 0.8) & (case["advantages"] > 0)).any()
    base = gradient(case, beta1=0.5, beta2=0.5)
    assert torch.equal(gradient(case, beta1=0.9, beta2=0.5) != base, low)
    assert torch.equal(gradient(case, beta1=0.5, beta2=0.9) != base, high)


@pytest.mark.parametrize("spread", [0.5, 5.0, 300.0])
def test_out_of_clip_weights_are_bounded(spread):
    case = random_case(5, spread=spread)
    beta1, beta2, eps_low, eps_high = 0.6, 0.9, 0.2, 0.3
    _, info = policy_loss(**case, beta1=beta1, beta2=beta2, eps_low=eps_low, eps_high=eps_high)
    size, A = info["weight"].abs(), case["advantages"].abs()
    low, high = info["clipped_low"], info["clipped_high"]
    assert low.any() and high.any()
    assert (size[low] <= beta1 * (1 - eps_low) * A[low] + 1e-12).all() and (size[low] > 0).all()
    assert (size[high] <= beta2 * (1 + eps_high) * A[high] + 1e-12).all() and (size[high] > 0).all()


@pytest.mark.parametrize("objective", L.OBJECTIVES)
@pytest.mark.parametrize("aggregation", L.AGGREGATIONS)
def test_micro_batches_add_up(objective, aggregation):
    """One micro-batch, or one for each response with its own padding: the same gradient."""
    case = random_case(6, B=10)
    whole = gradient(case, objective=objective, aggregation=aggregation)
    tokens, responses = case["mask"].sum().item(), case["mask"].any(-1).sum().item()
    denominator = L.denominator_of(L.Objective(aggregation=aggregation), tokens, responses)
    parts = torch.zeros_like(whole)
    for i in range(10):
        length = int(case["mask"][i].sum())
        row = {name: value[i : i + 1, :length] for name, value in case.items()}
        parts[i, :length] = gradient(row, objective=objective, aggregation=aggregation, denominator=denominator)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("objective", L.OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(objective, dtype):
    """Log ratios of +-1000, advantages of 0, a one-token response, a fully masked row that holds NaN."""
    logprobs = torch.tensor([[-1000.0, -0.1, -1e-3], [0.0, -1000.0, -5.0], [-1.0, 0.0, 0.0], [torch.nan] * 3])
    old = torch.tensor([[0.0, -1000.1, -1e-3], [-1000.0, 0.0, -5.0], [-1.5, 0.0, 0.0], [torch.inf] * 3])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    for sign in (1.0, -1.0, 0.0):
        advantages = sign * torch.tensor([[1.0], [-2.0], [0.5], [torch.nan]]).expand(4, 3)
        case = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages, "mask": mask}
        case["old_entropy"], case["chosen"] = torch.ones_like(old), torch.ones_like(old)
        case = {name: value.to(dtype) for name, value in case.items()}
        value, info = policy_loss(**case, objective=objective)
        grad = gradient(case, objective=objective)
        assert value.isfinite() and grad.isfinite().all() and info["weight"].isfinite().all()
        assert (grad[3] == 0).all() and (grad[2, 1:] == 0).all()
        if sign == 0 and objective != "kl_cov":  # whose distance to the old policy needs no advantage
            assert (grad == 0).all()


def test_a_token_far_out_of_the_interval_keeps_its_bounded_gradient():
    """If delta underflows, delta / sg(delta) would be 0/0."""
    case = {
        "logprobs": torch.tensor([[-2000.0]]),
        "old_logprobs": torch.tensor([[-1.0]]),
        "advantages": torch.tensor([[-1.0]]),
        "mask": torch.tensor([[True]]),
    }
    assert gradient(case, beta1=0.75).item() == pytest.approx(0.75 * 0.8)
    assert gradient(case, objective="grpo").item() == 0


def test_without_tokens_the_loss_is_0():
    empty = {name: torch.zeros(2, 3) for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    assert policy_loss(**empty)[0].item() == 0


def weight_of(kind: str, ratios: list[float], t: int) -> float:
    """The table of corrections.py for token t of a response, in Python."""
    product = math.prod(ratios)
    return {
        "tis": min(ratios[t], 2.0),
        "mask": float(0.5 <= ratios[t] <= 2.0),
        "seq-tis": min(product, 2.0),
        "seq-mask": float(0.5 <= product <= 2.0),
        "geo-mask": float(1 / 1.001 <= product ** (1 / len(ratios)) <= 1.001),
    }[kind]


@pytest.mark.parametrize("kind", corrections.CAPS)
def test_rollout_corrections_scale_the_gradient_and_leave_the_ratio_alone(kind):
    """vLLM's logprobs differ by much in some responses and by little in others, in both directions."""
    case = random_case(14, B=30)
    g = torch.Generator().manual_seed(14)
    size = torch.tensor([2.0, 0.2, 0.002], dtype=torch.float64).repeat(10)[:, None]
    gap = size * torch.randn(30, 11, generator=g, dtype=torch.float64)
    rollout_logprobs = (case["old_logprobs"] - gap).masked_fill(~case["mask"], torch.nan)
    weights = torch.zeros(30, 11, dtype=torch.float64)
    for i, row in enumerate(gap.exp().tolist()):
        ratios = row[: case["mask"][i].sum()]
        weights[i, : len(ratios)] = torch.tensor([weight_of(kind, ratios, t) for t in range(len(ratios))]).double()
    capped = weights[case["mask"]] == (2.0 if kind.endswith("tis") else 0.0)
    assert 0.1 < capped.double().mean() < 0.9
    settings = {"rollout_correction": kind, "rollout_logprobs": rollout_logprobs}
    torch.testing.assert_close(gradient(case, **settings), weights * gradient(case))
    _, plain = policy_loss(**case)
    _, corrected = policy_loss(**case, **settings)
    assert torch.equal(plain["ratio"], corrected["ratio"])
    assert torch.equal(plain["clipped_low"], corrected["clipped_low"])
    torch.testing.assert_close(corrected["weight"], weights * plain["weight"])


@pytest.mark.parametrize("kind", corrections.CAPS)
def test_huge_differences_to_vllm_give_finite_weights(kind):
    old, mask = torch.full((2, 400), -1.0), torch.ones(2, 400, dtype=torch.bool)
    rollout = old + torch.tensor([[500.0], [-500.0]])
    weights = corrections.correction_weights(old, rollout, mask, kind).expand(2, 400)
    assert (weights[0] == 0).all() and (weights[1] == (2.0 if kind.endswith("tis") else 0.0)).all()


@pytest.mark.parametrize("aggregation", L.AGGREGATIONS)
def test_positive_nll_is_the_mean_over_correct_tokens_in_every_aggregation(aggregation):
    """Its part of the weights, in the units of the aggregation, is its part of the gradient."""
    case = random_case(15)
    correct = torch.tensor([[True], [False], [True], [False], [False]])
    tokens = (correct & case["mask"]).sum().item()
    settings = {"aggregation": aggregation, "positive_nll_coef": 0.1, "correct": correct, "correct_tokens": tokens}
    added = gradient(case, **settings) - gradient(case, aggregation=aggregation)
    torch.testing.assert_close(added, -0.1 * (correct & case["mask"]).double() / tokens)
    _, info = policy_loss(**case, **settings)
    _, plain = policy_loss(**case, aggregation=aggregation)
    unit = {"seq-mean-token-mean": 5 * case["mask"].sum(1, keepdim=True)}
    unit |= {"seq-mean-token-sum": 5.0, "seq-mean-token-sum-norm": 5.0}
    unit = unit.get(aggregation, float(case["mask"].sum()))
    torch.testing.assert_close(info["weight"] - plain["weight"], -added * unit)


def test_dual_clip_ends_the_gradient_of_negative_tokens_only():
    case = random_case(7, spread=2.0)
    ratio = (case["logprobs"] - case["old_logprobs"]).exp()
    plain, dual = gradient(case), gradient(case, dual_clip=3.0)
    beyond = case["mask"] & (case["advantages"] < 0) & (ratio > 3.0)
    assert beyond.any() and (dual[beyond] == 0).all() and (plain[beyond] != 0).all()
    torch.testing.assert_close(dual[~beyond], plain[~beyond])


def test_gspo_of_one_token_responses_is_grpo():
    case = random_case(8, T=1)
    torch.testing.assert_close(gradient(case, objective="gspo"), gradient(case, objective="grpo"))


def test_cispo_is_ce_gppo_inside_the_interval():
    case = random_case(9, spread=0.01)
    torch.testing.assert_close(gradient(case, objective="cispo"), gradient(case, objective="ce_gppo"))
    wide = random_case(9)
    assert not torch.allclose(gradient(wide, objective="cispo"), gradient(wide, objective="ce_gppo"))


@pytest.mark.parametrize("objective", ["high_entropy", "clip_cov", "kl_cov", "sapo"])
def test_entropy_methods_are_their_equations(objective):
    """Token by token, in Python, by autograd; of the chosen tokens and of the others some are out of the interval."""
    case = random_case(18, B=20)
    logprobs = case["logprobs"].clone().requires_grad_()
    total, kinds = torch.zeros((), dtype=torch.float64), set()
    for i, t in case["mask"].nonzero().tolist():
        A, old, chosen = case["advantages"][i, t], case["old_logprobs"][i, t], bool(case["chosen"][i, t])
        delta = (logprobs[i, t] - old).exp()
        clipped = (delta < 0.8 and A < 0) or (delta > 1.2 and A > 0)
        ppo = -(0.8 if A < 0 else 1.2) * A if clipped else -delta * A
        if objective == "high_entropy":
            total = total + (ppo if chosen else 0)
        elif objective == "clip_cov":
            total = total + (0 if chosen else ppo)
        elif objective == "kl_cov":
            total = total - delta * A + ((logprobs[i, t] - old).abs() if chosen else 0)
        else:
            tau = 1.0 if A > 0 else 1.05
            total = total - 4 / tau / (1 + (-tau * (delta - 1)).exp()) * A
        kinds.add((chosen, bool(clipped)))
    assert len(kinds) == 4
    expected = total / case["mask"].sum()
    expected.backward()
    assert policy_loss(**case, objective=objective)[0].item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradient(case, objective=objective), logprobs.grad, atol=1e-12, rtol=0)


def test_tokens_are_picked_over_the_whole_mini_batch():
    g = torch.Generator().manual_seed(19)
    logprobs, entropy = -3 * torch.rand(20_000, generator=g), torch.rand(20_000, generator=g)
    advantages = torch.randn(20_000, generator=g)
    A, lp = advantages.double().numpy(), logprobs.double().numpy()
    cov = (lp - lp.mean()) * (A - A.mean())
    picked = {name: picks(logprobs, entropy, advantages).numpy() for name, picks in PICKS.items()}
    assert set(picked["high_entropy"].nonzero()[0]) == set(np.argsort(-entropy.numpy())[:4000])
    assert set(picked["kl_cov"].nonzero()[0]) == set(np.argsort(-cov)[:40])
    inside = set(((cov > 1) & (cov < 5)).nonzero()[0])
    assert len(inside) > 1000 and picked["clip_cov"].sum() == 4 and set(picked["clip_cov"].nonzero()[0]) < inside
    few = [values[:3] for values in (logprobs, entropy, torch.zeros(3))]
    assert PICKS["clip_cov"](*few).sum() == 0, "no covariance is within the bounds"
    assert PICKS["kl_cov"](*few).sum() >= 1 and PICKS["high_entropy"](*few).sum() == 1


@pytest.mark.parametrize("picks", PICKS.values(), ids=PICKS)
def test_two_ranks_pick_the_same_tokens_as_one(picks, monkeypatch):
    shares = responses_of([(2, 30), (2, 50), (2, 1)], seed=1), responses_of([(2, 40), (2, 70)], seed=2)
    whole = [r for share in shares for r in share]
    selection.choose(whole, picks)
    expected = [r.chosen for r in whole]
    assert 1 <= sum(int(c.sum()) for c in expected) < 191
    parts = []
    monkeypatch.setattr(selection.dist, "all_gather", lambda part: parts.append(part) or [part])
    for share in shares:
        selection.choose(share, picks)
    monkeypatch.setattr(selection.dist, "all_gather", lambda part: parts)
    for rank, share in enumerate(shares):
        monkeypatch.setattr(selection.dist, "rank", lambda rank=rank: rank)
        selection.choose(share, picks)
    assert all(torch.equal(r.chosen, c) for r, c in zip(whole, expected, strict=True))
    selection.choose([], picks)  # a rank without responses


@pytest.mark.parametrize("name, spec", L.OBJECTIVES.items(), ids=L.OBJECTIVES)
def test_an_objective_ignores_the_settings_that_its_spec_says_and_no_others(name, spec):
    """Its gradient depends on all others. (policy_loss would apply a dual clip to any of them.)"""
    case, ignored = random_case(25, B=200), {*spec.ignores, *(() if spec.has_betas else L.BETAS)}
    for setting, value in {"eps_low": 0.1, "eps_high": 0.1, "beta1": 0.3, "beta2": 0.3, "dual_clip": 1.5}.items():
        if setting == "dual_clip" and setting in ignored:
            continue
        same = torch.equal(gradient(case, objective=name), gradient(case, objective=name, **{setting: value}))
        assert same == (setting in ignored), f"{name} {'ignores' if same else 'reads'} {setting}"


def test_kl_to_the_reference_is_k3():
    """Value and gradient by autograd over the estimator's formula. Masked values, here NaN, are never read."""
    case = random_case(17)
    g = torch.Generator().manual_seed(17)
    reference = case["old_logprobs"] + torch.randn(case["mask"].shape, generator=g, dtype=torch.float64)
    settings = {"kl_coef": 0.3, "ref_logprobs": reference.masked_fill(~case["mask"], torch.nan)}
    logprobs = case["logprobs"].clone().requires_grad_()
    k3 = (reference - logprobs).exp() - (reference - logprobs) - 1
    (0.3 * k3[case["mask"]].mean()).backward()
    torch.testing.assert_close(gradient(case, **settings) - gradient(case), logprobs.grad, atol=1e-12, rtol=0)
    value, info = policy_loss(**case, **settings)
    expected = policy_loss(**case)[0] + 0.3 * k3[case["mask"]].mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(info["weight"], -gradient(case, **settings) * case["mask"].sum())


def test_rloo_is_reinforce_at_any_ratio():
    case = random_case(10)
    expected = -case["advantages"] * case["mask"] / case["mask"].sum()
    torch.testing.assert_close(gradient(case, objective="rloo"), expected)


def test_every_objective_starts_as_the_policy_gradient():
    """At ratio 1, the first mini-batch of a rollout, all have the gradient of REINFORCE."""
    case = random_case(11, spread=0.0)
    expected = -case["advantages"] * case["mask"] / case["mask"].sum()
    for objective in L.OBJECTIVES:  # those that pick tokens: so that all are trained on
        case["chosen"] = torch.full_like(expected, float(objective == "high_entropy"))
        torch.testing.assert_close(gradient(case, objective=objective), expected)


def test_info_has_the_weights_of_the_gradient():
    for objective in L.OBJECTIVES:
        case = random_case(12)
        _, info = policy_loss(**case, objective=objective)
        torch.testing.assert_close(info["weight"], -gradient(case, objective=objective) * case["mask"].sum())


def test_aggregations_against_loops():
    case = random_case(13)
    losses = [
        -(lp - old).exp() * a
        for lp, old, a in zip(case["logprobs"], case["old_logprobs"], case["advantages"], strict=True)
    ]
    rows = [row[keep] for row, keep in zip(losses, case["mask"], strict=True)]
    expected = {
        "token-mean": torch.cat(rows).mean(),
        "seq-mean-token-mean": torch.stack([row.mean() for row in rows]).mean(),
        "seq-mean-token-sum": torch.stack([row.sum() for row in rows]).mean(),
        "seq-mean-token-sum-norm": torch.stack([row.sum() / 20 for row in rows]).mean(),
    }
    assert expected.keys() == set(L.AGGREGATIONS)
    for aggregation, value in expected.items():
        wide = {"eps_low": 1e9, "eps_high": 1e9, "max_response_tokens": 20}
        assert policy_loss(**case, **wide, aggregation=aggregation)[0].item() == pytest.approx(value.item())


def test_unknown_names_list_the_known_ones():
    case = random_case()
    with pytest.raises(ValueError, match="ppg.*ce_gppo, gppo, grpo, ppo, dapo, cispo, gspo"):
        policy_loss(**case, objective="ppg")
    with pytest.raises(ValueError, match="mean.*token-mean, seq-mean-token-mean, seq-mean-token-sum, "):
        policy_loss(**case, aggregation="mean")


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    advantages = L.group_advantages(rewards)
    for row, expected in zip(rewards.double().numpy(), advantages, strict=True):
        np.testing.assert_allclose(expected, (row - row.mean()) / (row.std(ddof=1) + 1e-6), rtol=1e-5)
    torch.testing.assert_close(advantages, L.group_advantages(2 * rewards - 1), atol=1e-5, rtol=1e-5)
    for row, mean, loo in zip(rewards, *(L.group_advantages(rewards, k) for k in L.ADVANTAGES[1:]), strict=True):
        for i, reward in enumerate(row.tolist()):
            others = row.tolist()[:i] + row.tolist()[i + 1 :]
            assert mean[i].item() == pytest.approx(reward - sum(row.tolist()) / 4)
            assert loo[i].item() == pytest.approx(reward - sum(others) / 3)
    for kind in L.ADVANTAGES:
        assert (L.group_advantages(torch.full((1, 3), 0.1), kind) == 0).all()
    with pytest.raises(ValueError, match="at least 2"):
        L.group_advantages(torch.zeros(4, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Entropy accounting


def softmax_case(seed: int = 0, N: int = 40, V: int = 13):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    H = -(p * log_p).sum(-1)
    S = (p**2 * (log_p + H[:, None])).sum(-1)
    a = torch.randint(V, (N,), generator=g)
    return z, log_p, H, S, a


def entropy_of(z: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(z, -1)
    return -(log_p.exp() * log_p).sum(-1)


def test_velocity_is_the_product_of_the_two_gradients():
    z, log_p, H, S, a = softmax_case()
    g = torch.linspace(-2, 2, len(a), dtype=torch.float64)
    z.requires_grad_()
    dH = torch.autograd.grad(entropy_of(z).sum(), z)[0]
    step = torch.autograd.grad(torch.log_softmax(z, -1).gather(1, a[:, None]).sum(), z)[0]
    velocity = E.entropy_velocity(g, log_p.gather(1, a[:, None])[:, 0], H, S)
    torch.testing.assert_close(velocity, g * (dH * step).sum(-1), atol=1e-12, rtol=1e-12)


def test_velocity_predicts_a_finite_step():
    z, log_p, H, S, a = softmax_case(1)
    g = torch.linspace(-2, 2, len(a), dtype=torch.float64)
    direction = g[:, None] * (torch.nn.functional.one_hot(a, z.shape[1]) - log_p.exp())
    velocity = E.entropy_velocity(g, log_p.gather(1, a[:, None])[:, 0], H, S)
    size = 1e-6
    measured = (entropy_of(z + size * direction) - entropy_of(z - size * direction)) / (2 * size)
    torch.testing.assert_close(velocity, measured, atol=1e-8, rtol=1e-6)


def sums_of(seed: int, B: int = 6, T: int = 9) -> tuple[dict, dict, dict]:
    """A random case with matching entropies: (case, info, sums)."""
    case = random_case(seed, B, T)
    _, _, H, S, _ = softmax_case(seed, B * T)
    H, S = H.reshape(B, T), S.reshape(B, T)
    case["old_entropy"] = H
    _, info = policy_loss(**{k: v for k, v in case.items() if k != "old_entropy"})
    sums = E.token_sums(info, case["logprobs"], H, S, case["old_logprobs"], H, case["advantages"], case["mask"])
    return case, info, sums


def test_shares_and_velocities_add_up():
    _, _, sums = sums_of(24)
    metrics = sums_to_metrics(sums)
    quadrants = ("pa_hp", "pa_lp", "na_hp", "na_lp")
    assert sum(metrics[f"tokens/{q}"] for q in quadrants) == pytest.approx(1)
    assert sum(metrics[f"velocity/{q}"] for q in quadrants) == pytest.approx(metrics["velocity/total"])
    assert sum(metrics[f"weight/{name}"] for name in ("low", "high", "inside")) == pytest.approx(1)
    assert metrics["clip/low"] > 0 and metrics["clip/high"] > 0


def test_metrics_against_loops():
    case, info, sums = sums_of(21)
    metrics = sums_to_metrics(sums)
    places = case["mask"].nonzero().tolist()
    low = [(i, t) for i, t in places if info["clipped_low"][i, t]]
    ratios = [(case["logprobs"][i, t] - case["old_logprobs"][i, t]).exp().item() for i, t in places]
    assert metrics["clip/low"] == pytest.approx(len(low) / len(places))
    assert metrics["clip/prob_low"] == pytest.approx(np.mean([case["old_logprobs"][p].exp().item() for p in low]))
    assert metrics["ratio/min"] == pytest.approx(min(ratios)) and metrics["ratio/max"] == pytest.approx(max(ratios))
    assert metrics["ratio/mean"] == pytest.approx(np.mean(ratios))
    assert metrics["kl/old"] == pytest.approx(np.mean([r - 1 - np.log(r) for r in ratios]))
    lp = [p for p in places if case["old_logprobs"][tuple(p)] < -case["old_entropy"][tuple(p)]]
    na_lp = [tuple(p) for p in lp if case["advantages"][tuple(p)] < 0]
    assert metrics["tokens/na_lp"] == pytest.approx(len(na_lp) / len(places))
    assert metrics["entropy/na_lp"] == pytest.approx(np.mean([case["old_entropy"][p].item() for p in na_lp]))


def test_sums_of_parts_are_the_sums_of_the_whole():
    case, info, whole = sums_of(22)
    _, _, H, S, _ = softmax_case(22, 54)
    H, S = H.reshape(6, 9), S.reshape(6, 9)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {name: value[rows] for name, value in info.items()}
        names = ("old_logprobs", "old_entropy", "advantages", "mask")
        parts.append(E.token_sums(part, case["logprobs"][rows], H[rows], S[rows], *(case[n][rows] for n in names)))
    for name, value in E.add_sums(parts).items():
        assert value.item() == pytest.approx(whole[name].item()), name


def test_means_over_no_tokens_are_left_out():
    case = random_case(23, spread=0.0)
    H = torch.ones_like(case["logprobs"])
    _, info = policy_loss(**case)
    names = ("old_logprobs", "advantages", "mask")
    old, advantages, mask = (case[n] for n in names)
    metrics = sums_to_metrics(E.token_sums(info, case["logprobs"], H, H, old, H, advantages, mask))
    assert metrics["clip/low"] == 0 and "clip/prob_low" not in metrics


@pytest.mark.parametrize("target", [0.5, 0.8, 1.2])
def test_the_controller_holds_what_can_be_reached(target):
    """A process whose entropy drifts by an amount that depends on u, with noise, settles at the target. If the target
    is out of reach, u stays at its end without winding up, and comes back at once."""
    g = torch.Generator().manual_seed(0)
    entropy, control, history = 2.0, (0.5, 0.0), []
    for _ in range(300):
        entropy *= math.exp(-0.03 + 0.05 * control[0])
        seen = entropy * math.exp(0.03 * torch.randn((), generator=g).item())
        control = betas.steer(control, seen, target)
        assert 0 <= control[0] <= 1
        history.append(entropy)
    settled = history[100:]
    assert abs(sum(settled) / len(settled) / target - 1) < 0.05 and max(abs(h / target - 1) for h in settled) < 0.15

    for _ in range(100):
        control = betas.steer(control, 0.1 * target, target)
    assert control[0] == 1.0 and betas.steered_betas(1.0, 0.75, 1.0) == (0.0, 1.0)
    assert betas.steer(control, 1.1 * target, target)[0] < 0.5
    assert betas.steered_betas(0.0, 0.75, 1.0) == (0.75, 0.0)


def test_without_betas_the_target_moves_the_bonus():
    """c rises by 0.005 while entropy is at or below the target, and falls otherwise; then it is not applied."""
    config = resolved(objective="grpo", entropy_target=0.2, entropy_coef=0.005)
    control, used = betas.first_control(config), []
    assert betas.bonus_of_step(config, control) == 0.005
    for entropy in (0.5, 0.5, 0.19, 0.1, 0.2, 0.3, 0.1):
        control = betas.next_control(config, control, entropy)
        used.append(betas.bonus_of_step(config, control))
    assert used == pytest.approx([0, 0, 0.005, 0.01, 0.015, 0, 0.015])
    for _ in range(300):
        control = betas.next_control(config, control, 0.1)
    assert betas.bonus_of_step(config, control) == 1.0
    assert betas.betas_of_step(config, 3, control[0]) == (None, None)
    assert betas.betas_of_step(resolved(objective="gppo", entropy_target=0.2), 3, 0.3) == (1.0, 1.0)
    ours = resolved(objective="lp_only", entropy_target=0.2, entropy_coef=0.01)
    assert betas.first_control(ours) == (0.5, 0.0) and betas.bonus_of_step(ours, (0.1, -1.0)) == 0.01
    assert betas.next_control(ours, (0.5, 0.0), 0.3) == betas.steer((0.5, 0.0), 0.3, 0.2)
