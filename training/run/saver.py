"""Writing checkpoints while training goes on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Write = Callable[[dict[str, Tensor]], None]


class Saver:
    """Saves one checkpoint at a time, in a thread, from a copy of its tensors.

    The copy is made by the stager of torch.distributed.checkpoint, which keeps its memory (page-locked beside a GPU)
    for the next one. Its writers are not used: a folder that transformers opens, and that has its name only when it
    is whole, is not what they write.
    """

    def __init__(self, background: bool, device: torch.device) -> None:
        """background: or the caller waits, and no copy is made. device: where the tensors are."""
        self._stager = self._thread = None
        if background:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # slow to import

            self._stager = DefaultStager(StagingOptions(device.type == "cuda", False, False, False))
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
            _alone(self._thread)
        self._running: Future[None] | None = None

    def save(self, tensors: dict[str, Tensor], write: Write) -> None:
        """Have `write` called with a copy of the tensors. Raises the `UserError` of the save before this one."""
        self.wait()
        if self._stager is None or self._thread is None:
            write(tensors)
        else:
            self._running = self._thread.submit(write, self._stager.stage(tensors))

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._running is not None and not self._running.done()

    @property
    def failed(self) -> bool:
        """Whether a save has failed in the thread; `wait` raises why."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises the `UserError` of a save that failed."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Wait, whatever became of it, and give the copy's memory back."""
        if self._stager is not None and self._thread is not None:
            self._thread.shutdown()
            self._stager.close()


def _alone(thread: ThreadPoolExecutor) -> None:
    """Keep torch's operations in `thread` to that thread.

    Otherwise its first one starts a team of threads of its own, which stays. Beside it OpenMP counts more threads than
    cores, and no longer lets those of training wait for their next piece of work without going to sleep: small
    operations of a step take twice as long from then on.
    """
    threads = torch.get_num_threads()
    thread.submit(torch.get_num_threads).result()  # a thread takes the common number when it is first asked
    thread.submit(torch.set_num_threads, 1).result()
    thread.submit(_step_back).result()
    torch.set_num_threads(threads)  # the number that threads begin with is one for all


def _step_back() -> None:
    """Let training have the processor first, where threads have a priority of their own: on Linux."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
