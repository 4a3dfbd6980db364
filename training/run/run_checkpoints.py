"""The checkpoints of one run: taken up at its beginning, written while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from text.tokenizer import Tokenizer
from training.datasets import Dataset, PolicyDataset
from training.parallel.ranks import Ranks
from training.run.checkpoint import Progress, Snapshot, Weights, keep_last, newest
from training.run.resume import BEST, contents, left_off, take_up
from training.run.saver import Saver
from training.settings import StageSettings


class RunCheckpoints:
    """What is saved of a run, and read of it again. All ranks call these together; the main one writes.

    Attributes: saver: writes them.
    """

    def __init__(
        self,
        settings: StageSettings,
        ranks: Ranks,
        weights: Weights,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
    ) -> None:
        self._out, self._resume, self._keep = Path(settings.out), settings.resume, settings.keep
        self._ranks, self._weights, self._tokenizer, self._optimizer = ranks, weights, tokenizer, optimizer
        self._made = dataset if isinstance(dataset, PolicyDataset) else None
        self.saver = Saver(settings.background_save, ranks.device)

    def take_up(self, run: dict[str, object], is_finished: Callable[[Progress], bool]) -> Progress | None:
        """Put the newest one in place, if asked to and there is one. Returns how far the run is, or None.

        A run that is complete is left as it is; one that `is_finished` without that is put in place, to be saved as its
        end. run: what must not have changed since.
        """
        found = self._ranks.on_main(lambda: left_off(self._out, self._resume, run))
        if found is None:
            return None
        folder, progress = found
        progress.finished = is_finished(progress)
        if progress.finished and folder.name == "final":
            return progress
        self._ranks.check_shared(folder, lambda: contents(folder))
        state = take_up(folder, self._weights, self._optimizer)
        if self._made is not None:
            self._made.load_state(state)
        self._ranks.gather(None)  # where another one could not read it, this says so
        self._ranks.say(f"resuming from {folder}: step {progress.step}, {progress.tokens:,} tokens")
        return progress

    def save(self, name: str, progress: Progress) -> None:
        """Begin to write one of this moment; an error of the one before it comes up here."""
        self._ranks.on_main(lambda: self._write(name, progress))

    def _write(self, name: str, progress: Progress) -> None:
        data = {} if self._made is None else self._made.state()
        snapshot = Snapshot(self._weights, self._tokenizer, self._optimizer, progress, data)

        def write(tensors: dict[str, Tensor]) -> None:
            snapshot.write(self._out / name, tensors)
            if name not in ("final", BEST):
                keep_last(self._out, self._keep)

        self.saver.save(snapshot.tensors, write)

    @property
    def failed(self) -> bool:
        """Whether a save has failed meanwhile, on this rank; `wait` raises why."""
        return self.saver.failed

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises the error of a save that failed, on all ranks."""
        self._ranks.on_main(self.saver.wait)

    def newest(self) -> Path | None:
        """The folder to go on from."""
        return newest(self._out)

    def close(self) -> None:
        """Wait, whatever became of it."""
        self.saver.close()
