"""avg@k and pass@k of a model on a JSONL file of problems.

python evaluate.py --model out/<run>/checkpoint-000040 --data data/arithmetic/eval.jsonl --k 8
"""

import sys
from dataclasses import dataclass

import tyro
from transformers import AutoTokenizer

from policy import context_of
from prompts import Problem, UserError, load_problems
from reward import score
from rollout import Engine, Response


@dataclass
class Config:
    model: str = "data/arithmetic/base"  # folder or hub name
    data: str = "data/arithmetic/eval.jsonl"  # problems, JSONL
    k: int = 8  # samples a problem (32 for AIME in the paper)
    temperature: float = 0.6  # the paper's evaluation setting; `make train` evaluates its small model at 1.0
    top_p: float = 0.95  # the paper's evaluation setting; 1.0 turns it off
    max_prompt_tokens: int = 4096  # problems with longer prompts are dropped, and counted
    max_response_tokens: int | None = None  # longer responses are cut; None: 16384, or what the context leaves
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory for vLLM
    cpu_kv_cache_gib: float = 1.0  # GiB for vLLM's cache, without a GPU
    seed: int = 0


def evaluate(
    engine: Engine,
    problems: list[Problem],
    k: int,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
    thinking: bool = False,
) -> tuple[dict[str, float], list[list[Response]]]:
    """Sample k responses a problem and score them.

    Returns ({"<benchmark>/avg_at_k": mean accuracy over all samples, "<benchmark>/pass_at_k": share of problems with at
    least one right among the k}, the responses with their rewards); a benchmark is what the rows call their source.
    """
    prompts = [problem.prompt_ids for problem in problems]
    groups = engine.generate(prompts, k, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    answers = [problem.answer for problem in problems for _ in range(k)]
    responses = [response for group in groups for response in group]
    for response, reward in zip(responses, score([r.text for r in responses], answers, thinking=thinking), strict=True):
        response.reward = reward
    metrics = {}
    for source in dict.fromkeys(problem.source for problem in problems):
        rewards = [[r.reward for r in g] for g, p in zip(groups, problems, strict=True) if p.source == source]
        metrics[f"{source}/avg_at_k"] = sum(map(sum, rewards)) / (len(rewards) * k)
        metrics[f"{source}/pass_at_k"] = sum(max(group) > 0 for group in rewards) / len(rewards)
    return metrics, groups


def main(config: Config) -> None:
    for name, valid in {
        "k": config.k >= 1,
        "temperature": config.temperature >= 0,
        "top_p": 0 < config.top_p <= 1,
        "max_response_tokens": config.max_response_tokens is None or config.max_response_tokens >= 1,
    }.items():
        if not valid:
            raise UserError(
                f"{name} = {getattr(config, name)}: k and lengths start at 1, temperature at 0, top_p is in (0, 1]"
            )
    limit = context_of(config.model)
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    problems, dropped = load_problems(config.data, tokenizer, min(config.max_prompt_tokens, limit - 1))
    longest = max(len(problem.prompt_ids) for problem in problems)
    max_tokens = config.max_response_tokens or min(16384, limit - longest)
    if longest + max_tokens > limit:
        raise UserError(
            f"max_response_tokens = {max_tokens} after a prompt of {longest} is beyond the context of {limit}"
        )
    engine = Engine(
        config.model,
        tokenizer,
        context=longest + max_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        cpu_kv_cache_gib=config.cpu_kv_cache_gib,
        seed=config.seed,
    )
    metrics, groups = evaluate(
        engine,
        problems,
        config.k,
        max_tokens=max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    responses = [response for group in groups for response in group]
    print(f"{len(problems)} problems x {config.k} samples, {dropped} dropped for a prompt that is too long")
    for name, value in metrics.items():
        print(f"{name.replace('_k', '_' + str(config.k)).replace('_', ' ')}  {value:.4f}")
    print(f"mean length  {sum(len(r.response_ids) for r in responses) / len(responses):.1f} tokens")
    print(f"truncated  {sum(r.truncated for r in responses) / len(responses):.4f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
