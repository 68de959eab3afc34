"""Values onto a plot's axis, linear or logarithmic, and the ticks along it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MOST_TICKS = 7


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From ``low`` at ``start`` to ``high`` at ``end``, which are in the plot's own units.

    Of a logarithmic one, low and high are powers of ten.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies. What is beyond lies at the edge, what is no number at the upper."""
        if math.isnan(value):
            return self.end
        if self.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
            value = math.log10(max(value, self.low)) if value < math.inf else high
        else:
            low, high = self.low, self.high
        share = (min(max(value, low), high) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places with their labels."""
        values = self._log_ticks() if self.is_log else self._linear_ticks()
        return [(self.at(value), f"{value:g}".replace("e-0", "e-")) for value in values]

    def _linear_ticks(self) -> list[float]:
        step = _nice_step((self.high - self.low) / (_MOST_TICKS - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        low, high = round(math.log10(self.low)), round(math.log10(self.high))
        if high - low <= 2:
            between = [
                digit * math.pow(10, power) for power in range(low, high) for digit in (1, 2, 5)
            ]
            return [*between, math.pow(10, high)]
        apart = math.ceil((high - low) / (_MOST_TICKS - 1))
        return [math.pow(10, power) for power in range(low, high + 1, apart)]


def log_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """Whole decades around the values above zero."""
    positive = [value for value in values if 0 < value < math.inf] or [1e-12]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    return Scale(low=math.pow(10, low), high=math.pow(10, high), start=start, end=end, is_log=True)


def _nice_step(step: float) -> float:
    """The next of 1, 2, 5, 10, ... that is no smaller."""
    power = math.pow(10, math.floor(math.log10(step)))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))
