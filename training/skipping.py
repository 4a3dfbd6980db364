"""Steps whose loss or gradient is not finite: left out, counted, written down; too many in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from errors import naming
from training.parallel.ranks import Ranks

SKIPPED = "skipped.jsonl"
SHOWN = 8  # samples named in the message at the end


@runtime_checkable
class NamingDataset(Protocol):
    """A data set that can say where sample `index` comes from."""

    def describe(self, index: int) -> str: ...


class Skipping:
    """Watches for steps to skip. A step is one for all ranks or for none: what is looked at are sums over them."""

    def __init__(self, out: Path, most: int, ranks: Ranks, dataset: object) -> None:
        """most: steps skipped in a row that end the run."""
        self._path, self._most, self._ranks, self._dataset = out / SKIPPED, most, ranks, dataset
        self._in_a_row = 0

    def went_well(self) -> None:
        """A step that counts."""
        self._in_a_row = 0

    def skip(self, step: int, loss: float, norm: float, parts: Sequence[tuple[Sequence[int], Tensor, Tensor]]) -> None:
        """Write down a step that is left out, with the samples of the micro-batches that it is due to.

        Args:
            step: its number, from 1; loss: of the step; norm: of its gradient.
            parts: (indices of the samples, loss, count) of each micro-batch of this rank.

        Raises `UserError` when it was one too many.
        """
        self._in_a_row += 1
        bad = [list(indices) for indices, total, count in parts if not (total.isfinite() & count.isfinite()).item()]
        found = [indices for own in self._ranks.gather(bad) for indices in own]
        if not found:  # every loss is finite: the gradient alone overflowed, in whichever micro-batch
            found = [indices for own in self._ranks.gather([list(part[0]) for part in parts]) for indices in own]
        samples = [self._describe(index) for indices in found for index in indices]
        entry = {"step": step, "loss": str(loss), "grad_norm": str(norm), "samples": samples}
        if self._ranks.main:
            with naming(self._path), open(self._path, "a", encoding="utf8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        what = f"loss {loss}, gradient norm {norm}"
        self._ranks.say(f"step {step:>6}  skipped: {what}; its {len(samples)} samples are in {self._path}")
        if self._in_a_row >= self._most:
            shown = "; ".join(samples[:SHOWN])
            self._ranks.fail(
                f"{self._path}: {self._in_a_row} steps in a row had no finite loss or gradient ({what}; the last on "
                f"{shown}); look at these samples, or lower --optim.lr and use --resume"
            )

    def _describe(self, index: int) -> str:
        return self._dataset.describe(index) if isinstance(self._dataset, NamingDataset) else f"sample {index}"
