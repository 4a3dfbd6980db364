"""Runs that are killed and taken up again end as if nobody had disturbed them. bench/chaos.py does more of the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chaos import Attack, saving
from conftest import call_main
from forked import Forked
from victim import differences

import pretrain

STEPS = ["--max_steps", 12, "--save_every", 2, "--micro_tokens", 1024, "--log_every", 1]


class ForkedPretraining:
    """pretrain.py in processes forked from this one."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.arguments, self.folder = arguments, folder

    def start(self, out: Path) -> Forked:
        call = [pretrain.main, *self.arguments, *STEPS, "--out", out, "--resume", "true"]
        return Forked(lambda: call_main(*call), self.folder / "said.log")


@pytest.fixture
def attack(pretrain_arguments, pretrained, tmp_path) -> Attack:
    return Attack(ForkedPretraining(pretrain_arguments, tmp_path), tmp_path, seed="0")


def test_killed_runs_end_as_if_nobody_had_disturbed_them(attack):
    runs, found = attack.run(kills=3)
    assert runs >= 1 and attack.kills == 3 and not found


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(attack, monkeypatch, tmp_path):
    """The attack aims at saves only, until one is hit."""
    monkeypatch.setattr("chaos.AIMED", 1.0)
    runs, found = attack.run(kills=2)
    assert attack.in_saves >= 1 and not found
    assert not any(saving(tmp_path / f"killed-{run}") for run in range(runs))


def test_differences_are_found(attack, tmp_path):
    """What says that there are none must be able to say that there are."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert attack.command.start(one).wait(60) == 0
    shutil.copytree(one, other)
    assert not differences(one, other)
    state = other / "final" / "training" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    progress = other / "final" / "training" / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "tokens": 1}))
    (other / "final" / "config.json").unlink()
    found = differences(one, other)
    assert len(found) == 3 and "config.json" in found[0] and "progress.json: tokens" in found[1]
    assert "state.safetensors" in found[2]
