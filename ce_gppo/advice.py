"""Advice at the end of a run, from its metrics: one to four sentences, each fault with the setting to change.

The limits are those of docs/metrics.md. They separate the good from the bad runs of docs/evidence*.md and docs/log.md.
"""

LAST = 10  # "the end" is the mean of this many steps, or of the second half of a shorter run
FREQUENT = 0.05  # share of the steps in which a fault has to show, twice at least
MAX_KL_OLD = 0.01  # nats
SURE = 0.4  # mean probability of clipped tokens; above it they are sure tokens, not improbable ones
MAX_TRUNCATED = 0.1
MAX_WITHOUT_SIGNAL = 0.9
MIN_CLIPPED = 0.001
MAX_MISMATCH_KL = 1e-3  # nats
CHANGED = 0.05  # of accuracy, or of explained variance; less may be chance
MISSED = 0.1  # share of entropy_target
CALM = "No metric is outside its usual range."


def advice(history: list[dict], config) -> list[str]:
    """One to four sentences: up to three faults, the gravest first; entropy and accuracy; the effect of clipped tokens.

    history: the rows of metrics.jsonl, in any of which a metric may be missing. config: train.py's, resolved.
    Empty before the first step.
    """
    steps = [row for row in history if "entropy/mean" in row]  # without the evaluation before the first step
    if not steps:
        return []
    checks = [mismatch, unlearning]
    if not unlearning(steps, config):  # unlearning causes these faults as well
        checks += [far_updates, truncation, no_signal, useless_critic, missed_target, idle_betas]
    faults = [sentence for check in checks if (sentence := check(steps, config))]
    summary, is_fault = entropy_for_accuracy(history, steps, config)
    push = [] if idle_betas(steps, config) else push_of_clipped(steps, config)
    sentences = [*faults[:3], summary, *push]
    return sentences[:4] if faults or is_fault else [CALM, *sentences]


def mismatch(steps: list[dict], config) -> str | None:
    kl = at_end(steps, "mismatch/kl")
    if kl is None or kl <= MAX_MISMATCH_KL or config.rollout_correction != "none":
        return None
    return (
        f"vLLM and the trainer gave the same tokens different probabilities (mismatch/kl {kl:.2g} nats at the end, "
        f"above {MAX_MISMATCH_KL:g}): set "
        + ("old_logprobs to trainer and " if config.old_logprobs == "sampler" else "")
        + "rollout_correction to tis, or use the same precision on both sides."
    )


def unlearning(steps: list[dict], config) -> str | None:
    far, trained = far_steps(steps, least_probability=SURE)
    if not far:
        return None
    probability = sum(row["clip/prob_low"] for row in far) / len(far)
    return (
        f"In {len(far)} of {trained} steps, first in step {far[0]['step']}, sure tokens were unlearned: tokens clipped "
        f"below had a mean probability of {probability:.2f} in the rollout (clip/prob_low), and kl/old reached "
        f"{max(row['kl/old'] for row in far):.2g} nats; {smaller_steps(config)}."
    )


def far_updates(steps: list[dict], config) -> str | None:
    far, trained = far_steps(steps)
    if not far:
        return None
    return (
        f"In {len(far)} of {trained} steps the updates moved far from the policy that sampled: kl/old was above "
        f"{MAX_KL_OLD:g} nats, and reached {max(row['kl/old'] for row in far):.2g}; {smaller_steps(config)}."
    )


def smaller_steps(config) -> str:
    names = ["lr"]
    names += ["beta1"] if config.spec.has_betas and config.beta1 else []
    names += ["epochs"] if config.epochs > 1 else []
    said = "lower " + " or ".join(f"{name} ({getattr(config, name):g})" for name in names)
    return said + (", or take objective ce_gppo, whose beta1 can be lower" if config.objective == "gppo" else "")


def far_steps(steps: list[dict], least_probability: float = 0.0) -> tuple[list[dict], int]:
    """(steps with kl/old above its limit and clip/prob_low of at least this; number of steps with updates).

    No steps if these are few and not extreme: a single step at ten times the limit can ruin a policy.
    """
    trained = [row for row in steps if "kl/old" in row]
    far = [row for row in trained if row["kl/old"] > MAX_KL_OLD]
    far = [row for row in far if row.get("clip/prob_low", 0.0) >= least_probability]
    enough = len(far) >= max(2, FREQUENT * len(trained)) or any(row["kl/old"] > 10 * MAX_KL_OLD for row in far)
    return far if enough else [], len(trained)


def truncation(steps: list[dict], config) -> str | None:
    share = at_end(steps, "response/truncated")
    if share is None or share <= MAX_TRUNCATED:
        return None
    limit = f"max_response_tokens ({config.max_response_tokens})"
    first = steps[0].get("response/truncated", share)
    if first > MAX_TRUNCATED:
        return f"At the end {share:.0%} of the responses were cut at the length limit: raise {limit}."
    penalty = f"more tokens (now {config.overlong})" if config.overlong.isdecimal() else "a number of tokens"
    return (
        f"At the end {share:.0%} of the responses were cut at the length limit, in the first step {first:.0%}: if they "
        f"go on after the answer (samples.jsonl), their end was unlearned, so {smaller_steps(config)}, or set overlong "
        f"to {penalty}; if not, raise {limit}."
    )


def no_signal(steps: list[dict], config) -> str | None:
    right, wrong = (at_end(steps, f"reward/group_solved_{name}") for name in ("all", "none"))
    if right is None or wrong is None or right + wrong <= MAX_WITHOUT_SIGNAL or config.advantages == "gae":
        return None
    unused = at_end(steps, "rollout/unused")
    if config.filter_groups != "off" and unused is not None and unused <= MAX_WITHOUT_SIGNAL:
        return None  # right answers differ in other parts of the reward
    if min(right, wrong) > 0.2:
        cure = f"the answers to one problem hardly differ: raise temperature ({config.temperature:g})"
    elif right > wrong:
        cure = "train on harder problems (train_data)"
    else:
        cure = "train on easier problems (train_data), or look in samples.jsonl for right answers that score 0"
    return (
        f"At the end few groups had a signal: {right:.0%} of all groups had only right answers, {wrong:.0%} only wrong "
        f"ones; {cure}."
    )


def useless_critic(steps: list[dict], config) -> str | None:
    explained = at_end(steps, "value/explained_variance")
    if explained is None or explained >= -CHANGED or len(steps) <= config.warmup_steps:
        return None
    return (
        "At the end the critic was further from the returns than a constant would be (value/explained_variance "
        f"{explained:.2f}): change critic_lr ({config.critic_lr:g}), or raise warmup_steps ({config.warmup_steps}), in "
        "which only the critic learns."
    )


def missed_target(steps: list[dict], config) -> str | None:
    target, entropy = config.entropy_target, at_end(steps, "entropy/mean")
    if not target or abs(entropy / target - 1) <= MISSED:
        return None
    below = entropy < target
    said = f"Entropy was {entropy:.3f} nats per token at the end, where entropy_target is {target:g}:"
    if not config.spec.has_betas:  # the bonus holds entropy up, and never down
        return f"{said} entropy_coef was still growing; raise steps ({config.steps})." if below else None
    betas, ends = (at_end(steps, "optim/beta1"), at_end(steps, "optim/beta2")), (0, config.beta2)
    ends = ends if below else (config.beta1, 0)
    if None in betas or max(abs(beta - end) for beta, end in zip(betas, ends, strict=True)) > MISSED:
        return f"{said} the betas were still moving; raise steps ({config.steps})."
    return (
        f"{said} the betas were at the end of their range, ({ends[0]:g}, {ends[1]:g}). Lower eps_low "
        f"({config.eps_low:g}) and eps_high ({config.eps_high:g}) to clip more tokens, or take a nearer target."
    )


def idle_betas(steps: list[dict], config) -> str | None:
    shares = [row["clip/low"] + row["clip/high"] for row in steps if "clip/low" in row and "clip/high" in row]
    if not shares or config.beta1 is None or (share := sum(shares) / len(shares)) >= MIN_CLIPPED:
        return None
    if len(steps) <= config.warmup_steps:
        return (
            f"The betas did nothing yet: in all {len(steps)} steps lr still grew (warmup_steps {config.warmup_steps})."
        )
    if max(row.get("optim/updates", 2) for row in steps) == 1:
        return (
            "The betas did nothing: with one update per rollout no token can leave the clip interval; lower "
            f"mini_batch_prompts ({config.mini_batch_prompts})."
        )
    return (
        f"The betas did almost nothing: {share:.2%} of the tokens were outside the clip interval. To have more there, "
        f"lower mini_batch_prompts ({config.mini_batch_prompts}), which gives more updates per rollout, or eps_low "
        f"({config.eps_low:g}) and eps_high ({config.eps_high:g}); or raise lr ({config.lr:g})."
    )


def entropy_for_accuracy(history: list[dict], steps: list[dict], config) -> tuple[str, bool]:
    """(a sentence on the changes of entropy and of held-out accuracy; whether they are a fault)."""
    start, end = steps[0]["entropy/mean"], steps[-1]["entropy/mean"]
    change = f"Entropy {'rose' if end > start else 'fell'} by {abs(end - start) / max(start, 1e-9):.0%}"
    change += f", from {start:.3f} to {end:.3f} nats per token"
    if abs(end - start) < 0.005 * start:
        change = f"Entropy stayed at {end:.3f} nats per token"
    evaluations = [accuracy for row in history if (accuracy := mean_accuracy(row)) is not None]
    if len(evaluations) < 2:
        return f"{change}.", False
    first, last = evaluations[0], evaluations[-1]
    said = f"{change}, while held-out accuracy went from {first:.3f} to {last:.3f}"
    if last < first - CHANGED and len(steps) > config.warmup_steps:
        return f"{said}: the policy became worse; lower lr ({config.lr:g}).", True
    if last > first + CHANGED or start / 2 < end < start * 1.5:
        return f"{said}.", False
    if end < start:
        return f"{said}: it fell without a gain; {more_entropy(config)}.", True
    return f"{said}: it rose without a gain; lower lr ({config.lr:g}).", True


def push_of_clipped(steps: list[dict], config) -> list[str]:
    """The effect of clipped tokens on entropy. Empty if they got no gradient, or if the objective has no betas."""
    names = ("velocity/clipped_low", "velocity/clipped_high", "velocity/total")
    trained = [row for row in steps if all(name in row for name in names)]
    if not trained or config.beta1 is None:
        return []
    low, high, total = (1e4 * sum(row[name] for row in trained) / len(trained) for name in names)
    if abs(low + high) < 0.05:  # shown as 0.0
        return []
    said = (
        f"To first order the clipped tokens pushed entropy {'up' if low + high > 0 else 'down'}: those below the "
        f"interval by {low:+.1f}e-4 nats per token, those above by {high:+.1f}e-4, of {total:+.1f}e-4 in all"
    )
    if moved_by := "entropy_target" if config.entropy_target else config.beta_schedule and "beta_schedule":
        return [f"{said}; {moved_by} moved the betas."]
    raised = config.spec.has_betas and config.beta2 and high > 0  # in a run that unlearns, high is often below 0
    less = f"; lower beta2 ({config.beta2:g}) for less" if raised else ""
    return [f"{said}. For more entropy {more_entropy(config)}{less}."]


def more_entropy(config) -> str:
    """What to change for more of it. A bonus does so most reliably: docs/evidence.md."""
    if config.entropy_target:
        return f"raise entropy_target ({config.entropy_target:g})"
    ways = []
    if config.spec.has_betas:
        ways += [f"lower beta1 ({config.beta1:g})"] * (config.beta1 > 0)
        ways += [f"raise beta2 ({config.beta2:g})"] * (config.beta2 < 1)
    elif config.objective == "gppo":
        ways = ["take objective ce_gppo with beta1 0"]
    return " or ".join([*ways, f"raise entropy_coef ({config.entropy_coef:g})"])


def at_end(steps: list[dict], name: str) -> float | None:
    values = [row[name] for row in steps[-min(LAST, (len(steps) + 1) // 2) :] if name in row]
    return sum(values) / len(values) if values else None


def mean_accuracy(row: dict) -> float | None:
    """avg@k of an evaluation, over all its sources; None for a row without one."""
    values = [value for name, value in row.items() if name.startswith("eval/") and name.endswith("/avg_at_k")]
    return sum(values) / len(values) if values else None
