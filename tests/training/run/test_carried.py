"""--carry_optimizer: a new run begins with the moments of the checkpoint whose weights it begins with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dpo_train
import pretrain
from model import MiniDeepSeek
from training.optim.build import OptimSettings, build_optimizer, state_tensors
from training.run.log import read_metrics
from training.run.state import carry_optimizer


@pytest.fixture
def given(pretrained, pretrain_arguments) -> list[object]:
    """A run that begins with the weights of `pretrained`."""
    return [*pretrain_arguments, "--ckpt", pretrained / "final", "--optim.warmup", 0.5]


def test_moments_and_their_counts_are_those_of_the_checkpoint(pretrained):
    model = MiniDeepSeek.from_pretrained(pretrained / "final")
    optimizer = build_optimizer(model, OptimSettings())
    line = carry_optimizer(pretrained / "final", model, optimizer)
    saved, carried = load_file(pretrained / "final" / "training" / "state.safetensors"), state_tensors(optimizer, model)
    assert saved.keys() == carried.keys() and all(torch.equal(saved[name], carried[name]) for name in saved)
    count = len(list(model.parameters()))
    assert line.startswith(f"optimizer  moments of {count} of {count} weights from ")


def test_frozen_weights_get_no_state_and_new_ones_begin_without(pretrained):
    """As in the MTP chain of preference learning, or one that the other run had not trained yet."""
    model = MiniDeepSeek.from_pretrained(pretrained / "final")
    model.mtp.requires_grad_(False)
    optimizer = build_optimizer(model, OptimSettings())
    carry_optimizer(pretrained / "final", model, optimizer)
    assert optimizer.state and not any(name.startswith("mtp.") for name in state_tensors(optimizer, model))


def test_schedule_and_step_begin_again_and_a_resume_is_exact(given, run, tmp_path):
    options = [*given, "--carry_optimizer", "--max_steps", 4, "--save_every", 2, "--keep", 9]
    whole = run(pretrain.main, *options, "--out", tmp_path / "whole")
    assert whole.code == 0 and whole.out.count("step and schedule start again") == 1, whole.err
    first, second = (entry for entry in read_metrics(tmp_path / "whole" / "metrics.jsonl") if entry["step"] in (1, 2))
    assert first["lr"] == pytest.approx(second["lr"] / 2)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(tmp_path / "whole" / "step-2", cut / "step-2")
    assert "start again" not in run(pretrain.main, *options, "--out", cut, "--resume").out
    assert run(pretrain.main, *given, "--max_steps", 4, "--out", tmp_path / "cold").code == 0
    final = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "cut", "cold")]
    assert final[0] == final[1] != final[2]


def test_preference_learning_takes_the_option_too(pretrained, world, run, tmp_path):
    options = ["--data", world / "preferences.jsonl", "--sequence_length", 128, "--max_steps", 1, "--dtype", "fp32"]
    done = run(dpo_train.main, "--ckpt", pretrained / "final", *options, "--out", tmp_path, "--carry_optimizer")
    assert done.code == 0 and "optimizer  moments of" in done.out, done.err


def no_state(folder: Path) -> None:
    shutil.rmtree(folder / "training")


def muon(folder: Path) -> None:
    path = folder / "training" / "progress.json"
    progress = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps({**progress, "run": {**progress["run"], "optim.kind": "muon"}}), encoding="utf8")


def other_shape(folder: Path) -> None:
    path = folder / "training" / "state.safetensors"
    state = load_file(path)
    save_file({**state, "model.norm.weight|exp_avg": torch.zeros(3)}, path)


def other_names(folder: Path) -> None:
    save_file({"model.strange|exp_avg": torch.zeros(3)}, folder / "training" / "state.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_state, "has no training state to carry on; name a checkpoint of a run, or leave --carry_optimizer out"),
        (muon, "its optimizer is muon, this run's adamw; give --optim.kind muon, or leave --carry_optimizer out"),
        (other_shape, "does not fit this run (model.norm.weight|exp_avg is torch.float32 of shape (3,))"),
        (other_names, "does not fit this run (it has model.strange); leave --carry_optimizer out"),
    ],
)
def test_a_state_that_is_not_there_or_does_not_fit_is_refused(
    change, message, checkpoint, pretrain_arguments, run, tmp_path
):
    change(checkpoint)
    options = ["--ckpt", checkpoint, "--out", tmp_path / "out", "--max_steps", 1, "--carry_optimizer"]
    refused = run(pretrain.main, *pretrain_arguments, *options)
    assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_without_a_checkpoint_it_is_refused(pretrain_arguments, run, tmp_path):
    refused = run(pretrain.main, *pretrain_arguments, "--out", tmp_path / "out", "--carry_optimizer")
    assert refused.code == 2 and "--carry_optimizer: takes the state beside the weights of --ckpt" in refused.err
