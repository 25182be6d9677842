"""The metrics of a step, from its responses and its updates. The list of all metrics is ce_gppo/metrics.py."""

import functools
import math

import torch

from ce_gppo import messages, parallel
from ce_gppo.entropy import add_sums
from ce_gppo.messages import RunEnded
from ce_gppo.types import Problem, Response, Update

# Of mismatch/mean, nats. In float32 it is 1e-6. bfloat16 made 0.002 of it for the base policy of the default task
# (bench/bfloat16.py), and others report 0.03 for larger models.
WARN_MISMATCH = {"cpu": 0.001, "cuda": 0.05}
MAX_MISMATCH = 0.2

# Entropy is measured on every third response that is not trained on. entropy/mean, then an estimate, has
# a standard error of 0.4 % with 11 dropped groups of 64, and of about 1 % with 50 (tests/test_rollout.py).
MEASURED = 3


def step_metrics(
    groups: list[list[Response]],
    mini_batches: list[list[Response]],
    updates: list[Update],
    previous_entropy: float | None,
) -> dict[str, float]:
    """Metrics of a rollout and of the updates on it, over all ranks. Collective."""
    trained = {id(r) for mini_batch in mini_batches for r in mini_batch}
    parts = [[], []]  # trained on, and not
    for group in groups:
        for response in group:
            parts[id(response) not in trained].append(response)
    measured = parallel.all_gather([own_values(part) for part in parts])
    metrics = rollout_metrics(groups, parts, measured, previous_entropy)
    metrics["rollout/prompts"] = len(groups)
    metrics["rollout/unused"] = 1 - sum(map(len, mini_batches)) / sum(map(len, groups))
    return metrics | updates_to_metrics(parallel.all_gather(updates))


def rollout_metrics(
    groups: list[list[Response]],
    parts: list[list[Response]],
    measured: list[list[dict[str, torch.Tensor]]],
    previous_entropy: float | None,
) -> dict[str, float]:
    """Metrics of all the step's responses.

    parts: the responses trained on, and the others. measured: every rank's `own_values` of each part. A part that is
    measured only in a sample counts with all its tokens.
    """
    responses = [response for group in groups for response in group]
    rewards = torch.tensor([[r.reward for r in group] for group in groups]).double()  # [P, G]
    verdicts = torch.tensor([[r.verdict for r in group] for group in groups])  # [P, G]
    lengths = torch.tensor([len(r.response_ids) for r in responses]).double()  # [P G]
    gap = torch.cat([values["gap"] for rank in measured for values in rank]).double()  # [N]
    entropies = [torch.cat([values["entropy"] for values in part]).double() for part in zip(*measured, strict=True)]
    entropy = torch.cat(entropies)  # [N]
    tokens = [sum(len(r.response_ids) for r in part) for part in parts]
    shares = [n / max(1, len(values)) for n, values in zip(tokens, entropies, strict=True)]
    weights = torch.cat([torch.full_like(v, share) for v, share in zip(entropies, shares, strict=True)])  # [N]
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item(),
        "reward/group_solved_all": (verdicts.amin(1) >= 1).double().mean().item(),
        "reward/group_solved_none": (verdicts.amax(1) <= 0).double().mean().item(),
        "reward/pass_at_g": (verdicts.amax(1) > 0).double().mean().item(),
        "response/length_mean": lengths.mean().item(),
        "response/length_max": lengths.max().item(),
        "response/truncated": torch.tensor([r.truncated for r in responses]).double().mean().item(),
        "entropy/mean": ((entropy * weights).sum() / weights.sum()).item(),
        "entropy/p10": quantile(entropy, 0.1, weights),
        "entropy/p90": quantile(entropy, 0.9, weights),
        "mismatch/mean": gap.abs().mean().item(),
        "mismatch/kl": (gap.exp() - 1 - gap).mean().item(),
        "mismatch/ratio_max": gap.abs().max().exp().item(),
        "mismatch/ratio_p99": math.exp(quantile(gap.abs(), 0.99)),
    }
    if previous_entropy is not None:
        metrics["entropy/delta"] = metrics["entropy/mean"] - previous_entropy
    return metrics


def reward_metrics(groups: list[list[Response]], problems: list[Problem]) -> dict[str, float]:
    """The mean reward of each source's responses, without the penalty for length, and of each part of it."""
    by_source: dict[str, list[dict[str, float]]] = {}
    for group, problem in zip(groups, problems, strict=True):
        by_source.setdefault(problem.source, []).extend(response.parts for response in group)
    metrics = {}
    for source, rows in by_source.items():
        names = sorted({name for parts in rows for name in parts})
        means = {name: sum(parts.get(name, 0.0) for parts in rows) / len(rows) for name in names}
        if len(names) > 1:
            metrics |= {f"reward/{source}/{name}": mean for name, mean in means.items()}
        metrics[f"reward/{source}/mean"] = sum(means.values())
    return metrics


def moved_metrics(objective, config) -> dict[str, float]:
    """What moves from step to step: the betas in use, or the bonus in use, where entropy_target moves it.

    objective: the step's loss.Objective. config: train.py's.
    """
    if objective.beta1 is not None:
        return {"optim/beta1": objective.beta1, "optim/beta2": objective.beta2}
    return {"optim/entropy_coef": objective.entropy_coef} if config.entropy_target else {}


def check_mismatch(metrics: dict[str, float], device: str) -> None:
    """A warning, or RunEnded, where vLLM and trainer, which have the same weights, give the tokens other logprobs."""
    if not math.isfinite(metrics["entropy/mean"]) or not math.isfinite(metrics["mismatch/mean"]):
        raise RunEnded(
            "the policy's logprobs are not finite: an update has made its weights too large; lower lr, and begin again "
            "from an earlier checkpoint"
        )
    if not metrics["mismatch/mean"] <= MAX_MISMATCH:
        raise RunEnded(
            f"the logprobs of vLLM and trainer differ by {metrics['mismatch/mean']:.3g} nats on average, more than "
            f"{MAX_MISMATCH}: they do not have the same weights, or not in the same precision"
        )
    level = WARN_MISMATCH[device.partition(":")[0]]
    if metrics["mismatch/mean"] > level:
        _warn_of_mismatch(level * 2 ** int(math.log2(metrics["mismatch/mean"] / level)))


@functools.cache  # once at each level, not at each step
def _warn_of_mismatch(level: float) -> None:
    messages.say(
        f"the logprobs of vLLM and trainer differ by more than {level:g} nats on average (mismatch/mean), more than "
        f"rounding explains; --rollout-correction tis bounds what it does, and above {MAX_MISMATCH} the run ends",
        warning=True,
    )


def own_values(responses: list[Response]) -> dict[str, torch.Tensor]:
    """[N] each, of those responses whose old logprobs and entropy this rank has measured."""
    responses = [response for response in responses if response.entropy is not None]
    empty = torch.zeros(0)
    return {
        "entropy": torch.cat([empty, *(r.entropy for r in responses)]),
        # From the sampler to the trainer: log(pi_old / pi_vllm) of the sampled tokens, the same weights on both sides.
        "gap": torch.cat([empty, *(r.old_logprobs - r.rollout_logprobs for r in responses)]),
    }


BY_UPDATE = ("clip/low", "clip/high", "weight/low", "weight/high", "ratio/min", "ratio/max", "kl/old")


def updates_to_metrics(updates: list[list[Update]]) -> dict[str, float]:
    """A step's updates as one: means over all their tokens, then the same shares by index of the update.

    updates: those of each rank. Their sums and losses are of the rank's own tokens, all else is the same on all ranks.
    """
    own = updates[0]
    metrics = {"optim/updates": len(own), "optim/skipped": sum(u.skipped for u in own)}
    if not own:  # no group had unequal rewards
        return metrics
    by_update = [add_sums([u.sums for u in same]) for same in zip(*updates, strict=True)]
    metrics |= sums_to_metrics(add_sums(by_update))
    metrics["optim/loss"] = sum(u.loss for rank in updates for u in rank) / len(own)
    metrics["optim/grad_norm"] = sum(u.grad_norm for u in own) / len(own)
    metrics["perf/padding"] = sum(u.padding for u in own) / len(own)
    for index, sums in enumerate(by_update, start=1):
        shares = sums_to_metrics(sums)
        metrics |= {f"update_{index}/{k.replace('/', '_')}": v for k, v in shares.items() if k in BY_UPDATE}
    return metrics


def sums_to_metrics(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """From sums to means and shares. A mean over no tokens is left out: it is not 0."""
    sums = {key: float(value) for key, value in sums.items()}
    weights = sum(value for key, value in sums.items() if key.startswith("weight/"))
    metrics = {}
    for key, value in sums.items():
        group, _, name = key.partition("/")
        if key in ("ratio/min", "ratio/max"):
            metrics[key] = value
            continue
        denominator = {"entropy": sums.get(f"tokens/{name}"), "weight": weights}.get(group, sums["tokens"])
        if group == "clip" and name.startswith("prob_"):
            denominator = sums[f"clip/{name.removeprefix('prob_')}"]
        if key != "tokens" and denominator:
            metrics[key] = value / denominator
    return metrics


def quantile(values: torch.Tensor, q: float, weights: torch.Tensor | None = None) -> float:
    """The nearest-rank quantile, of weighted values too; torch.quantile refuses more than 16 M values."""
    if weights is None:
        return values.kthvalue(max(1, math.ceil(q * len(values)))).values.item()
    values, order = values.sort()
    reached = weights[order].cumsum(0) >= q * weights.sum() * (1 - 1e-12)
    return values[reached.int().argmax()].item()
