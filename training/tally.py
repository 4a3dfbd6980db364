"""What a step adds up over its micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from training.parallel.ranks import Ranks

Metric = Tensor | tuple[Tensor, Tensor]


class Tally:
    """Sums of one optimiser step. Every call must bring the same names, on every rank.

    A metric is a sum, logged over the count of the whole step, or a pair (sum, count), logged over its own.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Add what one micro-batch measured."""
        total, count = metric if isinstance(metric, tuple) else (metric, None)
        self._add(self.sums, name, total)
        if count is not None:
            self._add(self.counts, name, count)

    def gather(self, ranks: Ranks) -> None:
        """Make the sums those of all ranks."""
        for sums in (self.sums, self.counts):
            for name in sums:
                ranks.sum(sums[name])

    def take(self, name: str) -> Tensor | None:
        """The sum of a name, removed; None if nobody added it."""
        return self.sums.pop(name, None)

    def means(self, count: float) -> dict[str, float]:
        """Each sum over its own count, or over `count`. A count of nothing gives 0."""
        return {
            name: value.item() / (max(self.counts[name].item(), 1) if name in self.counts else count)
            for name, value in self.sums.items()
        }

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        value = value.detach().to(torch.float64)
        sums[name] = sums[name] + value if name in sums else value.clone()
