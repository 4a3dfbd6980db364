"""A run knows its own data again: other data of the same size do not continue it, older runs resume all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import write

import grpo_train
import pretrain
from dataset import ChatDataset, PretrainDataset, PromptDataset
from text.corpus.shard_set import ShardSet, read_index
from text.corpus.shards import prepare_shards
from training.run.checkpoint import write_manifest
from training.run.progress import read_progress


def corpus(file: Path, more: int = 0) -> str:
    """Stories of as many tokens, whatever `more` adds to a number: a digit is a token."""
    return write(file, [{"text": f"Story {n} tells of a cat and {(n + more) % 9} mice. " * 3} for n in range(60)])


def sums(file: Path, more: int = 0) -> str:
    return write(file, [{"question": f"{number} + {number}?", "answer": 2 * number + more} for number in range(40)])


def forget_content(folder: Path) -> None:
    """Make a checkpoint one of a version that did not write the content of its data down."""
    path = folder / "training" / "progress.json"
    progress = json.loads(path.read_text(encoding="utf8"))
    assert progress["run"].pop("data.content")
    path.write_text(json.dumps(progress, indent=2), encoding="utf8")
    write_manifest(folder)


@pytest.fixture
def stages(run, pretrained: Path, pretrain_arguments: list[str], tmp_path: Path):
    """For pretraining and reinforcement learning: what writes data, and what trains `steps` on them."""

    def pretrained_on(data: str, steps: int, *more: str):
        given = [*pretrain_arguments, "--data", data, "--shards", tmp_path / "shards", "--val_fraction", 0]
        return run(pretrain.main, *given, "--out", tmp_path / "pretrain", "--max_steps", steps, *more)

    def reinforced_on(data: str, steps: int, *more: str):
        given = ["--ckpt", pretrained / "final", "--data", data, "--sequence_length", 48, "--max_new_tokens", 4]
        given += ["--prompts", 2, "--group", 2, "--val_problems", 0, "--device", "cpu", "--dtype", "fp32"]
        return run(grpo_train.main, *given, "--max_steps", steps, "--out", tmp_path / "grpo", *more)

    return {"pretrain": (corpus, pretrained_on), "grpo": (sums, reinforced_on)}


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_other_data_of_the_same_size_do_not_continue_a_run(stage, stages, tmp_path):
    """An older run, which did not write its content down, resumes all the same, and knows its data from then on."""
    make, train = stages[stage]
    data = make(tmp_path / "data.jsonl")
    assert train(data, 1).code == 0
    make(tmp_path / "data.jsonl", 1)
    refused = train(data, 2, "--resume")
    assert refused.code == 2 and ": the data changed (as many before and now, other content); " in refused.err
    assert refused.err.endswith("; a run cannot change it midway, a new one can: --ckpt DIR in place of --resume\n")
    make(tmp_path / "data.jsonl")
    forget_content(tmp_path / stage / "final")
    assert train(data, 2, "--resume").code == 0
    assert read_progress(tmp_path / stage / "final").run["data.content"]
    assert train(data, 3, "--resume").code == 0


def test_the_content_of_shards_is_that_of_their_index(tokenizer, tmp_path):
    made = [
        prepare_shards(corpus(tmp_path / f"{more}.jsonl", more), tokenizer, tmp_path / f"{more}", workers=1)
        for more in (0, 1)
    ]
    content = [PretrainDataset([(shards, 1.0)], 16).content for shards in made]
    assert content[0] != content[1]
    again = prepare_shards(str(tmp_path / "0.jsonl"), tokenizer, tmp_path / "again", workers=1)
    assert again.content == made[0].content
    for file in (tmp_path / "0").glob("*.bin"):
        file.unlink()
    assert ShardSet(tmp_path / "0", read_index(tmp_path / "0")).content == made[0].content


def test_data_of_the_same_size_differ(tokenizer, tmp_path):
    """Of generators, and of conversations: the data's, or out of a teacher's answers that distillation trains on."""
    for one, other in (("arithmetic:1", "arithmetic:2"), ("arithmetic:1-2", "arithmetic:1-3")):
        first, second = (PromptDataset([(name, 1.0)], tokenizer, 64) for name in (one, other))
        assert first.identity == second.identity and first.content != second.content
        assert first.content == PromptDataset([(one, 1.0)], tokenizer, 64, seed=3).content
    rows = {word: [{"instruction": "Say it.", "output": word}] for word in ("aaaa", "bbbb")}
    first, second = (ChatDataset([write(tmp_path / f"{word}.jsonl", rows[word])], tokenizer, 64) for word in rows)
    assert len(first) == len(second) and first.identity != second.identity
