"""What training reads from shards: every window once an epoch, mixed by weight, a pure function of seed and index."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import PretrainDataset
from errors import UserError
from text.corpus.shards import ShardSet, prepare_shards
from text.order import BLOCK, block_shares, mixed, shuffled
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe

TEXTS = [f"第{number}个故事。 Story {number} has {number * 7} words." for number in range(80)]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 285, 1)


def shards_of(texts: list[str], tokenizer: Tokenizer, folder: Path, **options: int) -> ShardSet:
    data = write_texts(folder / "data.jsonl", texts)
    return prepare_shards(data, tokenizer, folder / "out", workers=1, val_fraction=0.1, **options)


@pytest.fixture(scope="module")
def big(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return shards_of(TEXTS, tokenizer, tmp_path_factory.mktemp("big"), shard_tokens=700)


@pytest.fixture(scope="module")
def small(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return shards_of([f"1 + {number} = {number + 1}" for number in range(30)], tokenizer, tmp_path_factory.mktemp("s"))


def windows(shards: ShardSet) -> list[list[int]]:
    stream = shards.split("train")
    count = (stream.tokens - 1) // LENGTH
    return [stream.read(number * LENGTH, (number + 1) * LENGTH).tolist() for number in range(count)]


def test_an_epoch_shows_every_window_once_and_labels_are_the_next_tokens(big):
    data, expected = PretrainDataset([(big, 1.0)], LENGTH), windows(big)
    assert len(data) == len(expected)
    for epoch in range(2):
        batch = data.batch(range(epoch * len(data), (epoch + 1) * len(data)))
        assert set(batch) == {"input_ids", "labels"} and all(value.dtype == torch.int64 for value in batch.values())
        assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
        shown = batch["input_ids"].tolist()
        assert sorted(shown) == sorted(expected) and shown != expected


def test_epochs_and_seeds_have_orders_of_their_own(big):
    data, other = PretrainDataset([(big, 1.0)], LENGTH), PretrainDataset([(big, 1.0)], LENGTH, seed=1)
    orders = [[data.locate(epoch * len(data) + place) for place in range(len(data))] for epoch in range(2)]
    orders.append([other.locate(place) for place in range(len(data))])
    assert len({tuple(order) for order in orders}) == 3


def test_a_sample_depends_on_seed_and_index_alone(big, small):
    sources = [(big, 3.0), (small, 1.0)]
    together = PretrainDataset(sources, LENGTH, seed=5).batch(range(40))["input_ids"]
    again = PretrainDataset(sources, LENGTH, seed=5)
    one_by_one = [again.batch([index])["input_ids"] for index in reversed(range(40))]
    assert torch.equal(together, torch.cat(one_by_one[::-1]))


def test_the_order_of_samples_never_changes():
    """A run begun with one version must resume with the next."""
    assert [shuffled(place, 10, 1, 2) for place in range(10)] == [3, 4, 2, 0, 6, 9, 8, 5, 1, 7]
    samples = [mixed(index, block_shares([3, 1]), 7) for index in range(5)]
    assert samples == [(1, 335), (0, 1978), (1, 408), (0, 2871), (0, 3055)]


def test_sources_are_mixed_by_weight(big, small):
    data = PretrainDataset([(big, 3.0), (small, 1.0)], LENGTH)
    located = [data.locate(index) for index in range(2 * BLOCK)]
    assert Counter(source for source, _ in located[:BLOCK]) == {0: BLOCK * 3 // 4, 1: BLOCK // 4}
    # Also in the short run, up to chance: the standard deviation of 100 draws is 4.3.
    assert 55 <= sum(source == 0 for source, _ in located[:100]) <= 95
    for source in range(2):
        shown = Counter(window for where, window in located if where == source)
        assert len(shown) == data._windows[source]
        assert max(shown.values()) - min(shown.values()) <= 2


def test_validation_predicts_every_token_but_the_first_once_and_is_filled_up(big, small):
    sources = [(big, 5.0), (small, 1.0)]
    data = PretrainDataset(sources, LENGTH, split="val")
    batch = data.batch(range(len(data)))
    expected = [token for shards, _ in sources for token in shards.split("val").read(1, shards.split("val").tokens)]
    unlabelled = batch["labels"] == -100
    assert batch["labels"][~unlabelled].tolist() == expected and unlabelled.sum() < 2 * LENGTH
    assert set(batch["input_ids"][unlabelled].tolist()) <= {big.eos_id}
    (segments,) = PretrainDataset([(small, 1.0)], 512, split="val", isolate=True).batch([0])["segment_ids"]
    count = small.split("val").tokens - 1
    assert (segments[count:] == -1).all() and (segments[:count] >= 0).all()


def test_isolation_makes_a_segment_of_each_document(big):
    data = PretrainDataset([(big, 1.0)], 64, isolate=True)
    plain = PretrainDataset([(big, 1.0)], 64).batch(range(10))
    batch = data.batch(range(10))
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    for row in range(10):
        segment, position = 0, 0
        for time in range(64):
            is_end = batch["input_ids"][row, time] == big.eos_id
            assert batch["segment_ids"][row, time] == segment
            assert batch["position_ids"][row, time] == position
            assert batch["labels"][row, time] == (-100 if is_end else plain["labels"][row, time])
            segment, position = (segment + 1, 0) if is_end else (segment, position + 1)
    assert batch["segment_ids"].max() > 0


def test_what_cannot_be_trained_or_validated_on_is_named(big, small, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"out: \d+ tokens to train on, fewer than one window of 4,097; add text"):
        PretrainDataset([(small, 1.0)], 4096)
    with pytest.raises(UserError, match="weight 0; give a number above 0"):
        PretrainDataset([(big, 0)], LENGTH)
    data = write_texts(tmp_path / "a.jsonl", TEXTS)
    shards = prepare_shards(data, tokenizer, tmp_path / "out", workers=1, val_fraction=0)
    with pytest.raises(UserError, match="nothing is held out to validate on; add documents or set val_fraction 0"):
        PretrainDataset([(shards, 1.0)], LENGTH, split="val")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 9))
def test_a_shuffle_is_a_permutation(size, seed, epoch):
    assert sorted(shuffled(place, size, seed, epoch) for place in range(size)) == list(range(size))


def test_a_shuffle_leaves_no_pattern():
    size = 4000
    order = np.array([shuffled(place, size, 3) for place in range(size)])
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.06  # 4 standard deviations of chance
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
    assert (order == np.arange(size)).sum() < 10


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_shares_add_up_and_follow_the_weights(weights):
    shares = block_shares(weights)
    assert sum(shares) == BLOCK and min(shares) >= 1
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - BLOCK * weight / sum(weights)) <= len(weights)


@settings(max_examples=3, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 3))
def test_a_mixture_goes_through_each_source_in_order(weights, seed):
    """Within a block, and from one to the next."""
    shares = block_shares(weights)
    for block in (0, 1):
        located = [mixed(index, shares, seed) for index in range(block * BLOCK, (block + 1) * BLOCK)]
        for source, share in enumerate(shares):
            numbers = sorted(number for where, number in located if where == source)
            assert numbers == list(range(block * share, (block + 1) * share))
