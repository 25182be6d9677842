"""vLLM and nothing else: prompts in, a Rollout out, weights in; and what engine and trainer must agree on."""

import contextlib
import functools
import math
import os
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ce_gppo import parallel
from ce_gppo.batch import Rollout
from ce_gppo.lora import named_weights
from ce_gppo.messages import RunEnded, UserError, explained, say
from ce_gppo.model import check_config, stop_token_ids
from ce_gppo.policy import logprobs_and_entropy

# Of mismatch/mean, nats: 1e-6 in float32; in bfloat16 0.002 for a small policy (bench/RESULTS.md), others report 0.03
WARN_MISMATCH = {False: 0.001, True: 0.05}  # by whether the engine has bfloat16
MAX_MISMATCH = 0.2
MAX_FLOAT32 = 0.01  # at the start, with an engine in float32: more is another computation
CPU_CACHE_GIB = 1  # vLLM's cache without a GPU, unless vLLM's variable VLLM_CPU_KVCACHE_SPACE is set

say_once = functools.cache(say)  # the same words once in a run, not at each step


def prepare_environment() -> None:
    """Set the environment variables that vLLM and torch read. Call it first, before vLLM is imported."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if space is not None and not re.fullmatch("[1-9][0-9]{0,4}", space):
        raise UserError(f"VLLM_CPU_KVCACHE_SPACE={space} in the environment: vLLM needs a whole number of GiB")
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}"  # vLLM looks for ninja
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are passed in memory
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would send them to its authors
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if torch.cuda.is_available() else "ERROR")
    if not torch.cuda.is_available():  # otherwise vLLM pins torch to one thread, and the trainer with it
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        torch.compiler.set_stance("force_eager")  # otherwise the first rollout spends half a minute in a C++ compiler


class Engine:
    """A vLLM engine inside this process, holding its own copy of the weights of `model`.

    model: folder or hub name. context: tokens of prompt and response together. gpu_memory_utilization: share of the
    GPU's memory for vLLM. tensor_parallel: neighbouring ranks that share the engine, and must make the same calls.
    dummy: it begins with random weights, for a trainer that loads its own before it samples.
    """

    def __init__(
        self,
        model: str,
        tokenizer,
        context: int,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel: int = 1,
        seed: int = 0,
        max_sequences: int = 512,
        dummy: bool = False,
    ):
        import vllm  # takes 10 s, and the benches for GPUs run without it

        self.vllm, self.tokenizer, self.tensor_parallel = vllm, tokenizer, tensor_parallel
        self.cuda, self.stop_token_ids = torch.cuda.is_available(), stop_token_ids(model, tokenizer)
        # vLLM has delta networks in bfloat16 only, on a CPU too.
        self.bfloat16 = self.cuda or "linear_attention" in (getattr(check_config(model), "layer_types", None) or ())
        options = {"model": model, "max_model_len": context, "max_num_seqs": max_sequences, "seed": seed}
        options["dtype"] = "bfloat16" if self.bfloat16 else "float32"
        options |= {"trust_remote_code": False, "disable_log_stats": True, "use_tqdm_on_load": False}
        options["load_format"] = "dummy" if dummy else "auto"
        options["generation_config"] = "vllm"  # otherwise the folder's generation_config.json changes the sampling
        options["logprobs_mode"] = "processed_logprobs"  # of the distribution sampled from, temperature included
        if self.cuda:
            options["enable_sleep_mode"] = True
            options["gpu_memory_utilization"] = gpu_memory_utilization
            options["hf_overrides"] = {"head_dtype": "float32"}  # logits are not rounded, like the trainer's
        else:  # here gpu_memory_utilization is the share of the RAM that must be free at the start
            options |= {"enforce_eager": True, "gpu_memory_utilization": 0.05}
            options["kv_cache_memory_bytes"] = int(CPU_CACHE_GIB * 2**30)
        if parallel.world_size() > 1:  # vLLM joins the existing process group, and takes this rank's GPU
            options |= {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": tensor_parallel}
            if not self.cuda:
                own_shared_memory()
        with explained(f"vLLM cannot start with model '{model}'"), warnings.catch_warnings(action="ignore"):
            try:
                self.llm = vllm.LLM(**options)
            except ValueError as error:
                if "cache" not in str(error):
                    raise
                name = "gpu_memory_utilization" if self.cuda else "VLLM_CPU_KVCACHE_SPACE, GiB in the environment,"
                size, cause = "large" if "Available memory" in str(error) else "small", " ".join(str(error).split())
                raise UserError(f"{name} is too {size} for a cache of {context} tokens ({cause[:200]})") from None

    def generate(
        self,
        prompts: list[list[int]],
        group_size: int,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
        on_group: Callable[[int, list[str]], None] = lambda index, texts: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Rollout | None:
        """group_size responses to each prompt of token ids, in order. The same seed and weights give the same tokens.

        on_group is called with the index of a prompt and its responses' texts as soon as these are complete, while
        others are still being sampled. Once `stop()` is true on any rank of the engine, sampling ends: None.
        With top_p < 1 the logprobs are renormalized over the remaining tokens: for evaluation, never for training.
        """
        torch.manual_seed(seed)  # the engine samples from this process's generator
        options = {"n": group_size, "temperature": temperature, "top_p": top_p, "top_k": 0, "max_tokens": max_tokens}
        options |= {"stop_token_ids": self.stop_token_ids, "detokenize": False}
        options |= {"logprobs": 0, "flat_logprobs": True}  # only the sampled token's, in lists of numbers
        options["output_kind"] = self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        params, engine = self.vllm.SamplingParams(**options), self.llm.llm_engine
        for index, ids in enumerate(prompts):
            params = params.clone()  # on a GPU each request has its own generator; sample i of a group gets seed + i
            params.seed = seed + index * group_size if self.cuda else None
            engine.add_request(str(index), {"prompt_token_ids": ids}, params)
        done: dict[int, list] = {}  # completions by prompt
        try:
            while engine.has_unfinished_requests() and not self._any_rank_of_engine(stop()):
                for output in engine.step():  # llm.generate would return only after the last one
                    group = done[int(output.request_id)] = sorted(output.outputs, key=lambda each: each.index)
                    for each in group:
                        each.text = decode(self.tokenizer, each.token_ids)
                    on_group(int(output.request_id), [each.text for each in group])
        finally:  # without this, stopped requests would continue, and the next call would get their output
            engine.abort_request([str(index) for index in range(len(prompts)) if index not in done])
        if len(done) < len(prompts):
            return None
        responses = [each for _, group in sorted(done.items()) for each in group]
        for each in responses:
            if each.finish_reason not in ("stop", "length") or each.logprobs.token_ids != list(each.token_ids):
                raise RuntimeError(f"vLLM ended a response by '{each.finish_reason}', or has other tokens' logprobs")
        return Rollout(
            prompts=prompts,
            prompt_of=torch.arange(len(prompts)).repeat_interleave(group_size),
            lengths=torch.tensor([len(each.token_ids) for each in responses], dtype=torch.long),
            tokens=torch.tensor([token for each in responses for token in each.token_ids], dtype=torch.long),
            rollout_logprobs=torch.tensor([logprob for each in responses for logprob in each.logprobs.logprobs]),
            truncated=torch.tensor([each.finish_reason == "length" for each in responses], dtype=torch.bool),
            texts=[each.text for each in responses],
        )

    def _any_rank_of_engine(self, flag: bool) -> bool:
        """Ranks that share an engine must leave its loop at the same step, or the others wait in it for ever."""
        if self.tensor_parallel == 1:
            return flag
        flags, group = torch.tensor(int(flag)), self.vllm.distributed.get_tp_group().cpu_group
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group)
        return bool(flags)

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the trainer's weights into the engine: (name in a checkpoint, tensor) pairs, one at a time."""
        if self.bfloat16:  # in the engine's precision: half the memory on the way, and no warning for each weight
            named_weights = ((name, weight.bfloat16()) for name, weight in named_weights)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights})
        if not self.cuda:
            self.llm.apply_model(_repack)
        if not self.llm.reset_prefix_cache():  # keys and values of the old weights
            raise RuntimeError("vLLM keeps keys and values of the old weights")

    def sleep(self) -> None:
        """Free the GPU's memory for the trainer. The engine drops its weights: `wake` must load new ones."""
        if self.cuda:
            self.llm.sleep(level=2)

    def wake(self, model) -> None:
        """Allocate and load the weights of the trained model, and only then the cache: so the peak memory is lower."""
        if self.cuda:
            self.llm.wake_up(tags=["weights"])
        self.load_weights(named_weights(model))
        if self.cuda:
            self.llm.wake_up(tags=["kv_cache"])


def _repack(model) -> None:
    """On a CPU vLLM multiplies by packed copies of a tied head and of experts, which a reload leaves as they are."""
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)
        if kernel := getattr(getattr(module, "quant_method", None), "moe_kernel", None):
            kernel.fused_experts.process_weights_after_loading(module)


def check_engine(engine: Engine, model, policy, prompt: list[int], config, device: str) -> None:
    """UserError if engine and trainer, with the same weights, give two short responses different logprobs.

    With such a model no update could be right. As in every step, the engine has slept and got the weights of `model`
    before it samples, and sleeps while the trainer computes. It ends awake. Collective.
    """
    options = {"max_tokens": min(16, config.max_response_tokens), "temperature": config.temperature}
    with explained(f"vLLM cannot sample with model '{config.model}'"):
        engine.sleep()
        engine.wake(model)
        rollout = engine.generate([prompt], 2, seed=config.seed, **options)
        engine.sleep()
    [(logprobs, _)] = logprobs_and_entropy(policy, [rollout], config.temperature, config.max_micro_batch_tokens, device)
    gap = (logprobs - rollout.rollout_logprobs).abs().mean().item()
    if not gap <= (most := MAX_MISMATCH if engine.bfloat16 else MAX_FLOAT32):
        problem = f"model '{config.model}': the logprobs of vLLM and the trainer for the first responses differ by"
        cause = "they may compute this architecture differently; docs/models.md lists the families that train"
        raise UserError(f"{problem} {gap:.3g} nats on average, more than {most}: {cause}")
    engine.wake(model)  # it forgets the prompt: what follows is as it would be without this check


def check_mismatch(metrics: dict[str, float], bfloat16: bool) -> None:
    """A warning, or RunEnded, where vLLM and trainer, which have the same weights, give the tokens other logprobs."""
    gap = metrics["mismatch/mean"]
    if not math.isfinite(metrics["entropy/mean"] + gap):
        problem = "the policy's logprobs are not finite: an update has made its weights too large; lower lr, and begin"
        raise RunEnded(f"{problem} again from an earlier checkpoint")
    if gap > MAX_MISMATCH:
        problem = f"the logprobs of vLLM and trainer differ by {gap:.3g} nats on average, more than {MAX_MISMATCH}"
        raise RunEnded(f"{problem}: they do not have the same weights, or not in the same precision")
    level = WARN_MISMATCH[bfloat16]
    if gap > level:
        level *= 2 ** int(math.log2(gap / level))  # a line each time that it has doubled
        problem = f"the logprobs of vLLM and trainer differ by more than {level:g} nats on average (mismatch/mean)"
        cure = f"--rollout-correction tis bounds what it does, and above {MAX_MISMATCH} the run ends"
        say_once(f"{problem}, more than rounding explains; {cure}", warning=True)


def decode(tokenizer, token_ids: list[int]) -> str:
    """Text of the response. Ids beyond the tokenizer's vocabulary (padded embeddings have them) are left out."""
    return tokenizer.decode([i for i in token_ids if i < len(tokenizer)], skip_special_tokens=True)


def own_shared_memory() -> None:
    """Give the shared memory of vLLM's CPU engines a name of this run's own. Call it before making them. Collective.

    vLLM's name is the same in every run: an engine over several ranks could not start beside another one on this
    machine, nor after one that was killed. The name also goes from /dev/shm as soon as all ranks have the memory.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Memory

    own = parallel.rank0_then_broadcast(lambda: secrets.token_hex(4))
    name, init = Memory.make_group_name, Memory._init_cpu_shm

    def init_and_unlink(memory):
        handle = init(memory)  # ends with a barrier
        with contextlib.suppress(OSError):
            os.unlink(f"/dev/shm/{memory.group_name}_{memory.communicator.rank}")
        return handle

    Memory.make_group_name = staticmethod(lambda communicator: f"ce-gppo-{own}-{name(communicator).lstrip('/')}")
    Memory._init_cpu_shm = init_and_unlink
