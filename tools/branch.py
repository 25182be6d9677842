"""What a setting does to entropy, measured where it acts: from one state and one rollout, the updates of every setting.

make branch RUN=out/<run>                                 from the run's newest checkpoint, with its own settings
make branch RUN=out/<run>/checkpoint-000040 BRANCHES=10 EVERY=5
make branch RECIPE=walk ARGS="--objective grpo"           from a model, with a fresh optimizer; train.py's settings

A branch takes the state of a run before a step, with its optimizer, and that step's rollout. It then trains that step
once under each setting, each time from exactly that state, and measures on exactly the same tokens what has changed.
Nothing is sampled in between, so settings differ only in what they do. After a branch the run goes on, with its own
setting, to the next one. One process, one device.

Writes a line per branch and setting to a JSONL file, a table, and a figure. Further runs add to the same file.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from scipy import stats
from tqdm import tqdm

import loss
import reward
import train
from ce_gppo import checkpoint, dist
from ce_gppo import types as t
from ce_gppo.betas import first_control, lr_of_step, next_control
from ce_gppo.checkpoint import State
from ce_gppo.config import check_ranges, command, open_to_append, parse, resolve
from ce_gppo.entropy import QUADRANTS, entropy_velocity, quadrants
from ce_gppo.evaluation import evaluate
from ce_gppo.forward import Batch, Policy, collate, compute_old_logprobs, flatten, micro_batches
from ce_gppo.model import load_model, named_weights
from ce_gppo.perf import Meter
from ce_gppo.problems import load_sets
from ce_gppo.statistics import check_mismatch, step_metrics
from ce_gppo.types import Response, UserError, has_signal
from rollout import Engine, prepare_environment
from tools.branches import BASELINE, COAST, OWN, SAME, SMALL, figure, read, table

SETTINGS = {  # each with its objective's published loss; rollout and rewards are the run's
    BASELINE: {"objective": "grpo"},
    "dapo": {"objective": "dapo"},
    "cispo": {"objective": "cispo"},
    "(1, 0)": {"beta1": 1.0, "beta2": 0.0},
    "(0, 1)": {"beta1": 0.0, "beta2": 1.0},
    "(0.5, 1)": {"beta1": 0.5, "beta2": 1.0},
    "(0.75, 1)": {"beta1": 0.75, "beta2": 1.0},
    "(1, 1)": {"beta1": 1.0, "beta2": 1.0},
    "lp_only (1, 1)": {"objective": "lp_only", "beta1": 1.0, "beta2": 1.0},
    "bonus 0.001": {"objective": "grpo", "entropy_coef": 0.001},
    "bonus 0.003": {"objective": "grpo", "entropy_coef": 0.003},
}


def variant(config: train.Config, changes: dict) -> train.Config:
    """The run's configuration under another objective, whose published values replace the run's."""
    kept = {"name", "max_response_tokens", "positive_nll_coef", "rollout_correction"}
    defaults = {field.name: field.default for field in fields(train.Config)}
    names = {field.name for field in fields(loss.Objective)} - kept | {
        "objective",
        "advantages",
        "beta_schedule",
        "entropy_target",
    }
    return resolve(replace(config, **{name: defaults[name] for name in names} | changes))


# ----------------------------------------------------------------------------------------------------------------------
# One step, trained under several settings


@dataclass
class Step:
    """A step of a run, with its rollout: trained as `train` does it, or as a branch, under several settings."""

    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    config: train.Config  # the run's own setting
    meter: Meter
    folder: Path  # for the inputs of updates that have no finite gradient
    step: int  # the one to be trained
    control: tuple[float, float]  # of the entropy controller
    rollout: list[list[Response]]  # with rewards, as train.sample gives it

    def learn(self, config: train.Config, lr_factor: float = 1.0) -> dict[str, float]:
        """The step's updates, from the present state; their metrics."""
        groups, mini_batches = train.select(self.rollout, config)  # copies, as each setting needs its own
        lr = lr_factor * lr_of_step(config, self.step)
        objective = train.objective_of_step(config, self.step, self.control)
        trained = groups, mini_batches, objective, lr, State(wandb_id="")
        updates = train.learn(self.policy, self.optimizer, *trained, config, self.folder, self.meter)
        return step_metrics(groups, mini_batches, updates, None)

    def coast(self) -> dict[str, float]:
        """As many optimizer steps, with gradients of zero: what momentum and weight decay do."""
        lr = lr_of_step(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for p in self.policy.parameters():
            p.grad = torch.zeros_like(p)
        for _ in train.select(self.rollout, self.config)[1] * self.config.epochs:
            self.optimizer.step()
        self.policy.zero_grad()
        return {}

    def branch(
        self, settings: dict[str, train.Config], held_out: list[Response], progress: Callable = lambda: None
    ) -> list[dict]:
        """A row for each setting, and three controls: the run's own, that at lr / 10, and momentum without a gradient.

        The state stays as it is.

        delta/*       change of mean entropy, nats: of all tokens of the rollout, of its trained tokens by quadrant, of
                      the tokens of held-out problems' responses
        delta/clipped delta/others   the parts of delta/rollout from the tokens that grpo took out of the clip interval,
                      and from all others
        linear/*      delta/*, predicted to first order from the step in the weights: <gradient of entropy, step>
        logprob/*     change of mean logprob, nats per token, of right and of wrong held-out responses
        kl/*          of the old policy to the new one, nats per token (k3)
        predicted/*   the updates' own velocity/*, clip/* and kl/old, as a run logs them
        rank/tokens   rank correlation over the trained tokens: of the entropy velocity that each would have in a first
                      update, with the change of its entropy
        reward/mean entropy/mean   of the rollout
        """
        snapshot = deepcopy((self.policy.state_dict(), self.optimizer.state_dict()))
        weights = [p.detach().clone() for p in self.policy.parameters()]
        tokens = {"rollout": flatten(train.select(self.rollout, self.config)[0]), "held_out": held_out}
        before = {name: self.measured(responses) for name, responses in tokens.items()}
        gradients = {name: self.entropy_gradient(responses) for name, responses in tokens.items()}
        velocity = self.token_velocity(tokens["rollout"])  # [N]
        rows = []
        jobs = {name: partial(self.learn, config) for name, config in (settings | {OWN: self.config}).items()}
        for name, job in (jobs | {SMALL: partial(self.learn, self.config, 0.1), COAST: self.coast}).items():
            predicted = job()
            after = {name: self.measured(responses) for name, responses in tokens.items()}
            moved = [p.detach() - w for p, w in zip(self.policy.parameters(), weights, strict=True)]
            row = {"setting": name} | changes(before, after, velocity)
            if not rows:
                clipped = out_of_clip(before["rollout"], after["rollout"])  # [N]
            delta = after["rollout"]["entropy"] - before["rollout"]["entropy"]  # [N]
            row |= {"delta/clipped": (delta * clipped).mean().item(), "delta/others": (delta * ~clipped).mean().item()}
            for part, gradient in gradients.items():
                products = [(g.double() * m.double()).sum() for g, m in zip(gradient, moved, strict=True)]
                row[f"linear/{part}"] = sum(products).item()
            row |= {f"predicted/{k}": v for k, v in predicted.items() if k.startswith(("velocity/", "clip/", "kl/"))}
            row |= {k: v for k, v in predicted.items() if k in ("reward/mean", "entropy/mean")}
            rows.append(row)
            restore(self.policy, self.optimizer, snapshot)
            progress()
        return rows

    def measured(self, responses: list[Response]) -> dict[str, torch.Tensor]:
        """Of all tokens under the present weights, [N] each, in float64."""
        copies = [replace(r, old_logprobs=None, entropy=None) for r in responses]
        passes = self.config.temperature, self.config.max_micro_batch_tokens, self.meter.device
        compute_old_logprobs(self.policy, copies, *passes)
        lengths = torch.tensor([len(r.response_ids) for r in responses])
        advantages = [torch.zeros_like(r.entropy) if r.advantages is None else r.advantages for r in copies]
        return {
            "logprobs": torch.cat([r.old_logprobs for r in copies]).double(),
            "entropy": torch.cat([r.entropy for r in copies]).double(),
            "advantages": torch.cat(advantages).double(),  # 0 of held-out responses
            "verdicts": torch.tensor([r.verdict for r in responses]).double().repeat_interleave(lengths),
        }

    def entropy_gradient(self, responses: list[Response]) -> list[torch.Tensor]:
        """Of the mean entropy of the responses' tokens, by the weights."""
        tokens = sum(len(r.response_ids) for r in responses)
        self.policy.zero_grad()
        for batch in self.batches(responses):
            entropy = self.policy(batch, self.config.temperature)[1]  # [B, R]
            (entropy.sum() / tokens).backward()
        gradient = [p.grad.clone() for p in self.policy.parameters()]
        self.policy.zero_grad()
        return gradient

    @torch.no_grad()
    def token_velocity(self, responses: list[Response]) -> torch.Tensor:
        """v = g h_a of every token at ratio 1, where g is its advantage under every objective: [N], float64."""
        parts = []
        for batch in self.batches(responses):
            logprobs, entropy, S = self.policy(batch, self.config.temperature)  # [B, R] each
            parts.append(entropy_velocity(batch.advantages, logprobs, entropy, S)[batch.response_mask].cpu())
        return torch.cat(parts).double()

    def batches(self, responses: list[Response]) -> Iterator[Batch]:
        for rows in micro_batches(responses, self.config.max_micro_batch_tokens):
            yield collate([responses[i] for i in rows], self.meter.device)


def restore(policy: torch.nn.Module, optimizer: torch.optim.Optimizer, snapshot: tuple[dict, dict]) -> None:
    """Weights and moments as they were, bit by bit."""
    weights, moments = deepcopy(snapshot)  # the optimizer goes on to write into what it is given
    policy.load_state_dict(weights)
    optimizer.load_state_dict(moments)


def changes(before: dict[str, dict], after: dict[str, dict], velocity: torch.Tensor) -> dict[str, float]:
    """delta/*, logprob/*, kl/* and rank/*. before, after: `measured` of the rollout and of held-out responses."""
    row, delta = {}, {}
    for name in before:
        delta[name] = after[name]["entropy"] - before[name]["entropy"]  # [N]
        row[f"delta/{name}"] = delta[name].mean().item()
        row[f"kl/{name}"] = k3(before[name]["logprobs"], after[name]["logprobs"])
    old = before["rollout"]
    parts = quadrants(old["logprobs"], old["entropy"], old["advantages"])
    row |= {f"delta/{name}": delta["rollout"][parts[name]].mean().item() for name in QUADRANTS if parts[name].any()}
    trained = old["advantages"] != 0
    row["rank/tokens"] = stats.spearmanr(velocity[trained], delta["rollout"][trained]).statistic.item()
    moved, right = after["held_out"]["logprobs"] - before["held_out"]["logprobs"], before["held_out"]["verdicts"] > 0
    for name, members in (("right", right), ("wrong", ~right)):
        if members.any():
            row[f"logprob/{name}"] = moved[members].mean().item()
    return row


def out_of_clip(before: dict, after: dict) -> torch.Tensor:
    """The tokens that PPO-clip would give no gradient in a next update: bool, [N]."""
    ratio = (after["logprobs"] - before["logprobs"]).exp()
    low, high = loss.out_of_clip(ratio, before["advantages"], loss.Objective())
    return low | high


def k3(before: torch.Tensor, after: torch.Tensor) -> float:
    """KL of the old policy to the new one, from tokens that the old one sampled (joschu.net/blog/kl-approx.html)."""
    log_ratio = after - before
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# A run with branches


@dataclass
class Options:
    branches: t.Count
    every: t.Count
    held_out: t.Count
    settings: list[str]
    results: Path


def run(config: train.Config, start: Path | None, options: Options) -> None:
    """Branch before the next step and then every so many steps of the run, which goes on with its own setting."""
    open_to_append(options.results, "--results").close()
    rows = read(options.results)
    about = {name: getattr(config, name) for name in SAME}
    if any(row[name] != value for row in rows for name, value in about.items()):
        raise UserError(f"{options.results} has branches of a run with other settings; name another --results")
    if config.kl_coef:
        raise UserError(f"kl_coef = {config.kl_coef}: branches have no reference policy; leave it out")
    if config.advantages == "gae":
        raise UserError("advantages = gae: branches have no critic; a run with advantages of groups is needed")
    device = dist.init()
    source = str(start or config.model)
    model, tokenizer = load_model(source, device, config.gradient_checkpointing)
    problems, held_out, _ = load_sets(config, tokenizer, model.config.max_position_embeddings, reward.VERIFIERS)
    policy = Policy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=device == "cuda", **train.ADAMW)
    state = checkpoint.load(start, model, optimizer) if start else State("", control=first_control(config))
    engine = Engine(
        source,
        tokenizer,
        context=config.max_prompt_tokens + config.max_response_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        seed=config.seed,
    )
    engine.load_weights(named_weights(model))
    meter = Meter(model, device)
    settings = {name: variant(config, changes) for name, changes in SETTINGS.items() if name in options.settings}
    last = state.step + 1 + (options.branches - 1) * options.every
    progress = tqdm(total=options.branches * (len(settings) + 3), unit="setting", disable=None)
    for step in range(state.step + 1, last + 1):
        branching = (last - step) % options.every == 0
        if branching:  # before `sample`, which sends the engine to sleep
            sampling = {"max_tokens": config.max_response_tokens, "temperature": config.temperature}
            held = evaluate(
                engine,
                held_out[: options.held_out],
                4,
                score=partial(reward.score, thinking=config.thinking),
                seed=config.seed + step,
                **sampling,
            )
        chosen, rollout = train.sample(engine, problems, state.batches, config, meter, lambda: False)
        state.batches += len(chosen) // config.prompts_per_step
        one = Step(policy, optimizer, config, meter, options.results.parent, step, state.control, rollout)
        if branching and any(map(has_signal, rollout)):
            found = one.branch(settings, flatten(held), progress.update)
            with options.results.open("a") as file:
                for row in found:
                    values = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
                    file.write(json.dumps(about | {"seed": config.seed, "step": step} | values) + "\n")
        if step < last:
            metrics = one.learn(config)
            check_mismatch(metrics, device)
            engine.wake(named_weights(model))
            if config.entropy_target:
                state.control = next_control(config, state.control, metrics["entropy/mean"])
    progress.close()


def start_of(path: str) -> tuple[str, Path | None]:
    """(folder of the run, checkpoint to start from) of a run's folder or of one of its checkpoints."""
    folder = Path(path)
    if not checkpoint.NAME.fullmatch(folder.name):
        return path, checkpoint.newest(folder)
    if problem := checkpoint.damage(folder):
        raise UserError(f"--run {folder}: no whole checkpoint there ({problem})")
    return str(folder.parent), folder


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --run, all other arguments are train.py's settings.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", default="", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--branches", type=int, default=1, help="how many")
    parser.add_argument("--every", type=int, default=5, help="steps of the run from one branch to the next")
    parser.add_argument("--held-out", type=int, default=64, help="held-out problems, with four responses each")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=list(SETTINGS),
        metavar="NAME",
        help=f"of {', '.join(SETTINGS)}; {BASELINE} always",
    )
    parser.add_argument("--results", type=Path, default=Path("out/branches/branches.jsonl"), help="file to add to")
    parser.add_argument("--draw", action="store_true", help="only table and figure, of the results that are there")
    given, settings = parser.parse_known_args()
    if unknown := [name for name in given.settings if name not in SETTINGS]:
        raise UserError(f"--settings: '{unknown[0]}' is unknown; known: {', '.join(SETTINGS)}")
    options = Options(given.branches, given.every, given.held_out, [BASELINE, *given.settings], given.results)
    check_ranges(options)
    if not given.draw:
        prepare_environment()
        folder, start = start_of(given.run) if given.run else ("", None)
        config, _, _ = parse(train.Config, [*(["--resume", folder] if folder else []), *settings])
        run(config, start, options)
    rows = read(options.results)
    if not rows:
        raise UserError(f"{options.results}: no results in this file")
    report = table(rows)
    print(report)
    options.results.with_suffix(".md").write_text(report)
    figure(rows).savefig(options.results.with_suffix(".png"), dpi=150)
    print(options.results.with_suffix(".png"))


if __name__ == "__main__":
    command(main)
