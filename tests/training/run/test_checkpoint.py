"""A checkpoint is whole or not there, holds all that training needs, and is checked when it is opened."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import model.checkpoint.folder
import training.run.checkpoint
from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.fingerprinted import save_arrays
from training.optim.build import OptimSettings, build_optimizer
from training.run.checkpoint import MANIFEST, Snapshot, WholeModel
from training.run.progress import Progress, checkpoints, keep_last, newest, read_progress
from training.run.resume import find_checkpoint
from training.run.state import load_training_state


class Sitting:
    """A model, its optimiser and how far they are; `step` trains on noise, `save` makes a checkpoint."""

    def __init__(self, network: MiniDeepSeek, tokenizer: Tokenizer, out: Path) -> None:
        self.model, self.tokenizer, self.out = network.train(), tokenizer, out
        self.optimizer = build_optimizer(network, OptimSettings())
        self.progress = Progress(run={"seed": 3})

    def step(self) -> None:
        self.model(torch.randint(600, (2, 8))).logits.logsumexp(-1).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for router in self.model.routers():
            router.e_score_correction_bias += torch.randn(8) / 10
        self.progress.step += 1
        self.progress.tokens += 16

    def save(self, name: str | None = None) -> Path:
        folder = self.out / (name or f"step-{self.progress.step}")
        snapshot = Snapshot(WholeModel(self.model), self.tokenizer, self.optimizer, self.progress)
        snapshot.write(folder, snapshot.tensors)
        return folder


@pytest.fixture
def sit(tiny_model, tokenizer, tmp_path) -> Callable[[int], Sitting]:
    return lambda seed=0: Sitting(tiny_model(seed, vocab_size=600), tokenizer, tmp_path)


@pytest.fixture
def sitting(sit) -> Sitting:
    """After one step, with a checkpoint of it."""
    sitting = sit()
    sitting.step()
    sitting.save()
    return sitting


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_a_hugging_face_folder_with_the_training_beside_it_in_float32(sitting):
    folder = sitting.out / "step-1"
    assert set(content(folder)) == {
        "config.json", "generation_config.json", "model.safetensors", "mtp.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training/manifest.json", "training/progress.json", "training/state.safetensors",
    }  # fmt: skip
    weights, state = (load_file(folder / name) for name in ("model.safetensors", "training/state.safetensors"))
    assert {tensor.dtype for tensor in (*weights.values(), *state.values())} == {torch.float32}
    assert {name.rsplit("|", 1)[1] for name in state} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.fixture
def shared_with_the_group():
    before = os.umask(0o007)
    yield
    os.umask(before)


def test_who_may_read_other_new_files_may_read_the_weights(shared_with_the_group, sitting):
    folder = sitting.save("step-2")
    save_arrays(folder / "reference.safetensors", {"log_probs": np.zeros(2, np.float32)}, "f")
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.rglob("*.*")} == {
        path.name: "0o660" for path in folder.rglob("*.*")
    }


def test_all_that_training_needs_comes_back(sitting, sit):
    other = sit(1)
    folder = sitting.out / "step-1"
    other.model.load_state_dict(MiniDeepSeek.from_pretrained(folder).state_dict())
    load_training_state(folder, other.model, other.optimizer)
    assert read_progress(folder) == sitting.progress
    torch.manual_seed(5)
    sitting.step()
    torch.manual_seed(5)
    other.step()
    ours, theirs = sitting.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.endswith("e_score_correction_bias") for name in ours)


def test_the_random_state_that_older_checkpoints_hold_is_left_out(sitting, sit):
    path = sitting.out / "step-1" / "training" / "state.safetensors"
    save_file({**load_file(path), "rng": torch.get_rng_state()}, path)
    other, before = sit(1), torch.get_rng_state()
    load_training_state(sitting.out / "step-1", other.model, other.optimizer)
    assert torch.equal(torch.get_rng_state(), before)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


FILLS = {
    "the weights": (model.checkpoint.folder, "save_file", full_in_rust),
    "the tokenizer": (Tokenizer, "save", full),
    "the state": (training.run.checkpoint, "save_file", full_in_rust),
    "the flush": (training.run.checkpoint, "_flush", full),
    "the folder": (training.run.checkpoint.Path, "mkdir", full),
}


@pytest.mark.parametrize("fills", FILLS)
def test_a_disk_that_fills_loses_nothing_that_was_saved(fills, sitting, monkeypatch):
    before = content(sitting.out)
    sitting.step()
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(*FILLS[fills])
        sitting.save()
    message = str(caught.value)
    assert message.startswith(f"{sitting.out / 'step-2'}: could not be saved") and "\n" not in message
    assert "No space left" in message and f"intact: {sitting.out / 'step-1'}" in message and "--resume" in message
    assert content(sitting.out) == before and [path.name for path in sitting.out.iterdir()] == ["step-1"]
    assert caught.value.exit_code == 2
    sitting.save()
    assert newest(sitting.out).name == "step-2"


@pytest.mark.parametrize("killed", [False, True])
def test_an_end_that_cannot_take_its_name_gives_the_old_one_back(killed, sitting, monkeypatch):
    sitting.save("final")
    before, replace = content(sitting.out), os.replace
    sitting.step()

    def refused(source: Path, target: Path) -> None:
        if Path(source).name == ".final.partial":
            raise KeyboardInterrupt if killed else OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if killed else UserError):
        patch.setattr(os, "replace", refused)
        sitting.save("final")
    if killed:
        assert newest(sitting.out).name == "step-1"
        assert find_checkpoint(sitting.out, True, {})[0].name == "final"
        shutil.rmtree(sitting.out / ".final.partial")
    assert content(sitting.out) == before
    sitting.save("final")
    assert read_progress(sitting.out / "final").step == 2
    assert sorted(path.name for path in sitting.out.iterdir()) == ["final", "step-1"]


def test_what_a_killed_save_left_is_no_checkpoint_and_is_removed(sitting):
    (sitting.out / ".step-2.partial" / "training").mkdir(parents=True)
    (sitting.out / ".step-2.partial" / "model.safetensors").write_bytes(b"half")
    assert newest(sitting.out).name == "step-1"
    sitting.step()
    sitting.save()
    assert sorted(path.name for path in sitting.out.iterdir()) == ["step-1", "step-2"]


def test_checkpoints_are_ordered_by_number_and_the_end_is_the_newest(sitting):
    assert newest(sitting.out / "elsewhere") is None
    for number in (10, 9):
        shutil.copytree(sitting.out / "step-1", sitting.out / f"step-{number}")
    (sitting.out / "step-old").mkdir()
    assert [path.name for path in checkpoints(sitting.out)] == ["step-1", "step-9", "step-10"]
    assert newest(sitting.out).name == "step-10"
    sitting.progress.step = 10
    assert newest(sitting.save("final").parent).name == "final"
    keep_last(sitting.out, 1)
    assert sorted(path.name for path in sitting.out.iterdir()) == ["final", "step-10", "step-old"]


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "lose": Path.unlink,
    "scribble": lambda path: path.write_bytes(b"[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.safetensors", "progress.json"])
def test_damaged_training_state_is_named_in_one_line(name, damage, sitting):
    folder = sitting.out / "step-1"
    (folder / MANIFEST).unlink()  # which would have found it
    DAMAGES[damage](folder / "training" / name)
    with pytest.raises(DamagedCheckpoint) as caught:
        find_checkpoint(sitting.out, True, {})
        load_training_state(folder, sitting.model, sitting.optimizer)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'training' / name}: ") and "\n" not in message and "; " in message


def test_the_state_of_another_model_is_refused(sitting, tiny_model):
    other = tiny_model(first_k_dense_replace=3)
    with pytest.raises(DamagedCheckpoint, match=r"state of an unknown parameter|does not fit the model"):
        load_training_state(sitting.out / "step-1", other, build_optimizer(other, OptimSettings()))
