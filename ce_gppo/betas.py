"""beta1 and beta2 of a step: constant, on a line, or moved by a controller that holds entropy at a target."""

import math

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


def betas_of_step(config, step: int, u: float) -> tuple[float | None, float | None]:
    """beta1 and beta2 of this step: steered, or on a line from the first step to the last, or constant."""
    if config.entropy_target:
        return steered_betas(u, config.beta1, config.beta2)
    progress = (step - 1) / max(1, config.steps - 1)
    ends = (config.beta1, config.beta1_end), (config.beta2, config.beta2_end)
    return tuple(beta if end is None else beta + progress * (end - beta) for beta, end in ends)
