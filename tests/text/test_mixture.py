"""Mixtures by weight: exact shares, each source through its own epochs, the same for the same seed and index."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_files import write

import distill
import dpo_train
import full_sft
import grpo_train
import pretrain
import text.chats.packed_dataset
from dataset import ChatDataset, PreferenceDataset
from errors import UserError
from text.order import BLOCK
from text.sources.registry import Source
from training.alignment.preference import whole
from training.alignment.reference import reference_log_probs
from training.run.log import read_metrics

LENGTH = 48


def chats(word: str, count: int) -> list[dict]:
    return [{"instruction": f"{word}{n}", "output": word * (1 + n % 5)} for n in range(count)]


def pairs(word: str, count: int) -> list[dict]:
    return [
        {"prompt": f"{word}{n}", "chosen": word * (1 + n % 3), "rejected": "不" * (1 + n % 4)} for n in range(count)
    ]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("chats")
    return write(folder / "a.jsonl", chats("甲", 90)), write(folder / "b.jsonl", chats("乙", 40))


def mixture(paths, tokenizer, seed: int = 0, **options) -> ChatDataset:
    sources = [Source.of((path, weight)) for path, weight in zip(paths, (3.0, 1.0), strict=True)]
    return ChatDataset(sources, tokenizer, LENGTH, seed, progress=False, **options)


def owner(data, index: int) -> int:
    """The one source of a row."""
    (found,) = set((data.chats if isinstance(data, ChatDataset) else data.pairs).owners[data.members(index)].tolist())
    return found


def test_rows_of_one_source_each_in_exactly_the_shares_of_the_weights_and_its_own_epochs(paths, tokenizer):
    data = mixture(paths, tokenizer)
    for block in (0, 3):
        owners = [owner(data, index) for index in range(block * BLOCK, (block + 1) * BLOCK)]
        assert owners.count(0) == 3 * BLOCK // 4 and owners.count(1) == BLOCK // 4
        assert 0.7 < owners[: BLOCK // 8].count(0) / (BLOCK // 8) < 0.8  # mixed, not one after the other
    # After a block every conversation of a source was shown as often as any other of it, give or take one epoch.
    seen = Counter(int(member) for index in range(BLOCK) for member in data.members(index))
    assert len(seen) == len(data.chats) == 130
    for source in (0, 1):
        counts = [count for member, count in seen.items() if data.chats.owners[member] == source]
        assert max(counts) - min(counts) <= 1 and min(counts) > 50


def test_a_row_depends_on_seed_and_index_alone(paths, tokenizer):
    data, again, other = (mixture(paths, tokenizer, seed) for seed in (0, 0, 1))
    indices = [5 * BLOCK + 1, 0, 17, BLOCK, 3]
    for index in sorted(indices):
        again.batch([index])
    assert all(torch.equal(value, again.batch(indices)[name]) for name, value in data.batch(indices).items())
    assert [owner(data, index) for index in range(64)] != [owner(other, index) for index in range(64)]


def test_without_weights_the_sources_are_all_of_the_data(paths, tokenizer, tmp_path):
    both = write(tmp_path / "both.jsonl", chats("甲", 90) + chats("乙", 40))
    one, two = (ChatDataset(files, tokenizer, LENGTH, seed=3, progress=False) for files in ([both], paths))
    only = ChatDataset([Source.of((both, 5.0))], tokenizer, LENGTH, seed=3, progress=False)
    rows = range(2 * len(one))
    assert len(one) == len(two) == len(only)
    for name, value in one.batch(rows).items():
        assert torch.equal(value, two.batch(rows)[name]) and torch.equal(value, only.batch(rows)[name])


def test_what_is_held_out_of_a_mixture_is_shown_once_and_never_trained_on(paths, tokenizer):
    data = mixture(paths, tokenizer, val_fraction=0.2)
    held = [int(member) for index in range(len(data.validation)) for member in data.validation.members(index)]
    trained = {int(member) for index in range(BLOCK) for member in data.members(index)}
    assert len(held) == len(set(held)) and not set(held) & trained and len(held) + len(trained) == 130


def test_a_source_of_which_nothing_is_left_is_named(paths, tokenizer, tmp_path):
    long = write(tmp_path / "long.jsonl", [{"instruction": "Q", "output": "长" * 200}])
    with pytest.raises(UserError, match=r"long.jsonl: nothing of it is left to train on"):
        mixture((paths[0], long), tokenizer)
    assert len(ChatDataset([paths[0], long], tokenizer, LENGTH, progress=False)) > 0  # no mixture: the rest is enough


def test_rows_are_packed_once_an_epoch_however_a_mixture_jumps(paths, tokenizer, monkeypatch):
    packed, pack = [], text.chats.packed_dataset.pack_best_fit

    def counted(lengths: np.ndarray, capacity: int) -> list[list[int]]:
        packed.append(len(lengths))
        return pack(lengths, capacity)

    monkeypatch.setattr(text.chats.packed_dataset, "pack_best_fit", counted)
    data = mixture(paths, tokenizer)
    for index in range(BLOCK):
        data.members(index)
    epochs = sum(BLOCK * share // 4 // rows + 1 for share, rows in zip((3, 1), data._lengths, strict=True))
    assert len(packed) <= epochs


@pytest.fixture(scope="module")
def pair_paths(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    return write(folder / "a.jsonl", pairs("甲", 60)), write(folder / "b.jsonl", pairs("乙", 30))


def pair_mixture(paths, tokenizer) -> PreferenceDataset:
    sources = [Source.of((path, weight)) for path, weight in zip(paths, (1.0, 3.0), strict=True)]
    return PreferenceDataset(sources, tokenizer, LENGTH, val_fraction=0.2)


def test_pairs_are_mixed_by_weight_too(pair_paths, tokenizer):
    data, again = pair_mixture(pair_paths, tokenizer), pair_mixture(pair_paths, tokenizer)
    assert sum(owner(data, index) for index in range(BLOCK)) == 3 * BLOCK // 4
    batch = data.batch([7, BLOCK + 1])
    assert all(torch.equal(batch[name], value) for name, value in again.batch([7, BLOCK + 1]).items())


def test_the_reference_is_asked_about_every_pair_of_a_mixture(pair_paths, tokenizer, tiny_model):
    """A rare source's pairs too, and the held-out ones, each once, whatever the weights."""
    from training.parallel.ranks import Ranks

    data, model = pair_mixture(pair_paths, tokenizer), tiny_model(vocab_size=600)
    log_probs = reference_log_probs(whole(model), data, 4, torch.float32, Ranks(0, 1, torch.device("cpu")))
    assert (log_probs[data.pairs.mask.astype(bool)] < 0).all()


# Through the real scripts


@pytest.fixture(scope="module")
def registry(world, tmp_path_factory) -> Path:
    """The small world under names."""
    folder = tmp_path_factory.mktemp("registry")
    problems = [{"aufgabe": f"{n}+1=?", "loesung": str(n + 1)} for n in range(40)]
    entries = {
        "words": {"path": str(world / "pretrain.csv"), "format": "text", "samples": 120},
        "fewer": {"path": str(world / "pretrain.csv"), "format": "text", "samples": 60},
        "more": {"path": write(folder / "m.jsonl", [{"body": f"第{n}天。" * 9} for n in range(60)]), "format": "text",
                 "columns": {"text": "body"}},
        "talk": {"path": str(world / "sft.jsonl"), "format": "messages", "samples": 80},
        "persona": {"path": write(folder / "p.jsonl", chats("甲", 30)), "format": "alpaca", "weight": 0.5},
        "pairs": {"path": str(world / "preferences.jsonl"), "format": "preference"},
        "sums": {"path": write(folder / "s.jsonl", problems), "format": "prompt",
                 "columns": {"prompt": "aufgabe", "response": "loesung"}},
    }  # fmt: skip
    (folder / "datasets.yaml").write_text(yaml.safe_dump(entries), encoding="utf8")
    return folder / "datasets.yaml"


SHORT = ["--sequence_length", 64, "--micro_tokens", 256, "--dtype", "fp32", "--batch_tokens", 256]


def test_pretraining_by_name_reads_each_with_its_own_column(run, pretrain_arguments, registry, tmp_path):
    given = ["--data", "words=3,more,fewer", "--datasets", registry, "--shards", tmp_path / "shards", "--max_steps", 1]
    done = run(pretrain.main, *pretrain_arguments, *given, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "shards").iterdir())) == 3
    again = run(pretrain.main, *pretrain_arguments, *given, "--out", tmp_path / "again")
    assert again.code == 0 and again.out.count("are ready and used again") == 3
    done = run(pretrain.main, *pretrain_arguments, *given, "--data", "words,more", "--out", tmp_path / "one")
    assert done.code == 0 and len(list((tmp_path / "shards").iterdir())) == 4  # without weights one corpus
    done = run(pretrain.main, *pretrain_arguments, *given, "--data", "talk", "--out", tmp_path / "no")
    assert done.code == 2 and "its format messages is conversations, and this reads text" in done.err


def test_fine_tuning_by_name_and_a_resume_that_would_change_its_meaning(run, pretrained, registry, tmp_path):
    given = ["--ckpt", pretrained / "final", "--datasets", registry, "--out", tmp_path / "run", *SHORT]
    done = run(full_sft.main, *given, "--data", "talk,persona", "--max_steps", 2, "--save_every", 1)
    assert done.code == 0, done.err
    assert "110 of " in done.out and "good rows left out: more than the samples" in done.out
    for data in ("talk,persona=2", "talk", "persona,talk"):
        again = run(full_sft.main, *given, "--data", data, "--max_steps", 4, "--resume")
        assert again.code == 2 and "the data changed (" in again.err and "cannot change it midway" in again.err
    again = run(full_sft.main, *given, "--data", "talk=1,persona=0.5", "--max_steps", 4, "--resume")
    assert again.code == 0, again.err
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


def test_preferences_reinforcement_and_collecting_by_name(run, pretrained, registry, tmp_path):
    given = ["--ckpt", pretrained / "final", "--datasets", registry]
    done = run(dpo_train.main, *given, "--data", "pairs", "--out", tmp_path / "dpo", *SHORT, "--max_steps", 1)
    assert done.code == 0, done.err
    few = ["--prompts", 2, "--group", 2, "--max_new_tokens", 4]
    done = run(grpo_train.main, *given, "--data", "sums=3,arithmetic:1", "--out", tmp_path / "rl", *SHORT[:-2], *few,
               "--max_steps", 1, "--rewards", '{"overlong": 1}')  # fmt: skip
    assert done.code == 0 and "40 of 40 rows read" in done.out, done.err
    given = ["--method", "answers", "--teacher", *given[1:], "--prompts", 8, "--samples", 8, "--max_new_tokens", 24]
    given += ["--at_least", -1, "--rewards", '{"overlong": 1}', "--out", tmp_path / "kept.jsonl"]
    done = run(distill.main, *given, "--data", "sums,arithmetic:1", "--mix", "talk")
    assert done.code == 0 and "mixed in" in done.out, done.err
    done = run(distill.main, *given, "--data", "sums", "--mix", "tal", "--resume")
    assert done.code == 2 and "did you mean talk?" in done.err
