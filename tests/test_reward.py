"""The verifier of mathematics: pairs with the verdict of a careful mathematician, hostile answers, dying workers."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import reward
from ce_gppo.messages import UserError
from ce_gppo.problems import Problem
from ce_gppo.verifier import answers, workers
from ce_gppo.verifier.spelling import LONGEST
from helpers import score
from reward import extract_answer, in_background, overlong_penalty

CASES = Path(__file__).with_name("cases").joinpath("verifier.jsonl")


def read_pair(line: str) -> tuple[str, str, str, float]:
    """(kind, response, true answer, correctness). A pair has a whole response, or a prediction: a box's content."""
    pair = json.loads(line)
    response = pair.get("response", rf"Hence the answer is $\boxed{{{pair.get('prediction')}}}$.")
    return pair["kind"], response, pair["gold"], float(pair["right"])


PAIRS = [read_pair(line) for line in CASES.read_text().splitlines()]


@pytest.fixture(scope="module")
def found() -> list[float]:
    return score([response for _, response, *_ in PAIRS], [truth for *_, truth, _ in PAIRS], workers=2, timeout=10)


@pytest.mark.parametrize("kind", sorted({kind for kind, *_ in PAIRS}))
def test_verdicts_of_a_careful_mathematician(kind, found):
    assert len(PAIRS) > 2_300
    wrong = [pair for pair, correctness in zip(PAIRS, found, strict=True) if pair[0] == kind and correctness != pair[3]]
    assert wrong == []


@pytest.mark.parametrize("space", ["\\ ", "\\,", "~", "\\quad ", "\\\\", "\n", "\u200b", "\ufeff", "\u00a0"])
@pytest.mark.parametrize("answer", ["5", r"\frac{1}{2}", "x^2", "(1,2)", "yes"])
def test_spaces_at_the_end_and_the_beginning(answer, space):
    """Those of the table's cells are stripped, and some cannot be seen."""
    assert score([rf"\boxed{{{answer}{space}}}", rf"\boxed{{{space}{answer}}}"], [answer] * 2) == [1.0, 1.0]
    assert score([rf"\boxed{{{answer}{space}}}"], ["6"]) == [0.0]


def test_one_at_a_time_is_the_same_and_so_is_any_order(found):
    order = random.Random(0).sample(range(len(PAIRS)), 120)
    workers._cache.clear()
    shuffled = score([PAIRS[i][1] for i in order], [PAIRS[i][2] for i in order], workers=2, timeout=10)
    assert shuffled == [found[i] for i in order]
    workers._cache.clear()
    assert [score([PAIRS[i][1]], [PAIRS[i][2]], workers=1, timeout=10)[0] for i in order[:40]] == shuffled[:40]


def test_verdicts_of_december():
    """Qualifiers, units in brackets, sums as left sides, reasons, max and min, choices with texts, Chinese, DAPO's."""
    rows = [json.loads(line) for line in CASES.with_name("verifier-december.jsonl").read_text().splitlines()]
    given = ([row[name] for row in rows] for name in ("response", "answer", "verifier"))
    found = score(*given, workers=2, timeout=10)
    assert [row for row, right in zip(rows, found, strict=True) if right != row["right"]] == []


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        score(["a", "b"], ["1", "2", "3"])
    assert score([], []) == []


def test_plain_arithmetic_starts_no_worker(no_cache, monkeypatch):
    """A text of more than LONGEST characters equals only itself."""
    monkeypatch.setattr(workers.Worker, "start", lambda self, _: pytest.fail("a worker was started"))
    responses = [rf"so \boxed{{{i}}}" for i in range(512)]
    assert score(responses, ["48"] * 512) == [float(i == 48) for i in range(512)]
    for n in (1_001, 5_000):
        assert score([r"\boxed{%s}" % ("7" * n)] * 2, ["7" * n, "7" * (n - 1) + "8"]) == [1.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------------
# Hostile answers and dying workers.

HANGS = r"(x+y+z+w)^{60}"  # no bomb by its looks, and keeps sympy busy for minutes


def for_math_verify(n: int) -> tuple[str, str]:
    """A right answer and its truth, which only math-verify can match."""
    return rf"\boxed{{\frac{{1}}{{\sqrt{{{n}}}}}}}", rf"\frac{{\sqrt{{{n}}}}}{{{n}}}"


@pytest.fixture
def no_cache():
    workers._cache.clear()


def test_three_hundred_hostile_answers(no_cache, capsys):
    bombs = ["10^{10^{%d}}", "%d99999999!", "9^{9^{9^{%d}}}", "2^{%d000000}", "%d" * 2000, r"\binom{9%d00000}{99999}"]
    bombs += [left * 250 + "%d" + right * 250 for left, right in ("()", "[]", "{}")]
    bombs += [r"\frac{1}{" * 20 + "%d" + "}" * 20]
    bombs += [r"\prod_{k=1}^{9999} (k+\sqrt{%d})", r"(x+y+z+w)^{6%d}", r"\sqrt{%d+" * 9 + "x" + "}" * 9]
    hostile = [bombs[i % len(bombs)].replace("%d", str(i)) for i in range(300)]
    rows = [(rf"\boxed{{{bomb}}}", "4", 0.0) for bomb in hostile]  # response, truth, expected
    rows[::10] = [(rf"\boxed{{{i}}}", str(i), 1.0) for i in range(0, 300, 10)]
    rows[1::60] = [(*for_math_verify(i + 1), 1.0) for i in range(1, 300, 60)]
    responses, truths, expected = map(list, zip(*rows, strict=True))
    start = time.monotonic()
    assert score(responses, truths, workers=2, timeout=0.5, budget=2.0) == expected
    assert time.monotonic() - start < 2 + 20
    assert capsys.readouterr().err.count("\n") <= 1


SEQUENCES = r"""{}¦{1}¦\\¦\text{¦\text{a}¦\text{cm}¦\frac{1}{2}¦\boxed{¦\pm¦\lor x>1¦\{x|¦\{x:x<¦\overline{3}¦1,¦,000
(A) ¦a: ¦12_3¦1 ¦5!¦\vec a  ¦m    ¦\overline{A} ¦AB:¦a+¦f(¦x^(¦sqrt(¦(2)¦km/¦</think>¦<think>¦:]¦}_
1e5¦0.¦\left(¦\begin{pmatrix}¦5!!¦1'000¦\begin{align}&¦0.12\ldots¦5 \text{ million ¦five ¦\pmod{2^3}
1 \text{ hour } 3 \text{ minutes}¦x \ne 1,¦Answer: C or¦no solution ¦all real numbers except 
x = \mathbb{R},"""
RUNS = [*"0123456789axACI.,;:!?'\"|&%$#@~^_-+*/=<> \\()[]{}\n½²", *re.split("[\n¦]", SEQUENCES)]


@pytest.mark.parametrize("length", [300, 1_000, 500_000])
@pytest.mark.parametrize("run", RUNS)
def test_no_text_keeps_the_main_process_busy(run, length, monkeypatch):
    """Texts of more than LONGEST characters are not read, and the time to read others is bounded; digits took 4.6 s."""
    monkeypatch.setattr(reward, "judge", lambda *_: {})
    text = (run * length)[:length] if length < 5_000 else run * (length // len(run))
    pairs = [(text, "4"), ("4", text), (text, text)]
    if len(text) <= LONGEST:  # of longer ones no character is read
        pairs += [(text, text + "1"), ("3" + text, text), (text[:75] + "{1} = 4", "4")]
    for answer, truth in pairs:
        start = time.process_time()
        score([rf"\boxed{{{answer}}}"], [truth])
        assert time.process_time() - start < 3


def test_reading_hostile_text_raises_nothing():
    """Whatever tokens are strung together: an exception in the main process would end the training."""
    rng = random.Random(0)
    words = ["=", r"\approx", r"\in", r"\cup", r"\infty", r"\le", r"\cdot", r"\text{ and }", "²", "π", r"\circ", "4"]
    tokens = [*RUNS, *words]
    for _ in range(5_000):
        answer, truth = ("".join(rng.choices(tokens, k=rng.randint(1, 12))) for _ in range(2))
        truth = rng.choice([truth, answer + truth])
        answers.same(answers.normalize(answer), answers.normalize(truth), lambda *_: False)


def test_a_hanging_answer_costs_only_itself(no_cache):
    pairs = [for_math_verify(n) for n in range(2, 8)]
    pairs.insert(3, (rf"\boxed{{{HANGS}}}", "(x+y+z)^{50}"))
    start = time.monotonic()
    assert score(*map(list, zip(*pairs, strict=True)), workers=1, timeout=2.0) == [1, 1, 1, 0, 1, 1, 1]
    assert 2.0 <= time.monotonic() - start < 20
    start = time.monotonic()
    assert score([pairs[3][0]], [pairs[3][1]], workers=1, timeout=2.0) == [0]
    assert time.monotonic() - start < 1  # its verdict is kept


def test_a_busy_machine_does_not_make_a_right_answer_wrong(no_cache, tmp_path):
    """The worker needs 0.5 s of a core that it shares with three other processes, and may have 1 s."""
    (tmp_path / "mine.py").write_text(
        "import time\n\n\ndef score(response, answer):\n    end = time.process_time() + 0.5\n"
        "    while time.process_time() < end:\n        pass\n    return float(response == answer)\n"
    )
    mine = f"{tmp_path}/mine.py:score"
    assert score(["4"], ["4"], [mine], workers=1) == [1.0]  # it is loaded
    (worker,) = [worker for worker in workers._workers if worker.process][:1]
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(worker.process.pid, core)
    endless = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(endless, start_new_session=True) for _ in range(3)]  # Linux may share by session
    try:
        for other in others:
            os.sched_setaffinity(other.pid, core)
        assert score(["5"], ["5"], [mine], workers=1, timeout=1.0) == [1.0]
    finally:
        for other in others:
            other.kill()
            other.wait()
        worker.kill()  # it would stay on its core


def test_what_the_budget_does_not_reach_is_reported(no_cache, capsys):
    responses = [rf"\boxed{{(x+y+z+w)^{{{n}}}}}" for n in range(60, 70)] * 2
    start = time.monotonic()
    assert score(responses, ["4"] * 20, workers=2, timeout=1.0, budget=1.5) == [0.0] * 20
    assert time.monotonic() - start < 60
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert re.search("1[246] of 20 answers scored 0 unread", warning)  # 12 on an idle machine


def test_workers_killed_between_calls_are_replaced(no_cache):
    assert score(*([text] for text in for_math_verify(2)), workers=1) == [1.0]
    killed = [worker.process.pid for worker in workers._workers if worker.process]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    pairs = [for_math_verify(n) for n in range(3, 11)]
    assert score(*map(list, zip(*pairs, strict=True)), workers=2) == [1.0] * 8
    assert not {worker.process.pid for worker in workers._workers if worker.process} & set(killed)


def test_workers_killed_during_a_call_are_replaced(no_cache):
    pairs = [(rf"\boxed{{{HANGS}}}", "4")] + [for_math_verify(n) for n in range(2, 12)]
    score(*([text] for text in for_math_verify(99)), workers=1)  # starts a worker
    (worker,) = [worker for worker in workers._workers if worker.process][:1]
    sniper = threading.Timer(1.0, lambda pid: os.kill(pid, signal.SIGKILL), [worker.process.pid])
    sniper.start()  # by then it is busy with what hangs, the longest and therefore the last of the batch
    assert score(*map(list, zip(*pairs, strict=True)), workers=1, timeout=3.0) == [0.0] + [1.0] * 10
    sniper.join()


def test_a_worker_that_cannot_start_is_an_error_not_a_zero(no_cache, monkeypatch):
    workers._stop_workers()
    monkeypatch.setattr(workers, "COMMAND", ["/bin/false"])
    with pytest.raises(UserError, match="verifier math: its process does not start, .*/bin/false"):
        score(*([text] for text in for_math_verify(2)), workers=1)


def test_from_another_thread(no_cache):
    """math-verify's own time limit, signal.alarm, fails there: every answer would score 0."""
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda n: score(*([text] for text in for_math_verify(n)), workers=1), (2, 3, 5))
    assert [*found] == [[1.0]] * 3


def test_background_scorer_gives_each_group_its_own_rewards():
    """Groups that come in any order, while the ones before are being scored."""
    scorer = in_background([Problem("", [], str(i), "test") for i in range(50)])
    for i in random.Random(0).sample(range(50), 50):
        scorer.add(i, [f"\\boxed{{{i if right else i + 1}}}" for right in (i % 2, 1, 0)])
    assert verdicts(scorer) == [[float(i % 2), 1.0, 0.0] for i in range(50)]


def verdicts(scorer) -> list[list[float]]:
    return [[components["correctness"] for components in group] for group in scorer.finish()]


def test_background_scorer_passes_on_errors_and_options(monkeypatch):
    four = Problem("", [], "4", "test")
    scorer = in_background([four], thinking=True)
    scorer.add(0, ["<think>\\boxed{4}", "<think></think>\\boxed{4}"])
    assert verdicts(scorer) == [[0.0, 1.0]]
    monkeypatch.setattr(answers, "normalize", lambda text: 1 / 0)
    scorer = in_background([four])
    scorer.add(0, ["\\boxed{4}"])
    with pytest.raises(ZeroDivisionError):
        scorer.finish()


def test_workers_end_with_their_parent(no_cache):
    """Killed with -9, while one worker is idle and the other one hangs."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=have_workers, args=(theirs,))
    child.start()
    pids = ours.recv()
    time.sleep(0.5)
    child.kill()
    child.join()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"workers {alive} outlive their parent"
        time.sleep(0.1)


def have_workers(pipe) -> None:
    workers._workers.extend([workers.Worker(), workers.Worker()])
    for worker in workers._workers:  # so that none is still importing when its parent is killed
        worker.start(workers.MATH)
    pipe.send([worker.process.pid for worker in workers._workers])
    score([rf"\boxed{{{HANGS}}}"], ["4"], workers=1, timeout=1.5)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{4}", "4"),
        (r"\fbox{ 4 }", "4"),
        (r"\boxed{3} and \fbox{4}", "4"),
        (r"\boxed{\left\{ x \right.} }", r"\left\{ x \right."),
        (r"\boxed{a \\} b", r"a \\"),
        (r"\boxed{\boxed{4}}", "4"),
        ("\\boxed{\n4\n}", "4"),
        (r"\boxed 4", None),
        (r"\boxed{4} then \boxed{5", None),
        ("", None),
        (r"\boxed{" * 10000, None),
        (r"\boxed{" * 10000 + "4" + "}" * 10000, "4"),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer", "answer_thinking"),
    [
        (r"<think>\boxed{3}</think> \boxed{4}", "4", "4"),
        (r"<think>\boxed{3}</think> It is 4.", "3", None),
        (r"\boxed{3}</think> \boxed{4}", "4", "4"),  # where the prompt ends with <think>
        (r"<think>a</think>\boxed{3}<think>b</think> \boxed{4}", "4", "4"),
        (r"<think>a</think>\boxed{3}<think>b", "3", None),
        (r"\boxed{3}", "3", None),  # cut short, where the prompt ends with <think>
        (r"</think>\boxed{3}", "3", "3"),  # the model had nothing to think about
    ],
)
def test_thinking(response, answer, answer_thinking):
    assert extract_answer(response) == answer
    assert extract_answer(response, thinking=True) == answer_thinking
    for thinking, extracted in ((False, answer), (True, answer_thinking)):
        assert score([response] * 2, ["3", "4"], thinking=thinking) == [extracted == "3", extracted == "4"]


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0), (12288, 0), (12289, -1 / 4096), (14336, -0.5), (16384, -1), (16385, -1), (99999, -1)],
)
def test_overlong_penalty(length, penalty):
    """Free up to 12,288 tokens, then linear, -1 from 16,384 on."""
    assert overlong_penalty(length, max_length=16384, overlong="4096") == pytest.approx(penalty)
    assert overlong_penalty(length, 16384, "score") == overlong_penalty(length, 16384, "mask") == 0
