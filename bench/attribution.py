"""What the entropy accounting costs: a step's own work with all of it, against the same with entropy/mean alone.

    python bench/attribution.py --model data/arithmetic/base --repeats 15

Measures old logprobs, updates and metrics of one step (rollouts cost the same either way, and are left out, so that the
share of a whole step is smaller than what is printed). Both variants run in turn, on the same responses.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import head
import loss
import policy
import report
import settings as run_settings
import train
from rollout import Response


@dataclass
class Config:
    model: str = "data/arithmetic/base"  # folder or hub name
    prompts: int = 64  # groups of 8 responses
    prompt_tokens: int = 15
    response_tokens: int = 35  # on average; they vary by a third
    repeats: int = 15  # pairs of runs


def fold_without_s(z: torch.Tensor, m: torch.Tensor, sums: tuple) -> tuple[torch.Tensor, tuple]:
    """head._fold without the two sums that only S needs."""
    e, ez, ee, eez = sums
    new_m = torch.maximum(m, z.amax(1))
    shift = m - new_m
    scale = shift.exp()
    z = z - new_m[:, None]
    p = z.exp()
    return new_m, (e * scale + p.sum(1), (ez + shift * e) * scale + z.mul_(p).sum(1), ee, eez)


def step(actor, optimizer, groups: list[list[Response]], config: train.Config, everything: bool) -> float:
    """Seconds of a step's work in the trainer."""
    device = next(actor.parameters()).device.type
    responses = [response for group in groups for response in group]
    rewards = torch.tensor([[response.reward for response in group] for group in groups])
    timer = report.Timer(device)
    policy.measure(actor, responses, config.temperature, config.max_micro_batch_tokens, device)
    metrics = report.rollout_metrics([report.rollout_values(rewards, responses)], 0.0) if everything else {}
    updates = []
    for mini_batch in train.split_evenly(groups, len(groups) // config.mini_batch_prompts):
        flat = [response for group in mini_batch for response in group]
        updates.append(train.update(actor, optimizer, flat, 0.0, 0.75, 1.0, config, device))
    if everything:
        metrics |= report.update_metrics([updates])
        report.histograms(responses)
    return timer.take()["time/step"]


def main(config: Config) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = policy.load_model(config.model, device)
    settings = run_settings.resolve(train.Config())
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(config.prompts):
        lengths = torch.randint(
            config.response_tokens * 2 // 3, config.response_tokens * 4 // 3, (8,), generator=generator
        )
        group = []
        for i, length in enumerate(lengths.tolist()):
            ids = torch.randint(len(tokenizer), (config.prompt_tokens + length,), generator=generator).tolist()
            response = Response(
                ids[: config.prompt_tokens], ids[config.prompt_tokens :], torch.zeros(length), False, ""
            )
            response.reward, response.advantage = float(i % 2), float(i % 2) - 0.5
            group.append(response)
        groups.append(group)

    actor = policy.Policy(model)
    full_fold, full_sums = head._fold, loss.update_sums
    seconds = {"everything": [], "entropy only": []}
    for repeat in range(config.repeats + 1):
        for name in seconds:
            head._fold = full_fold if name == "everything" else fold_without_s
            loss.update_sums = full_sums if name == "everything" else lambda info, *_: {"tokens": info["ratio"].sum()}
            taken = step(actor, optimizer, groups, settings, name == "everything")
            if repeat:  # the first pair warms up
                seconds[name].append(taken)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    result = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    result |= {"ratio": round(statistics.median(ratios), 4), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    print(json.dumps(result | {"device": device, "model": config.model, "repeats": config.repeats}))
    print(f"{'variant':<14}{'median s':>10}")
    for name, values in seconds.items():
        print(f"{name:<14}{statistics.median(values):>10.4f}")
    print(f"{'ratio':<14}{statistics.median(ratios):>10.4f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
