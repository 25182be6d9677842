"""Measure how each setting changes entropy in one step, from the same state and the same rollout.

make branch RUN=out/<run>                                 from the run's newest checkpoint, with its own settings
make branch RUN=out/<run>/checkpoint-000040 BRANCHES=10 EVERY=5
make branch ARGS="--objective grpo"                       from a model, with a fresh optimizer; train.py's settings

A branch takes the state of a run before a step, with its optimizer, and that step's rollout. It trains the step once
under each setting, each time from this state, and measures the changes on the same tokens. Then the run continues with
its own setting, up to the next branch. One process, one device. Writes a JSONL file with a line per branch and setting,
a table, and a figure. Further runs add to the same file. All other arguments are train.py's settings.
"""

import json
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import tyro
from scipy import stats
from tqdm import tqdm

import reward
import train
from ce_gppo import checkpoint, parallel
from ce_gppo import ranges as t
from ce_gppo.batch import Rollout, micro_batches, pack
from ce_gppo.checkpoint import State
from ce_gppo.config import command, parse, resolve
from ce_gppo.entropy import entropy_velocity, first_control, quadrants
from ce_gppo.evaluation import evaluate
from ce_gppo.messages import UserError
from ce_gppo.metrics import step_metrics
from ce_gppo.model import load_model
from ce_gppo.perf import Meter
from ce_gppo.policy import Policy, with_old_logprobs
from ce_gppo.problems import load_sets
from ce_gppo.run import open_to_append
from results import draw
from results.draw import BASELINE, OWN, SAME
from results.settings import BRANCHED, SETTINGS
from rollout import Engine, prepare_environment

PUBLISHED = "objective eps_low eps_high beta1 beta2 beta_schedule entropy_target dual_clip aggregation advantages "
PUBLISHED += "kl_coef entropy_coef"  # a setting has its objective's own values of these, not the run's


@dataclass
class Options:
    run: str | None = None  # folder of a run, or of one of its checkpoints
    branches: t.Count = 1  # number of branches
    every: t.Count = 5  # steps from one branch to the next
    held_out: t.Count = 64  # held-out problems, with four responses each
    settings: tuple[t.one_of(SETTINGS), ...] = BRANCHED  # grpo is always added
    results: Path = Path("out/branches/branches.jsonl")  # file to add to
    draw: bool = False  # only make table and figure, of the results in the file


def variant(config: train.Config, changes: dict) -> train.Config:
    """The run's configuration under another objective, whose published values replace the run's."""
    defaults = {field.name: field.default for field in fields(config) if field.name in PUBLISHED.split()}
    return resolve(replace(config, **defaults | changes))


def branch(learner, settings: dict, problems: list, rollout: Rollout, held_out: Rollout, state: State, *place):
    """A row for each setting. After each row the weights and the optimizer are as before, bit by bit.

    rollout: of the step, with rewards, as train.sample gives it. state: before the step. place: folder and meter.

    delta/*       change of mean entropy, nats: of all tokens of the rollout, of its trained tokens by quadrant, of the
                  tokens of held-out problems' responses
    linear/*      delta/*, predicted to first order from the step in the weights: <gradient of entropy, step>
    logprob/*     change of mean logprob, nats per token, of right and of wrong held-out responses
    kl/*          of the old policy to the new one, nats per token (k3)
    predicted/*   the updates' own velocity/*, clip/* and kl/approx, as a run logs them
    rank/tokens   rank correlation, over the trained tokens, of their entropy velocity in a first update with the
                  change of their entropy
    """
    policy, optimizer, *_ = learner
    config, device = next(iter(settings.values())), place[1].device
    passes = config.temperature, config.max_micro_batch_tokens, device
    snapshot = deepcopy((policy.state_dict(), optimizer.state_dict()))
    weights = [p.detach().clone() for p in policy.parameters()]
    tokens = {"rollout": train.select(rollout, config)[0], "held_out": held_out}
    before = {name: with_old_logprobs(policy, [part], *passes)[0] for name, part in tokens.items()}
    gradients, rates = zip(*(entropy_gradient(policy, part, *passes) for part in tokens.values()), strict=True)
    velocity = tokens["rollout"].advantages * rates[0]  # [N]  at ratio 1, where all objectives have the weight A
    for name, setting in settings.items():
        trained = train_step(learner, rollout, replace(state), setting, *place)
        metrics = step_metrics(trained[0], problems, *trained[1:], None)[0]
        after = {name: with_old_logprobs(policy, [part], *passes)[0] for name, part in tokens.items()}
        row = {"setting": name} | changes(before, after, velocity)
        moved = [p.detach() - w for p, w in zip(policy.parameters(), weights, strict=True)]
        for part, gradient in zip(tokens, gradients, strict=True):
            products = [(g.double() * m.double()).sum() for g, m in zip(gradient, moved, strict=True)]
            row[f"linear/{part}"] = sum(products).item()
        row |= {f"predicted/{k}": v for k, v in metrics.items() if k.startswith(("velocity/", "clip/", "kl/"))}
        model_state, optimizer_state = deepcopy(snapshot)  # the optimizer would write into the snapshot
        policy.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        yield row


def train_step(learner, rollout: Rollout, state: State, config, folder: Path, meter) -> tuple:
    """The step's updates: (the rollout with its advantages, its mini-batches, what was learned)."""
    rollout, batches = train.select(rollout, config)
    objective, lr = train.objective_of_step(config, state), train.lr_of_step(config, state.step + 1)
    return rollout, batches, train.learn(*learner, rollout, batches, objective, lr, state, config, folder, meter)


def entropy_gradient(policy, rollout: Rollout, temperature: float, max_tokens: int, device: str) -> tuple:
    """The gradient of the tokens' mean entropy, by weight, and each token's velocity for a weight of 1, [N]."""
    rates = []
    policy.zero_grad()
    for part in micro_batches(rollout, max_tokens):
        logprobs, entropy, moment = policy(pack(part, device), temperature)  # [n] each
        (entropy.sum() / len(rollout.tokens)).backward()
        rates.append(entropy_velocity(torch.ones_like(logprobs), logprobs, entropy, moment).detach().cpu())
    gradient = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    return gradient, torch.cat(rates)


def changes(before: dict, after: dict, velocity: torch.Tensor) -> dict[str, float]:
    """delta/*, logprob/*, kl/* and rank/*. before, after: rollout and held-out responses, with logprobs."""
    row = {}
    for name, old in before.items():
        delta = after[name].entropy.double() - old.entropy.double()  # [N]
        log_ratio = after[name].old_logprobs.double() - old.old_logprobs.double()  # [N]
        row |= {f"delta/{name}": delta.mean().item(), f"kl/{name}": (log_ratio.expm1() - log_ratio).mean().item()}
        if name == "rollout":
            trained, parts = old.advantages != 0, quadrants(old.old_logprobs, old.entropy, old.advantages)
            row |= {f"delta/{part}": delta[own].mean().item() for part, own in parts.items() if own.any()}
            row["rank/tokens"] = stats.spearmanr(velocity[trained], delta[trained]).statistic.item()
        else:
            right = old.correct[old.sequence]  # [N]
            members = {"right": right, "wrong": ~right}
            row |= {f"logprob/{part}": log_ratio[own].mean().item() for part, own in members.items() if own.any()}
    return row


def run(config: train.Config, start: Path | None, options: Options) -> None:
    """Branch before the next step of the run, and again every `options.every` steps."""
    open_to_append(options.results, "--results").close()
    about = {name: getattr(config, name) for name in SAME}
    if any(row[name] != value for row in draw.read_branches(options.results) for name, value in about.items()):
        raise UserError(f"{options.results} has branches of a run with other settings; name another --results")
    if config.kl_coef or config.advantages == "gae" or config.lora_rank:
        raise UserError("branches train a policy alone, and whole: they need kl_coef = 0, no gae and no lora_rank")
    device, source = parallel.init(), str(start or config.model)
    model, tokenizer = load_model(source, device, config.gradient_checkpointing)
    problems, held_out, _ = load_sets(config, tokenizer, model.config, reward.assign, reward.MARKS)
    held_out = held_out[: options.held_out]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=device == "cuda", **train.ADAMW)
    state = checkpoint.load(start, model, optimizer) if start else State("", control=first_control(config))
    context = config.max_prompt_tokens + config.max_response_tokens
    engine = Engine(source, tokenizer, context, config.gpu_memory_utilization, seed=config.seed)
    learner, place = (Policy(model), optimizer, None, None), (options.results.parent, Meter(model, device))
    settings = {name: variant(config, SETTINGS[name]) for name in dict.fromkeys((BASELINE, *options.settings))}
    settings |= {} if config in settings.values() else {OWN: config}
    sampling = {"max_tokens": config.max_response_tokens, "temperature": config.temperature}
    sampling |= {"score": reward.score, "thinking": config.thinking}
    last = state.step + 1 + (options.branches - 1) * options.every
    progress = tqdm(total=options.branches * len(settings), unit="setting", disable=None)
    for step in range(state.step + 1, last + 1):
        engine.wake(model)
        branching = (last - step) % options.every == 0
        if branching:  # before `sample`, which sends the engine to sleep
            held = evaluate(engine, held_out, 4, seed=config.seed + step, **sampling)
        chosen, rollout = train.sample(engine, problems, state.batches, config, place[1], lambda: False)
        if branching and reward.unequal(rollout).any():
            lines = []
            for row in branch(learner, settings, chosen, rollout, held, state, *place):
                values = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
                lines.append(json.dumps(about | {"seed": config.seed, "step": step} | values) + "\n")
                progress.update()
            with options.results.open("a") as file:  # whole branches only
                file.writelines(lines)
        if step < last:
            trained = train_step(learner, rollout, state, config, *place)
            train.report(None, chosen, *trained, state, config, place[1])
    progress.close()


def start_of(path: str) -> tuple[str, Path | None]:
    """(folder of the run, checkpoint to start from) of a run's folder or of one of its checkpoints."""
    folder = Path(path)
    if not checkpoint.NAME.fullmatch(folder.name):
        return path, checkpoint.newest(folder)
    if problem := checkpoint.damage(folder):
        raise UserError(f"--run {folder}: no whole checkpoint there ({problem})")
    return str(folder.parent), folder


def main() -> None:
    options, settings = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    t.check_ranges(options)
    if not options.draw:
        prepare_environment()
        folder, start = (None, None) if options.run is None else start_of(options.run)
        config, *_ = parse(train.Config, settings if folder is None else ["--resume", folder, *settings])
        run(config, start, options)
    rows = draw.read_branches(options.results)
    if not rows:
        raise UserError(f"{options.results}: no results in this file")
    report = draw.table_of_branches(rows)
    print(report)
    options.results.with_suffix(".md").write_text(report)
    draw.figure_of_branches(rows).savefig(options.results.with_suffix(".png"), dpi=150)
    print(options.results.with_suffix(".png"))


if __name__ == "__main__":
    command(main)
