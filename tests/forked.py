"""Processes forked from the test's, so that they start at once: to be killed, or to be the ranks of one run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.staging  # once, and not in each process that is forked

GRACE = 5.0  # seconds


def at_scale(*values: object) -> list[object]:
    """Cases of `pytest.mark.parametrize` for `make scale`, whose claim `make test` checks in another case."""
    return [pytest.param(value, marks=pytest.mark.scale) for value in values]


class Forked:
    """A call in a process of its own. It is what tests/checks/victim.py calls a victim."""

    def __init__(self, call: Callable[[], object], said: Path) -> None:
        """said: file for what the call prints."""
        self._said = said
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = multiprocessing.get_context("fork").Process(target=self._child, args=(call,))
        self.process.start()
        self.pid = self.process.pid

    def _child(self, call: Callable[[], object]) -> None:
        os.setsid()
        with open(self._said, "w", encoding="utf8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = 1
        try:
            result = call()
            code = result if isinstance(result, int) else 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:  # not by sys.exit, which may wait for a thread that was not forked with its process
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def code(self) -> int | None:
        """As of subprocess: negative for a signal, None while it runs."""
        return self.process.exitcode

    def aim(self) -> None:
        """Its only process is known."""

    def kill(self) -> bool:
        running = self.code is None
        if running:
            self.process.kill()
            self.process.join(10)
        return running

    def wait(self, seconds: float) -> int | None:
        self.process.join(max(seconds, 0))
        return self.code

    def output(self) -> str:
        return self._said.read_text(encoding="utf8", errors="replace")


class ForkedRanks:
    """The ranks of one run as one victim: killed together, ended when all have."""

    def __init__(self, ranks: list[Forked]) -> None:
        self.ranks = ranks

    @property
    def code(self) -> int | None:
        codes = [rank.code for rank in self.ranks]
        return None if None in codes else max(codes, key=abs)

    def aim(self) -> None:
        """Its processes are known."""

    def kill(self) -> bool:
        return any([rank.kill() for rank in self.ranks])

    def wait(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        for rank in self.ranks:
            rank.wait(end - time.monotonic())
        return self.code

    def output(self) -> str:
        return "\n".join(rank.output() for rank in self.ranks)


def start_ranks(world: int, work: Callable[[int], object], folder: Path, **environment: str) -> list[Forked]:
    """Begin `work(rank)` on each of `world` ranks with the environment that torchrun gives, and more of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank_of(rank: int) -> Callable[[], object]:
        def call() -> object:
            given = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update({name: str(value) for name, value in given.items()}, GLOO_SOCKET_IFNAME="lo")
            os.environ.update(environment)
            torch.set_num_threads(1)
            return work(rank)

        return call

    return [Forked(rank_of(rank), folder / f"rank-{rank}.log") for rank in range(world)]


def on_ranks(
    world: int, work: Callable[[int], object], folder: Path, seconds: float = 150, **environment: str
) -> list[Forked]:
    """Call `work(rank)` on each of `world` ranks, as torchrun would, until all have ended, or one has failed.

    As torchrun does, the others then have some seconds to end too. environment: more of it.
    """
    ranks = start_ranks(world, work, folder, **environment)
    try:
        end = time.monotonic() + seconds
        while any(rank.code is None for rank in ranks) and time.monotonic() < end:
            if any(rank.code for rank in ranks):
                end = min(end, time.monotonic() + GRACE)
            time.sleep(0.005)
    finally:
        for rank in ranks:
            rank.kill()
    return ranks


def script_on_ranks(world: int, main: Callable[[], None], arguments: Sequence[object], folder: Path) -> str:
    """Run a script's `main` on each of `world` ranks to its end. Returns what the ranks printed."""
    from conftest import call_main

    ranks = on_ranks(world, lambda rank: call_main(main, *arguments), folder, 200)
    shown = "\n".join(rank.output() for rank in ranks)
    assert [rank.code for rank in ranks] == [0] * world, shown[-4000:]
    return shown
