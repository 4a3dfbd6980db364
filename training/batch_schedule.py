"""A batch that changes along the run (DeepSeek-V3 section 4.2): which samples each step has, and when the run ends."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from errors import UserError

if TYPE_CHECKING:
    from training.settings import StageSettings

Limit = tuple[float, float]  # so many steps, so many samples; one of them is infinite


class Phase(NamedTuple):
    """Steps of one size, of `rows` samples: the number of the first, and its first sample."""

    step: int
    sample: int
    rows: int


class BatchSchedule:
    """`--batch_tokens '{"0": 8192, "0.3": 32768}'`: how large a step is depends on the share of the run before it.

    The share is that of the limit which comes first: of the steps, or of the samples where tokens or epochs are
    limited. It is a function of the step and of the samples of all steps before it, which a checkpoint holds.

    Attributes: phases: what is left of the run; steps, samples: of the whole run; largest: samples of a step.
    """

    def __init__(self, rows: Mapping[float, int], limits: Mapping[str, Limit]) -> None:
        """rows: samples of a step from a share of the run on, in order; limits: by their options, at least one."""
        self._rows, self._limits, self.largest = rows, limits, max(rows.values())
        self.begin(0, 0)

    def begin(self, step: int, sample: int) -> None:
        """Lay out the run from a step on, before which there were so many samples."""
        self.phases: list[Phase] = []
        most, ends = int(min(map(min, self._limits.values()))) + 1, [*self._rows, 1.0][1:]
        for rows, end in zip(self._rows.values(), ends, strict=True):
            steps = bisect_left(range(most), end, key=lambda n, rows=rows: self._share(step + n, sample + n * rows))
            if steps:
                self.phases.append(Phase(step, sample, rows))
            step, sample = step + steps, sample + steps * rows
        self.steps, self.samples = step, sample
        self.phases = self.phases or [Phase(step, sample, rows)]  # of a run that is over

    def of_step(self, step: int) -> range:
        """Return the samples of a step over all ranks, counted from the beginning of the run."""
        phase = self.phases[bisect_right(self.phases, step, key=lambda phase: phase.step) - 1]
        first = phase.sample + (step - phase.step) * phase.rows
        return range(first, first + phase.rows)

    def share(self, step: int) -> float:
        """Return the share of the run that is spent before a step."""
        return self._share(step, self.of_step(step).start)

    def done(self, step: int) -> float:
        """Return the share of the run's samples before a step."""
        return self.of_step(step).start / max(self.samples, 1)

    def largest_left(self, step: int) -> float:
        """Return how many steps of the largest size have as many samples as the run from a step on."""
        return (self.samples - self.of_step(step).start) / self.largest

    @property
    def ends_by(self) -> str:
        """Return the option that ends the run."""
        return max(self._limits, key=lambda option: _spent(self._limits[option], self.steps, self.samples))

    def smaller_first(self) -> str:
        """Return how many rows the steps have before those of the last size; nothing where all are of that."""
        parts = (f"{phase.rows:,} rows until step {after.step:,}, then " for phase, after in pairwise(self.phases))
        return "".join(parts)

    def _share(self, step: int, sample: int) -> float:
        return max(_spent(limit, step, sample) for limit in self._limits.values())


def _spent(limit: Limit, step: int, sample: int) -> float:
    return max(step / limit[0], sample / limit[1])


def check(settings: StageSettings) -> None:
    """Raise `UserError` for shares that no run could follow."""
    given = settings.batch_tokens
    try:
        shares = sorted(map(float, given))
    except ValueError:
        shares = []
    if not shares or shares[0] != 0 or not shares[-1] < 1:
        raise UserError(f"--batch_tokens {given}: give sizes from shares of the run on, the first of them 0, below 1")
    if settings.max_minutes is not None:
        raise UserError(
            f"--batch_tokens {given}: a share of --max_minutes is one of an unknown number of steps; "
            "give --max_steps or --max_tokens in its place, or one size"
        )


def schedule_of(settings: StageSettings, samples: int, epochs: float | None) -> BatchSchedule:
    """Return that of a run. samples: of an epoch; epochs: to end after, if any."""
    limits: dict[str, Limit] = {}
    if settings.max_steps is not None:
        limits[f"--max_steps {settings.max_steps}"] = settings.max_steps, math.inf
    if settings.max_tokens is not None:
        limits[f"--max_tokens {settings.max_tokens}"] = math.inf, settings.max_tokens / settings.row_tokens
    if epochs is not None:
        limits[f"--epochs {epochs:g}"] = math.inf, epochs * samples
    return BatchSchedule(settings.rows_by_share, limits)
