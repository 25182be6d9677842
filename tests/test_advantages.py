"""Advantages of groups and of a critic, against naive ones; the critic in a step, resumed, and on two ranks."""

import contextlib
import functools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from ce_gppo import advantages, checkpoint, parallel
from ce_gppo.advantages import Critic, explained_variance, gae, group_advantages, value_losses, whitened
from ce_gppo.batch import Rollout, append, concat, local_batch, micro_batches
from ce_gppo.entropy import QUADRANTS
from ce_gppo.model import load_model
from helpers import SMALL, by_ranks, metrics_of, resolved, rollout_of, run, without_timings

KINDS = ("group", "group-mean", "leave-one-out", "maxrl")


def test_group_advantages_are_the_formulas():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 3.0, 1.0]]).double()
    for row, *found in zip(rewards.numpy(), *(group_advantages(rewards, kind) for kind in KINDS), strict=True):
        group, mean, others, maxrl = (each.tolist() for each in found)
        assert group == pytest.approx((row - row.mean()) / (row.std(ddof=1) + 1e-6), rel=1e-12)
        assert mean == pytest.approx(row - row.mean())
        assert maxrl == pytest.approx((row - row.mean()) / (row.mean() + 1e-6))
        assert others == pytest.approx([r - np.delete(row, i).mean() for i, r in enumerate(row)])
    assert torch.equal(group_advantages(rewards), group_advantages(rewards, "group"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_equal_rewards_has_advantages_of_0(kind):
    """Exactly, though the mean of seven times 0.1 is another number; a spread of 1e-6 counts."""
    rewards = torch.full((3, 7), 0.1)
    rewards[1, 2] += 1e-6
    found = group_advantages(rewards, kind)
    assert rewards[0].mean() != rewards[0, 0] and (found[[0, 2]] == 0).all() and 0 < found[1, 2] < 1


@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)])
def test_groups_of_one_and_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="must be .prompts, at least 2 responses., not"):
        group_advantages(torch.zeros(shape))
    assert group_advantages(torch.tensor([[0.0, 1.0]]), "group-mean").tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
def test_gae_is_the_naive_sum(gamma, lam):
    """arXiv 1506.02438, eq. 16, with every term of both sums, for each response alone."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 9, 5])
    rewards, values = (torch.randn(15, generator=g, dtype=torch.float64) for _ in range(2))
    found = gae(rewards, values, lengths, gamma, lam)
    if (gamma, lam) == (1.0, 1.0):
        assert torch.equal(found, gae(rewards, values, lengths)), "the defaults"
    for own, r, V in zip(*(x.split(lengths.tolist()) for x in (found, rewards, values)), strict=True):
        V, T = [*V.tolist(), 0.0], len(r)
        for t in range(T):
            expected = sum((gamma * lam) ** (s - t) * (r[s].item() + gamma * V[s + 1] - V[s]) for s in range(t, T))
            assert own[t].item() == pytest.approx(expected, abs=1e-12)
    assert len(gae(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long))) == 0


def test_value_loss_and_gradient_case_by_case():
    """Within and beyond the clip, on both sides, towards the return and away from it; the gradient in float64."""
    c = advantages.VALUE_CLIP
    assert c == 0.5, "verl's"
    moved = torch.tensor([0.0, 0.4 * c, -0.4 * c, 2 * c, -2 * c, 2 * c, -2 * c, 4 * c]).double()
    R = torch.tensor([1.0, 1.0, 1.0, 9.0, -9.0, -9.0, 9.0, 1.2 * c]).double()
    old = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.1, 0.0, 0.1, 0.0]).double()
    values = (old + moved).requires_grad_()
    losses, clipped = value_losses(values, old, R)
    losses.sum().backward()

    def naive(V):
        return 0.5 * np.maximum((V - R.numpy()) ** 2, (np.clip(V, old.numpy() - c, old.numpy() + c) - R.numpy()) ** 2)

    V, h = values.detach().numpy(), 1e-6
    np.testing.assert_allclose(losses.detach(), naive(V), rtol=1e-12)
    np.testing.assert_allclose(values.grad, (naive(V + h) - naive(V - h)) / (2 * h), atol=1e-6)
    assert clipped.tolist() == (values.grad == 0).tolist() == [False, False, False, True, True, False, False, False]


def test_explained_variance_is_numpys():
    g = torch.Generator().manual_seed(0)
    returns = (torch.rand(400, generator=g) < 0.4).float()
    for values in (0.7 * returns + 0.1 * torch.randn(400, generator=g), -returns, torch.full((400,), 0.3)):
        expected = 1 - np.var((returns - values).double().numpy()) / np.var(returns.double().numpy())
        assert explained_variance(values, returns) == pytest.approx(expected, abs=1e-6)
    assert all(math.isnan(explained_variance(each, torch.ones(400))) for each in (values, returns))


def test_whitening_is_numpys():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 0.3 + 2
    y = x.double().numpy()
    np.testing.assert_allclose(whitened(x).numpy(), (y - y.mean()) / y.std(ddof=1), atol=1e-5)
    assert whitened(x).dtype == x.dtype
    assert whitened(torch.tensor([1e-4, -1e-4]).double())[0].item() == pytest.approx(1e-4 / 3e-8**0.5, rel=1e-6)
    assert whitened(torch.full((5,), 0.1)).abs().max() < 1e-3
    assert len(whitened(torch.zeros(0))) == 0 and whitened(torch.ones(1)).tolist() == [0]


def critic_of(folder, **settings) -> Critic:
    """A critic with the body of the model there, and values that are not 0."""
    made = Critic(resolved(objective="ppo", **settings), str(folder), "cpu")
    assert (made.model.head == 0).all() and made.model.head.shape == (1, 64)
    torch.nn.init.normal_(made.model.head, std=0.02, generator=torch.Generator().manual_seed(0))
    return made


def rewarded() -> list[Rollout]:
    """Two mini-batches of two groups, of which the first response was cut."""
    groups = [rollout_of([(5, 4), (5, 7), (5, 3)], seed, shared=True) for seed in range(4)]
    rollout = functools.reduce(append, groups)
    numbers = torch.arange(len(rollout))
    reference = rollout.rollout_logprobs - 0.1 * (numbers % 2)[rollout.sequence]
    columns = {"rewards": (numbers % 3 == 0).double(), "truncated": numbers == 0, "reference_logprobs": reference}
    rollout = replace(rollout, index=numbers, advantages=None, old_logprobs=None, entropy=None, **columns)
    return [rollout[:6], rollout[6:]]


def naive_values(made: Critic, rollout: Rollout) -> torch.Tensor:
    """By transformers' own attention, one response at a time; the value of a token is at the one before it. [N]"""
    made.model.body.set_attn_implementation("sdpa")
    values = []
    for number, tokens in zip(rollout.prompt_of.tolist(), rollout.tokens.split(rollout.lengths.tolist()), strict=True):
        ids = torch.tensor([rollout.prompts[number] + tokens.tolist()])
        hidden = made.model.body(ids).last_hidden_state[0]
        values.append((hidden @ made.model.head[0])[len(rollout.prompts[number]) - 1 : -1])
    made.model.body.set_attn_implementation("packed")
    return torch.cat(values)


@pytest.mark.parametrize("kl_coef, lam", [(0.0, 1.0), (0.5, 1.0), (0.5, 0.9)])
def test_advantages_and_returns_of_a_rollout(tiny_folder, monkeypatch, kl_coef, lam):
    """Against values that are computed one by one. A cut response ends, too. kl_coef subtracts k1 at every token."""
    monkeypatch.setattr(advantages, "LAMBDA", lam)
    made = critic_of(tiny_folder, kl_coef=kl_coef, critic_lr=1e-9)
    with torch.no_grad():
        values = naive_values(made, concat(rewarded()))
    batches, found = made.learn(rewarded())
    assert [batch.index.tolist() for batch in batches] == [list(range(6)), list(range(6, 12))]
    whole = concat(batches)
    torch.testing.assert_close(whole.values, values, atol=1e-5, rtol=1e-4)
    paid, A, returns = kl_coef * (whole.rollout_logprobs - whole.reference_logprobs), [], []
    for r, p, V in zip(whole.rewards, *(x.split(whole.lengths.tolist()) for x in (paid, values)), strict=True):
        returns += [r.item() - p[t:].sum().item() for t in range(len(p))]
        delta = torch.cat([V[1:], r[None]]) - V - p
        A += [sum(lam**i * d.item() for i, d in enumerate(delta[t:])) for t in range(len(p))]
    assert whole.returns.tolist() == pytest.approx(returns, abs=1e-5)
    assert whole.advantages.tolist() == pytest.approx((np.array(A) - np.mean(A)) / np.std(A, ddof=1), abs=2e-4)
    assert found["value/mean"] == pytest.approx(values.mean().item(), abs=1e-5)
    expected = explained_variance(values, torch.tensor(returns))
    assert found["value/explained_variance"] == pytest.approx(expected, abs=1e-4)
    gap = (whole.reference_logprobs - whole.rollout_logprobs).double()
    k3 = (gap.exp() - 1 - gap).mean().item()
    assert found.get("kl/reference") == (pytest.approx(k3, rel=1e-5) if kl_coef else None)
    losses = [(batch.values - batch.returns).square().mean().item() / 2 for batch in batches]
    assert found["value/loss"] == pytest.approx(np.mean(losses), rel=1e-4), "the mean over a mini-batch's tokens"
    assert found["value/clipped"] == 0 and found["value/skipped"] == 0
    assert train.objective_of_step(made.config, checkpoint.State("id")).kl_coef == 0, "not in the loss as well"
    assert all(p.grad is None for p in made.model.parameters()), "no memory for gradients while vLLM samples"


@pytest.mark.parametrize("max_tokens", [24, 10_000])
def test_the_gradient_is_that_of_the_whole_mini_batch(tiny_folder, monkeypatch, max_tokens):
    """Over several micro-batches or one, against autograd over values computed one by one; some are clipped."""
    synced = []  # DDP sums over ranks in the last backward only
    monkeypatch.setattr(parallel, "no_sync", lambda _: synced.append(0) or contextlib.nullcontext())
    made = critic_of(tiny_folder, max_micro_batch_tokens=max_tokens)
    batch = rewarded()[0]
    returns = batch.rewards.float()[batch.sequence]
    old = torch.where(torch.arange(len(returns)) % 4 == 0, 1.5 - 3 * returns, 0.1)
    batch = replace(batch, values=old, returns=returns)
    losses, clipped = value_losses(naive_values(made, batch), old, returns)
    expected = torch.autograd.grad(losses.mean(), list(made.model.parameters()))
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.0)
    found = made.update(batch)
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm().item()
    assert found["value/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["value/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert found["value/clipped"] == pytest.approx(clipped.float().mean().item()) and 0 < found["value/clipped"] < 1
    assert advantages.MAX_GRAD_NORM == 1 and len(synced) == len(micro_batches(batch, max_tokens)) - 1
    clipped = [min(1.0, 1 / norm) * gradient for gradient in expected]
    torch.testing.assert_close([p.grad for p in made.model.parameters()], clipped, atol=1e-6, rtol=1e-3)


def test_a_critic_learns_to_predict_the_return(tiny_folder):
    """The return is 1 after token 7 and 0 otherwise. Values start at 0; the critic has its own body and optimizer."""
    made = Critic(resolved(objective="ppo", critic_lr=3e-3, epochs=2), str(tiny_folder), "cpu")
    assert isinstance(made.optimizer, torch.optim.AdamW) and not made.optimizer.defaults["fused"]
    assert [made.optimizer.defaults[name] for name in ("lr", "betas", "weight_decay")] == [3e-3, (0.9, 0.999), 0.01]
    rollout = rollout_of([(3, 6)] * 32, seed=1)
    first = torch.arange(32) % 2
    rollout.tokens[::6] = 9 - 2 * first
    rollout = replace(rollout, rewards=first.double())
    ((batch,), start), *_, ((batch,), end) = (made.learn([rollout]) for _ in range(15))
    assert start["value/mean"] == 0 and start["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert end["value/explained_variance"] > 0.5 and end["value/mean"] == pytest.approx(0.5, abs=0.15)
    assert batch.advantages[6] > batch.advantages[0] + 0.3, "the first token decides the return"
    assert made.optimizer.state[made.model.head]["step"] == 30, "two epochs of each rollout"


@pytest.mark.parametrize("reward", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny_folder, reward):
    made = critic_of(tiny_folder)
    good, bad = rewarded()
    bad.rewards[2] = reward
    before = [p.detach().clone() for p in made.model.parameters()]
    assert made.learn([bad])[1]["value/skipped"] == 1 and not made.optimizer.state
    assert all(map(torch.equal, made.model.parameters(), before))
    assert made.learn([]) == ([], {}), "no group is left"


@pytest.mark.parametrize("settings", [{"objective": "ppo"}, {"advantages": "gae"}], ids=str)
def test_the_critic_learns_from_every_response(tiny_folder, settings):
    """Also if no group has a signal, and if each is of one response: every token has an advantage of its own."""
    rollout = replace(rollout_of([(5, 4), (5, 7), (5, 3), (4, 2)]), rewards=torch.ones(4).double(), advantages=None)
    config = resolved(responses_per_prompt=1, max_kept_prompts=4, mini_batch_prompts=2, **settings)
    rollout, mini_batches = train.select(rollout, config)
    assert [rows.tolist() for rows in mini_batches] == [[0, 1], [2, 3]] and rollout.advantages is None
    batches, _ = critic_of(tiny_folder).learn([rollout[rows] for rows in mini_batches])
    assert [batch.advantages.unique().numel() for batch in batches] == [11, 5]


@pytest.mark.slow
def test_a_run_of_ppo_resumes_exactly(tmp_path):
    """The policy waits for one rollout. A run resumed after step 2 equals the uninterrupted one, critic included."""
    small = [*SMALL, "--steps", "3", "--dynamic-sampling", "off", "--checkpoint-every", "1", "--warmup-steps", "1"]
    output = run(tmp_path, "--run-name", "whole", "--objective", "ppo", "--lr", "5e-5", *small)
    rows = metrics_of(tmp_path / "whole")
    assert "and a critic with learning rate 0.00015" in output and "critic" in output.partition("time, ")[2]
    assert [row["optim/lr"] for row in rows[1:]] == pytest.approx([0, 5e-5, 5e-5])
    assert [row["optim/updates"] for row in rows[1:]] == [0, 4, 4]
    assert rows[1]["value/mean"] == 0 != rows[2]["value/mean"] and rows[3]["value/loss"] > 0
    assert sum(rows[2][f"tokens/{q}"] for q in QUADRANTS) == pytest.approx(1), "each token has an advantage"

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000003")
    file = tmp_path / "cut" / "metrics.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if json.loads(line)["step"] < 3))
    run(tmp_path, "--resume", str(tmp_path / "cut"))
    assert without_timings(metrics_of(tmp_path / "cut")) == without_timings(rows)
    folders = [tmp_path / name / "checkpoint-000003" for name in ("cut", "whole")]
    states = [torch.load(folder / "trainer.pt", weights_only=True) for folder in folders]
    compared = [(load_file(f / "model.safetensors"), s["critic"]) for f, s in zip(folders, states, strict=True)]
    torch.testing.assert_close(*compared, atol=0, rtol=0)
    torch.testing.assert_close(*(state["critic_optimizer"]["state"] for state in states), atol=0, rtol=0)


def of_a_rank(folder: str, shard: str, name: str) -> None:
    """Values, advantages and two updates on fixed mini-batches, shared between the ranks; writes the results."""
    parallel.init()
    config = resolved(objective="ppo", shard=shard, max_micro_batch_tokens=24, critic_lr=1e-3)
    model, tokenizer = load_model(f"{folder}/tiny", shard="no")
    made = Critic(config, f"{folder}/tiny", "cpu")
    torch.nn.init.constant_(made.model.head, 0.01)
    made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3, eps=1e-3)
    batches, found = made.learn([local_batch(part) for part in rewarded()])
    own = [(each.index.tolist(), list(each.advantages.split(each.lengths.tolist()))) for each in batches]
    tokens = {i: A for part in parallel.all_gather(own) for each in part for i, A in zip(*each, strict=True)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpoint.KEEP = 9
    checkpoint.Saver(Path(folder), model, tokenizer, optimizer, critic=made).finish(checkpoint.State("id", int(name)))
    result = {"metrics": found, "advantages": tokens, "own": sum(map(len, batches))}
    if parallel.is_main():
        torch.save(result, f"{folder}/result-{name}.pt")


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The same rollout by one process, and by other numbers of processes and shards. (folder, {name: results})"""
    folder = tmp_path_factory.mktemp("critic")
    cases = {"000001": (1, "no"), "000002": (2, "no"), "000003": (2, "yes"), "000004": (1, "offload")}
    code = "import sys, test_advantages\ntest_advantages.of_a_rank(*sys.argv[1:])\n"
    return folder, by_ranks(folder, code, cases, timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["000002", "000003", "000004"])
def test_a_critic_of_two_ranks_is_that_of_one(rollouts, case):
    """Advantages, metrics, and its weights and moments in the checkpoint, which one process loads."""
    folder, found = rollouts
    one, two = found["000001"], found[case]
    assert two["own"] == (one["own"] if case == "000004" else one["own"] // 2)
    assert sorted(one["advantages"]) == list(range(12))
    torch.testing.assert_close(two["advantages"], one["advantages"], atol=1e-5, rtol=1e-4)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)
    assert one["metrics"]["value/grad_norm"] > 0.01
    saved = torch.load(folder / "checkpoint-000001" / "trainer.pt", weights_only=True)
    model, _ = load_model(str(folder / "tiny"))
    made = Critic(resolved(objective="ppo"), str(folder / "tiny"), "cpu")
    checkpoint.load(folder / f"checkpoint-{case}", model, torch.optim.AdamW(model.parameters()), made)
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter.data, saved["critic"][name], atol=1e-6, rtol=1e-4)
        ours, expected = made.optimizer.state[parameter], saved["critic_optimizer"]["state"][name]
        torch.testing.assert_close(ours["exp_avg"], expected["exp_avg"], atol=1e-6, rtol=1e-3)
