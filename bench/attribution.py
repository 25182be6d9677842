"""The cost of the entropy accounting: time of the trainer's part of a step with it, over that with only mean entropy.

    .venv/bin/python -m bench.attribution --model data/arithmetic/base --repeats 15

Run it from the repository root. It measures train.learn (old logprobs and updates) and the step's metrics. Rollouts are
left out: they cost the same in both variants, which makes the share of a whole step smaller than the printed ratio.
The variants run in turn, on the same responses. It also prints the time of the pass that computes old logprobs, as a
share of the updates' time.
"""

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import train
from bench import common
from ce_gppo import entropy, forward
from ce_gppo import types as t
from ce_gppo.checkpoint import State
from ce_gppo.config import command, resolve
from ce_gppo.forward import Policy
from ce_gppo.model import load_model
from ce_gppo.perf import Meter
from ce_gppo.report import probability_histograms
from ce_gppo.statistics import step_metrics
from ce_gppo.types import Response

LR = 1e-12  # the weights stay as they are; at 0 train.learn would make no update


@dataclass
class Config:
    model: str = "data/arithmetic/base"  # folder or hub name
    prompts: t.Count = 64  # groups of 8 responses
    prompt_tokens: t.Count = 15
    response_tokens: t.Count = 35  # on average; lengths vary by a third
    repeats: t.Count = 15  # pairs of runs


def make_groups(vocabulary: int, config: Config) -> list[list[Response]]:
    """Random responses of random lengths; in each group half of the rewards are 1."""
    generator = torch.Generator().manual_seed(0)
    shortest, longest = config.response_tokens * 2 // 3, config.response_tokens * 4 // 3
    groups = []
    for _ in range(config.prompts):
        prompt_ids = common.random_ids(config.prompt_tokens, vocabulary, generator)
        lengths = torch.randint(shortest, longest, (8,), generator=generator).tolist()
        responses = [common.random_ids(length, vocabulary, generator) for length in lengths]
        groups.append([common.response_of(prompt_ids, ids, reward=float(i % 2)) for i, ids in enumerate(responses)])
    return groups


def fold_without_s(z, m, sums, target_logits, place, temperature: float):
    """entropy._fold without the two sums that only S needs."""
    z = z if temperature == 1 else z / temperature
    inside = (place >= 0) & (place < z.shape[1])
    target_logits = target_logits + z.gather(1, place.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1) * inside
    e, ez, ee, eez = sums
    new_m = torch.maximum(m, z.amax(1))
    shift = m - new_m
    scale = shift.exp()
    z = z - new_m[:, None]
    p = z.exp()
    return new_m, (e * scale + p.sum(1), (ez + shift * e) * scale + z.mul_(p).sum(1), ee, eez), target_logits


def set_accounting(everything: bool, originals=(entropy._fold, forward.token_sums)) -> None:
    """Switch the accounting on, or replace its parts by functions that compute only logprobs and entropy."""
    without = fold_without_s, lambda info, *_: {"tokens": info["ratio"].sum()}
    entropy._fold, forward.token_sums = originals if everything else without


def step(policy, optimizer, groups, config: train.Config, folder: Path, meter: Meter, everything: bool) -> None:
    """The trainer's work in a step."""
    groups, mini_batches = train.select(groups, config)  # new responses, which have no old logprobs yet
    state = State(wandb_id="")
    objective = train.objective_of_step(config, 1, state.control)
    updates = train.learn(policy, optimizer, groups, mini_batches, objective, LR, state, config, folder, meter)
    if everything:
        step_metrics(groups, mini_batches, updates, 0.0)
        probability_histograms(train.flatten(mini_batches))
    else:
        torch.cat([r.entropy for r in train.flatten(groups)]).mean().item()


def main(config: Config) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(config.model, device)
    settings = train.Config(prompts_per_step=config.prompts, max_kept_prompts=config.prompts)
    settings = resolve(replace(settings, mini_batch_prompts=min(8, config.prompts)))
    policy, optimizer, meter = Policy(model), torch.optim.AdamW(model.parameters()), Meter(model, device)
    groups = make_groups(len(tokenizer), config)
    seconds = {"everything": [], "entropy only": []}
    with tempfile.TemporaryDirectory() as folder:  # for updates that are skipped, of which there are none
        for repeat in range(config.repeats + 1):
            for name in seconds:
                everything = name == "everything"
                set_accounting(everything)
                arguments = policy, optimizer, groups, settings, Path(folder), meter, everything
                taken = common.timed(lambda arguments=arguments: step(*arguments), device == "cuda")
                if repeat:  # the first pair warms up
                    seconds[name].append(taken)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = medians | {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    result |= {"bench": "attribution", "device": device, "model": config.model, "repeats": config.repeats}
    # Forward over all mini-batches except the first, against forward and backward over all.
    result["old_logprobs_over_update"] = meter.seconds["time/old_logprobs"] / meter.seconds["time/update"]
    rows = [*medians.items(), ("ratio, median of the pairs", result["ratio"])]
    rows.append(("old logprobs over update, both variants", result["old_logprobs_over_update"]))
    common.show(result, [("variant", "median seconds"), *rows])


if __name__ == "__main__":
    command(main, Config, __doc__)
