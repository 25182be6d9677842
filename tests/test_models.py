"""Which model families train: each is tried with a small model of random weights. By hand, as it takes half an hour:

    FAMILIES=1 .venv/bin/python -m pytest tests/test_models.py -s      prints the rows of the table in docs/models.md

A family trains if it loads, if vLLM serves it, and if both give the same logprobs after a change of the weights. The
table has the largest difference over up to 64 sampled tokens. Everything runs on the CPU in float32.
"""

import multiprocessing
import os
import re
import tempfile

import pytest
import torch
import transformers

from ce_gppo.batch import pack
from ce_gppo.lora import named_weights
from ce_gppo.messages import UserError
from ce_gppo.model import load_model
from ce_gppo.policy import Policy
from data.base import make_tokenizer
from helpers import BASE, FORKING, ROOT, metrics_of, run
from rollout import Engine

PLAIN = (
    *("Qwen2", "Llama", "Mistral", "Phi3", "Olmo", "Olmo2", "Olmo3", "SmolLM3", "Granite", "Glm", "Glm4", "Starcoder2"),
    *("StableLm", "Phi", "SeedOss", "Exaone4", "Ernie4_5", "Apertus", "Arcee", "Nemotron", "GPTNeoX", "Cohere2"),
    *("Gemma2", "Falcon", "OPT", "GPT2", "Bloom", "T5", "Mamba2", "Ministral3", "GraniteMoeHybrid", "OlmoHybrid"),
    *("FalconH1", "Jamba", "Bamba", "Mamba", "NemotronH", "Persimmon", "Ernie4_5_Moe", "GPTJ", "MiniCPM3"),
)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
DELTA |= {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {  # the name of the configuration's class without "Config", and its settings beside the common sizes
    **dict.fromkeys(PLAIN, {}),
    **dict.fromkeys(("Qwen3", "Gemma3Text", "Helium", "HunYuanDenseV1"), {"head_dim": 32}),
    "Qwen2Moe": MOE | {"shared_expert_intermediate_size": 64},
    "Qwen3Moe": MOE,
    **dict.fromkeys(("Mixtral", "GraniteMoe"), {"num_local_experts": 4}),
    "FlexOlmo": {"num_experts": 8, "num_experts_per_tok": 2},
    "HunYuanMoEV1": {"num_experts": 4, "head_dim": 32, "moe_topk": 2},
    "NanoChat": {},
    "Olmoe": MOE,
    "Glm4Moe": MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 32},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    **dict.fromkeys(("Gemma", "Gemma4Text"), {"head_dim": 32}),
    "Cohere": {"logit_scale": 0.25},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3_5Text": DELTA,
    "Qwen3Next": DELTA | MOE | {"shared_expert_intermediate_size": 64},
}
PAGE = dict(re.findall(r"^\| (\w+) \| (\w+).*\|$", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE))


def build(folder: str, name: str, tokenizer=None) -> None:
    """A random model of the family, as a Hugging Face folder. tokenizer: default one with 272 tokens."""
    tokenizer = tokenizer or make_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": max(272, len(tokenizer)), "max_position_embeddings": 256}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes | ends | FAMILIES[name])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def difference(folder: str) -> tuple[float, str]:
    """Largest difference between vLLM's and the trainer's logprobs after the weights have changed, in nats; the way."""
    model, tokenizer = load_model(folder)
    engine = Engine(folder, tokenizer, context=64, max_sequences=8)
    with torch.no_grad():
        for parameter in model.parameters():  # all weights change: one that vLLM does not get makes a difference
            parameter += 0.1 * torch.randn_like(parameter) * parameter.std().nan_to_num()
        engine.load_weights(named_weights(model))
        prompts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
        rollout = engine.generate(prompts, 2, max_tokens=8, temperature=1.0, seed=0)
        logprobs = Policy(model)(pack(rollout), 1.0)[0]
    way = "packed" if model.config._attn_implementation == "packed" else "rows"
    way += " in bfloat16" * engine.bfloat16
    return (logprobs - rollout.rollout_logprobs).abs().max().item(), way


def verdict(name: str, answer) -> None:
    """Send the verdict on a family through a pipe. In its own process: an engine lives until its process ends."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(folder, name)
            gap, way = difference(folder)
            trains = gap < (0.02 if "bfloat16" in way else 1e-4)
            differs = f"differs by {gap:.2g} nats, more than rounding does"
            answer.send(f"trains, {gap:.0e}, {way}" if trains else differs)
        except UserError as error:
            answer.send("refused: " + str(error).partition("': ")[2])
        except Exception as error:  # of a library; train.py prints it as a sentence, too
            answer.send(f"refused: {type(error).__name__}, {str(error).strip().splitlines()[0][:150]}")


def test_the_page_has_every_family():
    assert PAGE.keys() - {"family"} >= FAMILIES.keys() and set(PAGE.values()) <= {
        "verdict",
        "trains",
        "refused",
        "differs",
    }


@pytest.mark.skipif("FAMILIES" not in os.environ, reason="half an hour; by hand, with FAMILIES=1")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_what_the_page_says(name):
    outcome = verdict_on(name)
    print(f"\n| {name} | {outcome} |")
    assert outcome.startswith(PAGE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name, way", [("Qwen3Moe", "packed"), ("FalconH1", "rows")])
def test_experts_and_rows_train(name, way):
    """vLLM gets each expert's weights, of which it keeps packed copies; and agrees with rows."""
    outcome = verdict_on(name)
    assert outcome.startswith("trains") and outcome.endswith(way), outcome


@pytest.mark.slow
def test_a_delta_network_trains_and_is_resumed(tmp_path):
    """Qwen3-Next: rows, experts, and on a CPU an engine in bfloat16. vLLM loads its checkpoint."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    build(str(tmp_path / "model"), "Qwen3Next", tokenizer)
    few = ["--prompts-per-step", "8", "--max-kept-prompts", "8", "--responses-per-prompt", "4", "--steps", "2"]
    few += ["--dynamic-sampling", "off", "--mini-batch-prompts", "4", "--eval-samples", "1", "--checkpoint-every", "1"]
    assert "are rows with" in run(tmp_path, "--model", str(tmp_path / "model"), "--run-name", "delta", *few)
    run(tmp_path, "--resume", str(tmp_path / "delta"), "--steps", "3")
    rows = metrics_of(tmp_path / "delta")
    assert len(rows) == 4 and all(1e-5 < row["mismatch/mean"] < 0.01 and row["kl/approx"] > 0 for row in rows[1:])


def verdict_on(name: str) -> str:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = FORKING.Process(target=verdict, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        outcome = ours.recv()
    except EOFError:
        outcome = "refused: it ends the process"
    process.join()
    return outcome
