r"""The verifier against a table of verdicts that a careful mathematician would give, and against hostile answers.

In the table, an answer stands for the response "... \boxed{answer}."; where
the column starts with "response:", it is the whole response. A | inside a cell is written \|.
"""

import contextlib
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
from pathlib import Path
from types import SimpleNamespace

import pytest

import reward
from ce_gppo.types import Problem
from ce_gppo.verifier import answers, workers
from ce_gppo.verifier.spelling import LONGEST
from helpers import score
from reward import extract_answer, in_background, overlong_penalty

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
exactness           | \frac{7}{3^{999}} | \frac{8}{3^{999}} | 0
exactness           | e^{-1000} | e^{-2000} | 0
exactness           | e^{-1000} | e^{-1000} | 1
exactness           | \frac{1}{e^{1000}} | e^{-1000} | 1
exactness           | 10^{-500} | 10^{-501} | 0
exactness           | 10^{200}+1 | 10^{200} | 0
exactness           | 10^{200}\sqrt{2}+1 | 10^{200}\sqrt{2} | 0
exactness           | 10^{200}\sqrt{2}+1 | 1+\sqrt{2}\cdot 10^{200} | 1
exactness           | \sqrt{2}-\frac{1}{2^{2024}} | \sqrt{2}-\frac{1}{2^{2023}} | 0
exactness           | \sqrt{2}(1-\frac{1}{2^{2024}}) | \sqrt{2}(1-\frac{1}{2^{2023}}) | 0
exactness           | \sqrt{2}(1-\frac{1}{2^{2024}}) | \sqrt{2}-\frac{\sqrt{2}}{2^{2024}} | 1
exactness           | \frac{x}{2^{2023}} | \frac{3x}{2^{2023}} | 0
exactness           | \frac{2x}{2^{2024}} | \frac{x}{2^{2023}} | 1
exactness           | \pi\cdot 10^{-300} | 2\pi\cdot 10^{-300} | 0
exactness           | \frac{3^{2024}-1}{2} | \frac{3^{2024}+1}{2} | 0
exactness           | \frac{1}{100!} | \frac{1}{101!} | 0
exactness           | \frac{100}{100!} | \frac{1}{99!} | 1
exactness           | \binom{2000}{1000} | \binom{2000}{999} | 0
exactness           | \left(\frac12\right)^{1000} | 0 | 0
exactness           | [0, \frac{3}{2^{2023}}] | [0, \frac{5}{2^{2023}}] | 0
exactness           | (-\infty,0)\cup(\frac{3}{2^{2023}},\infty) | (-\infty,0)\cup(\frac{5}{2^{2023}},\infty) | 0
exactness           | x = \frac{3}{2^{2023}} | \frac{5}{2^{2023}} | 0
exactness           | \{\frac{1}{2^{400}}, 1\} | \{\frac{1}{2^{401}}, 1\} | 0
exactness           | y = \frac{3x}{2^{2023}} | y = \frac{5x}{2^{2023}} | 0
exactness           | \sin(10^{-200}) | 10^{-200} | 0
exactness           | \ln(1+10^{-150}) | 10^{-150} | 0
exactness           | \frac{\sqrt{3}}{2^{500}} | \frac{3}{2^{500}\sqrt{3}} | 1
exactness           | \begin{pmatrix}3/2^{2023}\\1\end{pmatrix} | \begin{pmatrix}5/2^{2023}\\1\end{pmatrix} | 0
exactness           | 1-(1-\frac{1}{2^{10}})^{500} | 1-\left(\frac{1023}{1024}\right)^{500} | 1
exactness           | \cos 36^\circ | \frac{1+\sqrt5}{4} | 1
exactness           | \sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5} | 1 | 0
bases               | -11111_2 | -31 | 1
bases               | 37 | 37_8 | 0
bases               | A5_{16} | 165 | 1
bases               | A5_{16} | 5A_{16} | 0
bases               | F_{16} = 987 | 987 | 1
times of day        | 3:30 \text{ p.m.} | 3:30 \text{ PM} | 1
times of day        | 3:30 PM | 3:30 \text{ pm} | 1
times of day        | 3:30 \text{ AM} | 3:30 \text{ PM} | 0
times of day        | 3:30 | 1:10 | 0
times of day        | 15:30 | 5:10 | 0
times of day        | 2:4 | 1:2 | 1
ordinals            | 3^{\text{rd}} | 3 | 1
ordinals            | 21^{st} | 21 | 1
ordinals            | 21^{st} | 12 | 0
bases               | 31 | 37_8 | 1
bases               | (37_8, 1) | (31, 1) | 1
bases               | 37, 1 | 37_8, 1 | 0
bases               | 2\cdot 37_8 | 62 | 1
bases               | 2 \cdot 37 | 2\cdot 37_8 | 0
bases               | \frac{10_2}{11_2} | \frac23 | 1
bases               | \frac{10}{11} | \frac{10_2}{11_2} | 0
bases               | 1A_{16} | 26 | 1
bases               | 43_{\text{five}} | 23 | 1
bases               | 43_{\text{six}} | 43_5 | 0
bases               | 43_{\text{five}} | 43 | 0
bases               | 43_{five} | 43_5 | 1
bases               | 43_\text{5} | 43_5 | 1
bases               | 0.1_2 | 0.1 | 0
bases               | 0.1_2 | 0.5 | 1
bases               | (101)_2 | 5 | 1
bases               | x = 101_2 | 5 | 1
bases               | -101_3 | -101_2 | 0
bases               | 101_2 \text{ and } 11_2 | 5, 3 | 1
bases               | \log_2 8 | 3 | 1
bases               | \log_{10} 100 | 2 | 1
bases               | 9_2 | 9 | 0
bases               | 9 | 9_2 | 0
units               | 4 \text{ is not the answer} | 4 | 0
units               | 4 \text{ dozen} | 4 | 0
units               | 4 \text{ dozens} | 4 | 0
units               | 4 \text{ lakhs} | 4 | 0
units               | 4 \text{ crore} | 4 | 0
units               | 4 \text{ trillionths} | 4 | 0
units               | 4 \text{ hundredths} | 4 | 0
units               | 4 \text{ tenths} | 4 | 0
units               | 4 \text{ halves} | 4 | 0
units               | 4 \text{ maybe} | 4 | 0
units               | 4 \text{ has} | 4 | 0
units               | 4 \text{ was} | 4 | 0
units               | 4 \text{ does not work} | 4 | 0
units               | 4 \text{ squared} | 4 | 0
units               | 4 \text{ cubed} | 4 | 0
units               | 4 \text{ times} | 4 | 0
units               | 4 \text{ minus} | 4 | 0
units               | 4 \text{ factorial} | 4 | 0
units               | 4 \text{ score} | 4 | 0
units               | 4 \text{ wrong} | 4 | 0
units               | 4 \text{ more than that} | 4 | 0
units               | 4 \text{ quintillion} | 4 | 0
units               | 4 million | 4 | 0
units               | 4 is wrong | 4 | 0
units               | \$4 \text{ million} | 4 | 0
units               | 4 \text{ apples} | 4 \text{ pears} | 0
units               | 4 \text{ apples} | 4 apples | 1
units               | 4 \text{ people} | 4 | 1
units               | 60 \text{ km/h} | 60\text{ km per hour} | 1
units               | 60 \text{ mph} | 60 \text{ miles} | 0
units               | 60 \text{ mph} | 60 | 1
units               | 12\text{ cm}^2 | 12 \text{ sq cm} | 1
units               | 12\text{ cm}^2 | 12\text{ cm}^3 | 0
units               | 12\text{ cm}^2 | 12\text{ m}^2 | 0
units               | 12\text{ feet} | 12\text{ square feet} | 0
units               | 12\text{ cubic inches} | 12\text{ in}^3 | 1
units               | 5 \text{ mm} | 5\text{ m} | 0
units               | 5 \text{ mW} | 5\text{ MW} | 0
units               | 5 \text{ kg} | 5\text{ g} | 0
units               | 5 \text{ m/s} | 5\text{ m/s}^2 | 0
units               | 5 \text{ m/s} | 5\text{ m} | 0
units               | 5 \text{ s} | 5\text{ m} | 0
units               | 5 \text{ seconds} | 5\text{ s} | 1
units               | 5 \text{ hours} | 5\text{ minutes} | 0
units               | 5 \text{ N} | 5 \text{ J} | 0
units               | 5 km/h | 5 | 1
units               | 2am | 2 | 0
units               | 5 \text{ units} | 5 | 1
units               | 5 \text{ foo} | 5 | 0
units               | 5 \text{ foo} | 5 \text{ bar} | 0
units               | 10\text{ dollars per hour} | \$10 | 0
units               | £20 | \$20 | 0
units               | 20€ | 20 | 1
units               | \frac{\pi}{2} \text{ radians} | \frac{\pi}{2} | 1
units               | 90 \text{ radians} | 90^\circ | 0
units               | 2\pi \text{ cm} | 2\pi \text{ m} | 0
units               | 3\sqrt{2}\text{ cm} | 3\sqrt2 | 1
units               | 20^\circ\text{C} | 20^\circ\text{F} | 0
units               | 5:30 \text{ pm} | 5:30 \text{ am} | 0
units               | 5:30 \text{ p.m.} | 5:30 | 1
units               | 5\% | 5\text{ cm} | 0
units               | 3 \text{ hours and } 20 \text{ minutes} | 3 | 0
units               | 5\mathrm{~km} | 5 | 1
units               | 100 \text{ square meters} | 100\text{ m}^2 | 1
units               | 1 \text{ hour} | 1 | 1
thousands           | 1,\!000,\!000 | 1000000 | 1
thousands           | \$32,\!348 | 32348 | 1
thousands           | -1,\!234 | -1234 | 1
thousands           | (1,\!234, 5) | (1234, 5) | 1
thousands           | 1,\!23 | 123 | 0
thousands           | 32,\! 349 | 32394 | 0
thousands           | 1\;234 | 1234 | 1
thousands           | 11,\! 111 | 11, 111 | 0
left sides          | f(3)=12 | 12 | 1
left sides          | f(2)=5 | f(3)=5 | 0
left sides          | P(A \mid B)=\frac14 | \frac14 | 1
left sides          | [ABC]=12 | 12 | 1
left sides          | \text{Area of } \triangle ABC = 12 | 12 | 1
left sides          | \|AB\| = 12 | 12 | 1
left sides          | AB = 12 | 12 | 1
left sides          | a_{10} = 55 | 55 | 1
left sides          | S_5 = 55 | 55 | 1
left sides          | \lambda_1 = 6 | 6 | 1
left sides          | f'(2) = 6 | 6 | 1
left sides          | f(g(2)) = 6 | 6 | 1
left sides          | \sin\theta = \frac{3}{5} | \frac35 | 1
left sides          | a:b = 2:3 | 2:3 | 1
left sides          | \frac{AB}{CD} = \frac12 | \frac12 | 1
left sides          | a+b = 5 | 5 | 1
left sides          | AB:CD = 1:2 | 1:2 | 1
left sides          | x^2 = 4 | 4 | 0
left sides          | 2x = 4 | 4 | 0
left sides          | x + 1 = 4 | 4 | 0
left sides          | -x = 4 | 4 | 0
left sides          | \sqrt{x} = 4 | 4 | 0
left sides          | \|x\| = 4 | 4 | 0
left sides          | \ln x = 4 | 4 | 0
left sides          | e^x = 4 | 4 | 0
left sides          | \frac{x}{2} = 4 | 4 | 0
left sides          | x(x+1) = 6 | 6 | 0
left sides          | f(2) = 6 | 5 | 0
left sides          | \text{Area}=12 | 13 | 0
left sides          | x_{\min} = 3 | 3 | 1
left sides          | \mathbb{E}[X] = 3 | 3 | 1
left sides          | N = 3 | 3 | 1
left sides          | \angle A = 30^\circ | 30^\circ | 1
left sides          | \det A = 5 | 5 | 1
left sides          | 11:21 | V_1:V_2 = 21:11 | 0
left sides          | \frac{1}{\sqrt{6}} | \frac{NO}{BO}=\frac{1}{\sqrt{5}} | 0
left sides          | y' = 3 | 3 | 1
left sides          | \lim_{x\to 0} \frac{\sin x}{x} = 1 | 1 | 1
approximations      | 2\pi \approx 6.28 | 2\pi | 1
approximations      | 2\pi \approx 6.28 | 3\pi | 0
approximations      | 4 \approx 5 | 5 | 0
approximations      | \approx 3.2 | 3.3 | 0
approximations      | x \approx 3.2 | 3.2 | 1
approximations      | x = \sqrt{2} \approx 1.414 | \sqrt2 | 1
approximations      | \sqrt{2} \approx 1.414 | 1.414 | 0
approximations      | 3\ln 2 \approx 2.08 | \ln 8 | 1
approximations      | 45^\circ \approx 0.785 | 45 | 1
approximations      | n! \approx 5 | 5 | 0
plus-minus          | \pm 3, \pm 4 | 3, -3, 4, -4 | 1
plus-minus          | \{\pm 1, 2\} | \{-1, 1, 2\} | 1
plus-minus          | x = \pm\sqrt{3} | -\sqrt3, \sqrt3 | 1
plus-minus          | \pm 1 | 1 | 0
plus-minus          | \pm 1, \pm 2 | 1, 2 | 0
plus-minus          | \pm 1, 2 | 1, -1, -2 | 0
plus-minus          | \frac{1\pm\sqrt{5}}{2} | \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2} | 1
plus-minus          | ±2 | 2, -2 | 1
plus-minus          | (\pm 1, 2) | (1,2), (-1,2) | 1
regions             | x \le -1 \text{ or } x \ge 1 | (-\infty,-1]\cup[1,\infty) | 1
regions             | x < -1 \text{ or } x \ge 1 | (-\infty,-1]\cup[1,\infty) | 0
regions             | x>2 \text{ and } x\le 3 | (2,3) | 0
regions             | \{x \mid x > 3\} | (3,\infty) | 1
regions             | \{x \mid x \ge 3\} | (3,\infty) | 0
regions             | \{x \in \mathbb{R} \mid x \ne 1\} | (-\infty,1)\cup(1,\infty) | 1
regions             | \{x \| 1 < x < 2\} | 1<x<2 | 1
regions             | x \neq 1 | \mathbb{R}\setminus\{1\} | 1
regions             | x \ge 2, x \ne 3 | [2,3)\cup(3,\infty) | 1
regions             | \mathbb{R} | (-\infty,\infty) | 1
regions             | \text{All reals} | \mathbb{R} | 1
regions             | \text{all integers} | \mathbb{R} | 0
regions             | -2<x<3 | (-2,3) | 1
regions             | \|x\|<2 | (-2,2) | 1
regions             | x>2 \text{ or } x<3 | (2,3) | 0
regions             | x < 2 \text{ or } x > 3 | x<2, x>3 | 1
regions             | x<2 \text{ or } y>3 | (-\infty,2)\cup(3,\infty) | 0
regions             | (-\infty,2) \text{ or } (3,\infty) | (-\infty,2)\cup(3,\infty) | 1
regions             | y > 3 | x > 3 | 0
regions             | 0 < x \le 5 | (0,5) | 0
regions             | x \in (-\infty,2)\cup(3,\infty) | x<2 \text{ or } x>3 | 1
regions             | x > 3, x > 4 | x > 3 | 0
regions             | x>3 | 3, \infty | 0
regions             | (2,3) | (3,2) | 0
regions             | (0,1]\cup(1,2) | (0,2) | 1
letters with values | (A) 3 | 3 | 1
letters with values | (A) 3 | B | 0
letters with values | (A) 3 | 4 | 0
letters with values | (B) 12 | (C) 12 | 0
letters with values | (C) 12 | (C) 13 | 0
letters with values | C | \textbf{(C) } 12 | 1
letters with values | B | \textbf{(C) } 12 | 0
letters with values | A. 3 | A | 1
letters with values | \text{(B) } 42 | B | 1
letters with values | \textbf{(D)}\ \frac{1}{2} | 0.5 | 1
letters with values | \mathrm{(E)} 5 | E | 1
letters with values | (A) 3 (B) 4 | A | 0
letters with values | (A) 3, (B) 4 | A | 0
letters with values | (A) \text{ is wrong} | A | 0
letters with values | (A) or (B) | A | 0
letters with values | \text{(A) or (B)} | A | 0
letters with values | (A), (B) | A | 0
letters with values | (A)(B) | A | 0
letters with values | f(4) | 4 | 0
letters with values | (c) 4 | D | 0
letters with values | \textbf{(C)}\ 12\text{ cm} | 12 | 1
letters with values | A | (B) 3 | 0
letters with values | (E) \text{None of the above} | E | 0
calculator notation | 1.5E3 | 1500 | 1
calculator notation | 1.2e-5 | 0.000012 | 1
calculator notation | 1e6 | 1000000 | 1
calculator notation | 1e6 | 1000001 | 0
calculator notation | 8.7e8 | 8.7 \times 10^{9} | 0
calculator notation | 2**10 | 1024 | 1
calculator notation | x**2 | x^3 | 0
calculator notation | 2*x | 2x | 1
calculator notation | x^(1/2) | \sqrt{x} | 1
calculator notation | 3*sqrt(5)/2 | \frac{3\sqrt5}{2} | 1
calculator notation | sqrt((x+1)) | \sqrt{x+1} | 1
calculator notation | (1+sqrt(5))/2 | \frac{1+\sqrt5}{2} | 1
calculator notation | pi/4 | \frac{\pi}{4} | 1
calculator notation | exp(2) | e^2 | 1
calculator notation | e^(2) | e^2 | 1
calculator notation | x**-1 | \frac{1}{x} | 1
calculator notation | x**(n+1) | x^{n+1} | 1
calculator notation | 1.5 x 10^3 | 1500 | 1
calculator notation | 2*i | 2i | 1
calculator notation | (1+i)**2 | 2i | 1
calculator notation | i**2 | 1 | 0
calculator notation | i**2 | -1 | 1
calculator notation | i^3 | -i | 1
calculator notation | 10-10*i**2 | 0 | 0
calculator notation | x<=3 | x \le 3 | 1
calculator notation | 2^(1/3) | \sqrt[3]{2} | 1
calculator notation | x**10 | x^{10} | 1
unicode             | ⅓ | \frac13 | 1
unicode             | 2½ | \frac52 | 1
unicode             | x⁴ | x^4 | 1
unicode             | x⁴ | x4 | 0
unicode             | 10⁻³ | 0.001 | 1
unicode             | １２ | 12 | 1
unicode             | （１，２） | (1,2) | 1
unicode             | ±1 | 1,-1 | 1
unicode             | x₁ = 4 | 4 | 1
unicode             | 3×4 | 12 | 1
unicode             | 5‑3 | 2 | 1
unicode             | [1，2） | [1,2) | 1
unicode             | x≥3 | [3,\infty) | 1
unicode             | 90˚ | 90 | 1
unicode             | 50％ | 50 | 1
unicode             | √(2) | \sqrt{2} | 1
unicode             | 2√3 | \sqrt{12} | 1
unicode             | ½ | \frac13 | 0
unicode             | 101₂ | 5 | 1
unicode             | ∅ | \emptyset | 1
unicode             | −½ | -0.5 | 1
unicode             | x² + y² | x^2+y^2 | 1
unicode             | 𝜋 | \pi | 1
unicode             | {1，2} | \{1,2\} | 1
unicode             | ∞ | \infty | 1
unicode             | 3⁄4 | 0.75 | 1
wrapped             | {42} | 42 | 1
wrapped             | \color{red}{42} | 42 | 1
wrapped             | {\bf 42} | 42 | 1
wrapped             | \mathbf{\frac12} | 0.5 | 1
wrapped             | \bm{42} | 42 | 1
wrapped             | \displaystyle\frac{1}{2} | 0.5 | 1
wrapped             | \Large{42} | 42 | 1
wrapped             | \textcolor{blue}{\frac{1}{2}} | 0.5 | 1
wrapped             | \textcolor{red}{42} | 43 | 0
wrapped             | {\rm D} | C | 0
wrapped             | **42** | 42 | 1
wrapped             | {1}, {2} | 1,2 | 1
wrapped             | \mathrm{42} | 42 | 1
wrapped             | \colorbox{yellow}{42} | 42 | 1
notation            | 180^\circ | \pi | 1
notation            | 30^\circ | \frac{\pi}{4} | 0
notation            | 45 | \frac{\pi}{4} | 0
notation            | \log_{e} 3 | \ln 3 | 1
notation            | \log_e 3 | \ln 2 | 0
notation            | {5 \choose 2} | \binom{5}{3} | 1
notation            | {5 \choose 2} | 11 | 0
notation            | 0.1\dot{6} | \frac16 | 1
notation            | 0.\dot{3}\dot{6} | 0.36 | 0
notation            | 0.(36) | \frac{4}{11} | 1
notation            | \$3.47. | \$3.48 | 0
notation            | x=1, y=2, z=3 | z=3, x=1, y=2 | 1
notation            | b=2, a=1 | a=2, b=1 | 0
notation            | a=\sqrt{2}, b=1 | b=\sqrt{2}, a=1 | 0
notation            | 2:3 | 3:2 | 0
notation            | 3:4:5 | 3:4:5 | 1
notation            | \text{lcm} | gcd | 0
notation            | 3! | 6 | 1
notation            | x^2+1 | (x+i)(x-i) | 1
notation            | \begin{pmatrix}1\\2\end{pmatrix} | (1,2) | 0
lookalikes          | 4 \text{ (approximately)} | 4 | 0
lookalikes          | 4, \text{ or maybe } 5 | 4 | 0
lookalikes          | 4\text{, not } 5 | 4 | 0
lookalikes          | 5\text{ cm or } 6 \text{ cm} | 5 | 0
lookalikes          | 5 \text{ students} | 5 \text{ teachers} | 0
lookalikes          | 5 \text{ yes} | 5 | 0
lookalikes          | -11_2 | -11 | 0
lookalikes          | x = 3 \approx 4 | 4 | 0
lookalikes          | \frac{0}{0} | 1 | 0
lookalikes          | \frac{1}{0} | \infty | 0
lookalikes          | \text{Area} = 4 \text{ or } 5 | 4 | 0
lookalikes          | x - 3 = 0 | 3 | 0
lookalikes          | 1,000 | 1 | 0
lookalikes          | 5 cm^2 | 5 cm^3 | 0
lookalikes          | \text{Tues} | Tuesday | 0
lookalikes          | 7 \pmod{12} | 7, 12 | 0
lookalikes          | 1,2,3,4 | 1,2,3,5 | 0
lookalikes          | \sqrt{2} | 1.41421356237309504880168872420969807856967187537694 | 0
lookalikes          | \pi | \frac{355}{113} | 0
lookalikes          | e^{\pi\sqrt{163}} | 262537412640768744 | 0
lookalikes          | x^2+x+10^{-50} | x^2+x | 0
lookalikes          | 4 \text{ eggs and milk} | 4 | 0
lookalikes          | 4 \neq 5 | 4 | 0
lookalikes          | 4 + | 4 | 0
lookalikes          | 4 \text{th} | 5 | 0
lookalikes          | 4\text{ plus } 1 | 5 | 0
lookalikes          | 4\text{ less} | 4 | 0
lookalikes          | 4 \text{ always} | 4 | 0
lookalikes          | -4 \text{ apples} | 4 | 0
lookalikes          | 4 \text{ apples} 5 | 4 | 0
lookalikes          | 4 \text{ apples}, 5 \text{ pears} | 4 | 0
lookalikes          | 4 \text{ apples}, 5 \text{ pears} | 4, 5 | 1
lookalikes          | 2 \text{ dozen eggs} | 2 | 0
lookalikes          | 3\text{ fourths} | 3 | 0
lookalikes          | 3\text{ quarters} | 3 | 0
lookalikes          | 3\text{ twentieths} | 3 | 0
lookalikes          | 3\text{ sixteenths} | 3 | 0
lookalikes          | 3\text{ twelfths} | 3 | 0
lookalikes          | 3\text{ nonillion} | 3 | 0
lookalikes          | 3\text{ kilo} | 3 | 0
lookalikes          | 4 \text{ mod } 7 | 4 | 0
lookalikes          | \text{about } 4 | 4 | 0
lookalikes          | \text{more than } 4 | 4 | 0
lookalikes          | \text{minus } 4 | 4 | 0
lookalikes          | \text{negative } 4 | 4 | 0
lookalikes          | 4 \text{ below zero} | 4 | 0
lookalikes          | i^2 | i | 0
lookalikes          | 2i^2 | 2i | 0
lookalikes          | 2i^2 | -2 | 1
lookalikes          | (2+i)^2 | 3+4i | 1
lookalikes          | \frac{1}{i} | -i | 1
lookalikes          | x^{2024}-1 | x^{2024}+1 | 0
lookalikes          | 2^{2024}x | 2^{2023}x | 0
lookalikes          | [1,2] \cup [3,4] | [1,2],[3,4] | 0
lookalikes          | \left(0,\frac{1}{2^{400}}\right) | \left(0,\frac{1}{2^{401}}\right) | 0
lookalikes          | (0, e^{-1000}) | (0, e^{-2000}) | 0
lookalikes          | 0 < x < e^{-1000} | (0, e^{-2000}) | 0
lookalikes          | x > e^{-1000} | x > e^{-2000} | 0
lookalikes          | \text{True} | \text{False} | 0
lookalikes          | -1,234 | 1234 | 0
lookalikes          | 101_{2} | 101_{10} | 0
lookalikes          | 12_3 | 12_4 | 0
lookalikes          | 12_3, 5 | 12, 5 | 0
lookalikes          | 3+12_3 | 3+12 | 0
lookalikes          | \$5 | 5\% | 0
lookalikes          | 5^\circ | 5\% | 0
lookalikes          | 1/3 | 33.33\% | 0
lookalikes          | 3:2 | 3/2 | 1
lookalikes          | 2:4 | 1:3 | 0
lookalikes          | 5:30\text{ pm} | 10:60\text{ pm} | 0
lookalikes          | \text{all real numbers except 2} | \text{all real numbers except 3} | 0
lookalikes          | \text{all real numbers except 2} | \mathbb{R} | 0
mathematics         | 3:2 | 6:4 | 1
mathematics         | \sqrt{16} | 4 | 1
mathematics         | 10,000.00 | 10000 | 1
mathematics         | 3\ \frac12 | 3.5 | 1
mathematics         | (x,y)=(1,2),(3,4) | (1,2),(3,4) | 1
mathematics         | \left(\frac{1}{2}, \infty\right) | (0.5, \infty) | 1
mathematics         | y=2x+3 | 2x+3 | 1
mathematics         | ab | ba | 1
mathematics         | \$ 5 | 5 | 1
mathematics         | 5\ \text{cm} | 5 cm | 1
mathematics         | x=5 \text{ cm} | 5 | 1
mathematics         | 150\% | 1.5 | 1
mathematics         | \frac{1}{2}\% | \frac{1}{200} | 1
mathematics         | \sin^2 x + \cos^2 x | 1 | 1
mathematics         | \frac{x^2-1}{x-1} | x+1 | 1
mathematics         | \int_0^1 x\,dx | 0.5 | 1
mathematics         | (1,2) \text{ and } (3,4) | (1,2),(3,4) | 1
mathematics         | \{x \in \mathbb{R} : x \geq 2\} | [2,\infty) | 1
mathematics         | \left\{x \,\middle\|\, x>3\right\} | (3,\infty) | 1
mathematics         | x \in \mathbb{R} \setminus \{2\} | (-\infty,2)\cup(2,\infty) | 1
mathematics         | \text{all real numbers except } 2 | (-\infty,2)\cup(2,\infty) | 1
mathematics         | \text{all real numbers except } 2 | (-\infty,3)\cup(3,\infty) | 0
mathematics         | 90\text{ km}/\text{h} | 90 | 1
mathematics         | 2^{10}\text{ bytes} | 1024 | 1
mathematics         | 4\pi r^2 | 4\pi r^{2} | 1
mathematics         | 5x - 7y + 11z + 4 = 0 | -5x+7y-11z-4=0 | 1
mathematics         | 6 - 5i | -5i + 6 | 1
mathematics         | p - q | -q+p | 1
mathematics         | 11\sqrt2 | 11\sqrt{2} | 1
mathematics         | \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix} | 1
mathematics         | 70 \sqrt{2} | 70\sqrt{2} | 1
mathematics         | 2516_8 | 1358 | 1
mathematics         | 7 \text{ or } 3 | 3,7 | 1
mathematics         | 58,500 | 58500 | 1
mathematics         | 0.0000672 | 6.72\times 10^{-5} | 1
mathematics         | \text{ellipse} | ellipse | 1
mathematics         | 2k+2 | 2(k+1) | 1
mathematics         | \cot x | \frac{\cos x}{\sin x} | 1
mathematics         | 10 \text{ cm} | 10 \text{ centimetres} | 1
mathematics         | 3/2, -3/2 | \pm\frac32 | 1
mathematics         | 145^\circ | 145 | 1
mathematics         | 2220 \text{ in}^2 | 2220 | 1
mathematics         | 24 \text{ cm}^3 | 24 \text{ cubic cm} | 1
mathematics         | 6 r^2 - 4r - 24 | 2(3r^2-2r-12) | 1
mathematics         | 3.5 \text{ hours} | 3.5 | 1
mathematics         | 137 \frac{1}{2} | 137.5 | 1
mathematics         | x=1 \text{ and } y=2 | (1,2) | 1
mathematics         | \log_3 9 | 2 | 1
mathematics         | \frac{1}{2}(e^x+e^{-x}) | \frac{e^x+e^{-x}}{2} | 1
mathematics         | 3 \text{ m/s}^2 | 3 | 1
mathematics         | 1-2\cdot 3^{-1000} | 1-\frac{2}{3^{1000}} | 1
mathematics         | 2:4 | 1:2 | 1
mathematics         | 5 \text{ A} | 5 | 1
spaces at the end   | 5\, | 5 | 1
spaces at the end   | 5~ | 5 | 1
thousands           | \$1,\!250.50 | 1250.5 | 1
thousands           | 1{,}\!234 | 1234 | 1
thousands           | 12,\!345,\!678 | 12345678 | 1
thousands           | 1,\! 2345 | 12345 | 0
thousands           | 1,\!234 , 5,\!678 | 1234, 5678 | 1
left sides          | d(P, l) = 3 | 3 | 1
left sides          | \|BC\|=5 | 5 | 1
left sides          | a_1+a_2=5 | 5 | 1
left sides          | x_{\text{min}}=3 | 3 | 1
left sides          | \frac{V_1}{V_2}=2 | 2 | 1
left sides          | C_{5}^{2}=10 | 10 | 1
left sides          | \operatorname{rank}(A)=2 | 2 | 1
left sides          | f_{\max}(x) = 5 | 5 | 1
left sides          | \angle AOB=60° | 60 | 1
left sides          | xy=6 | 6 | 1
left sides          | n(A\cup B) = 7 | 7 | 1
left sides          | \frac{dy}{dx} = 2x | 2x | 1
left sides          | \hat{y}=3 | 3 | 1
left sides          | AB + BC + CA = 12 | 12 | 1
left sides          | \text{Area}(ABC) = 12 | 12 | 1
left sides          | P(\text{heads}) = \frac12 | \frac12 | 1
left sides          | \left\|z\right\| = 5 | 5 | 1
left sides          | \|\mathbf{a}\| = 5 | 5 | 1
left sides          | \lfloor x \rfloor = 5 | 5 | 0
left sides          | 3x = 12 | 12 | 0
left sides          | x^3 = 8 | 8 | 0
left sides          | 1/x = 8 | 8 | 0
left sides          | x! = 24 | 24 | 0
left sides          | 12 | 3x = 12 | 0
left sides          | 8 | x^3 = 8 | 0
left sides          | f(2) = 5, f(3) = 6 | 5, 6 | 1
left sides          | 12 | S_{\triangle ABC}=12 | 1
left sides          | 3 | N(5)=3 | 1
left sides          | A\cup B = \{1,2\} | \{1,2\} | 1
left sides          | \tan\angle ABC = 2 | 2 | 1
left sides          | \cos(A-B) = \frac12 | \frac12 | 1
left sides          | a:b=3 | 3 | 1
left sides          | f(-1)=5 | 5 | 1
left sides          | P(A\|B)=0.3 | 0.3 | 1
approximations      | \frac{\pi}{6}\approx 0.52 | \frac{\pi}{6} | 1
approximations      | 60^\circ \approx 1.05 | 60^\circ | 1
approximations      | \sqrt{3}\pi\approx5.44 | \sqrt{3}\pi | 1
approximations      | e^2 \approx 7.39 | e^2 | 1
approximations      | 36\pi\text{ cm}^2 \approx 113.1 \text{ cm}^2 | 36\pi | 1
approximations      | \approx 0.5 | 0.6 | 0
approximations      | 35\pi \approx 113.1 | 36\pi | 0
approximations      | \pi \approx 3.14 | 3.14 | 0
approximations      | 36\pi \; (\approx 113.1) | 36\pi | 1
plus-minus          | \pm\sqrt{2}, \pm\sqrt{3} | \sqrt2,-\sqrt2,\sqrt3,-\sqrt3 | 1
plus-minus          | x=\pm 1, x=\pm 2 | \pm 1, \pm 2 | 1
plus-minus          | 1, -1, 2, -2 | \pm 1, \pm 2 | 1
plus-minus          | \pm 1, \pm 3 | \pm 1, \pm 2 | 0
plus-minus          | \pm 1 \text{ and } \pm 2 | 1,-1,2,-2 | 1
plus-minus          | 2 \pm 3i | 2+3i, 2-3i | 1
plus-minus          | \pm 1, \pm 2 | 1,-1,2 | 0
regions             | x\le 2 \text{ or } x\ge 3 | (-\infty,2]\cup[3,\infty) | 1
regions             | x<2\text{ or }x>3 | (-\infty,2]\cup[3,\infty) | 0
regions             | \{x \mid x<2 \text{ or } x>3\} | (-\infty,2)\cup(3,\infty) | 1
regions             | \{x : x \in \mathbb{R}, x \ne 0\} | (-\infty,0)\cup(0,\infty) | 1
regions             | \text{all real numbers} | \mathbb{Q} | 0
regions             | x > 0 \text{ and } x \ne 1 | (0,1)\cup(1,\infty) | 1
regions             | x<-2, x>2 | x<-2 \text{ or } x>2 | 1
regions             | 2 < x \text{ and } x < 3 | (2,3) | 1
regions             | (2,3) | x>2 \text{ and } x<3 | 1
regions             | x>2 \text{ or } x<-2 | (-2,2) | 0
regions             | t \ge 0 | [0,\infty) | 1
regions             | \text{any real number} | \mathbb{R} | 1
regions             | (-\infty,0)\cup(0,+\infty) | x \neq 0 | 1
regions             | (-∞,2)∪(3,+∞) | (-\infty,2)\cup(3,\infty) | 1
regions             | y \ge 3 | y > 3 | 0
regions             | \{x \in \mathbb{Z} \mid x > 3\} | (3,\infty) | 0
letters with values | (A): 3 | A | 1
letters with values | \text{(A)}\; 3 | 3 | 1
letters with values | A\ 3 | A | 0
letters with values | (D)\ \sqrt{2} | \sqrt2 | 1
letters with values | \text{Option A} | A | 1
letters with values | \text{Option A} | B | 0
letters with values | (B) x = 3 | B | 1
letters with values | 2.5 | \textbf{(B)}\ \frac{5}{2} | 1
letters with values | 2.6 | \textbf{(B)}\ \frac{5}{2} | 0
letters with values | (B) \$3.00 | B | 1
letters with values | (C) (1,2) | C | 1
letters with values | (A) 3, 4 | A | 1
letters with values | (a) 3, (b) 4 | 3,4 | 1
letters with values | \text{C) }12 | C | 1
letters with values | (E) none | E | 1
calculator notation | 2*pi*r**2 | 2\pi r^2 | 1
calculator notation | x**0.5 | \sqrt{x} | 1
calculator notation | 6.02E23 | 6.02\times10^{23} | 1
calculator notation | (2+3*i)*(1-i) | 5+i | 1
calculator notation | inf | \infty | 1
calculator notation | abs(x) | \|x\| | 1
calculator notation | x**2+1 | x^2-1 | 0
calculator notation | sqrt(2)*sqrt(3) | \sqrt6 | 1
calculator notation | 1.5e3 | 150 | 0
calculator notation | 2^{-1} | 0.5 | 1
calculator notation | 3*(x+1)/2 | \frac{3x+3}{2} | 1
calculator notation | 1/2*x | \frac{x}{2} | 1
unicode             | ｛1，2｝ | \{1,2\} | 1
unicode             | 5 cm² | 5 cm³ | 0
unicode             | √3/2 | \frac{\sqrt3}{2} | 1
unicode             | ½x | \frac{x}{2} | 1
unicode             | 10⁵ | 100000 | 1
unicode             | “yes” | yes | 1
unicode             | x≠3 | x \ne 3 | 1
unicode             | ３．５ | 3.5 | 1
unicode             | −5 | 5 | 0
unicode             | 2·3 | 6 | 1
unicode             | ⅔ | 0.6 | 0
unicode             | ＄5 | 5 | 1
unicode             | ① | 1 | 1
wrapped             | \bf{C} | C | 1
wrapped             | {\large 42} | 42 | 1
wrapped             | \displaystyle{42} | 42 | 1
wrapped             | $$42$$ | 42 | 1
wrapped             | \large\textbf{42} | 42 | 1
wrapped             | "42" | 42 | 1
wrapped             | \begin{aligned}42\end{aligned} | 42 | 1
wrapped             | \textsl{42} | 42 | 1
wrapped             | \bold{42} | 42 | 1
wrapped             | {(1,2)} | (1,2) | 1
wrapped             | \mathbf{x=3} | 3 | 1
wrapped             | \overline{42} | 42 | 0
wrapped             | \cancel{42} | 42 | 0
wrapped             | \sqrt{42} | 42 | 0
wrapped             | \textcolor{42}{43} | 42 | 0
notation            | \sin^{-1} 1 | \frac{\pi}{2} | 1
notation            | C_{10}^{3} | 120 | 1
notation            | 3 \dfrac{1}{2} | 3.5 | 1
notation            | \frac{\pi}{4} | 45^{\circ} | 1
notation            | \frac{\pi}{4} | 45 | 0
notation            | 0.\dot{9} | 1 | 1
notation            | 0.\overline{3} | 0.3 | 0
notation            | 2.\dot{3} | \frac73 | 1
notation            | {n \choose k} | \binom{n}{k} | 1
notation            | {10 \choose 3} | {10 \choose 4} | 0
notation            | 43_{\text{eight}} | 35 | 1
notation            | 110_{\text{two}} | 6 | 1
notation            | 110_{\text{two}} | 110 | 0
notation            | \frac{1}{2}, \text{ or } 0.5 | 0.5 | 0
notation            | 1,2,\ldots,10 | 1,2,\dots,10 | 1
hostile             | 10^{10^{10}} | 4 | 0
hostile             | 9^{9^{9^{9}}} | 4 | 0
hostile             | 9999999999! | 4 | 0
hostile             | ((3!)!)! | 4 | 0
hostile             | 4**9**9**9 | 4 | 0
hostile             | __import__("os").getpid() | 4 | 0
""".strip().splitlines()


def read_row(line: str) -> tuple[str, str, str, float]:
    cells = line.replace(r"\|", "\0").split("|")
    kind, answer, truth, expected = (cell.strip().replace("\0", "|") for cell in cells)
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


def test_pairs_that_verifiers_get_wrong():
    """One JSON object a line, with the kind of mistake that each is an example of; both directions."""
    lines = Path(__file__).with_name("cases").joinpath("verifier.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    responses = [rf"\boxed{{{pair['prediction']}}}" for pair in pairs]
    rewards = score(responses, [pair["gold"] for pair in pairs], workers=2, timeout=10)
    assert len(pairs) >= 56
    assert [pair for pair, reward in zip(pairs, rewards, strict=True) if reward != pair["right"]] == []


@pytest.mark.parametrize("space", ["\\ ", "\\,", "~", "\\quad ", "\\\\", "\n", "\u200b", "\ufeff", "\u00a0"])
@pytest.mark.parametrize("answer", ["5", r"\frac{1}{2}", "x^2", "(1,2)", "yes"])
def test_spaces_at_the_end_and_the_beginning(answer, space):
    """Those of the table's cells are stripped, and some cannot be seen."""
    assert score([rf"\boxed{{{answer}{space}}}", rf"\boxed{{{space}{answer}}}"], [answer] * 2) == [1.0, 1.0]
    assert score([rf"\boxed{{{answer}{space}}}"], ["6"]) == [0.0]


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
    assert score(responses, truths, workers=2, timeout=0.5, budget=2.0) == expected
    assert time.monotonic() - start < 2 + 20
    assert capsys.readouterr().err.count("\n") <= 1


RUNS = [
    *"0123456789axCI.,;:!?'\"|&%$#@~^_-+*/=<> \\()[]{}\n½²",
    "{}",
    "{1}",
    r"\\",
    r"\text{",
    r"\text{a}",
    r"\text{cm}",
]
RUNS += [
    r"\frac{1}{2}",
    r"\boxed{",
    r"\pm",
    r"\lor x>1",
    r"\{x|",
    r"\overline{3}",
    "1,",
    ",000",
    "(A) ",
    "a: ",
    "12_3",
    "1 ",
    "5!",
]
RUNS += [
    r"\vec a  ",
    "m    ",
    r"\overline{A} ",
    "A",
    "AB:",
    "a+",
    "f(",
    "km/",
    "</think>",
    "<think>",
    ":]",
    "}_",
    "1e5",
    "0.",
    r"\left(",
    r"\begin{pmatrix}",
    r"\begin{align}&",
    "5!!",
    "1'000",
    r"0.12\ldots",
    r"5 \text{ million ",
    "five ",
    r"\pmod{2^3}",
    r"1 \text{ hour } 3 \text{ minutes}",
    r"x \ne 1,",
    "Answer: C or ",
]


@pytest.mark.parametrize("length", [300, 1_000, 5_000, 500_000])
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


@pytest.mark.parametrize("length", [1_001, 5_000])
def test_a_long_text_equals_only_itself(length, no_cache):
    assert score([r"\boxed{%s}" % ("7" * length)] * 2, ["7" * length, "7" * (length - 1) + "8"]) == [1.0, 0.0]


def test_reading_hostile_text_raises_nothing():
    """Whatever tokens are strung together: an exception in the main process would end the training."""
    rng = random.Random(0)
    tokens = [
        *RUNS,
        "=",
        r"\approx",
        r"\in",
        r"\cup",
        r"\infty",
        r"\le",
        r"\cdot",
        r"\text{ and }",
        "²",
        "π",
        r"\circ",
        "x",
        "4",
    ]
    for _ in range(5_000):
        answer, truth = ("".join(rng.choices(tokens, k=rng.randint(1, 12))) for _ in range(2))
        truth = rng.choice([truth, answer + truth])
        with contextlib.suppress(answers.Undecided):
            answers.same(answers.normalize(answer), answers.normalize(truth))


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
    assert warning.count("\n") == 1 and re.search("1[26] of 20 answers scored 0 unread", warning)  # 16: a busy machine


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
    scorer = in_background([Problem("", [], str(i), "test") for i in range(50)])
    for i in random.Random(0).sample(range(50), 50):
        scorer.add(i, [SimpleNamespace(text=f"\\boxed{{{i if right else i + 1}}}") for right in (i % 2, 1, 0)])
    assert verdicts(scorer) == [[float(i % 2), 1.0, 0.0] for i in range(50)]


def verdicts(scorer) -> list[list[float]]:
    return [[parts["correctness"] for parts in group] for group in scorer.finish()]


def test_background_scorer_passes_on_errors_and_options(monkeypatch):
    four = Problem("", [], "4", "test")
    scorer = in_background([four], thinking=True)
    scorer.add(0, [SimpleNamespace(text="<think>\\boxed{4}"), SimpleNamespace(text="<think></think>\\boxed{4}")])
    assert verdicts(scorer) == [[0.0, 1.0]]
    monkeypatch.setattr(answers, "normalize", lambda text: 1 / 0)
    scorer = in_background([four])
    scorer.add(0, [SimpleNamespace(text="\\boxed{4}")])
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
    for worker in workers._workers:
        worker.start()
    workers._workers[0].load(workers.MATH)  # so that it is not still importing when its parent is killed
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
    assert overlong_penalty(length, max_length=16384, overlong="4096") == pytest.approx(penalty)
    assert overlong_penalty(length, 16384, "score") == overlong_penalty(length, 16384, "mask") == 0
