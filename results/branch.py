"""Measure how each setting changes entropy in one step, from the same state and the same rollout.

make branch RUN=out/<run>                                 from the run's newest checkpoint, with its own settings
make branch RUN=out/<run>/checkpoint-000040 BRANCHES=10 EVERY=5
make branch ARGS="--objective grpo"                       from a model, with a fresh optimizer; train.py's settings

A branch takes the state of a run before a step, with its optimizer, and that step's rollout. It trains the step once
under each setting, each time from this state, and measures the changes on the same tokens. Nothing is sampled in
between, so only the settings differ. Then the run continues with its own setting, up to the next branch. One process,
one device.

Writes a JSONL file with a line per branch and setting, a table, and a figure. Further runs add to the same file.
Without --run, all other arguments are train.py's settings.
"""

import json
from collections.abc import Iterator
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
from ce_gppo import config as t
from ce_gppo.batch import Rollout, micro_batches, pack
from ce_gppo.checkpoint import State
from ce_gppo.config import check_ranges, command, open_to_append, parse, resolve
from ce_gppo.entropy import entropy_velocity, first_control, next_control, quadrants
from ce_gppo.messages import UserError
from ce_gppo.metrics import check_mismatch, step_metrics
from ce_gppo.model import load_model, named_weights
from ce_gppo.perf import Meter
from ce_gppo.policy import Policy, with_old_logprobs
from ce_gppo.problems import load_sets
from results import effects
from results.effects import BASELINE, OWN, SAME
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


# ----------------------------------------------------------------------------------------------------------------------
# A step


@dataclass
class Step:
    """A step of a run, with its rollout: trained as `train` does it, or as a branch, under several settings."""

    learner: train.Learner
    config: train.Config  # the run's own setting
    meter: Meter
    folder: Path  # for the inputs of updates that have no finite gradient
    state: State  # before the step
    problems: list
    rollout: Rollout  # with rewards, as train.sample gives it

    def learn(self, config: train.Config) -> dict[str, float]:
        """The step's updates, from the present weights; their metrics."""
        rollout, mini_batches = train.select(self.rollout, config)
        state = replace(self.state)  # skipped updates are counted in it
        objective = train.objective_of_step(config, state)
        trained = rollout, mini_batches, objective, train.lr_of_step(config, state.step + 1), state
        learned = train.learn(self.learner, *trained, config, self.folder, self.meter)
        return step_metrics(rollout, self.problems, mini_batches, learned, None)[0]

    def branch(self, settings: dict[str, train.Config], held_out: Rollout) -> Iterator[dict]:
        """A row for each setting. After each row the weights and the optimizer are as before, bit by bit.

        delta/*       change of mean entropy, nats: of all tokens of the rollout, of its trained tokens by quadrant, of
                      the tokens of held-out problems' responses
        linear/*      delta/*, predicted to first order from the step in the weights: <gradient of entropy, step>
        logprob/*     change of mean logprob, nats per token, of right and of wrong held-out responses
        kl/*          of the old policy to the new one, nats per token (k3)
        predicted/*   the updates' own velocity/*, clip/* and kl/approx, as a run logs them
        rank/tokens   rank correlation, over the trained tokens, of their entropy velocity in a first update with the
                      change of their entropy
        reward/mean entropy/mean   of the rollout
        """
        policy, optimizer = self.learner[:2]
        snapshot = deepcopy((policy.state_dict(), optimizer.state_dict()))
        weights = [p.detach().clone() for p in policy.parameters()]
        tokens = {"rollout": train.select(self.rollout, self.config)[0], "held_out": held_out}
        before = {name: self.measured(part) for name, part in tokens.items()}
        gradients, rates = zip(*map(self.entropy_gradient, tokens.values()), strict=True)
        velocity = tokens["rollout"].advantages * rates[0]  # [N]  at ratio 1, where all objectives have the weight A
        for name, config in settings.items():
            predicted = self.learn(config)
            after = {name: self.measured(part) for name, part in tokens.items()}
            row = {"setting": name} | changes(before, after, velocity)
            moved = [p.detach() - w for p, w in zip(policy.parameters(), weights, strict=True)]
            for part, gradient in zip(tokens, gradients, strict=True):
                products = [(g.double() * m.double()).sum() for g, m in zip(gradient, moved, strict=True)]
                row[f"linear/{part}"] = sum(products).item()
            row |= {f"predicted/{k}": v for k, v in predicted.items() if k.startswith(("velocity/", "clip/", "kl/"))}
            row |= {k: v for k, v in predicted.items() if k in ("reward/mean", "entropy/mean")}
            model_state, optimizer_state = deepcopy(snapshot)  # the optimizer would write into the snapshot
            policy.load_state_dict(model_state)
            optimizer.load_state_dict(optimizer_state)
            yield row

    def measured(self, rollout: Rollout) -> Rollout:
        """With logprobs and entropy under the present weights."""
        passes = self.config.temperature, self.config.max_micro_batch_tokens, self.meter.device
        return with_old_logprobs(self.learner.policy, [rollout], *passes)[0]

    def entropy_gradient(self, rollout: Rollout) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The gradient of the tokens' mean entropy, by weight, and each token's velocity for a weight of 1, [N]."""
        policy, rates = self.learner.policy, []
        policy.zero_grad()
        for part in micro_batches(rollout, self.config.max_micro_batch_tokens):
            logprobs, entropy, moment = policy(pack(part, self.meter.device), self.config.temperature)  # [n] each
            (entropy.sum() / len(rollout.tokens)).backward()
            rates.append(entropy_velocity(torch.ones_like(logprobs), logprobs, entropy, moment).detach().cpu())
        gradient = [p.grad.clone() for p in policy.parameters()]
        policy.zero_grad()
        return gradient, torch.cat(rates)


def changes(before: dict, after: dict, velocity: torch.Tensor) -> dict[str, float]:
    """delta/*, logprob/*, kl/* and rank/*. before, after: rollout and held-out responses, measured. [N] each."""
    row = {}
    for name in before:
        delta = after[name].entropy.double() - before[name].entropy.double()  # [n]
        log_ratio = after[name].old_logprobs.double() - before[name].old_logprobs.double()  # [n]
        row |= {f"delta/{name}": delta.mean().item(), f"kl/{name}": (log_ratio.expm1() - log_ratio).mean().item()}
        if name == "rollout":
            old, trained = before[name], before[name].advantages != 0
            parts = quadrants(old.old_logprobs, old.entropy, old.advantages)
            row |= {f"delta/{part}": delta[own].mean().item() for part, own in parts.items() if own.any()}
            row["rank/tokens"] = stats.spearmanr(velocity[trained], delta[trained]).statistic.item()
        else:
            right = before[name].correct[before[name].sequence]
            members = {"right": right, "wrong": ~right}
            row |= {f"logprob/{part}": log_ratio[own].mean().item() for part, own in members.items() if own.any()}
    return row


# ----------------------------------------------------------------------------------------------------------------------
# A run


def run(config: train.Config, start: Path | None, options: Options) -> None:
    """Branch before the next step of the run, and again every `options.every` steps."""
    open_to_append(options.results, "--results").close()
    about = {name: getattr(config, name) for name in SAME}
    if any(row[name] != value for row in effects.read(options.results) for name, value in about.items()):
        raise UserError(f"{options.results} has branches of a run with other settings; name another --results")
    if config.kl_coef:
        raise UserError(f"kl_coef = {config.kl_coef}: branches have no reference policy; leave it out")
    if config.advantages == "gae":
        raise UserError("advantages = gae: branches have no critic; they need a run with group advantages")
    device, source = parallel.init(), str(start or config.model)
    model, tokenizer = load_model(source, device, config.gradient_checkpointing)
    problems, held_out, _ = load_sets(config, tokenizer, model.config)
    _, (problems, held_out) = reward.assign(config.rewards, problems, held_out[: options.held_out])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=device == "cuda", **train.ADAMW)
    state = checkpoint.load(start, model, optimizer) if start else State("", control=first_control(config))
    context = config.max_prompt_tokens + config.max_response_tokens
    engine = Engine(source, tokenizer, context, config.gpu_memory_utilization, seed=config.seed)
    learner, meter = train.Learner(Policy(model), optimizer), Meter(model, device)
    names = dict.fromkeys((BASELINE, *options.settings))
    settings = {name: variant(config, SETTINGS[name]) for name in names}
    if config not in settings.values():
        settings[OWN] = config
    four_each = {"prompts_per_step": len(held_out), "responses_per_prompt": 4, "dynamic_sampling": "off"}
    last = state.step + 1 + (options.branches - 1) * options.every
    progress = tqdm(total=options.branches * len(settings), unit="setting", disable=None)
    for step in range(state.step + 1, last + 1):
        engine.wake(named_weights(model))
        branching = (last - step) % options.every == 0
        if branching:
            _, held = train.sample(engine, held_out, step, replace(config, **four_each), meter, lambda: False)
            engine.wake(named_weights(model))
        chosen, rollout = train.sample(engine, problems, state.batches, config, meter, lambda: False)
        state.batches += len(chosen) // config.prompts_per_step
        one = Step(learner, config, meter, options.results.parent, state, chosen, rollout)
        if branching and reward.unequal(rollout).any():
            rows = []
            for row in one.branch(settings, held):
                values = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
                rows.append(json.dumps(about | {"seed": config.seed, "step": step} | values) + "\n")
                progress.update()
            with options.results.open("a") as file:  # whole branches only
                file.writelines(rows)
        if step < last:
            metrics = one.learn(config)
            check_mismatch(metrics, device)
            state.step = step
            if config.entropy_target:
                state.control = next_control(config, state.control, metrics["entropy/mean"])
    progress.close()


def start_of(path: str) -> tuple[str, Path | None]:
    """(folder of the run, checkpoint to start from) of a run's folder or of one of its checkpoints."""
    folder = Path(path)
    if not path:  # as of a variable of the shell that is not set
        raise UserError("--run is empty; leave it out, or name the folder of a run")
    if not checkpoint.NAME.fullmatch(folder.name):
        return path, checkpoint.newest(folder)
    if problem := checkpoint.damage(folder):
        raise UserError(f"--run {folder}: no whole checkpoint there ({problem})")
    return str(folder.parent), folder


def main() -> None:
    options, settings = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    check_ranges(options)
    if not options.draw:
        prepare_environment()
        folder, start = ("", None) if options.run is None else start_of(options.run)
        config, *_ = parse(train.Config, [*(["--resume", folder] if folder else []), *settings])
        run(config, start, options)
    rows = effects.read(options.results)
    if not rows:
        raise UserError(f"{options.results}: no results in this file")
    report = effects.table(rows)
    print(report)
    options.results.with_suffix(".md").write_text(report)
    effects.figure(rows).savefig(options.results.with_suffix(".png"), dpi=150)
    print(options.results.with_suffix(".png"))


if __name__ == "__main__":
    command(main)
