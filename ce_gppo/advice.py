"""What a run says before its first step, and at its end: at most three sentences, faults with what to change."""

from pathlib import Path

from ce_gppo import parallel
from ce_gppo.config import max_batches, updates_of_step

LAST = 10  # "the end" is the mean of this many steps, or of the second half of a shorter run
FREQUENT = 0.05  # share of the steps in which a fault has to show, twice at least
MAX_KL, MAX_MISMATCH = 0.01, 1e-3  # nats
MAX_TRUNCATED, MAX_WITHOUT_SIGNAL, MIN_CLIPPED = 0.1, 0.9, 0.001  # shares
CHANGED = 0.05  # of accuracy; less may be chance


def plan(config, folder: Path, model, device: str, problems: str, step: int) -> str:
    """The run's folder and the sizes that follow from the settings."""
    parameters, world = sum(p.numel() for p in model.parameters()), parallel.world_size()
    group, batches, updates = config.responses_per_prompt, max_batches(config), updates_of_step(config)
    betas = "no betas" if config.beta1 is None else f"beta1 {config.beta1}, beta2 {config.beta2}"
    idle = updates == 1 and config.old_logprobs == "trainer"
    return (
        f"run          {folder}" + (f", continued after step {step}" if step else "") + "\n"
        f"model        {config.model}, {parameters / 1e6:,.2f} M parameters, on {device}"
        + (f", and a critic with learning rate {config.critic_lr:g}" if config.critic_lr else "")
        + f"\ndata         {problems}\n"
        f"objective    {config.objective}, {betas}, clip interval [{1 - config.eps_low:g}, {1 + config.eps_high:g}], "
        f"learning rate {config.lr:g}, seed {config.seed}\n"
        f"step         {config.prompts_per_step} prompts x {group} = {config.prompts_per_step * group} responses"
        + (f", up to {batches} times" if batches > 1 else "")
        + f", then up to {updates} updates of {config.mini_batch_prompts * group} responses; {config.steps} steps"
        + ("; nothing is clipped, as a step's only update has ratio 1" if idle else "")
        + (f"; on {world} processes, {'copied' if config.shard == 'no' else 'sharded'}" if world > 1 else "")
        + ("; weights, gradients and optimizer in the host's memory" if config.shard == "offload" else "")
        + ("; shard does nothing, with one process" if config.shard == "yes" and world == 1 else "")
    )


def advice(history: list[dict], config) -> list[str]:
    """Up to two faults, the gravest first, and a sentence on entropy and accuracy. Empty before the first step.

    history: the rows of metrics.jsonl, in any of which a metric may be missing. config: train.py's, resolved.
    """
    steps = [row for row in history if "entropy/mean" in row]  # without the evaluation before the first step
    checks = (mismatch, far_updates, truncation, no_signal, idle_betas)
    faults = [fault for check in checks if steps for fault in check(steps, config)]
    return [*faults[:2], summary(history, steps)] if steps else []


def at_end(steps: list[dict], name: str, default: float = 0.0) -> float:
    values = [row[name] for row in steps[-min(LAST, (len(steps) + 1) // 2) :] if name in row]
    return sum(values) / len(values) if values else default


def mismatch(steps: list[dict], config) -> list[str]:
    if (kl := at_end(steps, "mismatch/kl")) <= MAX_MISMATCH or config.rollout_correction != "none":
        return []
    trainer = "old_logprobs to trainer and " if config.old_logprobs == "sampler" else ""
    return [
        f"vLLM and the trainer gave the same tokens different probabilities (mismatch/kl {kl:.2g} nats at the end): "
        f"set {trainer}rollout_correction to tis, or use the same precision on both sides."
    ]


def far_updates(steps: list[dict], config) -> list[str]:
    """A few steps do not count, unless they are extreme: a single step at ten times the limit can ruin a policy."""
    trained = [row for row in steps if "kl/approx" in row]
    far = [row for row in trained if row["kl/approx"] > MAX_KL]
    highest = max((row["kl/approx"] for row in far), default=0.0)
    if len(far) < max(2, FREQUENT * len(trained)) and highest <= 10 * MAX_KL:
        return []
    names = ["lr", *["beta1"] * bool(config.spec.has_betas and config.beta1), *["epochs"] * (config.epochs > 1)]
    cure = " or ".join(f"{name} ({getattr(config, name):g})" for name in names)
    cure += ", or take objective ce_gppo, whose beta1 can be lower" if config.objective == "gppo" else ""
    sure = sum(row.get("clip/prob_low", 0.0) for row in far) / len(far)
    unlearned = (
        f" Tokens clipped below had a mean probability of {sure:.2f}: sure tokens were unlearned." if sure > 0.4 else ""
    )
    return [
        f"In {len(far)} of {len(trained)} steps, first in step {far[0]['step']}, the updates moved far from the policy "
        f"that sampled (kl/approx up to {highest:.2g} nats): lower {cure}.{unlearned}"
    ]


def truncation(steps: list[dict], config) -> list[str]:
    if (share := at_end(steps, "response/truncated")) <= MAX_TRUNCATED:
        return []
    first = steps[0].get("response/truncated", share)
    cure = f"raise max_response_tokens ({config.max_response_tokens})"
    if first <= MAX_TRUNCATED:  # it has grown
        cure = f"look in samples.jsonl; if they go on after the answer, lower lr ({config.lr:g}), if not {cure}"
    return [
        f"At the end {share:.0%} of the responses were cut at the length limit, in the first step {first:.0%}: {cure}."
    ]


def no_signal(steps: list[dict], config) -> list[str]:
    right, wrong = (at_end(steps, f"reward/group_solved_{name}") for name in ("all", "none"))
    if right + wrong <= MAX_WITHOUT_SIGNAL or config.advantages == "gae":
        return []
    if config.dynamic_sampling != "off" and at_end(steps, "rollout/unused", 1.0) <= MAX_WITHOUT_SIGNAL:
        return []  # right answers differ in other components of the reward
    cure = "train on harder problems (train_data)"
    if right <= wrong:
        cure = "train on easier problems (train_data), or look in samples.jsonl for right answers that score 0"
    if min(right, wrong) > 0.2:
        cure = f"the answers to one problem hardly differ, so raise temperature ({config.temperature:g})"
    return [f"At the end {right:.0%} of the groups had only right answers, {wrong:.0%} only wrong ones: {cure}."]


def idle_betas(steps: list[dict], config) -> list[str]:
    shares = [row["clip/low"] + row["clip/high"] for row in steps if "clip/low" in row and "clip/high" in row]
    if not shares or config.beta1 is None or (share := sum(shares) / len(shares)) >= MIN_CLIPPED:
        return []
    if len(steps) <= config.warmup_steps:
        cure = f"lr still grew in all {len(steps)} steps (warmup_steps {config.warmup_steps})"
    else:
        cure = f"lower mini_batch_prompts ({config.mini_batch_prompts}) for more updates, or raise lr ({config.lr:g})"
    return [f"The betas did almost nothing, as {share:.2%} of the tokens were outside the clip interval: {cure}."]


def summary(history: list[dict], steps: list[dict]) -> str:
    start, end = steps[0]["entropy/mean"], steps[-1]["entropy/mean"]
    said = f"Entropy went from {start:.3f} to {end:.3f} nats per token"
    accuracies = [accuracy for row in history if (accuracy := mean_accuracy(row)) is not None]
    if len(accuracies) < 2:
        return f"{said}."
    first, last, best = accuracies[0], accuracies[-1], max(accuracies)
    said = f"{said}, and held-out accuracy from {first:.3f} to {last:.3f}"
    if last < best - CHANGED:
        return f"{said}, after {best:.3f} at its best: the policy became worse; lower lr."
    return f"{said}." if last > first + CHANGED else f"{said}: no gain that chance would not explain."


def mean_accuracy(row: dict) -> float | None:
    """avg@k of an evaluation, over all its sources; None for a row without one."""
    values = [value for name, value in row.items() if name.startswith("eval/") and name.endswith("/avg_at_k")]
    return sum(values) / len(values) if values else None
