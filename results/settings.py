"""The settings that sweeps and branches compare, and the sweeps: which task, settings and seeds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sweep:
    """The settings that all runs of a sweep share, and those that it compares. All others are train.py's defaults."""

    source: str  # of the held-out problems
    common: dict[str, object]
    settings: tuple[str, ...]  # names in SETTINGS; --settings runs others
    seeds: int
    steps: int


SETTINGS = {
    "grpo": {"objective": "grpo"},
    "dapo": {"objective": "dapo", "dynamic_sampling": "filter"},
    "cispo": {"objective": "cispo"},
    "gppo": {"objective": "gppo", "eps_high": 0.2},  # like the others'
    "ce_gppo (0, 1)": {"beta1": 0.0, "beta2": 1.0},
    "ce_gppo (0.5, 1)": {"beta1": 0.5, "beta2": 1.0},
    "ce_gppo (0.75, 1)": {"beta1": 0.75, "beta2": 1.0},
    "ce_gppo (1, 0.5)": {"beta1": 1.0, "beta2": 0.5},
    "ce_gppo (1, 0)": {"beta1": 1.0, "beta2": 0.0},
    "lp_only (1, 1)": {"objective": "lp_only", "beta1": 1.0, "beta2": 1.0},
    "grpo, bonus 0.001": {"objective": "grpo", "entropy_coef": 0.001},
    "grpo, bonus 0.003": {"objective": "grpo", "entropy_coef": 0.003},
    "grpo, bonus 0.01": {"objective": "grpo", "entropy_coef": 0.01},
    "grpo, bonus 0.03": {"objective": "grpo", "entropy_coef": 0.03},
    "ce_gppo, target 0.9": {"entropy_target": 0.9},
    "decaying (1, 1)": {"objective": "decaying"},
    "dgpo": {"objective": "dgpo"},
    "erc": {"objective": "erc", "dynamic_sampling": "filter", "overlong": "score"},
    "dppo": {"objective": "dppo"},
}
CE = ("ce_gppo (0, 1)", "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)", "ce_gppo (1, 0.5)")  # by beta2 - beta1, falling
OURS = ("gppo", "lp_only (1, 1)")
WEAK, STRONG = ("grpo, bonus 0.001", "grpo, bonus 0.003"), ("grpo, bonus 0.01", "grpo, bonus 0.03")
BRANCHED = ("grpo", "dapo", "cispo", "ce_gppo (1, 0)", *CE[:3], *OURS, *WEAK)  # in single steps

# Learning rates and updates per rollout were chosen once for all settings of a sweep: docs/evidence.md.
WALK = {"prompts_per_step": 64, "max_kept_prompts": 64, "mini_batch_prompts": 8, "responses_per_prompt": 8, "lr": 3e-5}
WALK |= {"max_prompt_tokens": 16, "max_response_tokens": 16, "warmup_steps": 5, "eval_every": 25, "eval_samples": 8}
COUNTDOWN = {"recipe": "countdown", "mini_batch_prompts": 2, "eval_every": 25, "eval_samples": 8}
SIX_OF_48 = {"prompts_per_step": 48, "max_kept_prompts": 48, "mini_batch_prompts": 6}  # eight updates per rollout
TWO = {"mini_batch_prompts": 2}  # 32 updates per rollout
STEADY = ("decaying (1, 1)", "dgpo", "erc", "dppo")  # that keep less than GPPO, or by another rule
HOT = TWO | {"lr": 1e-4, "eval_every": 20}
COIN = {"rewards": "results/coin.py:score", "eval_every": 25}
WORDS = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "max_prompt_tokens": 192, "max_response_tokens": 32}
WORDS |= {"train_data": "data/words/train.jsonl", "eval_data": "data/words/eval.jsonl", "lr": 1e-5, "warmup_steps": 0}
WORDS |= {"prompts_per_step": 12, "max_kept_prompts": 8, "mini_batch_prompts": 1, "responses_per_prompt": 4}
WORDS |= {"eval_every": 12, "eval_samples": 4}
TOSSED = ("grpo", "gppo", *STEADY, "ce_gppo (1, 0)", *CE[:3], "dapo", STRONG[0])
SWEEPS = {
    "walk": Sweep("walk", WALK | SIX_OF_48, ("grpo", "dapo", *CE, *OURS, *WEAK, "ce_gppo, target 0.9"), 5, 150),
    "walk-32": Sweep("walk", WALK | TWO, ("grpo", *CE[:3], *OURS, *STRONG), 3, 100),
    "walk-hot": Sweep("walk", WALK | HOT, ("grpo", *CE[:3], *OURS, "dapo", *STEADY, STRONG[0]), 3, 40),
    "coin": Sweep("walk", WALK | HOT | COIN, TOSSED, 5, 25),
    "coin-8": Sweep("walk", WALK | COIN, ("grpo", "gppo", *STEADY, *CE[:1]), 3, 25),
    "countdown-32": Sweep("countdown", COUNTDOWN, ("grpo", *CE[:2], *OURS), 3, 100),
    "words": Sweep("words", WORDS, ("grpo", *OURS), 3, 12),
}
