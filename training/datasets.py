"""What a stage trains on, as the loop sees it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from model import MiniDeepSeek
from training.losses import Batch


class Dataset(Protocol):
    """What a stage trains on: sample `i`, counted from the start of training, is a function of (seed, i) alone."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> Batch: ...


@runtime_checkable
class NamingDataset(Protocol):
    """A data set that can say where sample `index` comes from."""

    def describe(self, index: int) -> str: ...


@runtime_checkable
class PolicyDataset(Protocol):
    """A data set that the model in training makes, such as its own answers.

    `prepare` is called on every rank at the start of every step, before the step's batches are asked for, and returns
    entries for the log. What later steps need of earlier ones is in `state`, the same on every rank: it is saved with
    each checkpoint, and a resumed run gives it to `load_state` before its first step.
    """

    def prepare(self, step: int, model: MiniDeepSeek) -> dict[str, Any]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...
