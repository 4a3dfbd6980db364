"""Many processes: collectives, and what is said when a rank is silent, gone, blind or of another mind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError, naming
from training.parallel.ranks import Ranks

Result = TypeVar("Result")
# What gloo and NCCL say when another rank is silent, and when it is gone.
SILENT = ("timed out", "timeout")
GONE = ("connection closed", "connection reset", "connection refused", "broken pipe", "remote process has exited")
ROLL_CALL = 2.0  # seconds in which those who waited in vain must have said so
LEADER_FAILED = "main rank failed"  # a key of the store
LAG = 30.0  # seconds after which every node sees what one has written to a network file system


class RankGroup(Ranks):
    """This process among others, joined by torch.distributed; what each method does: see `Ranks`."""

    @classmethod
    def join(cls, rank: int, world: int, device: torch.device, why: str, timeout: float) -> RankGroup:
        """Join the ranks that torchrun started. why: it is that device."""
        if not dist.is_initialized():
            # Objects and checkpoints travel through CPU memory on a GPU machine too.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            wait = timedelta(seconds=timeout)
            store = _store(world, wait)
            _check_devices(store, rank, world, f"{device.type} ({why})" if why else device.type)
            # Named, its GPU is joined to the others now, and nothing has to guess which one this rank computes on.
            gpu = device if device.type == "cuda" else None
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait, device_id=gpu)
        return cls(rank, world, device, why, timeout)

    def sum(self, tensor: Tensor) -> Tensor:
        with self.explained():
            dist.all_reduce(tensor)
        return tensor

    def asked_to_stop(self) -> bool:
        return self.sum(torch.tensor(float(self.watch.asked))).item() > 0

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        with self.explained():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
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
        store = dist.distributed_c10d._get_default_store()

        def check() -> None:
            try:
                has_failed = store.check([LEADER_FAILED])
            except RuntimeError:  # the store is in the hands of the process that has ended
                raise UserError(f"rank {self.rank}: another rank has ended; its own message says why") from None
            if has_failed:
                raise SystemExit(UserError.exit_code)

        try:
            yield check
        except BaseException:
            if self.main:
                store.set(LEADER_FAILED, "")
            raise

    def check_shared(self, path: Path, look: Callable[[], object]) -> None:
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
        try:
            yield
        except RuntimeError as error:
            said = str(error).lower()
            if not any(word in said for word in SILENT + GONE):
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
        if dist.is_initialized():
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
