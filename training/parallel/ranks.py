"""One process or many: what a script needs to know of torchrun and torch.distributed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError, naming
from training.machine import choose_device
from training.parallel.dist_settings import DistSettings
from training.run.interrupt import Watch

Result = TypeVar("Result")
Item = TypeVar("Item")
# What gloo and NCCL say when another rank is silent, and when it is gone.
SILENT = ("timed out", "timeout")
GONE = ("connection closed", "connection reset", "connection refused", "broken pipe", "remote process has exited")
ROLL_CALL = 2.0  # seconds in which those who waited in vain must have said so
LEADER_FAILED = "main rank failed"  # a key of the store
LAG = 30.0  # seconds after which every node sees what one has written to a network file system


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run.

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
        if world > 1 and not dist.is_initialized():
            # Objects and checkpoints travel through CPU memory on a GPU machine too.
            backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
            wait = timedelta(seconds=timeout)
            store = _store(world, wait)
            _check_devices(store, rank, world, f"{place.type} ({why})" if why else place.type)
            # Named, its GPU is joined to the others now, and nothing has to guess which one this rank computes on.
            gpu = place if place.type == "cuda" else None
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait, device_id=gpu)
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
        if self.world > 1:
            with self.explained():
                dist.all_reduce(tensor)
        return tensor

    def asked_to_stop(self) -> bool:
        """Return whether a signal came to any rank; called by all together. It waits for no GPU."""
        if self.world == 1:
            return self.watch.asked
        return self.sum(torch.tensor(float(self.watch.asked))).item() > 0

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
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self.explained():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Call `work` on the main rank and give its result to all. A `UserError` there ends all, reported once."""
        if self.world == 1:
            return work()
        result, error = None, None
        try:
            result = work() if self.main else None
        except UserError as caught:
            error = caught
        box = [(result, error.exit_code if error else 0)]
        with self.explained():
            dist.broadcast_object_list(box)
        if error:
            raise error
        result, code = box[0]
        if code:
            raise SystemExit(code)
        return result

    @contextmanager
    def led(self) -> Iterator[Callable[[], None]]:
        """Yield what other ranks call now and then to end too, should the main rank fail at what may take hours."""
        store = dist.distributed_c10d._get_default_store() if self.world > 1 else None

        def check() -> None:
            try:
                has_failed = store is not None and store.check([LEADER_FAILED])
            except RuntimeError:  # the store is in the hands of the process that has ended
                raise UserError(f"rank {self.rank}: another rank has ended; its own message says why") from None
            if has_failed:
                raise SystemExit(UserError.exit_code)

        try:
            yield check
        except BaseException:
            if self.main and store is not None:
                store.set(LEADER_FAILED, "")
            raise

    def fail(self, message: str) -> NoReturn:
        """End the run with a `UserError`; called by all ranks, reported once."""
        raise UserError(message) if self.main else SystemExit(UserError.exit_code)

    def check_shared(self, path: Path, look: Callable[[], object]) -> None:
        """Raise `UserError` on all ranks unless each of them sees at `path` what the main rank sees.

        look: what this process sees there, to be compared. A network file system has `LAG` seconds to show it.
        """
        if self.world == 1:
            return
        seen, end = self.on_main(look), time.monotonic() + LAG
        while not (same := look() == seen) and time.monotonic() < end:
            time.sleep(min(LAG, 0.2))
        blind = [str(rank) for rank, sees in enumerate(self.gather(same)) if not sees]
        if blind:
            raise UserError(
                f"{path}: rank {', '.join(blind)} does not see there what rank 0 sees; needs a folder that all "
                "nodes share"
            )

    def check_writes_shared(self, folder: Path) -> None:
        """Raise `UserError` on all ranks unless each of them sees what the main rank writes into a folder."""
        if self.world == 1:
            return
        made = [path for path in (folder, *folder.parents) if not path.exists()]

        def write() -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            note = folder / f".seen-by-all-ranks-{uuid4().hex}"
            with naming(note):
                note.touch()
            return note

        note = self.on_main(write)
        try:
            self.check_shared(folder, note.exists)
        finally:
            if self.main:
                note.unlink(missing_ok=True)
                with suppress(OSError):  # another run has written there meanwhile
                    for path in made:
                        path.rmdir()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what a collective raises when another rank is silent until the timeout, or gone, into a `UserError`."""
        try:
            yield
        except RuntimeError as error:
            said = str(error).lower()
            if self.world == 1 or not any(word in said for word in SILENT + GONE):
                raise
            if any(word in said for word in SILENT):
                absent = ", ".join(map(str, self._absent())) or "another rank"
                raise UserError(
                    f"rank {self.rank}: no answer from rank {absent} in {self.timeout:g} s; see what it does there "
                    "(py-spy dump), or raise --dist.timeout if it was only slow; then use --resume"
                ) from None
            raise UserError(f"rank {self.rank}: another rank has ended; its own message says why") from None

    def _absent(self) -> list[int]:
        """Return the ranks that do not say at once that they have waited in vain too."""
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            store.set(f"waited/{self.rank}", "1")
            time.sleep(ROLL_CALL)
            return [rank for rank in range(self.world) if not store.check([f"waited/{rank}"])]
        return []

    def stop(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _store(world: int, timeout: timedelta) -> dist.Store:
    """Return where ranks leave their addresses for one another, under a prefix of its own for each attempt of torchrun.

    torchrun --max-restarts keeps one store for all attempts: a rank that looks up another before that one has come
    back would call at the address of the process that died. The number of the attempt is common to one node only.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world:
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _check_devices(store: dist.Store, rank: int, world: int, device: str) -> None:
    """Raise `UserError` on all ranks where `--device auto` is not the same on all: they could not join one another."""
    store.set(f"device/{rank}", device)
    devices = [store.get(f"device/{other}").decode() for other in range(world)]
    odd = next((other for other, kind in enumerate(devices) if kind.split()[0] != devices[0].split()[0]), 0)
    store.set(f"device/read/{rank}", "")
    if rank == 0:  # with which the store may end
        store.wait([f"device/read/{other}" for other in range(world)])
    if odd:
        raise UserError(f"rank {odd} computes on {devices[odd]}, rank 0 on {devices[0]}; give all the same --device")
