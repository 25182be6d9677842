"""CE-GPPO (arXiv 2509.20712): reinforcement learning with verifiable rewards that keeps hold of the policy's entropy.

python train.py                                   the default: a small policy learns sums, on any machine
python train.py --objective grpo --seed 1         every setting below can be given on the command line
torchrun --nproc_per_node 8 train.py              the same on eight GPUs; README.md has several machines
python train.py --recipe r1-distill-1.5b          published settings from recipes/
"""

import contextlib
import hashlib
import itertools
import math
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import checkpoint
import loss
import packing
import policy
import ranks
import settings
from evaluate import accuracy, evaluate
from faults import RunEnded, StopRequest, save_skipped
from prompts import Problem, UserError, check_file, check_thinking, load_problems
from report import (
    Report,
    Timer,
    histograms,
    rollout_metrics,
    rollout_values,
    sample_rows,
    start_run_folder,
    update_metrics,
)
from reward import BackgroundScorer, overlong_penalty
from rollout import Engine, Response


@dataclass
class Config:
    """Hyperparameters. In brackets: the paper's value for 7B models, where it differs."""

    # What to train, on what, and where the results go.
    model: str = "data/arithmetic/base"  # folder or hub name of the base policy [DeepSeek-R1-Distill-Qwen-7B]
    train_data: str = "data/arithmetic/train.jsonl"  # problems, JSONL; several with commas [KlearReasoner-MathSub-30K]
    eval_data: str = "data/arithmetic/eval.jsonl"  # held-out problems, JSONL; several with commas [AIME24, AIME25]
    recipe: str = ""  # file in recipes/ whose values take the place of these defaults; the command line's win
    out: str = "out"  # folder of the runs
    run_name: str = ""  # of this run; empty: objective, seed and time, or go on with an interrupted one
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
    entropy_target: float | None = None  # nats; if set, the betas move within [0, beta1] and [0, beta2] to hold it
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
    max_micro_batch_tokens: int = 16384  # tokens in one pass through the model; bounds the memory
    gradient_checkpointing: bool = False  # recompute the layers in backward: a third more time, far less memory [true]

    # Evaluation and checkpoints.
    eval_every: int = 10  # steps; also before the first and after the last [5]
    eval_samples: int = 4  # samples a held-out problem, the k of avg@k [32 for AIME]
    eval_temperature: float = 1.0  # [0.6]
    eval_top_p: float = 1.0  # [0.95]
    checkpoint_every: int = 20  # steps; also after the last
    keep_checkpoints: int = 2  # the newest ones; older ones are removed
    on_failed_checkpoint: str = "continue"  # or stop: what a full disk does to the run
    max_skipped_updates: int = 5  # updates in a row whose gradient is not finite, before the run ends
    max_silent_rollouts: int = 20  # rollouts in a row without a group of unequal rewards, before the run ends
    logged_samples: int = 4  # responses a step in samples.jsonl and in W&B

    # Machine. With torchrun (make train GPUS=8) every process has an engine, and its share of the prompts.
    shard: bool = False  # FSDP2 instead of DDP: weights, gradients and optimizer spread over all processes
    rollout_tp: int = 1  # processes that share one engine, for models too large for one GPU [32B: 2 or 4]
    gpu_memory_utilization: float = 0.5  # share of the GPU's memory for vLLM, which sleeps during the updates
    cpu_kv_cache_gib: float = 1.0  # GiB for vLLM's cache, without a GPU
    max_mismatch: float = 0.05  # nats; mean gap of the logprobs of vLLM and trainer beyond which the run ends


# ----------------------------------------------------------------------------------------------------------------------


def train(config: Config) -> None:
    stop = StopRequest()
    device = ranks.start()
    folder, last = ranks.first(lambda: settings.locate(config))
    settings.check_ranks(config)
    for path in f"{config.train_data},{config.eval_data}".split(","):
        check_file(path)  # before a large model is downloaded
    where = "cpu" if config.shard and ranks.world() > 1 else device  # shards go to their devices by themselves
    model, tokenizer = policy.load_model(str(last or config.model), where, config.gradient_checkpointing)
    prompt_settings = config.max_prompt_tokens, config.system_prompt, config.prompt_suffix
    problems, dropped = load_problems(config.train_data, tokenizer, *prompt_settings)
    held_out, held_out_dropped = load_problems(config.eval_data, tokenizer, *prompt_settings)
    if config.thinking:
        check_thinking(tokenizer)
    context = config.max_prompt_tokens + config.max_response_tokens
    if context > (limit := policy.context_of(config.model)):
        raise UserError(f"max_prompt_tokens + max_response_tokens = {context} is beyond the model's context of {limit}")

    actor = policy.distribute(model, config.shard)  # `model` over all ranks; its weights are those of `model`
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.adam_betas, weight_decay=config.weight_decay
    )
    state = {
        "step": 0,
        "entropy": None,  # of the last rollout
        "control": (0.5, 0.0),  # of the entropy controller: u, relative error
        "skipped": 0,  # updates without a finite gradient, in a row
        "silent": 0,  # rollouts without any group that teaches, in a row
        "wandb_id": ranks.first(lambda: secrets.token_hex(4)),
    }
    if last:
        state = checkpoint.load(last, model, optimizer)
    ranks.first(lambda: settings.claim(folder))
    if ranks.is_main():
        if not last:
            start_run_folder(folder, config)
        counts = (len(problems), dropped), (len(held_out), held_out_dropped)
        settings.print_plan(config, folder, model, device, *counts, state["step"])
    engine = Engine(
        config.model,
        tokenizer,
        context=context,
        gpu_memory_utilization=config.gpu_memory_utilization,
        cpu_kv_cache_gib=config.cpu_kv_cache_gib,
        tensor_parallel=config.rollout_tp,
        seed=config.seed,
    )
    engine.load_weights(policy.named_weights(model))
    matrix_rate = policy.matrix_rate(device)
    report = Report(folder, config, state) if ranks.is_main() else None
    timer = Timer(device)

    def run_evaluation(stop=False) -> dict[str, float]:
        sampled, mine = shares(len(held_out), config)
        _, groups = evaluate(
            engine,
            [held_out[i] for i in sampled],
            config.eval_samples,
            max_tokens=config.max_response_tokens,
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            seed=config.seed + ranks.rank() // config.rollout_tp,
            stop=stop,
            thinking=config.thinking,
        )
        if ranks.any_of(bool(stop)):
            return {}
        verdicts = {i: [response.reward for response in group] for i, group in zip(sampled, groups, strict=True)}
        graded = [(held_out[i].source, verdicts[i]) for i in mine]
        return {f"eval/{name}": value for name, value in accuracy(flatten(ranks.gather(graded))).items()}

    def save_checkpoint() -> None:
        path = folder / f"checkpoint-{state['step']:06d}"
        try:
            checkpoint.save(path, model, tokenizer, optimizer, state)
        except OSError as error:
            if config.on_failed_checkpoint == "stop":
                raise RunEnded(f"checkpoint not written: {error}") from None
            if ranks.is_main():
                print(f"WARNING: checkpoint not written, training goes on: {error}", file=sys.stderr)
        else:
            if ranks.is_main():
                checkpoint.prune(folder, config.keep_checkpoints)

    if state["step"] == 0:
        with timer("eval"):
            metrics = run_evaluation(stop)
        if report and metrics:
            report.log(0, metrics | timer.take(), [], {})

    for step in range(state["step"] + 1, config.steps + 1):
        # -- Rollout: a group of responses to each prompt, by vLLM; the verifier begins with the first complete group
        with timer("rollout"):
            chosen = problems_of_step(problems, step, config)
            sampled, mine = shares(len(chosen), config)  # indices: what this rank's engine samples, what it trains on
            scorer = BackgroundScorer([chosen[i].answer for i in sampled], thinking=config.thinking)
            groups = engine.generate(
                [chosen[i].prompt_ids for i in sampled],
                config.responses_per_prompt,
                max_tokens=config.max_response_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=seed_of_step(config.seed, step, ranks.rank() // config.rollout_tp),
                on_group=scorer.add,
                stop=stop,
            )
            if ranks.any_of(stop.requested):
                break  # the rollout is lost, not the policy: the resumed run samples it again
            engine.sleep()

        # -- Reward: the verifier's verdicts, and the penalty for length if there is one
        with timer("reward"):
            verdicts = dict(zip(sampled, scorer.finish(), strict=True))
            groups = {i: group for i, group in zip(sampled, groups, strict=True) if i in mine}
            rewards = reward_groups(groups, verdicts, config)  # [P, G]

        # -- Advantages, and the groups that have any
        advantages = loss.group_advantages(rewards, config.normalize_std)  # [P, G]
        for group, group_advantages in zip(groups.values(), advantages.tolist(), strict=True):
            for response, advantage in zip(group, group_advantages, strict=True):
                response.advantage = advantage
        teaches = (rewards.amax(1) > rewards.amin(1)) | (not config.dynamic_sampling)  # [P]
        trained = {i: without_truncated(group) if config.mask_truncated else group for i, group in groups.items()}
        kept = [i for i, group in trained.items() if group and teaches[mine.index(i)]]
        kept = sorted(flatten(ranks.gather(kept)))[: config.max_kept_prompts]  # of all ranks
        mini_batches = [
            flatten(trained[i] for i in part if i in trained)
            for part in split_evenly(kept, math.ceil(len(kept) / config.mini_batch_prompts))
        ]

        # -- Old logprobs and entropy of every response, under the weights that sampled it. The first mini-batch needs
        # no pass of its own: its update begins with the same weights.
        with timer("old_logprobs"):
            responses = flatten(groups.values())
            first = {id(response) for response in mini_batches[0]} if mini_batches else set()
            others = [response for response in responses if id(response) not in first]
            policy.measure(actor, others, config.temperature, config.max_micro_batch_tokens, device)

        # -- Updates: one for each mini-batch of groups
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        beta1, beta2 = betas_of_step(config, step, state["control"])
        with timer("update"):
            updates = []
            for mini_batch in mini_batches:
                updates.append(update(actor, optimizer, mini_batch, lr, beta1, beta2, config, device))
                state["skipped"] = state["skipped"] + 1 if updates[-1]["skipped"] else 0
                if updates[-1]["skipped"]:
                    save_skipped(folder / "skipped", step, len(updates), mini_batch, updates[-1])
                if state["skipped"] >= config.max_skipped_updates:
                    raise RunEnded(
                        f"{state['skipped']} updates in a row had no finite gradient; {folder / 'skipped'} has what "
                        f"they saw, and a lower lr than {config.lr:g} may help"
                    )

        # -- Sync: the new weights into vLLM
        with timer("sync"):
            engine.wake(policy.named_weights(model))

        # -- What it all came to, over all ranks
        metrics = rollout_metrics(ranks.gather(rollout_values(rewards, responses)), state["entropy"])
        check_mismatch(metrics, config)
        metrics |= update_metrics(ranks.gather(updates)) | {"optim/lr": lr, "optim/beta1": beta1, "optim/beta2": beta2}
        state["step"], state["entropy"] = step, metrics["entropy/mean"]
        state["silent"] = 0 if kept else state["silent"] + 1
        if config.entropy_target:
            state["control"] = loss.steer(state["control"], metrics["entropy/mean"], config.entropy_target)

        # -- Evaluate, log, checkpoint
        if step % config.eval_every == 0 or step == config.steps:
            with timer("eval"):
                metrics |= run_evaluation()
        metrics |= timer.take()
        sampled_tokens, *work = ranks.total(sum(len(r.response_ids) for r in responses), *policy.work_of(mini_batches))
        metrics |= policy.speed(model, sampled_tokens, work, metrics, matrix_rate, device)
        if report:
            samples = sample_rows(groups, chosen, config.logged_samples, config.thinking)
            report.log(step, metrics, samples, histograms(flatten(mini_batches)))
        stopping = ranks.any_of(stop.requested)
        if step % config.checkpoint_every == 0 or step == config.steps or stopping:
            save_checkpoint()
        if state["silent"] >= config.max_silent_rollouts:
            raise RunEnded(
                f"{state['silent']} rollouts in a row had no group with unequal rewards (reward/mean is "
                f"{metrics['reward/mean']:.2f}): nothing can be learned; choose easier or harder problems, more "
                "responses_per_prompt, or look at samples.jsonl for answers that the verifier does not find"
            )
        if stopping:
            break

    if state["step"] and not (folder / f"checkpoint-{state['step']:06d}").exists():
        save_checkpoint()
    if report:
        report.close(checkpoint.all_of(folder))
        if stop.requested:
            print(
                f"stopped by {stop.requested} after step {state['step']}; continue with: "
                f'make train ARGS="--resume {folder}"'
            )


def update(
    actor: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    responses: list[Response],
    lr: float,
    beta1: float,
    beta2: float,
    config: Config,
    device: str,
) -> dict:
    """One optimizer step on a mini-batch, of which `responses` are this rank's share, perhaps none.

    Its gradient does not depend on how the mini-batch is cut into ranks and micro-batches: all are divided by the same
    count of tokens (or responses). The loss and the sums returned are this rank's, the gradient's norm is that of all.
    """
    own_tokens = sum(len(r.response_ids) for r in responses)
    own_positive_tokens = sum(len(r.response_ids) for r in responses if r.advantage > 0)
    tokens, positive_tokens, sequences = ranks.total(own_tokens, own_positive_tokens, len(responses))
    denominator = tokens if config.aggregation == "token-mean" else sequences
    parts, losses, places = [], [], 0
    optimizer.zero_grad()
    batches = policy.even_passes(packing.micro_batches(responses, config.max_micro_batch_tokens))
    for index, rows in enumerate(batches, start=1):
        micro_batch = [responses[i] for i in rows]
        batch = packing.collate(micro_batch, device)
        with policy.gradients_stay_here(actor) if index < len(batches) else contextlib.nullcontext():
            logprobs, entropy, S = actor(batch, config.temperature)  # [B, R] each
            if micro_batch and micro_batch[0].old_logprobs is None:  # the first update of a rollout
                policy.remember(micro_batch, logprobs, entropy, batch.response_mask)
                batch.old_logprobs, batch.old_entropy = logprobs.detach(), entropy.detach()
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
            (batch_loss * ranks.world()).backward()  # DDP and FSDP will divide by it
        losses.append(batch_loss.item())
        places += len(batch.packing.order) if micro_batch else 0
        old = (batch.old_logprobs, batch.old_entropy)
        parts.append(loss.update_sums(info, logprobs, entropy, S, *old, batch.advantages, batch.response_mask))
    grad_norm = policy.clip_gradients(actor, config.max_grad_norm)
    finite = not ranks.any_of(not math.isfinite(grad_norm + sum(losses)))
    if finite:
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        optimizer.step()
    return {
        "sums": loss.add_sums(parts),
        "loss": sum(losses),
        "micro_batch_losses": losses,
        "grad_norm": grad_norm,
        "skipped": not finite,
        "padding": 1 - policy.work_of([responses])[0] / places if places else 0.0,
    }


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


def seed_of_step(seed: int, step: int, engine: int = 0) -> int:
    """A seed for this step alone, so that a resumed run samples what the uninterrupted one would have."""
    text = f"{seed} {step}" + (f" {engine}" if engine else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def shares(count: int, config: Config) -> tuple[list[int], list[int]]:
    """Of `count` prompts the indices that this rank's engine samples, and of those the ones that are this rank's own.

    Dealt like cards, so that the first ones are spread over all. The ranks of one engine (rollout_tp) sample alike.
    """
    engines = ranks.world() // config.rollout_tp
    sampled = list(range(ranks.rank() // config.rollout_tp, count, engines))
    return sampled, sampled[ranks.rank() % config.rollout_tp :: config.rollout_tp]


def betas_of_step(config: Config, step: int, control: tuple[float, float]) -> tuple[float, float]:
    """beta1 and beta2 of this step: steered, constant, or on a line from the first step to the last."""
    if config.entropy_target:
        return loss.steered_betas(control[0], config.beta1, config.beta2)
    progress = (step - 1) / max(1, config.steps - 1)
    beta1_end = config.beta1 if config.beta1_end is None else config.beta1_end
    beta2_end = config.beta2 if config.beta2_end is None else config.beta2_end
    return config.beta1 + progress * (beta1_end - config.beta1), config.beta2 + progress * (beta2_end - config.beta2)


def reward_groups(groups: dict[int, list[Response]], verdicts: dict[int, list[float]], config: Config) -> torch.Tensor:
    """The verifier's scores plus DAPO's penalty for length, if set; returns the rewards, [P, G]."""
    for i, group in groups.items():
        for response, verdict in zip(group, verdicts[i], strict=True):
            penalty = overlong_penalty(len(response.response_ids), config.max_response_tokens, config.overlong_buffer)
            response.reward = verdict + penalty
    return torch.tensor([[response.reward for response in group] for group in groups.values()])


def flatten(groups: Iterable[list]) -> list:
    return [item for group in groups for item in group]


def without_truncated(group: list[Response]) -> list[Response]:
    """Neither in the loss nor in its denominator (TRL#6439 forgot the second). Nothing may be left."""
    return [response for response in group if not response.truncated]


def split_evenly(items: list, parts: int) -> list[list]:
    """Consecutive parts whose lengths differ by one at most: no last, tiny, noisy mini-batch."""
    cuts = [len(items) * i // parts for i in range(parts + 1)] if parts else [0]
    return [items[a:b] for a, b in itertools.pairwise(cuts)]


def check_mismatch(metrics: dict[str, float], config: Config) -> None:
    """vLLM and trainer hold the same weights, so their logprobs must agree; if not, the weights did not arrive."""
    if not metrics["mismatch/mean"] <= config.max_mismatch:
        raise RunEnded(
            f"the logprobs of vLLM and trainer differ by {metrics['mismatch/mean']:.3g} nats on average, more than "
            f"max_mismatch = {config.max_mismatch}: they do not hold the same weights, or not in the same precision"
        )


def main() -> None:
    try:
        train(settings.parse(Config, sys.argv[1:]))
    except (UserError, RunEnded) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    record(main)() if ranks.world() > 1 else main()  # so that torchrun shows the error of the rank that failed
