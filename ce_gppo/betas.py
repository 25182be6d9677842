"""beta1 and beta2 of a step: constant, on a schedule, or moved by a controller that holds entropy at a target.

Objectives without betas have an entropy bonus, whose coefficient the target moves. The learning rate is here, too.
"""

import itertools
import math
import re

from ce_gppo.messages import UserError

GAIN, INTEGRAL_GAIN = 4.0, 0.4  # of the controller, per rollout; relative errors of entropy vary by about 0.03

BONUS_STEP, MAX_BONUS = 0.005, 1.0  # of entropy_coef, per rollout; TRL's entropy_coef_delta and entropy_coef_max


def first_control(config) -> tuple[float, float]:
    """What `steer` or `adapt_bonus` starts from."""
    return (0.5 if config.spec.has_betas else config.entropy_coef), 0.0


def next_control(config, control: tuple[float, float], entropy: float) -> tuple[float, float]:
    """After a rollout: the control of the lever that the objective has, its betas or the bonus."""
    law = steer if config.spec.has_betas else adapt_bonus
    return law(control, entropy, config.entropy_target)


def adapt_bonus(control: tuple[float, float], entropy: float, target: float) -> tuple[float, float]:
    """One step of the adaptive entropy bonus: (c, x) and a rollout's mean entropy -> the new (c, x), x as in `steer`.

    c <- c + 0.005 if entropy <= target, c - 0.005 otherwise, within [0, 1] (Skywork-OR1, arXiv 2505.22312;
    TRL's use_adaptive_entropy, which does it after each update).
    """
    error = math.log(max(entropy, 1e-6) / target)
    return min(MAX_BONUS, max(0.0, control[0] + (BONUS_STEP if error <= 0 else -BONUS_STEP))), error


def bonus_of_step(config, control: tuple[float, float]) -> float:
    """entropy_coef of this step: with a target c, and 0 where the entropy of the rollout before was above it."""
    if not config.entropy_target or config.spec.has_betas:
        return config.entropy_coef
    c, error = control
    return c if error <= 0 else 0.0


def steer(control: tuple[float, float], entropy: float, target: float) -> tuple[float, float]:
    """One step of the entropy controller, after a rollout: (u, x) and that rollout's mean entropy -> the new (u, x).

    u in [0, 1] says how much entropy is wanted (`steered_betas`). x = log(entropy / target) is the relative error.
    A proportional-integral law in incremental form, which cannot wind up:  u <- clip(u - K_P (x' - x) - K_I x', 0, 1).
    The paper leaves adaptive betas to future work; the law is this project's.
    """
    u, before = control
    error = math.log(max(entropy, 1e-6) / target)
    return min(1.0, max(0.0, u - GAIN * (error - before) - INTEGRAL_GAIN * error)), error


def steered_betas(u: float, beta1: float, beta2: float) -> tuple[float, float]:
    """u = 1: betas (0, beta2), which raise entropy most. u = 0: betas (beta1, 0), which lower it most."""
    return (1 - u) * beta1, u * beta2


def read_schedule(text: str) -> list[tuple[int, float, float]]:
    """(step, beta1, beta2) of each point of a schedule such as "584:0,1 585:0.5,1". UserError for anything else."""
    points = []
    for point in text.split():
        found = re.fullmatch(r"(\d{1,9}):([\d.]+),([\d.]+)", point)
        try:
            step, beta1, beta2 = int(found[1]), float(found[2]), float(found[3])
        except (TypeError, ValueError):  # no match, or a number such as 1.2.3
            raise UserError(
                f"beta_schedule: '{point}' is no point; step:beta1,beta2 is needed, such as 585:0.5,1"
            ) from None
        if not (beta1 <= 1 and beta2 <= 1):
            raise UserError(f"beta_schedule: the betas in '{point}' must be at least 0 and at most 1")
        if step <= (points[-1][0] if points else 1):
            raise UserError(
                f"beta_schedule: the steps must rise, and the first be 2 or later, as step 1 has beta1 and beta2; "
                f"'{point}' does not"
            )
        points.append((step, beta1, beta2))
    return points


def betas_of_step(config, step: int, u: float) -> tuple[float | None, float | None]:
    """beta1 and beta2 of this step: steered, or on lines between the points of the schedule, or constant."""
    if config.entropy_target and config.spec.has_betas:
        return steered_betas(u, config.beta1, config.beta2)
    points = [(1, config.beta1, config.beta2), *read_schedule(config.beta_schedule)]
    for (start, *before), (end, *after) in itertools.pairwise(points):
        if step < end:
            progress = (step - start) / (end - start)
            return tuple(a + progress * (b - a) for a, b in zip(before, after, strict=True))
    return points[-1][1:]


def lr_of_step(config, step: int) -> float:
    """The policy's learning rate: it grows over warmup_steps rollouts, then it is constant.

    With advantages = gae it is 0 for as many rollouts before that: the critic learns, and the policy stays as it is.
    """
    step -= config.warmup_steps if config.advantages == "gae" else 0
    return config.lr * min(1.0, max(0, step) / max(1, config.warmup_steps))
