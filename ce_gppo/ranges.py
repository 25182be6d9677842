"""What a setting may be: types with a range, as in `steps: Count = 50`."""

import itertools
import math
import re
import sys
import typing
from collections.abc import Iterable, Iterator

from ce_gppo.messages import UserError


class Range(typing.NamedTuple):
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


class OneOf(typing.NamedTuple):
    names: tuple[str, ...]
    or_count: bool = False  # or a whole number above 0

    def problem(self, value: str) -> str | None:
        if value in self.names or (self.or_count and re.fullmatch("0*[1-9][0-9]{0,8}", value)):
            return None
        return f"is unknown; known: {', '.join(self.names)}" + ", or a number of tokens" * self.or_count


class Named(typing.NamedTuple):
    """Names or paths of files and folders, or hub names."""

    or_empty: bool = False

    def problem(self, value: str) -> str | None:
        wrong = {
            "is blank; a name is needed": not value.strip(),
            "has a character that cannot be printed; choose another name": not value.isprintable(),
            "has no name beside a comma": not all(map(str.strip, value.split(","))),
            "begins with ~, which the shell has not replaced; $HOME works everywhere": re.search("(^|,)~", value),
            "is too long for a file's name": re.search(b"[^/,]{256}|[^,]{4001}", value.encode(errors="replace")),
        }
        return next((problem for problem, found in wrong.items() if found and (value or not self.or_empty)), None)


def one_of(names: Iterable[str]):
    return typing.Annotated[str, OneOf(tuple(names))]


Overlong = typing.Annotated[str, OneOf(("score", "mask"), or_count=True)]
Name = typing.Annotated[str, Named()]
NameOrEmpty = typing.Annotated[str, Named(or_empty=True)]
Count = typing.Annotated[int, Range(1, 2**31 - 1)]  # vLLM and torch count in 32 or 64 bits
CountOrZero = typing.Annotated[int, Range(0, 2**31 - 1)]
Rank = typing.Annotated[int, Range(0, 4096)]
Seed = typing.Annotated[int, Range(0, 2**32 - 1)]
NonNegative = typing.Annotated[float, Range(0, 10_000)]  # of coefficients and clip intervals: larger ones overflow
Positive = typing.Annotated[float, Range(0, 10_000, above=True)]
Rate = typing.Annotated[float, Range(1e-10, 1)]  # less is rounded away by float32, more is noise
Temperature = typing.Annotated[float, Range(0.01, 100)]  # vLLM silently replaces a lower one by 0.01
GreedyOrTemperature = typing.Annotated[float, Range(0.01, 100, or_zero=True)]  # at 0 it takes the most probable token
AboveOne = typing.Annotated[float, Range(1, 10_000, above=True)]
ZeroToOne = typing.Annotated[float, Range(0, 1)]
Share = typing.Annotated[float, Range(0, 1, above=True)]


def fields_of(Config: type) -> Iterator[tuple]:
    """(name, type, ranges in it) of each field. A range may be of one part of a union or tuple."""

    def ranges(hint) -> Iterator:
        yield from (mark for mark in getattr(hint, "__metadata__", ()) if hasattr(mark, "problem"))
        yield from (range_ for part in typing.get_args(hint) for range_ in ranges(part))

    for name, hint in typing.get_type_hints(Config, include_extras=True).items():
        yield name, hint, list(ranges(hint))


def check_ranges(config) -> None:
    """UserError for the first value that is outside the range in its field's type."""
    for name, _, ranges in fields_of(type(config)):
        value = getattr(config, name)
        for range_, one in itertools.product(ranges, value if isinstance(value, tuple) else (value,)):
            if one is not None and (problem := range_.problem(one)):
                raise UserError(f"{name} {repr(one) if isinstance(one, str) else f'= {one}:'} {problem}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # how Python keeps bytes that it cannot read
            raise UserError(f"{name} {value[:60]!r} is not text in {sys.getfilesystemencoding()}, its encoding")
