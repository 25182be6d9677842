"""What this program takes for granted about vLLM and torch on a GPU, and what a change of their versions may change."""

import inspect
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.nn.attention import varlen

from helpers import ROOT, environment

# The configuration that vLLM makes of Engine's options on a GPU, resolved by the build for CPUs: with the platform's
# class for CUDA, a card that is only described, and modules that only a GPU's wheel has left empty.
RESOLVE = """
import json, sys, types
import torch, rollout
rollout.prepare_environment()
sys.modules |= {name: types.ModuleType(name) for name in ("vllm._C", "vllm._C_stable_libtorch")}
import vllm, vllm.platforms, vllm.triton_utils
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability
class Card(NonNvmlCudaPlatform):
    get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*cls.capability))
    get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA")
    get_device_total_memory = classmethod(lambda cls, device_id=0: 80 * 2**30)
    num_compute_units = classmethod(lambda cls, device_id=0: 132)
    is_cumem_allocator_available = classmethod(lambda cls: True)
    is_sleep_mode_available = classmethod(lambda cls: True)
    log_warnings = classmethod(lambda cls: None)
given = {}
vllm.LLM = lambda **options: given.update(options)
torch.cuda.is_available = lambda: True
rollout.stop_token_ids = lambda *_: [0]
rollout.check_config = lambda path: None
rollout.Engine("data/walk/base", None, 32, 0.5, dummy=True)
vllm.platforms._current_platform = Card()
vllm.triton_utils.HAS_TRITON = vllm.triton_utils.importing.HAS_TRITON = True
from vllm.engine.arg_utils import EngineArgs
found = []
for Card.capability in ((9, 0), (10, 0)):  # H100, B200
    c = EngineArgs(**{k: v for k, v in given.items() if k != "use_tqdm_on_load"}).create_engine_config()
    m = c.model_config
    found.append([c.use_v2_model_runner, c.scheduler_config.async_scheduling, str(m.dtype), str(m.head_dtype)])
    found[-1] += [m.logprobs_mode, m.enable_sleep_mode, m.enforce_eager, c.cache_config.gpu_memory_utilization]
    found[-1] += [c.cache_config.enable_prefix_caching, c.compilation_config.cudagraph_mode.name]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_configuration_of_vllm_on_an_h100_and_a_b200():
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    expected = [True, True, "torch.bfloat16", "torch.float32", "processed_logprobs", True, False, 0.5]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected + [True, "FULL_AND_PIECEWISE"]] * 2


VLLM = Path(find_spec("vllm").origin).parent  # read, not imported: that takes ten seconds


@pytest.mark.parametrize(
    "module, text, what",
    [
        (
            "v1/engine/parallel_sampling.py",
            "child_sampling_params.seed = seed + index",
            "sample i has seed + i",
        ),
        ("v1/executor/abstract.py", 'SLEEP_TAGS = frozenset(("weights", "kv_cache"))', "Engine.wake wakes both"),
        ("device_allocator/__init__.py", 'DEFERRABLE_TAGS: tuple[str, ...] = ("weights", "kv_cache")', "as above"),
        ("v1/engine/input_processor.py", "{request.external_req_id}-{random_uuid():.8}", "equal ids are no clash"),
    ],
)
def test_vllm_still_does(module, text, what):
    assert text in (VLLM / module).read_text(), what


def test_causal_attention_is_a_window_without_a_right_side():
    """packed_attention says only the window: -1 or a number to the left, 0 to the right."""
    assert len(re.findall(r"is_causal = window_size == \(-1, 0\)", inspect.getsource(varlen))) == 2


def test_the_docker_image_holds_what_the_readme_runs():
    left_out = (ROOT / ".dockerignore").read_text().split() if (ROOT / ".dockerignore").is_file() else []
    assert "COPY . ." in (ROOT / "Dockerfile").read_text()
    assert not {"bench", "tools", "results", "recipes", "data", "tests", "ce_gppo"} & {x.strip("/*") for x in left_out}
