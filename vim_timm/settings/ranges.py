"""Ranges of settings that are numbers. All are finite; a range of several values holds for each of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import meant

LARGEST = 2**53  # whole numbers beyond it are no float64, and nothing here counts so far


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        above: `low` itself is no longer one of them.
        or_zero: 0 is one of them too, and turns off what the numbers say.
        ascending: fewest and most of several numbers, the smaller first.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    or_zero: bool = False
    ascending: tuple[int, float] | None = None

    def refusal(self, value: Any) -> str:
        """Why a number, or a list of numbers, is none of these, as `must be ...`; '' if it is."""
        if isinstance(value, Sequence):
            fewest, most = self.ascending or (0, math.inf)
            if not fewest <= len(value) <= most or (self.ascending and value != sorted(value)):
                numbers = 'two numbers' if fewest == 2 else 'one or two numbers' if most == 2 else 'numbers'
                return f'takes {numbers}, the smaller first, not {value}'
            return next(filter(None, map(self.refusal, value)), '')
        if not math.isfinite(value) or abs(value) > LARGEST:
            return f'must be a finite number, not {value}'
        if self.or_zero and value == 0:
            return ''
        if value < self.low or (self.above and value == self.low):
            zero = '0 or ' if self.or_zero else ''
            return f'must be {zero}{"above" if self.above else "at least"} {self.low}, not {value}'
        return f'must be at most {self.high}, not {value}' if value > self.high else ''


@dataclass(frozen=True)
class Names:
    """Words of parts between `-`: a name, then arguments with a number each, or of `rand` with a set's name after `t`.

    timm passes over an argument without a number, and over a set that it does not know.
    """

    known: tuple[str, ...]
    sets: tuple[str, ...] = ()

    def refusal(self, value: str) -> str:
        """Why a word is none of these, or ''."""
        name, *arguments = value.split('-')
        if not value:
            return ''
        if name not in self.known:
            return f'must begin with one of {", ".join(self.known)}, not {name!r}{meant(name, self.known)}'
        for argument in arguments:
            if name == 'rand' and argument.startswith('t'):
                if argument[1:] not in self.sets:
                    return f'has one of t{", t".join(self.sets)} for its operations, not {argument!r}'
            elif not any(map(str.isdigit, argument)):
                return f'needs a number in {argument!r}, one of the arguments of {value!r}'
        return ''


ANY = Range()
SHARE = Range(0, 1)
POSITIVE = Range(0, above=True)
PAIR = Range(0, above=True, ascending=(2, 2))
ASCENDING = Range(-LARGEST, above=True, ascending=(2, 2))


def at_least(low: float, high: float = math.inf) -> Range:
    """Numbers from `low` on."""
    return Range(low, high)
