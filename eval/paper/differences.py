"""Two arms over the same seeds: their difference, and how far the seeds themselves are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

HOLDS, DOES_NOT, UNKNOWN = "holds here", "does not hold at this size", "cannot tell"


def noise(values: Sequence[float]) -> float:
    """Return two standard deviations over seeds; nan for a single one, which is above and below nothing."""
    return 2 * stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of b - a, in pairs of one seed: the same first weights where shapes agree, the same data.

    Attributes: noise: see `noise`, of a pair's difference: 3.5 standard errors of the mean of three.
    """

    mean: float
    noise: float

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> Difference:
        """Compare b with a."""
        pairs = [after - before for before, after in zip(a, b, strict=True)]
        return cls(mean(pairs), noise(pairs))

    @property
    def is_clear(self) -> bool:
        """Return whether it is beyond the noise; never for a single seed."""
        return abs(self.mean) > self.noise

    def verdict(self, lower: bool = True) -> str:
        """Return whether the claim holds that b is lower than a (or higher)."""
        if not self.is_clear:
            return UNKNOWN
        return HOLDS if (self.mean < 0) == lower else DOES_NOT

    def text(self, form: str = "{:+.4f}") -> str:
        """Return it with its noise."""
        return f"{form.format(self.mean)} {_around(self.noise, form) or 'one seed'}"


def reaches(values: Sequence[float], bound: float) -> str:
    """Return whether the seeds' values are a bound or more, beyond their noise."""
    low, high = mean(values) - noise(values), mean(values) + noise(values)
    return HOLDS if low >= bound else DOES_NOT if high < bound else UNKNOWN


def weakest(verdicts: Sequence[str]) -> str:
    """Return what can be said of a claim that has several parts."""
    return next((verdict for verdict in (DOES_NOT, UNKNOWN) if verdict in verdicts), HOLDS)


def centre(values: Sequence[float], form: str = "{:.4f}") -> str:
    """Return mean and two standard deviations over seeds."""
    return f"{form.format(mean(values))} {_around(noise(values), form)}".rstrip()


def _around(noise: float, form: str) -> str:
    return "" if math.isnan(noise) else f"± {form.format(noise).lstrip('+')}"
