"""Runs that are killed and resumed end as if nobody had disturbed them. tests/checks/chaos.py does more of the same."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from chaos import Attack, half_written
from conftest import call_main
from forked import Forked, ForkedRanks, start_ranks
from victim import differences, stage_command, write_recipes

import dpo_train
import full_sft
import grpo_train
import pretrain
from training.run import checkpoint

MAINS = {"pretrain": pretrain.main, "sft": full_sft.main, "dpo": dpo_train.main, "grpo": grpo_train.main}


class ForkedStage:
    """What tests/checks/chaos.py starts as scripts, in processes forked from this one."""

    def __init__(self, stage: str, base: Path, ranks: int, folder: Path) -> None:
        self.call, self.ranks, self.folder = [MAINS[stage], *stage_command(stage, base, ranks).options], ranks, folder

    def start(self, out: Path) -> Forked | ForkedRanks:
        call = [*self.call, "--out", out, "--resume", "true"]
        if self.ranks == 1:
            return Forked(lambda: call_main(*call), self.folder / "said.log")
        return ForkedRanks(start_ranks(self.ranks, lambda rank: call_main(*call), self.folder))


@pytest.fixture
def base(world, tokenizer_folder, pretrained, tmp_path) -> Path:
    """What all stages begin with, and shorter recipes for them."""
    base = tmp_path / "base"
    base.mkdir()
    write_recipes(base, max_steps=8, save_every=2)
    for name, folder in {"world": world, "tokenizer": tokenizer_folder, "pretrain": pretrained}.items():
        (base / name).symlink_to(folder)
    return base


@pytest.mark.parametrize(("stage", "ranks"), [("pretrain", 2), ("grpo", 1)])
def test_a_stage_survives_a_kill(stage, ranks, base, tmp_path):
    """Each does, on one rank and on two, in make chaos."""
    attack = Attack(ForkedStage(stage, base, ranks, tmp_path), tmp_path, seed=f"0 {stage} {ranks}")
    _, found = attack.run(kills=1)
    assert attack.kills == 1 and not found


@pytest.fixture
def attack(base, tmp_path) -> Attack:
    return Attack(ForkedStage("pretrain", base, 1, tmp_path), tmp_path, seed="0")


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(attack, monkeypatch, tmp_path):
    """The attack aims at saves only, until one is hit."""
    flush = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (time.sleep(0.02), flush(path))[1])  # a slow disk
    monkeypatch.setattr("chaos.AIMED", 1.0)
    runs, found = attack.run(kills=2)
    assert attack.in_saves >= 1 and not found
    assert not any(half_written(tmp_path / f"killed-{run}") for run in range(runs))


def test_what_an_earlier_kill_left_is_no_save_of_this_one(tmp_path):
    (tmp_path / ".step-2.partial").mkdir()
    left = half_written(tmp_path)
    assert left and not half_written(tmp_path) - left
    (tmp_path / ".step-2.partial").rmdir()
    (tmp_path / ".step-2.partial").mkdir()
    assert half_written(tmp_path) - left


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
