"""CE-GPPO (arXiv 2509.20712): reinforcement learning with verifiable rewards that controls the policy's entropy.

python train.py                                   the default: a small policy learns a puzzle, on any machine
python train.py --objective grpo --seed 1         every setting below can be given on the command line
python train.py --recipe r1-distill-1.5b          published settings from recipes/; the command line wins over them
python train.py --resume out/<run>                continue a run from its newest checkpoint, with its own settings
torchrun --nproc_per_node 8 train.py              the same on eight GPUs; docs/scaling.md has several machines
"""

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import loss
import reward
from ce_gppo import checkpoint, messages, metrics, parallel, run, tracking
from ce_gppo import ranges as t
from ce_gppo.advantages import ADVANTAGES, Critic, group_advantages
from ce_gppo.batch import Rollout, append, concat, gather, local_batch, micro_batches, pack, with_token_mask
from ce_gppo.config import DYNAMIC_SAMPLING, command, max_batches, parse
from ce_gppo.entropy import betas_of_step, bonus_of_step, first_control, next_control
from ce_gppo.evaluation import evaluate_policy
from ce_gppo.log import Log, plan
from ce_gppo.model import load_policy, load_reference, load_tokenizer
from ce_gppo.perf import Meter, check_memory
from ce_gppo.policy import Policy, repeated, with_old_logprobs, with_reference_logprobs
from ce_gppo.problems import Problem, check_files, load_sets, problems_of_batch, seed_of_step
from ce_gppo.tracking import follow
from rollout import Engine, check_engine, check_mismatch, prepare_environment


@dataclass
class Config:
    """Hyperparameters. In brackets: the paper's value for 7B models, where it differs."""

    # What to train, on what, and where the results go.
    model: t.Name = "data/walk/base"  # folder or hub name of the base policy [DeepSeek-R1-Distill-Qwen-7B]
    train_data: t.Name = "data/walk/train.jsonl"  # problems, JSONL; or several, "a,b" [KlearReasoner-MathSub-30K]
    eval_data: t.Name = "data/walk/eval.jsonl"  # held-out problems, JSONL; or several [AIME24, AIME25]
    out: t.Name = "out"  # folder of the runs
    run_name: t.NameOrEmpty = ""  # its folder in `out`, which the same name continues; empty: objective, seed and time
    rewards: str = ""  # verifiers, "source=verifier,source2=mine.py:score"; empty: by the source's name, else math
    seed: t.Seed = 0  # for the samples and the order of the problems

    # Rollouts.
    steps: t.Count = 60  # rollouts, each followed by several updates
    prompts_per_step: t.Count = 64  # problems per batch of a rollout [256]
    responses_per_prompt: t.Count = 8  # responses to each problem, one group; 1 is enough for gae
    temperature: t.Temperature = 1.0  # sampling temperature; logprobs in training use it too
    max_prompt_tokens: t.Count = 16  # problems with longer prompts are dropped, and counted [4096]
    max_response_tokens: t.Count = 16  # longer responses are cut, and are wrong unless already boxed [16384]
    dynamic_sampling: t.one_of(DYNAMIC_SAMPLING) | None = None  # off; filter groups of equal rewards; or refill
    max_kept_prompts: t.Count = 64  # groups trained on in a step, at most [128]
    system_prompt: str = ""  # instead of a row's own system message; empty: the row as it is, as in the paper
    prompt_suffix: str = ""  # a line after each problem, such as an instruction to box the answer; empty: none
    template_switches: str = ""  # of the model's chat template, such as "enable_thinking=false"
    thinking: bool = False  # count only answers that follow </think>; a response without it scores 0
    overlong: t.Overlong | None = None  # score; mask: no update on cut responses; N: DAPO's penalty, last N tokens

    # Objective. See loss.py.
    objective: t.one_of(loss.OBJECTIVES) = "ce_gppo"  # ce_gppo, grpo, dapo or another of those listed in loss.py
    eps_low: t.ZeroToOne | None = None  # clip interval, below 1; None: 0.2 for most objectives
    eps_high: t.NonNegative | None = None  # clip interval, above 1; None: 0.2 for most objectives
    beta1: t.ZeroToOne | None = None  # gradient kept by NA tokens below the interval; None: 0.75 [1.5B: 0.5]
    beta2: t.ZeroToOne | None = None  # gradient kept by PA tokens above the interval; None: 1.0
    beta_schedule: str = ""  # betas at later steps, "100:0.5,1 200:0,1", linear between; step 1 has beta1, beta2
    entropy_target: t.Positive | None = None  # in nats; a controller moves the betas, or without betas entropy_coef
    dual_clip: t.AboveOne | None = None  # bound on the ratio of negative-advantage tokens; None: off [10 in the script]
    aggregation: t.one_of(loss.AGGREGATIONS) | None = None  # token-mean, seq-mean-token-mean or others of loss.py
    advantages: t.one_of(ADVANTAGES) | None = None  # of groups, see advantages.py; gae: of tokens, by a critic
    kl_coef: t.NonNegative = 0.0  # KL from the model that the run began with, in the loss; gae: in the reward; 0: off
    entropy_coef: t.NonNegative = 0.0  # entropy bonus; the paper compares with one
    positive_nll_coef: t.NonNegative = 0.0  # adds the mean negative log-likelihood of the correct responses [0.1]
    rollout_correction: t.one_of(loss.CORRECTIONS) = "none"  # for vLLM/trainer logprob differences, see loss.py

    # Updates.
    mini_batch_prompts: t.Count = 8  # groups per update; max_kept_prompts / mini_batch_prompts updates an epoch [16]
    epochs: t.Count = 1  # passes over the mini-batches of a rollout, each time the same ones in the same order
    lr: t.Rate = 8e-5  # AdamW learning rate [1e-6]
    critic_lr: t.Rate | None = None  # AdamW learning rate of gae's critic, constant; None: 3 lr
    lora_rank: t.Rank = 0  # of adapters that are trained instead of the weights, see lora.py; 0: off
    lora_alpha: t.Positive = 32.0  # the adapters' factor is lora_alpha / lora_rank
    warmup_steps: t.CountOrZero = 5  # rollouts over which lr grows to its value [10]; gae: after as many for the critic
    max_micro_batch_tokens: t.Count = 16384  # tokens in one pass through the model; bounds the memory
    gradient_checkpointing: bool = False  # recompute the layers in backward: a third more time, far less memory [true]

    # Evaluation and checkpoints.
    eval_every: t.Count = 10  # steps between evaluations; one also before the first step and after the last [5]
    eval_samples: t.Count = 4  # samples per held-out problem, the k of avg@k [32 for AIME]
    eval_response_tokens: t.Count | None = None  # longer responses are cut; None: max_response_tokens [32768]
    eval_temperature: t.GreedyOrTemperature = 1.0  # [0.6]
    eval_top_p: t.Share = 1.0  # [0.95]
    checkpoint_every: t.Count = 20  # steps between checkpoints; one also after the last step

    # Machine. With torchrun (make train GPUS=8) every process has an engine, and its share of the prompts.
    shard: t.one_of(["no", "yes", "offload"]) = "no"  # yes: weights, optimizer over all GPUs; offload: in host memory
    rollout_tp: t.Count = 1  # processes that share one engine, for models too large for one GPU [32B: 2 or 4]
    gpu_memory_utilization: t.Share = 0.5  # share of the GPU's memory for vLLM, which sleeps during the updates

    @property
    def spec(self) -> loss.Spec:
        return loss.OBJECTIVES[self.objective]


ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.1}
MAX_GRAD_NORM = 1.0  # gradients are clipped to it
REWARD_SECONDS = 60.0  # of a batch of responses in the verifiers' processes
MEASURED = 3  # entropy is measured on every third response that is not trained on


def train(config: Config, recipe: str, resume: str, stop: Callable[[], bool]) -> None:
    """The whole run, new or continued. Once `stop()` is true on any rank it saves and returns."""
    with messages.explained("the run cannot start"):
        device = parallel.init()
        files = reward.files(config.rewards)
        folder, last = parallel.rank0_then_broadcast(lambda: run.locate(config, resume, files))
        check_files(config.train_data, config.eval_data)  # before a large model is downloaded
        source = str(last or config.model)
        known, tokenizer = load_tokenizer(source)
        problems, held_out, about = load_sets(config, tokenizer, known, reward.assign, reward.MARKS)
        model = load_policy(config, last, device)
        policy = parallel.distribute(Policy(model), config.shard, model._no_split_modules or [])
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=device == "cuda", **ADAMW)
        critic = Critic(config, source, device) if config.advantages == "gae" else None
        new = checkpoint.State(parallel.rank0_then_broadcast(tracking.new_id), control=first_control(config))
        state = checkpoint.load(last, model, optimizer, critic) if last else new
        models = policy, optimizer, load_reference(config, device, policy), critic
        messages.say(plan(config, folder, model, device, about, state.step))
        context = config.max_prompt_tokens + max(config.max_response_tokens, config.eval_response_tokens)
        check_memory(config, model, device)
        share, ranks = config.gpu_memory_utilization, config.rollout_tp
        engine = Engine(source, tokenizer, context, share, ranks, config.seed, dummy=True)  # check_engine loads weights
        check_engine(engine, model, policy, problems[0].prompt_ids, config, device)
        parallel.rank0_then_broadcast(lambda: run.claim(folder, config, recipe, state.step, files))
        log = Log(folder, config, state, tokenizer, reward.extract_answer) if parallel.is_main() else None
    meter = Meter(model, device, log.doing if log else lambda part: None)
    saver = checkpoint.Saver(folder, model, tokenizer, optimizer, state.step, critic, log.accuracies if log else dict)
    evaluate = partial(evaluate_policy, engine, held_out, config, reward.score, log, meter, stop)

    try:
        evaluate(state.step)  # before the first step, or of a resumed run that was stopped while it evaluated
        while state.step < config.steps and not parallel.any_rank(stop()):
            chosen, rollout = sample(engine, problems, state.batches, config, meter, stop)
            if rollout is None:
                break  # stopped: the rollout is lost, and the resumed run samples it again
            rollout, mini_batches = select(rollout, config)
            objective, lr = objective_of_step(config, state), lr_of_step(config, state.step + 1)
            learned = learn(*models, rollout, mini_batches, objective, lr, state, config, folder, meter)
            with meter("sync"):
                engine.wake(model)
            check_mismatch(report(log, chosen, rollout, mini_batches, learned, state, config, meter), engine.bfloat16)
            if state.step % config.checkpoint_every == 0 or state.step == config.steps or parallel.any_rank(stop()):
                with meter("checkpoint"):
                    saver.save(state)
            if state.step == config.steps:
                saver.finish(state)  # before its evaluation, whose row says that the run is finished
            run.check_end(state, saver, lr)
            evaluate(state.step)  # after saving, as it may take long; a run that is resumed here evaluates first
        saver.finish(state)
    finally:
        if log:
            end = run.End.of(sys.exception(), log.has_evaluation(config.steps), state.step, folder)
            log.close(checkpoint.all_of(folder), end.exit_code, end.sentence)


def sample(
    engine: Engine, problems: list[Problem], batches: int, config: Config, meter: Meter, stop: Callable[[], bool]
) -> tuple[list[Problem], Rollout | None]:
    """(problems, responses to each with their rewards), over all ranks. No rollout once `stop` is true.

    A batch of prompts, or with `refill` several, until max_kept_prompts groups have unequal rewards. batches: how many
    were sampled in earlier steps; problems and seeds follow from it.
    """
    chosen, rollout = [], None
    for batch in range(batches + 1, batches + 1 + max_batches(config)):
        with meter("rollout"):
            new = problems_of_batch(problems, batch, config.prompts_per_step, config.seed)
            own = parallel.round_robin(len(new), config.rollout_tp)  # the prompts of this rank's engine
            scorer = reward.in_background([new[i] for i in own], thinking=config.thinking, budget=REWARD_SECONDS)
            seed = seed_of_step(config.seed, batch, parallel.rank() // config.rollout_tp)
            options = {"max_tokens": config.max_response_tokens, "temperature": config.temperature, "seed": seed}
            leads = parallel.leads(config.rollout_tp)
            options |= {"stop": stop} | ({"on_group": scorer.add} if leads else {})  # verifies the first complete group
            part = engine.generate([new[i].prompt_ids for i in own], config.responses_per_prompt, **options)
            if parallel.any_rank(part is None):
                return [], None
        with meter("reward"):
            limits = config.max_response_tokens, config.overlong
            part = reward.with_rewards(part, scorer.finish(), *limits) if leads else part
            chosen, rollout = chosen + new, append(rollout, gather(part, [p.prompt_ids for p in new], own))
        if reward.unequal(rollout).sum() >= config.max_kept_prompts:
            break
    with meter("rollout"):
        engine.sleep()
    return chosen, rollout


def select(rollout: Rollout, config: Config) -> tuple[Rollout, list[Tensor]]:
    """(the rollout with its advantages, the responses of each mini-batch to train on). Pure."""
    rollout = replace(rollout, index=torch.arange(len(rollout)))
    if config.advantages != "gae":  # the critic sets those, see advantages.py
        advantages = group_advantages(rollout.by_group(rollout.rewards), config.advantages).flatten()  # [B]
        rollout = replace(rollout, advantages=advantages.float()[rollout.sequence])
    used = (reward.unequal(rollout) | (config.dynamic_sampling == "off"))[rollout.prompt_of]  # [B]
    if config.overlong == "mask":  # neither in the loss nor in its denominator
        used &= ~rollout.truncated
    kept = rollout.prompt_of[used].unique()[: config.max_kept_prompts]  # prompts
    parts = math.ceil(len(kept) / config.mini_batch_prompts)
    groups = kept.tensor_split(parts) if parts else []  # prompts of each mini-batch; sizes differ by one at most
    return rollout, [(used & torch.isin(rollout.prompt_of, prompts)).nonzero()[:, 0] for prompts in groups]


def learn(
    policy, optimizer, reference, critic, rollout, mini_batches, objective, lr, state, config: Config, folder, meter
) -> metrics.Learned:
    """An update per mini-batch, which has indices of responses, and epoch. Each rank does its share of every one."""
    passes = config.temperature, config.max_micro_batch_tokens, meter.device
    critic_warmup = config.advantages == "gae" and state.step < config.warmup_steps  # the policy stays as it is
    batches = [local_batch(rollout[rows]) for rows in mini_batches]
    others = local_batch(rollout[rollout.without(mini_batches)[::MEASURED]])  # only for entropy/mean
    with meter("old_logprobs"):
        batches = with_reference_logprobs(reference, batches, *passes) if reference else batches
    with meter("critic") if critic else contextlib.nullcontext():
        batches, values = critic.learn(batches) if critic else (batches, {})
    with meter("old_logprobs"):
        origins = origins_of_old_logprobs(config, len(batches), critic_warmup)
        ahead = [batch for batch, origin in zip(batches, origins, strict=True) if origin == "pass"]
        *ahead, others = with_old_logprobs(policy, [*ahead, others], *passes)
        for i, origin in enumerate(origins):
            if origin == "pass":
                batches[i] = ahead.pop(0)
            if origin == "sampler":
                batches[i] = replace(batches[i], old_logprobs=batches[i].rollout_logprobs)
    updates, follows = [], state.step == 0 or (state.step + 1) % config.eval_every == 0
    with meter("update"), parallel.host_threads():
        for number in range(0 if critic_warmup else len(batches) * config.epochs):
            i = number % len(batches)
            batches[i], done = update(policy, optimizer, batches[i], objective, lr, config, meter.device, follows)
            updates.append(done)
            if run.watch_skipped(folder / "skipped", state, number + 1, batches[i], done, lr):
                break
    parallel.zero_gradients(policy, optimizer)  # no memory for gradients while vLLM samples
    measured = [batch for batch, origin in zip(batches, origins, strict=True) if origin != "sampler"]
    return metrics.Learned(updates, measured, others, values, objective, lr)


def origins_of_old_logprobs(config: Config, count: int, critic_warmup: bool) -> list[str]:
    """Of each of `count` mini-batches: a pass before the updates, vLLM, or its own update, if that is the first one."""
    if critic_warmup or config.spec.token_filter:  # no update; or one that picks tokens before it begins
        return ["pass"] * count
    later = "sampler" if config.rollout_correction == "bypass" else "pass"
    return ["update", *[later] * (count - 1)][:count]  # in the first update the ratio is 1: its pass gives them


def update(
    policy, optimizer, batch: Rollout, objective, lr: float, config: Config, device: str, follows: bool = False
) -> tuple[Rollout, metrics.Update]:
    """One optimizer step on a mini-batch, of which `batch` is this rank's share, perhaps empty. Collective.

    Without old logprobs (or old entropy) the batch gets those of this pass, and is returned with them.
    """
    parallel.zero_gradients(policy, optimizer)
    batch = with_token_mask(batch, config.spec.token_filter)
    totals = loss.Totals(*parallel.all_sum(*loss.totals_of(batch)))  # of the whole mini-batch
    parts, losses, sums, followed = micro_batches(batch, config.max_micro_batch_tokens, repeated(policy)), [], [], []
    for i, part in enumerate(parts):
        packed, part = pack(part, device), part.to(device)
        with parallel.no_sync(policy) if i + 1 < len(parts) else contextlib.nullcontext():
            logprobs, entropy, moment = policy(packed, config.temperature)  # [N] each
            part = part.with_missing(old_logprobs=logprobs.detach(), entropy=entropy.detach())
            part_loss, info = loss.policy_loss(part, logprobs, entropy, objective, totals)
            (part_loss * parallel.world_size()).backward()  # DDP and FSDP2 divide by it
        losses.append(part_loss.item())
        sums.append(metrics.token_sums(part, info, logprobs, entropy, moment, len(packed.packing.order)))
        followed += follow(part, info, logprobs, entropy, moment) if follows else []
        parts[i] = part.to("cpu")
    grad_norm = parallel.clip_gradients(policy, MAX_GRAD_NORM)
    skipped = parallel.any_rank(not math.isfinite(grad_norm + sum(losses)))
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return concat(parts), metrics.Update(metrics.add(sums), sum(losses), grad_norm, skipped, followed)


def report(
    log: Log | None, problems, rollout, mini_batches, learned: metrics.Learned, state: checkpoint.State, config, meter
) -> dict[str, float]:
    """Update the state, and log the step's metrics over all ranks, which it returns. Collective."""
    row, details = metrics.step_metrics(rollout, problems, mini_batches, learned, state.entropy)
    state.batches += len(problems) // config.prompts_per_step
    state.step, state.entropy = state.step + 1, row["entropy/mean"]
    state.no_signal = 0 if mini_batches else state.no_signal + 1
    if config.entropy_target and learned.updates:
        state.control = next_control(config, state.control, state.entropy)
    row |= meter.take(rollout, mini_batches * bool(learned.updates), config.epochs)
    if log:
        log.step(state.step, row, rollout, problems, details)
    return row


def objective_of_step(config: Config, state: checkpoint.State) -> loss.Objective:
    beta1, beta2 = betas_of_step(config, state.step + 1, state.control)
    moved = {"beta1": beta1, "beta2": beta2, "entropy_coef": bonus_of_step(config, state.control)}
    moved |= {"kl_coef": 0.0} if config.advantages == "gae" else {}  # the critic has it in the reward
    fields = {name: getattr(config, name) for name in loss.Objective.__dataclass_fields__ if name != "name"}
    return loss.Objective(config.objective, **fields | moved)


def lr_of_step(config: Config, step: int) -> float:
    """The policy's learning rate: it grows over warmup_steps rollouts (gae: after the critic's warm-up), then stays."""
    step -= config.warmup_steps if config.advantages == "gae" else 0
    return config.lr * min(1.0, max(0, step) / max(1, config.warmup_steps))


def main() -> None:
    prepare_environment()
    tracking.check_wandb()
    train(*parse(Config, sys.argv[1:]), stop=run.StopRequest())


if __name__ == "__main__":
    command(main)
