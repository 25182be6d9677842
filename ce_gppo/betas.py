"""beta1 and beta2 of a step: constant, on a schedule, or moved by a controller that holds entropy at a target."""

import itertools
import math
import re

from ce_gppo.types import UserError

WITH_BETAS = ("ce_gppo", "lp_only", "lp_only_half")  # objectives whose betas can be set
GAIN, INTEGRAL_GAIN = 4.0, 0.4  # of the controller, per rollout; relative errors of entropy vary by about 0.03


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
    if config.entropy_target:
        return steered_betas(u, config.beta1, config.beta2)
    points = [(1, config.beta1, config.beta2), *read_schedule(config.beta_schedule)]
    for (start, *before), (end, *after) in itertools.pairwise(points):
        if step < end:
            progress = (step - start) / (end - start)
            return tuple(a + progress * (b - a) for a, b in zip(before, after, strict=True))
    return points[-1][1:]
