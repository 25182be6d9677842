"""All imports of a run of train.py, vLLM's included: half of the time of a short run. helpers.Forked needs them once."""

import gc

from rollout import prepare_environment

prepare_environment()

import scipy.stats
import transformers.models.qwen2.modeling_qwen2
import tyro
import vllm.entrypoints.llm
import vllm.model_executor.models.qwen2
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker

import train

__all__ = ["scipy", "train", "transformers", "tyro", "vllm"]
gc.collect()
gc.freeze()  # a forked run then collects only its own objects, and copies no pages of these
