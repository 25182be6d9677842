"""One step of a run, trained under several settings from the same state, and the changes on the same tokens."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from ce_gppo.betas import lr_of_step
from ce_gppo.forward import Batch, collate, compute_old_logprobs, flatten, micro_batches
from ce_gppo.statistics import step_metrics
from ce_gppo.types import Response
from scipy import stats

import loss
import train
from ce_gppo.checkpoint import State
from ce_gppo.entropy import QUADRANTS, entropy_velocity, quadrants
from ce_gppo.perf import Meter
from tools.branches import COAST, OWN, SMALL


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
        groups, mini_batches = train.select(self.rollout, config)  # copies: each setting sets their old logprobs
        lr = lr_factor * lr_of_step(config, self.step)
        objective = train.objective_of_step(config, self.step, self.control)
        trained = groups, mini_batches, objective, lr, State(wandb_id="")
        updates = train.learn(self.policy, self.optimizer, *trained, config, self.folder, self.meter)
        return step_metrics(groups, mini_batches, updates, None)

    def coast(self) -> dict[str, float]:
        """As many optimizer steps with gradients of 0: the effect of momentum and weight decay."""
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

        Afterwards the state is as before.

        delta/*       change of mean entropy, nats: of all tokens of the rollout, of its trained tokens by quadrant, of
                      the tokens of held-out problems' responses
        delta/clipped delta/others   the parts of delta/rollout from the tokens that the first setting moved out of
                      the clip interval, and from all others
        linear/*      delta/*, predicted to first order from the step in the weights: <gradient of entropy, step>
        logprob/*     change of mean logprob, nats per token, of right and of wrong held-out responses
        kl/*          of the old policy to the new one, nats per token (k3)
        predicted/*   the updates' own velocity/*, clip/* and kl/old, as a run logs them
        rank/tokens   rank correlation, over the trained tokens, of their entropy velocity in a first update with the
                      change of their entropy
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
        """Logprobs, entropy, advantages and verdicts of all tokens under the present weights: [N] each, float64."""
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
        """The gradient of the mean entropy of the responses' tokens with respect to the weights."""
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
    weights, moments = deepcopy(snapshot)  # the optimizer would write into the snapshot
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
    """The tokens to which PPO-clip would give no gradient in a next update: bool, [N]."""
    ratio = (after["logprobs"] - before["logprobs"]).exp()
    low, high = loss.out_of_clip(ratio, before["advantages"], loss.Objective())
    return low | high


def k3(before: torch.Tensor, after: torch.Tensor) -> float:
    """KL of the old policy to the new one, from tokens that the old one sampled (joschu.net/blog/kl-approx.html)."""
    log_ratio = after - before
    return (log_ratio.exp() - 1 - log_ratio).mean().item()
