"""The micro-batches of a rank, on its device: a thread makes them ahead of a GPU, which then waits for no host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

import model.kernels as kernels
from training.losses import Batch, Loss
from training.machine import pinned, to_device
from training.parallel.ranks import Ranks
from training.settings import StageSettings

if TYPE_CHECKING:
    from training.step import Dataset

AHEAD = 2  # micro-batches


def is_made_ahead(device: torch.device) -> bool:
    """Return whether a thread makes batches for this device: on a CPU it would take the cores that compute."""
    return device.type == "cuda"


class Batches:
    """Gives the micro-batches of this rank in their order. Samples are functions of their numbers: nothing to save.

    For a GPU a thread makes the next ones and puts them into pinned memory, from which copies to the device go on by
    themselves.

    Args:
        whole_run: whether they may be made ahead of their step; those of a `PolicyDataset` may not.
        of_step: the samples of a step over all ranks, where steps are of several sizes.
    """

    def __init__(
        self,
        settings: StageSettings,
        ranks: Ranks,
        dataset: Dataset,
        loss: Loss,
        whole_run: bool = True,
        of_step: Callable[[int], range] | None = None,
    ) -> None:
        self._settings, self._ranks, self._dataset, self._loss = settings, ranks, dataset, loss
        self._whole_run = whole_run
        self.of_step = of_step or (lambda step: range(step * settings.rows, (step + 1) * settings.rows))
        self._ahead: deque[tuple[range, Future[Batch]]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if is_made_ahead(ranks.device):
            # Pinning needs the context of a device, and each thread has a current one: the first, unless it is told.
            self._thread = ThreadPoolExecutor(1, "batches", lambda: torch.cuda.set_device(ranks.device))

    def samples(self, step: int) -> list[range]:
        """Return the samples of each micro-batch of a step.

        A rank takes a contiguous share of the step's samples, so the sum over shares is the sum over the batch.
        """
        samples, micro_rows = self.of_step(step), self._settings.micro_rows
        rows = len(samples) // self._ranks.shares
        first = samples.start + self._ranks.share_of_this * rows
        mine = range(first, first + rows)
        return [mine[start : start + micro_rows] for start in range(0, len(mine), micro_rows)]

    def take(self, step: int, index: int) -> Batch:
        """Return a micro-batch of a step. Raises what the data set raises, when the turn of that batch has come."""
        if self._thread is None:
            return to_device(self._made(self.samples(step)[index]), self._ranks.device)
        steps = range(step, step + AHEAD + 1) if self._whole_run else [step]
        following = [samples for each in steps for samples in self.samples(each)][index : index + AHEAD + 1]
        while self._ahead and self._ahead[0][0] != following[0]:  # those of a step that was left
            self._ahead.popleft()[1].cancel()
        for samples in following[len(self._ahead) :]:
            self._ahead.append((samples, self._thread.submit(self._made, samples)))
        return to_device(self._ahead.popleft()[1].result(), self._ranks.device)

    def close(self) -> None:
        """End the thread; what it is making is thrown away."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._ahead.clear()

    def _made(self, samples: range) -> Batch:
        batch = self._dataset.batch(list(samples))
        if prepare := getattr(self._loss, "prepare", None):
            batch = prepare(batch)
        if self._thread is None:
            return batch
        if "segment_ids" in batch:  # of a GPU the host would wait for how many segments there are
            batch = {**batch, "segment_ends": kernels.attention.segment_ends(batch["segment_ids"])}
        return {name: pinned(x) for name, x in batch.items()}
