"""Settings: the command line, recipes, what is wrong together. A user's mistake is one sentence."""

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from ce_gppo import messages, parallel
from ce_gppo.entropy import read_schedule
from ce_gppo.messages import RunEnded, UserError
from ce_gppo.ranges import OneOf, check_ranges, fields_of

RECIPES = Path(__file__).parents[1] / "recipes"
DYNAMIC_SAMPLING = ("off", "filter", "refill")
# What --resume may change: how long, how often, and in how much memory.
CHANGEABLE = ("steps", "eval_every", "checkpoint_every", "max_micro_batch_tokens", "gradient_checkpointing", "shard")
CHANGEABLE += ("gpu_memory_utilization",)
REFILL_BATCHES = 3  # batches of prompts in a step, at most


def max_batches(config) -> int:
    """The most batches of prompts that a step samples: more than one only with dynamic_sampling = refill."""
    return REFILL_BATCHES if config.dynamic_sampling == "refill" else 1


def updates_of_step(config) -> int:
    """The most updates of a step. There are fewer if fewer groups have unequal rewards."""
    return config.max_kept_prompts // config.mini_batch_prompts * config.epochs


def command(main: Callable, Config: type | None = None, description: str | None = None) -> None:
    """The main block of every script: a UserError is one sentence and exit code 2, a RunEnded 1, a fault a traceback.

    Config: a dataclass of the settings on the command line, which main gets, or None.
    """

    def tell(error: Exception | str) -> None:
        told = re.sub(r"(\S{100})\S{100,}(\S{40})", r"\1...\2", str(error))  # a value that was given by mistake
        print(f"{Path(sys.argv[0]).name}: {told}", file=sys.stderr)

    def run() -> None:
        messages.open_streams()
        try:
            parallel.check_environment()
            if Config is None:
                return main()
            warn_of_two(sys.argv[1:])
            config = cli(Config, sys.argv[1:], description=description)
            check_ranges(config)
            main(config)
        except (UserError, RunEnded) as error:
            tell(error)
            sys.exit(messages.exit_code(error))
        except KeyboardInterrupt:  # train.py handles it itself, by run.StopRequest
            sys.exit(130)
        except OSError as error:
            if error.errno in messages.FULL:
                tell(f"no space is left on the disk ({error})")
            elif not (isinstance(error, BrokenPipeError) and messages.nobody_reads()):  # `| head` is no fault
                raise
            sys.exit(1)
        finally:
            messages.flush_streams()

    record(run)() if "TORCHELASTIC_RUN_ID" in os.environ else run()  # torchrun shows what was recorded


def cli(Config: type, args: list[str], **options):
    """The settings on the command line. In a terminal of three columns tyro's help would take all memory."""
    import tyro  # not at the top: bench.gpu runs without it

    for name, hint, ranges in fields_of(Config):
        for known in (",".join((*r.names, *["N"] * r.or_count)) for r in ranges if isinstance(r, OneOf)):  # for --help
            Config.__annotations__[name] = typing.Annotated[hint, tyro.conf.arg(metavar=f"{{{known}}}")]
    os.environ["COLUMNS"] = str(max(40, shutil.get_terminal_size().columns))
    return tyro.cli(Config, args=args, **options)


def warn_of_two(arguments: list[str]) -> None:
    """Say which settings are given twice: only the last one counts."""
    given = [re.sub("^--(no-)?", "--", a.partition("=")[0].replace("_", "-")) for a in arguments if a.startswith("--")]
    if twice := dict.fromkeys(name for i, name in enumerate(given) if name in given[:i]):
        messages.say(f"{', '.join(twice)} given more than once: the last one counts", warning=True)


def parse(Config: type, arguments: list[str]) -> tuple[typing.Any, str, str]:
    """(configuration, name of a recipe, folder to resume) from train.py's command line, resolved and checked."""
    warn_of_two(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--resume")
    start, arguments = parser.parse_known_args(arguments)
    if "" in (start.recipe, start.resume):  # as of a variable of the shell that is not set
        raise UserError("--recipe or --resume is empty; leave it out, or name a recipe or the folder of a run")
    pairs = itertools.pairwise([*arguments, "--"])  # --shard is short for --shard yes
    arguments = [w for a, b in pairs for w in ((a, "yes") if a == "--shard" and b.startswith("--") else (a,))]
    known = {field.name for field in dataclasses.fields(Config)} | {"recipe", "resume"}
    for argument in arguments:
        name = argument.removeprefix("--").removeprefix("no-").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known | {"help"}:
            raise UserError(f"unknown setting {argument}; known: {', '.join(sorted(known))}")
    if start.resume:
        if start.recipe:
            raise UserError("--resume continues a run with its own settings; give no recipe")
        saved = saved_config(Config, start.resume)
        given = cli(Config, arguments, default=saved)
        for name in (field.name for field in dataclasses.fields(Config) if field.name not in CHANGEABLE):
            if getattr(given, name) != getattr(saved, name):
                raise UserError(f"--resume: {name} cannot change within a run; these can: {', '.join(CHANGEABLE)}")
        return resolve(given), "", start.resume
    own = typed(Config, vars(Config()), Path(inspect.getfile(Config)))  # as edited at the top of train.py
    defaults = Config(**own | (read_recipe(Config, start.recipe) if start.recipe else {}))
    return resolve(cli(Config, arguments, default=defaults)), start.recipe or "", ""


def resolve(config):
    """The configuration, checked. Settings left at None get the values of the objective's paper, or other defaults."""
    check_ranges(config)
    values = config.spec.values(config) | {"eval_response_tokens": config.max_response_tokens}
    if (config.advantages or values["advantages"]) == "gae":  # a critic learns from every response
        values |= {"dynamic_sampling": "off", "critic_lr": 3 * config.lr}
    complete = dataclasses.replace(config, **{k: v for k, v in values.items() if getattr(config, k) is None})
    for problem in conflicts(config, complete):
        raise UserError(problem)
    return complete


def conflicts(given, c) -> Iterator[str]:
    """Settings that are wrong together, or that the objective would ignore. given: before `resolve`, c: after it."""
    published, ranks, gae = c.spec.values(c), parallel.world_size(), c.advantages == "gae"
    for name in (*(() if c.spec.has_betas else ("beta1", "beta2", "beta_schedule")), *c.spec.ignores):
        if getattr(given, name) not in (None, "", published.get(name)):
            yield f"{name} = {getattr(given, name)}: objective {c.objective} ignores it; leave it out"
    read_schedule(c.beta_schedule)
    if c.max_kept_prompts > c.prompts_per_step * max_batches(c):
        times = f" in {max_batches(c)} batches" if max_batches(c) > 1 else ""
        yield f"max_kept_prompts = {c.max_kept_prompts} is more than prompts_per_step = {c.prompts_per_step}{times}"
    if c.max_kept_prompts % c.mini_batch_prompts:
        yield f"mini_batch_prompts = {c.mini_batch_prompts} does not divide max_kept_prompts = {c.max_kept_prompts}"
    if c.overlong.isdecimal() and int(c.overlong) > (tokens := c.max_response_tokens):
        yield f"overlong = {c.overlong} is more than max_response_tokens = {tokens}: every response would be penalized"
    if ((own := c.spec.settings.get("advantages", c.advantages)) == "gae") != gae:
        yield f"advantages = {c.advantages}: objective {c.objective} needs {own}; grpo has those of groups, ppo has gae"
    if c.responses_per_prompt == 1 and not gae:
        yield f"responses_per_prompt = 1: must be at least 2, as advantages = {c.advantages} compare those of a group"
    if c.responses_per_prompt == 1 and c.dynamic_sampling != "off":
        yield f"dynamic_sampling = {c.dynamic_sampling} drops every group of responses_per_prompt = 1; leave it out"
    if c.critic_lr is not None and not gae:
        yield f"critic_lr = {c.critic_lr}: advantages = {c.advantages} have no critic, those of gae have one"
    if c.lora_alpha != type(c).lora_alpha and not c.lora_rank:
        yield f"lora_alpha = {c.lora_alpha:g}: it is the factor of adapters; set lora_rank, or leave it out"
    if c.eval_temperature == 0 and c.eval_samples > 1:
        yield f"eval_temperature = 0 gives {c.eval_samples} equal samples; eval_samples = 1 is enough"
    if c.entropy_target is not None and (c.beta_schedule or c.beta1 == c.beta2 == 0):
        yield "entropy_target moves the betas up to their values: it cannot go with beta_schedule, or where both are 0"
    if gae and c.steps <= c.warmup_steps:
        only = f"with advantages = gae only the critic learns in the first warmup_steps = {c.warmup_steps}"
        yield f"steps = {c.steps}: {only}, and the policy would stay as it is"
    if c.rollout_correction == "bypass" and c.spec.token_filter:
        yield f"rollout_correction = bypass: {c.objective} picks tokens by the trainer's old logprobs; leave it out"
    if "/" in c.run_name or c.run_name in (".", ".."):
        yield f"run_name = {c.run_name}: a name is needed, not a path; --out names the folder of the runs"
    if ranks % c.rollout_tp and c.rollout_tp > 1:
        yield f"rollout_tp = {c.rollout_tp}: must divide the number of processes, {ranks}"
    if c.prompts_per_step < ranks:
        yield f"prompts_per_step = {c.prompts_per_step}: fewer than the {ranks} processes, and each needs a prompt"


def read_recipe(Config: type, name: str, *children: str) -> dict:
    """The settings in recipes/<name>.toml, and of the recipe that it extends those that it does not set itself."""
    path, child = RECIPES / f"{name}.toml", f"{RECIPES / children[0]}.toml: extends = " if children else ""
    if name in children:
        raise UserError(f"{child}'{name}' goes round in a circle: {', '.join((*reversed(children), name))}")
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise UserError(f"{child or 'recipe '}'{name}' is unknown; known: {known}")
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of brackets in brackets
        raise UserError(f"{path}: not TOML ({error}); lines of `name = value` are needed") from None
    parent = values.pop("extends", None)
    if not isinstance(parent, str | None):
        raise UserError(f"{path}: extends = {parent!r}, where the name of a recipe is needed")
    values = typed(Config, values, path)
    return values if parent is None else read_recipe(Config, parent, name, *children) | values


def typed(Config: type, values: dict, path: Path) -> dict:
    """Settings from the file `path`, each of its field's type. UserError for an unknown name or another type."""
    types = typing.get_type_hints(Config)
    if unknown := values.keys() - types.keys():
        raise UserError(f"{path}: unknown settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(types))}")
    for key, value in values.items():
        kinds = typing.get_args(types[key]) or (types[key],)  # any one of a union
        if type(value) is int and float in kinds and abs(value) < 2**53:
            values[key] = float(value)
        elif value == "None" and type(None) in kinds:  # as on the command line; TOML has no null
            values[key] = None
        elif type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise UserError(f"{path}: {key} = {value!r}, where {names} is needed")
    return values


def saved_config(Config: type, folder: str):
    """The settings of the run in `folder`, for --resume."""
    path = Path(folder) / "config.json"
    if os.path.isfile(path.with_name("manifest.json")):
        raise UserError(f"--resume {folder}: this is a checkpoint; name the folder of its run, {path.parent.parent}")
    if not os.path.isfile(path):
        raise UserError(f"--resume {folder}: no config.json there, so it is not the folder of a run")
    saved = typed(Config, read_record(path)["config"], path)
    if missing := ", ".join(field.name for field in dataclasses.fields(Config) if field.name not in saved):
        messages.say(f"{path} has no {missing}: the defaults are used", warning=True)
    return Config(**saved)


def read_record(path: Path) -> dict:
    """A run's config.json: its settings as "config", and what run.py adds."""
    try:
        found = json.loads(path.read_bytes())
        found["config"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not the settings of a run, which can begin again in another folder") from None
    return found
