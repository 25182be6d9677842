"""Real vLLM: its samples, its logprobs, and the weights that it gets from the trainer."""

import inspect
import re
import subprocess
import sys
import types

import pytest
import torch

from ce_gppo import forward, statistics
from ce_gppo.corrections import correction_weights
from ce_gppo.evaluation import check_engine
from ce_gppo.forward import Policy, compute_old_logprobs
from ce_gppo.messages import UserError
from ce_gppo.model import load_model, named_weights
from ce_gppo.problems import load_problems
from ce_gppo.types import Problem, Response
from helpers import BASE, DATA, ROOT, Forked, resolved
from rollout import Engine, decode, stop_token_ids

pytestmark = pytest.mark.slow
TRAIN = str(ROOT / "data" / "arithmetic" / "train.jsonl")


@pytest.fixture(scope="module")
def base():
    return load_model(BASE)


@pytest.fixture(scope="module")
def engine(base):
    threads = torch.get_num_threads()
    engine = Engine(BASE, base[1], context=512, cpu_kv_cache_gib=0.5)
    assert torch.get_num_threads() == threads, "the engine took the trainer's threads"
    return engine


@pytest.fixture(scope="module")
def prompts(base):
    return [problem.prompt_ids for problem in load_problems(DATA, base[1], 64)[0][:16]]


@pytest.fixture(scope="module")
def everything(engine, base):
    """Summed entropy and tokens of 8 responses to each of 64 prompts of the default task, [64, 8]."""
    problems = load_problems(TRAIN, base[1], 64)[0][:64]
    groups = engine.generate([p.prompt_ids for p in problems], 8, max_tokens=64, temperature=1.0, seed=0)
    compute_old_logprobs(Policy(base[0]), [r for group in groups for r in group], 1.0, 16384, "cpu")
    entropy = torch.tensor([[r.entropy.sum().item() for r in group] for group in groups])
    return entropy, torch.tensor([[float(len(r.response_ids)) for r in group] for group in groups])


def gap(model, groups, temperature) -> float:
    """Largest difference between vLLM's and the trainer's logprobs, nats."""
    responses = [response for group in groups for response in group]
    compute_old_logprobs(Policy(model), responses, temperature, 8192, "cpu")
    return max((r.old_logprobs - r.rollout_logprobs).abs().max().item() for r in responses)


def test_groups(engine, base, prompts):
    tokenizer = base[1]
    groups = engine.generate(prompts, 8, max_tokens=32, temperature=1.0, seed=0)
    assert len(groups) == 16 and all(len(group) == 8 for group in groups)
    responses = [response for group in groups for response in group]
    assert [r.prompt_ids for r in responses] == [ids for ids in prompts for _ in range(8)]
    assert len({tuple(r.response_ids) for r in groups[0]}) > 1
    assert {r.truncated for r in responses} == {True, False}, "both kinds are needed below"
    for r in responses:
        assert len(r.rollout_logprobs) == len(r.response_ids) <= 32
        ends = [token in engine.stop_token_ids for token in r.response_ids]
        if r.truncated:
            assert len(r.response_ids) == 32 and not any(ends)
        else:
            assert ends[-1] and not any(ends[:-1]), "the end-of-sequence token is the response's last, and only there"
        assert r.text == tokenizer.decode(r.response_ids, skip_special_tokens=True) and "<|end|>" not in r.text


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(engine, base, prompts, temperature):
    engine.load_weights(named_weights(base[0]))
    assert gap(base[0], engine.generate(prompts, 8, max_tokens=48, temperature=temperature, seed=1), temperature) < 1e-4


def test_the_same_seed_gives_the_same_tokens(engine, prompts):
    runs = [engine.generate(prompts, 4, max_tokens=48, temperature=1.0, seed=seed) for seed in (5, 5, 6)]
    ids = [[r.response_ids for group in groups for r in group] for groups in runs]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("part", ["embed_tokens", "self_attn", "mlp", "norm"])
def test_every_weight_arrives(engine, base, prompts, part):
    """Also the tied embedding, of which vLLM keeps a packed copy for the head on a CPU."""
    model, _ = load_model(BASE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    engine.load_weights(named_weights(base[0]))
    before = gap(model, engine.generate(prompts, 4, max_tokens=48, temperature=1.0, seed=2), 1.0)
    engine.load_weights(named_weights(model))
    after = gap(model, engine.generate(prompts, 4, max_tokens=48, temperature=1.0, seed=2), 1.0)
    assert after < 1e-4 < before


def test_rollout_correction_with_other_weights_in_vllm(engine, base, prompts):
    """Perturbed weights in vLLM stand for another precision. The ratio has the right direction: over vLLM's samples,
    pi_old / pi_vllm is 1 on average, and its inverse is not."""
    model, _ = load_model(BASE)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=g))
    engine.load_weights(named_weights(model))
    groups = engine.generate(prompts, 64, max_tokens=48, temperature=1.0, seed=4)
    responses = [response for group in groups for response in group]
    compute_old_logprobs(Policy(base[0]), responses, 1.0, 8192, "cpu")
    batch = forward.collate(responses)
    mask = batch.response_mask
    ratio = (batch.old_logprobs - batch.rollout_logprobs).exp()[mask]
    assert ratio.max() > 1.5 and abs(ratio.mean() - 1) < 0.02 < abs((1 / ratio).mean() - 1)

    old, rollout = batch.old_logprobs, batch.rollout_logprobs
    tis = correction_weights(old, rollout, mask, "tis", cap=1.2)[mask]
    torch.testing.assert_close(tis, torch.tensor([min(r, 1.2) for r in ratio.tolist()]))
    kept = correction_weights(old, rollout, mask, "mask", cap=1.2)[mask]
    assert kept.tolist() == [float(1 / 1.2 <= r <= 1.2) for r in ratio.tolist()] and 0.5 < kept.mean() < 1


def test_an_engine_that_computes_something_else_is_refused_before_the_first_step(engine, base, prompts):
    """As if vLLM's code of the model differed from transformers': other results."""
    problem, policy = Problem("", prompts[0], "", ""), Policy(base[0])
    other, _ = load_model(BASE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    engine.load_weights(named_weights(other))
    check_engine(engine, base[0], policy, problem, resolved(), "cpu")
    with pytest.raises(UserError, match=r"differ by \d.* nats on average.*docs/models.md"):
        check_engine(engine, other, policy, problem, resolved(), "cpu")


def test_the_engine_is_checked_as_a_step_uses_it(monkeypatch, tiny_model):
    """After a sleep, to find weights that are lost in it. vLLM sleeps during the trainer's pass, to free its memory."""
    calls = []

    class Recorder:
        def generate(self, *_, **__):
            calls.append("generate")
            return [[Response([1], [2, 3], torch.zeros(2), False, "")]]

        def sleep(self):
            calls.append("sleep")

        def wake(self, named_weights):
            calls.append("wake" if dict(named_weights) else "wake without weights")

    def passes(policy, group, *_):
        calls.append("passes")
        group[0].old_logprobs = torch.zeros(2)

    monkeypatch.setattr("ce_gppo.evaluation.compute_old_logprobs", passes)
    check_engine(Recorder(), tiny_model, None, Problem("", [1], "", ""), resolved(), "cuda")
    assert calls == ["sleep", "wake", "generate", "sleep", "passes", "wake"]


def test_the_prefix_cache_is_forgotten_at_a_sync(engine, base, prompts):
    """A prompt of several cache blocks, seen before with other weights."""
    long = [sum(prompts, [])[:400]]
    engine.load_weights(named_weights(base[0]))
    engine.generate(long, 2, max_tokens=16, temperature=1.0, seed=3)
    model, _ = load_model(BASE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    engine.wake(named_weights(model))
    assert gap(model, engine.generate(long, 2, max_tokens=16, temperature=1.0, seed=3), 1.0) < 1e-4


def test_on_a_gpu_the_engine_wakes_in_the_right_order():
    """Only the order of calls, as a CPU has no sleep: weights, the sync, the stale cache, then room for a new cache.
    Level 2 drops the weights, so there is no way to wake without bringing new ones."""
    calls = []

    class Recorder:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, kwargs.get("level") or kwargs.get("tags"))) or True

    sleeper = Engine.__new__(Engine)
    sleeper.cuda, sleeper.llm = True, Recorder()
    sleeper.sleep()
    sleeper.wake(iter([]))
    assert calls == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("collective_rpc", None),
        ("reset_prefix_cache", None),
        ("wake_up", ["kv_cache"]),
    ]


def test_keys_and_values_of_old_weights_end_the_run():
    """vLLM reports it only by its return value and a hidden warning."""
    stale = Engine.__new__(Engine)
    stale.cuda = True
    stale.llm = types.SimpleNamespace(collective_rpc=lambda *_, **__: None, reset_prefix_cache=lambda: False)
    with pytest.raises(RuntimeError, match="vLLM keeps keys and values of the old weights"):
        stale.load_weights(iter([]))


@pytest.mark.parametrize("dropped, bound", [(11, 0.006), (32, 0.01), (50, 0.013)])
def test_entropy_of_a_sample_of_the_dropped_groups(everything, dropped, bound):
    """entropy/mean from all trained tokens and one in three of the other responses: its standard error, relative."""
    H, tokens = everything  # [P, G] each
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(200):
        order = torch.randperm(len(H), generator=generator)
        others, trained = order[:dropped], order[dropped:]
        measured = slice(None, None, statistics.MEASURED)
        sample = H[others].flatten()[measured].sum() / tokens[others].flatten()[measured].sum()
        estimate = (H[trained].sum() + sample * tokens[others].sum()) / tokens.sum()
        errors.append((estimate / (H.sum() / tokens.sum()) - 1).item())
    assert 0 < torch.tensor(errors).square().mean().sqrt() < bound


@pytest.mark.parametrize("cuda", [True, False])
def test_on_a_gpu_every_response_has_its_own_seed(cuda):
    """vLLM's GPU runner does not read torch's generator. A group's children count on from the seed of their request."""
    import vllm
    from vllm.v1.engine.llm_engine import LLMEngine

    signature, requests = inspect.signature(LLMEngine.add_request), []

    class Recorder:
        def add_request(self, *arguments):
            requests.append(signature.bind(self, *arguments).arguments["params"])

        def has_unfinished_requests(self):
            return False

        def abort_request(self, _):
            pass

    recorded = Engine.__new__(Engine)
    recorded.cuda, recorded.vllm, recorded.tensor_parallel, recorded.stop_token_ids = cuda, vllm, 1, [1]
    recorded.llm = types.SimpleNamespace(llm_engine=Recorder())
    recorded.generate([[1], [2], [3]], 4, max_tokens=2, temperature=1.0, seed=100)
    assert [params.seed for params in requests] == ([100, 104, 108] if cuda else [None] * 3)


class Recorded:
    """In the place of vllm.LLM. Every call must fit the signature of the installed vLLM, and is recorded."""

    real: type = object  # vllm.LLM, set by the test
    calls = []

    def __init__(self, **options):
        from vllm.engine.arg_utils import EngineArgs

        known = {*inspect.signature(self.real.__init__).parameters, *inspect.signature(EngineArgs.__init__).parameters}
        assert options.keys() <= known, options.keys() - known
        self.options = options

    def collective_rpc(self, method, kwargs):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        inspect.signature(self.real.collective_rpc).bind(self, method, kwargs=kwargs)
        inspect.signature(getattr(GPUModelRunner, method)).bind(self, **kwargs)
        self.calls.append((method, list(kwargs["weights_iterator"])))

    def __getattr__(self, name):
        method = getattr(self.real, name)

        def call(**kwargs):
            inspect.signature(method).bind(self, **kwargs)
            self.calls.append((name, kwargs))
            return name == "reset_prefix_cache"

        return call


def test_on_a_gpu_the_engine_is_called_as_vllm_wants(tiny_folder, tokenizer, monkeypatch):
    """Options, and the way from sleep to new weights; the head's logits are in float32, as the trainer's are."""
    import vllm

    monkeypatch.setattr(Recorded, "real", vllm.LLM)
    monkeypatch.setattr(vllm, "LLM", Recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = Engine(str(tiny_folder), tokenizer, context=64)
    engine.sleep()
    engine.wake([("a", 1)])
    assert engine.llm.calls == [
        ("sleep", {"level": 2}),
        ("wake_up", {"tags": ["weights"]}),
        ("reload_weights", [("a", 1)]),
        ("reset_prefix_cache", {}),
        ("wake_up", {"tags": ["kv_cache"]}),
    ]
    options = engine.llm.options
    read = {"dtype": options["dtype"], "hf_overrides": options["hf_overrides"]}
    config = vllm.config.ModelConfig(str(tiny_folder), **read)
    assert config.dtype == torch.bfloat16 and config.head_dtype == torch.float32
    head = inspect.getsource(vllm.model_executor.layers.logits_processor.LogitsProcessor._apply_head)
    assert "torch.mm(flat, lm_head.weight.t(), out_dtype=self.head_dtype)" in head, "the product of entropy._product"


def test_without_a_gpu_an_install_for_one_says_what_is_wrong():
    """The command that the Makefile runs after an install for a GPU."""
    command = re.search(r"^CHECK_GPU = .venv/bin/python -c '(.+)'$", (ROOT / "Makefile").read_text(), re.M)[1]
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert (done.returncode == 0) == torch.cuda.is_available()
    assert torch.cuda.is_available() or "make: torch cannot use the GPU" in done.stderr and "580" in done.stderr


def test_a_folder_cannot_change_the_sampling(tiny_folder, tokenizer):
    """generation_config.json names end-of-sequence ids, several perhaps; its top_p and the like are not used."""
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": [5, 9], "top_p": 0.1, "temperature": 0.1}')
    assert stop_token_ids(str(tiny_folder), tokenizer) == sorted({5, 9, tokenizer.eos_token_id})


def test_ids_past_the_vocabulary_are_survived(tokenizer):
    ids = tokenizer.encode("12")
    assert decode(tokenizer, [ids[0], len(tokenizer) + 3, ids[1]]) == "12"


def test_a_cache_too_small_for_one_response_names_the_setting(base):
    with pytest.raises(
        UserError, match="VLLM_CPU_KVCACHE_SPACE, .* is too small for the cache of a response of 512 tokens"
    ):
        Engine(BASE, base[1], context=512, cpu_kv_cache_gib=0.0001)


def test_models_of_vllms_transformers_backend_train():
    """vLLM changes the class that the trainer's own model has; OLMo-2 died in the first pass."""
    output = Forked("tools.families", "--only", "Olmo2").communicate()[0]
    assert "| Olmo2 | trains, " in output, output
