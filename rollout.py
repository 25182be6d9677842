"""vLLM and nothing else: prompts in, groups of responses out, weights in."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import ranks


@dataclass
class Response:
    """One sampled response, R tokens long. rollout.py fills in the first part, the steps after it the second."""

    prompt_ids: list[int]
    response_ids: list[int]  # exactly as sampled, the end-of-sequence token included
    rollout_logprobs: Tensor  # [R]  vLLM's, of the distribution sampled from, temperature included
    truncated: bool  # stopped by the length limit, not by an end-of-sequence token
    text: str  # for the verifier and for people; never tokenized again

    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: Tensor | None = None  # [R]  the trainer's, under the weights that sampled the response
    entropy: Tensor | None = None  # [R]  nats, of the same distribution


class Engine:
    """A vLLM engine inside this process, holding its own copy of the weights of `model`.

    model: folder or hub name. tokenizer: decodes. context: tokens of prompt and response together.
    gpu_memory_utilization: share of the GPU's memory that vLLM takes. cpu_kv_cache_gib: its cache where there is none.
    tensor_parallel: neighbouring ranks that hold one engine together; they must make the same calls.
    """

    def __init__(
        self,
        model: str,
        tokenizer,
        *,
        context: int,
        gpu_memory_utilization: float = 0.9,
        cpu_kv_cache_gib: float = 1.0,
        max_sequences: int = 512,
        tensor_parallel: int = 1,
        seed: int = 0,
    ):
        self.cuda = torch.cuda.is_available()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, weights in memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if not self.cuda:  # or vLLM pins torch to one thread, and the trainer with it
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
            torch.compiler.set_stance("force_eager")  # or the first rollout spends half a minute in a C++ compiler
        import vllm  # takes 10 s, and is not installed on every machine that trains

        self.vllm, self.tokenizer, self.tensor_parallel = vllm, tokenizer, tensor_parallel
        if self.cuda:
            options = {"dtype": "bfloat16", "enable_sleep_mode": True, "gpu_memory_utilization": gpu_memory_utilization}
        else:  # there gpu_memory_utilization is a share of the RAM that must be free at the start
            options = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.05}
            options["kv_cache_memory_bytes"] = int(cpu_kv_cache_gib * 2**30)
        if ranks.world() > 1:  # vLLM joins the process group that is there, and takes this rank's GPU
            options["distributed_executor_backend"] = "external_launcher"
        with warnings.catch_warnings(action="ignore"):  # of vLLM's own making
            self.llm = vllm.LLM(
                model=model,
                max_model_len=context,
                max_num_seqs=max_sequences,
                seed=seed,
                trust_remote_code=False,
                generation_config="vllm",  # or the folder's generation_config.json would change the sampling unseen
                logprobs_mode="processed_logprobs",  # after the temperature: those of the distribution sampled from
                disable_log_stats=True,
                use_tqdm_on_load=False,
                tensor_parallel_size=tensor_parallel,
                **options,
            )
        self.stop_token_ids = stop_token_ids(model, tokenizer)

    def generate(
        self,
        prompts: list[list[int]],
        group_size: int,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
        top_k: int = 0,
        on_group: Callable[[int, list[Response]], None] = lambda index, group: None,
        stop: object = False,
    ) -> list[list[Response]]:
        """group_size responses to each prompt of token ids, in order. The same seed and weights give the same tokens.

        on_group is called with the index of a prompt and its group as soon as that is complete, while others are still
        being sampled. Once `stop` is true on any rank of the engine, the groups not yet complete are given up, and stay
        empty. With top_p or top_k the logprobs are renormalized over what survived: for evaluation, never for training.
        """
        torch.manual_seed(seed)  # the engine samples from this process's generator
        params = self.vllm.SamplingParams(
            n=group_size,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=max_tokens,
            stop_token_ids=self.stop_token_ids,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        engine = self.llm.llm_engine
        for index, ids in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": ids}, params)
        groups: list[list[Response]] = [[] for _ in prompts]
        while engine.has_unfinished_requests() and not self._any_of_engine(stop):
            for output in engine.step():  # llm.generate would wait for the last one
                index = int(output.request_id)
                completions = sorted(output.outputs, key=lambda completion: completion.index)
                groups[index] = [self._response(prompts[index], completion) for completion in completions]
                on_group(index, groups[index])
        return groups

    def _any_of_engine(self, stop: object) -> bool:
        """Ranks that share an engine must leave its loop at the same step, or the others wait in it for ever."""
        if self.tensor_parallel == 1:
            return bool(stop)
        flag = torch.tensor(int(bool(stop)))
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.vllm.distributed.get_tp_group().cpu_group)
        return bool(flag)

    def _response(self, prompt_ids: list[int], completion) -> Response:
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a response with finish_reason '{completion.finish_reason}'")
        response_ids = list(completion.token_ids)
        return Response(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            rollout_logprobs=torch.tensor(
                [step[token].logprob for token, step in zip(response_ids, completion.logprobs, strict=True)]
            ),
            truncated=completion.finish_reason == "length",
            text=decode(self.tokenizer, response_ids),
        )

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the trainer's weights, given by their checkpoint names, one tensor at a time."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights})
        if not self.cuda:
            self.llm.apply_model(_repack_head)
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights, and vLLM keeps them

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer. The weights are dropped: `wake` must bring new ones."""
        if self.cuda:
            self.llm.sleep(level=2)

    def wake(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Room for the weights, the weights, and only then room for the cache: the peak is lower in this order."""
        if self.cuda:
            self.llm.wake_up(tags=["weights"])
        self.load_weights(named_weights)
        if self.cuda:
            self.llm.wake_up(tags=["kv_cache"])


def _repack_head(model) -> None:
    """On a CPU vLLM multiplies by a packed copy of the head; a reload leaves it stale where the embedding is tied."""
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)


def decode(tokenizer, token_ids: list[int]) -> str:
    """Text of the response. Ids past the tokenizer's vocabulary (padded embeddings have them) stand for nothing."""
    return tokenizer.decode([i for i in token_ids if i < len(tokenizer)], skip_special_tokens=True)


def stop_token_ids(model: str, tokenizer) -> list[int]:
    """Every end-of-sequence id that the tokenizer, the configuration or the generation configuration names."""
    from transformers import AutoConfig, GenerationConfig

    named = [tokenizer.eos_token_id, AutoConfig.from_pretrained(model, trust_remote_code=False).eos_token_id]
    with contextlib.suppress(OSError):  # a model need not have one
        named.append(GenerationConfig.from_pretrained(model).eos_token_id)
    ids: set[int] = set()
    for entry in named:
        ids.update(entry if isinstance(entry, list) else [] if entry is None else [entry])
    return sorted(ids)
