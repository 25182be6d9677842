"""PPO's critic: a value model, the advantages of single tokens that follow from it (GAE), and its own updates.

The value of a token is the reward that the critic predicts for the response, from the prompt and the tokens before that
one. The critic is a separate model: a copy of the body that the run began with, and a scalar head of zeros. With
gradients and optimizer it takes 16 bytes a parameter on each device, in addition to the policy's (with shard: over all
devices, or in the host's memory).
"""

import contextlib

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ce_gppo import parallel
from ce_gppo.forward import Batch, collate, even_passes, flatten, hidden_states, micro_batches, own_share, take
from ce_gppo.model import load_model
from ce_gppo.perf import Meter
from ce_gppo.types import Response

GAMMA = 1.0  # no discount, as in verl, TRL and OpenRLHF: a reward at the end is worth as much to every token
# For the advantages. At 1 they are return - value, without the critic's bias, as in verl and OpenRLHF; TRL has 0.95, as
# arXiv 1707.06347. The critic's targets are the returns, always with lambda 1 (arXiv 2504.05118, section 4.1).
LAMBDA = 1.0
VALUE_CLIP = 0.5  # verl's cliprange_value; TRL has 0.2
MAX_GRAD_NORM = 1.0  # verl's
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.01}  # verl's

# ----------------------------------------------------------------------------------------------------------------------
# Advantages and losses: functions on tensors


def gae(rewards: Tensor, values: Tensor, gamma: float = GAMMA, lam: float = LAMBDA) -> Tensor:
    """Generalized advantage estimation, arXiv 1506.02438, eq. 16: [B, R], [B, R] -> [B, R].

    A_t = sum over l >= 0 of (gamma lam)^l delta_(t + l), with delta_t = r_t + gamma V_(t + 1) - V_t. A response ends
    with its last token, whether it was cut or not, and has no value after it. After the end of a response that is
    shorter than R, rewards and values must be 0; the advantages are then 0 as well.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages


def whitened(advantages: Tensor) -> Tensor:
    """Advantages of mean 0 and variance 1 over all tokens of a rollout, as in TRL, verl and OpenRLHF: [N] -> [N]."""
    deviation = advantages.double() - advantages.double().mean()
    return (deviation / (deviation.square().mean() + 1e-8).sqrt()).to(advantages.dtype)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped loss of each token's value, and whether the clip removed its gradient: [N] each -> [N], bool [N].

    l = 1/2 max((V - R)^2, (V_clip - R)^2) with V_clip = V_old + clip(V - V_old, -c, c). A value that has moved more
    than c towards its return gets no more gradient in this rollout (OpenAI's baselines, ppo2; TRL; verl).
    """
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    loss, loss_near = (values - returns).square() / 2, (near - returns).square() / 2
    clipped = ((values - old_values).abs() > VALUE_CLIP) & (loss_near > loss)
    return torch.maximum(loss, loss_near), clipped


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R): [N], [N] -> 1 for a perfect critic, 0 for a constant; NaN if all returns are equal."""
    values, returns = values.double(), returns.double()
    return (1 - (returns - values).var() / returns.var()).item() if returns.var() > 0 else float("nan")


# ----------------------------------------------------------------------------------------------------------------------
# The model


class ValueModel(torch.nn.Module):
    """The unit that DDP and FSDP2 wrap: the body of a causal language model, with a scalar head instead of its own."""

    def __init__(self, model):
        super().__init__()
        self.body = model.base_model
        head = torch.zeros(1, model.get_output_embeddings().in_features, device=model.device)
        self.head = torch.nn.Parameter(head)  # [1, D]

    def forward(self, batch: Batch) -> Tensor:
        """The value of every response token, one response after another, [N] in float32."""
        hidden = take(hidden_states(self.body, batch), batch.predecessors)  # [N, D]
        return hidden.float() @ self.head.float()[0]  # a sharded head is bfloat16 here; its products are not


class Critic:
    """A value model over all ranks, with its optimizer."""

    def __init__(self, model, config):
        self.model = ValueModel(model)
        self.wrapped = parallel.distribute(self.model, config.shard, model._no_split_modules or [])
        fused = torch.cuda.is_available()  # otherwise a step needs memory for one more copy of the weights
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.critic_lr, fused=fused, **ADAMW)


def load_critic(config, source: str, device: str) -> Critic | None:
    """A new critic with the body of the model `source`, or None where advantages need none. Collective."""
    if config.advantages != "gae":
        return None
    model, _ = load_model(source, device, config.gradient_checkpointing, config.shard)
    return Critic(model, config)


# ----------------------------------------------------------------------------------------------------------------------
# The critic's part of a step


def learn_values(critic: Critic | None, mini_batches: list[list[Response]], config, meter: Meter) -> dict[str, float]:
    """Set the advantages of all responses that this rank trains on, then train the critic on their returns.

    Advantages and returns are computed with the critic before its updates. The updates take the policy's mini-batches,
    in the same order and for the same epochs. Returns the metrics value/*, {} without a critic. Collective.
    """
    if critic is None:
        return {}
    shares = [own_share(mini_batch) for mini_batch in mini_batches]
    with meter("critic"), parallel.host_threads():
        responses = flatten(shares)
        estimate(critic, responses, config, meter.device)
        set_advantages(responses, config.kl_coef)
        metrics = metrics_of(responses, with_kl=config.kl_coef > 0)
        updates = [update(critic, share, config, meter.device) for share in shares * config.epochs]
        parallel.zero_gradients(critic.wrapped, critic.optimizer)  # no memory for gradients while vLLM samples
    if updates:
        sums = [sum(column) for column in zip(*updates, strict=True)]
        metrics |= {"value/loss": sums[0] / len(updates), "value/clipped": sums[1] / len(updates)}
        metrics |= {"value/grad_norm": sums[2] / len(updates), "value/skipped": sums[3]}
    return metrics


@torch.no_grad()
def estimate(critic: Critic, responses: list[Response], config, device: str) -> None:
    """Set `values` of this rank's responses. Collective."""
    max_tokens = config.max_micro_batch_tokens
    if device == "cpu":  # as in compute_old_logprobs
        max_tokens = min(max_tokens, 2048)
    for rows in even_passes(micro_batches(responses, max_tokens)):
        chosen = [responses[i] for i in rows]
        values = critic.wrapped(collate(chosen, device)).cpu()
        lengths = [len(r.response_ids) for r in chosen]
        for response, own in zip(chosen, values[: sum(lengths)].split(lengths), strict=True):
            response.values = own


def set_advantages(responses: list[Response], kl_coef: float) -> None:
    """Set `returns` and `advantages` of this rank's responses of a rollout, which have values. Collective."""
    lengths, advantages = [len(r.response_ids) for r in responses], []
    if responses:
        rewards = pad_sequence([token_rewards(r, kl_coef) for r in responses], batch_first=True)  # [B, R]
        values = pad_sequence([r.values for r in responses], batch_first=True)  # [B, R]
        advantages = [row[:n] for row, n in zip(gae(rewards, values), lengths, strict=True)]
        returns = values + gae(rewards, values, lam=1.0)  # [B, R]
        for response, row, n in zip(responses, returns, lengths, strict=True):
            response.returns = row[:n].clone()
    parts = parallel.all_gather(torch.cat([torch.zeros(0), *advantages]))  # [n] of each rank
    own = whitened(torch.cat(parts)).split([len(part) for part in parts])[parallel.rank()]  # [n]
    for response, tokens in zip(responses, own.split(lengths), strict=True):
        response.advantages = tokens


def token_rewards(response: Response, kl_coef: float) -> Tensor:
    """The response's reward at its last token, [R]. With a kl_coef, minus kl_coef log(pi / pi_ref) at every token.

    That is the k1 estimate of the divergence, as in arXiv 2203.02155. pi has the engine's logprobs.
    """
    rewards = torch.zeros(len(response.response_ids))
    rewards[-1:] = response.reward
    if kl_coef:
        rewards -= kl_coef * (response.rollout_logprobs - response.ref_logprobs)
    return rewards


def update(critic: Critic, responses: list[Response], config, device: str) -> tuple[float, float, float, bool]:
    """One optimizer step on a mini-batch, of which `responses` are this rank's share, perhaps none. Collective.

    Returns, over all ranks: mean loss, share of clipped values, norm of the gradient, and whether the step was skipped
    because that is not finite. The loss is the mean over the tokens of the whole mini-batch.
    """
    parallel.zero_gradients(critic.wrapped, critic.optimizer)
    tokens = max(1.0, parallel.all_sum(sum(len(r.response_ids) for r in responses))[0])
    loss_sum = clipped_sum = 0.0
    passes = even_passes(micro_batches(responses, config.max_micro_batch_tokens))
    for index, rows in enumerate(passes, start=1):
        chosen = [responses[i] for i in rows]
        old_values = torch.cat([torch.zeros(0), *(r.values for r in chosen)]).to(device)  # [N]
        returns = torch.cat([torch.zeros(0), *(r.returns for r in chosen)]).to(device)  # [N]
        with parallel.no_sync(critic.wrapped) if index < len(passes) else contextlib.nullcontext():
            values = critic.wrapped(collate(chosen, device))[: len(returns)]  # [N]; an empty batch has one token
            losses, clipped = value_losses(values, old_values, returns)
            loss = losses.sum() / tokens
            (loss * parallel.world_size()).backward()  # DDP and FSDP2 divide by it
        loss_sum, clipped_sum = loss_sum + loss.item(), clipped_sum + clipped.sum().item() / tokens
    grad_norm = parallel.clip_gradients(critic.wrapped, MAX_GRAD_NORM)
    loss_sum, clipped_sum = parallel.all_sum(loss_sum, clipped_sum)
    skipped = not torch.tensor(grad_norm + loss_sum).isfinite().item()
    if not skipped:
        critic.optimizer.step()
    return loss_sum, clipped_sum, grad_norm, skipped


def metrics_of(responses: list[Response], with_kl: bool) -> dict[str, float]:
    """Metrics of the values before the updates, and the KL divergence from the reference policy. Collective."""
    references = [r.ref_logprobs if with_kl else r.rollout_logprobs for r in responses]  # [R] each
    own = [
        torch.stack([r.values, r.returns, ref - r.rollout_logprobs])
        for r, ref in zip(responses, references, strict=True)
    ]
    values, returns, gap = torch.cat(parallel.all_gather(torch.cat([torch.zeros(3, 0), *own], 1)), 1)  # [N] each
    if not len(values):
        return {}
    metrics = {"value/explained_variance": explained_variance(values, returns), "value/mean": values.mean().item()}
    return metrics | ({"kl/reference": (gap.exp() - 1 - gap).mean().item()} if with_kl else {})
