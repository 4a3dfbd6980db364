"""How long a run lasts, and what changes along it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:
    from training.batch_schedule import BatchSchedule

Schedule = float | dict[str, float]
Tails = Mapping[str, float]
NONE: Tails = {}


@dataclass
class Budget:
    """The end of a run: whichever of the given limits comes first.

    Every schedule is a function of the share of the budget that is spent, so "train for two hours" ends with a finished
    model as well as "train for 1000 steps" does.

    Attributes: steps_by: the option that `max_steps` follows from, the first of those that come down to steps;
        batches: where steps are of several sizes, whose number is then `max_steps`.
    """

    max_steps: int | None
    max_minutes: float | None
    max_tokens: int | None = None
    steps_by: str = "--max_steps"
    batches: BatchSchedule | None = None

    def progress(self, step: int, seconds: float, tokens: float = 0) -> float:
        """Return the share of the budget spent after `step` steps, `seconds` of training and so many tokens, 0 .. 1."""
        return min(max(self._shares(step, seconds, tokens).values(), default=0.0), 1.0)

    def first(self, step: int, seconds: float, tokens: float = 0) -> str:
        """Return the option of the limit that is nearest to its end, or past it."""
        shares = self._shares(step, seconds, tokens)
        return max(shares, key=shares.__getitem__)

    def resume(self, step: int, samples: int) -> None:
        """Lay out what is left of a run after a step, and so many samples, where steps are of several sizes."""
        if self.batches:
            self.batches.begin(step, samples)
            self.max_steps, self.steps_by = self.batches.steps, self.batches.ends_by

    def _shares(self, step: int, seconds: float, tokens: float) -> dict[str, float]:
        shares = {}
        if self.max_tokens is not None:
            shares[f"--max_tokens {self.max_tokens}"] = tokens / self.max_tokens
        if self.max_steps is not None:
            shares[self.steps_by] = self.batches.share(step) if self.batches else step / max(self.max_steps, 1)
        if self.max_minutes is not None:
            shares[f"--max_minutes {self.max_minutes:g}"] = seconds / (60 * self.max_minutes)
        return shares


def learning_rate(
    progress: float, peak: float, warmup: float, decay_from: float, final_ratio: float, tails: Tails = NONE
) -> float:
    """Return the rate of a linear warm-up, then a constant, then a cosine, then constants (DeepSeek-V3 section 4.2).

    Args:
        progress: share of the budget at the end of the step; `warmup` and `decay_from` are shares too.
        final_ratio: the rate at the end of the cosine over the peak.
        tails: {share: rate over the peak from there on}; the first of these shares ends the cosine.
    """
    if progress < warmup:
        return peak * progress / warmup
    knots = sorted((float(share), ratio) for share, ratio in tails.items())
    end = knots[0][0] if knots else 1.0
    if progress > end:
        return peak * [ratio for share, ratio in knots if share < progress][-1]
    if progress <= decay_from or decay_from >= 1:
        return peak
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - decay_from) / (end - decay_from)))
    return peak * (final_ratio + (1 - final_ratio) * cosine)


def value_at(schedule: Schedule, progress: float, name: str = "schedule") -> float:
    """Return the value at a share of the run: a constant, or {share: value from there on}: {0: 0.3, 0.68: 0.1}."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    try:
        knots = sorted((float(share), float(value)) for share, value in schedule.items())
    except ValueError:
        raise UserError(f"{name}: {schedule!r} must map shares of the run (0 to 1) to numbers") from None
    if not knots or knots[0][0] != 0:
        raise UserError(f"{name}: {schedule!r} must begin at share 0 of the run")
    return [value for share, value in knots if share <= progress][-1]
