"""The data of a step (Problem, Response, Update), the errors that people see, and the ranges of settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:  # the verifier's workers do not import torch
    from torch import Tensor


@dataclass(frozen=True)
class Problem:
    prompt: str  # the chat template rendered once, for people
    prompt_ids: list[int]  # for the engine; one beginning-of-sequence token at most
    answer: str
    source: str
    question: str = ""  # the last message, as it is in the file
    verifier: str = "math"  # see reward.py


@dataclass
class Response:
    """One sampled response, R tokens long. rollout.py sets the first part, later parts of the step set the second."""

    prompt_ids: list[int]
    response_ids: list[int]  # exactly as sampled, the end-of-sequence token included
    rollout_logprobs: Tensor  # [R]  vLLM's, of the distribution sampled from, temperature included
    truncated: bool  # stopped by the length limit, not by an end-of-sequence token
    text: str  # for the verifier and for people; never tokenized again

    verdict: float = 0.0  # 1 is right, 0 is wrong
    reward: float = 0.0  # the sum of the verifier's parts, and the penalty for length if there is one
    advantages: Tensor | None = None  # [R]  equal for all tokens, or with a critic one for each token
    old_logprobs: Tensor | None = None  # [R]  the trainer's, under the weights that sampled the response, or vLLM's
    entropy: Tensor | None = None  # [R]  nats, under those weights; None: not measured, and neither is old_logprobs
    changes: dict[str, Tensor] | None = None  # [R] each, of a few responses: effects of the update, see tokens.follow
    chosen: Tensor | None = None  # [R]  1 where the objective picks the token, see selection.py
    ref_logprobs: Tensor | None = None  # [R]  the reference policy's, where there is one
    values: Tensor | None = None  # [R]  the critic's, before its updates, where there is one
    returns: Tensor | None = None  # [R]  the values that the critic should have predicted
    parts: dict[str, float] = field(default_factory=dict)  # of the reward, from the verifier


def with_advantages(groups: list[list[Response]], advantages: Tensor) -> list[list[Response]]:
    """Copies of the responses, with each response's advantage at all its tokens. advantages: [P, G]"""
    return [
        [replace(r, advantages=a.repeat(len(r.response_ids))) for r, a in zip(group, own, strict=True)]
        for group, own in zip(groups, advantages, strict=True)
    ]


def has_signal(group: list[Response]) -> bool:
    """False for equal rewards, whose advantages are 0."""
    return len({r.reward for r in group}) > 1


@dataclass
class Update:
    """The record of one optimizer step. Sums and losses are of this rank's tokens; the rest is equal on all ranks."""

    sums: dict[str, Tensor]  # by metric name, see entropy.token_sums
    micro_batch_losses: list[float]
    grad_norm: float  # before clipping
    skipped: bool  # the gradient was not finite
    padding: float  # its share of the tokens in attention's blocks

    @property
    def loss(self) -> float:
        return sum(self.micro_batch_losses)


STARTING: list[str] = []  # the problem to report if a library fails during the start; empty after the start


def starting(what: str) -> None:
    """Set the sentence that is printed if a library raises an unexpected error during the start, see config.command.

    Empty: the start is over, and an unexpected error is a fault of this program, shown as a traceback.
    """
    STARTING[:] = [what] if what else []


# ----------------------------------------------------------------------------------------------------------------------
# Ranges, to be written as the types of settings: `steps: Count = 50`


@dataclass(frozen=True)
class Range:
    low: float
    high: float = math.inf
    above: bool = False  # low itself is outside
    or_zero: bool = False  # 0 is inside, too

    def problem(self, value: float) -> str | None:
        inside = self.low <= value <= self.high and value < math.inf and not (self.above and value == self.low)
        if inside or (self.or_zero and value == 0):
            return None
        words = "0, or " * self.or_zero + (f"above {self.low:g}" if self.above else f"at least {self.low:g}")
        return f"must be {words} and " + (f"at most {self.high:.10g}" if self.high < math.inf else "finite")


@dataclass(frozen=True)
class OneOf:
    names: tuple[str, ...]
    or_count: bool = False  # or a whole number above 0

    def problem(self, value: str) -> str | None:
        if value in self.names or (self.or_count and re.fullmatch("0*[1-9][0-9]{0,8}", value)):
            return None
        return f"is unknown; known: {', '.join(self.names)}" + ", or a number of tokens" * self.or_count


@dataclass(frozen=True)
class Named:
    """Names or paths of files and folders, or hub names."""

    or_empty: bool = False

    def problem(self, value: str) -> str | None:
        if not value.strip() and not (self.or_empty and not value):
            return "is blank; a name is needed"
        if not value.isprintable():
            return "has a character that cannot be printed; choose another name"
        parts = value.split(",")
        if not all(map(str.strip, parts)) and value:
            return "has no name beside a comma"
        if any(part.startswith("~") for part in parts):  # the shell replaces ~ only at the start of a word
            return "begins with ~, which the shell has not replaced; $HOME works everywhere"
        if any(len(part.encode()) > 255 for part in re.split("[/,]", value)) or any(
            len(p.encode()) > 4000 for p in parts
        ):
            return "is too long for the name of a file"
        return None


def one_of(names: Iterable[str]):
    return Annotated[str, OneOf(tuple(names))]


Overlong = Annotated[str, OneOf(("score", "mask"), or_count=True)]
Name = Annotated[str, Named()]
NameOrEmpty = Annotated[str, Named(or_empty=True)]
Count = Annotated[int, Range(1, 2**31 - 1)]  # vLLM and torch count in 32 or 64 bits
CountOrZero = Annotated[int, Range(0, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
NonNegative = Annotated[float, Range(0, 10_000)]  # of coefficients and clip intervals: larger ones overflow
Positive = Annotated[float, Range(0, 10_000, above=True)]
Rate = Annotated[float, Range(0, 1, above=True), Range(1e-10, 1)]  # less is rounded away by float32, more is noise
Temperature = Annotated[float, Range(0.01, 100)]  # vLLM silently replaces a lower one by 0.01
GreedyOrTemperature = Annotated[float, Range(0.01, 100, or_zero=True)]  # at 0 it takes the most probable token
AboveOne = Annotated[float, Range(1, 10_000, above=True)]
ZeroToOne = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, above=True)]
