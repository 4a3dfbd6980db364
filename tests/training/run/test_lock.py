"""One run in a folder at a time; who was killed blocks nobody; a restart by torchrun resumes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from forked import Forked

from errors import UserError
from training.run.lock import LOCK, RunLock, restarted


def hold(out: Path) -> None:
    """Hold the lock of a folder until killed."""
    lock = RunLock(out)
    lock.acquire()
    lock.sign()
    (out / "held").touch()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path/run."""
    out = tmp_path / "run"
    process = Forked(lambda: hold(out), tmp_path / "said.log")
    while not (out / "held").exists():
        assert process.code is None, process.output()
        time.sleep(0.01)
    yield process
    process.kill()


def test_two_runs_in_one_folder_are_refused(holder, make):
    trainer = make()
    with pytest.raises(UserError, match=rf"run: process {holder.pid} on .* is training here; stop it, or choose"):
        trainer.run()
    assert not list(trainer.out.glob("step-*")) and not (trainer.out / "config.yaml").exists()


def test_the_lock_of_a_killed_run_blocks_nobody(holder, make):
    assert (make().out / LOCK).is_file()
    holder.kill()
    assert make(max_steps=1).run().name == "final"


def test_children_do_not_keep_the_lock_of_their_parent(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    child = Forked(lambda: time.sleep(60), tmp_path / "child.log")
    lock.release()
    other = RunLock(tmp_path)
    probe = Forked(other.acquire, tmp_path / "probe.log")
    assert probe.wait(10) == 0, probe.output()
    child.kill()


def test_only_a_restart_of_the_torchrun_that_began_the_run_goes_on_with_it(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    lock.acquire()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not restarted(tmp_path)  # nobody has begun anything: the attempt before was refused
    lock.sign()
    assert restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not restarted(tmp_path)
    lock.release()
