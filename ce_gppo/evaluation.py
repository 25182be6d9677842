"""avg@k, pass@k and distinct@k of a policy on held-out problems, and checks before the first evaluation."""

from collections.abc import Callable
from functools import partial

from ce_gppo import messages, parallel
from ce_gppo.forward import compute_old_logprobs, flatten
from ce_gppo.messages import UserError
from ce_gppo.model import named_weights
from ce_gppo.statistics import MAX_MISMATCH
from ce_gppo.types import Problem, Response


def check_engine(engine, model, policy, problem: Problem, config, device: str) -> None:
    """UserError if engine and trainer, with the same weights, give two short responses different logprobs.

    Called before training: with such a model no update could be right. As in every step, the engine has slept and got
    the weights of `model` before it samples, and sleeps while the trainer computes. It ends awake. Collective.
    """
    engine.sleep()
    engine.wake(named_weights(model))
    sampling = {"max_tokens": min(16, config.max_response_tokens), "temperature": config.temperature}
    group = engine.generate([problem.prompt_ids], 2, seed=config.seed, **sampling)[0]
    engine.sleep()
    compute_old_logprobs(policy, group, config.temperature, config.max_micro_batch_tokens, device)
    gap = sum((r.old_logprobs - r.rollout_logprobs).abs().sum().item() for r in group)
    mean = gap / sum(len(r.response_ids) for r in group)
    if not mean <= MAX_MISMATCH:
        raise UserError(
            f"model '{config.model}': the logprobs of vLLM and the trainer for the first responses differ by "
            f"{mean:.3g} nats on average, more than {MAX_MISMATCH}: they may compute this architecture differently; "
            "docs/models.md lists the families that train"
        )
    engine.wake(named_weights(model))  # it forgets the prompt: what follows is as it would be without this check


def evaluate(engine, problems: list[Problem], k: int, *, score: Callable, **sampling) -> list[list[Response]]:
    """k responses to each problem, with their verdicts; an empty list once `stop` is true.

    engine: a rollout.Engine. score: reward.score. sampling: further arguments of engine.generate.
    """
    groups = engine.generate([problem.prompt_ids for problem in problems], k, **sampling)
    if not all(groups):  # stopped; `stop` may be true only on another rank of the engine
        return []
    responses = flatten(groups)
    each = [problem for problem in problems for _ in range(k)]
    scores = score([r.text for r in responses], [p.answer for p in each], [p.verifier for p in each])
    for response, parts in zip(responses, scores, strict=True):
        response.verdict = float(parts["correctness"] >= 1)
    return groups


def evaluate_policy(
    engine, problems: list[Problem], config, score: Callable, log, meter, stop: Callable[[], bool], step: int
) -> None:
    """Evaluate train.py's policy and log eval/* at this step, if that is due and not done yet. Collective.

    Each engine samples its share of the problems. Once `stop` is true on any rank the evaluation is dropped, and the
    resumed run evaluates first.
    """
    due = step % config.eval_every == 0 or step == config.steps
    if not due or parallel.rank0_then_broadcast(lambda: log.has_evaluation(step)):
        return
    with meter("eval"):
        mine = [problems[i] for i in parallel.round_robin(len(problems), config.rollout_tp)]
        groups = evaluate(
            engine,
            mine,
            config.eval_samples,
            score=partial(score, thinking=config.thinking),
            max_tokens=config.eval_response_tokens,
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            seed=config.seed + parallel.rank() // config.rollout_tp,
            stop=stop,
        )
        if parallel.any_rank(stop()):
            return
        if step == 0:
            warn(groups, mine)
        right = [[r.text.strip() for r in group if r.verdict] for group in groups]
        counts = parallel.gather_dealt([(len(texts), len(set(texts))) for texts in right], config.rollout_tp)
    metrics = accuracy([problem.source for problem in problems], counts, config.eval_samples)
    if log:
        log.log(step, {f"eval/{name}": value for name, value in metrics.items()} | meter.take_part("eval"))


def warn(groups: list[list[Response]], problems: list[Problem]) -> None:
    """Warn if over 90 % of the responses are cut or have no box, before hours are spent. By this rank's responses."""
    responses = flatten(groups)
    truncated = sum(r.truncated for r in responses) / len(responses)
    boxes = [
        "\\boxed" in r.text
        for group, problem in zip(groups, problems, strict=True)
        for r in group
        if problem.verifier == "math"
    ]
    unboxed = boxes.count(False) / max(1, len(boxes))
    if truncated > 0.9:
        messages.say(
            f"{truncated:.0%} of the first evaluation's responses are cut at eval_response_tokens: raise it, or look "
            "in samples.jsonl for responses that never end, because of a base model or a wrong end-of-sequence token",
            warning=True,
        )
    if unboxed > 0.9:
        messages.say(
            f"{unboxed:.0%} of the first evaluation's responses have no \\boxed{{}} answer and score 0: ask for one "
            "with prompt_suffix or system_prompt",
            warning=True,
        )


def accuracy(sources: list[str], counts: list[tuple[int, int]], k: int) -> dict[str, float]:
    """avg@k, pass@k and distinct@k by source, from each problem's source and counts.

    counts: for each problem, how many of its k samples are right, and how many different right ones there are.
    """
    metrics = {}
    for source in dict.fromkeys(sources):
        own = [count for count, name in zip(counts, sources, strict=True) if name == source]
        metrics[f"{source}/avg_at_k"] = sum(right for right, _ in own) / (k * len(own))
        metrics[f"{source}/pass_at_k"] = sum(right > 0 for right, _ in own) / len(own)
        metrics[f"{source}/distinct_at_k"] = sum(distinct for _, distinct in own) / len(own)
    return metrics
