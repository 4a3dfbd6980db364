"""Nodes without a common disk: rank 0 decides what is there, and a rank that cannot see it ends all in one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import call_main
from forked import Forked, on_ranks
from safetensors.torch import load_file

import dpo_train
import pretrain
import training.parallel.group
from errors import command_line
from training.parallel.ranks import Ranks


@pytest.fixture
def apart(tmp_path, monkeypatch) -> Callable[..., list[Forked]]:
    """`apart(work)`: two ranks, each in a working folder of its own, node-0 and node-1, as on two nodes."""
    monkeypatch.setattr(training.parallel.group, "LAG", 0.2)  # seconds

    def call(work: Callable[[int], object]) -> list[Forked]:
        def on_node(rank: int) -> object:
            node = tmp_path / f"node-{rank}"
            node.mkdir(exist_ok=True)
            os.chdir(node)
            return work(rank)

        return on_ranks(2, on_node, tmp_path)

    return call


def assert_all_say(ranks: list[Forked], place: str) -> None:
    """The same one line, on every node."""
    said = f"error: {place}: rank 1 does not see there what rank 0 sees; needs a folder that all nodes share"
    for rank in ranks:
        assert rank.code == 2 and "Traceback" not in rank.output(), rank.output()
        assert rank.output().strip().splitlines()[-1] == said, rank.output()


def assert_fine(ranks: list[Forked]) -> None:
    assert [rank.code for rank in ranks] == [0, 0], "".join(rank.output() for rank in ranks)


@pytest.fixture
def train(make, apart, monkeypatch) -> Callable[..., list[Forked]]:
    """`train(**options)`: a run into the relative folder `run` of each node."""
    monkeypatch.setattr(make, "folder", Path())
    return lambda **options: apart(
        lambda rank: command_line(make(ranks=Ranks.start("cpu", timeout=20.0), save_every=2, **options).run)
    )


def test_a_fresh_run_needs_no_common_disk_and_a_resume_sees_one_checkpoint_on_all_nodes(train, tmp_path):
    assert_fine(train(max_steps=2))
    run, other = (tmp_path / f"node-{rank}" / "run" for rank in (0, 1))
    assert (run / "final").is_dir() and not other.exists()
    assert_all_say(train(max_steps=4, resume=True), "run/final")
    shutil.copytree(run, other)
    progress = other / "final" / "training" / "progress.json"  # another checkpoint of the same name
    progress.write_text(progress.read_text(encoding="utf8").replace('"step": 2', '"step": 1'), encoding="utf8")
    assert_all_say(train(max_steps=4, resume=True), "run/final")
    shutil.copy(run / "final" / "training" / "progress.json", progress)
    assert_fine(train(max_steps=4, resume=True))


def test_a_checkpoint_that_is_seen_late_is_waited_for(train, tmp_path, monkeypatch):
    """As on a network file system, where a node remembers for some seconds what it saw."""
    from training.run import resume

    assert_fine(train(max_steps=2))
    shutil.copytree(tmp_path / "node-0" / "run", tmp_path / "node-1" / "run")
    look, looks = resume.contents, []

    def late(folder: Path) -> str | None:
        looks.append(folder)
        return None if len(looks) < 4 and os.environ["RANK"] == "1" else look(folder)

    monkeypatch.setattr(resume, "contents", late)
    monkeypatch.setattr(training.parallel.group, "LAG", 20.0)
    assert_fine(train(max_steps=4, resume=True))


def test_shards_that_only_rank_0_would_see_are_not_made(apart, pretrain_arguments, tmp_path):
    """Said before hours go by on tokenising; shards that each node has are used."""
    arguments = [*pretrain_arguments, "--shards", "shards", "--max_steps", 1, "--dist.timeout", 20, "--out", "run"]
    ranks = apart(lambda rank: call_main(pretrain.main, *arguments))
    assert_all_say(ranks, "shards")
    assert not (tmp_path / "node-0" / "shards").exists()
    assert call_main(pretrain.main, *arguments, "--shards", tmp_path / "made", "--out", tmp_path / "alone") == 0
    for node in ("node-0", "node-1"):
        shutil.copytree(tmp_path / "made", tmp_path / node / "shards", dirs_exist_ok=True)
    assert_fine(apart(lambda rank: call_main(pretrain.main, *arguments)))


def test_a_common_folder_of_shards_is_made_by_one_rank_and_read_by_both(pretrain_arguments, tmp_path, monkeypatch):
    arguments = [*pretrain_arguments, "--shards", tmp_path / "shards", "--out", tmp_path / "run", "--max_steps", 1]
    monkeypatch.setattr(training.parallel.group, "LAG", 5.0)
    assert_fine(on_ranks(2, lambda rank: call_main(pretrain.main, *arguments), tmp_path))
    assert not list((tmp_path / "shards").glob(".*"))


@pytest.mark.parametrize("text", ["", None], ids=["no text", "missing"])
def test_a_corpus_that_is_refused_leaves_nothing_and_is_reported_once(text, pretrain_arguments, tmp_path):
    if text is not None:
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n', encoding="utf8")
    before = {path.name for path in tmp_path.iterdir()}
    arguments = [*pretrain_arguments, "--data", tmp_path / "a.jsonl", "--shards", tmp_path / "data" / "shards"]
    arguments += ["--out", tmp_path / "run", "--max_steps", 1, "--dist.timeout", 20]
    ranks = on_ranks(2, lambda rank: call_main(pretrain.main, *arguments), tmp_path)
    assert [rank.code for rank in ranks] == [2, 2], "".join(rank.output() for rank in ranks)
    assert ("no document is left" if text is not None else "no such file") in ranks[0].output()
    assert "a.jsonl" not in ranks[1].output() and "Traceback" not in ranks[1].output()
    assert {path.name for path in tmp_path.iterdir()} - before == {"rank-0.log", "rank-1.log"}


def test_who_waits_for_shards_ends_when_the_main_rank_is_gone(pretrain_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("text.corpus.shards.prepare_shards", lambda *_, **__: os._exit(7))
    arguments = [*pretrain_arguments, "--shards", tmp_path / "shards", "--out", tmp_path / "run", "--max_steps", 1]
    ranks = on_ranks(2, lambda rank: call_main(pretrain.main, *arguments), tmp_path)
    assert [rank.code for rank in ranks] == [7, 2], ranks[1].output()
    assert "error: rank 1: another rank has ended; its own message says why" in ranks[1].output()


def test_what_the_reference_said_is_looked_for_on_rank_0_alone(apart, pretrained, world, tmp_path):
    """A run that ended before its first checkpoint leaves reference.safetensors on rank 0; both continue with it."""
    lines = (world / "preferences.jsonl").read_text(encoding="utf8").splitlines()[:24]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf8")
    arguments = ["--ckpt", pretrained / "final", "--data", tmp_path / "pairs.jsonl", "--out", "run"]
    arguments += ["--sequence_length", 64, "--batch_tokens", 512, "--micro_tokens", 256, "--val_tokens", 512]
    arguments += ["--max_steps", 1, "--dist.timeout", 20, "--dtype", "fp32", "--device", "cpu"]
    assert_fine(apart(lambda rank: call_main(dpo_train.main, *arguments)))
    first = load_file(tmp_path / "node-0" / "run" / "final" / "model.safetensors")
    shutil.rmtree(tmp_path / "node-0" / "run" / "final")
    before = (tmp_path / "node-0" / "run" / "reference.safetensors").stat().st_mtime_ns
    assert not (tmp_path / "node-1" / "run").exists()
    assert_fine(apart(lambda rank: call_main(dpo_train.main, *arguments, "--resume")))
    again = load_file(tmp_path / "node-0" / "run" / "final" / "model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    assert (tmp_path / "node-0" / "run" / "reference.safetensors").stat().st_mtime_ns == before


def test_a_rank_that_cannot_open_its_data_ends_the_other_in_one_line(apart, pretrained, world, tmp_path):
    (tmp_path / "node-0").mkdir()
    shutil.copy(world / "preferences.jsonl", tmp_path / "node-0")
    arguments = ["--ckpt", pretrained / "final", "--data", "preferences.jsonl", "--out", "run", "--max_steps", 1]
    arguments += ["--device", "cpu", "--dtype", "fp32", "--sequence_length", 64]
    ranks = apart(lambda rank: call_main(dpo_train.main, *arguments))
    assert [rank.code for rank in ranks] == [2, 2] and "preferences.jsonl" in ranks[1].output()
    for rank in ranks:
        assert "Traceback" not in rank.output(), rank.output()
    assert "rank 0: another rank has ended" in ranks[0].output()


def test_one_process_looks_at_nothing():
    Ranks(0, 1, torch.device("cpu")).check_shared(Path("nowhere"), lambda: pytest.fail("looked"))
    Ranks(0, 1, torch.device("cpu")).check_writes_shared(Path("nowhere"))
    assert not Path("nowhere").exists()
