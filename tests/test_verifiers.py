"""The verifiers by source, each against an independent truth; and a user's own, whose mistakes get a sentence."""

import ast
import contextlib
import itertools
import json
import operator
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

import reward
from ce_gppo.messages import UserError
from ce_gppo.problems import Problem
from ce_gppo.verifier import puzzles, workers
from ce_gppo.verifier.answers import Undecided
from helpers import ROOT, refuses, rollout_of, score
from reward import VERIFIERS, extract_answer


def problem(source: str, answer: str = "4") -> Problem:
    return Problem("", [], answer, source)


# ----------------------------------------------------------------------------------------------------------------------
# Countdown, against Python's own reading of the expression

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def by_python(text: str) -> tuple[Fraction, list[int]] | None:
    """(value, numbers) of an expression by eval, with fractions for numbers; None for other text."""
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    try:
        return Fraction(eval(re.sub("([0-9]+)", r"Fraction(\1)", text.strip()))), numbers
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None


def expression(rng: random.Random, numbers: list[int]) -> str:
    """A random tree over these numbers in this order."""
    if len(numbers) == 1:
        return str(numbers[0])
    cut = rng.randint(1, len(numbers) - 1)
    sign = rng.choice(["+", "-", "*", "/", " + ", " - "])
    text = expression(rng, numbers[:cut]) + sign + expression(rng, numbers[cut:])
    return rng.choice(["{}", "({})", "({})", "-({})"]).format(text)


def test_countdown_computes_what_python_does():
    rng = random.Random(0)
    values = set()
    for _ in range(3_000):
        text = expression(rng, [rng.randint(0, 99) for _ in range(rng.randint(1, 6))])
        assert puzzles.evaluate(text) == by_python(text), text
        values.add(puzzles.evaluate(text) and puzzles.evaluate(text)[0])
    assert len(values) > 1_000 and None in values  # some divide by 0
    for length in range(1, 6):  # every short string; most are no expressions
        for text in map("".join, itertools.product("12+-*/() ", repeat=length)):
            if "//" not in text and "**" not in text and not re.search(r"(^|[-+*/( ])\+", text.replace(" ", "")):
                assert puzzles.evaluate(text) == by_python(text), text


def test_countdown_by_brute_force():
    """For each task, the expressions that solve it score 1, those with another value or other numbers 0."""
    rng = random.Random(1)

    def correct(text, numbers, target):
        answer = json.dumps({"numbers": numbers, "target": target})
        return puzzles.countdown(f"so <answer> {text}</answer>", answer)["correctness"]

    for _ in range(100):
        numbers, target = [rng.randint(1, 30) for _ in range(3)], rng.randint(1, 60)
        for order in itertools.permutations(numbers):
            text = expression(rng, list(order))
            value, _ = by_python(text) or (None, None)
            assert correct(text, numbers, target) == (value == target)
            if value is not None and value.denominator == 1:
                assert correct(text, numbers, int(value)) == 1
                for other in (numbers[:2], [*numbers, 1], [*numbers[:2], numbers[2] + 1]):
                    assert correct(text, other, int(value)) == 0


TASK = json.dumps({"numbers": [1, 2, 3, 4], "target": 10})


@pytest.mark.parametrize(
    "text, correctness, read",
    [
        ("1+2+3+4", 1, True),
        (" ( 1 + 2 ) + 3\n+ 4 ", 1, True),
        ("4*3-2/1", 1, True),
        ("1+2+3", 0, True),  # not all
        ("1+2+3+4+4-4", 0, True),  # one three times
        ("1 2-3+4-3", 0, False),  # white space does not join digits
        ("12 - 34", 0, True),  # concatenated numbers are other numbers
        ("1+2+3+4=10", 0, False),
        ("1.0+2+3+4", 0, False),
        ("4**1+3*2", 0, False),
        ("7//1", 0, False),
        ("1+2+3+٤", 0, False),  # a digit of another script
        ("9**9**9**9", 0, False),
        ("9" * 150, 0, False),
        ("*".join(["9" * 9] * 20), 0, True),
        ("/".join(["9" * 9] * 20), 0, True),
        ("(" * 90 + "1" + ")" * 90, 0, True),
        ("(" * 100_000, 0, False),
        ("-" * 190 + "1", 0, False),
        ("1+" * 100_000 + "1", 0, False),
        ("+1", 0, False),
        ("__import__('os').getpid()", 0, False),
        ("1_0", 0, False),
        ("0x10", 0, False),
        ("1\0+2+3+4", 0, False),
    ],
)
def test_countdown_hostile_and_odd(text, correctness, read):
    start = time.process_time()
    components = puzzles.countdown(f"<think>hm</think>\n<answer>{text}</answer>", TASK)
    assert time.process_time() - start < 1
    assert components == {"correctness": correctness, "format": 0.1 * read}


def test_countdown_format():
    """0.1 if the response ends with the tag: the sum is right, wrong, followed by more, or not in the tag."""
    says = {
        "<answer>1+2+3+4</answer>": (1, 0.1),
        "<answer>1+2+3-4</answer>\n": (0, 0.1),
        "<answer>1+2+3+4</answer> QED": (1, 0),
        "1+2+3+4": (0, 0),
        "<answer>1+2+3+4": (0, 0),
        "<answer>1+2</answer> no: <answer>1+2+3+4</answer>": (1, 0.1),
        "<answer>1+2+3+4</answer> no: <answer>1+2</answer>": (0, 0.1),
        "<answer>" * 10_000 + "</answer>" * 10_000: (0, 0),
        "": (0, 0),
    }
    for response, (correctness, form) in says.items():
        assert puzzles.countdown(response, TASK) == {"correctness": correctness, "format": form}, response


# ----------------------------------------------------------------------------------------------------------------------
# The others


@pytest.mark.parametrize(
    "verifier, response, answer, right",
    [
        ("gsm8k", "so 40 + 2\n#### 42", "42", 1),
        ("gsm8k", "#### 41\nno\n#### 42\nThat is it.", "42", 1),
        ("gsm8k", "#### 1,234", "1234", 1),
        ("gsm8k", "#### $1234", "1,234", 1),
        ("gsm8k", "#### **42**", "42", 1),
        ("gsm8k", "#### The answer is 42", "42", 1),
        ("gsm8k", "#### 43", "42", 0),
        ("gsm8k", "#### 4 2", "42", 0),
        ("gsm8k", "#### 42\n#### 41", "42", 0),
        ("gsm8k", "42", "42", 0),
        ("gsm8k", "#### ", "42", 0),
        ("gsm8k", r"\boxed{42}", "42", 1),  # as a model for competitions writes it
        ("gsm8k", r"\boxed{42} #### 41", "42", 0),
        ("gsm8k", "#### " + "(" * 100_000, "42", 0),
        ("choice", r"\boxed{C}", "C", 1),
        ("choice", r"\boxed{\text{(C)}}", "C", 1),
        ("choice", "The answer is C.", "C", 1),
        ("choice", "The answer is (C)", "C", 1),
        ("choice", "**Answer:** C", "C", 1),
        ("choice", "Answer: **C**", "C", 1),
        ("choice", "#### C", "(C)", 1),
        ("choice", "The answer is B. No, the answer is C", "C", 1),
        ("choice", r"The answer is C \boxed{B}", "C", 0),
        ("choice", "The answer is Canada", "C", 0),
        ("choice", "The answer is $C$.", "C", 1),
        ("choice", r"The answer is \text{C}", "C", 1),
        ("choice", "Answer: C or A", "C", 0),
        ("choice", "Answer: **C** and **D**", "C", 0),
        ("choice", "Answer: (C), (D)", "C", 0),
        ("choice", "Answer: A\nNo. Answer: C or A", "A", 0),
        ("choice", "The answer is C, and I am sure", "C", 1),
        ("choice", "C", "C", 0),
        ("choice", "answer is " * 50_000, "C", 0),
        ("exact", "I say <answer> yes sir </answer>", "yes sir", 1),
        ("exact", r"\boxed{yes}", "yes", 1),
        ("exact", " yes\n", "yes", 1),
        ("exact", "Yes", "yes", 0),
        ("exact", "<answer>no</answer> yes", "yes", 0),
        ("walk", "x" * 1_000_000, "17 to 30", 0),
        ("math", r"\boxed{42}", "42", 1),
        ("math", "#### 42", "42", 0),
        ("math", "<answer>42</answer>", "42", 0),
    ],
)
def test_verdicts(verifier, response, answer, right):
    start = time.process_time()
    assert score([response], [answer], [verifier]) == [right]
    assert time.process_time() - start < 1
    assert right == 0 or extract_answer(response, verifier) is not None or response.strip() == answer


def test_every_verifier_leaves_hard_comparisons_to_math_verify():
    response, truth = r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"
    responses = [f"#### {response}", rf"\boxed{{{response}}}", "#### 3"]
    assert score(responses, [truth] * 3, ["gsm8k", "math", "gsm8k"], timeout=20) == [1, 1, 0]


def test_with_thinking_every_verifier_reads_only_the_text_after_it():
    answers = {"gsm8k": ("#### 4", "4"), "choice": ("The answer is C", "C"), "math": (r"\boxed{4}", "4")}
    answers |= {"exact": ("<answer>4</answer>", "4"), "countdown": ("<answer>1+2+3+4</answer>", TASK)}
    for verifier, (says, answer) in answers.items():
        responses = [f"<think>{says}", f"<think>hm</think>{says}", f"<think>{says}</think>"]
        assert score(responses, [answer] * 3, [verifier] * 3, thinking=True) == [0, 1, 0], verifier


def test_every_verifier_scores_any_text():
    rng = random.Random(0)
    pieces = ["<answer>", "</answer>", r"\boxed{", "####", "answer is", "</think>", *"A4+(){} \n٤"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 15))) for _ in range(2_000)]
    for verifier, verify in VERIFIERS.items():
        answer = {"countdown": TASK, "choice": "C", "walk": "4 to 8"}.get(verifier, "4")
        for text in texts:
            with contextlib.suppress(Undecided):
                assert workers.as_components(verify(text, answer), verifier)["correctness"] in (0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Which verifier


def chosen(rewards: str, *names: str) -> dict[str, str]:
    problems = [problem(name, TASK if name == "countdown" else "4") for name in names]
    _, (problems,) = reward.assign(rewards, problems)
    return {p.source: p.verifier for p in problems}


def test_a_source_chooses_its_verifier():
    assert chosen("", "arithmetic", "aime24", "mine") == dict.fromkeys(("arithmetic", "aime24", "mine"), "math")
    assert chosen("", "gsm8k", "countdown", "mine") == {"gsm8k": "gsm8k", "countdown": "countdown", "mine": "math"}
    assert chosen("gsm8k=math, mine = exact", "gsm8k", "mine") == {"gsm8k": "math", "mine": "exact"}
    assert chosen("exact,gsm8k=math", "gsm8k", "mine", "b") == {"gsm8k": "math", "mine": "exact", "b": "exact"}
    said, (train, held_out) = reward.assign("a=exact,b=math", [problem("a")], [problem("b"), problem("a")])
    assert [p.verifier for p in train + held_out] == ["exact", "math", "exact"] and said == "a by exact, b by math"


@pytest.mark.parametrize(
    "answer, truth",
    [
        ('["(1,2)"]', "(1,2)"),  # Skywork's
        ('["2", "3"]', "2, 3"),
        ("[1, 2]", "[1, 2]"),  # an interval
        ("So 3 + 4 = 7.\n#### 7", "7"),  # GSM8K's
        ("\\text{proof}", None),  # NuminaMath's
        ("[]", None),
        ('[""]', None),
        ("####", None),
        ("\\frac{1}{2}}", None),
    ],
)
@pytest.mark.parametrize("verifier", ["math", "gsm8k", "math_dapo"])
def test_true_answers_are_read_or_refused(answer, truth, verifier):
    assert reward.read_truth(answer) == truth
    if truth is None:
        with pytest.raises(UserError, match="of source a: no response could equal it; a value is needed"):
            reward.assign(verifier, [replace(problem("a"), answer=answer)])
    else:
        _, [[read]] = reward.assign(verifier, [replace(problem("a"), answer=answer)])
        says = {"math": rf"\boxed{{{truth}}}", "gsm8k": f"#### {truth}", "math_dapo": f"Answer: {truth}"}[verifier]
        assert read.answer == truth and score([says], [read.answer], [verifier]) == [1.0]


@pytest.fixture
def mine(tmp_path):
    """Write mine.py; returns mine.py:score as the setting has it."""

    def write(code: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(code)
        workers._stop_workers()  # they have imported the previous file
        return f"{path}:score"

    return write


@pytest.mark.parametrize(
    "rewards, message",
    [
        ("maths", "verifier 'maths' of source arithmetic is unknown; known: math, math_dapo"),
        ("mine=maths", "verifier 'maths' of source mine is unknown"),
        ("mine=mine.txt:score", "verifier 'mine.txt:score' of source mine is unknown"),
        ("mine=mine.py", "verifier 'mine.py' of source mine is unknown"),
        ("mime=math", "no problem has the source 'mime'; the data's: arithmetic, mine"),
        ("mine=", "'mine=', where source=verifier is needed"),
        ("=math", "'=math', where source=verifier is needed"),
        ("mine=math,mine=exact", "two verifiers for source 'mine'"),
        ("math,exact", "two verifiers for every source"),
        ("mine=nowhere.py:score", "there is no file .*nowhere.py"),
        ("mine=countdown", "countdown: answer '4', where {\"numbers\""),
        ("mine=choice", "choice: answer '4', where one capital letter is needed"),
    ],
)
def test_mistakes_in_the_setting(rewards, message):
    with pytest.raises(UserError, match=message) as error:
        chosen(rewards, "arithmetic", "mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", ["4", "", "[1]", '{"numbers": [1]}', '{"numbers": [1.5], "target": 1}', "9" * 5000])
def test_answers_that_are_no_countdown_task(answer):
    refuses("countdown: answer .* is needed", puzzles.countdown, "", answer)


# ----------------------------------------------------------------------------------------------------------------------
# A user's own function

OWN = """
import sys, time, os
from dataclasses import dataclass
from neighbour import RIGHT
@dataclass
class Any: x: "int" = 1
def score(response, answer):
    print("a library may print")
    sys.stdin.read()
    if response == "hang": time.sleep(600)
    if response == "crash": os._exit(1)
    return {"correctness": RIGHT * (response == answer), "short": 0.5 * (len(response) < 3)}
"""


def test_a_users_function_gives_components_and_cannot_stop_the_run(mine, tmp_path, capsys):
    (tmp_path / "neighbour.py").write_text("RIGHT = 1.0\n")
    (tmp_path / "json.py").write_text("a file that hides no library")
    verifier = mine(OWN)
    assert chosen(f"mine={verifier}", "mine", "arithmetic") == {"mine": verifier, "arithmetic": "math"}
    responses = ["4", "5", "crash", "hang", "four", r"\boxed{4}"]
    found = reward.score(responses, ["4"] * 6, [verifier] * 5 + ["math"], timeout=2.0, workers=1)
    right, wrong = {"correctness": 1, "short": 0.5}, {"correctness": 0, "short": 0.5}
    nothing, plain = {"correctness": 0}, {"correctness": 0, "short": 0}
    assert found == [right, wrong, nothing, nothing, plain, {"correctness": 1}]
    assert "2 of 6 answers scored 0 after 2 s, or a crash" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code, message",
    [
        (
            "def score(response, answer):\n    x = 1\n    return int(response)",
            r"raised ValueError: .* \(line 3\); a",
        ),
        ("def score(response): return 1", "raised TypeError"),
        ("def score(response, answer): raise SystemExit", "raised SystemExit"),
        ("def score(response, answer): return float('nan')", "returned nan; a number is needed"),
        ("def score(response, answer): return None", "returned None; a number is needed"),
        ("def score(response, answer): return {}", "returned {}; a number is needed"),
        ("def score(response, answer): return {'format': 1}", "returned {'format': 1}; .* 'correctness' among"),
        ("def score(response, answer): return {'correctness': 1, 'mean': 1}", "'mean' is taken"),
        ("def score(response, answer): return {'correctness': 1, 'a\\nb': 1}", "of numbers by name"),
        ("def score(response, answer): return 10**400", "returned 10*; a number"),
        ("def score(response, answer): return -1e39", r"returned -1e\+39; a number is needed, at most 1e\+06 in size"),
        ("def other(response, answer): return 1", "has no function score; it has: other"),
        ("score = 1", "has no function score; it has: none"),
        ("def score(response, answer)", r"cannot be imported: SyntaxError: .* \(line 1\)"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(line 1\)"),
    ],
)
def test_a_broken_function_is_a_sentence(mine, code, message):
    """By workers.call, which the worker calls. The next test has the way from the worker."""
    workers.load.cache_clear()
    with pytest.raises(UserError, match=message) as error:
        workers.call(mine(code), "four", "4")
    assert "\n" not in str(error.value) and "mine.py" in str(error.value)


def test_the_sentence_arrives_from_the_worker(mine):
    verifier = mine("def score(response, answer): return int(response)")
    scorer = reward.in_background([Problem("", [], "4", "mine", verifier=verifier)])
    scorer.add(0, ["4", "four"])
    refuses("raised ValueError.*'four'", scorer.finish)
    refuses("has no function other", chosen, verifier.replace(":score", ":other"), "mine")


@pytest.mark.parametrize("value", [1, True, 0.5, -1, Fraction(1, 2), torch.tensor(0.25)])
def test_numbers_of_any_kind_are_numbers(value):
    assert workers.as_components(value, "mine") == {"correctness": float(value)}
    assert workers.as_components({"correctness": value, "b": 1}, "mine") == {"correctness": float(value), "b": 1.0}


def test_the_users_files_are_named(tmp_path):
    """For the fingerprints of a run. Those beside them are not."""
    settings = f"x={tmp_path}/b.py:score,{tmp_path}/a.py:score,y={tmp_path}/a.py:other,z=math"
    (tmp_path / "a.py").touch()
    refuses("there is no file .*b.py", reward.files, settings)
    (tmp_path / "b.py").touch()
    assert reward.files(settings) == [tmp_path / "a.py", tmp_path / "b.py"]


@pytest.mark.parametrize("name", ["reward", "loss", "data", "helper"])
def test_a_users_file_imports_its_own_neighbours(mine, tmp_path, name):
    """And not this program's file of that name."""
    (tmp_path / f"{name}.py").write_text("def exact(response, answer): return 7")
    verifier = mine(f"from {name} import exact\ndef score(response, answer): return exact(response, answer)")
    assert score(["4"], ["5"], [verifier]) == [7]


def test_a_worker_imports_neither_torch_nor_the_scripts():
    code = "import sys, ce_gppo.verifier.workers; print(*{'torch', 'sympy', 'reward', 'train'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("limit", [str(3 * 2**20), "unlimited"])
def test_a_limit_of_the_shell_is_no_obstacle(limit):
    """A worker may have 4 GiB; under a lower hard limit it has that."""
    command = f"ulimit -v {limit}; exec {sys.executable} -m ce_gppo.verifier.workers"
    line = json.dumps(["math", r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}", 60.0]) + "\n"
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, input=line, capture_output=True, text=True)
    assert found.stdout == '{"correctness": 1.0}\n', found.stderr


# ----------------------------------------------------------------------------------------------------------------------
# From components to rewards


def test_components_become_rewards():
    """The sum of the components and the penalty for length; a response is correct where `correctness` is 1 or more."""
    found = [[{"correctness": 1.0, "format": 0.1}, {"correctness": 0.0, "format": 0.1}], [{"correctness": 0.5}] * 2]
    before = replace(rollout_of([(1, n) for n in (10, 8, 10, 12)]), components=None)
    after = reward.with_rewards(before, found, max_tokens=12, overlong="4")  # 10 tokens are 2 into the buffer
    assert after.components == [*found[0], *found[1]] and before.components is None
    assert after.correct.tolist() == [True, False, False, False]
    assert after.rewards.dtype == torch.float64
    assert after.rewards.tolist() == pytest.approx([0.6, 0.1, 0, -0.5])
    assert reward.with_rewards(before, found, 12, "score").rewards.tolist() == pytest.approx([1.1, 0.1, 0.5, 0.5])
    none = reward.with_rewards(rollout_of([]), [], 12, "score")
    assert none.components == [] and none.correct.dtype == torch.bool and len(none.rewards) == 0
