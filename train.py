"""CE-GPPO (arXiv 2509.20712): reinforcement learning with verifiable rewards that keeps hold of the policy's entropy.

python train.py                                   the default: a small policy learns sums, on any machine
python train.py --objective grpo --seed 1         every setting below can be given on the command line
"""

import dataclasses
import hashlib
import itertools
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import loss
import policy
from evaluate import evaluate
from prompts import Problem, UserError, load_problems
from report import Report, Timer, histograms, rollout_metrics, sample_rows, start_run_folder
from reward import overlong_penalty, score
from rollout import Engine, Response


@dataclass
class Config:
    """Hyperparameters. In brackets: the paper's value for 7B models, where it differs."""

    # What to train, on what, and where the results go.
    model: str = "data/arithmetic/base"  # folder or hub name of the base policy [DeepSeek-R1-Distill-Qwen-7B]
    train_data: str = "data/arithmetic/train.jsonl"  # problems to train on, JSONL [KlearReasoner-MathSub-30K]
    eval_data: str = "data/arithmetic/eval.jsonl"  # held-out problems, JSONL
    out: str = "out"  # folder of the runs
    run: str = ""  # name of this run; empty: objective, seed and time of day
    resume: str = ""  # folder of a run to continue from its newest checkpoint; its own settings hold
    seed: int = 0  # of the sampling and of the order of the problems
    wandb_project: str = "ce-gppo"

    # Rollouts.
    steps: int = 50  # rollouts, each followed by several updates
    prompts_per_step: int = 64  # problems a rollout [256]
    responses_per_prompt: int = 8  # responses to each problem, one group
    temperature: float = 1.0  # of the sampling; the policy being trained is the one at this temperature
    top_p: float = 1.0  # must be 1: anything else biases the ratio
    max_prompt_tokens: int = 64  # problems with longer prompts are dropped, and counted [4096]
    max_response_tokens: int = 64  # longer responses are cut, and count as wrong unless already boxed [16384]
    dynamic_sampling: bool = True  # drop the groups whose rewards are all equal; they teach nothing
    max_kept_prompts: int = 64  # groups trained on at most, of those with unequal rewards [128]
    overlong_buffer: int | None = None  # tokens before the limit over which DAPO's length penalty grows to -1; 0: none

    # Objective. See loss.py.
    objective: str = "ce_gppo"  # ce_gppo, gppo, grpo, dapo, cispo or gspo
    eps_low: float | None = None  # clip interval, below 1; None: what the objective's paper sets, else 0.2
    eps_high: float | None = None  # clip interval, above 1; None: what the objective's paper sets, else 0.2
    beta1: float = 0.75  # gradient kept by negative-advantage tokens below the interval [1.5B: 0.5]
    beta2: float = 1.0  # gradient kept by positive-advantage tokens above the interval
    beta1_end: float | None = None  # if set, beta1 moves there linearly over the run
    beta2_end: float | None = None  # if set, beta2 moves there linearly over the run
    entropy_target: float | None = None  # nats a token; if set, a controller moves the betas to hold entropy/mean there
    dual_clip: float | None = None  # bound c > 1 on the ratio of negative-advantage tokens; None: off
    aggregation: str | None = None  # token-mean, seq-mean-token-mean or seq-mean-token-sum; None: the paper's
    normalize_std: bool = True  # divide advantages by their group's standard deviation
    entropy_coef: float = 0.0  # entropy bonus; the paper compares with one
    positive_nll_coef: float = 0.0  # adds the mean negative log-likelihood of the correct responses' tokens [0.1]
    rollout_correction: str = "none"  # none, tis or mask: for what vLLM and trainer disagree on
    rollout_correction_cap: float = 2.0  # tis: largest weight; mask: largest ratio of the two, either way

    # Updates.
    mini_batch_prompts: int = 8  # groups an update; a rollout has max_kept_prompts / mini_batch_prompts at most [16]
    lr: float = 1e-4  # AdamW learning rate [1e-6]
    warmup_steps: int = 5  # rollouts over which the learning rate grows to lr, then constant [10]
    weight_decay: float = 0.1  # AdamW
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    max_micro_batch_tokens: int = 16384  # tokens, padding included, in one pass through the model; bounds the memory

    # Evaluation and checkpoints.
    eval_every: int = 10  # steps; also before the first and after the last [5]
    eval_samples: int = 4  # samples a held-out problem, the k of avg@k [32 for AIME]
    eval_temperature: float = 1.0  # [0.6]
    eval_top_p: float = 1.0  # [0.95]
    checkpoint_every: int = 20  # steps; also after the last
    logged_samples: int = 4  # responses a step in samples.jsonl and in W&B

    # Machine.
    gpu_memory_utilization: float = 0.5  # share of the GPU's memory for vLLM, which sleeps during the updates
    cpu_kv_cache_gib: float = 1.0  # GiB for vLLM's cache, without a GPU
    max_mismatch: float = 0.05  # nats; mean gap of the logprobs of vLLM and trainer beyond which the run ends


# What the objectives' papers set where their authors were not silent, for settings that are left at None.
PUBLISHED = {
    "dapo": {"eps_high": 0.28},  # arXiv 2503.14476; and a fifth of the response's limit as overlong buffer
    "cispo": {"eps_low": 1.0},  # arXiv 2506.13585: no lower bound
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4, "aggregation": "seq-mean-token-mean"},  # arXiv 2507.18071
}


def resolve(config: Config) -> Config:
    """The configuration with every None that stands for a published value filled in, checked."""
    values = {"eps_low": 0.2, "eps_high": 0.2, "aggregation": "token-mean"} | PUBLISHED.get(config.objective, {})
    values["overlong_buffer"] = config.max_response_tokens // 5 if config.objective == "dapo" else 0
    unset = {name: value for name, value in values.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **unset)
    check(config)
    return config


def check(config: Config) -> None:
    """UserError, in one sentence, for what cannot be meant."""
    for name, known in (
        ("objective", loss.OBJECTIVES),
        ("aggregation", loss.AGGREGATIONS),
        ("rollout_correction", loss.ROLLOUT_CORRECTIONS),
    ):
        if getattr(config, name) not in known:
            raise UserError(f"{name} '{getattr(config, name)}' is unknown; known: {', '.join(known)}")
    for field in dataclasses.fields(config):
        least = 0 if field.name in ("seed", "overlong_buffer", "warmup_steps", "logged_samples") else 1
        if field.type is int and getattr(config, field.name) < least:
            raise UserError(f"{field.name} = {getattr(config, field.name)}: must be at least {least}")
    if config.responses_per_prompt < 2:
        raise UserError("responses_per_prompt = 1: a group needs at least 2 responses to compare")
    if config.max_kept_prompts > config.prompts_per_step:
        raise UserError(
            f"max_kept_prompts = {config.max_kept_prompts} is more than prompts_per_step = {config.prompts_per_step}"
        )
    if config.max_kept_prompts % config.mini_batch_prompts:
        raise UserError(
            f"mini_batch_prompts = {config.mini_batch_prompts} does not divide max_kept_prompts = "
            f"{config.max_kept_prompts}; updates of equal size are needed"
        )
    if not config.resume and run_folder(config).exists():
        folder = run_folder(config)
        raise UserError(f"{folder} belongs to another run; choose another name with --run, or --resume {folder}")
    if config.top_p != 1.0:
        raise UserError(
            f"top_p = {config.top_p}: rollouts to train on need 1.0, or vLLM samples from a renormalized distribution "
            "and the ratio is biased (eval_top_p is free)"
        )
    for name in ("beta1", "beta2", "beta1_end", "beta2_end"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} = {value}: must be from 0 to 1")
    if config.entropy_target is not None and config.objective != "ce_gppo":
        raise UserError(f"entropy_target moves beta1 and beta2, which objective '{config.objective}' does not have")
    if config.entropy_target is not None and config.entropy_target <= 0:
        raise UserError(f"entropy_target = {config.entropy_target}: must be above 0 nats")
    if config.temperature <= 0:
        raise UserError(f"temperature = {config.temperature}: must be above 0, the policy would have no entropy")


# ----------------------------------------------------------------------------------------------------------------------


def train(config: Config) -> None:
    config = resolve(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = policy.load_model(config.model, device)
    problems, dropped = load_problems(config.train_data, tokenizer, config.max_prompt_tokens)
    held_out, held_out_dropped = load_problems(config.eval_data, tokenizer, config.max_prompt_tokens)
    context = config.max_prompt_tokens + config.max_response_tokens
    if context > (limit := policy.context_of(config.model)):
        raise UserError(f"max_prompt_tokens + max_response_tokens = {context} is beyond the model's context of {limit}")

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.adam_betas, weight_decay=config.weight_decay
    )
    folder, state = Path(config.resume), {"step": 0, "controller": 0.0}
    if config.resume:
        state = policy.load_checkpoint(newest_checkpoint(folder), model, optimizer)
    else:
        folder = run_folder(config)
        start_run_folder(folder, config)
    counts = (len(problems), dropped), (len(held_out), held_out_dropped)
    print_plan(config, folder, model, device, *counts, state["step"])
    engine = Engine(
        config.model,
        tokenizer,
        context=context,
        gpu_memory_utilization=config.gpu_memory_utilization,
        cpu_kv_cache_gib=config.cpu_kv_cache_gib,
        seed=config.seed,
    )
    engine.load_weights(policy.named_weights(model))
    matrix_rate = policy.matrix_rate(device)
    report = Report(folder, config, first_step=state["step"])
    stop = StopRequest()
    timer = Timer(device)
    checkpoint = None

    def run_evaluation(step: int) -> dict[str, float]:
        metrics, _ = evaluate(
            engine,
            held_out,
            config.eval_samples,
            max_tokens=config.max_response_tokens,
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            seed=config.seed,
        )
        return {f"eval/{name}": value for name, value in metrics.items()}

    if state["step"] == 0:
        with timer("eval"):
            metrics = run_evaluation(0)
        report.log(0, metrics | timer.take(), [], {})

    for step in range(state["step"] + 1, config.steps + 1):
        # -- Rollout: a group of responses to each prompt, by vLLM
        with timer("rollout"):
            chosen = problems_of_step(problems, step, config)
            groups = engine.generate(
                [problem.prompt_ids for problem in chosen],
                config.responses_per_prompt,
                max_tokens=config.max_response_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=seed_of_step(config.seed, step),
            )
            engine.sleep()

        # -- Reward: the verifier, and the length penalty if there is one
        with timer("reward"):
            rewards = reward_groups(groups, chosen, config)  # [P, G]

        # -- Advantages, and the groups that have any
        advantages = loss.group_advantages(rewards, config.normalize_std)  # [P, G]
        for group, group_advantages in zip(groups, advantages.tolist(), strict=True):
            for response, advantage in zip(group, group_advantages, strict=True):
                response.advantage = advantage
        keep = (rewards.amax(1) > rewards.amin(1)) | (not config.dynamic_sampling)  # [P]
        kept = list(itertools.compress(groups, keep.tolist()))[: config.max_kept_prompts]

        # -- Old logprobs and entropy of every response, under the weights that sampled it
        with timer("old_logprobs"):
            responses = [response for group in groups for response in group]
            policy.measure(model, responses, config.temperature, config.max_micro_batch_tokens, device)
            metrics = rollout_metrics(rewards, responses, report.latest("entropy/mean"))
            check_mismatch(metrics, config)

        # -- Updates: one for each mini-batch of groups
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        beta1, beta2 = betas_of_step(config, step, metrics["entropy/mean"], state)
        with timer("update"):
            updates = []
            for mini_batch in split_evenly(kept, math.ceil(len(kept) / config.mini_batch_prompts)):
                responses_ = [response for group in mini_batch for response in group]
                updates.append(update(model, optimizer, responses_, lr, beta1, beta2, config, device))
        metrics |= update_metrics(updates) | {"optim/lr": lr, "optim/beta1": beta1, "optim/beta2": beta2}

        # -- Sync: the new weights into vLLM
        with timer("sync"):
            engine.wake(policy.named_weights(model))

        # -- Evaluate, log, checkpoint
        if step % config.eval_every == 0 or step == config.steps or stop.requested:
            with timer("eval"):
                metrics |= run_evaluation(step)
        metrics |= timer.take()
        metrics |= policy.speed(model, responses, [r for group in kept for r in group], metrics, matrix_rate, device)
        report.log(step, metrics, sample_rows(groups, chosen, config.logged_samples), histograms(kept))
        state["step"] = step
        if step % config.checkpoint_every == 0 or step == config.steps or stop.requested:
            checkpoint = folder / f"checkpoint-{step:06d}"
            policy.save_checkpoint(checkpoint, model, tokenizer, optimizer, state)
        if stop.requested:
            break

    report.close(checkpoint)
    if stop.requested:
        print(f"stopped by {stop.requested} after step {step}; continue with: python train.py --resume {folder}")


def update(
    model, optimizer, responses: list[Response], lr: float, beta1: float, beta2: float, config: Config, device: str
) -> dict:
    """One optimizer step on a mini-batch. Its gradient does not depend on how it is cut into micro-batches."""
    tokens = sum(len(r.response_ids) for r in responses)
    positive_tokens = sum(len(r.response_ids) for r in responses if r.advantage > 0)
    denominator = tokens if config.aggregation == "token-mean" else len(responses)
    parts, total_loss = [], 0.0
    optimizer.zero_grad()
    for rows in policy.micro_batches(responses, config.max_micro_batch_tokens):
        batch = policy.collate([responses[i] for i in rows], device)
        logprobs, entropy, S = policy.forward(model, batch, config.temperature)  # [B, T - 1] each
        batch_loss, info = loss.policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.response_mask,
            objective=config.objective,
            eps_low=config.eps_low,
            eps_high=config.eps_high,
            beta1=beta1,
            beta2=beta2,
            dual_clip=config.dual_clip,
            aggregation=config.aggregation,
            denominator=denominator,
            rollout_weights=loss.rollout_correction(
                batch.old_logprobs, batch.rollout_logprobs, config.rollout_correction, config.rollout_correction_cap
            ),
            positive_nll=config.positive_nll_coef * tokens / max(1, positive_tokens),
        )
        if config.entropy_coef:
            bonus = loss.aggregate(entropy, batch.response_mask, config.aggregation, denominator)
            batch_loss = batch_loss - config.entropy_coef * bonus
        batch_loss.backward()
        total_loss += batch_loss.item()
        old = (batch.old_logprobs, batch.old_entropy)
        parts.append(loss.update_sums(info, logprobs, entropy, S, *old, batch.advantages, batch.response_mask))
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
    finite = math.isfinite(grad_norm) and math.isfinite(total_loss)
    if finite:
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        optimizer.step()
    return {"sums": loss.add_sums(parts), "loss": total_loss, "grad_norm": grad_norm, "skipped": not finite}


# ----------------------------------------------------------------------------------------------------------------------


def problems_of_step(problems: list[Problem], step: int, config: Config) -> list[Problem]:
    """The step's prompts: the data in a new order every epoch, a function of seed and step alone."""
    chosen, order, epoch = [], None, None
    for position in range((step - 1) * config.prompts_per_step, step * config.prompts_per_step):
        if position // len(problems) != epoch:
            epoch = position // len(problems)
            generator = torch.Generator().manual_seed(seed_of_step(config.seed, -1 - epoch))
            order = torch.randperm(len(problems), generator=generator).tolist()
        chosen.append(problems[order[position % len(problems)]])
    return chosen


def seed_of_step(seed: int, step: int) -> int:
    """A seed for this step alone, so that a resumed run samples what the uninterrupted one would have."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:4], "little")


def reward_groups(groups: list[list[Response]], problems: list[Problem], config: Config) -> torch.Tensor:
    """Score every response; returns the rewards, [P, G]."""
    texts = [response.text for group in groups for response in group]
    answers = [problem.answer for problem, group in zip(problems, groups, strict=True) for _ in group]
    scores = iter(score(texts, answers))
    for group in groups:
        for response in group:
            penalty = overlong_penalty(len(response.response_ids), config.max_response_tokens, config.overlong_buffer)
            response.reward = next(scores) + penalty
    return torch.tensor([[response.reward for response in group] for group in groups])


def split_evenly(items: list, parts: int) -> list[list]:
    """Consecutive parts whose lengths differ by one at most: no last, tiny, noisy mini-batch."""
    cuts = [len(items) * i // parts for i in range(parts + 1)] if parts else [0]
    return [items[a:b] for a, b in itertools.pairwise(cuts)]


def check_mismatch(metrics: dict[str, float], config: Config) -> None:
    """vLLM and trainer hold the same weights, so their logprobs must agree; if not, the weights did not arrive."""
    if not metrics["mismatch/mean"] <= config.max_mismatch:
        raise RuntimeError(
            f"the logprobs of vLLM and trainer differ by {metrics['mismatch/mean']:.3g} nats on average, more than "
            f"max_mismatch = {config.max_mismatch}: they do not hold the same weights, or not in the same precision"
        )


def betas_of_step(config: Config, step: int, entropy: float, state: dict) -> tuple[float, float]:
    """beta1 and beta2 of this step: constant, linear over the run, or held by the entropy controller.

    The controller is proportional and integral in the relative error e = (target - entropy) / target:
        integral <- clip(integral + 0.1 e, -1, 1)        the only state; it is part of the checkpoint
        u = clip(integral + e, -1, 1)
        beta1 = min(1, 1 - u),  beta2 = min(1, 1 + u)
    u = 1 keeps only what raises entropy (PA&LP), u = -1 only what lowers it (NA&LP), u = 0 both. It can do no more than
    that: betas act on clipped tokens alone, and what all the other tokens do to the entropy is beyond its reach.
    """
    if config.entropy_target is not None:
        error = (config.entropy_target - entropy) / config.entropy_target
        state["controller"] = min(1.0, max(-1.0, state["controller"] + 0.1 * error))
        u = min(1.0, max(-1.0, state["controller"] + error))
        return min(1.0, 1 - u), min(1.0, 1 + u)
    progress = (step - 1) / max(1, config.steps - 1)
    beta1_end = config.beta1 if config.beta1_end is None else config.beta1_end
    beta2_end = config.beta2 if config.beta2_end is None else config.beta2_end
    return config.beta1 + progress * (beta1_end - config.beta1), config.beta2 + progress * (beta2_end - config.beta2)


BY_UPDATE = ("clip/low", "clip/high", "weight/low", "weight/high", "ratio/min", "ratio/max", "kl/old")


def update_metrics(updates: list[dict]) -> dict[str, float]:
    """A step's updates as one: means over all their tokens, then the same shares by index of the update."""
    metrics = {"optim/updates": len(updates), "optim/skipped": sum(u["skipped"] for u in updates)}
    if not updates:  # no group had unequal rewards
        return metrics
    metrics |= loss.update_metrics(loss.add_sums([u["sums"] for u in updates]))
    metrics["optim/loss"] = sum(u["loss"] for u in updates) / len(updates)
    metrics["optim/grad_norm"] = sum(u["grad_norm"] for u in updates) / len(updates)
    for index, one in enumerate(updates, start=1):
        by_update = loss.update_metrics(one["sums"])
        metrics |= {f"update_{index}/{k.replace('/', '_')}": v for k, v in by_update.items() if k in BY_UPDATE}
    return metrics


class StopRequest:
    """Ctrl-C or SIGTERM: the step in hand is finished and saved. A second one ends the program at once."""

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            sys.exit(128 + number)
        self.requested = signal.Signals(number).name
        print(f"\n{self.requested}: finishing this step, then saving; once more to stop at once", file=sys.stderr)


def run_folder(config: Config) -> Path:
    return Path(config.out) / (config.run or f"{config.objective}-seed{config.seed}-{time.strftime('%m%d-%H%M%S')}")


def newest_checkpoint(folder: Path) -> Path:
    checkpoints = sorted(folder.glob("checkpoint-[0-9]*[0-9]"))
    if not checkpoints:
        raise UserError(f"--resume {folder}: no checkpoint there to continue from")
    return checkpoints[-1]


def resumed_config(folder: str) -> Config:
    """The settings of the run in `folder`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"--resume {folder}: no config.json there, so it is not the folder of a run")
    saved = json.loads(path.read_text())["config"]
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := saved.keys() - known:
        raise UserError(f"{path}: unknown settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return Config(**saved | {"adam_betas": tuple(saved["adam_betas"]), "resume": folder})


def print_plan(config: Config, folder: Path, model, device: str, train_counts, eval_counts, start: int) -> None:
    """The derived sizes, before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    sequences = config.prompts_per_step * config.responses_per_prompt
    print(
        f"run          {folder}" + (f", continued after step {start}" if start else "") + "\n"
        f"model        {config.model}, {parameters / 1e6:,.2f} M parameters, on {device}\n"
        f"data         {train_counts[0]} training and {eval_counts[0]} held-out problems "
        f"({train_counts[1]} and {eval_counts[1]} dropped: prompt longer than {config.max_prompt_tokens} tokens)\n"
        f"objective    {config.objective}, beta1 {config.beta1}, beta2 {config.beta2}, "
        f"clip interval [{1 - config.eps_low:g}, {1 + config.eps_high:g}]\n"
        f"step         {config.prompts_per_step} prompts x {config.responses_per_prompt} = {sequences} responses, "
        f"then up to {config.max_kept_prompts // config.mini_batch_prompts} updates of "
        f"{config.mini_batch_prompts * config.responses_per_prompt} responses; {config.steps} steps",
        flush=True,
    )


def parse(arguments: list[str]) -> Config:
    """The command line as a Config. An unknown setting is an error that lists the known ones."""
    known = {field.name for field in dataclasses.fields(Config)}
    for argument in arguments:
        name = argument.removeprefix("--").removeprefix("no-").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known | {"help"}:
            raise UserError(f"unknown setting {argument}; known: {', '.join(sorted(known))}")
    config = tyro.cli(Config, args=arguments, description=__doc__)
    return resumed_config(config.resume) if config.resume else config


def main() -> None:
    try:
        config = parse(sys.argv[1:])
        train(config)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
