"""The metrics of a step: each is computed, divided and described in one place.

A function's docstring has a row for each of its metrics, `Section: names | unit | meaning | healthy`. From these rows,
here and in other files, `python -m tools.metrics` makes docs/metrics.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ce_gppo import parallel
from ce_gppo.batch import Rollout
from ce_gppo.entropy import entropy_velocity, quadrants

EDGES = torch.logspace(-8, math.log10(32), 6000, dtype=torch.float64)  # of the bins for quantiles, 0.4 % wide


@dataclass
class Sums:
    """What can be added over micro-batches, updates and ranks. A mean travels as its total and its count."""

    means: dict[str, Tensor]  # [2]  total and count
    maxima: dict[str, Tensor]  # []
    minima: dict[str, Tensor]  # []
    counts: dict[str, Tensor]  # [bins]  of histograms

    def values(self) -> dict[str, float]:
        """A mean over nothing is left out: it is not 0."""
        means = {name: (total / count).item() for name, (total, count) in self.means.items() if count}
        return means | {name: v.item() for name, v in (self.maxima | self.minima).items() if v.isfinite()}


def add(parts: list[Sums]) -> Sums:
    """The sums of several parts as the sums of one whole, on the CPU."""

    def merge(kind: str, merged: Callable) -> dict[str, Tensor]:
        each = [getattr(part, kind) for part in parts]
        return {name: merged(torch.stack([values[name] for values in each]), 0).cpu() for name in each[0]}

    return Sums(*map(merge, ("means", "maxima", "minima", "counts"), (torch.sum, torch.amax, torch.amin, torch.sum)))


def mean(values: Tensor, count: Tensor | int | None = None) -> Tensor:
    """(total, count) of these values, or of their sum over another count: [2], float64."""
    count = values.numel() if count is None else count
    return torch.stack([values.double().sum(), torch.as_tensor(count, device=values.device).double()])


@torch.no_grad()
def token_sums(batch: Rollout, info: dict, logprobs: Tensor, entropy: Tensor, moment: Tensor, places: int = 0) -> Sums:
    """Of a micro-batch's response tokens, [N] each; `info` is policy_loss's. places: of attention's blocks.

    Clipping: clip/low, clip/high | share | tokens below the interval with A < 0, above it with A > 0; they keep a
        gradient here | 0.001 to 0.03 together, with `beta1` above 0 to 0.01; at 0 the betas do nothing
    Clipping: clip/prob_low, clip/prob_high | probability | mean of those tokens under the rollout weights; absent where
        there are none | prob_low above 0.5: sure tokens of wrong answers, such as their end, are being unlearned
    Clipping: weight/low, weight/high, weight/inside | share | of the gradient weight: tokens below the interval with
        A < 0, above it with A > 0, and all others | inside above 0.9
    Clipping: clip/amplification, clip/amplification_p99 | | a clipped token's gradient weight over that without a clip,
        mean and 99 % (32 at most); absent where there are none | below 1; far above 1 a token that fell is pushed on:
        lower beta1, or take `decaying`
    Clipping: ratio/mean, ratio/min, ratio/max | | pi / pi_old | mean near 1
    Clipping: kl/approx | nats | KL from the policy that sampled, k3 estimate | below 0.01; above, lower lr or beta1
    Clipping: kl/reference | nats | KL to the reference policy, k3, over the trained tokens; with kl_coef | grows slowly
    Entropy: velocity/<quadrant>, velocity/total | rate | which way the updates move entropy: first order in logit
        space, for each unit of step in the logits, so sign and shares count, not the amount; quadrants add up to the
        total; without an entropy bonus | PA&LP and NA&HP above 0, PA&HP and NA&LP below
    Entropy: velocity/clipped_low, velocity/clipped_high | rate | the part of the tokens that PPO-clip would have
        dropped | a positive sum: the betas raise entropy
    Entropy: entropy/<quadrant> | nats | mean entropy of a quadrant's trained tokens |
    Entropy: tokens/<quadrant> | share | of the trained tokens; the four add up to 1 |
    Speed: perf/padding | share | of the places in attention's blocks; 0 on a GPU | below 0.15
    """
    weight, ratio, low, high = info["weight"], info["ratio"], info["clipped_low"], info["clipped_high"]
    velocity = entropy_velocity(weight, logprobs, entropy, moment)
    old_probs, size, log_ratio, n = batch.old_logprobs.exp(), weight.abs(), info["log_ratio"], len(logprobs)
    means = {"ratio/mean": mean(ratio), "velocity/total": mean(velocity)}
    means |= {"kl/approx": mean(log_ratio.expm1() - log_ratio), "weight/inside": mean(size[~(low | high)], size.sum())}
    for side, members in (("low", low), ("high", high)):
        means |= {f"clip/{side}": mean(members), f"clip/prob_{side}": mean(old_probs[members])}
        means[f"weight/{side}"] = mean(size[members], size.sum())
        means[f"velocity/clipped_{side}"] = mean(velocity[members], n)
    means["perf/padding"] = mean(places - batch.sizes.sum(), places) * (len(batch) > 0)
    amplification = (weight / info["unclipped_weight"])[low | high]  # [n]; a clipped token has A other than 0
    means["clip/amplification"] = mean(amplification)
    if "kl_reference" in info:
        means["kl/reference"] = mean(info["kl_reference"])
    counts = {"amplification": histogram(amplification)}
    for name, members in quadrants(batch.old_logprobs, batch.entropy, batch.advantages).items():
        means |= {f"tokens/{name}": mean(members), f"entropy/{name}": mean(batch.entropy[members])}
        means[f"velocity/{name}"] = mean(velocity[members], n)
        counts[f"probability/{name}"] = torch.histc(old_probs[members], 64, 0, 1)
    infinite = ratio.new_tensor([torch.inf])  # for an empty micro-batch
    extremes = {"ratio/max": torch.cat([ratio, -infinite]).max()}, {"ratio/min": torch.cat([ratio, infinite]).min()}
    return Sums(means, *extremes, counts)


@dataclass
class Update:
    """The record of one optimizer step. Sums and loss are of this rank's tokens; the rest is equal on all ranks."""

    sums: Sums
    loss: float
    grad_norm: float  # before clipping
    skipped: bool  # the gradient was not finite
    followed: list[dict]  # responses for the token view, see tracking.py


class Learned(NamedTuple):
    """What a step's updates leave, of this rank's share."""

    updates: list[Update]
    measured: list[Rollout]  # mini-batches with old logprobs and entropy of the trainer's
    others: Rollout  # some responses that no update used, measured
    values: dict[str, float]  # the critic's metrics
    objective: object  # a loss.Objective
    lr: float


class Details(NamedTuple):
    """What only the log shows."""

    updates: list[list[Update]]  # of each rank
    histograms: dict[str, Tensor]  # [64]  of probability in [0, 1], by quadrant
    entropies: dict[int, float]  # the mean of each measured response, by its `index`


def step_metrics(
    rollout: Rollout, problems: list, mini_batches: list[Tensor], learned: Learned, previous_entropy: float | None
) -> tuple[dict[str, float], Details]:
    """All metrics of a step, over all ranks. Collective: only sums travel, and the entropy of each response.

    Optimization: optim/lr, optim/beta1, optim/beta2, optim/entropy_coef | | in use, where the objective has them |
    """
    sums = measured_sums(learned.measured), measured_sums([learned.others])
    own = learned.updates, *sums, entropies_of([*learned.measured, learned.others])
    updates, trained, others, entropies = zip(*parallel.all_gather(own), strict=True)  # of each rank
    unused = rollout.lengths[rollout.without(mini_batches)]  # [b]
    tokens = [len(rollout.tokens) - int(unused.sum()), int(unused.sum())]
    of_updates, histograms = update_metrics(updates)
    metrics = rollout_metrics(rollout, [problem.source for problem in problems], len(unused)) | of_updates
    metrics |= entropy_metrics(add(trained), add(others), tokens, previous_entropy) | learned.values
    used = {"lr": learned.lr} | {name: getattr(learned.objective, name) for name in ("beta1", "beta2", "entropy_coef")}
    metrics |= {f"optim/{name}": value for name, value in used.items() if value is not None}
    return metrics, Details(updates, histograms, {i: H for part in entropies for i, H in part.items()})


def entropies_of(parts: list[Rollout]) -> dict[int, float]:
    """The mean entropy of each response, by its index."""
    pairs = [(i, H) for p in parts for i, H in zip(p.index.tolist(), p.entropy.split(p.lengths.tolist()), strict=True)]
    return {i: H.mean().item() for i, H in pairs}


BY_UPDATE = ("clip/low", "clip/high", "weight/low", "weight/high", "ratio/min", "ratio/max", "kl/approx")


def update_metrics(by_rank: list[list[Update]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A step's updates that were not skipped, as one, and some metrics of each by itself; and histograms by name.

    Optimization: optim/updates, optim/skipped | | updates of the step; those skipped, as their gradient was not finite,
        are in no other metric of the step's | skipped 0; updates 0 where no group had unequal rewards
    Optimization: optim/loss, optim/grad_norm | | mean over the updates; the norm before clipping | grad_norm steady
    Clipping: update_<k>/clip_low, update_<k>/clip_high, update_<k>/weight_low, update_<k>/weight_high,
        update_<k>/ratio_min, update_<k>/ratio_max, update_<k>/kl_approx | | by update within the step; the first one is
        at ratio 1 |
    """
    same = list(zip(*by_rank, strict=True))  # each update's parts, one of each rank
    metrics = {"optim/updates": len(same), "optim/skipped": sum(parts[0].skipped for parts in same)}
    sums = {k: add([part.sums for part in parts]) for k, parts in enumerate(same, 1) if not parts[0].skipped}
    if not sums:  # also where no group had unequal rewards
        return metrics, {}
    whole, done = add(list(sums.values())), [part for k in sums for part in same[k - 1]]
    metrics |= whole.values() | {"optim/loss": sum(part.loss for part in done) / len(sums)}
    metrics["optim/grad_norm"] = sum(part.grad_norm for part in done) / len(done)
    if (amplification := whole.counts.pop("amplification")).sum():
        metrics["clip/amplification_p99"] = quantile(amplification, 0.99)
    for k, of_update in sums.items():
        values = of_update.values()
        metrics |= {f"update_{k}/{name.replace('/', '_')}": values[name] for name in BY_UPDATE if name in values}
    return metrics, whole.counts


def rollout_metrics(rollout: Rollout, sources: list[str], unused: int) -> dict[str, float]:
    """Of all responses of a step. sources: of each prompt. unused: the number of responses without an update.

    Reward: reward/mean | | of all responses, the penalty for length included | rises
    Reward: reward/std | | standard deviation within a group, mean over the groups, as TRL's reward_std | above 0
    Reward: reward/pass_at_g | share | groups with a right answer | above reward/mean
    Reward: reward/group_solved_all, reward/group_solved_none | share | groups with only right answers, with only wrong
        ones: neither teaches | together below 0.9
    Reward: reward/<source>/mean, reward/<source>/<component> | | of the problems of a source, without the penalty; and
        each component where a verifier gives several | rises
    Rollout: rollout/prompts | | prompts sampled: prompts_per_step, or more where dynamic_sampling is refill |
    Rollout: rollout/unused | share | of the sampled responses that no update used | below 0.5
    Rollout: response/length_mean, response/length_max | tokens | length of the responses |
    Rollout: response/truncated | share | responses cut at the length limit | below 0.1
    """
    rewards, correct = rollout.by_group(rollout.rewards), rollout.by_group(rollout.correct)  # [P, G]
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(1).mean().item() if rewards.shape[1] > 1 else 0.0,
        "reward/pass_at_g": correct.any(1).double().mean().item(),
        "reward/group_solved_all": correct.all(1).double().mean().item(),
        "reward/group_solved_none": (~correct.any(1)).double().mean().item(),
        "rollout/prompts": len(rewards),
        "rollout/unused": unused / len(rollout),
        "response/length_mean": rollout.lengths.double().mean().item(),
        "response/length_max": int(rollout.lengths.max()),
        "response/truncated": rollout.truncated.double().mean().item(),
    }
    source_of = [sources[prompt] for prompt in rollout.prompt_of.tolist()]
    for source in dict.fromkeys(sources):
        rows = [row for row, name in zip(rollout.components, source_of, strict=True) if name == source]
        means = {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in sorted(set().union(*rows))}
        metrics |= {f"reward/{source}/{name}": value for name, value in means.items()} if len(means) > 1 else {}
        metrics[f"reward/{source}/mean"] = sum(means.values())
    return metrics


def measured_sums(parts: list[Rollout]) -> Sums:
    """Of responses whose old_logprobs and entropy this rank has measured, under the weights that sampled them."""
    none = torch.zeros(0)
    entropy = torch.cat([none, *(part.entropy for part in parts)])  # [N]
    gap = torch.cat([none, *(p.old_logprobs - p.rollout_logprobs for p in parts)])  # [N]  log(pi_old / pi_vllm)
    means = {"entropy/mean": mean(entropy), "mismatch/mean": mean(gap.abs()), "mismatch/kl": mean(gap.expm1() - gap)}
    highest = torch.cat([gap.abs(), torch.zeros(1)]).max().exp()  # []
    counts = {"entropy": histogram(entropy), "gap": histogram(gap.abs())}
    return Sums(means, {"mismatch/ratio_max": highest}, {}, counts)


def entropy_metrics(trained: Sums, others: Sums, tokens: list[int], previous: float | None) -> dict[str, float]:
    """trained, others: `measured_sums` of the responses trained on, and of a sample of the others, over all ranks.

    tokens: of all responses trained on, and of all others, whose sample counts for them all (a stratified mean).
    previous: entropy/mean of the step before.

    Entropy: entropy/mean, entropy/p10, entropy/p90 | nats | exact entropy of the next-token distribution, over all
        response tokens; of responses that are not trained on, one in three is measured; quantiles are exact to 0.4 % |
        falls slowly while accuracy rises; near 0 it has collapsed, far above its start it explodes
    Entropy: entropy/delta | nats | change of entropy/mean since the step before |
    vLLM against trainer: mismatch/mean, mismatch/kl | nats | gap of the sampled tokens' logprobs, with the same weights
        on both sides: mean absolute gap, and k3 | 1e-6 in float32, 0.002 to 0.03 in bfloat16; a warning above 0.05
        (without a GPU 0.001); above 0.2 the run ends
    vLLM against trainer: mismatch/ratio_p99, mismatch/ratio_max | | the larger probability over the smaller | near 1
    """
    both, of_all, counts = add([trained, others]), torch.zeros(2), torch.zeros(len(EDGES) + 1)
    for n, part in zip(tokens, (trained, others), strict=True):
        scale = n / max(1.0, part.means["entropy/mean"][1].item())  # tokens for each one that was measured
        of_all, counts = of_all + scale * part.means["entropy/mean"], counts + scale * part.counts["entropy"]
    metrics = both.values() | {"entropy/mean": (of_all[0] / of_all[1]).item()}
    metrics |= {"entropy/p10": quantile(counts, 0.1), "entropy/p90": quantile(counts, 0.9)}
    metrics["mismatch/ratio_p99"] = math.exp(quantile(both.counts["gap"], 0.99))
    return metrics if previous is None else metrics | {"entropy/delta": metrics["entropy/mean"] - previous}


def histogram(values: Tensor) -> Tensor:
    """Counts of values by the bins between EDGES: [N] -> [bins], float64."""
    return torch.bincount(torch.bucketize(values.double(), EDGES.to(values.device)), minlength=len(EDGES) + 1).double()


def quantile(counts: Tensor, q: float) -> float:
    """The nearest-rank quantile of a histogram: the upper end of its bin. 0 below the first edge."""
    reached = counts.cumsum(0) >= q * counts.sum() * (1 - 1e-12)
    place = int(reached.int().argmax())
    return EDGES[min(place, len(EDGES) - 1)].item() if place else 0.0
