"""Checksums find what has changed on the disk, and `--resume last-good` resumes without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from toy_stage import files

from errors import DamagedCheckpoint
from training.run.checkpoint import MANIFEST, write_manifest
from training.run.log import read_metrics
from training.run.resume import verify


def flip(path: Path) -> None:
    """One bit in the middle, which no length shows."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"flip": flip, "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]), "lose": Path.unlink}


@pytest.fixture
def trained(make):
    """A run that was stopped at step 6, with checkpoints of steps 4 and 6."""
    trainer = make(max_steps=8, save_every=2)
    trainer.run()
    shutil.rmtree(trainer.out / "final")
    return trainer


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "mtp.safetensors", "tokenizer.json", "training/state.safetensors", "training/progress.json"],
)
def test_any_damage_to_any_file_is_found_and_named(name, damage, checkpoint):
    verify(checkpoint)
    DAMAGES[damage](checkpoint / name)
    with pytest.raises(DamagedCheckpoint) as caught:
        verify(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint / name}: damaged or cut short") and "\n" not in str(caught.value)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_offered(trained, make):
    flip(trained.out / "step-6" / "model.safetensors")
    with pytest.raises(DamagedCheckpoint) as caught:
        make(max_steps=8, save_every=2, resume=True).run()
    message = str(caught.value)
    assert message.startswith(f"{trained.out / 'step-6' / 'model.safetensors'}: damaged")
    assert message.endswith(f"--resume last-good continues from the one before it, {trained.out / 'step-4'}")
    assert caught.value.exit_code == 3 and "\n" not in message


def test_last_good_goes_on_from_the_one_before_it_to_the_same_end(trained, make, capsys):
    whole = make("whole", max_steps=8, save_every=2)
    whole.run()
    flip(trained.out / "step-6" / "training" / "state.safetensors")
    make(max_steps=8, save_every=2, resume="last-good").run()
    assert "set aside as " in capsys.readouterr().err
    assert files(trained.out / "final") == files(whole.out / "final")
    assert [entry["step"] for entry in read_metrics(trained.out / "metrics.jsonl")] == list(range(9))
    names = sorted(path.name for path in trained.out.iterdir() if path.is_dir())
    assert names == ["damaged-step-6", "final", "step-4", "step-6"]
    make(max_steps=8, save_every=2, resume="last-good").run()


def test_a_whole_state_that_does_not_fit_is_not_called_damaged_by_last_good(trained, make):
    """Its checksums are right, so `last-good` would come to it again: what is offered instead works."""
    newest = trained.out / "step-6"
    path = newest / "training" / "state.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("|exp_avg"))
    state[name] = state[name].flatten()[:3]
    save_file(state, path)
    (newest / MANIFEST).unlink()
    write_manifest(newest)
    for resume in (True, "last-good"):
        with pytest.raises(DamagedCheckpoint) as caught:
            make(max_steps=8, save_every=2, resume=resume).run()
        message = str(caught.value)
        assert message.startswith(f"{path}: does not fit the model") and "last-good" not in message
        assert message.endswith(f"the settings that the run began with, or move {newest} elsewhere and use --resume")
    assert newest.is_dir() and not list(trained.out.glob("damaged-*"))
    newest.rename(trained.out.parent / "elsewhere")
    assert make(max_steps=8, save_every=2, resume=True).run() == trained.out / "final"


def test_without_an_older_checkpoint_nothing_is_offered(trained, make):
    shutil.rmtree(trained.out / "step-4")
    flip(trained.out / "step-6" / "model.safetensors")
    with pytest.raises(DamagedCheckpoint, match="no older checkpoint is there; choose another --out"):
        make(max_steps=8, save_every=2, resume=True).run()


def test_a_checkpoint_from_before_there_were_checksums_is_taken(trained, make):
    (trained.out / "step-6" / MANIFEST).unlink()
    assert make(max_steps=8, save_every=2, resume=True).run() == trained.out / "final"


NO_MANIFESTS = [
    "[1, 2]",
    "[" * 30_000,
    '{"../other": {"bytes": 1, "xxh3_128": ""}}',
    '{"/etc/passwd": {"bytes": 1, "xxh3_128": ""}}',
]


@pytest.mark.parametrize("content", NO_MANIFESTS, ids=["list", "deep", "parent", "absolute"])
def test_a_manifest_that_is_no_manifest_is_damage(checkpoint, content):
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: cannot be read"):
        verify(checkpoint)
