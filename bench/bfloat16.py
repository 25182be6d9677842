"""The error of logprobs in bfloat16: vLLM's and the trainer's arithmetic on a GPU, emulated on a CPU.

    .venv/bin/python -m bench.bfloat16                                          the base policy of the default task
    .venv/bin/python -m bench.bfloat16 --model out/<run>/checkpoint-000050

Run it from the repository root. vLLM samples responses in float32. Their logprobs are then computed with the same
weights in four ways: in float32; as vLLM does on a GPU, with bfloat16 weights and activations, and logits in bfloat16
(its default) or in float32 (head_dtype, as rollout.py sets it); and as the trainer does there, with bfloat16 products
over float32 weights. A GPU's kernels add in another order: the errors of single tokens change, but not their scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

import train
from bench import common
from ce_gppo import config as t
from ce_gppo.batch import Packed, micro_batches, pack
from ce_gppo.model import load_model
from ce_gppo.policy import take
from ce_gppo.problems import load_problems
from rollout import MAX_MISMATCH, WARN_MISMATCH, Engine, prepare_environment

PAIRS = (
    ("vllm, float32 head", "trainer"),  # the mismatch of a run on a GPU
    ("vllm, bfloat16 head", "trainer"),  # the same without head_dtype
    ("vllm, float32 head", "float32"),
    ("vllm, bfloat16 head", "float32"),
    ("trainer", "float32"),
)


@dataclass
class Config:
    model: str = train.Config.model  # folder or hub name
    data: str = train.Config.train_data  # JSONL file of problems
    prompts: t.Count = 64
    responses: t.Count = 8  # to each prompt
    max_response_tokens: t.Count = train.Config.max_response_tokens


@torch.no_grad()
def logprobs_by_way(model: PreTrainedModel, half: PreTrainedModel, packed: Packed) -> dict[str, Tensor]:
    """Logprobs of the packed response tokens, [N], in each of the four ways. half: the model in bfloat16."""

    def hidden_states(model: PreTrainedModel) -> Tensor:  # [N, D], in the model's own dtype or in autocast's
        ids, positions = packed.input_ids[None], packed.position_ids[None]
        outputs = model.base_model(input_ids=ids, position_ids=positions, packing=packed.packing, use_cache=False)
        return take(outputs.last_hidden_state[0], packed.predecessors)

    exact_head = model.get_output_embeddings().weight  # [V, D]
    head = exact_head.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        trained = hidden_states(model).bfloat16().float()  # as Policy.forward rounds it on a GPU
    sampled = hidden_states(half).float()
    logits = {  # products of bfloat16 factors, added up in float32
        "float32": hidden_states(model) @ exact_head.T,
        "vllm, bfloat16 head": (sampled @ head.T).bfloat16().float(),
        "vllm, float32 head": sampled @ head.T,
        "trainer": trained @ head.T,
    }
    return {way: z.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0] for way, z in logits.items()}


def main(config: Config) -> None:
    prepare_environment()
    model, tokenizer = load_model(config.model)
    half = load_model(config.model)[0].bfloat16()
    problems, _ = load_problems(config.data, tokenizer, train.Config.max_prompt_tokens)
    engine = Engine(config.model, tokenizer, context=train.Config.max_prompt_tokens + config.max_response_tokens)
    prompts = [problem.prompt_ids for problem in problems[: config.prompts]]
    options = {"max_tokens": config.max_response_tokens, "temperature": 1.0, "seed": 0}
    rollout = engine.generate(prompts, config.responses, **options)
    parts = [logprobs_by_way(model, half, pack(part)) for part in micro_batches(rollout, 4096)]
    result = {"model": config.model, "tokens": len(rollout.tokens)}
    result |= {"warns_at": WARN_MISMATCH["cuda"], "ends_at": MAX_MISMATCH}
    rows = [("logprobs, nats", "mean |difference|", "99 %", "largest")]
    for a, b in PAIRS:
        gap = torch.cat([part[a] - part[b] for part in parts]).abs()  # [N]
        found = gap.mean().item(), gap.quantile(0.99).item(), gap.max().item()
        result |= {f"{a} - {b}/{name}": value for name, value in zip(("mean", "p99", "max"), found, strict=True)}
        rows.append((f"{a} - {b}", *(f"{value:.5f}" for value in found)))
    common.show("bfloat16", result, rows)


if __name__ == "__main__":
    t.command(main, Config, __doc__)
