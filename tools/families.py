"""Which model families can be trained: each is tried with a small model of random weights.

    python -m tools.families                     all of them, as a page of Markdown
    python -m tools.families --only Olmo2        one

A family trains if it loads, if vLLM serves it, and if both give the same logprobs after a change of the weights. The
table has the largest difference over up to 64 sampled tokens. Everything runs on the CPU in float32.
"""

import multiprocessing
import tempfile
from dataclasses import dataclass

import torch
import transformers

from ce_gppo.config import command
from ce_gppo.forward import Policy, collate, flatten
from ce_gppo.messages import UserError
from ce_gppo.model import load_model, named_weights
from data.arithmetic.base import make_tokenizer
from rollout import Engine, prepare_environment

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {  # the name of the configuration's class without "Config", and its settings beside the common sizes
    **dict.fromkeys(("Qwen2", "Llama", "Mistral", "Phi3", "Olmo", "Olmo2", "Olmo3", "SmolLM3", "Granite", "Glm"), {}),
    **dict.fromkeys(
        ("Glm4", "Starcoder2", "StableLm", "Phi", "SeedOss", "Exaone4", "Ernie4_5", "Apertus", "Arcee"), {}
    ),
    **dict.fromkeys(("Nemotron", "GPTNeoX", "Cohere2", "Gemma2", "Falcon", "OPT"), {}),
    **dict.fromkeys(("GPT2", "Bloom", "T5", "Mamba2"), {}),
    **dict.fromkeys(("Qwen3", "Gemma3Text", "Helium", "HunYuanDenseV1"), {"head_dim": 32}),
    "Qwen2Moe": MOE | {"shared_expert_intermediate_size": 64},
    "Qwen3Moe": MOE,
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": MOE,
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}


HEAD = """# Models

Made by `python -m tools.families`. Each family is tried with a small model of random weights, on a CPU in float32.
A number is the largest difference between vLLM's and the trainer's logprobs after the weights have changed, in nats.
"""


@dataclass
class Config:
    only: str = ""  # one family; empty: all


def build(folder: str, name: str) -> str:
    """A random model of the family with 272 tokens, as a Hugging Face folder."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(
        **sizes | ends | {"num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 256} | FAMILIES[name]
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def difference(folder: str) -> float:
    """Largest difference between vLLM's and the trainer's logprobs after the weights have changed, in nats."""
    model, tokenizer = load_model(folder)
    engine = Engine(folder, tokenizer, context=64, cpu_kv_cache_gib=0.05, max_sequences=8)
    with torch.no_grad():
        for parameter in model.parameters():  # all weights change: one that vLLM does not get makes a difference
            parameter += 0.1 * torch.randn_like(parameter) * parameter.std().nan_to_num()
    engine.load_weights(named_weights(model))
    prompts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
    responses = flatten(engine.generate(prompts, 2, max_tokens=8, temperature=1.0, seed=0))
    batch = collate(responses)
    with torch.no_grad():
        logprobs = Policy(model)(batch, 1.0)[0][batch.response_mask]
    return (logprobs - torch.cat([r.rollout_logprobs for r in responses])).abs().max().item()


def verdict(name: str, answer) -> None:
    """Send the verdict on a family through a pipe. In its own process: an engine lives until its process ends."""
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(folder, name)
            gap = difference(folder)
            answer.send(f"trains, {gap:.0e}" if gap < 1e-4 else f"differs by {gap:.2g} nats, more than rounding does")
        except UserError as error:
            answer.send("refused: " + str(error).partition("': ")[2])
        except Exception as error:  # of a library; train.py prints it as a sentence, too
            answer.send(f"refused: {type(error).__name__}, {str(error).strip().splitlines()[0][:150]}")


def main(config: Config) -> None:
    prepare_environment()
    if config.only and config.only not in FAMILIES:
        raise UserError(f"--only {config.only}: unknown; known: {', '.join(FAMILIES)}")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["transformers", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])  # once
    print(HEAD)
    print("| family | verdict |\n|---|---|", flush=True)
    for name in [config.only] if config.only else FAMILIES:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = forks.Process(target=verdict, args=(name, theirs))
        process.start()
        theirs.close()
        try:
            outcome = ours.recv()
        except EOFError:
            outcome = "refused: it ends the process"
        process.join()
        print(f"| {name} | {outcome} |", flush=True)


if __name__ == "__main__":
    command(main, Config, __doc__)
