"""Published settings: read, checked, and run for two steps with model, lengths and counts scaled down."""

import itertools
import json
import re

import pytest

import train
from bench import scaling
from ce_gppo import config as settings
from ce_gppo.entropy import betas_of_step
from helpers import ROOT, Forked, metrics_of, quick, refuses, run_here

PAPER = {  # arXiv 2509.20712, Table 1, section 4.1 and appendix A.1: objective, beta1, eps_high, average
    "r1-distill-1.5b": ("ce_gppo", 0.5, 0.2, 54.9),
    "r1-distill-1.5b-grpo": ("grpo", None, 0.2, 49.1),
    "r1-distill-1.5b-dapo": ("dapo", None, 0.28, 52.4),
    "r1-distill-7b": ("ce_gppo", 0.75, 0.2, 67.5),
    "r1-distill-7b-grpo": ("grpo", None, 0.2, 60.5),
    "r1-distill-7b-dapo": ("dapo", None, 0.28, 64.5),
}
FIGURES = {  # the paper's figures 2 to 6: objective, betas, steps
    "figure2": ("ce_gppo", (0.75, 1.0), 500),
    "figure2-grpo": ("grpo", (None, None), 500),
    "figure2-dapo": ("dapo", (None, None), 500),
    "figure3-1.5b": ("ce_gppo", (0.5, 1.0), 1000),
    "figure3-7b": ("ce_gppo", (0.75, 1.0), 1000),
    "figure4": ("ce_gppo", (0.5, 1.0), 300),
    "figure5": ("ce_gppo", (0.5, 1.0), 500),
    "figure5-grpo": ("grpo", (None, None), 500),
    "figure5-dapo": ("dapo", (None, None), 500),
    "figure6": ("ce_gppo", (0.0, 1.0), 1000),
}
ONE_GPU = "r1-distill-7b-offload"
ONE_CARD = {"qwen3.5-0.8b-24g", "qwen3-4b-lora-24g", "qwen3-4b-80g", "sanity-1.5b"}
RUN = ["r1-distill-1.5b", "r1-distill-7b-dapo", "figure6"]  # plain, extended twice, with a schedule


def parse(arguments: list[str]) -> train.Config:
    return settings.parse(train.Config, arguments)[0]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Write the recipe `mine`, next to one called `yours`."""
    monkeypatch.setattr(settings, "RECIPES", tmp_path)
    (tmp_path / "yours.toml").touch()
    return (tmp_path / "mine.toml").write_text


def test_every_recipe_is_known_and_its_values_have_sources():
    known = PAPER.keys() | FIGURES.keys() | {ONE_GPU} | ONE_CARD
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} == known | {"walk", "countdown"}
    for path in [ROOT / "recipes" / f"{name}.toml" for name in known]:
        for line in path.read_text().splitlines():
            if re.match(r"(?!objective|extends|beta2 = .None)\w+ = ", line):
                assert "  # " in line, f"no source: {path}: {line}"


def differences(one: str, other: str) -> set[str]:
    """The settings in which two recipes differ."""
    ours, others = (settings.read_recipe(train.Config, name) for name in (one, other))
    return {name for name in ours.keys() | others.keys() if ours.get(name) != others.get(name)}


def test_recipes_differ_only_in_what_they_compare():
    """And the one for one GPU in settings of memory."""
    memory = {"shard", "gpu_memory_utilization", "max_micro_batch_tokens"}
    assert differences("r1-distill-7b", ONE_GPU) == memory and parse(["--recipe", ONE_GPU]).shard == "offload"
    compared = {"objective", "beta1", "beta2", "eps_high"}
    for size, kind in itertools.product(("1.5b", "7b"), ("grpo", "dapo")):
        assert differences(f"r1-distill-{size}", f"r1-distill-{size}-{kind}") <= compared
    page = (ROOT / "docs" / "paper.md").read_text()
    for name, values in FIGURES.items():
        config = parse(["--recipe", name])
        assert re.search(rf"\b{re.escape(name)}[ ;]", page), name
        assert (config.objective, (config.beta1, config.beta2), config.steps) == values
        base = "r1-distill-7b" if "7B" in config.model else "r1-distill-1.5b"
        assert differences(base, name) <= compared | {"steps", "beta_schedule"}, name
    switched = parse(["--recipe", "figure6"])
    assert [betas_of_step(switched, step, 0.5) for step in (1, 584, 585, 1000)] == [(0, 1)] * 2 + [(0.5, 1)] * 2


@pytest.mark.parametrize("words, value", [([], "no"), (["--shard"], "yes"), (["--shard", "offload"], "offload")])
def test_shard_is_short_for_shard_yes(words, value):
    assert parse([*words, "--lr", "1e-3"]).shard == parse(["--lr", "1e-3", *words]).shard == value


@pytest.mark.parametrize("name", PAPER)
def test_published_settings(name):
    config = parse(["--recipe", name])
    objective, beta1, eps_high, average = PAPER[name]
    assert (config.objective, config.eps_low, config.eps_high) == (objective, 0.2, eps_high)
    assert objective != "ce_gppo" or (config.beta1, config.beta2) == (beta1, 1.0)
    assert ("7B" if "7b" in name else "1.5B") in config.model
    assert (config.prompts_per_step, config.max_kept_prompts, config.mini_batch_prompts) == (256, 128, 16)
    assert (config.responses_per_prompt, config.max_prompt_tokens, config.max_response_tokens) == (8, 4096, 16384)
    assert (config.lr, config.warmup_steps, config.dynamic_sampling) == (1e-6, 10, "filter")
    assert (train.ADAMW["weight_decay"], train.MAX_GRAD_NORM) == (0.1, 1.0)
    assert (config.aggregation, config.overlong, config.entropy_coef) == ("token-mean", "score", 0.0)
    assert (config.eval_samples, config.eval_temperature, config.eval_top_p, config.eval_every) == (32, 0.6, 0.95, 5)

    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    scores = re.search(r"# Expect: AIME24 (.+), AIME25 (.+), HMMT25 (.+), MATH500 (.+), AMC23 (\S+) ", text).groups()
    assert sum(map(float, scores)) / 5 == pytest.approx(average, abs=0.06) and f"on average {average}, from" in text


def test_gpu_memory_utilization_is_the_share_that_the_policy_leaves():
    """As bench.scaling counts it, in steps of 0.05; one step less is a reserve."""
    for row in scaling.recipe_rows():
        if row["gpus"] == 8 or row["recipe"] == ONE_GPU:
            left = row["memory_gib"]["utilization"]
            assert left - 0.051 <= parse(["--recipe", row["recipe"]]).gpu_memory_utilization <= left


def test_the_command_line_wins(recipe):
    recipe('objective = "grpo"\nlr = 1\nsteps = 7\neps_high = 0.3\nthinking = true\n')
    config = parse(["--recipe", "mine", "--steps", "9", "--no-thinking"])
    assert (config.objective, config.lr, config.steps, config.thinking) == ("grpo", 1.0, 9, False)
    assert (config.eps_high, config.eps_low) == (0.3, 0.2)
    assert config.seed == train.Config().seed and type(config.lr) is float


def test_a_recipe_extends_another(recipe, tmp_path):
    """It has only the lines that differ. None unsets a parent's setting, as on the command line."""
    (tmp_path / "root.toml").write_text('objective = "ce_gppo"\nbeta1 = 0.5\nlr = 1e-6\nsteps = 7\n')
    (tmp_path / "yours.toml").write_text('extends = "root"\nobjective = "grpo"\nbeta1 = "None"\nsteps = 8\n')
    recipe('extends = "yours"\nsteps = 9\n')
    config = parse(["--recipe", "mine"])
    assert (config.objective, config.beta1, config.lr, config.steps) == ("grpo", None, 1e-6, 9)


@pytest.mark.parametrize(
    "text, message",
    [
        ('extends = "his"', r"mine\.toml: extends = 'his' is unknown; known: mine, yours"),
        ('extends = "mine"', r"mine\.toml: extends = 'mine' goes round in a circle: mine, mine"),
        ('extends = ["yours"]', r"mine\.toml: extends = \['yours'\], where the name of a recipe is needed"),
        ('beta_schedule = "5:0.5"', "'5:0.5' is no point"),
        ('beta_schedule = "5:0.5,1.5"', r"the betas in '5:0\.5,1\.5' must be at least 0 and at most 1"),
        ('beta_schedule = "9:0.5,1 9:0,1"', "step 9 in '9:0,1' must be above 1 and the step before it"),
        ('objective = "grpo"\nbeta_schedule = "9:0,1"', r"beta_schedule = 9:0,1: objective grpo ignores it"),
        ('entropy_target = 0.1\nbeta_schedule = "9:0,1"', r"cannot go with beta_schedule"),
        ("learning_rate = 1", r"mine\.toml: unknown settings learning_rate; known: .*\blr\b"),
        ('resume = "out/x"', r"unknown settings resume"),
        *((f"steps = {value}", r"where int is needed") for value in ('"None"', "1.5", "true")),
        ('lr = "1e-6"', "lr = .*, where float is needed"),
        ("dual_clip = [10.0]", "dual_clip = .*, where float is needed"),
        ("thinking = 1", r"thinking = 1, where bool is needed"),
        ("lr = ", r"mine\.toml: not TOML"),
        ("steps = 0", r"steps = 0: must be at least 1"),
    ],
)
def test_bad_recipes(recipe, text, message):
    recipe(text)
    refuses(message, parse, ["--recipe", "mine"])


def test_unknown_recipes_and_circles(recipe, tmp_path):
    (tmp_path / "yours.toml").write_text('extends = "mine"')
    recipe('extends = "yours"')
    refuses(r"yours\.toml: extends = 'mine' goes round in a circle: mine, yours, mine", parse, ["--recipe", "mine"])
    refuses("recipe 'his' is unknown; known: mine, yours", parse, ["--recipe", "his"])


def test_missing_data_names_the_script_that_makes_it():
    """It is found before the model is downloaded: there is no network here."""
    done = run_here("train.py", "--recipe", "r1-distill-1.5b", "--train-data", "data/math/not-there.jsonl")
    assert done.returncode == 2 and "make it with .venv/bin/python -m data.math.prepare" in done.stderr


SMALL = {
    **{"model": "data/walk/base", "steps": 2, "eval-samples": 1},
    **{"prompts-per-step": 16, "max-kept-prompts": 8, "mini-batch-prompts": 2, "max-micro-batch-tokens": 2048},
    **{"max-prompt-tokens": 16, "max-response-tokens": 16, "eval-response-tokens": 16},
}
SCRIPT = """
import sys
import loss, train
from ce_gppo.config import parse
from rollout import prepare_environment
prepare_environment()
options = sys.argv[1 : sys.argv.index("--")]
for name in sys.argv[sys.argv.index("--") + 1 :]:
    arguments = parse(train.Config, ["--recipe", name, "--run-name", name, *options])
    train.train(*arguments, stop=lambda: False)
"""


@pytest.mark.slow
def test_two_steps(tmp_path):
    """Of both sizes and two objectives. The other recipes run the same parts of the program."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = [str(word) for name, value in SMALL.items() for word in (f"--{name}", value)]
    process = Forked(str(script), *quick(tmp_path), *options, "--", *RUN)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    for name in RUN:
        record, rows = json.loads((tmp_path / name / "config.json").read_text()), metrics_of(tmp_path / name)
        assert (record["recipe"], record["config"]["lr"]) == (name, 1e-6)
        assert record["config"]["objective"] == (PAPER | FIGURES)[name][0]
        assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["optim/updates"] > 0
        assert (tmp_path / name / "checkpoint-000002").is_dir() and "eval/walk/avg_at_k" in rows[2]
