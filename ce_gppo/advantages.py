"""The advantage of every token: from its response's group, or from a critic (PPO), which is trained here.

The critic's value of a token is the reward that it predicts for the response, from the prompt and the tokens before it.
It is a second model: the body that the run began with, and a scalar head of zeros. It takes 16 bytes a parameter.
"""

import contextlib
import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_gppo import parallel
from ce_gppo.batch import Packed, Rollout, concat, micro_batches, pack
from ce_gppo.model import load_model
from ce_gppo.policy import CPU_PASS, hidden_states, take

ADVANTAGES = ("group", "group-mean", "leave-one-out", "gae")
GAMMA = 1.0  # no discount, as in verl, TRL and OpenRLHF: a reward at the end is worth as much to every token
# For the advantages. At 1 they are return - value, without the critic's bias, as in verl and OpenRLHF; TRL has 0.95, as
# arXiv 1707.06347. The critic's targets are the returns, always with lambda 1 (arXiv 2504.05118, section 4.1).
LAMBDA = 1.0
VALUE_CLIP = 0.5  # verl's cliprange_value; TRL has 0.2
MAX_GRAD_NORM = 1.0  # verl's
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.01}  # verl's


def group_advantages(rewards: Tensor, kind: str = "group") -> Tensor:
    """Rewards [P, G] -> advantages [P, G], within each group of G responses to one prompt.

    group           (r - mean) / (std + 1e-6): GRPO; the sample standard deviation (ddof 1), as in the authors' code
    group-mean      r - mean: Dr. GRPO, arXiv 2503.20783
    leave-one-out   r - mean of the other responses: RLOO, arXiv 2402.14740; it is G / (G - 1) (r - mean)

    A group of equal rewards has advantages of exactly 0, whatever the rounding of its mean.
    """
    G = rewards.shape[-1]
    if rewards.ndim != 2 or G < 2:
        raise ValueError(f"rewards must be [prompts, at least 2 responses], not {list(rewards.shape)}")
    centered = rewards - rewards.mean(1, keepdim=True)
    centered = centered.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0)
    if kind == "group":
        return centered / (rewards.std(1, keepdim=True) + 1e-6)
    return centered * G / (G - 1) if kind == "leave-one-out" else centered


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = GAMMA, lam: float = LAMBDA) -> Tensor:
    """Generalized advantage estimation, arXiv 1506.02438, eq. 16: [N], [N], responses' lengths [B] -> [N].

    A_t = delta_t + gamma lam A_(t + 1), with delta_t = r_t + gamma V_(t + 1) - V_t. A and V are 0 behind the last token
    of a response, also of one that was cut.
    """
    advantages = []
    for r, V in zip(*(column.split(lengths.tolist()) for column in (rewards, values)), strict=True):
        deltas = (r + gamma * F.pad(V[1:], (0, 1)) - V).tolist()
        sums = itertools.accumulate(reversed(deltas), lambda later, delta: delta + gamma * lam * later)
        advantages += reversed(list(sums))
    return values.new_tensor(advantages)


def whitened(advantages: Tensor) -> Tensor:
    """Advantages of mean 0 and variance 1 over all tokens of a rollout, as in verl and TRL: [N] -> [N]."""
    deviation = advantages.double() - advantages.double().mean()
    variance = deviation.square().sum() / max(1, len(advantages) - 1)
    return (deviation / (variance + 1e-8).sqrt()).to(advantages.dtype)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped loss of each token's value, and whether the clip removed its gradient: [N] each -> [N], bool [N].

    l = 1/2 max((V - R)^2, (V_clip - R)^2) with V_clip = V_old + clip(V - V_old, -c, c), as in ppo2, TRL and verl. A
    value that has moved more than c towards its return gets no more gradient in this rollout.
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
        head = torch.zeros(1, model.get_output_embeddings().in_features, device=model.device)
        self.head = torch.nn.Parameter(head)  # [1, D]

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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.critic_lr, fused=fused, **ADAMW)
        self.config, self.device = config, device

    @parallel.host_threads()
    def learn(self, batches: list[Rollout]) -> tuple[list[Rollout], dict[str, float]]:
        """(the mini-batches with the tokens' advantages, metrics), after the critic was trained on their returns.

        batches: this rank's shares of the policy's mini-batches, which the critic takes in the same order and for the
        same epochs. Advantages and returns are computed before its updates. Collective.

        Critic: value/explained_variance | share | 1 - Var(return - value) / Var(return), before the critic's updates; 1
            is a perfect critic, 0 one that says the same everywhere | rises in its warm-up, then stays above 0
        Critic: value/mean | | of these values | near reward/mean
        Critic: value/loss | | half the squared error, clipped; mean over the step's updates | falls
        Critic: value/clipped | share | values that the clip gives no gradient | below 0.1
        Critic: value/grad_norm | | before clipping, mean over the step's updates | steady
        Critic: value/skipped | | critic's updates skipped, as their gradient was not finite | 0
        """
        if not batches:
            return [], {}
        whole = with_advantages(self.estimate(concat(batches)), self.config.kl_coef)
        ends = torch.tensor([0, *(len(batch) for batch in batches)]).cumsum(0).tolist()
        batches = [whole[a:b] for a, b in itertools.pairwise(ends)]
        metrics = value_metrics(whole, self.config.kl_coef)
        updates = [self.update(batch) for batch in batches * self.config.epochs]
        parallel.zero_gradients(self.wrapped, self.optimizer)  # no memory for gradients while vLLM samples
        loss, clipped, norm, skipped = (sum(column) for column in zip(*updates, strict=True))
        metrics |= {"value/loss": loss / len(updates), "value/clipped": clipped / len(updates)}
        return batches, metrics | {"value/grad_norm": norm / len(updates), "value/skipped": skipped}

    @torch.no_grad()
    def estimate(self, rollout: Rollout) -> Rollout:
        """With `values` under the present weights. Collective."""
        max_tokens = self.config.max_micro_batch_tokens
        parts = micro_batches(rollout, min(max_tokens, CPU_PASS) if self.device == "cpu" else max_tokens)
        values = [self.wrapped(pack(part, self.device)).cpu() for part in parts]  # [n] each
        return replace(rollout, values=torch.cat([torch.zeros(0), *values]))

    def update(self, batch: Rollout) -> tuple[float, float, float, bool]:
        """One optimizer step on a mini-batch, of which `batch` is this rank's share, perhaps empty. Collective.

        Returns, over all tokens and ranks: mean loss, share of clipped values, norm of the gradient, and whether the
        step was skipped because that is not finite.
        """
        parallel.zero_gradients(self.wrapped, self.optimizer)
        tokens = max(1.0, parallel.all_sum(len(batch.tokens))[0])
        loss_sum = clipped_sum = 0.0
        parts = micro_batches(batch, self.config.max_micro_batch_tokens)
        for index, part in enumerate(parts, start=1):
            packed, part = pack(part, self.device), part.to(self.device)
            with parallel.no_sync(self.wrapped) if index < len(parts) else contextlib.nullcontext():
                values = self.wrapped(packed)  # [N]
                losses, clipped = value_losses(values, part.values, part.returns)
                loss = losses.sum() / tokens
                (loss * parallel.world_size()).backward()  # DDP and FSDP2 divide by it
            loss_sum, clipped_sum = loss_sum + loss.item(), clipped_sum + clipped.sum().item() / tokens
        grad_norm = parallel.clip_gradients(self.wrapped, MAX_GRAD_NORM)
        loss_sum, clipped_sum = parallel.all_sum(loss_sum, clipped_sum)
        skipped = not torch.tensor(grad_norm + loss_sum).isfinite().item()
        if not skipped:
            self.optimizer.step()
        return loss_sum, clipped_sum, grad_norm, skipped


def with_advantages(rollout: Rollout, kl_coef: float) -> Rollout:
    """This rank's responses of a rollout, which have values, with `returns` and whitened `advantages`. Collective.

    A token's reward is the response's at its last token, 0 before. With a kl_coef, minus kl_coef log(pi / pi_ref) at
    every token: the k1 estimate of the divergence, as in arXiv 2203.02155. pi has the engine's logprobs.
    """
    rewards = torch.zeros(len(rollout.tokens))  # [N]
    rewards[rollout.lengths.cumsum(0) - 1] = rollout.rewards.float()
    if kl_coef:
        rewards -= kl_coef * (rollout.rollout_logprobs - rollout.reference_logprobs)
    returns = rollout.values + gae(rewards, rollout.values, rollout.lengths, lam=1.0)
    parts = parallel.all_gather(gae(rewards, rollout.values, rollout.lengths))  # [n] of each rank
    advantages = whitened(torch.cat(parts)).split([len(part) for part in parts])[parallel.rank()]
    return replace(rollout, returns=returns, advantages=advantages)


def value_metrics(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """Of the values before the updates, and the KL divergence from the reference policy (k3). Collective."""
    reference = rollout.reference_logprobs if kl_coef else rollout.rollout_logprobs  # [N]
    own = torch.stack([rollout.values, rollout.returns, reference - rollout.rollout_logprobs])  # [3, n]
    values, returns, gap = torch.cat(parallel.all_gather(own), 1).double()  # [N] each
    variance = returns.var()  # 0 if all returns are equal, and then the share is NaN
    explained = 1 - (returns - values).var() / variance.where(variance > 0, torch.nan)
    metrics = {"value/explained_variance": explained.item(), "value/mean": values.mean().item()}
    return metrics | ({"kl/reference": (gap.expm1() - gap).mean().item()} if kl_coef else {})
