"""From the command line to a checked configuration. A user's mistake is one sentence that says what would be right."""

import argparse
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from ce_gppo import checkpoint, messages, parallel
from ce_gppo.betas import read_schedule
from ce_gppo.messages import RunEnded, UserError, first_line
from ce_gppo.objectives import BETAS, USUAL
from ce_gppo.problems import max_batches
from ce_gppo.tracking import check_wandb
from ce_gppo.types import STARTING, Named, OneOf, Range, starting

RECIPES = Path(__file__).parents[1] / "recipes"


def command(main: Callable, Config: type | None = None, description: str | None = None) -> None:
    """The main block of every script. A UserError is printed as one sentence, with exit code 2; a RunEnded with 1.

    An unexpected error during the start is one sentence as well, with exit code 2 and the file that has its traceback.
    Config: a dataclass that is read from the command line and given to main, or None.
    """

    def run() -> None:
        messages.open_streams()
        starting("cannot go on")
        try:
            parallel.check_environment()
            if Config is None:
                return main()
            config = cli(Config, description=description)
            check_ranges(config)
            main(config)
        except (UserError, RunEnded) as error:
            print(f"{Path(sys.argv[0]).name}: {shortened(str(error))}", file=sys.stderr)
            sys.exit(2 if isinstance(error, UserError) else 1)
        except BrokenPipeError:  # of `| head`; any other broken pipe must be seen
            if not messages.nobody_reads():
                raise
            sys.exit(1)
        except KeyboardInterrupt:  # train.py handles it itself, by runs.StopRequest
            sys.exit(130)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                print(f"{Path(sys.argv[0]).name}: no space is left on the disk ({error})", file=sys.stderr)
                sys.exit(1)
            if not STARTING:
                raise
            print(f"{Path(sys.argv[0]).name}: {unexpected(error)}", file=sys.stderr)
            sys.exit(2)
        finally:
            messages.flush_streams()

    # With `record` torchrun shows the error of the rank that failed.
    record(run)() if "TORCHELASTIC_RUN_ID" in os.environ else run()


def shortened(sentence: str) -> str:
    """The sentence, with `...` for the middle of each overlong word, such as a value that was given by mistake."""
    return re.sub(r"(\S{100})\S{100,}(\S{40})", r"\1...\2", sentence)


def warn_of_two(arguments: list[str]) -> None:
    """Say which settings are given twice: only the last one counts."""
    options = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    names = ["--" + option.removeprefix("--").removeprefix("no-") for option in options]
    if twice := dict.fromkeys(name for i, name in enumerate(names) if name in names[:i]):
        messages.say(f"{', '.join(twice)} given more than once: the last one counts", warning=True)


def cli(Config: type, args: list[str] | None = None, **options):
    """The settings on the command line. The help has 40 columns at least: with three or fewer tyro never ends it."""
    import tyro  # not at the top: bench.gpu runs without it

    if args is None:  # otherwise `parse` has said it
        warn_of_two(args := sys.argv[1:])
    if shutil.get_terminal_size().columns < 40:
        os.environ["COLUMNS"] = "40"
    return tyro.cli(Config, args=args, **options)


def unexpected(error: Exception) -> str:
    """One sentence: STARTING, the first line of a library's error, and the file that has its whole traceback."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ce-gppo-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        where = f"{file.name} has the whole traceback"
    except OSError as unwritten:  # no folder for such files, or a full one
        where = f"its traceback cannot be kept ({unwritten})"
    return f"{STARTING[0]}: {type(error).__name__}: {first_line(error)}; {where}"


def open_to_append(path: Path, option: str) -> typing.TextIO:
    """Open a file, and make it and its folder if missing. Called before hours are spent on its contents."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from None


def check_ranges(config) -> None:
    """UserError for the first value that is outside the range in its field's type."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        each = value if isinstance(value, tuple) else () if value is None else (value,)
        for part in (hint, *typing.get_args(hint)):  # the type itself, or one of a union, or of a tuple's values
            ranges = [r for r in getattr(part, "__metadata__", ()) if isinstance(r, Range | OneOf | Named)]
            for range_, one in itertools.product(ranges, each):
                if problem := range_.problem(one):
                    shown = repr(one) if isinstance(one, str) else f"= {one}:"
                    raise UserError(f"{name} {shown} {problem}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # how Python keeps bytes that it cannot read
            encoding = sys.getfilesystemencoding()
            raise UserError(f"{name} {value[:60]!r} is not text in {encoding}, the encoding of this terminal")


# ----------------------------------------------------------------------------------------------------------------------
# train.py's command line


def parse(Config: type, arguments: list[str]) -> tuple[typing.Any, str, str]:
    """(configuration, name of a recipe, folder to resume) from train.py's command line, resolved and checked.

    The settings of --resume are those of its folder. An unknown setting is a UserError that lists the known ones; so is
    what W&B cannot use in the environment.
    """
    check_wandb()
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space and not re.fullmatch("[1-9][0-9]{0,4}", space):
        raise UserError(f"VLLM_CPU_KVCACHE_SPACE={space} in the environment: vLLM needs a whole number of GiB")

    warn_of_two(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--resume")
    start, arguments = parser.parse_known_args(arguments)
    if "" in (start.recipe, start.resume):  # as of a variable of the shell that is not set
        raise UserError("--recipe or --resume is empty; leave it out, or name a recipe or the folder of a run")
    for place, (argument, after) in enumerate(itertools.pairwise([*arguments, "--"]), start=1):
        if argument == "--shard" and after.startswith("--"):
            arguments.insert(place, "yes")  # short for --shard yes
            break
    known = {field.name for field in dataclasses.fields(Config)} | {"recipe", "resume"}
    for argument in arguments:
        name = argument.removeprefix("--").removeprefix("no-").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known | {"help"}:
            raise UserError(f"unknown setting {argument}; known: {', '.join(sorted(known))}")
    if start.resume:
        if arguments or start.recipe:
            raise UserError("--resume continues a run with its own settings; give no others")
        return resolve(saved_config(Config, start.resume)), "", start.resume
    defaults = Config(**read_recipe(Config, start.recipe)) if start.recipe else Config()
    return resolve(cli(Config, args=arguments, default=defaults)), start.recipe or "", ""


def resolve(config):
    """The configuration, checked. Settings left at None get the values of the objective's paper, or other defaults."""
    check_ranges(config)
    values = config.spec.values(config)
    values["eval_response_tokens"] = config.max_response_tokens
    if (config.advantages or values["advantages"]) == "gae":
        values["filter_groups"] = "off"  # a critic learns from every response
        values["critic_lr"] = 3 * config.lr
    unset = {name: value for name, value in values.items() if getattr(config, name) is None}
    given, config = config, dataclasses.replace(config, **unset)
    check_together(given, config)
    return config


def check_together(given, config) -> None:
    """UserError for settings that are wrong together, or that the objective would ignore."""
    spec, published = config.spec, config.spec.values(config)
    for name in (*(() if spec.has_betas else BETAS), *spec.ignores):
        if getattr(given, name) not in (None, "", published.get(name)):
            raise UserError(f"{name} = {getattr(given, name)}: objective {config.objective} ignores it; leave it out")
    read_schedule(config.beta_schedule)
    for wrong, message in (
        (
            config.max_kept_prompts > config.prompts_per_step * max_batches(config),
            f"max_kept_prompts = {config.max_kept_prompts} is more than prompts_per_step = {config.prompts_per_step}"
            + (f" in {max_batches(config)} batches" if max_batches(config) > 1 else ""),
        ),
        (
            config.max_kept_prompts % config.mini_batch_prompts,
            f"mini_batch_prompts = {config.mini_batch_prompts} does not divide max_kept_prompts = "
            f"{config.max_kept_prompts}; updates of equal size are needed",
        ),
        (
            config.overlong.isdecimal() and int(config.overlong) > config.max_response_tokens,
            f"overlong = {config.overlong} is more than max_response_tokens = {config.max_response_tokens}: every "
            "response would be penalized",
        ),
        (
            published["advantages"] == "gae" and config.advantages != "gae",
            f"advantages = {config.advantages}: objective {config.objective} has those of its critic, gae; objective "
            "grpo has those of groups",
        ),
        (
            config.advantages == "gae" and published["advantages"] not in ("gae", USUAL["advantages"]),
            f"advantages = gae: objective {config.objective} is one by its advantages, {published['advantages']}; "
            "objective ppo has a critic",
        ),
        (
            config.responses_per_prompt == 1 and config.advantages != "gae",
            f"responses_per_prompt = 1: must be at least 2, as advantages = {config.advantages} compare the responses "
            "of a group; those of gae do not",
        ),
        (
            config.responses_per_prompt == 1 and config.filter_groups != "off",
            f"filter_groups = {config.filter_groups} drops groups of equal rewards: every group, with "
            "responses_per_prompt = 1; leave it out",
        ),
        (
            config.critic_lr is not None and config.advantages != "gae",
            f"critic_lr = {config.critic_lr}: advantages = {config.advantages} have no critic, those of gae have one",
        ),
        (
            config.eval_temperature == 0 and config.eval_samples > 1,
            f"eval_temperature = 0 gives {config.eval_samples} equal samples; eval_samples = 1 is enough",
        ),
        (
            config.entropy_target is not None and config.beta1 == config.beta2 == 0,
            "entropy_target moves the betas between 0 and their values, and both are 0",
        ),
        (
            config.advantages == "gae" and config.steps <= config.warmup_steps,
            f"steps = {config.steps}: with advantages = gae only the critic learns in the first warmup_steps = "
            f"{config.warmup_steps}, and the policy would stay as it is",
        ),
        (
            config.entropy_target is not None and config.beta_schedule,
            "entropy_target moves the betas: it cannot go with beta_schedule",
        ),
        (
            config.old_logprobs == "sampler" and spec.picks is not None,
            f"objective {config.objective} picks tokens by the trainer's entropy: it needs old_logprobs = trainer",
        ),
        (
            config.old_logprobs == "sampler" and config.rollout_correction != "none",
            "rollout_correction corrects from vLLM's logprobs to the trainer's: it needs old_logprobs = trainer",
        ),
        (
            "/" in config.run_name or config.run_name in (".", ".."),
            f"run_name = {config.run_name}: a name is needed, not a path; --out names the folder of the runs",
        ),
        (config.rollout_tp > 1 and parallel.world_size() % config.rollout_tp, rollout_tp_problem(config)),
        (
            config.prompts_per_step < parallel.world_size(),
            f"prompts_per_step = {config.prompts_per_step}: fewer than the {parallel.world_size()} processes, and each "
            "needs a prompt",
        ),
    ):
        if wrong:
            raise UserError(message)


def rollout_tp_problem(config) -> str:
    return f"rollout_tp = {config.rollout_tp}: must divide the number of processes, {parallel.world_size()}"


def read_recipe(Config: type, name: str, children: tuple[str, ...] = ()) -> dict:
    """The settings in recipes/<name>.toml, each of its field's type. UserError for an unknown recipe, name or type.

    A recipe with a line `extends = "parent"` has its parent's settings, except those that it sets itself.
    children: the chain of recipes that extend this one.
    """
    path, child = RECIPES / f"{name}.toml", f"{RECIPES / children[-1]}.toml: extends = " if children else ""
    if name in children:
        raise UserError(f"{child}'{name}' goes round in a circle: {', '.join((*children, name))}")
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise UserError(f"{child or 'recipe '}'{name}' is unknown; known: {known}")
    try:
        values = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets, thousands of them
        raise UserError(f"{path}: not TOML ({error}); lines of `name = value` are needed") from None
    parent, inherited = values.pop("extends", None), {}
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends = {parent!r}, where the name of a recipe is needed")
        inherited = read_recipe(Config, parent, (*children, name))
    return inherited | typed(Config, values, path)


def typed(Config: type, values: dict, path: Path) -> dict:
    """Settings from the file `path`, each of its field's type. UserError for an unknown name or another type."""
    types = typing.get_type_hints(Config)
    if unknown := values.keys() - types.keys():
        raise UserError(f"{path}: unknown settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(types))}")
    for key, value in values.items():
        kinds = typing.get_args(types[key]) or (types[key],)  # any one of a union
        if type(value) is int and float in kinds and abs(value) < 2**53:
            values[key] = value = float(value)
        if value == "None" and type(None) in kinds:  # as on the command line; TOML has no null
            values[key] = value = None
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise UserError(f"{path}: {key} = {value!r}, where {names} is needed")
    return values


def saved_config(Config: type, folder: str):
    """The settings of the run in `folder`."""
    path = Path(folder) / "config.json"
    if os.path.isfile(path.parent / checkpoint.MANIFEST):
        raise UserError(f"--resume {folder}: this is a checkpoint; name the folder of its run, {path.parent.parent}")
    if not os.path.isfile(path):
        raise UserError(f"--resume {folder}: no config.json there, so it is not the folder of a run")
    try:
        saved = json.loads(path.read_text())["config"]
        saved = typed(Config, saved, path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: not the settings of a run; it may be half-written, and then the run has no step yet"
        ) from None
    if missing := ", ".join(field.name for field in dataclasses.fields(Config) if field.name not in saved):
        messages.say(f"{path} has no {missing}: the defaults are used", warning=True)
    return Config(**saved)
