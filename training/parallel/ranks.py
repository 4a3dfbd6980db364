"""This process among the ranks of a run: what a script needs to know of torchrun. Here it is the only one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from errors import UserError
from training.machine import choose_device
from training.parallel.dist_settings import DistSettings
from training.run.interrupt import Watch

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process, the only one of a run; among others it is a `training.parallel.group.RankGroup`.

    Attributes: rank 0 .. world - 1; the device it computes on, and why that one; timeout: see `DistSettings`; watch:
        what it is busy with, and whether a signal asked it to stop; in_step: a forward pass is a matter of all ranks,
        each of which must make as many; pp: ranks that share the layers, and the samples.
    """

    rank: int
    world: int
    device: torch.device
    why: str = ""
    timeout: float = DistSettings.timeout
    watch: Watch = field(default_factory=Watch, compare=False)
    in_step: bool = False
    pp: int = 1

    @classmethod
    def start(cls, device: str, timeout: float = DistSettings.timeout) -> Ranks:
        """Join the ranks that torchrun started, if any. `device`: auto, cpu or cuda."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        place, why = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        if place.type == "cuda":
            torch.cuda.set_device(place)
        elif torch.version.cuda and why and rank == 0:
            print(f"notice: computing on the CPU: {why}", file=sys.stderr)
        # Never TF32, which keeps 10 bits: products in float32 are those of routers, of evaluation and of --dtype fp32.
        torch.set_float32_matmul_precision("highest")
        if world > 1:
            return resolve_name("training.parallel.group:RankGroup").join(rank, world, place, why, timeout)
        return cls(rank, world, place, why, timeout)

    @property
    def main(self) -> bool:
        """Return whether this process writes files and prints."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """Return among how many the samples are divided."""
        return max(self.world // self.pp, 1)

    @property
    def share_of_this(self) -> int:
        """Return which of these shares this rank has. Ranks of one pipeline are far apart, those of `ep` near."""
        return self.rank % self.shares

    def say(self, text: str) -> None:
        """Print once, not once a process."""
        if self.main:
            print(text, flush=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        return tensor

    def asked_to_stop(self) -> bool:
        """Return whether a signal came to any rank; called by all together. It waits for no GPU."""
        return self.watch.asked

    def share(self, items: Sequence[Item], what: str) -> Iterator[tuple[Item, bool]]:
        """Yield the items of this rank's share, and whether each counts, until a signal came; `what` is done with them.

        In step, ranks that have one item less get one again that does not count.
        """
        shares, first = self.shares, self.share_of_this
        count = -(-len(items) // shares) if self.in_step else len(range(first, len(items), shares))
        for done in self.watch.track(range(count), what, count, self.asked_to_stop if self.in_step else None):
            place = first + done * shares
            yield items[place % len(items)], place < len(items)

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank holds, in the order of the ranks, on all of them. Tensors must be on the CPU."""
        return [value]

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Call `work` on the main rank and give its result to all. A `UserError` there ends all, reported once."""
        return work()

    def led(self) -> AbstractContextManager[Callable[[], None]]:
        """Yield what other ranks call now and then to end too, should the main rank fail at what may take hours."""
        return nullcontext(lambda: None)

    def fail(self, message: str) -> NoReturn:
        """End the run with a `UserError`; called by all ranks, reported once."""
        raise UserError(message) if self.main else SystemExit(UserError.exit_code)

    def check_shared(self, path: Path, look: Callable[[], object]) -> None:
        """Raise `UserError` on all ranks unless each of them sees at `path` what the main rank sees.

        look: what this process sees there, to be compared. A network file system has some time to show it.
        """

    def check_writes_shared(self, folder: Path) -> None:
        """Raise `UserError` on all ranks unless each of them sees what the main rank writes into a folder."""

    def explained(self) -> AbstractContextManager[None]:
        """Turn what a collective raises when another rank is silent until the timeout, or gone, into a `UserError`."""
        return nullcontext()

    def stop(self) -> None:
        """Leave the group."""
