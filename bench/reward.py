r"""The verifier: answers/s against bare math-verify on plain and LaTeX answers, and the delay by hostile answers.

    .venv/bin/python -m bench.reward

Run it from the repository root. Bare is `verify(parse(truth), parse(response))` in the main thread, after a call that
warms up. All answers differ, so no verdict comes from a cache. Half of them are right. Ours may use several
processes, and starts none for most plain answers.

Only ours gets hostile answers: each in a batch with harmless ones, then all of them in one batch. The delay is the time
of that batch minus the time of its harmless answers.
"""

import random
import time
from dataclasses import dataclass

import reward
from bench import common
from ce_gppo import types as t
from ce_gppo.config import command
from ce_gppo.verifier import workers


@dataclass
class Config:
    plain: t.Count = 500  # answers
    latex: t.Count = 100
    rounds: t.Count = 2  # of both in turn, with new answers each time; the best of each counts
    hostile: t.Count | None = None  # how many of the hostile answers; None: all
    timeout: t.Positive = 3.0  # seconds for one answer, as in reward.score
    budget: t.Positive = 60.0  # seconds for all answers of a batch, as in reward.score


# (right answer, wrong answer, truth), with integers a < b for {a} and {b}. The most frequent kinds of answers.
PLAIN = (
    ("{b}", "{a}", "{b}"),
    ("-{a}", "{a}", "-{a}"),
    ("{b}.50", "{b}.05", "{b}.5"),
    (r"\frac{{{a}}}{{{b}}}", r"\frac{{{b}}}{{{a}}}", "{a}/{b}"),
    ("{b},{a:03d}", "{b}{a:03d}0", "{b}{a:03d}"),
    (r"{a}\%", r"{b}\%", "{a}"),
    (r"{b}\text{{ cm}}", r"{a}\text{{ cm}}", "{b}"),
    ("({a}, {b})", "({b}, {a})", "({a},{b})"),
)
# The same, for answers that need algebra.
LATEX = (
    (r"\frac{{{a}}}{{\sqrt{{{b}}}}}", r"\frac{{{b}}}{{\sqrt{{{a}}}}}", r"\frac{{{a}\sqrt{{{b}}}}}{{{b}}}"),
    (r"(x+{a})(x-{b})", r"(x-{a})(x-{b})", r"x^2+{a}x-{b}x-{a}\cdot{b}"),
    (r"\sqrt{{{a}^2 \cdot {b}}}", r"\sqrt{{{a} \cdot {b}^2}}", r"{a}\sqrt{{{b}}}"),
    (r"{a}\pi+\frac{{\pi}}{{{b}}}", r"{b}\pi+\frac{{\pi}}{{{a}}}", r"\pi\left({a}+\frac{{1}}{{{b}}}\right)"),
    (r"\log_2({a})+\log_2({b})", r"\log_2({a}+{b})", r"\log_2({a}\cdot{b})"),
    (r"\frac{{{a}x}}{{{b}x^2}}", r"\frac{{{a}x^2}}{{{b}x}}", r"\frac{{{a}}}{{{b}x}}"),
)
HOSTILE = (
    r"10^{10^{10}}",
    r"99999999!",
    r"9^{9^{9^{9}}}",
    r"\binom{9000000}{99999}",
    "(" * 2000 + "1" + ")" * 2000,
    "1" * 100_000,
    r"\frac{1}{" * 500 + "2" + "}" * 500,
    r"__import__('time').sleep(60)",
    r"(x+y+z+w)^{60}",
    r"\prod_{k=1}^{9999} (k+\sqrt{2})",
    r"\sum_{n=1}^{10^{9}} \frac{1}{n^2+\sqrt{n}}",
    r"\int_0^1 \sin(\cos(\tan(x^x))) dx",
    r"\sqrt{2+" * 9 + "x" + "}" * 9,
)


def answers(templates: tuple, count: int, rng: random.Random) -> tuple[list[str], list[str], list[float]]:
    """(responses, truths, right verdicts) for `count` different answers, half of them right."""
    responses, truths, expected = [], [], []
    for i in range(count):
        right, wrong, truth = templates[i // 2 % len(templates)]
        a, b = sorted(rng.sample(range(2, 900), 2))
        answer = (right, wrong)[i % 2].format(a=a, b=b)
        responses.append(rf"Adding up, we find that the answer is \boxed{{{answer}}}.")
        truths.append(truth.format(a=a, b=b))
        expected.append(1.0 - i % 2)
    return responses, truths, expected


def bare(responses: list[str], truths: list[str]) -> list[float]:
    from math_verify import parse, verify

    verdicts = []
    for response, truth in zip(responses, truths, strict=True):
        verdicts.append(float(verify(parse(f"${truth}$"), parse(response))))
    return verdicts


def ours(responses: list[str], truths: list[str], **options) -> list[float]:
    return [parts["correctness"] for parts in reward.score(responses, truths, **options)]


def timed(function, *arguments, **options) -> tuple[float, list[float]]:
    start = time.perf_counter()
    verdicts = function(*arguments, **options)
    return time.perf_counter() - start, verdicts


def rates(templates: tuple, count: int, rounds: int, rng: random.Random) -> dict[str, float]:
    """Answers/s of both, and their shares of right verdicts."""
    seconds, right = {"ours": [], "bare": []}, {"ours": 0, "bare": 0}
    for _ in range(rounds):
        responses, truths, expected = answers(templates, count, rng)
        for name, function in (("ours", ours), ("bare", bare)):
            taken, verdicts = timed(function, responses, truths)
            seconds[name].append(taken)
            right[name] += sum(v == e for v, e in zip(verdicts, expected, strict=True))
    result = {f"{name}_per_s": count / min(seconds[name]) for name in seconds}
    result |= {f"{name}_right": right[name] / count / rounds for name in right}
    return result | {"ours_over_bare": result["ours_per_s"] / result["bare_per_s"]}


def delays(attacks: tuple[str, ...], config: Config, rng: random.Random) -> tuple[float, float]:
    """Seconds by which these answers delay a batch of harmless ones, and the batch after it.

    The next batch is delayed because killed workers must start again.
    """
    batch = [one + other for one, other in zip(answers(PLAIN, 200, rng), answers(LATEX, 12, rng), strict=True)]
    responses, truths, expected = batch
    options = {"timeout": config.timeout, "budget": config.budget}
    attacked = [rf"\boxed{{{attack}}}" for attack in attacks] + responses, ["4"] * len(attacks) + truths
    seconds = []
    harmless = responses, truths
    for arguments in (harmless, harmless, attacked, harmless):  # the first fills sympy's own cache
        workers._cache.clear()
        taken, verdicts = timed(ours, *arguments, **options)
        assert verdicts[-len(expected) :] == expected, "hostile answers changed the verdicts of others"
        seconds.append(taken)
    _, before, during, after = seconds
    return during - before, after - before


def main(config: Config) -> None:
    rng = random.Random(0)
    for function in (ours, bare):  # import sympy, start the workers
        function(*answers(LATEX, 20, rng)[:2])
    result = {"bench": "reward", "date": time.strftime("%Y-%m-%d"), "timeout": config.timeout, "budget": config.budget}
    for name, templates, count in (("plain", PLAIN, config.plain), ("latex", LATEX, config.latex)):
        result |= {f"{name}/{key}": value for key, value in rates(templates, count, config.rounds, rng).items()}
    hostile = HOSTILE[: config.hostile]
    each = {attack[:40]: delays((attack,), config, rng) for attack in hostile}
    result["hostile/delay_s"], result["hostile/delay_of_next_s"] = map(max, zip(*each.values(), strict=True))
    result["hostile/delay_all_s"], _ = delays(hostile, config, rng)
    result["hostile/each_s"] = {attack: delay for attack, (delay, _) in each.items()}

    columns = ("ours_per_s", "bare_per_s", "ours_over_bare", "ours_right", "bare_right")
    rows = [(name, *(result[f"{name}/{column}"] for column in columns)) for name in ("plain", "latex")]
    bars = [
        ("plain answers/s, ours over math-verify", result["plain/ours_over_bare"], ">= 10"),
        ("LaTeX answers/s, ours over math-verify", result["latex/ours_over_bare"], ""),
        ("delay by one hostile answer, s", result["hostile/delay_s"], f"<= {config.timeout:g}"),
        ("delay of the batch after it, s", result["hostile/delay_of_next_s"], ""),
        (f"delay by all {len(hostile)}, s", result["hostile/delay_all_s"], f"<= {config.budget + config.timeout:g}"),
    ]
    attacks = [(attack, delay) for attack, (delay, _) in each.items()]
    common.show(
        result,
        [("answers", *columns), *rows],
        [("hostile answer", "delay, s"), *attacks],
        [("", "value", "bar"), *bars],
    )


if __name__ == "__main__":
    command(main, Config, __doc__)
