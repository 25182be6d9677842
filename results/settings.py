"""The settings that the sweeps compare, and the sweeps: which task, settings and seeds. results/sweep.py runs them."""

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
    "gppo": {"objective": "gppo"},
    "ce_gppo (0.5, 1)": {"beta1": 0.5, "beta2": 1.0},
    "ce_gppo (0.75, 1)": {"beta1": 0.75, "beta2": 1.0},
    "ce_gppo (1, 0.5)": {"beta1": 1.0, "beta2": 0.5},
    "ce_gppo (0, 1)": {"beta1": 0.0, "beta2": 1.0},
    "lp_only (1, 1)": {"objective": "lp_only", "beta1": 1.0, "beta2": 1.0},
    "grpo, bonus 0.001": {"objective": "grpo", "entropy_coef": 0.001},
    "grpo, bonus 0.003": {"objective": "grpo", "entropy_coef": 0.003},
    "grpo, bonus 0.01": {"objective": "grpo", "entropy_coef": 0.01},
    "grpo, bonus 0.03": {"objective": "grpo", "entropy_coef": 0.03},
    "ce_gppo, target 0.9": {"entropy_target": 0.9},
}
CE = ("ce_gppo (0, 1)", "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)", "ce_gppo (1, 0.5)")  # by beta2 - beta1, falling
WEAK, STRONG = ("grpo, bonus 0.001", "grpo, bonus 0.003"), ("grpo, bonus 0.01", "grpo, bonus 0.03")

# Learning rates and updates per rollout were chosen once for all settings of a sweep: docs/evidence.md.
WALK = {"recipe": "walk", "eval_every": 25, "eval_samples": 8}
SIX_OF_48 = {"prompts_per_step": 48, "max_kept_prompts": 48, "mini_batch_prompts": 6}  # eight updates per rollout
WORDS = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "train_data": "data/words/train.jsonl",
    "eval_data": "data/words/eval.jsonl",
    "max_prompt_tokens": 192,
    "max_response_tokens": 32,
    "prompts_per_step": 12,
    "max_kept_prompts": 8,
    "mini_batch_prompts": 1,  # up to eight updates per rollout
    "responses_per_prompt": 4,
    "lr": 1e-5,
    "warmup_steps": 0,
    "eval_every": 12,
    "eval_samples": 4,
}
TWO = {"mini_batch_prompts": 2}  # 32 updates per rollout
OURS = ("gppo", "lp_only (1, 1)")
SWEEPS = {
    "walk": Sweep(
        "walk", WALK | SIX_OF_48, ("grpo", "dapo", *CE, *OURS, *WEAK, "ce_gppo, target 0.9"), seeds=5, steps=150
    ),
    "walk-32": Sweep("walk", WALK | TWO, ("grpo", *CE[:3], *OURS, *STRONG), seeds=3, steps=100),
    "walk-hot": Sweep("walk", WALK | TWO | {"lr": 1e-4, "eval_every": 20}, ("grpo", *CE[:3], *OURS), seeds=3, steps=40),
    "countdown-32": Sweep(
        "countdown",
        {"recipe": "countdown"} | TWO | {"eval_every": 25, "eval_samples": 8},
        ("grpo", *CE[:2], *OURS),
        seeds=3,
        steps=100,
    ),
    "words": Sweep("words", WORDS, ("grpo", *OURS), seeds=3, steps=12),
}
