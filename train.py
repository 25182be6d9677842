"""CE-GPPO (arXiv 2509.20712): reinforcement learning with verifiable rewards that controls the policy's entropy.

python train.py                                   the default: a small policy learns sums, on any machine
python train.py --objective grpo --seed 1         every setting below can be given on the command line
python train.py --recipe r1-distill-1.5b          published settings from recipes/; the command line wins over them
python train.py --resume out/<run>                continue a run from its newest checkpoint, with its own settings
torchrun --nproc_per_node 8 train.py              the same on eight GPUs; docs/scaling.md has several machines
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import loss
import reward
from ce_gppo import checkpoint, corrections, messages, parallel, runs, selection, tracking
from ce_gppo import types as t
from ce_gppo.betas import betas_of_step, bonus_of_step, first_control, lr_of_step, next_control
from ce_gppo.checkpoint import State
from ce_gppo.config import command, parse
from ce_gppo.critic import learn_values, load_critic
from ce_gppo.evaluation import check_engine, evaluate_policy
from ce_gppo.forward import Policy, accumulate_gradients, compute_old_logprobs, flatten, own_share
from ce_gppo.model import load_model, named_weights
from ce_gppo.perf import Meter
from ce_gppo.problems import FILTERS, check_inputs, load_sets, max_batches, problems_of_batch, seed_of_step
from ce_gppo.reference import load_reference, set_reference_logprobs
from ce_gppo.report import Report, plan
from ce_gppo.statistics import MEASURED, check_mismatch, moved_metrics, reward_metrics, step_metrics
from ce_gppo.types import Problem, Response, Update, has_signal, with_advantages
from rollout import Engine, prepare_environment


@dataclass
class Config:
    """Hyperparameters. In brackets: the paper's value for 7B models, where it differs."""

    # What to train, on what, and where the results go.
    model: t.Name = "data/arithmetic/base"  # folder or hub name of the base policy [DeepSeek-R1-Distill-Qwen-7B]
    train_data: t.Name = "data/arithmetic/train.jsonl"  # problems, JSONL; or several, "a,b" [KlearReasoner-MathSub-30K]
    eval_data: t.Name = "data/arithmetic/eval.jsonl"  # held-out problems, JSONL; or several [AIME24, AIME25]
    out: t.Name = "out"  # folder of the runs
    run_name: t.NameOrEmpty = ""  # its folder in `out`; empty: objective, seed and time, or an interrupted run's
    rewards: str = ""  # verifiers, "source=verifier,source2=mine.py:score"; empty: by the source's name, else math
    seed: t.Seed = 0  # for the samples and the order of the problems

    # Rollouts.
    steps: t.Count = 50  # rollouts, each followed by several updates
    prompts_per_step: t.Count = 48  # problems per batch of a rollout [256]
    responses_per_prompt: t.Count = 8  # responses to each problem, one group; 1 is enough for gae
    temperature: t.Temperature = 1.0  # sampling temperature; logprobs in training use it too
    max_prompt_tokens: t.Count = 64  # problems with longer prompts are dropped, and counted [4096]
    max_response_tokens: t.Count = 64  # longer responses are cut, and are wrong unless already boxed [16384]
    filter_groups: t.one_of(FILTERS) | None = None  # on: drop groups of equal rewards; refill: and sample more; or off
    max_kept_prompts: t.Count = 48  # groups trained on in a step, at most [128]
    system_prompt: str = ""  # instead of a row's own system message; empty: the row as it is, as in the paper
    prompt_suffix: str = ""  # a line after each problem, such as an instruction to box the answer; empty: none
    thinking: bool = False  # count only answers that follow </think>; a response without it scores 0
    overlong: t.Overlong | None = None  # score; mask: no update on cut responses; N: DAPO's penalty, last N tokens

    # Objective. See loss.py.
    objective: t.one_of(loss.OBJECTIVES) = "ce_gppo"  # ce_gppo, grpo, dapo or another of those listed in loss.py
    eps_low: t.ZeroToOne | None = None  # clip interval, below 1; None: 0.2 for most objectives
    eps_high: t.NonNegative | None = None  # clip interval, above 1; None: 0.2 for most objectives
    beta1: t.ZeroToOne | None = None  # gradient kept by NA tokens below the interval; None: 0.75 [1.5B: 0.5]
    beta2: t.ZeroToOne | None = None  # gradient kept by PA tokens above the interval; None: 1.0
    beta_schedule: str = ""  # betas at later steps, "100:0.5,1 200:0,1", linear between; step 1 has beta1, beta2
    entropy_target: t.Positive | None = None  # nats per token, held by moving the betas; without betas: entropy_coef
    dual_clip: t.AboveOne | None = None  # bound on the ratio of negative-advantage tokens; None: off [10 in the script]
    aggregation: t.one_of(loss.AGGREGATIONS) | None = None  # token-mean, seq-mean-token-mean or others of loss.py
    advantages: t.one_of([*loss.ADVANTAGES, "gae"]) | None = None  # of groups, see loss.py; gae: a critic's, by token
    kl_coef: t.NonNegative = 0.0  # KL from the model that the run began with, in the loss; gae: in the reward; 0: off
    entropy_coef: t.NonNegative = 0.0  # entropy bonus; the paper compares with one
    positive_nll_coef: t.NonNegative = 0.0  # adds the mean negative log-likelihood of the correct responses [0.1]
    rollout_correction: t.one_of(corrections.KINDS) = "none"  # for vLLM/trainer logprob differences: tis, mask, ...

    # Updates.
    old_logprobs: t.one_of(["trainer", "sampler"]) = "trainer"  # sampler: vLLM's; saves a pass, ratios are less exact
    mini_batch_prompts: t.Count = 6  # groups per update; max_kept_prompts / mini_batch_prompts updates an epoch [16]
    epochs: t.Count = 1  # passes over the mini-batches of a rollout, each time the same ones in the same order
    lr: t.Rate = 5e-5  # AdamW learning rate [1e-6]
    critic_lr: t.Rate | None = None  # AdamW learning rate of gae's critic, constant; None: 3 lr
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
    def spec(self) -> loss.Spec:  # what the program knows about the objective
        return loss.OBJECTIVES[self.objective]


ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.1}
MAX_GRAD_NORM = 1.0  # gradients are clipped to it


# ----------------------------------------------------------------------------------------------------------------------


def train(config: Config, recipe: str, resume: str, stop: Callable[[], bool]) -> None:
    """The whole run, new or continued. Once `stop()` is true on any rank it saves and returns."""
    device = parallel.init()
    folder, last = parallel.rank0_then_broadcast(lambda: runs.locate(config, resume))
    check_inputs(config, reward.check_names)  # before a large model is downloaded
    source = str(last or config.model)
    model, tokenizer = load_model(source, device, config.gradient_checkpointing, config.shard)
    problems, held_out, sizes = load_sets(config, tokenizer, model.config, reward.assign)
    policy = parallel.distribute(Policy(model), config.shard, model._no_split_modules or [])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=device == "cuda", **ADAMW)
    new = State(parallel.rank0_then_broadcast(tracking.new_id), control=first_control(config))
    critic = load_critic(config, source, device)  # None without gae
    state = checkpoint.load(last, model, optimizer, critic) if last else new
    parallel.rank0_then_broadcast(lambda: runs.claim(folder, config, recipe, state.step))
    messages.say(plan(config, folder, model, device, sizes, state.step))
    reference = load_reference(config, device)  # before the engine: only errors until then are told as a start's
    engine = Engine(
        source,
        tokenizer,
        context=config.max_prompt_tokens + max(config.max_response_tokens, config.eval_response_tokens),
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel=config.rollout_tp,
        seed=config.seed,
    )
    check_engine(engine, model, policy, problems[0], config, device)
    log = Report(folder, config, state.step, state.wandb_id, tokenizer) if parallel.is_main() else None
    meter = Meter(model, device)
    saver = checkpoint.Saver(folder, model, tokenizer, optimizer, state.step, critic)
    evaluate = partial(evaluate_policy, engine, held_out, config, reward.score, log, meter, stop)

    try:
        evaluate(state.step)  # before the first step, or of a resumed run that was stopped while it evaluated
        while state.step < config.steps and not parallel.any_rank(stop()):
            step = state.step + 1
            chosen, groups = sample(engine, problems, state.batches, config, meter, stop)
            if not groups:
                break  # stopped: the rollout is lost, and the resumed run samples it again
            groups, mini_batches = select(groups, config)
            set_reference_logprobs(reference, mini_batches, config, meter)
            values = learn_values(critic, mini_batches, config, meter)
            objective = objective_of_step(config, step, state.control)
            lr = lr_of_step(config, step)
            updates = learn(policy, optimizer, groups, mini_batches, objective, lr, state, config, folder, meter)
            with meter("sync"):
                engine.wake(named_weights(model))
            report(log, chosen, groups, mini_batches, updates, values, objective, lr, state, config, meter)
            ends = step == config.steps or state.no_signal >= runs.MAX_NO_SIGNAL
            if step % config.checkpoint_every == 0 or ends or parallel.any_rank(stop()):
                saver.save(state)
            runs.check_signal(state, saver)
            evaluate(step)  # after saving, as it may take long; a run that is resumed here evaluates first
        saver.finish(state)
    finally:
        if log:
            log.close(checkpoint.all_of(folder))
    if parallel.any_rank(stop()):
        messages.say(f'stopped after step {state.step}; continue with: make train ARGS="--resume {folder}"')


# ----------------------------------------------------------------------------------------------------------------------
# A step: sample, select, learn, report


def sample(
    engine: Engine, problems: list[Problem], batches: int, config: Config, meter: Meter, stop: Callable[[], bool]
) -> tuple[list[Problem], list[list[Response]]]:
    """(problems, a group of responses to each, with rewards), over all ranks. Empty once `stop` is true.

    A batch of prompts is sampled, or with `refill` several, until max_kept_prompts groups have a signal (DAPO's dynamic
    sampling). batches: how many were sampled in earlier steps; the problems and seeds of this step follow from it.
    """
    chosen, groups = [], []
    for batch in range(batches + 1, batches + 1 + max_batches(config)):
        with meter("rollout"):
            new = problems_of_batch(problems, batch, config.prompts_per_step, config.seed)
            mine = parallel.round_robin(len(new), config.rollout_tp)  # the prompts of this rank's engine
            scorer = reward.in_background([new[i] for i in mine], thinking=config.thinking, budget=60.0)
            sampled = engine.generate(
                [new[i].prompt_ids for i in mine],
                config.responses_per_prompt,
                max_tokens=config.max_response_tokens,
                temperature=config.temperature,
                seed=seed_of_step(config.seed, batch, parallel.rank() // config.rollout_tp),
                on_group=lambda i, group, scorer=scorer: scorer.add(i, [r.text for r in group]),
                stop=stop,
            )
            if parallel.any_rank(stop()):
                return [], []
        with meter("reward"):
            for group, scores in zip(sampled, scorer.finish(), strict=True):
                for r, parts in zip(group, scores, strict=True):
                    r.parts, r.verdict = parts, float(parts["correctness"] >= 1)
                    penalty = reward.overlong_penalty(len(r.response_ids), config.max_response_tokens, config.overlong)
                    r.reward = sum(parts.values()) + penalty
            chosen, groups = chosen + new, groups + parallel.gather_dealt(sampled, config.rollout_tp)
        if sum(map(has_signal, groups)) >= config.max_kept_prompts:
            break
    with meter("rollout"):
        engine.sleep()
    return chosen, groups


def select(groups: list[list[Response]], config: Config) -> tuple[list[list[Response]], list[list[Response]]]:
    """(the groups with their advantages, the mini-batches to train on). Pure: it does not change its arguments."""
    if config.advantages != "gae":  # the critic sets those, see critic.py
        rewards = torch.tensor([[r.reward for r in group] for group in groups])  # [P, G]
        groups = with_advantages(groups, loss.group_advantages(rewards, config.advantages))
    kept = [group for group in groups if has_signal(group) or config.filter_groups == "off"]
    if config.overlong == "mask":  # neither in the loss nor in its denominator
        kept = [[r for r in group if not r.truncated] for group in kept]
    kept = [group for group in kept if group][: config.max_kept_prompts]
    parts = math.ceil(len(kept) / config.mini_batch_prompts)
    cuts = [len(kept) * i // max(1, parts) for i in range(parts + 1)]  # the sizes differ by one group at most
    return groups, [flatten(kept[a:b]) for a, b in itertools.pairwise(cuts)]


def learn(
    policy: torch.nn.Module, optimizer, groups, mini_batches, objective, lr: float, state: State, config, folder, meter
) -> list[Update]:
    """Compute old logprobs and entropy, then make an update per mini-batch and epoch. Each rank does its share."""
    trained = {id(r) for r in flatten(mini_batches)}
    others = [r for r in flatten(groups) if id(r) not in trained][::MEASURED]  # only for entropy/mean
    *shares, others = (own_share(part) for part in (*mini_batches, others))
    with meter("old_logprobs"):
        # The first update has ratio 1: its own pass gives the old logprobs, unless the objective picks tokens first.
        later = flatten(shares if not lr or config.spec.picks else shares[1:])
        if lr and config.old_logprobs == "sampler":
            for r in later:
                r.old_logprobs = r.rollout_logprobs
            later = []
        pending = {id(r) for r in (*later, *others)}
        pending = [r for r in flatten(groups) if id(r) in pending]  # by group: its prompt is then computed once
        compute_old_logprobs(policy, pending, config.temperature, config.max_micro_batch_tokens, meter.device)
    updates = []
    with meter("update"), parallel.host_threads():
        for share in shares * config.epochs if lr else []:  # lr 0: only the critic learns
            updates.append(update(policy, optimizer, share, objective, lr, config, meter.device))
            runs.watch_skipped(folder / "skipped", state, len(updates), share, updates[-1], config.lr)
    parallel.zero_gradients(policy, optimizer)  # no memory for gradients while vLLM samples
    return updates


def update(policy, optimizer, responses: list[Response], objective, lr: float, config: Config, device: str) -> Update:
    """One optimizer step on a mini-batch, of which `responses` are this rank's share, perhaps none."""
    parallel.zero_gradients(policy, optimizer)
    passes = config.temperature, config.max_micro_batch_tokens, device
    losses, sums, padding = accumulate_gradients(policy, responses, loss_of(responses, objective), *passes)
    grad_norm = parallel.clip_gradients(policy, MAX_GRAD_NORM)
    skipped = parallel.any_rank(not math.isfinite(grad_norm + sum(losses)))
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return Update(sums, losses, grad_norm, skipped, padding)


def loss_of(responses: list[Response], objective: loss.Objective) -> Callable:
    """The loss function for micro-batches of a mini-batch, of which `responses` are this rank's share. Collective.

    It divides by the tokens (or responses) of the whole mini-batch, over all its micro-batches and ranks.
    """
    tokens, correct_tokens, sequences = parallel.all_sum(
        sum(len(r.response_ids) for r in responses),
        sum(len(r.response_ids) for r in responses if r.verdict > 0),
        len(responses),
    )
    selection.choose(responses, loss.OBJECTIVES[objective.name].picks)
    denominator = loss.denominator_of(objective, tokens, sequences)
    return partial(loss.policy_loss, objective=objective, denominator=denominator, correct_tokens=correct_tokens)


def report(
    log: Report | None, problems, groups, mini_batches, updates, values, objective, lr, state: State, config, meter
) -> None:
    """Update the state, and log the step's metrics over all ranks. Collective."""
    metrics = step_metrics(groups, mini_batches, updates, state.entropy) | reward_metrics(groups, problems)
    metrics |= values | {"optim/lr": lr} | moved_metrics(objective, config)
    check_mismatch(metrics, meter.device)
    state.batches += len(groups) // config.prompts_per_step
    state.step, state.entropy = state.step + 1, metrics["entropy/mean"]
    state.no_signal = 0 if mini_batches else state.no_signal + 1
    if config.entropy_target and lr:
        state.control = next_control(config, state.control, state.entropy)
    metrics |= meter.take(groups, (mini_batches * config.epochs)[: len(updates)])
    if log:
        extract = partial(reward.extract_answer, thinking=config.thinking)
        log.log_step(state.step, metrics, groups, mini_batches, problems, extract)


def objective_of_step(config: Config, step: int, control: tuple[float, float]) -> loss.Objective:
    beta1, beta2 = betas_of_step(config, step, control[0])
    fields = {name: getattr(config, name) for name in loss.Objective.__dataclass_fields__ if name != "name"}
    if config.advantages == "gae":
        fields["kl_coef"] = 0.0  # the critic has it in the reward, see critic.py
    moved = {"beta1": beta1, "beta2": beta2, "entropy_coef": bonus_of_step(config, control)}
    return loss.Objective(config.objective, **fields | moved)


def main() -> None:
    prepare_environment()
    train(*parse(Config, sys.argv[1:]), stop=runs.StopRequest())


if __name__ == "__main__":
    command(main)
