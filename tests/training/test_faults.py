"""Disks that fill, folders that vanish, slow saves: one line, and what was saved stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forked import Forked, on_ranks
from safetensors import SafetensorError
from toy_stage import ROWS, TIME, Rows, files

import training.run.checkpoint
from errors import UserError, command_line
from model import MiniDeepSeek
from training.parallel.ranks import Ranks
from training.run.progress import newest
from training.run.resume import verify
from training.run.saver import Saver


def at_step(step: int, happen: Callable[[], object]) -> Rows:
    """Rows in whose step `step` something happens."""

    def before(indices: Sequence[int]) -> None:
        if indices[0] == (step - 1) * ROWS:
            happen()

    return Rows(before)


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fills_ends_the_run_and_a_resume_loses_nothing(background, make, monkeypatch):
    """Saves of step 2 and 4; the disk is full from step 3 on."""
    whole = make("whole", max_steps=5, save_every=2)
    whole.run()

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        trainer = make(max_steps=5, save_every=2, background_save=background)
        fills = at_step(
            3, lambda: (trainer.checkpoints.wait(), patch.setattr(training.run.checkpoint, "save_file", full))
        )
        trainer.dataset = fills
        with pytest.raises(UserError) as caught:
            trainer.run()
    message = str(caught.value)
    assert message.startswith(f"{trainer.out / 'step-4'}: could not be saved (I/O error: No space left on device")
    assert f"intact: {trainer.out / 'step-2'}; free some space and use --resume" in message and "\n" not in message
    assert [path.name for path in trainer.out.glob("*step-*")] == ["step-2"]
    verify(trainer.out / "step-2")
    make(max_steps=5, save_every=2, resume=True).run()
    assert files(trainer.out / "final") == files(whole.out / "final")


def test_a_write_that_the_kernel_refuses_ends_in_one_line_and_code_2(make, tmp_path):
    """A limit on the size of files, which weights exceed and metrics do not."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        command_line(lambda: make(max_steps=4, save_every=2).run())

    process = Forked(limited, tmp_path / "said.log")
    assert process.wait(60) == 2
    last = process.output().strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'run' / 'step-2'}: could not be saved (") and "Traceback" not in last
    assert not list((tmp_path / "run").glob(".*.partial")) and not list((tmp_path / "run").glob("step-*"))


def test_a_run_folder_that_vanishes_is_not_made_anew(make, tmp_path):
    """What was mounted there is gone, and the disk below it is not where checkpoints belong."""

    def vanish() -> None:
        trainer.checkpoints.wait()
        shutil.rmtree(tmp_path / "run")

    trainer = make(dataset=at_step(3, vanish), save_every=2, max_steps=6)
    with pytest.raises(UserError, match=r"could not be saved .*vanished.*bring the folder back and use --resume"):
        trainer.run()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_may_not_be_written_says_so(make, monkeypatch):
    trainer = make(max_steps=2)

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as patch:
        trainer.dataset = at_step(2, lambda: patch.setattr(training.run.checkpoint.Path, "mkdir", refuse))
        with pytest.raises(UserError, match=r"Read-only file system.*make the folder writable and use --resume"):
            trainer.run()


def test_what_is_saved_is_the_moment_of_the_save():
    """The writer starts late; training has gone on."""
    saver, go, written = Saver(True, torch.device("cpu")), threading.Event(), []
    weight = torch.ones(3)
    for value in (1.0, 2.0):
        weight.fill_(value)

        def write(tensors: dict[str, torch.Tensor]) -> None:
            go.wait(10)
            written.append(tensors["weight"].tolist())

        saver.save({"weight": weight}, write)
        weight.fill_(7.0)
        go.set()
    saver.close()
    assert written == [[1.0] * 3, [2.0] * 3]


def test_the_background_saves_what_the_foreground_does(make):
    options = dict(max_steps=5, save_every=1, keep=9)
    runs = [make(name, **options, background_save=name == "background") for name in ("background", "foreground")]
    for trainer in runs:
        trainer.run()
    names = sorted(path.name for path in runs[0].out.iterdir() if path.is_dir())
    assert names == ["final", "step-1", "step-2", "step-3", "step-4"]
    for name in names:
        assert files(runs[0].out / name) == files(runs[1].out / name), name


def test_a_full_disk_ends_both_ranks_in_one_line(make, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    def train(rank: int) -> None:
        command_line(make(ranks=Ranks.start("cpu", timeout=30.0), max_steps=50, save_every=2).run)

    monkeypatch.setattr(training.run.checkpoint, "save_file", full)
    ranks = on_ranks(2, train, tmp_path)
    said = "".join(rank.output() for rank in ranks)
    assert [rank.code for rank in ranks] == [2, 2] and "Traceback" not in said
    assert said.count("error: ") == 1 and "could not be saved" in said


FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 78.04 GiB memory in use. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation. See documentation"
)
SAID = (
    "error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB "
    "is free; in training lower --micro_tokens or pass --gradient_checkpointing (and --resume, if something was "
    "saved); elsewhere read less at once"
)


def test_a_full_gpu_ends_in_one_line_and_a_resume_loses_nothing(make, capsys):
    def fill() -> None:
        raise torch.OutOfMemoryError(FULL)

    whole = make("whole", max_steps=6, save_every=2)
    whole.run()
    with pytest.raises(SystemExit) as end:
        command_line(make(dataset=at_step(4, fill), max_steps=6, save_every=2).run)
    assert end.value.code == 2 and capsys.readouterr().err.strip() == SAID
    again = make(max_steps=6, save_every=2, resume=True, micro_tokens=ROWS * TIME)
    assert newest(again.out) == again.out / "step-2"
    again.run()
    assert files(again.out / "final") == files(whole.out / "final")


@pytest.mark.parametrize("words", ["CUDA error: out of memory\nCUDA kernel errors", "DefaultCPUAllocator: can't"])
def test_memory_may_be_full_in_other_words(words, capsys):
    def fail() -> None:
        raise RuntimeError(words)

    with pytest.raises(SystemExit) as end:
        command_line(fail)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "lower --micro_tokens" in said


def test_a_fault_of_the_program_keeps_its_traceback():
    def fail() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        command_line(fail)


def test_a_full_gpu_of_one_rank_ends_the_other_too(make, tmp_path):
    def train(rank: int) -> None:
        def fill(indices: Sequence[int]) -> None:
            if rank and indices[0] >= 2 * ROWS:
                raise torch.OutOfMemoryError(FULL)

        command_line(make(dataset=Rows(fill), ranks=Ranks.start("cpu", timeout=30.0), save_every=2).run)

    ranks = on_ranks(2, train, tmp_path)
    assert [rank.code for rank in ranks] == [2, 2] and (tmp_path / "run" / "step-2").is_dir()
    assert SAID in ranks[1].output() and "error: rank 0: another rank has ended" in ranks[0].output()


@pytest.mark.parametrize("name", ["dpo_train", "grpo_train", "distill"])
def test_a_full_gpu_is_explained_wherever_the_model_runs(name, run, pretrained, world, tmp_path, monkeypatch):
    """While answers are sampled, and where a reference or a teacher is asked."""

    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    final = pretrained / "final"
    chats = ["--ckpt", final, "--data", world / "sft.jsonl", "--sequence_length", 64, "--batch_tokens", 512]
    arguments = {
        "dpo_train": [*chats, "--data", world / "preferences.jsonl"],
        "grpo_train": ["--ckpt", final, "--data", "arithmetic:1", "--max_new_tokens", 8, "--sequence_length", 64],
        "distill": [*chats, "--teacher", final, "--precompute_top_k", 4],
    }[name]
    monkeypatch.setattr(MiniDeepSeek, "forward", fill)
    done = run(import_module(name).main, *arguments, "--device", "cpu", "--max_steps", 2, "--out", tmp_path / "out")
    assert done.code == 2 and done.err.strip().splitlines()[-1] == SAID and "Traceback" not in done.err
