"""A stage in FP8: from a command line to a checkpoint, resumed, on two ranks, and what it does not go with."""

from __future__ import annotations

import shutil

import pytest
from conftest import as_options
from demo_settings import STAGES, read, settings_of
from forked import on_ranks
from toy_stage import files
from victim import differences

import pretrain
from cli import parse
from errors import UserError
from model import MiniDeepSeek
from model.fp8 import FP8Experts, FP8Linear
from training.parallel.dist_settings import DistSettings
from training.parallel.ranks import Ranks
from training.run.log import read_metrics


def test_a_run_in_fp8_with_a_growing_batch_leaves_an_ordinary_checkpoint(pretrain_arguments, tmp_path, run):
    given = ["--fp8", "ue8m0", "--batch_tokens", '{"0": 512, "0.5": 1024}', "--gradient_checkpointing", "true"]
    done = run(pretrain.main, *pretrain_arguments, *given, "--max_steps", 2, "--out", tmp_path)
    assert done.code == 0 and "matrices in E4M3, scales UE8M0, emulated" in done.out
    logged = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["tokens"] for entry in logged] == [0, 512, 1536]
    assert logged[2]["val_bits_per_byte"] < logged[0]["val_bits_per_byte"]
    saved = MiniDeepSeek.from_pretrained(tmp_path / "final")
    assert not any(isinstance(module, (FP8Linear, FP8Experts)) for module in saved.modules())


def test_a_resume_in_fp8_is_exact_and_without_it_nothing_changes(make):
    whole, none, plain = make("whole", fp8=True, save_every=2), make("none", fp8=False), make("plain")
    for trainer in (whole, none, plain):
        trainer.run()
    again = make(fp8=True, save_every=2, resume=True)
    shutil.copytree(whole.out, again.out, ignore=shutil.ignore_patterns("final"))
    again.run()
    assert not differences(again.out, whole.out)
    assert files(none.out / "final") == files(plain.out / "final") != files(whole.out / "final")
    losses = [[entry["loss"] for entry in read_metrics(trainer.out / "metrics.jsonl")] for trainer in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]


def test_ranks_train_in_fp8_together(make, tmp_path):
    def train(rank: int) -> None:
        dist = DistSettings(timeout=20.0, check_every=1)
        make(ranks=Ranks.start("cpu", timeout=20.0), fp8=True, max_steps=2, dist=dist).run()

    assert [rank.code for rank in on_ranks(2, train, tmp_path)] == [0, 0]
    make("alone", fp8=True, max_steps=2).run()
    together, alone = (read_metrics(tmp_path / out / "metrics.jsonl")[-1] for out in ("run", "alone"))
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3)


@pytest.mark.parametrize("script", STAGES)
def test_stages_that_predict_given_text_take_it(script):
    given = as_options({"out": "o", "data": "d", "ckpt": "c"} | ({"teacher": "t"} if script == "distill" else {}))
    if script in ("pretrain", "full_sft", "distill"):
        assert parse(settings_of(script), "", [*given, "--fp8"]).fp8 is True
    else:
        with pytest.raises(UserError, match=r"there is no --fp8 here"):
            parse(settings_of(script), "", [*given, "--fp8"])
    assert parse(settings_of(script), "", given).fp8 is False


def test_what_it_does_not_go_with_is_one_line():
    assert [read("--fp8", *given).fp8 for given in ([], ["true"], ["false"], ["ue8m0"])] == [True, True, False, "ue8m0"]
    with pytest.raises(UserError, match=r"--fp8: does not go with --compile true; leave one of them out"):
        read("--fp8", "--compile", "true")
    with pytest.raises(UserError, match="e5m2"):
        read("--fp8", "e5m2")
