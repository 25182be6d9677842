"""Every metric of a run: the list of them, and how those of a rollout and of its updates are computed.

W&B's definitions, the saved W&B view, the sweep's series and docs/metrics.md are made from the list.
`python -m ce_gppo.metrics > docs/metrics.md` writes the page.
"""

import functools
import math
import re
from dataclasses import dataclass

import torch

from ce_gppo import dist
from ce_gppo.entropy import QUADRANTS, add_sums
from ce_gppo.types import Problem, Response, RunEnded, Update

# Of mismatch/mean, nats. In float32 it is 1e-6. bfloat16 made 0.002 of it for the base policy of the default task
# (bench/bfloat16.py), and others report 0.03 for larger models.
WARN_MISMATCH = {"cpu": 0.001, "cuda": 0.05}
MAX_MISMATCH = 0.2

# Entropy is measured on every third response that is not trained on. entropy/mean, then an estimate, has
# a standard error of 0.4 % with 11 dropped groups of 64, and of about 1 % with 50 (tests/test_rollout.py).
MEASURED = 3

# ----------------------------------------------------------------------------------------------------------------------
# The list


@dataclass(frozen=True)
class Metric:
    """One line of docs/metrics.md, and one chart of the saved view: a metric, or several that are read together."""

    names: str  # "clip/low high" is clip/low and clip/high; <quadrant>, <source>, <part>, <k>: placeholders
    unit: str
    meaning: str
    healthy: str = ""
    always: bool = True  # in every step
    swept: bool = False  # kept by results/sweep.py

    def each(self) -> list[str]:
        """The full names, with every quadrant; <source>, <part> and <k> stay."""
        first, *others = self.names.split()
        names = [first, *(f"{first.partition('/')[0]}/{name}" for name in others)]
        return [name.replace("<quadrant>", q) for name in names for q in (QUADRANTS if "<quadrant>" in name else [""])]

    def pattern(self) -> re.Pattern:
        names = [re.sub("<source>|<part>", ".+", re.escape(name)).replace("<k>", r"\d+") for name in self.each()]
        return re.compile("|".join(names))


METRICS = {
    "Entropy": [
        Metric(
            "entropy/mean p10 p90",
            "nats",
            "exact entropy of the next-token distribution, over all response tokens; of responses that are not trained "
            "on, one in three is measured",
            "falls slowly while accuracy rises; near 0 it has collapsed, far above its start it explodes",
            swept=True,
        ),
        Metric(
            "velocity/<quadrant> total",
            "nats per token",
            "how much the step's updates raise or lower entropy, to first order, exact in logit space; the four "
            "quadrants add up to the total",
            "PA&LP and NA&HP raise entropy, PA&HP and NA&LP lower it",
            always=False,
            swept=True,
        ),
        Metric(
            "velocity/clipped_low clipped_high",
            "nats per token",
            "the part from the tokens that PPO-clip would have dropped",
            "a positive sum: the betas raise entropy",
            always=False,
            swept=True,
        ),
        Metric("entropy/<quadrant>", "nats", "mean entropy of a quadrant's trained tokens", always=False),
        Metric("tokens/<quadrant>", "share", "of the trained tokens; the four add up to 1", always=False),
        Metric("entropy/delta", "nats", "change of entropy/mean since the step before", always=False),
    ],
    "Reward and evaluation": [
        Metric("reward/mean std", "", "reward of all responses, the penalty for length included", "rises", swept=True),
        Metric("reward/pass_at_g", "share", "groups with a right answer", "above reward/mean"),
        Metric(
            "reward/group_solved_all group_solved_none",
            "share",
            "groups with only right answers, with only wrong ones: neither has a signal",
            "together below 0.9",
        ),
        Metric(
            "reward/<source>/mean <source>/<part>",
            "",
            "the same of the problems of a source, without the penalty; and each part where a verifier gives several",
            "rises",
            always=False,
        ),
        Metric(
            "eval/<source>/avg_at_k",
            "share",
            "accuracy on held-out problems, mean over k samples of each",
            "rises",
            always=False,
            swept=True,
        ),
        Metric(
            "eval/<source>/pass_at_k",
            "share",
            "held-out problems with a right answer among k samples",
            "does not fall while avg_at_k rises",
            always=False,
            swept=True,
        ),
        Metric(
            "eval/<source>/distinct_at_k",
            "",
            "different right responses among k samples, mean over the problems: how many ways the policy still finds",
            "near k times avg_at_k where a problem has many right ways; 1 at most where it has one",
            always=False,
            swept=True,
        ),
        Metric("rollout/prompts", "", "prompts sampled: prompts_per_step, or more where filter_groups is refill"),
        Metric("rollout/unused", "share", "of the sampled responses that no update used", "below 0.5"),
        Metric("response/length_mean length_max", "tokens", "length of the responses", swept=True),
        Metric("response/truncated", "share", "responses cut at the length limit", "below 0.1", swept=True),
    ],
    "Clipping": [
        Metric(
            "clip/low high",
            "share",
            "tokens below the interval with A < 0, above it with A > 0; they keep a gradient here",
            "0.001 to 0.03; at 0 the betas do nothing",
            always=False,
            swept=True,
        ),
        Metric(
            "clip/prob_low prob_high",
            "probability",
            "of those tokens under the rollout weights, mean; absent where there are none",
            "prob_low above 0.5: sure tokens of wrong answers, such as their end, are being unlearned",
            always=False,
            swept=True,
        ),
        Metric("weight/low high inside", "share", "of the sum of absolute gradient weights", always=False),
        Metric(
            "optim/beta1 beta2", "", "the betas in use; absent where the objective has none", always=False, swept=True
        ),
        Metric("optim/entropy_coef", "", "the bonus in use, where entropy_target moves it", always=False),
        Metric(
            "ratio/mean min max",
            "",
            "probability over that under the rollout weights",
            "mean near 1",
            False,
            swept=True,
        ),
        Metric(
            "kl/old",
            "nats",
            "divergence from the rollout weights (k3)",
            "below 0.01; above it the learning rate is too high",
            always=False,
            swept=True,
        ),
        Metric(
            "kl/reference",
            "nats",
            "divergence from the model that the run began with (k3), of the trained tokens; with kl_coef",
            "grows slowly",
            always=False,
        ),
        Metric(
            "update_<k>/clip_low clip_high weight_low weight_high ratio_min ratio_max kl_old",
            "",
            "the same by update within the step; the first update is at ratio 1",
            always=False,
        ),
    ],
    "Optimization": [
        Metric("optim/loss", "", "mean over the step's updates", always=False),
        Metric("optim/grad_norm", "", "before clipping, mean over the step's updates", "steady", always=False),
        Metric("optim/lr", "", "learning rate"),
        Metric("optim/updates", "", "updates of the step", "0 where no group had a signal"),
        Metric("optim/skipped", "", "updates skipped, as their gradient was not finite", "0"),
    ],
    "Critic, with advantages gae": [
        Metric(
            "value/explained_variance",
            "share",
            "1 - Var(return - value) / Var(return), over the tokens trained on, before the critic's updates; 1 is a "
            "perfect critic, 0 one that says the same everywhere",
            "rises in the critic's warm-up, then stays above 0",
            always=False,
        ),
        Metric("value/mean", "", "of these values", "near reward/mean", always=False),
        Metric("value/loss", "", "half the squared error, clipped; mean over the step's updates", "falls", False),
        Metric("value/clipped", "share", "values that the clip gives no gradient", "below 0.1", always=False),
        Metric("value/grad_norm", "", "before clipping, mean over the step's updates", "steady", always=False),
        Metric("value/skipped", "", "critic's updates skipped, as their gradient was not finite", "0", always=False),
    ],
    "vLLM against trainer": [
        Metric(
            "mismatch/mean kl",
            "nats",
            "gap of the sampled tokens' logprobs, with the same weights on both sides: mean absolute gap, and k3",
            "1e-6 in float32, 0.002 to 0.03 in bfloat16; a warning above 0.05 (without a GPU 0.001); above 0.2 the run "
            "ends",
        ),
        Metric("mismatch/ratio_p99 ratio_max", "", "the larger probability over the smaller", "near 1"),
    ],
    "Speed": [
        Metric("time/rollout reward old_logprobs update sync step", "s", "parts of a step, and all of it"),
        Metric("time/critic", "s", "values, advantages and the critic's updates", always=False),
        Metric("time/eval", "s", "the evaluation after the step", always=False),
        Metric("perf/rollout_tokens_per_s", "tokens/s", "sampled"),
        Metric("perf/update_tokens_per_s", "tokens/s", "prompt and response tokens trained on", always=False),
        Metric("perf/mfu", "share", "of the measured rate of a large matrix product", always=False),
        Metric("perf/padding", "share", "of the places in attention's blocks; 0 on a GPU", "below 0.15", always=False),
        Metric("perf/peak_memory_gib", "GiB", "of this process"),
    ],
}
ALL = [metric for section in METRICS.values() for metric in section]


def markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# The metrics",
        "",
        "One flat dictionary per step, the same in W&B and in `metrics.jsonl`. Made from `ce_gppo/metrics.py`.",
        "",
        "**PA** and **NA** are tokens of positive and negative advantage. **LP** and **HP** are tokens of low and high",
        "probability under the rollout weights: LP where log p < -H, with H the entropy there. The four quadrants are",
        "`pa_hp`, `pa_lp`, `na_hp`, `na_lp`.",
    ]
    for section, metrics in METRICS.items():
        lines += ["", f"## {section}", "", "| metric | unit | meaning | healthy |", "|---|---|---|---|"]
        for metric in metrics:
            names = ", ".join(f"`{name}`" for name in metric.names.split())
            lines.append(f"| {names} | {metric.unit} | {metric.meaning} | {metric.healthy} |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Their values


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
    measured = dist.all_gather([own_values(part) for part in parts])
    metrics = rollout_metrics(groups, parts, measured, previous_entropy)
    metrics["rollout/prompts"] = len(groups)
    metrics["rollout/unused"] = 1 - sum(map(len, mini_batches)) / sum(map(len, groups))
    return metrics | updates_to_metrics(dist.all_gather(updates))


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
    dist.say(
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


if __name__ == "__main__":
    print(markdown(), end="")
