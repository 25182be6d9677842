"""The list of a run's metrics. ce_gppo/statistics.py computes those of a step.

W&B's definitions, the saved W&B view, the sweep's series and docs/metrics.md are made from the list.
`python -m ce_gppo.metrics > docs/metrics.md` writes the page.
"""

import re
from dataclasses import dataclass

from ce_gppo.entropy import QUADRANTS


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
            "0.001 to 0.03 together, with `beta1` above 0 to 0.01; at 0 the betas do nothing",
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
        Metric("perf/peak_memory_gib", "GiB", "of this process; on a GPU without vLLM's"),
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


if __name__ == "__main__":
    print(markdown(), end="")
