"""The imports of a run of train.py, with vLLM: half of a short run's time. helpers.Forked does them once."""

import gc
import importlib

import rollout

rollout.prepare_environment()
for name in (
    "train",
    "tyro",
    "scipy.stats",
    "transformers.models.qwen2.modeling_qwen2",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
):
    importlib.import_module(name)
rollout.CPU_CACHE_GIB = 0.1  # filling a GiB with zeros takes a second
gc.collect()
gc.freeze()  # a forked run then collects only its own objects
