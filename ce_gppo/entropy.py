"""Entropy: which tokens change it, and how to steer it with the betas or a bonus.

The accounting is first order and exact in logit space. Flexible Entropy Control (arXiv 2602.09782), independent work,
has the same split of tokens (-log p > H) and the same inner product; the theory is in arXiv 2602.03392.
"""

import itertools
import math
import re

from torch import Tensor

from ce_gppo.messages import UserError

QUADRANTS = ("pa_hp", "pa_lp", "na_hp", "na_lp")


def quadrants(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Bool masks by the sign of the advantage (PA, NA) and by probability under the rollout weights (HP, LP).

    LP if log p_a < -H: the token is less probable than the (geometric) average one. Otherwise HP. There is no
    threshold to tune. Tokens of advantage 0 are in none of the four. A token keeps its quadrant through all updates.
    """
    low = old_logprobs < -old_entropy
    positive, negative = advantages > 0, advantages < 0
    return {"pa_hp": positive & ~low, "pa_lp": positive & low, "na_hp": negative & ~low, "na_lp": negative & low}


def entropy_velocity(weight: Tensor, logprobs: Tensor, entropy: Tensor, moment: Tensor) -> Tensor:
    """v = g h_a with h_a = S - p_a (log p_a + H): which way, and at what rate, the update moves this token's entropy.

    The step g d log p_a / dz in logit space changes H, to first order, by g h_a: exactly the product of the gradients
    dH/dz_k = -p_k (log p_k + H) and d log p_a / dz_k = [k = a] - p_k, summed over the vocabulary. It is a rate for each
    unit of step in the logits. Its sign and its shares mean something; it is no amount in nats, as lr, Adam and the
    number of updates do not enter.
    """
    return weight * (moment - logprobs.exp() * (logprobs + entropy))


# ----------------------------------------------------------------------------------------------------------------------
# Steering: betas on a schedule, or betas (without betas: an entropy bonus) that hold entropy at a target

GAIN, INTEGRAL_GAIN = 4.0, 0.4  # of the controller, per rollout; relative errors of entropy vary by about 0.03
BONUS_STEP, MAX_BONUS = 0.005, 1.0  # of entropy_coef, per rollout; TRL's entropy_coef_delta and entropy_coef_max


def first_control(config) -> tuple[float, float]:
    """(lever, error) before the first rollout. The lever is u of `betas_of_step`, or the coefficient of the bonus."""
    return (0.5 if config.spec.has_betas else config.entropy_coef), 0.0


def next_control(config, control: tuple[float, float], entropy: float) -> tuple[float, float]:
    """(lever, error) after a rollout of this mean entropy; error = log(entropy / target).

    Betas: u <- clip(u - GAIN * change of error - INTEGRAL_GAIN * error, 0, 1), a proportional-integral law that cannot
    wind up. The paper leaves adaptive betas to future work; the law is this project's.
    Bonus: c <- c + 0.005 if entropy <= target, c - 0.005 otherwise, within [0, 1] (Skywork-OR1, arXiv 2505.22312;
    TRL's use_adaptive_entropy, which does it after each update).
    """
    lever, before = control
    error = math.log(max(entropy, 1e-6) / config.entropy_target)
    if not config.spec.has_betas:
        return min(MAX_BONUS, max(0.0, lever + (BONUS_STEP if error <= 0 else -BONUS_STEP))), error
    return min(1.0, max(0.0, lever - GAIN * (error - before) - INTEGRAL_GAIN * error)), error


def betas_of_step(config, step: int, control: tuple[float, float]) -> tuple[float | None, float | None]:
    """beta1 and beta2 of this step: steered, or on lines between the points of the schedule, or constant."""
    if config.entropy_target and config.spec.has_betas:
        u = control[0]  # 1: betas (0, beta2), which raise entropy most; 0: betas (beta1, 0), which lower it most
        return (1 - u) * config.beta1, u * config.beta2
    points = [(1, config.beta1, config.beta2), *read_schedule(config.beta_schedule)]
    for (start, *before), (end, *after) in itertools.pairwise(points):
        if step < end:
            progress = (step - start) / (end - start)
            return tuple(a + progress * (b - a) for a, b in zip(before, after, strict=True))
    return points[-1][1:]


def bonus_of_step(config, control: tuple[float, float]) -> float:
    """entropy_coef of this step: with a target the lever, and 0 where the last rollout's entropy was above it."""
    if not config.entropy_target or config.spec.has_betas:
        return config.entropy_coef
    coefficient, error = control
    return coefficient if error <= 0 else 0.0


def read_schedule(text: str) -> list[tuple[int, float, float]]:
    """(step, beta1, beta2) of each point of a schedule such as "584:0,1 585:0.5,1". UserError for anything else."""
    points = []
    for point in text.split():
        found = re.fullmatch(r"(\d{1,9}):(\d*\.?\d+),(\d*\.?\d+)", point)
        if not found:
            raise UserError(f"beta_schedule: '{point}' is no point; step:beta1,beta2 is needed, such as 585:0.5,1")
        step, beta1, beta2 = int(found[1]), float(found[2]), float(found[3])
        if not (beta1 <= 1 and beta2 <= 1):
            raise UserError(f"beta_schedule: the betas in '{point}' must be at least 0 and at most 1")
        if step <= (points[-1][0] if points else 1):
            raise UserError(f"beta_schedule: step {step} in '{point}' must be above 1 and the step before it")
        points.append((step, beta1, beta2))
    return points
