"""vLLM: how the engine is called, with a fake one; and the real one's samples, logprobs, and weights."""

import dataclasses
import inspect
import math
import os
import sys
import types

import pytest
import torch

import rollout as module
from ce_gppo.lora import named_weights
from ce_gppo.messages import RunEnded, UserError
from ce_gppo.model import load_model
from ce_gppo.policy import Policy, with_old_logprobs
from ce_gppo.problems import load_problems
from helpers import BASE, DATA, refuses, resolved, rollout_of
from rollout import Engine, check_engine, check_mismatch, decode, prepare_environment
from train import MEASURED

# ----------------------------------------------------------------------------------------------------------------------
# A fake vLLM


class FakeEngine:
    """Ends the requests one by one, the last one first. Sample i of prompt [p] is p, i, 7; odd samples are cut."""

    reason = {0: "stop", 1: "length"}

    def __init__(self):
        self.requests, self.aborted, self.shift = [], None, 0

    def add_request(self, name, prompt, params):
        self.requests.append((name, prompt["prompt_token_ids"], params))

    def has_unfinished_requests(self):
        return bool(self.requests)

    def abort_request(self, names):
        self.aborted = names

    def step(self):
        name, (prompt,), params = self.requests.pop()
        outputs = []
        for i in reversed(range(params.n)):
            tokens = (prompt, i, 7)[: 3 - i % 2]
            ids, logprobs = [t + self.shift for t in tokens], [-1.0 * i] * len(tokens)
            found = {"logprobs": types.SimpleNamespace(token_ids=ids, logprobs=logprobs)}
            found |= {"index": i, "token_ids": tokens, "finish_reason": self.reason[i % 2], "text": ""}
            outputs.append(types.SimpleNamespace(**found))
        return [types.SimpleNamespace(request_id=name, outputs=outputs)]


class Params(types.SimpleNamespace):
    def clone(self):
        return Params(**vars(self))


class FakeLLM:
    def __init__(self, **options):
        self.options, self.calls, self.llm_engine, self.cache_is_reset = options, [], FakeEngine(), True

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, list(kwargs["weights_iterator"])))

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return self.cache_is_reset

    def apply_model(self, function):
        self.calls.append(function)

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags):
        self.calls.append(("wake_up", tags))


class Letters:
    def __len__(self):
        return 20

    def decode(self, ids, skip_special_tokens):
        return ",".join(map(str, ids)) + "!" * (not skip_special_tokens)


@pytest.fixture
def fake(monkeypatch):
    """A module in vLLM's place; fake(cuda) makes an engine with it."""
    final = types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(FINAL_ONLY="final"))
    vllm = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=Params, sampling_params=final)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(module, "stop_token_ids", lambda model, tokenizer: [7])
    monkeypatch.setattr(module, "check_config", lambda path: None)

    def make(cuda=False, **options):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        return Engine("folder", Letters(), 64, **options)

    make.vllm = vllm
    return make


def test_a_rollout_has_the_responses_in_the_order_of_the_prompts(fake):
    engine, groups = fake(), []
    options = {"max_tokens": 3, "temperature": 0.7, "seed": 9, "on_group": lambda *group: groups.append(group)}
    found = engine.generate([[4], [5]], 2, **options)
    assert groups == [(1, ["5,0,7", "5,1"]), (0, ["4,0,7", "4,1"])], "as soon as each is complete"
    assert found.prompts == [[4], [5]] and found.prompt_of.tolist() == [0, 0, 1, 1]
    assert found.texts == ["4,0,7", "4,1", "5,0,7", "5,1"] and found.lengths.tolist() == [3, 2, 3, 2]
    assert found.tokens.tolist() == [4, 0, 7, 4, 1, 5, 0, 7, 5, 1] and found.truncated.tolist() == [False, True] * 2
    assert found.rollout_logprobs.tolist() == [0, 0, 0, -1, -1] * 2 and engine.llm.llm_engine.aborted == []
    empty = engine.generate([], 2, **options)
    assert len(empty) == 0 and empty.tokens.dtype == empty.prompt_of.dtype == torch.long
    assert decode(Letters(), [3, 20, 19]) == "3,19", "ids past the vocabulary are survived"


@pytest.mark.parametrize("cuda, seeds", [(False, [None] * 3), (True, [100, 104, 108])])
def test_requests_say_how_to_sample(fake, cuda, seeds):
    """On a GPU each has its own seed: vLLM's runner there does not read torch's generator."""
    engine = fake(cuda)
    engine.generate([[1], [2], [3]], 4, max_tokens=5, temperature=0.6, top_p=0.9, seed=100, stop=lambda: True)
    drawn = torch.rand(1)
    torch.manual_seed(100)
    assert drawn == torch.rand(1), "without a GPU the engine samples from this generator"
    requests = engine.llm.llm_engine.requests
    assert [(name, ids) for name, ids, _ in requests] == [("0", [1]), ("1", [2]), ("2", [3])]
    assert [params.seed for *_, params in requests] == seeds
    expected = {"n": 4, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "max_tokens": 5, "stop_token_ids": [7]}
    expected |= {"detokenize": False, "logprobs": 0, "flat_logprobs": True, "output_kind": "final", "seed": seeds[2]}
    assert vars(requests[2][2]) == expected


def test_a_stop_ends_sampling_and_the_other_requests(fake):
    engine, steps = fake(), []
    arguments = {"max_tokens": 3, "temperature": 1.0, "seed": 0, "on_group": lambda index, texts: steps.append(index)}
    assert engine.generate([[4], [5], [6]], 2, **arguments, stop=lambda: len(steps) == 2) is None
    assert steps == [2, 1] and engine.llm.llm_engine.aborted == ["0"]


@pytest.mark.parametrize("reason, shift", [("abort", 0), ("stop", 1)])
def test_responses_that_vllm_has_broken_are_an_error(fake, monkeypatch, reason, shift):
    engine = fake()
    monkeypatch.setattr(FakeEngine, "reason", {0: "stop", 1: reason})
    engine.llm.llm_engine.shift = shift
    with pytest.raises(RuntimeError, match=f"'{reason if not shift else 'stop'}', or has other tokens' logprobs"):
        engine.generate([[4]], 2, max_tokens=3, temperature=1.0, seed=0)


def test_options_of_the_engine(fake, monkeypatch):
    always = {"model": "folder", "max_model_len": 64, "max_num_seqs": 512, "seed": 3, "trust_remote_code": False}
    always |= {"disable_log_stats": True, "use_tqdm_on_load": False, "generation_config": "vllm"}
    always |= {"logprobs_mode": "processed_logprobs", "load_format": "auto"}
    monkeypatch.setattr(module, "CPU_CACHE_GIB", 0.5)
    cpu = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**29}
    assert fake(seed=3).llm.options == always | cpu
    assert fake(seed=3, dummy=True).llm.options == always | cpu | {"load_format": "dummy"}
    gpu = {"dtype": "bfloat16", "enable_sleep_mode": True, "gpu_memory_utilization": 0.9}
    gpu["hf_overrides"] = {"head_dtype": "float32"}
    assert fake(True, seed=3).llm.options == always | gpu
    monkeypatch.setattr(module.parallel, "world_size", lambda: 2)
    joined = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2}
    assert fake(True, seed=3, tensor_parallel=2).llm.options == always | gpu | joined


@pytest.mark.parametrize(
    "error, cuda, message",
    [
        (
            "the KV cache needs\n 2 GiB",
            False,
            r"^VLLM_CPU_KVCACHE_SPACE, .* too small for a cache of 64 .*\(the KV ",
        ),
        ("the KV cache needs 2 GiB", True, "^gpu_memory_utilization is too small"),
        ("Available memory for the cache is 1", True, "^gpu_memory_utilization is too large"),
        ("unknown architecture", True, "vLLM cannot start with model 'folder': ValueError: unknown architecture"),
    ],
)
def test_an_engine_that_cannot_start_says_why(fake, monkeypatch, error, cuda, message):
    def fail(**options):
        raise ValueError(error)

    monkeypatch.setattr(fake.vllm, "LLM", fail)
    refuses(message, fake, cuda)


def test_from_sleep_to_new_weights(fake, monkeypatch):
    """Weights, then the sync, the stale cache, and only then room for a new cache. A GPU's weights are rounded here."""
    engine, weights = fake(True), [("a", torch.tensor([1 / 3]))]
    monkeypatch.setattr(module, "named_weights", lambda model: weights)
    engine.sleep()
    engine.wake(None)
    rounded = weights[0][1].bfloat16()
    names = [("sleep", 2), ("wake_up", ["weights"]), ("reload_weights", [("a", rounded)]), "reset_prefix_cache"]
    assert engine.llm.calls == [*names, ("wake_up", ["kv_cache"])]
    assert engine.llm.calls[2][1][0][1].dtype == rounded.dtype
    engine = fake()
    engine.sleep()
    engine.wake(None)
    assert engine.llm.calls == [("reload_weights", weights), module._repack, "reset_prefix_cache"]
    engine.llm.cache_is_reset = False
    with pytest.raises(RuntimeError, match="vLLM keeps keys and values of the old weights"):
        engine.load_weights([])


class Recorder:
    """An engine whose logprobs are all -1."""

    def __init__(self):
        self.calls, self.bfloat16 = [], True

    def generate(self, prompts, count, **options):
        self.calls.append(("generate", prompts, count, options))
        part = rollout_of([(1, 2), (1, 3)], shared=True)
        return dataclasses.replace(part, rollout_logprobs=torch.full((5,), -1.0))

    def sleep(self):
        self.calls.append("sleep")

    def wake(self, model):
        self.calls.append("wake" if isinstance(model, torch.nn.Module) else "wake without weights")


def test_the_engine_is_checked_as_a_step_uses_it(monkeypatch, tiny_model):
    """After a sleep, to find weights that are lost in it. vLLM sleeps during the trainer's pass, to free its memory."""
    engine, passes = Recorder(), []

    def measure(policy, parts, *arguments):
        passes.append((len(engine.calls), arguments))
        return [(torch.tensor([-1.2, -0.8, -1.2, -0.8, -1.0]) + shift[0], None)]

    monkeypatch.setattr(module, "logprobs_and_entropy", measure)
    config, shift = resolved(temperature=0.7, seed=5, max_response_tokens=40), [0.0]
    check_engine(engine, tiny_model, None, [9], config, "cuda")
    options = {"max_tokens": 16, "temperature": 0.7, "seed": 5}
    assert engine.calls == ["sleep", "wake", ("generate", [[9]], 2, options), "sleep", "wake"]
    assert passes == [(4, (0.7, config.max_micro_batch_tokens, "cuda"))]
    for shift[0], said in ((0.25, "0.25"), (math.nan, "nan")):
        with pytest.raises(
            UserError, match=f"model 'data/walk/base'.* differ by {said} nats on average, more than 0.2"
        ):
            check_engine(engine, tiny_model, None, [9], config, "cuda")
    shift[0], engine.bfloat16 = 0.0, False
    refuses("on average, more than 0.01", check_engine, engine, tiny_model, None, [9], config, "cpu")
    engine.wake = lambda weights: 1 // 0
    with pytest.raises(UserError, match="vLLM cannot sample with model 'data/walk/base': ZeroDivisionError"):
        check_engine(engine, tiny_model, None, [9], config, "cuda")
    check_mismatch({"mismatch/mean": module.MAX_MISMATCH, "entropy/mean": 0.5}, False)


@pytest.mark.parametrize(
    "gap, entropy, message",
    [(0.21, 0.5, "differ by 0.21 nats .* same weights"), (math.nan, 0.5, "not finite"), (0.0, math.nan, "not finite")],
)
def test_a_stale_engine_or_a_broken_policy_ends_the_run(gap, entropy, message):
    with pytest.raises(RunEnded, match=message):
        check_mismatch({"mismatch/mean": gap, "entropy/mean": entropy}, False)


@pytest.mark.parametrize("bfloat16, level", [(False, 0.001), (True, 0.05)])
def test_a_mismatch_above_rounding_is_warned_of_once_at_each_level(bfloat16, level, capsys):
    module.say_once.cache_clear()
    for factor in (0.9, 1.1, 1.2, 3.9, 3.8):
        check_mismatch({"mismatch/mean": factor * level, "entropy/mean": 0.5}, bfloat16)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("WARNING: ") for line in lines)
    assert all(f"more than {level * k:g} nats" in line for k, line in zip((1, 2), lines, strict=True))
    check_mismatch({"mismatch/mean": module.MAX_MISMATCH, "entropy/mean": 0.5}, bfloat16)


@pytest.mark.parametrize("space", ["abc", "", "0", "01", "0.5", "-1", "100000"])
def test_a_size_of_the_cache_that_vllm_cannot_read(space, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    refuses(f"VLLM_CPU_KVCACHE_SPACE={space} .* a whole number of GiB", prepare_environment)


@pytest.mark.parametrize("cuda, level", [(True, "WARNING"), (False, "ERROR")])
def test_the_environment_of_vllm(cuda, level, monkeypatch):
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_NO_USAGE_STATS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "12345")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    prepare_environment()
    assert os.environ["PATH"] == f"{os.path.dirname(sys.executable)}:/somewhere"
    names = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL")
    assert [os.environ[name] for name in names] == ["0", "1", level]
    bind = None if cuda else "nobind"
    assert os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == bind and ("OMP_NUM_THREADS" in os.environ) == (not cuda)


# ----------------------------------------------------------------------------------------------------------------------
# The real vLLM


@pytest.fixture(scope="module")
def base():
    return load_model(BASE)


@pytest.fixture(scope="module")
def engine(base):
    threads = torch.get_num_threads()
    engine = Engine(BASE, base[1], context=512)
    assert torch.get_num_threads() == threads, "the engine took the trainer's threads"
    return engine


@pytest.fixture(scope="module")
def prompts(base):
    return [problem.prompt_ids for problem in load_problems(DATA, base[1], 16)[0][:16]]


def gap(model, sampled, temperature=1.0) -> float:
    """Largest difference between vLLM's and the trainer's logprobs, nats."""
    (measured,) = with_old_logprobs(Policy(model), [sampled], temperature, 8192, "cpu")
    return (measured.old_logprobs - sampled.rollout_logprobs).abs().max().item()


def perturbed(scale: float, part: str = "", seed: int = 0):
    model, _ = load_model(BASE)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=g))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_responses_and_their_logprobs(engine, base, prompts, temperature):
    """Of the distribution that was sampled from. The end-of-sequence token is a response's last one, and only there."""
    engine.load_weights(named_weights(base[0]))
    again = [engine.generate(prompts, 8, max_tokens=12, temperature=temperature, seed=seed) for seed in (5, 5, 6)]
    whole, tokenizer = again[0], base[1]
    assert whole.tokens.equal(again[1].tokens) and not whole.tokens.equal(again[2].tokens)
    assert gap(base[0], whole, temperature) < 1e-4 and set(whole.truncated.tolist()) == {True, False}
    responses = whole.tokens.split(whole.lengths.tolist())
    for response, text, cut in zip(responses, whole.texts, whole.truncated, strict=True):
        ends = [token in engine.stop_token_ids for token in response.tolist()]
        assert not any(ends[:-1]) and ends[-1] == (not cut) and (len(ends) == 12 or not cut)
        assert text == tokenizer.decode(response, skip_special_tokens=True) and "<|end|>" not in text
    assert len({text for text, i in zip(whole.texts, whole.prompt_of, strict=True) if i == 0}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("part", ["embed_tokens", "self_attn", "mlp", "norm"])
def test_every_weight_arrives(engine, base, prompts, part):
    """Also the tied embedding, of which vLLM keeps a packed copy for the head on a CPU. Nothing old stays in a cache:
    one prompt is several blocks long and has been seen before."""
    model, several = perturbed(0.05, part), [*prompts, sum(prompts * 9, [])[:400]]
    engine.load_weights(named_weights(base[0]))
    before = gap(model, engine.generate(several, 4, max_tokens=16, temperature=1.0, seed=2))
    engine.wake(model)
    assert gap(model, engine.generate(several, 4, max_tokens=16, temperature=1.0, seed=2)) < 1e-4 < before


@pytest.mark.slow
def test_rollout_correction_with_other_weights_in_vllm(engine, base, prompts):
    """Perturbed weights in vLLM stand for another precision. The ratio has the right direction: over vLLM's samples,
    pi_old / pi_vllm is 1 on average, and its inverse is not."""
    engine.load_weights(named_weights(perturbed(0.1)))
    sampled = engine.generate(prompts, 64, max_tokens=16, temperature=1.0, seed=4)
    (sampled,) = with_old_logprobs(Policy(base[0]), [sampled], 1.0, 8192, "cpu")
    ratio = (sampled.old_logprobs - sampled.rollout_logprobs).exp()
    assert ratio.max() > 1.5 and abs(ratio.mean() - 1) < 0.02 < abs((1 / ratio).mean() - 1)


@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_refused_before_the_first_step(engine, base, prompts):
    """As if vLLM's code of the model differed from transformers': other results."""
    other, policy = perturbed(0.0), Policy(base[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    engine.load_weights(named_weights(other))
    check_engine(engine, base[0], policy, prompts[0], resolved(), "cpu")
    with pytest.raises(UserError, match=r"differ by \d.* nats on average.*docs/models.md"):
        check_engine(engine, other, policy, prompts[0], resolved(), "cpu")


@pytest.mark.slow
def test_entropy_of_a_sample_of_the_other_responses(engine, base):
    """entropy/mean from all trained tokens and one in three of the others: its standard error is below 1 %."""
    engine.load_weights(named_weights(base[0]))
    ids = [problem.prompt_ids for problem in load_problems(DATA, base[1], 16)[0][:64]]
    whole = engine.generate(ids, 8, max_tokens=16, temperature=1.0, seed=0)
    (whole,) = with_old_logprobs(Policy(base[0]), [whole], 1.0, 16384, "cpu")
    H = torch.zeros(len(whole)).index_add(0, whole.sequence, whole.entropy).view(64, 8)
    tokens, g = whole.lengths.float().view(64, 8), torch.Generator().manual_seed(0)
    errors = []
    for _ in range(200):
        others, trained = torch.randperm(64, generator=g).split([32, 32])
        sample = [values[others].flatten()[::MEASURED].sum() for values in (H, tokens)]
        estimate = (H[trained].sum() + sample[0] / sample[1] * tokens[others].sum()) / tokens.sum()
        errors.append((estimate / (H.sum() / tokens.sum()) - 1).item())
    assert 0 < torch.tensor(errors).square().mean().sqrt() < 0.01


@pytest.mark.slow
def test_vllm_has_the_options_and_methods_that_are_used(engine, tiny_folder):
    """Also those of a GPU; the head's logits are in float32, as the trainer's are."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    used = {"enable_sleep_mode", "hf_overrides", "logprobs_mode", "generation_config", "distributed_executor_backend"}
    used |= {"tensor_parallel_size", "kv_cache_memory_bytes", "max_num_seqs", "disable_log_stats"}
    assert used <= inspect.signature(EngineArgs.__init__).parameters.keys()
    inspect.signature(vllm.LLM.sleep).bind(None, level=2)
    inspect.signature(vllm.LLM.wake_up).bind(None, tags=["weights"])
    inspect.signature(vllm.LLM.collective_rpc).bind(None, "reload_weights", kwargs={})
    inspect.signature(GPUModelRunner.reload_weights).bind(None, weights_iterator=[])
    assert vllm.SamplingParams(n=2, flat_logprobs=True).clone().n == 2
    config = vllm.config.ModelConfig(str(tiny_folder), dtype="bfloat16", hf_overrides={"head_dtype": "float32"})
    assert config.dtype == torch.bfloat16 and config.head_dtype == torch.float32
    head = inspect.getsource(vllm.model_executor.layers.logits_processor.LogitsProcessor._apply_head)
    assert "torch.mm(flat, lm_head.weight.t(), out_dtype=self.head_dtype)" in head, "the product of policy._product"


@pytest.mark.slow
def test_a_cache_too_small_for_one_response_names_the_setting(base, monkeypatch):
    monkeypatch.setattr(module, "CPU_CACHE_GIB", 0.0001)
    refuses("VLLM_CPU_KVCACHE_SPACE, .* is too small for a cache of 512 tokens", Engine, BASE, base[1], context=512)
