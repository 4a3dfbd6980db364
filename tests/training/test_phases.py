"""A context that is extended phase by phase: what each phase trains with, where it begins, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import call_main
from forked import on_ranks
from safetensors.torch import load_file

import pretrain
from cli import parse
from LMConfig import LMConfig
from model import MiniDeepSeek
from training.phases import phase_settings
from training.run.log import read_metrics

# Those of `pretrained` have 64 tokens.
PHASES = [{"times": 2, "max_steps": 2}, {"times": 4, "max_steps": 4, "batch_tokens": 512}]


def recipe(path: Path, **changes: Any) -> Path:
    optim = {"warmup": 0.0, "decay_from": 1.0}
    rest = dict(sequence_length=64, micro_tokens=512, batch_tokens=1024, dtype="fp32", device="cpu", log_every=1)
    rest |= dict(val_fraction=0.1, val_tokens=512, workers=1, save_every=2, keep=9, carry_optimizer=True, optim=optim)
    path.write_text(yaml.safe_dump({**rest, "phases": PHASES, **changes}), encoding="utf8")
    return path


@pytest.fixture(scope="session")
def words(pretrain_arguments, pretrained, tmp_path_factory) -> list[str]:
    """The command line but for --out; documents of any length, for those of the small world are short."""
    given = dict(zip(pretrain_arguments[2::2], pretrain_arguments[3::2], strict=True))
    file = recipe(tmp_path_factory.mktemp("phases") / "extend.yaml")
    common = ["--data", given["--data"], "--shards", given["--shards"], "--ckpt", str(pretrained / "final")]
    return ["--config", str(file), *common, "--min_chars", "1"]


@pytest.fixture(scope="session")
def extended(once, words) -> Path:
    """OUT of both phases, to their end."""

    def make(folder: Path) -> None:
        assert call_main(pretrain.main, *words, "--out", folder / "out") == 0

    return once("extended", make) / "out"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_both_phases_have_the_last_ones_factor_and_the_last_learning_rate_of_pretraining(extended, pretrained):
    last = read_metrics(pretrained / "metrics.jsonl")[-1]["lr"]
    for number, (length, steps, rows) in enumerate([(128, 2, 8), (256, 4, 2)], 1):
        out = extended / f"phase{number}"
        config = LMConfig.from_pretrained(out / "final")
        assert config.max_position_embeddings == 256
        assert (config.rope_scaling["factor"], config.rope_scaling["original_max_position_embeddings"]) == (4, 64)
        entries = [entry for entry in read_metrics(out / "metrics.jsonl") if entry["step"]]
        assert [entry["lr"] for entry in entries] == [last] * steps
        assert entries[0]["tokens"] == rows * length
        settings = yaml.safe_load((out / "config.yaml").read_text(encoding="utf8"))
        assert settings["sequence_length"] == length and settings["phases"] == []
    assert settings["ckpt"] == str(extended / "phase1" / "final")


@torch.no_grad()
def test_transformers_reads_the_stages_config_with_the_same_logits(extended, open_silently):
    ours = MiniDeepSeek.from_pretrained(extended / "phase2" / "final")
    ids = torch.randint(4, 600, (1, 250))
    expected = open_silently(extended / "phase2" / "final")(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=1e-4)
    ours = MiniDeepSeek(ours.config.continued({"rope_scaling": None}, "")).eval()
    ours.load_state_dict(MiniDeepSeek.from_pretrained(extended / "phase2" / "final").state_dict())
    assert (ours(ids).logits - expected).abs().max() > 0.1  # which another config.json would not give


def test_resume_continues_the_phase_that_was_interrupted_to_the_bit(extended, words, run, tmp_path):
    out = Path(shutil.copytree(extended, tmp_path / "out"))
    (out / "phase2" / "step-4").exists() and shutil.rmtree(out / "phase2" / "step-4")
    shutil.rmtree(out / "phase2" / "final")
    refused = run(pretrain.main, *words, "--out", out)
    assert refused.code == 2 and "phase1: holds a run already" in refused.err
    done = run(pretrain.main, *words, "--out", out, "--resume")
    assert done.code == 0, done.err
    assert "phase1: complete" in done.out and "phase2/step-2" in done.out
    before, after = weights(extended / "phase2" / "final"), weights(out / "phase2" / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (out / "phase1" / "metrics.jsonl").read_bytes() == (extended / "phase1" / "metrics.jsonl").read_bytes()
    # Before phase 2 has begun, phase 1 is what --resume continues.
    shutil.rmtree(out / "phase2")
    shutil.rmtree(out / "phase1" / "final")
    assert run(pretrain.main, *words, "--out", out, "--resume").code == 0
    after = weights(out / "phase2" / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_ranks_train_both_phases(extended, words, tmp_path):
    done = on_ranks(2, lambda rank: call_main(pretrain.main, *words, "--out", tmp_path / "out"), tmp_path)
    assert [rank.code for rank in done] == [0, 0], "".join(rank.output() for rank in done)
    one, two = (read_metrics(out / "phase2" / "metrics.jsonl")[-1] for out in (extended, tmp_path / "out"))
    assert two["step"] == 4 and two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


def test_the_command_line_wins_over_phases_and_these_over_what_the_run_of_the_checkpoint_did(
    words, pretrained, monkeypatch, tmp_path
):
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf8"))
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "isolate": True}), encoding="utf8")

    def planned(*given: object) -> list[pretrain.PretrainSettings]:
        line = [*words, "--ckpt", str(run / "final"), "--out", str(tmp_path / "out"), *map(str, given)]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *line])
        return phase_settings(parse(pretrain.PretrainSettings, ""))

    assert [phase.isolate for phase in planned()] == [True, True]
    assert [phase.batch_tokens for phase in planned()] == [1024, 512]
    first, second = planned("--isolate", "false", "--max_steps", 9, "--optim.lr", 1e-5)
    assert not first.isolate and not second.isolate
    assert (first.max_steps, second.max_steps, second.optim.lr) == (9, 9, 1e-5)


BAD = {
    "no times": ([{"max_steps": 2}], [], "phases[0]: {'max_steps': 2} says not how many times"),
    "not longer": ([{"times": 4}, {"times": 2}], [], "phases: times 4, 2; each must be above the one before"),
    "misspelled": ([{"times": 2}, {"times": 4, "max_step": 2}], [], "phases[1]: pretrain.py: there is no --max_step"),
    "another's": ([{"times": 2, "out": "x"}], [], "phases[0].out: is not a phase's to set; leave it out"),
    "no row fits": ([{"times": 2}, {"times": 32}], [], "phases[1]: --batch_tokens 1024: less than one row of 2048"),
    "a length": (PHASES, ["--sequence_length", "99"], "--sequence_length: follows from 'times' of the phases"),
    "a factor": (PHASES, ["--model.rope_scaling", "null"], "--model.rope_scaling: follows from 'times'"),
    "no long document": (PHASES, ["--min_chars", "100000"], "shorter than 100000 characters"),
    "no checkpoint": (PHASES, ["--ckpt", ""], "--phases: a trained model's context is extended; give --ckpt DIR"),
}


@pytest.mark.parametrize("phases, given, message", BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_before_the_first_phase(phases, given, message, words, run, tmp_path):
    shards = ["--shards", tmp_path / "shards"] if "--min_chars" in given else []
    refused = run(pretrain.main, "--config", recipe(tmp_path / "r.yaml", phases=phases), *words[2:], *shards,
                  "--out", tmp_path / "out", *given)  # fmt: skip
    assert refused.code == 2 and message in refused.err, refused.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_tells_nothing_needs_a_learning_rate_and_an_extended_one_is_refused(
    words, checkpoint, run, extended, tmp_path
):
    lonely = run(pretrain.main, *words, "--out", tmp_path / "out", "--ckpt", checkpoint)
    assert lonely.code == 2 and "give --optim.lr" in lonely.err
    again = run(pretrain.main, *words, "--out", tmp_path / "out", "--ckpt", extended / "phase1" / "final")
    assert again.code == 2 and "phase1/final: extended already, by 4; name a checkpoint that was not" in again.err


def test_documents_shorter_than_a_row_are_left_out_unless_said_otherwise(words, run, tmp_path):
    data = tmp_path / "books.jsonl"
    lines = [json.dumps({"text": f"{n} " * 400}) for n in range(90)] + [json.dumps({"text": "short"})] * 3
    data.write_text("\n".join(lines), encoding="utf8")
    given = [*words[:-2], "--data", data, "--shards", tmp_path / "shards", "--out", tmp_path / "out", "--max_steps", 1]
    done = run(pretrain.main, *given, "--phases", json.dumps(PHASES[:1]))
    assert done.code == 0, done.err
    assert "documents of 128 characters and more" in done.out and "shorter than 128 characters" in done.out
