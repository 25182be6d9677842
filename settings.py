"""From the command line to a checked configuration. A user's mistake is one sentence that says what would be right."""

import dataclasses
import fcntl
import json
import math
import time
import tomllib
import typing
from pathlib import Path

import tyro

import checkpoint
import loss
import ranks
from prompts import UserError

RECIPES = Path(__file__).parent / "recipes"

# What the objectives' papers set where their authors were not silent, for settings that are left at None.
PUBLISHED = {
    "dapo": {"eps_high": 0.28},  # arXiv 2503.14476; and a fifth of the response's limit as overlong buffer
    "cispo": {"eps_low": 1.0},  # arXiv 2506.13585: no lower bound
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4, "aggregation": "seq-mean-token-mean"},  # arXiv 2507.18071
}


def resolve(config):
    """The configuration with every None that stands for a published value filled in, checked."""
    values = {"eps_low": 0.2, "eps_high": 0.2, "aggregation": "token-mean"} | PUBLISHED.get(config.objective, {})
    values["overlong_buffer"] = config.max_response_tokens // 5 if config.objective == "dapo" else 0
    unset = {name: value for name, value in values.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **unset)
    check(config)
    return config


def check(config) -> None:
    """UserError, in one sentence, for what cannot be meant."""
    for name, known in (
        ("objective", loss.OBJECTIVES),
        ("aggregation", loss.AGGREGATIONS),
        ("rollout_correction", loss.ROLLOUT_CORRECTIONS),
        ("on_failed_checkpoint", ("continue", "stop")),
    ):
        if getattr(config, name) not in known:
            raise UserError(f"{name} '{getattr(config, name)}' is unknown; known: {', '.join(known)}")
    for field in dataclasses.fields(config):
        least = 0 if field.name in ("seed", "overlong_buffer", "warmup_steps", "logged_samples", "top_k") else 1
        if field.type is int and getattr(config, field.name) < least:
            raise UserError(f"{field.name} = {getattr(config, field.name)}: must be at least {least}")
    if config.responses_per_prompt < 2:
        raise UserError("responses_per_prompt = 1: a group needs at least 2 responses to compare")
    if config.max_kept_prompts > config.prompts_per_step:
        raise UserError(
            f"max_kept_prompts = {config.max_kept_prompts} is more than prompts_per_step = {config.prompts_per_step}"
        )
    if config.max_kept_prompts % config.mini_batch_prompts:
        raise UserError(
            f"mini_batch_prompts = {config.mini_batch_prompts} does not divide max_kept_prompts = "
            f"{config.max_kept_prompts}; updates of equal size are needed"
        )
    if config.top_p != 1.0 or config.top_k != 0:
        raise UserError(
            f"top_p = {config.top_p}, top_k = {config.top_k}: rollouts to train on need 1.0 and 0, or vLLM "
            "samples from a renormalized distribution and the ratio is biased (eval_top_p is free)"
        )
    for name in (
        "lr",
        "weight_decay",
        "max_grad_norm",
        "eps_low",
        "eps_high",
        "rollout_correction_cap",
        "max_mismatch",
        "eval_temperature",
    ):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name} = {getattr(config, name)}: must be a number from 0 upwards")
    for name in ("eval_top_p", "gpu_memory_utilization"):
        if not 0 < getattr(config, name) <= 1:
            raise UserError(f"{name} = {getattr(config, name)}: must be above 0, and at most 1")
    if not all(0 <= beta < 1 for beta in config.adam_betas):
        raise UserError(f"adam_betas = {config.adam_betas}: must be from 0 to below 1")
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise UserError(f"dual_clip = {config.dual_clip}: must be above 1, or None to turn it off")
    for name in ("beta1", "beta2", "beta1_end", "beta2_end"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} = {value}: must be from 0 to 1")
    if config.entropy_target is not None:
        if not 0 < config.entropy_target < math.inf:
            raise UserError(f"entropy_target = {config.entropy_target}: must be above 0 nats, or None to turn it off")
        if config.objective != "ce_gppo" or config.beta1_end is not None or config.beta2_end is not None:
            raise UserError("entropy_target moves the betas: it needs objective ce_gppo and no beta1_end or beta2_end")
    if config.temperature <= 0:
        raise UserError(f"temperature = {config.temperature}: must be above 0, the policy would have no entropy")


def parse(Config: type, arguments: list[str]):
    """The command line as a Config, resolved and checked. An unknown setting is an error that lists the known ones."""
    known = {field.name for field in dataclasses.fields(Config)}
    for argument in arguments:
        name = argument.removeprefix("--").removeprefix("no-").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known | {"help"}:
            raise UserError(f"unknown setting {argument}; known: {', '.join(sorted(known))}")
    config = tyro.cli(Config, args=arguments, description=Config.__doc__)
    if config.recipe and not config.resume:
        defaults = Config(**read_recipe(Config, config.recipe))
        config = tyro.cli(Config, args=arguments, default=defaults)
    if config.resume and config != Config(resume=config.resume):
        raise UserError("--resume continues a run with its own settings; leave the others away")
    return resolve(resumed(Config, config.resume) if config.resume else config)


def read_recipe(Config: type, name: str) -> dict:
    """The settings in recipes/<name>.toml, each of its field's type. UserError for an unknown recipe, name or type."""
    path = RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise UserError(f"recipe '{name}' is unknown; known: {known}")
    try:
        values = tomllib.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not TOML ({error}); lines of `name = value` are needed") from None
    types = {field.name: field.type for field in dataclasses.fields(Config) if field.name not in ("recipe", "resume")}
    if unknown := values.keys() - types.keys():
        raise UserError(f"{path}: unknown settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(types))}")
    for key, value in values.items():
        is_pair = typing.get_origin(types[key]) is tuple
        kinds = typing.get_args(types[key]) or (types[key],)  # of a union any one, of a pair those of its parts
        parts = value if is_pair and isinstance(value, list) else [value]
        parts = [float(part) if type(part) is int and float in kinds else part for part in parts]
        if any(type(part) not in kinds for part in parts) or is_pair and len(parts) != len(kinds):
            wanted = types[key].__name__ if isinstance(types[key], type) and not is_pair else types[key]
            raise UserError(f"{path}: {key} = {value!r}, where {wanted} is needed")
        values[key] = tuple(parts) if is_pair else parts[0]
    return values


def resumed(Config: type, folder: str):
    """The settings of the run in `folder`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"--resume {folder}: no config.json there, so it is not the folder of a run")
    saved = json.loads(path.read_text())["config"]
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := saved.keys() - known:
        raise UserError(f"{path}: unknown settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return Config(**saved | {"adam_betas": tuple(saved["adam_betas"]), "resume": folder})


def run_folder(config) -> Path:
    return Path(config.out) / (
        config.run_name or f"{config.objective}-seed{config.seed}-{time.strftime('%m%d-%H%M%S')}"
    )


def locate(config):
    """(folder, checkpoint or None) of the run to be: new, resumed, or one that was interrupted. Makes nothing yet.

    Raises UserError where the folder belongs to another run.
    """
    folder = Path(config.resume) if config.resume else run_folder(config)
    if not config.resume and (found := interrupted(config)):
        folder = found
    elif not config.resume and folder.exists():
        raise UserError(
            f"{folder} belongs to a run that is finished or has other settings; choose another name with --run-name"
        )
    last = checkpoint.newest(folder)
    if (folder / "config.json").exists():
        after = f"after {last.name}" if last else "from its start, as there is no checkpoint yet"
        print(
            f"going on with {folder} {after}; a new run of the same settings needs a name of its own: --run-name NAME"
        )
    return folder, last


def claim(folder: Path) -> None:
    """Make the folder, and lock it until this process ends. UserError if another process trains there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not lock(folder):
        raise UserError(f"{folder}: another process is training there; choose another name with --run-name")


def interrupted(config) -> Path | None:
    """The newest run with these very settings that is neither finished nor being trained by another process."""
    wanted = _comparable(dataclasses.asdict(config))
    paths = sorted(
        Path(config.out).glob(f"{config.run_name or '*'}/config.json"), key=lambda path: path.stat().st_mtime
    )
    for path in reversed(paths):
        finished = (path.parent / f"checkpoint-{config.steps:06d}").exists()
        try:
            same = _comparable(json.loads(path.read_text())["config"]) == wanted
        except (ValueError, KeyError):
            continue
        if same and not finished and lock(path.parent, keep=False):
            return path.parent
    return None


def _comparable(config: dict) -> dict:
    return json.loads(json.dumps(config | {"run_name": "", "resume": ""}))


_locks = []  # open as long as the process lives


def lock(folder: Path, keep: bool = True) -> bool:
    """Whether no other process is training in this folder; from now on this one is, if `keep`."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    if keep:
        _locks.append(file)
    return True


def check_ranks(config) -> None:
    """UserError for what does not fit the number of processes."""
    if ranks.world() % config.rollout_tp:
        raise UserError(f"rollout_tp = {config.rollout_tp}: must divide the number of processes, {ranks.world()}")
    if config.prompts_per_step < ranks.world():
        raise UserError(
            f"prompts_per_step = {config.prompts_per_step}: fewer than the {ranks.world()} processes, of which each "
            "needs a prompt"
        )


def print_plan(config, folder: Path, model, device: str, train_counts, eval_counts, start: int) -> None:
    """The derived sizes, before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    sequences = config.prompts_per_step * config.responses_per_prompt
    print(
        f"run          {folder}" + (f", continued after step {start}" if start else "") + "\n"
        f"model        {config.model}, {parameters / 1e6:,.2f} M parameters, on {device}\n"
        f"data         {train_counts[0]} training and {eval_counts[0]} held-out problems "
        f"({train_counts[1]} and {eval_counts[1]} dropped: prompt longer than {config.max_prompt_tokens} tokens)\n"
        f"objective    {config.objective}, beta1 {config.beta1}, beta2 {config.beta2}, "
        f"clip interval [{1 - config.eps_low:g}, {1 + config.eps_high:g}]\n"
        f"step         {config.prompts_per_step} prompts x {config.responses_per_prompt} = {sequences} responses, "
        f"then up to {config.max_kept_prompts // config.mini_batch_prompts} updates of "
        f"{config.mini_batch_prompts * config.responses_per_prompt} responses; {config.steps} steps"
        + (f"; on {ranks.world()} processes, {'sharded' if config.shard else 'copied'}" if ranks.world() > 1 else "")
        + ("; shard does nothing, with one process" if config.shard and ranks.world() == 1 else ""),
        flush=True,
    )
