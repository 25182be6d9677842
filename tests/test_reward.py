r"""The verifier against a table of verdicts that a careful mathematician would give, and against hostile answers.

In the table, an answer stands for the response "... \boxed{answer}."; where
the column starts with "response:", it is the whole response. A | inside a cell is written \|.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import reward
from ce_gppo.verifier import workers
from reward import BackgroundScorer, extract_answer, overlong_penalty, score

TABLE = r"""
integers            | 48 | 48 | 1
integers            | 0 | 0 | 1
integers            | 007 | 7 | 1
integers            | 48. | 48 | 1
integers            | $48$ | 48 | 1
integers            | 48 | $48$ | 1
integers            | 123456789012345678901234567890 | 123456789012345678901234567890 | 1
integers            | 47 | 48 | 0
integers            | 480 | 48 | 0
integers            | 84 | 48 | 0
integers            | 4 8 | 48 | 0
integers            | 123456789012345678901234567891 | 123456789012345678901234567890 | 0
signed              | +7 | 7 | 1
signed              | -7 | -7 | 1
signed              | - 7 | -7 | 1
signed              | −7 | -7 | 1
signed              | -0 | 0 | 1
signed              | -7 | 7 | 0
signed              | 7 | -7 | 0
decimals            | 5.0 | 5 | 1
decimals            | .5 | 0.5 | 1
decimals            | 2.50 | 2.5 | 1
decimals            | 0.75 | \frac{3}{4} | 1
decimals            | 0.\overline{3} | \frac{1}{3} | 1
decimals            | 0.1\overline{6} | \frac{1}{6} | 1
decimals            | 0.333 | \frac{1}{3} | 0
decimals            | 0.3333333 | \frac{1}{3} | 0
decimals            | 3.14 | \pi | 0
decimals            | 3.1415927 | \pi | 0
decimals            | 0.05 | 0.5 | 0
decimals            | 2.51 | 2.5 | 0
decimals            | 1.000001 | 1 | 0
decimals            | 0.00000001 | 0.00000002 | 0
fractions           | \frac{1}{2} | \frac{1}{2} | 1
fractions           | \dfrac{1}{2} | \frac12 | 1
fractions           | \tfrac12 | 1/2 | 1
fractions           | 2/4 | \frac{1}{2} | 1
fractions           | \frac{-1}{2} | -\frac{1}{2} | 1
fractions           | -1/2 | \frac{1}{-2} | 1
fractions           | 2\frac{1}{2} | \frac{5}{2} | 1
fractions           | 2 1/2 | 2.5 | 1
fractions           | -2\frac{1}{2} | -\frac{5}{2} | 1
fractions           | \frac{6}{2} | 3 | 1
fractions           | \frac{2}{1} | \frac{1}{2} | 0
fractions           | \frac{1}{3} | \frac{1}{2} | 0
fractions           | -\frac{1}{2} | \frac{1}{2} | 0
fractions           | \frac{1}{0} | 0 | 0
fractions           | -2\frac{1}{2} | -\frac{3}{2} | 0
nested fractions    | \frac{1}{1+\frac{1}{2}} | \frac{2}{3} | 1
nested fractions    | \frac{\frac{1}{2}}{\frac{3}{4}} | \frac{2}{3} | 1
nested fractions    | \frac{\frac{3}{4}}{\frac{1}{2}} | \frac{2}{3} | 0
radicals            | 2\sqrt{3} | \sqrt{12} | 1
radicals            | \frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2} | 1
radicals            | \sqrt{5+2\sqrt{6}} | \sqrt{2}+\sqrt{3} | 1
radicals            | 5sqrt(2) | 5\sqrt{2} | 1
radicals            | \sqrt2 | \sqrt{2} | 1
radicals            | √2 | \sqrt{2} | 1
radicals            | \sqrt[3]{8} | 2 | 1
radicals            | \sqrt 9 | 3 | 1
radicals            | 3\sqrt{2} | 2\sqrt{3} | 0
radicals            | \sqrt{5+2\sqrt{5}} | \sqrt{2}+\sqrt{3} | 0
radicals            | \sqrt{2} | \sqrt[3]{2} | 0
pi                  | 2\pi | 2\pi | 1
pi                  | 2pi | 2\pi | 1
pi                  | 2π | 2\pi | 1
pi                  | \frac{3\pi}{4} | 0.75\pi | 1
pi                  | \arctan 1 | \frac{\pi}{4} | 1
pi                  | 2\pi r | 2r\pi | 1
pi                  | 2 | 2\pi | 0
pi                  | 2\pi | 2 | 0
pi                  | \frac{4\pi}{3} | \frac{3\pi}{4} | 0
powers              | 2^{10} | 1024 | 1
powers              | 10^6 | 1000000 | 1
powers              | 1.5 \times 10^3 | 1500 | 1
powers              | 2\cdot 2^{2022} | 2^{2023} | 1
powers              | x^2 | x^{2} | 1
powers              | e^{2} | e^2 | 1
powers              | 2^{2024} | 2^{2023} | 0
powers              | 10^{-20} | 10^{-19} | 0
powers              | 1.6\times10^{-19} | 6.6\times10^{-34} | 0
powers              | x^3 | x^2 | 0
percentages         | 50\% | 50 | 1
percentages         | 50 | 50\% | 1
percentages         | 50\% | \frac{1}{2} | 1
percentages         | 0.5 | 50\% | 1
percentages         | 50 \text{ percent} | 50\% | 1
percentages         | 12.5% | 12.5 | 1
percentages         | 5\% | 50\% | 0
percentages         | 50\% | 5 | 0
units               | 5\text{ cm} | 5 | 1
units               | 5 | 5\text{ cm} | 1
units               | 5 cm | 5 \mathrm{~cm} | 1
units               | 5\text{ centimeters} | 5\text{ cm} | 1
units               | 12\text{ cm}^2 | 12 | 1
units               | 12\text{ square units} | 12 | 1
units               | 5 apples | 5 | 1
units               | \frac{1}{2}\text{ mile} | 0.5 | 1
units               | 60 \text{ km/h} | 60 | 1
units               | 5\text{ m} | 5\text{ cm} | 0
units               | 6\text{ cm} | 5\text{ cm} | 0
units               | 5m | 5 | 0
units               | 5x | 5 | 0
units               | 5xy | 5 | 0
units               | 5d | 5t | 0
units               | 3\mathrm{i} | 3 | 0
units               | 5\text{ million} | 5 | 0
units               | 5\text{ thirds} | 5 | 0
degrees             | 90^\circ | 90 | 1
degrees             | 90 | 90^{\circ} | 1
degrees             | 90° | 90^\circ | 1
degrees             | 90\text{ degrees} | 90^\circ | 1
degrees             | \sin 30^\circ | \frac{1}{2} | 1
degrees             | 80^\circ | 90^\circ | 0
currency            | \$5 | 5 | 1
currency            | \$5.00 | 5 | 1
currency            | \$1,250 | 1250 | 1
currency            | 5\text{ dollars} | \$5 | 1
currency            | £20 | 20 | 1
currency            | \$5 | 5\text{ cents} | 0
currency            | \$50 | 5 | 0
thousands           | 1,234 | 1234 | 1
thousands           | 1{,}234 | 1234 | 1
thousands           | 1,\!234 | 1234 | 1
thousands           | 1\,234\,567 | 1234567 | 1
thousands           | 1 234 | 1,234 | 1
thousands           | 12,345.67 | 12345.67 | 1
thousands           | 1234567 | 1,234,567 | 1
thousands           | 1,2 | 12 | 0
thousands           | 1,23 | 123 | 0
thousands           | (1,234) | 1234 | 0
thousands           | 1,234 | 234 | 0
sets                | \{1,2\} | \{2,1\} | 1
sets                | \left\{ 1, 2 \right\} | \{1,2\} | 1
sets                | 2, 1 | \{1,2\} | 1
sets                | 1 \text{ and } 2 | \{1,2\} | 1
sets                | \{0.5, 1\} | \{1, \frac{1}{2}\} | 1
sets                | \{\sqrt{12}, 1\} | \{1, 2\sqrt{3}\} | 1
sets                | \varnothing | \emptyset | 1
sets                | \{1,2\} | \{1,3\} | 0
sets                | \{1,2,3\} | \{1,2\} | 0
sets                | \{1\} | \{1,2\} | 0
sets                | (1,2) | \{1,2\} | 0
sets                | [1,2] | \{1,2\} | 0
sets                | 0 | \emptyset | 0
lists               | -2, 2 | 2, -2 | 1
lists               | \pm 2 | -2, 2 | 1
lists               | x = 2 \text{ or } x = -2 | 2, -2 | 1
lists               | 1+\sqrt{2}, 1-\sqrt{2} | 1 \pm \sqrt{2} | 1
lists               | x=1, y=2 | y=2, x=1 | 1
lists               | x=2, y=1 | x=1, y=2 | 0
lists               | 2 | 2, -2 | 0
lists               | 2, 2 | 2, -2 | 0
tuples              | (1,2) | (1, 2) | 1
tuples              | \left(1, \frac{1}{2}\right) | (1, 0.5) | 1
tuples              | \langle 1, 2, 3 \rangle | \langle 1,2,3 \rangle | 1
tuples              | (2\sqrt{3}, 1) | (\sqrt{12}, 1) | 1
tuples              | (x, y) = (1, 2) | (1, 2) | 1
tuples              | (2,1) | (1,2) | 0
tuples              | (1,2,3) | (1,2) | 0
tuples              | (1,2) | [1,2] | 0
tuples              | (1,-2) | (1,2) | 0
intervals           | [1,2] | [1,2] | 1
intervals           | [1, 2) | [1,2) | 1
intervals           | (-\infty, 3] | (-\infty,3] | 1
intervals           | x \in [1,2] | [1,2] | 1
intervals           | x > 3 | (3,\infty) | 1
intervals           | 1 \le x \le 2 | [1,2] | 1
intervals           | (2,\infty)\cup(-\infty,1) | (-\infty,1)\cup(2,\infty) | 1
intervals           | \mathbb{R}\setminus\{1\} | (-\infty,1)\cup(1,\infty) | 1
intervals           | (1,2] | [1,2] | 0
intervals           | [1,2) | (1,2] | 0
intervals           | (-\infty,3) | (-\infty,3] | 0
intervals           | x \ge 3 | (3,\infty) | 0
intervals           | (-\infty,1]\cup(2,\infty) | (-\infty,1)\cup(2,\infty) | 0
inequalities        | x > 3 | 3 < x | 1
inequalities        | x \geq 3 | x \ge 3 | 1
inequalities        | x < 3 | x > 3 | 0
inequalities        | x \ge 3 | x > 3 | 0
inequalities        | x > 3 | 3 | 0
matrices            | \begin{bmatrix}1&2\\3&4\end{bmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | 1
matrices            | \begin{pmatrix}0.5\\1\end{pmatrix} | \begin{pmatrix}\frac{1}{2}\\1\end{pmatrix} | 1
matrices            | \begin{pmatrix}1&2\\3&5\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix} | 0
matrices            | \begin{pmatrix}1&3\\2&4\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix} | 0
matrices            | \begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | 0
equations           | x = 3 | 3 | 1
equations           | 3 | x = 3 | 1
equations           | x = 3 | x=3 | 1
equations           | f(x) = x^2 | x^2 | 1
equations           | \angle ABC = 90^\circ | 90 | 1
equations           | x = 1 + 2 = 3 | 3 | 1
equations           | 2x - y + 1 = 0 | y = 2x + 1 | 1
equations           | x_1 = 4 | 4 | 1
equations           | \sqrt{2} \approx 1.414 | \sqrt{2} | 1
equations           | x = 4 | 3 | 0
equations           | y = 3 | x = 3 | 0
equations           | x^2 = 4 | 4 | 0
equations           | 2 + 2 = 5 | 5 | 0
equations           | 4 = 5 = 4 | 4 | 0
equations           | y = 2x - 1 | y = 2x + 1 | 0
equations           | y' = 2x | y = 2x | 0
expressions         | (x+1)^2 | x^2+2x+1 | 1
expressions         | x^2+x-2 | (x-1)(x+2) | 1
expressions         | b + a | a+b | 1
expressions         | 1-\sin^2 x | \cos^2 x | 1
expressions         | 2\ln 2 | \ln 4 | 1
expressions         | \log_2 8 | 3 | 1
expressions         | 5! | 120 | 1
expressions         | \binom{5}{2} | 10 | 1
expressions         | \sum_{k=1}^{10} k | 55 | 1
expressions         | x^2+x+2 | (x-1)(x+2) | 0
expressions         | a - b | b - a | 0
expressions         | x_1 | x_2 | 0
expressions         | \log_3 2 | \log_2 3 | 0
expressions         | x | \sqrt{x^2} | 0
expressions         | -\infty | \infty | 0
expressions         | 4! | 4 | 0
complex             | 2i + 1 | 1 + 2i | 1
complex             | (1+i)^2 | 2i | 1
complex             | e^{i\pi/3} | \frac{1+i\sqrt{3}}{2} | 1
complex             | 1 - 2i | 1 + 2i | 0
complex             | 2 + i | 1 + 2i | 0
bases               | 101_2 | 5 | 1
bases               | 101_2 | 101_2 | 1
bases               | 101_2 | 101_3 | 0
bases               | 5_2 | 5 | 0
multiple choice     | C | C | 1
multiple choice     | (C) | C | 1
multiple choice     | \text{C} | C | 1
multiple choice     | \textbf{(C)} | C | 1
multiple choice     | C. | C | 1
multiple choice     | c | (C) | 1
multiple choice     | C | \text{(C)} | 1
multiple choice     | D | C | 0
multiple choice     | A, C | C | 0
multiple choice     | (A)(B)(C)(D) | C | 0
text                | \text{Yes} | yes | 1
text                | Yes. | \text{Yes} | 1
text                | EAST | \text{east} | 1
text                | \text{Bob and Alice} | \text{Alice and Bob} | 1
text                | \text{no solution} | No solution | 1
text                | \text{no} | \text{yes} | 0
text                | seat | east | 0
text                | \text{odd} | \text{even} | 0
text                | \text{not odd} | \text{odd} | 0
text                | five | 4 | 0
latex truths        | 48 | \boxed{48} | 1
latex truths        | 48 | $\boxed{48}$ | 1
latex truths        | \frac12 | $\dfrac{1}{2}$ | 1
latex truths        | 3 | \(3\) | 1
latex truths        | (1,2) | \left( 1, 2 \right) | 1
latex truths        | \frac13 | $\dfrac{1}{2}$ | 0
last box wins       | response: first \boxed{3}, then \boxed{4} | 4 | 1
last box wins       | response: first \boxed{4}, then \boxed{3} | 4 | 0
last box wins       | response: \boxed{\boxed{4}} | 4 | 1
last box wins       | response: \boxed{3} or rather \fbox{4} | 4 | 1
nested braces       | response: so \boxed{\frac{\sqrt{2}}{\left(1+\sqrt{3}\right)}} | \frac{\sqrt{2}}{1+\sqrt{3}} | 1
nested braces       | response: so \boxed{\{1, \{2\}\}} and {so} on | \{1, \{2\}\} | 1
nested braces       | response: so \boxed {4} it is | 4 | 1
empty box           | response: so \boxed{} | 4 | 0
empty box           | response: so \boxed{ } | 4 | 0
empty box           | response: \boxed{4} which gives \boxed{} | 4 | 0
empty box           | response: \boxed{$$} | 4 | 0
empty box           | response: \boxed{\text{}} | 4 | 0
unclosed box        | response: so \boxed{4 | 4 | 0
unclosed box        | response: \boxed{4} which gives \boxed{4 | 4 | 0
unclosed box        | response: \boxed{\frac{1}{2} | \frac{1}{2} | 0
stuffed box         | 3 or 4 or 5 | 4 | 0
stuffed box         | 3, 4, 5 | 4 | 0
stuffed box         | 4, 4 | 4 | 0
stuffed box         | 3; 4; 5 | 4 | 0
stuffed box         | 4 5 | 4 | 0
stuffed box         | 4 5 | 5 | 0
stuffed box         | 4 5 | 9 | 0
stuffed box         | 4 \quad 5 | 4 | 0
stuffed box         | 4 \text{ or } 5 | 4 | 0
stuffed box         | \{3, 4, 5\} | 4 | 0
stuffed box         | \pm 4 | 4 | 0
stuffed box         | 4 (or 5) | 4 | 0
stuffed box         | 3 \text{ no wait } 4 | 4 | 0
stuffed box         | 3 \| 4 \| 5 | 4 | 0
stuffed box         | 3 \\ 4 | 4 | 0
stuffed box         | x = 3, x = 4 | 4 | 0
not an answer       | \text{not } 4 | 4 | 0
not an answer       | < 4 | 4 | 0
not an answer       | \neq 4 | 4 | 0
not an answer       | f(4) | 4 | 0
not an answer       | 4 \cdot | 4 | 0
not an answer       | ??? | 4 | 0
not an answer       | = | x = 4 | 0
not an answer       | , | 4, 5 | 0
stuffed box         | x > 3, x > 4 | x > 3 | 0
stuffed box         | x = 4, x = 5 | x = 4 | 0
no box              | response: The answer is 4. | 4 | 0
no box              | response: 4 | 4 | 0
no box              | response: | 4 | 0
no box              | response: What is 2+2? Put the answer in \boxed. It is 4. | 4 | 0
quoted prompt       | response: Which is larger, 4 or 3? I cannot tell. | 4 | 0
quoted prompt       | response: "Put your final answer within \boxed{}." The answer is 4. | 4 | 0
quoted prompt       | response: "Put it like this: \boxed{answer}." It is 4. | 4 | 0
quoted prompt       | response: The example has \boxed{42}. Mine is \boxed{4}. | 42 | 0
quoted prompt       | response: The example has \boxed{42}. Mine is \boxed{4}. | 4 | 1
quoted prompt       | response: Is it 4? \boxed{\text{Is it 4?}} | 4 | 0
hostile             | 10^{10^{10}} | 4 | 0
hostile             | 9^{9^{9^{9}}} | 4 | 0
hostile             | 9999999999! | 4 | 0
hostile             | ((3!)!)! | 4 | 0
hostile             | 4**9**9**9 | 4 | 0
hostile             | __import__("os").getpid() | 4 | 0
""".strip().splitlines()


def read_row(line: str) -> tuple[str, str, str, float]:
    kind, answer, truth, expected = (cell.strip() for cell in line.replace(r"\|", "\0").split("|"))
    answer = answer.replace("\0", "|")
    own_response = answer.startswith("response:")
    response = answer.removeprefix("response:") if own_response else rf"Hence the answer is $\boxed{{{answer}}}$."
    return kind, response, truth, float(expected)


ROWS = [read_row(line) for line in TABLE]


@pytest.fixture(scope="module")
def rewards() -> list[float]:
    _, responses, truths, _ = zip(*ROWS, strict=True)
    return score(list(responses), list(truths), workers=2, timeout=10)


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[" ".join(line.split()) for line in TABLE])
def test_verdict(row, rewards):
    assert rewards[row] == ROWS[row][3]


def test_one_at_a_time_is_the_same_and_so_is_any_order(rewards):
    order = random.Random(0).sample(range(len(ROWS)), 120)
    workers._cache.clear()
    shuffled = score([ROWS[i][1] for i in order], [ROWS[i][2] for i in order], workers=2, timeout=10)
    assert shuffled == [rewards[i] for i in order]
    workers._cache.clear()
    assert [score([ROWS[i][1]], [ROWS[i][2]], workers=1, timeout=10)[0] for i in order[:40]] == shuffled[:40]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 responses but 3 answers"):
        score(["a", "b"], ["1", "2", "3"])
    assert score([], []) == []


def test_plain_arithmetic_starts_no_worker(monkeypatch):
    monkeypatch.setattr(workers.Worker, "start", lambda self: pytest.fail("a worker was started"))
    responses = [rf"so \boxed{{{i}}}" for i in range(512)]
    assert score(responses, ["48"] * 512) == [float(i == 48) for i in range(512)]


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
    bombs += [left * 250 + "%d" + right * 250 for left, right in ("()", "[]", "{}")] + [
        r"\frac{1}{" * 20 + "%d" + "}" * 20
    ]
    bombs += [r"\prod_{k=1}^{9999} (k+\sqrt{%d})", r"(x+y+z+w)^{6%d}", r"\sqrt{%d+" * 9 + "x" + "}" * 9]
    rows = []  # response, truth, expected
    for i in range(300):
        if i % 10 == 0:
            rows.append((rf"\boxed{{{i}}}", str(i), 1.0))
        elif i % 60 == 1:
            rows.append((*for_math_verify(i + 1), 1.0))
        else:
            bomb = bombs[i % len(bombs)]
            rows.append((rf"\boxed{{{bomb.replace('%d', str(i))}}}", "4", 0.0))
    responses, truths, expected = map(list, zip(*rows, strict=True))
    start = time.monotonic()
    assert score(responses, truths, workers=2, timeout=0.5, budget=6.0) == expected
    assert time.monotonic() - start < 6 + 20
    assert capsys.readouterr().out.count("\n") <= 1


def test_a_hanging_answer_costs_only_itself(no_cache):
    pairs = [for_math_verify(n) for n in range(2, 8)]
    pairs.insert(3, (rf"\boxed{{{HANGS}}}", "(x+y+z)^{50}"))
    start = time.monotonic()
    assert score(*map(list, zip(*pairs, strict=True)), workers=1, timeout=2.0) == [1, 1, 1, 0, 1, 1, 1]
    assert 2.0 <= time.monotonic() - start < 20
    start = time.monotonic()
    assert score([pairs[3][0]], [pairs[3][1]], workers=1, timeout=2.0) == [0]
    assert time.monotonic() - start < 1  # its verdict is kept


def test_what_the_budget_does_not_reach_is_reported(no_cache, capsys):
    responses = [rf"\boxed{{(x+y+z+w)^{{{n}}}}}" for n in range(60, 70)] * 2
    start = time.monotonic()
    assert score(responses, ["4"] * 20, workers=2, timeout=1.0, budget=1.5) == [0.0] * 20
    assert time.monotonic() - start < 15
    warning = capsys.readouterr().out
    assert warning.count("\n") == 1 and "12 of 20 answers scored 0 unread" in warning


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
    score(*([text] for text in for_math_verify(99)), workers=1)  # so that a worker is up
    (worker,) = [worker for worker in workers._workers if worker.process][:1]
    sniper = threading.Timer(1.0, lambda pid: os.kill(pid, signal.SIGKILL), [worker.process.pid])
    sniper.start()  # by then it is busy with what hangs, the longest and therefore the last of the batch
    assert score(*map(list, zip(*pairs, strict=True)), workers=1, timeout=3.0) == [0.0] + [1.0] * 10
    sniper.join()


def test_a_worker_that_cannot_start_is_an_error_not_a_zero(no_cache, monkeypatch):
    workers._stop_workers()
    monkeypatch.setattr(workers, "COMMAND", ["/bin/false"])
    with pytest.raises(RuntimeError, match="does not start"):
        score(*([text] for text in for_math_verify(2)), workers=1)


def test_from_another_thread(no_cache):
    """math-verify's own time limit, signal.alarm, fails there: every answer would score 0."""
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: score(*([t] for t in for_math_verify(n)), workers=1)}))
        for n in (2, 3, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {2: [1.0], 3: [1.0], 5: [1.0]}


def test_background_scorer_gives_each_group_its_own_rewards():
    """Groups that come in any order, while the ones before are being scored."""
    answers = [str(i) for i in range(50)]
    scorer = BackgroundScorer(answers)
    for i in random.Random(0).sample(range(50), 50):
        scorer.add(i, [SimpleNamespace(text=f"\\boxed{{{i if right else i + 1}}}") for right in (i % 2, 1, 0)])
    assert scorer.finish() == [[float(i % 2), 1.0, 0.0] for i in range(50)]


def test_background_scorer_passes_on_errors_and_options(monkeypatch):
    scorer = BackgroundScorer(["4"], thinking=True)
    scorer.add(0, [SimpleNamespace(text="<think>\\boxed{4}"), SimpleNamespace(text="<think></think>\\boxed{4}")])
    assert scorer.finish() == [[0.0, 1.0]]
    monkeypatch.setattr(reward, "normalize", lambda text: 1 / 0)
    scorer = BackgroundScorer(["4"])
    scorer.add(0, [SimpleNamespace(text="\\boxed{4}")])
    with pytest.raises(ZeroDivisionError):
        scorer.finish()


def test_workers_end_with_their_parent(no_cache):
    """Killed with -9, while one worker is idle and the other one hangs."""
    child = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=os.path.dirname(reward.__file__), stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in child.stdout.readline().split()]
    time.sleep(0.5)
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"workers {alive} outlive their parent"
        time.sleep(0.1)


PARENT = rf"""
import reward
workers._workers.extend([workers.Worker(), workers.Worker()])
for worker in workers._workers:
    worker.start()
print(*[worker.process.pid for worker in workers._workers], flush=True)
reward.score([r"\boxed{{{HANGS}}}"], ["4"], workers=1, timeout=1.5)
"""


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
        (r"\fbox{3} and \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} }", r"\left\{ x \right."),
        (r"\boxed{a \\} b", r"a \\"),
        (r"\boxed{\boxed{4}}", "4"),
        ("\\boxed{\n4\n}", "4"),
        (r"\boxed 4", None),
        (r"\boxed{}", None),
        (r"\boxed{4", None),
        (r"\boxed{4} then \boxed{5", None),
        ("4", None),
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
        (r"<think>\boxed{3}", "3", None),
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
    assert overlong_penalty(length, max_length=16384, buffer=4096) == pytest.approx(penalty)
    assert overlong_penalty(length, max_length=16384, buffer=0) == 0
