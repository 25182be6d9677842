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
    "dapo": {"objective": "dapo", "filter_groups": "on"},
    "gppo": {"objective": "gppo"},
    "cispo": {"objective": "cispo"},
    "gspo": {"objective": "gspo"},
    "ce_gppo (0.5, 1)": {"beta1": 0.5, "beta2": 1.0},
    "ce_gppo (0.75, 1)": {"beta1": 0.75, "beta2": 1.0},
    "ce_gppo (1, 0.5)": {"beta1": 1.0, "beta2": 0.5},
    "ce_gppo (0, 1)": {"beta1": 0.0, "beta2": 1.0},
    "lp_only (1, 1)": {"objective": "lp_only", "beta1": 1.0, "beta2": 1.0},
    "grpo, bonus 0.001": {"objective": "grpo", "entropy_coef": 0.001},
    "grpo, bonus 0.003": {"objective": "grpo", "entropy_coef": 0.003},
    "grpo, bonus 0.01": {"objective": "grpo", "entropy_coef": 0.01},
    "grpo, bonus 0.03": {"objective": "grpo", "entropy_coef": 0.03},
    "ce_gppo, target 0.11": {"entropy_target": 0.11},
    "ce_gppo, target 0.9": {"entropy_target": 0.9},
    "dapo, refilled": {"objective": "dapo"},
    "dr_grpo": {"objective": "dr_grpo"},
    "rloo": {"objective": "rloo"},
    "cispo [0.8, 1.2]": {"objective": "cispo", "eps_low": 0.2, "eps_high": 0.2},
    "cispo [0, 5]": {"objective": "cispo", "eps_low": 1.0, "eps_high": 4.0},
    "high_entropy": {"objective": "high_entropy"},
    "clip_cov": {"objective": "clip_cov"},
    "kl_cov": {"objective": "kl_cov"},
    "sapo": {"objective": "sapo"},
    "ppo": {"objective": "ppo"},
    "grpo, target 0.11": {"objective": "grpo", "entropy_target": 0.11},
    "lp_only (0.75, 1)": {"objective": "lp_only"},
    "lp_only_half (0.75, 1)": {"objective": "lp_only_half"},
}
CE = ("ce_gppo (0, 1)", "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)", "ce_gppo (1, 0.5)")  # by beta2 - beta1, falling

# Learning rates and updates per rollout were chosen once for all settings of a sweep: docs/evidence.md.
WALK = {"recipe": "walk", "eval_every": 25, "eval_samples": 8}
SIX_OF_48 = {"prompts_per_step": 48, "max_kept_prompts": 48, "mini_batch_prompts": 6}  # eight updates per rollout
SWEEPS = {
    "walk": Sweep(
        "walk",
        WALK | SIX_OF_48,
        (
            "grpo",
            "dapo",
            "gppo",
            *CE,
            "lp_only (1, 1)",
            "grpo, bonus 0.001",
            "grpo, bonus 0.003",
            "ce_gppo, target 0.9",
        ),
        seeds=5,
        steps=150,
    ),
    "walk-32": Sweep(
        "walk",
        WALK | {"mini_batch_prompts": 2},
        ("grpo", *CE[:3], "gppo", "lp_only (1, 1)", "grpo, bonus 0.01", "grpo, bonus 0.03"),
        seeds=3,
        steps=100,
    ),
    "walk-hot": Sweep(
        "walk",
        WALK | {"mini_batch_prompts": 2, "lr": 1e-4, "eval_every": 20},
        ("grpo", *CE[:3], "gppo", "lp_only (1, 1)", "lp_only_half (0.75, 1)"),
        seeds=3,
        steps=40,
    ),
    "countdown-32": Sweep(
        "countdown",
        {"recipe": "countdown", "mini_batch_prompts": 2, "eval_every": 25, "eval_samples": 8},
        ("grpo", *CE[:2], "gppo", "lp_only (1, 1)"),
        seeds=3,
        steps=100,
    ),
    "words": Sweep(
        "words",
        {
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
        },
        ("grpo", "gppo", "lp_only (1, 1)"),
        seeds=3,
        steps=12,
    ),
    "arithmetic-hot": Sweep(
        "arithmetic",
        {"lr": 2e-4} | SIX_OF_48 | {"eval_every": 20, "eval_samples": 8},
        ("grpo", "gppo", "ce_gppo (0, 1)", "lp_only (1, 1)"),
        seeds=3,
        steps=40,
    ),
    "arithmetic": Sweep(
        "arithmetic",
        {"lr": 1e-4} | SIX_OF_48 | {"eval_every": 20, "eval_samples": 8},
        (
            *("grpo", "dapo", "gppo", "cispo", "gspo", "ce_gppo (0.5, 1)", "ce_gppo (0.75, 1)", "ce_gppo (1, 0.5)"),
            *("ce_gppo (0, 1)", "grpo, bonus 0.01", "grpo, bonus 0.03", "ce_gppo, target 0.11"),
        ),
        seeds=5,
        steps=80,
    ),
}
