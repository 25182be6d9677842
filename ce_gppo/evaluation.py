"""avg@k and pass@k of a policy on held-out problems."""

from collections.abc import Callable
from functools import partial

from ce_gppo import dist
from ce_gppo.types import Problem, Response


def evaluate(engine, problems: list[Problem], k: int, *, score: Callable, **sampling) -> list[list[Response]]:
    """k responses to each problem, with their verdicts; all or none of them: none once `stop` is true.

    engine: a rollout.Engine. score: reward.score, (texts, answers) -> verdicts. sampling: what engine.generate takes.
    """
    groups = engine.generate([problem.prompt_ids for problem in problems], k, **sampling)
    if not all(groups):  # given up; `stop` may be true only on another rank of the engine
        return []
    responses = [response for group in groups for response in group]
    answers = [problem.answer for problem in problems for _ in range(k)]
    for response, verdict in zip(responses, score([r.text for r in responses], answers), strict=True):
        response.verdict = verdict
    return groups


def evaluate_policy(
    engine, problems: list[Problem], config, score: Callable, log, meter, stop: Callable[[], bool], step: int
) -> None:
    """Add eval/* of train.py's policy to the log's row of this step, if it is due and not there. Collective.

    Each engine samples its share of the problems. Once `stop` is true on any rank the evaluation is given up; the
    resumed run makes up for it.
    """
    due = step % config.eval_every == 0 or step == config.steps
    if not due or dist.rank0_then_broadcast(lambda: log.has_evaluation(step)):
        return
    with meter("eval"):
        groups = evaluate(
            engine,
            [problems[i] for i in dist.round_robin(len(problems), config.rollout_tp)],
            config.eval_samples,
            score=partial(score, thinking=config.thinking),
            max_tokens=config.max_response_tokens,
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            seed=config.seed + dist.rank() // config.rollout_tp,
            stop=stop,
        )
        if dist.any_rank(stop()):
            return
        verdicts = dist.gather_dealt([[r.verdict for r in group] for group in groups], config.rollout_tp)
    metrics = accuracy([(problem.source, row) for problem, row in zip(problems, verdicts, strict=True)])
    if log:
        log.log(step, {f"eval/{name}": value for name, value in metrics.items()} | meter.take_part("eval"))


def accuracy(graded: list[tuple[str, list[float]]]) -> dict[str, float]:
    """avg@k and pass@k by source, from (source, verdicts of the k samples) of each problem."""
    metrics = {}
    for source in dict.fromkeys(source for source, _ in graded):
        verdicts = [row for name, row in graded if name == source]
        metrics[f"{source}/avg_at_k"] = sum(map(sum, verdicts)) / sum(map(len, verdicts))
        metrics[f"{source}/pass_at_k"] = sum(max(row) > 0 for row in verdicts) / len(verdicts)
    return metrics
