"""avg@k and pass@k of a policy on held-out problems."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ce_gppo import messages, parallel
from ce_gppo.batch import Rollout
from ce_gppo.problems import Problem, seed_of_step

PUZZLES = ("walk", "countdown")  # verifiers of tasks with many right texts, where different ones can be counted


def evaluate(engine, problems: list[Problem], k: int, *, score: Callable | None, thinking: bool, **sampling):
    """k responses to each problem, a Rollout with `correct`; None once the engine was stopped, on any of its ranks.

    score: reward.score, or None where another rank judges. sampling: further arguments of engine.generate.
    """
    rollout = engine.generate([p.prompt_ids for p in problems], k, **sampling)
    if rollout is None or score is None:
        return rollout
    each = [problems[i] for i in rollout.prompt_of.tolist()]
    components = score(rollout.texts, [p.answer for p in each], [p.verifier for p in each], thinking=thinking)
    return replace(rollout, correct=torch.tensor([c["correctness"] >= 1 for c in components], dtype=torch.bool))


def evaluate_policy(engine, problems: list[Problem], config, score: Callable, log, meter, stop, step: int) -> None:
    """Evaluate train.py's policy and log eval/* at this step, if that is due and not done yet. Collective.

    Once `stop` is true on any rank the evaluation is dropped, and the resumed run evaluates first.

    Evaluation: eval/<source>/avg_at_k | share | accuracy on held-out problems, mean over k samples of each | rises
    Evaluation: eval/<source>/pass_at_k | share | held-out problems with a right answer among k samples | does not fall
        while avg_at_k rises
    Evaluation: eval/<source>/distinct_at_k | | different right responses among k samples: how many ways the policy
        still finds; only of walk and countdown | near k times avg_at_k
    """
    due = step % config.eval_every == 0 or step == config.steps
    if not due or parallel.rank0_then_broadcast(lambda: log.has_evaluation(step)):
        return
    own, engine_rank = parallel.round_robin(len(problems), config.rollout_tp), parallel.rank() // config.rollout_tp
    options = {"thinking": config.thinking, "max_tokens": config.eval_response_tokens, "stop": stop}
    options["score"] = score if parallel.leads(config.rollout_tp) else None
    options |= {"temperature": config.eval_temperature, "top_p": config.eval_top_p}
    options["seed"] = seed_of_step(config.seed, 0, engine_rank)  # training's steps count from 1
    with meter("eval"):
        rollout = evaluate(engine, [problems[i] for i in own], config.eval_samples, **options)
        if parallel.any_rank(rollout is None):
            return
        results = {i: results_of(rollout, place) for place, i in enumerate(own) if options["score"]}
        results = {i: result for part in parallel.all_gather(results) for i, result in part.items()}
        if step == 0:
            warn(rollout, [problems[i].verifier for i in own])
    metrics = accuracy(problems, [results[i] for i in range(len(problems))], config.eval_samples)
    if log:
        log.add(step, {f"eval/{name}": value for name, value in metrics.items()} | meter.take_part("eval"))


def results_of(rollout: Rollout, prompt: int) -> tuple[int, int]:
    """How many responses to a prompt are right, and how many different texts are among these."""
    right = ((rollout.prompt_of == prompt) & rollout.correct).nonzero()[:, 0].tolist()
    return len(right), len({rollout.texts[i].strip() for i in right})


def accuracy(problems: list[Problem], results: list[tuple[int, int]], k: int) -> dict[str, float]:
    """avg@k, pass@k and distinct@k by source. results: of each problem, see `results_of`."""
    metrics = {}
    for source in dict.fromkeys(problem.source for problem in problems):
        own = [(p.verifier, *result) for p, result in zip(problems, results, strict=True) if p.source == source]
        metrics[f"{source}/avg_at_k"] = sum(right for _, right, _ in own) / (k * len(own))
        metrics[f"{source}/pass_at_k"] = sum(right > 0 for _, right, _ in own) / len(own)
        if own[0][0] in PUZZLES:
            metrics[f"{source}/distinct_at_k"] = sum(distinct for *_, distinct in own) / len(own)
    return metrics


def warn(rollout: Rollout, verifiers: list[str]) -> None:
    """Warn if over 90 % of all responses are cut or lack a box. verifiers: of this rank's prompts. Collective."""
    texts = [text for text, i in zip(rollout.texts, rollout.prompt_of.tolist(), strict=True) if verifiers[i] == "math"]
    counts = int(rollout.truncated.sum()), len(rollout), sum("\\boxed" not in text for text in texts), len(texts)
    cut, responses, unboxed, boxes = parallel.all_sum(*counts)
    too_long = "are cut at eval_response_tokens: raise it, or look in samples.jsonl for responses that never end"
    no_box = "have no \\boxed{} answer and score 0: ask for one with prompt_suffix or system_prompt"
    for bad, total, problem in ((cut, responses, too_long), (unboxed, boxes, no_box)):
        if bad > 0.9 * total:
            messages.say(f"{bad / total:.0%} of the first evaluation's responses {problem}", warning=True)
