"""The advantage of every token: from its response's group, or from a critic (PPO), which is trained here.

The critic's value of a token is the reward that it predicts from the prompt and the tokens before it. It is a model of
its own: the body that the run began with, and a scalar head. While it is trained it takes 16 bytes a parameter.
"""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from ce_gppo import parallel
from ce_gppo.batch import Packed, Rollout, concat, micro_batches, pack
from ce_gppo.model import load_model
from ce_gppo.policy import CPU_PASS, hidden_states, repeated, take

ADVANTAGES = ("group", "group-mean", "leave-one-out", "maxrl", "gae")
LAMBDA = 1.0  # of advantages, as in verl; TRL has 0.95. The critic's targets always have 1 (arXiv 2504.05118, 4.1)
VALUE_CLIP = 0.5  # verl's cliprange_value; TRL has 0.2
MAX_GRAD_NORM = 1.0  # verl's; AdamW's betas and weight decay are torch's, as verl's


def group_advantages(rewards: Tensor, kind: str = "group") -> Tensor:
    """Rewards [P, G] -> advantages [P, G], within each group of G responses to one prompt.

    group           (r - mean) / (std + 1e-6): GRPO; the sample standard deviation (ddof 1), as in the authors' code
    group-mean      r - mean: Dr. GRPO, arXiv 2503.20783
    leave-one-out   r - mean of the other responses: RLOO, arXiv 2402.14740; it is G / (G - 1) (r - mean)
    maxrl           (r - mean) / (mean + 1e-6): MaxRL, arXiv 2602.02710, for rewards of 0 and more
    """
    G = rewards.shape[-1]
    if rewards.ndim != 2 or G < 2:
        raise ValueError(f"rewards must be [prompts, at least 2 responses], not {list(rewards.shape)}")
    centered = rewards - rewards.mean(1, keepdim=True)
    centered[(rewards == rewards[:, :1]).all(1)] = 0  # exactly, whatever the rounding of the mean
    factors = {"group": 1 / (rewards.std(1, keepdim=True) + 1e-6), "group-mean": 1.0, "leave-one-out": G / (G - 1)}
    factors["maxrl"] = 1 / (rewards.mean(1, keepdim=True) + 1e-6)
    return centered * factors[kind]


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """Generalized advantage estimation, arXiv 1506.02438, eq. 16: [N], [N], responses' lengths [B] -> [N].

    A_t = sum over l >= 0 of (gamma lam)^l delta_(t + l), with delta_t = r_t + gamma V_(t + 1) - V_t. A response has no
    value after its last token, also if it was cut. gamma = 1: no discount, as in verl, TRL and OpenRLHF.
    """
    advantages, last = torch.zeros_like(values), lengths.cumsum(0) - 1  # [N], [B]
    value = advantage = values.new_zeros(len(lengths))  # [B], of the token after
    for back in range(max(lengths.tolist(), default=0)):
        t, inside = (last - back).clamp(min=0), lengths > back  # [B]; a response that has ended reads on in vain
        advantage = rewards[t] + gamma * value - values[t] + gamma * lam * advantage
        value = values[t]
        advantages[t[inside]] = advantage[inside]
    return advantages


def whitened(advantages: Tensor) -> Tensor:
    """Of mean 0 and sample variance 1 over all tokens of a rollout, as in TRL, verl and SkyRL: [N] -> [N]."""
    deviation = advantages.double() - advantages.double().mean()
    return (deviation / (deviation.square().sum() / max(1, len(deviation) - 1) + 1e-8).sqrt()).to(advantages.dtype)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped loss of each token's value, and whether the clip removed its gradient: [N] each -> [N], bool [N].

    l = 1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2): no gradient beyond c towards R (ppo2, TRL, verl).
    """
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    loss, loss_near = (values - returns).square() / 2, (near - returns).square() / 2
    clipped = ((values - old_values).abs() > VALUE_CLIP) & (loss_near > loss)
    return torch.maximum(loss, loss_near), clipped


class ValueModel(torch.nn.Module):
    """The unit that DDP and FSDP2 wrap: the body of a causal language model, with a scalar head instead of its own."""

    def __init__(self, model):
        super().__init__()
        self.body = model.base_model
        self.head = torch.nn.Parameter(torch.zeros_like(model.get_output_embeddings().weight[:1]))  # [1, D]

    def forward(self, packed: Packed) -> Tensor:
        """The value of every response token, [N] in float32."""
        hidden = take(hidden_states(self.body, packed), packed.predecessors)  # [N, D]
        return hidden.float() @ self.head.float()[0]  # a sharded head is bfloat16 here; its products are not


class Critic:
    """A value model over all ranks with the body of the model `source`, and its optimizer. Collective."""

    def __init__(self, config, source: str, device: str):
        model, _ = load_model(source, device, config.gradient_checkpointing, config.shard)
        self.model = ValueModel(model)
        self.wrapped = parallel.distribute(self.model, config.shard, model._no_split_modules or [])
        fused = torch.cuda.is_available()  # otherwise a step needs memory for one more copy of the weights
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.critic_lr, fused=fused)
        self.config, self.device = config, device

    @parallel.host_threads()
    def learn(self, batches: list[Rollout]) -> tuple[list[Rollout], dict[str, float]]:
        """(the mini-batches with the tokens' advantages, metrics), after the critic was trained on their returns.

        batches: this rank's shares. Advantages and returns are of the critic before its updates. Collective.

        Critic: value/explained_variance | share | 1 - Var(return - value) / Var(return) before the critic's updates; 1
            is a perfect critic, 0 one that says the same everywhere | rises in the critic's warm-up, stays above 0
        Critic: value/mean | | of these values | near reward/mean
        Critic: value/loss | | half the squared error, clipped; mean over the step's updates | falls
        Critic: value/clipped | share | values that the clip gives no gradient | below 0.1
        Critic: value/grad_norm | | before clipping, mean over the step's updates | steady
        Critic: value/skipped | share | of the critic's updates, skipped as their gradient was not finite | 0
        """
        if not batches:
            return [], {}
        whole = with_advantages(self.estimate(concat(batches)), self.config.kl_coef)
        batches = [whole[rows] for rows in torch.arange(len(whole)).split([len(batch) for batch in batches])]
        metrics = value_metrics(whole, self.config.kl_coef)
        updates = [self.update(batch) for batch in batches * self.config.epochs]
        parallel.zero_gradients(self.wrapped, self.optimizer)  # no memory for gradients while vLLM samples
        return batches, metrics | {name: sum(one[name] for one in updates) / len(updates) for name in updates[0]}

    @torch.no_grad()
    def estimate(self, rollout: Rollout) -> Rollout:
        """With `values` under the present weights. Collective."""
        limit = self.config.max_micro_batch_tokens
        limit = min(limit, CPU_PASS) if self.device == "cpu" else limit
        parts = micro_batches(rollout, limit, repeated(self.model))
        return replace(rollout, values=torch.cat([self.wrapped(pack(part, self.device)).cpu() for part in parts]))

    def update(self, batch: Rollout) -> dict[str, float]:
        """One optimizer step on a mini-batch, of which `batch` is this rank's share, perhaps empty. Collective."""
        parallel.zero_gradients(self.wrapped, self.optimizer)
        tokens = parallel.all_sum(len(batch.tokens))[0]
        parts, sums = micro_batches(batch, self.config.max_micro_batch_tokens, repeated(self.model)), torch.zeros(2)
        for index, part in enumerate(parts, start=1):
            packed, part = pack(part, self.device), part.to(self.device)
            with parallel.no_sync(self.wrapped) if index < len(parts) else contextlib.nullcontext():
                losses, clipped = value_losses(self.wrapped(packed), part.values, part.returns)  # [N] each
                (losses.sum() / tokens * parallel.world_size()).backward()  # DDP and FSDP2 divide by it
            sums += torch.stack([losses.detach().sum(), clipped.sum()]).cpu()
        norm = parallel.clip_gradients(self.wrapped, MAX_GRAD_NORM)
        loss, clipped = (total / tokens for total in parallel.all_sum(*sums.tolist()))
        finite = loss + norm < float("inf")  # and no NaN
        if finite:
            self.optimizer.step()
        return {"value/loss": loss, "value/clipped": clipped, "value/grad_norm": norm, "value/skipped": not finite}


def with_advantages(rollout: Rollout, kl_coef: float) -> Rollout:
    """This rank's responses of a rollout, which have values, with `returns` and whitened `advantages`. Collective.

    The last token has the response's reward. With a kl_coef every token has minus kl_coef log(pi / pi_ref), with the
    engine's pi: the k1 estimate of the divergence, as in arXiv 2203.02155.
    """
    rewards = torch.zeros(len(rollout.tokens))  # [N]
    rewards[rollout.lengths.cumsum(0) - 1] = rollout.rewards.float()
    if kl_coef:
        rewards -= kl_coef * (rollout.rollout_logprobs - rollout.reference_logprobs)
    returns = rollout.values + gae(rewards, rollout.values, rollout.lengths)
    parts = parallel.all_gather(gae(rewards, rollout.values, rollout.lengths, lam=LAMBDA))  # [n] of each rank
    advantages = whitened(torch.cat(parts)).split([len(part) for part in parts])[parallel.rank()]
    return replace(rollout, returns=returns, advantages=advantages)


def value_metrics(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """Of the values before the updates, and the KL divergence from the reference policy (k3). Collective."""
    reference = rollout.reference_logprobs if kl_coef else rollout.rollout_logprobs  # [N]
    own = torch.stack([rollout.values, rollout.returns, reference - rollout.rollout_logprobs])  # [3, n]
    values, returns, gap = torch.cat(parallel.all_gather(own), 1).double()  # [N] each
    metrics = {"value/explained_variance": explained_variance(values, returns), "value/mean": values.mean().item()}
    return metrics | ({"kl/reference": (gap.expm1() - gap).mean().item()} if kl_coef else {})


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R): [N], [N] -> 1 for a perfect critic, 0 for a constant; NaN if all returns are equal."""
    return (1 - (returns - values).var() / returns.var()).item() if returns.var() > 0 else float("nan")
