"""How much of a run's tensors is in memory while it begins."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from model import MiniDeepSeek


def resident() -> int:
    """Bytes of all tensors that are alive and have memory, of those made since `gc.freeze`."""
    alive = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter) and not one.is_meta]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}.values())


def seen_while(work: Callable[[], object]) -> list[int]:
    """Call `work`. Returns what was resident when weights were put into shards, and when training began."""
    from training.parallel import initial, saved
    from training.trainer import Trainer

    checksum, run, seen = initial.checksum, Trainer.run, []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(resident() if len(seen) % 24 == 0 else 0)
        return checksum(tensor)

    def begin(trainer: Trainer) -> Path:
        seen.append(resident())
        return run(trainer)

    gc.collect()
    gc.freeze()
    looks = [patch.object(module, "checksum", look) for module in (initial, saved)]
    with looks[0], looks[1], patch.object(Trainer, "run", begin):
        work()
    return seen


def holding(main: Callable[[], None], shares: float, checkpoint: Path) -> Callable[[], None]:
    """Return a script's `main` that fails where a rank ever holds more than so many times the weights of a model.

    But two of the largest: one that is read, and what is made of it.
    """
    sizes = [p.nbytes for p in MiniDeepSeek.from_pretrained(checkpoint).parameters()]

    def checked() -> None:
        seen = seen_while(main)
        assert len(seen) > 20 and max(seen) < shares * sum(sizes) + 2 * max(sizes), (max(seen), sum(sizes), max(sizes))

    return checked
