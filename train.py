"""CE-GPPO (arXiv 2509.20712): reinforcement learning with verifiable rewards that keeps hold of the policy's entropy.

python train.py                                   the default: a small policy learns sums, on any machine
python train.py --objective grpo --seed 1         every setting below can be given on the command line
"""

import hashlib
import itertools
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import loss
import policy
import settings
from evaluate import evaluate
from prompts import Problem, UserError, check_file, check_thinking, load_problems
from report import Report, Timer, histograms, rollout_metrics, sample_rows, start_run_folder, update_metrics
from reward import overlong_penalty, score
from rollout import Engine, Response


@dataclass
class Config:
    """Hyperparameters. In brackets: the paper's value for 7B models, where it differs."""

    # What to train, on what, and where the results go.
    model: str = "data/arithmetic/base"  # folder or hub name of the base policy [DeepSeek-R1-Distill-Qwen-7B]
    train_data: str = (
        "data/arithmetic/train.jsonl"  # problems to train on, JSONL; several with commas [KlearReasoner-MathSub-30K]
    )
    eval_data: str = "data/arithmetic/eval.jsonl"  # held-out problems, JSONL; several with commas [AIME24, AIME25]
    out: str = "out"  # folder of the runs
    run: str = ""  # name of this run; empty: objective, seed and time of day
    resume: str = ""  # folder of a run to continue from its newest checkpoint; its own settings hold
    seed: int = 0  # of the sampling and of the order of the problems
    wandb_project: str = "ce-gppo"  # project that W&B files the run under

    # Rollouts.
    steps: int = 50  # rollouts, each followed by several updates
    prompts_per_step: int = 64  # problems a rollout [256]
    responses_per_prompt: int = 8  # responses to each problem, one group
    temperature: float = 1.0  # of the sampling; the policy being trained is the one at this temperature
    top_p: float = 1.0  # must be 1: anything else biases the ratio
    top_k: int = 0  # must be 0, that is off, for the same reason
    max_prompt_tokens: int = 64  # problems with longer prompts are dropped, and counted [4096]
    max_response_tokens: int = 64  # longer responses are cut, and count as wrong unless already boxed [16384]
    dynamic_sampling: bool = True  # drop the groups whose rewards are all equal; they teach nothing
    max_kept_prompts: int = 64  # groups trained on at most, of those with unequal rewards [128]
    system_prompt: str = ""  # instead of a row's own system message; empty: the row as it is, as in the paper
    prompt_suffix: str = ""  # a line after each problem, such as an instruction to box the answer; empty: none
    thinking: bool = False  # count only answers that follow </think>; a response without it scores 0
    mask_truncated: bool = False  # no update on truncated responses; they still count in their group's advantages
    overlong_buffer: int | None = None  # tokens before the limit over which DAPO's length penalty grows to -1; 0: none

    # Objective. See loss.py.
    objective: str = "ce_gppo"  # ce_gppo, gppo, grpo, dapo, cispo or gspo
    eps_low: float | None = None  # clip interval, below 1; None: what the objective's paper sets, else 0.2
    eps_high: float | None = None  # clip interval, above 1; None: what the objective's paper sets, else 0.2
    beta1: float = 0.75  # gradient kept by negative-advantage tokens below the interval [1.5B: 0.5]
    beta2: float = 1.0  # gradient kept by positive-advantage tokens above the interval
    beta1_end: float | None = None  # if set, beta1 moves there linearly over the run
    beta2_end: float | None = None  # if set, beta2 moves there linearly over the run
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


# ----------------------------------------------------------------------------------------------------------------------


def train(config: Config) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, checkpoint = settings.run_folder(config), None
    if config.resume:
        folder, checkpoint = Path(config.resume), settings.newest_checkpoint(Path(config.resume))
    for path in f"{config.train_data},{config.eval_data}".split(","):
        check_file(path)  # before a large model is downloaded
    model, tokenizer = policy.load_model(str(checkpoint or config.model), device)
    prompt_settings = config.max_prompt_tokens, config.system_prompt, config.prompt_suffix
    problems, dropped = load_problems(config.train_data, tokenizer, *prompt_settings)
    held_out, held_out_dropped = load_problems(config.eval_data, tokenizer, *prompt_settings)
    if config.thinking:
        check_thinking(tokenizer)
    context = config.max_prompt_tokens + config.max_response_tokens
    if context > (limit := policy.context_of(config.model)):
        raise UserError(f"max_prompt_tokens + max_response_tokens = {context} is beyond the model's context of {limit}")

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.adam_betas, weight_decay=config.weight_decay
    )
    state = {"step": 0}
    if checkpoint:
        state = policy.load_trainer_state(checkpoint, optimizer)
    else:
        start_run_folder(folder, config)
    counts = (len(problems), dropped), (len(held_out), held_out_dropped)
    settings.print_plan(config, folder, model, device, *counts, state["step"])
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

    def run_evaluation() -> dict[str, float]:
        metrics, _ = evaluate(
            engine,
            held_out,
            config.eval_samples,
            max_tokens=config.max_response_tokens,
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            seed=config.seed,
            thinking=config.thinking,
        )
        return {f"eval/{name}": value for name, value in metrics.items()}

    if state["step"] == 0:
        with timer("eval"):
            metrics = run_evaluation()
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
        if config.mask_truncated:
            kept = without_truncated(kept)

        # -- Old logprobs and entropy of every response, under the weights that sampled it
        with timer("old_logprobs"):
            responses = [response for group in groups for response in group]
            policy.measure(model, responses, config.temperature, config.max_micro_batch_tokens, device)
            metrics = rollout_metrics(rewards, responses, report.latest("entropy/mean"))
            check_mismatch(metrics, config)

        # -- Updates: one for each mini-batch of groups
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        beta1, beta2 = betas_of_step(config, step)
        with timer("update"):
            updates = []
            for mini_batch in split_evenly(kept, math.ceil(len(kept) / config.mini_batch_prompts)):
                mini_batch = [response for group in mini_batch for response in group]
                updates.append(update(model, optimizer, mini_batch, lr, beta1, beta2, config, device))
        metrics |= update_metrics(updates) | {"optim/lr": lr, "optim/beta1": beta1, "optim/beta2": beta2}

        # -- Sync: the new weights into vLLM
        with timer("sync"):
            engine.wake(policy.named_weights(model))

        # -- Evaluate, log, checkpoint
        if step % config.eval_every == 0 or step == config.steps:
            with timer("eval"):
                metrics |= run_evaluation()
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
        print(f'stopped by {stop.requested} after step {step}; continue with: make train ARGS="--resume {folder}"')


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


def betas_of_step(config: Config, step: int) -> tuple[float, float]:
    """beta1 and beta2 of this step: constant, or on a line from the first step to the last."""
    progress = (step - 1) / max(1, config.steps - 1)
    beta1_end = config.beta1 if config.beta1_end is None else config.beta1_end
    beta2_end = config.beta2 if config.beta2_end is None else config.beta2_end
    return config.beta1 + progress * (beta1_end - config.beta1), config.beta2 + progress * (beta2_end - config.beta2)


def reward_groups(groups: list[list[Response]], problems: list[Problem], config: Config) -> torch.Tensor:
    """Score every response; returns the rewards, [P, G]."""
    texts = [response.text for group in groups for response in group]
    answers = [problem.answer for problem, group in zip(problems, groups, strict=True) for _ in group]
    scores = iter(score(texts, answers, thinking=config.thinking))
    for group in groups:
        for response in group:
            penalty = overlong_penalty(len(response.response_ids), config.max_response_tokens, config.overlong_buffer)
            response.reward = next(scores) + penalty
    return torch.tensor([[response.reward for response in group] for group in groups])


def without_truncated(groups: list[list[Response]]) -> list[list[Response]]:
    """Neither in the loss nor in its denominator (TRL#6439 forgot the second). A group may vanish."""
    finished = [[response for response in group if not response.truncated] for group in groups]
    return [group for group in finished if group]


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


class StopRequest:
    """Ctrl-C or SIGTERM: the step in hand is finished and saved. A second one ends the program at once."""

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            os._exit(128 + number)  # metrics are on the disk, checkpoints are whole
        self.requested = signal.Signals(number).name
        print(f"\n{self.requested}: finishing this step, then saving; once more to stop at once", file=sys.stderr)


def main() -> None:
    try:
        train(settings.parse(Config, sys.argv[1:]))
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
