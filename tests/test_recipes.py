"""Published settings: read, checked, and run for two steps with model, lengths and counts scaled down."""

import json
import re

import pytest

import loss
import train
from ce_gppo import config as settings
from ce_gppo.types import UserError
from helpers import ROOT, Forked, quick

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
PAPER = {  # arXiv 2509.20712, Table 1, section 4.1 and appendix A.1: objective, beta1, eps_high, average
    "r1-distill-1.5b": ("ce_gppo", 0.5, 0.2, 54.9),
    "r1-distill-1.5b-grpo": ("grpo", None, 0.2, 49.1),
    "r1-distill-1.5b-dapo": ("dapo", None, 0.28, 52.4),
    "r1-distill-7b": ("ce_gppo", 0.75, 0.2, 67.5),
    "r1-distill-7b-grpo": ("grpo", None, 0.2, 60.5),
    "r1-distill-7b-dapo": ("dapo", None, 0.28, 64.5),
}


def parse(arguments: list[str]) -> train.Config:
    return settings.parse(train.Config, arguments, loss.PUBLISHED)[0]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Write a recipe of one's own, called mine, next to one called yours."""
    monkeypatch.setattr(settings, "RECIPES", tmp_path)
    (tmp_path / "yours.toml").touch()
    return (tmp_path / "mine.toml").write_text


@pytest.mark.parametrize("name", NAMES)
def test_published_settings(name):
    config = parse(["--recipe", name])
    objective, beta1, eps_high, average = PAPER[name]
    assert (config.objective, config.eps_low, config.eps_high) == (objective, 0.2, eps_high)
    assert objective != "ce_gppo" or (config.beta1, config.beta2) == (beta1, 1.0)
    assert ("7B" if "7b" in name else "1.5B") in config.model
    assert (config.prompts_per_step, config.max_kept_prompts, config.mini_batch_prompts) == (256, 128, 16)
    assert (config.responses_per_prompt, config.max_prompt_tokens, config.max_response_tokens) == (8, 4096, 16384)
    assert (config.lr, config.warmup_steps, config.max_grad_norm) == (1e-6, 10, 1.0)
    assert train.ADAMW["weight_decay"] == 0.1
    assert (config.aggregation, config.overlong_buffer, config.entropy_coef) == ("token-mean", 0, 0.0)
    assert (config.eval_samples, config.eval_temperature, config.eval_top_p, config.eval_every) == (32, 0.6, 0.95, 5)

    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    scores = re.search(r"# Expect: AIME24 (.+), AIME25 (.+), HMMT25 (.+), MATH500 (.+), AMC23 (\S+) ", text).groups()
    assert sum(map(float, scores)) / 5 == pytest.approx(average, abs=0.06) and f"on average {average}, from" in text
    assert "# Needs: " in text
    for line in text.splitlines():
        if re.match(r"(?!objective)\w+ = ", line):
            assert "  # " in line, f"no source: {line}"


def test_a_baseline_differs_in_its_objective_alone():
    for size in ("1.5b", "7b"):
        ours, *baselines = (
            settings.read_recipe(train.Config, f"r1-distill-{size}{kind}") for kind in ("", "-grpo", "-dapo")
        )
        for baseline in baselines:
            different = {name for name in ours.keys() | baseline.keys() if ours.get(name) != baseline.get(name)}
            assert different <= {"objective", "beta1", "beta2", "eps_high"}


def test_the_command_line_wins(recipe):
    recipe('objective = "grpo"\nlr = 1\nsteps = 7\neps_high = 0.3\nthinking = true\n')
    config = parse(["--recipe", "mine", "--steps", "9", "--no-thinking"])
    assert (config.objective, config.lr, config.steps, config.thinking) == ("grpo", 1.0, 9, False)
    assert (config.eps_high, config.eps_low) == (0.3, 0.2)
    assert config.seed == train.Config().seed and type(config.lr) is float


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate = 1", r"mine\.toml: unknown settings learning_rate; known: .*\blr\b"),
        ('resume = "out/x"', r"unknown settings resume"),
        ("steps = 1.5", r"mine\.toml: steps = 1\.5, where int is needed"),
        ("steps = true", r"steps = True, where int is needed"),
        ('lr = "1e-6"', r"lr = '1e-6', where float is needed"),
        ("thinking = 1", r"thinking = 1, where bool is needed"),
        ("dual_clip = [10.0]", r"dual_clip = \[10\.0\], where float is needed"),
        ("lr = ", r"mine\.toml: not TOML"),
        ("steps = 0", r"steps = 0: must be at least 1"),
    ],
)
def test_bad_recipes(recipe, text, message):
    recipe(text)
    with pytest.raises(UserError, match=message):
        parse(["--recipe", "mine"])


def test_an_unknown_recipe(recipe):
    recipe("")
    with pytest.raises(UserError, match="recipe 'his' is unknown; known: mine, yours"):
        parse(["--recipe", "his"])


def test_missing_data_names_the_script_that_makes_it():
    """Found before the model is asked for: there is no network here."""
    process = Forked("train.py", "--recipe", "r1-distill-1.5b", "--train-data", "data/math/not-there.jsonl")
    output = process.communicate()[0]
    assert process.returncode == 2 and "make it with .venv/bin/python -m data.math.prepare" in output


SMALL = {
    **{"model": "data/arithmetic/base", "steps": 2, "eval-samples": 1},
    **{"prompts-per-step": 16, "max-kept-prompts": 8, "mini-batch-prompts": 2, "max-micro-batch-tokens": 2048},
    **{"max-prompt-tokens": 32, "max-response-tokens": 48},
}
RUN = ["r1-distill-1.5b", "r1-distill-7b-dapo"]
SCRIPT = """
import sys
import loss, train
from ce_gppo.config import parse
from rollout import prepare_environment
prepare_environment()
options = sys.argv[1 : sys.argv.index("--")]
for name in sys.argv[sys.argv.index("--") + 1 :]:
    arguments = parse(train.Config, ["--recipe", name, "--run-name", name, *options], loss.PUBLISHED)
    train.train(*arguments, stop=lambda: False)
"""


@pytest.mark.slow
def test_two_steps(tmp_path):
    """Of one recipe of each size, and of two objectives: the others differ in no part of the program that runs."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = [str(word) for name, value in SMALL.items() for word in (f"--{name}", value)]
    process = Forked(str(script), *quick(tmp_path), *options, "--", *RUN)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    for name in RUN:
        record = json.loads((tmp_path / name / "config.json").read_text())
        assert record["recipe"] == name
        record = record["config"]
        assert record["objective"] == PAPER[name][0] and record["lr"] == 1e-6
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["optim/updates"] > 0
        assert (tmp_path / name / "checkpoint-000002").is_dir() and 0 < rows[2]["eval/arithmetic/avg_at_k"] < 1
