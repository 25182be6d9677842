"""The objectives and the entropy accounting, against golden vectors, float64 autograd and the equations themselves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import loss as L
from ce_gppo import entropy as E
from ce_gppo.messages import UserError
from helpers import resolved, rollout_of

GOLDEN = np.load(Path(__file__).parent / "golden" / "objectives.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files}, key=int)
FILTERS = {name: spec.token_filter for name, spec in L.OBJECTIVES.items() if spec.token_filter}


def random_case(seed: int = 0, B: int = 5, T: int = 11, spread: float = 0.6):
    """(a Rollout, the logprobs now), in float64. Many ratios are out of the interval, and many tokens are LP."""
    g = torch.Generator().manual_seed(seed)
    batch = rollout_of([(1, n) for n in torch.randint(1, T + 1, (B,), generator=g).tolist()], seed)
    N = len(batch.tokens)
    noise = [torch.randn(N, generator=g, dtype=torch.float64) for _ in range(4)]
    old = -3 * torch.rand(N, generator=g, dtype=torch.float64) - 0.05
    columns = {"old_logprobs": old, "rollout_logprobs": old + 0.7 * noise[0], "reference_logprobs": old + noise[1]}
    columns |= {"entropy": 3 * torch.rand(N, generator=g, dtype=torch.float64), "token_mask": noise[2] > 0.5}
    advantages = torch.randn(B, generator=g, dtype=torch.float64)[batch.sequence]
    return replace(batch, **columns, advantages=advantages), old + spread * noise[3]


def policy_loss(case, objective: str = "ce_gppo", entropy=None, totals=None, **settings):
    entropy = case[0].entropy if entropy is None else entropy  # the old one
    return L.policy_loss(*case, entropy, L.Objective(objective, **settings), totals)


def gradient(case, *arguments, **settings) -> torch.Tensor:
    logprobs = case[1].clone().requires_grad_()
    policy_loss((case[0], logprobs), *arguments, **settings)[0].backward()
    return logprobs.grad


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("k", CASES)
def test_golden(k):
    """objectives.npz was made with the authors' released loss (gppo_general) and, for cispo and gspo, with reference
    implementations of their papers' equations, in float64; no code of this project was involved. Arrays are [B, T]."""
    names = ("logprobs", "old_logprobs", "advantages", "mask", "grad")
    case = {name: torch.tensor(GOLDEN[f"{k}/{name}"]) for name in names}
    mask = case["mask"].bool()
    columns = {name: case[name][mask] for name in ("old_logprobs", "advantages")}
    batch = replace(rollout_of([(1, n) for n in mask.sum(1).tolist()]), **columns)
    logprobs = case["logprobs"][mask].requires_grad_()
    value, _ = policy_loss((batch, logprobs), **json.loads(str(GOLDEN[f"{k}/meta"])))
    value.backward()
    assert len(CASES) == 51 and abs(value.item() - GOLDEN[f"{k}/loss"]) < 1e-9
    assert (logprobs.grad - case["grad"][mask]).abs().max() < 1e-9 and (case["grad"][~mask] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Each objective, token by token. x has delta (with its gradient), logprob, old, A, H and picked; o is the Objective.


def clipped(x, o) -> float:
    """1 above the interval with A > 0, -1 below it with A < 0, and otherwise 0."""
    return float(x.delta > 1 + o.eps_high and x.A > 0) - float(x.delta < 1 - o.eps_low and x.A < 0)


def clip_equation(x, o):
    return {1: -(1 + o.eps_high) * x.A, -1: -(1 - o.eps_low) * x.A}.get(clipped(x, o), -x.delta * x.A)


def ce_equation(x, o):
    """The paper's cases, with its own delta / sg(delta)."""
    unit = x.delta / x.delta.detach()
    kept = {1: -o.beta2 * (1 + o.eps_high) * unit * x.A, -1: -o.beta1 * (1 - o.eps_low) * unit * x.A}
    return kept.get(clipped(x, o), -x.delta * x.A)


def decaying_equation(x, o):
    return {1: ce_equation(x, o), -1: -o.beta1 * x.delta * x.A}.get(clipped(x, o), -x.delta * x.A)


def dgpo_equation(x, o):
    """Its weights times delta / sg(delta)."""
    d = x.delta.detach()
    kept = {1: ((1 + o.eps_high) * d) ** 0.5, -1: d**2 / (1 - o.eps_low)}
    return -kept.get(clipped(x, o), d) * x.delta / d * x.A


def dppo_equation(x, o):
    """No gradient where pi has moved, the way that A pushes it, by more than the interval."""
    moved = x.logprob.exp().item() - x.old.exp().item()
    outside = moved > o.eps_high if x.A > 0 else moved < -o.eps_low
    return x.logprob * 0 if outside else -min(x.delta.item(), 20.0) * x.A * x.logprob


def sapo_equation(x, o):
    tau = 1.0 if x.A > 0 else 1.05
    return -4 / tau / (1 + (-tau * (x.delta - 1)).exp()) * x.A


EQUATIONS = {
    "ce_gppo": ce_equation,
    "gppo": lambda x, o: ce_equation(x, replace(o, beta1=1.0, beta2=1.0)),
    **dict.fromkeys(("grpo", "ppo", "dapo", "dr_grpo"), clip_equation),
    "decaying": decaying_equation,
    "dgpo": dgpo_equation,
    "dppo": dppo_equation,
    "erc": lambda x, o: clip_equation(x, o) * bool(0.95 <= x.now / x.H <= 1.05),
    "cispo": lambda x, o: -min(max(x.delta.item(), 1 - o.eps_low), 1 + o.eps_high) * x.A * x.logprob,
    "rloo": lambda x, o: -x.A * x.logprob,
    "lp_only": lambda x, o: (ce_equation if x.old < -x.H else clip_equation)(x, o),
    "sapo": sapo_equation,
    "high_entropy": lambda x, o: clip_equation(x, o) * x.picked,
    "clip_cov": lambda x, o: clip_equation(x, o) * (not x.picked),
    "kl_cov": lambda x, o: -x.delta * x.A + (x.logprob - x.old).abs() * x.picked,
}
SETTINGS = (
    {},
    {"beta1": 0.3, "beta2": 0.6, "eps_low": 0.1, "eps_high": 0.28},
    {"beta1": 0.0, "beta2": 0.0, "eps_low": 0.4, "eps_high": 0.3},
)


def tokens_of(case, logprobs):
    batch = case[0]
    columns = (batch.old_logprobs, batch.advantages, batch.entropy, batch.token_mask.tolist(), entropy_now(batch))
    for logprob, old, A, H, picked, now in zip(logprobs, *columns, strict=True):
        yield SimpleNamespace(delta=(logprob - old).exp(), logprob=logprob, old=old, A=A, H=H, picked=picked, now=now)


def entropy_now(batch):
    """From 10 % below the old one to 10 % above it."""
    return batch.entropy * torch.linspace(0.9, 1.1, len(batch.entropy), dtype=torch.float64)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("objective", EQUATIONS)
def test_an_objective_is_its_equation(objective, settings):
    """Value and gradient of the mean over tokens; LP and other tokens, picked or not, on all sides of the interval."""
    case, o = random_case(1, B=80), L.Objective(objective, **settings)
    logprobs = case[1].clone().requires_grad_()
    tokens = list(tokens_of(case, logprobs))
    assert len({(x.picked, bool(x.old < -x.H), clipped(x, o)) for x in tokens}) == 12
    expected = sum(EQUATIONS[objective](x, o) for x in tokens) / len(tokens)
    expected.backward()
    now = entropy_now(case[0])
    value, info = policy_loss(case, objective, now, **settings)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    close(gradient(case, objective, now, **settings), logprobs.grad)
    assert [int(h) - int(low) for h, low in zip(info["clipped_high"], info["clipped_low"], strict=True)] == [
        clipped(x, o) for x in tokens
    ]
    close(info["unclipped_weight"], (case[1] - case[0].old_logprobs).exp() * case[0].advantages)
    close(info["log_ratio"], case[1] - case[0].old_logprobs)
    close(info["ratio"], (case[1] - case[0].old_logprobs).exp())


def test_gspo_is_ppo_clip_of_whole_responses():
    """arXiv 2507.18071, eq. 5: the mean over responses of min(s A, clip(s) A), s the geometric mean of the ratios."""
    case = random_case(2, B=60)
    logprobs = case[1].clone().requires_grad_()
    terms, ratios = [], []
    columns = logprobs - case[0].old_logprobs, case[0].advantages
    for gaps, A in zip(*(column.split(case[0].lengths.tolist()) for column in columns), strict=True):
        s = gaps.mean().exp()
        ratios += [s.item()] * len(gaps)
        terms.append(-torch.minimum(s * A[0], s.clamp(0.9, 1.2) * A[0]))
    torch.stack(terms).mean().backward()
    settings = {"eps_low": 0.1, "eps_high": 0.2, "aggregation": "seq-mean-token-mean"}
    close(gradient(case, "gspo", **settings), logprobs.grad)
    value, info = policy_loss(case, "gspo", **settings)
    assert value.item() == pytest.approx(torch.stack(terms).mean().item())
    assert EQUATIONS.keys() ^ L.OBJECTIVES == {"gspo", "gmpo"}
    assert info["ratio"].tolist() == pytest.approx(ratios) and info["clipped_low"].any() and info["clipped_high"].any()


def test_gmpo_is_the_geometric_mean_of_clipped_ratios():
    """arXiv 2507.20673, eq. 4: the mean over responses of - A (product of clipped ratios)^(1/T)."""
    case = random_case(2, B=60)
    logprobs = case[1].clone().requires_grad_()
    columns, terms = (logprobs - case[0].old_logprobs, case[0].advantages), []
    for gaps, A in zip(*(column.split(case[0].lengths.tolist()) for column in columns), strict=True):
        sides = [gap.clamp(max=0.3) if a > 0 else gap.clamp(min=-0.2) for gap, a in zip(gaps, A, strict=True)]
        terms.append(-torch.stack(sides).mean().exp() * A[0])
    torch.stack(terms).mean().backward()
    settings = {"eps_low": 0.2, "eps_high": 0.3, "aggregation": "seq-mean-token-mean"}
    close(gradient(case, "gmpo", **settings), logprobs.grad)
    assert policy_loss(case, "gmpo", **settings)[0].item() == pytest.approx(torch.stack(terms).mean().item())


def test_every_objective_starts_as_the_policy_gradient():
    """At ratio 1, the first mini-batch of a rollout, all have the gradient of REINFORCE; it differs later."""
    case, later = random_case(11, spread=0.0), random_case(11)
    for objective in L.OBJECTIVES:  # those that pick tokens: so that all are trained on
        mask = torch.full_like(case[0].token_mask, objective == "high_entropy")
        start = replace(case[0], token_mask=mask), case[1]
        close(gradient(start, objective), -case[0].advantages / len(mask))
        assert torch.allclose(gradient(later, objective), -later[0].advantages / len(mask)) == (objective == "rloo")


@pytest.mark.parametrize("spread", [0.5, 5.0, 300.0])
def test_weights_out_of_the_interval_are_bounded_and_not_0(spread):
    """Also where delta underflows and delta / sg(delta) would be 0/0."""
    case = random_case(5, spread=spread)
    _, info = policy_loss(case, beta1=0.6, beta2=0.9, eps_low=0.2, eps_high=0.3)
    low, high, A = info["clipped_low"], info["clipped_high"], case[0].advantages
    assert low.any() and high.any()
    close(info["weight"][low], 0.6 * 0.8 * A[low])
    close(info["weight"][high], 0.9 * 1.3 * A[high])


@pytest.mark.parametrize("objective", L.OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(objective, dtype):
    """Log ratios of +-1000, advantages of 0, a response of one token."""
    batch, _ = random_case(B=3, T=1)
    old = torch.tensor([0.0, -1000.1, -1e-3, -1000.0, 0.0, -5.0, -1.5], dtype=dtype)
    logprobs = torch.tensor([-1000.0, -0.1, -1e-3, 0.0, -1000.0, -5.0, -1.0], dtype=dtype)
    batch = replace(batch, lengths=torch.tensor([3, 3, 1]), old_logprobs=old, entropy=torch.ones_like(old))
    batch = replace(batch, token_mask=old > -9, rollout_logprobs=logprobs, reference_logprobs=old.flip(0))
    for sign in (1.0, -1.0, 0.0):
        advantages = sign * torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, -2.0, 0.5], dtype=dtype)
        case = replace(batch, advantages=advantages), logprobs
        value, info = policy_loss(case, objective, kl_coef=0.1, rollout_correction="tis")
        assert value.isfinite() and info["weight"].isfinite().all() and value.dtype == dtype
        assert info["log_ratio"].abs().max() == L.MAX_LOG_RATIO == 20
        assert sign or not (info["clipped_low"] | info["clipped_high"]).any()
        if sign == 0 and objective != "kl_cov":  # whose distance to the old policy needs no advantage
            assert (gradient(case, objective) == 0).all()


def test_without_tokens_the_loss_is_0():
    case = random_case()
    value, info = policy_loss((case[0][[]], case[1][:0]), positive_nll_coef=1.0)
    assert value.item() == 0 and len(info["weight"]) == 0
    one = random_case(B=1, T=1)  # the least divisor is 1
    close(gradient(one, "rloo", positive_nll_coef=0.5), -one[0].advantages - 0.5)
    close(policy_loss(one, "rloo")[1]["weight"], one[0].advantages)


# ----------------------------------------------------------------------------------------------------------------------
# Aggregation, and what is added to an objective

TERMS = {"kl_coef": 0.2, "entropy_coef": 0.3, "positive_nll_coef": 0.4, "rollout_correction": "seq-tis"}


@pytest.mark.parametrize("aggregation", L.AGGREGATIONS)
def test_aggregations_are_loops(aggregation):
    """And g is -dloss/dlogprob times the tokens, entropy bonus aside, whatever the aggregation."""
    case, o = random_case(13), {"aggregation": aggregation, "eps_low": 1e9, "eps_high": 1e9, "max_response_tokens": 20}
    logprobs, H = case[1].clone().requires_grad_(), case[0].entropy.clone().requires_grad_()
    rows = (-(logprobs - case[0].old_logprobs).exp() * case[0].advantages - 0.3 * H).split(case[0].lengths.tolist())
    expected = {
        "token-mean": torch.cat(rows).mean(),
        "seq-mean-token-mean": torch.stack([row.mean() for row in rows]).mean(),
        "seq-mean-token-sum": torch.stack([row.sum() for row in rows]).mean(),
        "seq-mean-token-sum-norm": torch.stack([row.sum() / 20 for row in rows]).mean(),
    }[aggregation]
    expected.backward()
    bonus = H.detach().clone().requires_grad_()
    value, info = policy_loss(case, entropy=bonus, entropy_coef=0.3, **o)
    value.backward()
    assert value.item() == pytest.approx(expected.item())
    close(bonus.grad, H.grad)
    close(gradient(case, entropy=bonus.detach(), entropy_coef=0.3, **o), logprobs.grad)
    close(info["weight"], -logprobs.grad * len(H))


@pytest.mark.parametrize("objective", L.OBJECTIVES)
@pytest.mark.parametrize("aggregation", L.AGGREGATIONS)
def test_parts_of_a_mini_batch_add_up(objective, aggregation):
    """The whole, or each response by itself with the whole's totals: the same loss, gradient and weights."""
    batch, logprobs = case = random_case(6, B=10)
    settings = TERMS | {"aggregation": aggregation, "max_response_tokens": 7}
    H, totals = torch.rand_like(logprobs), L.totals_of(batch)
    assert totals == (batch.lengths.sum(), 10, batch.lengths[::2].sum())
    whole, info = policy_loss(case, objective, H, **settings)
    cuts = logprobs.split(batch.lengths.tolist()), H.split(batch.lengths.tolist())
    parts = [((batch[[i]], x), objective, h, totals) for i, (x, h) in enumerate(zip(*cuts, strict=True))]
    assert sum(policy_loss(*part, **settings)[0].item() for part in parts) == pytest.approx(whole.item(), abs=1e-12)
    close(torch.cat([gradient(*part, **settings) for part in parts]), gradient(case, objective, H, **settings))
    close(torch.cat([policy_loss(*part, **settings)[1]["weight"] for part in parts]), info["weight"])
    assert L.totals_of(replace(batch, correct=None)) == (totals.tokens, 10, 0)


@pytest.mark.parametrize("aggregation", L.AGGREGATIONS)
def test_positive_nll_is_the_mean_over_correct_tokens_in_every_aggregation(aggregation):
    case = random_case(15)
    correct = case[0].correct[case[0].sequence].double()
    added = gradient(case, aggregation=aggregation, positive_nll_coef=0.1) - gradient(case, aggregation=aggregation)
    close(added, -0.1 * correct / correct.sum())
    values = [policy_loss(case, aggregation=aggregation, positive_nll_coef=c)[0].item() for c in (0.1, 0.0)]
    assert values[0] - values[1] == pytest.approx(-0.1 * (correct * case[1]).sum().item() / correct.sum().item())


def test_kl_to_the_reference_is_k3():
    """Value and gradient by autograd over the estimator's formula. It ends at a difference of 20 nats."""
    case = random_case(17)
    logprobs = case[1].clone().requires_grad_()
    k3 = (case[0].reference_logprobs - logprobs).exp() - (case[0].reference_logprobs - logprobs) - 1
    (0.3 * k3.mean()).backward()
    close(gradient(case, kl_coef=0.3) - gradient(case), logprobs.grad)
    value, info = policy_loss(case, kl_coef=0.3)
    assert value.item() - policy_loss(case)[0].item() == pytest.approx(0.3 * k3.mean().item())
    close(info["kl_reference"], k3.detach())
    assert "kl_reference" not in policy_loss(case)[1]
    far = replace(case[0], reference_logprobs=case[1] + 30), case[1]
    close(policy_loss(far, kl_coef=0.3)[1]["kl_reference"], torch.full_like(case[1], math.exp(20) - 21))
    close(gradient(far, kl_coef=0.3), gradient(case))


def test_dual_clip_ends_the_gradient_of_negative_tokens_only():
    case = random_case(7, B=30, spread=2.0)
    ratio, A = (case[1] - case[0].old_logprobs).exp(), case[0].advantages
    plain, dual = gradient(case), gradient(case, dual_clip=3.0)
    beyond = (A < 0) & (ratio > 3.0)
    assert beyond.any() and (dual[beyond] == 0).all() and (plain[beyond] != 0).all()
    assert torch.allclose(dual[~beyond], plain[~beyond], atol=1e-12)
    saved = ((ratio - 3.0) * -A)[beyond].sum() / len(A)
    assert (policy_loss(case)[0] - policy_loss(case, dual_clip=3.0)[0]).item() == pytest.approx(saved.item())


def factor_of(kind: str, ratios: list[float], t: int, c: float) -> float:
    """The table of corrections in loss.py, for token t of a response."""
    product = math.prod(ratios)
    mean = product ** (1 / len(ratios))
    return {
        "tis": min(ratios[t], c),
        "mask": float(1 / c <= ratios[t] <= c),
        "seq-tis": min(product, c),
        "seq-mask": float(1 / c <= product <= c),
        "geo-mask": float(1 / c <= mean <= c),
    }[kind]


@pytest.mark.parametrize("cap", [None, 1.2])
@pytest.mark.parametrize("kind", L.CAPS)
def test_rollout_corrections_scale_the_gradient_and_leave_the_ratio_alone(kind, cap, monkeypatch):
    """vLLM's logprobs differ by much in some responses and by little in others, in both directions."""
    assert L.CAPS == {"tis": 2, "mask": 2, "seq-tis": 2, "seq-mask": 2, "geo-mask": 1.001}
    assert L.CORRECTIONS == ("none", "bypass", "tis", "mask", "seq-tis", "seq-mask", "geo-mask")
    batch, logprobs = random_case(14, B=60)
    size = torch.tensor([2.0, 0.2, 0.002], dtype=torch.float64).repeat(20)[batch.sequence]
    gap = size * torch.randn(len(size), generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    case = replace(batch, rollout_logprobs=batch.old_logprobs - gap), logprobs
    c, factors = cap or L.CAPS[kind], []
    for row in gap.exp().split(batch.lengths.tolist()):
        factors += [factor_of(kind, row.tolist(), t, c) for t in range(len(row))]
    factors = torch.tensor(factors, dtype=torch.float64)
    capped = factors == (c if kind.endswith("tis") else 0.0)
    assert 0.1 < capped.double().mean() < 0.9
    close(L.correction_weights(case[0], kind, cap), factors)
    monkeypatch.setitem(L.CAPS, kind, c)
    close(gradient(case, rollout_correction=kind), factors * gradient(case))
    plain, corrected = policy_loss(case)[1], policy_loss(case, rollout_correction=kind)[1]
    assert all(torch.equal(plain[name], corrected[name]) for name in ("ratio", "clipped_low"))
    close(corrected["weight"], factors * plain["weight"])


@pytest.mark.parametrize("kind", L.CAPS)
def test_huge_differences_to_vllm_give_finite_factors(kind):
    batch = rollout_of([(1, 400)] * 2)
    old = torch.full((800,), -1.0)
    batch = replace(batch, old_logprobs=old, rollout_logprobs=old + torch.tensor([500.0, -500.0])[batch.sequence])
    factors = L.correction_weights(batch, kind)
    assert (factors[:400] == 0).all() and (factors[400:] == (2.0 if kind.endswith("tis") else 0.0)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Token filters, and the table of objectives


def test_tokens_are_picked_over_the_whole_mini_batch():
    g = torch.Generator().manual_seed(19)
    N = 20_003
    logprobs, entropy = -3 * torch.rand(N, generator=g), torch.rand(N, generator=g)
    advantages = torch.randn(N, generator=g)
    A, lp = advantages.double().numpy(), logprobs.double().numpy()
    cov = (lp - lp.mean()) * (A - A.mean())
    picked = {name: picks(logprobs, entropy, advantages).numpy() for name, picks in FILTERS.items()}
    assert all(mask.dtype == bool and mask.shape == (N,) for mask in picked.values())
    assert set(picked["high_entropy"].nonzero()[0]) == set(np.argsort(-entropy.numpy())[:4001])  # ceil(N / 5)
    assert set(picked["kl_cov"].nonzero()[0]) == set(np.argsort(-cov)[:40])
    inside = set(((cov > 1) & (cov < 5)).nonzero()[0])
    assert len(inside) > 1000 and picked["clip_cov"].sum() == 4 and set(picked["clip_cov"].nonzero()[0]) < inside
    few = [values[:3] for values in (logprobs, entropy, torch.zeros(N))]
    counts = {name: int(picks(*few).sum()) for name, picks in FILTERS.items()}
    assert counts == {"high_entropy": 1, "clip_cov": 0, "kl_cov": 1}, "no covariance is within clip_cov's bounds"


@pytest.mark.parametrize("scale, count", [(1.0, 0), (1.01, 200), (4.99, 200), (5.0, 0)])
def test_clip_cov_picks_within_its_bounds_at_random_and_the_same_each_time(scale, count):
    """Every one of a million tokens has the covariance `scale`; a few are picked, in a small mini-batch one."""
    signs = torch.tensor([1.0, -1.0]).repeat(500_000)
    picked = FILTERS["clip_cov"](scale * signs, torch.zeros(10**6), signs)
    assert picked.sum() == count and torch.equal(picked, FILTERS["clip_cov"](scale * signs, None, signs))
    assert FILTERS["clip_cov"](scale * signs[:100], None, signs[:100]).sum() == (count > 0)
    assert count == 0 or 50 < (picked.nonzero() < 500_000).sum() < 150, "spread over the mini-batch"


def test_of_equal_values_no_more_are_picked_than_wanted():
    """Most tokens of a trained policy have entropy 0."""
    entropy, same = torch.zeros(1000), torch.full((1000,), -0.5)
    entropy[:20] = 1.0
    picked = FILTERS["high_entropy"](same, entropy, same)
    assert picked.sum() == 200 and picked[:20].all()
    assert FILTERS["kl_cov"](same, entropy, same).sum() == 2


OFF, REFILL = {"dynamic_sampling": "off"}, {"dynamic_sampling": "refill"}
PUBLISHED = {
    "ce_gppo": {"beta1": 0.75, "beta2": 1.0},
    "gppo": {"beta1": 1.0, "beta2": 1.0, "eps_high": 0.28},
    "ppo": {"advantages": "gae"},
    "dapo": REFILL | {"eps_high": 0.28, "overlong": "20"},
    "cispo": {"eps_low": 1.0},
    "gspo": OFF | {"eps_low": 3e-4, "eps_high": 4e-4, "aggregation": "seq-mean-token-mean"},
    "dr_grpo": OFF | {"aggregation": "seq-mean-token-sum-norm", "advantages": "group-mean"},
    "rloo": OFF | {"aggregation": "seq-mean-token-sum", "advantages": "leave-one-out"},
    "sapo": OFF | {"aggregation": "seq-mean-token-mean"},
    "decaying": {"beta1": 1.0, "beta2": 1.0},
    "dppo": {"eps_low": 0.15, "eps_high": 0.15},
    "erc": REFILL | {"eps_high": 0.28, "overlong": "20"},
    "gmpo": OFF | {"eps_low": 0.4, "eps_high": 0.4, "aggregation": "seq-mean-token-mean"},
    "lp_only": {"beta1": 0.75, "beta2": 1.0},
    "high_entropy": REFILL | {"eps_high": 0.28, "overlong": "20"},
    "clip_cov": REFILL | {"eps_low": 1.0, "eps_high": 1.0},
    "kl_cov": REFILL,
}


@pytest.mark.parametrize("name, spec", L.OBJECTIVES.items(), ids=L.OBJECTIVES)
def test_the_settings_of_an_objective(name, spec):
    """The published ones; and its gradient depends on all that it does not ignore. (Any could have a dual clip.)"""
    usual = {"eps_low": 0.2, "eps_high": 0.2, "beta1": None, "beta2": None, "aggregation": "token-mean"}
    usual |= {"advantages": "group", "dynamic_sampling": "filter", "overlong": "score"}
    assert spec.values(SimpleNamespace(max_response_tokens=103)) == usual | PUBLISHED.get(name, {})
    assert spec.values(SimpleNamespace(max_response_tokens=3))["overlong"] == (
        "1" if name in ("dapo", "high_entropy", "erc") else "score"
    )
    assert spec.has_betas == (name in ("ce_gppo", "decaying", "lp_only")) and spec.by_response == (name == "gspo")
    case, ignored = random_case(25, B=200), {*spec.ignores, *(() if spec.has_betas else L.BETAS)}
    assert ("dual_clip" in ignored) == (name in ("cispo", "rloo", "sapo")) and ignored <= {*L.BETAS, *L.CLIPS}
    for setting, value in {"eps_low": 0.1, "eps_high": 0.1, "beta1": 0.3, "beta2": 0.3, "dual_clip": 1.5}.items():
        if setting == "dual_clip" and setting in ignored:
            continue
        same = torch.equal(gradient(case, name), gradient(case, name, **{setting: value}))
        assert same == (setting in ignored), f"{name} {'ignores' if same else 'reads'} {setting}"


# ----------------------------------------------------------------------------------------------------------------------
# Entropy accounting


def test_quadrants_by_hand():
    """LP is log p < -H: a token at the average is HP. Advantage 0 is in none."""
    old, H = torch.tensor([-1.0, -1.0, -1.0]).repeat(3), torch.tensor([0.9, 1.0, 1.1]).repeat(3)
    found = E.quadrants(old, H, torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(3))
    members = {name: mask.nonzero()[:, 0].tolist() for name, mask in found.items()}
    assert members == {"pa_hp": [1, 2], "pa_lp": [0], "na_hp": [4, 5], "na_lp": [3]} and tuple(members) == E.QUADRANTS


def entropy_of(z: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(z, -1)
    return -(log_p.exp() * log_p).sum(-1)


def test_velocity_is_the_change_of_entropy_along_the_update():
    """The product of the two gradients in logit space, by autograd, and by a finite step."""
    generator = torch.Generator().manual_seed(0)
    z = (2 * torch.randn(40, 13, generator=generator, dtype=torch.float64)).requires_grad_()
    a, g = torch.randint(13, (40,), generator=generator), torch.linspace(-2, 2, 40, dtype=torch.float64)
    log_p, H = torch.log_softmax(z, -1), entropy_of(z)
    logprobs, moment = log_p.gather(1, a[:, None])[:, 0], (log_p.exp() ** 2 * (log_p + H[:, None])).sum(-1)
    gradients = [torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (H, logprobs)]
    velocity = E.entropy_velocity(g, logprobs, H, moment).detach()
    close(velocity, g * (gradients[0] * gradients[1]).sum(-1))
    step = 1e-6 * g[:, None] * gradients[1]
    measured = (entropy_of(z + step) - entropy_of(z - step)) / 2e-6
    torch.testing.assert_close(velocity, measured.detach(), atol=1e-8, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Steering


def test_the_controller_by_its_law():
    config = resolved(entropy_target=0.5)
    assert E.first_control(config) == (0.5, 0.0)
    lever, error = E.next_control(config, (0.5, 0.1), 0.55)
    assert error == pytest.approx(math.log(1.1)) and lever == pytest.approx(0.5 - 4 * (error - 0.1) - 0.4 * error)
    assert E.next_control(config, (0.5, 0.0), 5.0)[0] == 0.0 and E.next_control(config, (0.5, 0.0), 0.05)[0] == 1.0
    assert E.next_control(config, (0.5, 0.0), 0.0)[1] == pytest.approx(math.log(1e-6 / 0.5)), "entropy 0 is no error"
    assert [E.betas_of_step(config, 3, (u, 0.0)) for u in (0.0, 1.0)] == [(0.75, 0.0), (0.0, 1.0)]
    assert E.betas_of_step(config, 3, (0.25, 0.0)) == pytest.approx((0.75 * 0.75, 0.25))


@pytest.mark.parametrize("target", [0.5, 0.8, 1.2])
def test_the_controller_holds_what_can_be_reached(target):
    """A process whose entropy drifts by an amount that depends on u, with noise, settles at the target. If the target
    is out of reach, u stays at its end without winding up, and comes back at once."""
    g, config = torch.Generator().manual_seed(0), resolved(entropy_target=target)
    entropy, control, history = 2.0, E.first_control(config), []
    for _ in range(300):
        entropy *= math.exp(-0.03 + 0.05 * control[0])
        control = E.next_control(config, control, entropy * math.exp(0.03 * torch.randn((), generator=g).item()))
        history.append(entropy)
    settled = history[100:]
    assert abs(sum(settled) / len(settled) / target - 1) < 0.05 and max(abs(h / target - 1) for h in settled) < 0.15
    for _ in range(100):
        control = E.next_control(config, control, 0.1 * target)
    assert control[0] == 1.0 and E.next_control(config, control, 1.1 * target)[0] < 0.5


def test_without_betas_the_target_moves_the_bonus():
    """c rises by 0.005 while entropy is at or below the target, and falls otherwise; then it is not applied."""
    config = resolved(objective="grpo", entropy_target=0.2, entropy_coef=0.005)
    control, used = E.first_control(config), []
    assert control == (0.005, 0.0) and E.bonus_of_step(config, control) == 0.005
    for entropy in (0.5, 0.5, 0.19, 0.1, 0.2, 0.3, 0.1):
        control = E.next_control(config, control, entropy)
        used.append(E.bonus_of_step(config, control))
    assert used == pytest.approx([0, 0, 0.005, 0.01, 0.015, 0, 0.015])
    for _ in range(300):
        control = E.next_control(config, control, 0.1)
    assert E.bonus_of_step(config, control) == 1.0 and E.betas_of_step(config, 3, control) == (None, None)
    assert E.betas_of_step(resolved(objective="gppo", entropy_target=0.2), 3, (0.3, 0.0)) == (1.0, 1.0)
    assert E.bonus_of_step(resolved(objective="grpo", entropy_coef=0.01), (0.5, 1.0)) == 0.01, "without a target"
    assert E.bonus_of_step(resolved(objective="lp_only", entropy_target=0.2, entropy_coef=0.01), (0.1, 1.0)) == 0.01


def test_betas_on_a_schedule():
    """Linear between the points; step 1 has the settings' betas; the last point stays."""
    config = resolved(beta1=0.75, beta2=1.0, beta_schedule="5:0.25,0.6 6:.5,1 8:0,0")
    betas = [E.betas_of_step(config, step, (0.5, 0.0)) for step in (1, 2, 3, 5, 6, 7, 8, 100)]
    expected = [(0.75, 1), (0.625, 0.9), (0.5, 0.8), (0.25, 0.6), (0.5, 1), (0.25, 0.5), (0, 0), (0, 0)]
    assert [x for pair in betas for x in pair] == pytest.approx([x for pair in expected for x in pair])
    assert E.betas_of_step(resolved(beta1=0.3, beta2=0.6), 9, (0.5, 0.0)) == (0.3, 0.6)
    assert E.read_schedule(" 2:1,1  999999999:0,0.5 ") == [(2, 1, 1), (999999999, 0, 0.5)]


@pytest.mark.parametrize(
    "text, message",
    [
        *((text, "step:beta1,beta2 is needed") for text in ("5", "5:1", "5:1,1,1", "-5:1,1", "5:-1,1", "5:1.,1")),
        *((text, "at least 0 and at most 1") for text in ("5:1.1,1", "5:1,1.01")),
        *((text, "must be above 1 and the step before it") for text in ("1:1,1", "5:1,1 5:0,0", "5:1,1 4:0,0")),
    ],
)
def test_a_schedule_that_is_none_is_refused(text, message):
    with pytest.raises(UserError, match=f"beta_schedule: .*{message}"):
        E.read_schedule(text)
