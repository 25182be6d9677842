"""The critic: GAE, value loss and explained variance against naive ones, its place in a step, resuming, two ranks."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from ce_gppo import checkpoint, critic, metrics
from ce_gppo.betas import lr_of_step
from ce_gppo.critic import gae, value_losses
from ce_gppo.entropy import QUADRANTS
from ce_gppo.forward import Policy
from ce_gppo.messages import UserError
from ce_gppo.model import load_model
from ce_gppo.perf import Meter
from helpers import SMALL, by_ranks, group_of, metrics_of, resolved, responses_of, run, without_timings
from tools import branch

# ----------------------------------------------------------------------------------------------------------------------
# Functions on tensors


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
def test_gae_is_the_naive_sum(gamma, lam):
    """arXiv 1506.02438, eq. 16, with every term of both sums; shorter responses are padded and stay 0 there."""
    g = torch.Generator().manual_seed(0)
    lengths = [9, 1, 5]
    rewards, values = (torch.randn(3, 9, generator=g, dtype=torch.float64) for _ in range(2))
    for i, T in enumerate(lengths):
        rewards[i, T:] = values[i, T:] = 0
    found = gae(rewards, values, gamma, lam)
    for i, T in enumerate(lengths):
        V = [*values[i, :T].tolist(), 0.0]
        for t in range(9):
            expected = sum(
                (gamma * lam) ** (s - t) * (rewards[i, s].item() + gamma * V[s + 1] - V[s]) for s in range(t, T)
            )
            assert found[i, t].item() == pytest.approx(expected, abs=1e-12)


def test_with_values_of_0_advantages_are_the_reward_to_go():
    rewards = torch.tensor([[0.1, -0.2, 0.3, 1.0]]).double()
    assert gae(rewards, torch.zeros_like(rewards), 1.0, 1.0)[0].tolist() == pytest.approx([1.2, 1.1, 1.3, 1.0])
    values = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).double()
    returns = gae(rewards, values, 1.0, 1.0) + values
    assert returns[0].tolist() == pytest.approx([1.2, 1.1, 1.3, 1.0]), "returns do not depend on the values"


def test_value_loss_and_gradient_case_by_case():
    """Within and beyond the clip, on both sides, towards the return and away from it; the gradient in float64."""
    c = critic.VALUE_CLIP
    moved = torch.tensor([0.0, 0.4 * c, -0.4 * c, 2 * c, -2 * c, 2 * c, -2 * c, 4 * c]).double()
    returns = torch.tensor([1.0, 1.0, 1.0, 9.0, -9.0, -9.0, 9.0, 1.2 * c]).double()
    old = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.1, 0.0, 0.1, 0.0]).double()
    values = (old + moved).requires_grad_()
    losses, clipped = value_losses(values, old, returns)
    losses.sum().backward()
    for V, V_old, R, loss, gradient, is_clipped in zip(
        values.tolist(), old.tolist(), returns.tolist(), losses.tolist(), values.grad.tolist(), clipped, strict=True
    ):
        V_clip = min(max(V, V_old - c), V_old + c)
        assert loss == pytest.approx(0.5 * max((V - R) ** 2, (V_clip - R) ** 2))
        h = 1e-6  # a difference, of the definition
        beside = [0.5 * max((x - R) ** 2, (min(max(x, V_old - c), V_old + c) - R) ** 2) for x in (V - h, V + h)]
        assert gradient == pytest.approx((beside[1] - beside[0]) / (2 * h), abs=1e-6)
        assert is_clipped == (gradient == 0)
    assert clipped.tolist() == [False, False, False, True, True, False, False, False]


def test_explained_variance_is_numpys():
    g = torch.Generator().manual_seed(0)
    returns = (torch.rand(400, generator=g) < 0.4).float()
    for values in (0.7 * returns + 0.1 * torch.randn(400, generator=g), -returns, torch.full((400,), 0.3)):
        expected = 1 - np.var((returns - values).double().numpy()) / np.var(returns.double().numpy())
        assert critic.explained_variance(values, returns) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(critic.explained_variance(values, torch.ones(400)))


def test_whitening_is_numpys():
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.3 + 2
    expected = (x.double().numpy() - np.mean(x.double().numpy())) / np.std(x.double().numpy())
    np.testing.assert_allclose(critic.whitened(x).numpy(), expected, atol=1e-5)
    assert critic.whitened(torch.full((5,), 0.1)).abs().max() < 1e-3 and len(critic.whitened(torch.zeros(0))) == 0


# ----------------------------------------------------------------------------------------------------------------------
# In a step


def critic_of(model, **settings):
    """(a critic with the body of `model`, and values that are not 0; the configuration)."""
    config = resolved(objective="ppo", **settings)
    made = critic.Critic(model, config)
    torch.nn.init.normal_(made.model.head, std=0.02, generator=torch.Generator().manual_seed(0))
    return made, config


def rewarded(seed: int = 0) -> list[list]:
    """Two mini-batches of two groups, of which the first response was cut."""
    groups = [group_of(5, [4, 7, 3], seed + p) for p in range(4)]
    for i, r in enumerate(r for group in groups for r in group):
        r.reward, r.truncated, r.advantages = float(i % 3 == 0), i == 0, None
        r.ref_logprobs = r.rollout_logprobs - 0.1 * (i % 2)
    return [groups[0] + groups[1], groups[2] + groups[3]]


def naive_values(made, response) -> torch.Tensor:
    """By transformers' own attention, one response at a time; the value of a token is at the one before it. [R]"""
    made.model.body.set_attn_implementation("sdpa")
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    hidden = made.model.body(ids).last_hidden_state[0]
    made.model.body.set_attn_implementation("packed")
    return (hidden @ made.model.head[0])[len(response.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_advantages_and_returns_of_a_rollout(tiny_model, kl_coef):
    """Against values that are computed one by one. A cut response ends, too. kl_coef subtracts k1 at every token."""
    made, config = critic_of(tiny_model, kl_coef=kl_coef, critic_lr=1e-9)
    mini_batches = rewarded()
    with torch.no_grad():
        values = [naive_values(made, r) for batch in mini_batches for r in batch]
    found = critic.learn_values(made, mini_batches, config, Meter(tiny_model, "cpu"))
    raw, returns = [], []
    for r, V in zip(mini_batches[0] + mini_batches[1], values, strict=True):
        torch.testing.assert_close(r.values, V, atol=1e-5, rtol=1e-4)
        paid = kl_coef * (r.rollout_logprobs - r.ref_logprobs)
        expected = [r.reward - paid[t:].sum().item() for t in range(len(V))]
        assert r.returns.tolist() == pytest.approx(expected, abs=1e-5)
        returns.append(r.returns)
        raw.append(r.returns - V)
    A = torch.cat(raw).double()
    advantages = torch.cat([r.advantages for batch in mini_batches for r in batch])
    torch.testing.assert_close(advantages.double(), (A - A.mean()) / A.std(correction=0), atol=1e-4, rtol=1e-4)
    assert found["value/mean"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-5)
    expected = critic.explained_variance(torch.cat(values), torch.cat(returns))
    assert found["value/explained_variance"] == pytest.approx(expected, abs=1e-4)
    assert ("kl/reference" in found) == (kl_coef > 0)
    for name in found:
        assert sum(bool(metric.pattern().fullmatch(name)) for metric in metrics.ALL) == 1, name
    loss = sum(((torch.cat([r.values - r.returns for r in b])) ** 2).mean().item() / 2 for b in mini_batches) / 2
    assert found["value/loss"] == pytest.approx(loss, rel=1e-4), "the mean over a mini-batch's tokens"
    assert train.objective_of_step(config, 1, (0.0, 0.0)).kl_coef == 0, "not in the loss as well"


def test_the_gradient_is_that_of_the_whole_mini_batch(tiny_model):
    """Over several micro-batches, against autograd over values computed one by one."""
    made, config = critic_of(tiny_model, max_micro_batch_tokens=24)
    (responses, _) = rewarded()
    for r in responses:
        r.values = torch.full((len(r.response_ids),), 0.1)
        r.returns = torch.full((len(r.response_ids),), r.reward)
    losses = [value_losses(naive_values(made, r), r.values, r.returns)[0] for r in responses]
    expected = torch.autograd.grad(torch.cat(losses).mean(), list(made.model.parameters()))
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.0)
    found = critic.update(made, responses, config, "cpu")
    norm = torch.cat([g.flatten() for g in expected]).norm()
    assert found[0] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5) and found[2] == pytest.approx(
        norm.item(), rel=1e-4
    )
    scale = min(1.0, critic.MAX_GRAD_NORM / norm.item())
    for parameter, gradient in zip(made.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, scale * gradient, atol=1e-6, rtol=1e-3)


def test_a_critic_learns_to_predict_the_return(tiny_model):
    """The return is 1 after token 7 and 0 otherwise. Values start at 0; the critic has its own body."""
    weights = tiny_model.get_input_embeddings().weight
    made, config = critic.Critic(tiny_model, resolved(objective="ppo", critic_lr=3e-3)), resolved(objective="ppo")
    assert made.model.body.get_input_embeddings().weight is weights
    responses = responses_of([(3, 6)] * 32, seed=1)
    for i, r in enumerate(responses):
        r.response_ids[0], r.reward = (7, 1.0) if i % 2 else (9, 0.0)
    meter = Meter(tiny_model, "cpu")
    first, *_, last = (critic.learn_values(made, [responses], config, meter) for _ in range(25))
    assert first["value/mean"] == 0 and first["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert last["value/explained_variance"] > 0.5 and last["value/mean"] == pytest.approx(0.5, abs=0.15)
    assert responses[0].advantages[0] > responses[0].advantages[1] + 0.3, "the first token decides the return"


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_model):
    made, config = critic_of(tiny_model)
    responses = rewarded()[0]
    responses[2].reward = math.inf
    before = [p.detach().clone() for p in made.model.parameters()]
    found = critic.learn_values(made, [responses], config, Meter(tiny_model, "cpu"))
    assert found["value/skipped"] == 1 and not made.optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), before, strict=True))


def test_the_policy_waits_for_the_critic(tiny_model, tmp_path):
    """For warmup_steps rollouts the learning rate is 0, and no update is made; then it grows."""
    config = resolved(objective="ppo", lr=1.0, critic_lr=1.0, warmup_steps=2, mini_batch_prompts=2, max_kept_prompts=2)
    assert [lr_of_step(config, step) for step in range(1, 6)] == [0, 0, 0.5, 1, 1]
    assert [lr_of_step(resolved(lr=1.0, warmup_steps=2), step) for step in (1, 2, 3)] == [0.5, 1, 1]
    assert lr_of_step(resolved(objective="ppo", lr=1.0, critic_lr=1.0, warmup_steps=0), 1) == 1
    mini_batches = rewarded()[:1]
    groups = [mini_batches[0][:3], mini_batches[0][3:]]
    before = [p.detach().clone() for p in tiny_model.parameters()]
    objective = train.objective_of_step(config, 1, (0.0, 0.0))
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    parts = objective, 0.0, checkpoint.State("id"), config, tmp_path, Meter(tiny_model, "cpu")
    for r in mini_batches[0]:
        r.old_logprobs = r.entropy = None
    assert train.learn(Policy(tiny_model), optimizer, groups, mini_batches, *parts) == [] and not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(tiny_model.parameters(), before, strict=True))
    assert all(r.entropy is not None for r in mini_batches[0]), "entropy/mean is that of all tokens"


def test_the_critic_learns_from_every_response():
    """Also those of groups with equal rewards. Advantages are the critic's: select gives none."""
    groups = [group_of(3, [4, 5], seed=p) for p in range(4)]
    for group in groups:
        for r in group:
            r.advantages, r.reward = None, 1.0
    config = resolved(objective="ppo", max_kept_prompts=4, mini_batch_prompts=2, prompts_per_step=4)
    _, mini_batches = train.select(groups, config)
    assert [len(batch) for batch in mini_batches] == [4, 4]
    assert all(r.advantages is None for batch in mini_batches for r in batch)
    assert critic.learn_values(None, mini_batches, resolved(), None) == {}, "and without a critic nothing happens"
    assert critic.load_critic(resolved(), "no/such/model", "cpu") is None


@pytest.mark.parametrize("settings", [{"objective": "ppo"}, {"advantages": "gae"}], ids=str)
def test_one_response_to_each_prompt_is_enough_for_a_critic(tiny_model, settings):
    """A group of one has no signal, and none is needed: all are trained on, with an advantage for each token."""
    config = resolved(responses_per_prompt=1, max_kept_prompts=4, mini_batch_prompts=2, critic_lr=1e-3, **settings)
    groups = [[r] for r in rewarded()[0][:4]]
    groups, mini_batches = train.select(groups, config)
    assert [len(batch) for batch in mini_batches] == [2, 2]
    made, _ = critic_of(tiny_model)
    critic.learn_values(made, mini_batches, config, Meter(tiny_model, "cpu"))
    advantages = [r.advantages for batch in mini_batches for r in batch]
    assert [len(a) for a in advantages] == [len(g[0].response_ids) for g in groups]
    assert torch.cat(advantages).unique().numel() > 1
    with pytest.raises(UserError, match="responses_per_prompt = 1: must be at least 2, as advantages = leave-one-out"):
        resolved(responses_per_prompt=1, advantages="leave-one-out")
    for filter_groups in ("on", "refill"):
        with pytest.raises(UserError, match=f"filter_groups = {filter_groups} drops groups of equal rewards: every"):
            resolved(responses_per_prompt=1, filter_groups=filter_groups, **settings)


def test_branches_have_no_critic(tmp_path):
    with pytest.raises(UserError, match="advantages = gae: branches have no critic"):
        branch.run(resolved(objective="ppo"), None, SimpleNamespace(results=tmp_path / "none.jsonl"))


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs, and several ranks


@pytest.mark.slow
def test_a_run_of_ppo_resumes_exactly(tmp_path):
    """The policy waits for one rollout. A run resumed after step 2 equals the uninterrupted one, critic included."""
    small = [*SMALL, "--steps", "3", "--filter-groups", "off", "--checkpoint-every", "1", "--warmup-steps", "1"]
    output = run(tmp_path, "--run-name", "whole", "--objective", "ppo", *small)
    rows = metrics_of(tmp_path / "whole")
    assert "and a critic with learning rate 0.00015" in output and "critic" in output.partition("time, ")[2]
    assert [row["optim/lr"] for row in rows[1:]] == pytest.approx([0, 5e-5, 5e-5])
    assert [row["optim/updates"] for row in rows[1:]] == [0, 4, 4]
    assert rows[1]["value/mean"] == 0 != rows[2]["value/mean"] and rows[3]["value/loss"] > 0
    named = {name for row in rows for name in row} - {"step"}
    assert all(sum(bool(metric.pattern().fullmatch(name)) for metric in metrics.ALL) == 1 for name in named)
    assert sum(rows[2][f"tokens/{q}"] for q in QUADRANTS) == pytest.approx(1), "each token has an advantage"

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000003")
    run(tmp_path, "--resume", str(tmp_path / "cut"))
    assert without_timings(metrics_of(tmp_path / "cut")) == without_timings(rows)
    ours, expected = (tmp_path / name / "checkpoint-000003" for name in ("cut", "whole"))
    weights = [load_file(folder / "model.safetensors") for folder in (ours, expected)]
    states = [torch.load(folder / "trainer.pt", weights_only=True) for folder in (ours, expected)]
    for one, other in (weights, *([state[part] for state in states] for part in ("critic", "critic_optimizer"))):
        one, other = flat(one), flat(other)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
    return found


# Values, advantages and two updates on fixed mini-batches, shared between the ranks; writes the results.
A_ROLLOUT = """
import sys, torch
from pathlib import Path
from ce_gppo import checkpoint, critic, parallel
from ce_gppo.model import load_model
from ce_gppo.perf import Meter
from helpers import resolved
from test_critic import rewarded
checkpoint.KEEP = 9
folder, shard, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
parallel.init()
config = resolved(objective="ppo", shard=shard, max_micro_batch_tokens=24, critic_lr=1e-3)
model, tokenizer = load_model(str(folder / "tiny"), shard="no")
made = critic.load_critic(config, str(folder / "tiny"), "cpu")
torch.nn.init.constant_(made.model.head, 0.01)
made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3, eps=1e-3)
mini_batches = rewarded()
found = critic.learn_values(made, mini_batches, config, Meter(model, "cpu"))
own = {i: r.advantages for i, r in enumerate(mini_batches[0] + mini_batches[1]) if r.advantages is not None}
advantages = {i: tokens for part in parallel.all_gather(own) for i, tokens in part.items()}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
checkpoint.Saver(folder, model, tokenizer, optimizer, critic=made).finish(checkpoint.State("id", int(name)))
if parallel.is_main():
    torch.save({"metrics": found, "advantages": advantages, "own": len(own)}, folder / f"result-{name}.pt")
"""


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The same rollout by one process, and by other numbers of processes and shards. (folder, {name: results})"""
    folder = tmp_path_factory.mktemp("critic")
    cases = {"000001": (1, "no"), "000002": (2, "no"), "000003": (2, "yes"), "000004": (1, "offload")}
    return folder, by_ranks(folder, A_ROLLOUT, cases, timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["000002", "000003", "000004"])
def test_a_critic_of_two_ranks_is_that_of_one(rollouts, case):
    """Advantages, metrics, and its weights and moments in the checkpoint, which one process loads."""
    folder, found = rollouts
    one, two = found["000001"], found[case]
    assert two["own"] == (one["own"] if case == "000004" else one["own"] // 2)
    assert sorted(two["advantages"]) == sorted(one["advantages"]) == list(range(12))
    for i, advantages in one["advantages"].items():
        torch.testing.assert_close(two["advantages"][i], advantages, atol=1e-5, rtol=1e-4)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)
    assert one["metrics"]["value/grad_norm"] > 0.01
    states = [torch.load(folder / f"checkpoint-{name}" / "trainer.pt", weights_only=True) for name in ("000001", case)]
    expected = flat(states[0]["critic"])
    for name, weights in flat(states[1]["critic"]).items():
        torch.testing.assert_close(weights, expected[name], atol=1e-6, rtol=1e-4, msg=name)

    model, _ = load_model(str(folder / "tiny"))
    made = critic.load_critic(resolved(objective="ppo"), str(folder / "tiny"), "cpu")
    checkpoint.load(folder / f"checkpoint-{case}", model, torch.optim.AdamW(model.parameters()), made)
    moments = flat(states[0]["critic_optimizer"]["state"])
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name], atol=1e-6, rtol=1e-4)
        ours = made.optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(ours, moments[f"{name}/exp_avg"], atol=1e-6, rtol=1e-3)
