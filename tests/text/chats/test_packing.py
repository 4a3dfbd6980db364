"""Packed chat rows: whole answers, no label across conversations, the same rows for the same (seed, index)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import ChatDataset
from errors import UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from text.chats.chat_template import encode_chat
from text.chats.packing import cut_at_turn, pack_best_fit, write_row
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["question answer number one two three four five six seven\n" * 3] * 10, 290)


def conversation(number: int, turns: int, words: int) -> list[dict[str, str]]:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {number} {turn}"})
        messages.append({"role": "assistant", "content": " ".join(["number", *str(number)] * words)})
    return messages


CONVERSATIONS = [conversation(number, 1 + number % 3, number % 4) for number in range(1, 120) if number % 4]


def write_chats(folder: Path, conversations: list[list[dict[str, str]]]) -> str:
    return write(folder / "sft.jsonl", [{"messages": messages} for messages in conversations])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chats(tmp_path_factory.mktemp("chat"), CONVERSATIONS)


@pytest.fixture(scope="module")
def chats(path: str, tokenizer: Tokenizer) -> ChatDataset:
    return ChatDataset([path], tokenizer, LENGTH, progress=False)


def epoch_of(data: ChatDataset, epoch: int) -> dict[str, torch.Tensor]:
    return data.batch(range(epoch * len(data), (epoch + 1) * len(data)))


Segments = list[tuple[tuple[int, ...], tuple[int, ...]]]


def segments(batch: dict[str, torch.Tensor]) -> Segments:
    """(ids, labels) of the conversations of all rows, sorted, without the padding that ends each row."""
    found = []
    for ids, labels, numbers, positions in zip(
        *(batch[name].tolist() for name in ("input_ids", "labels", "segment_ids", "position_ids")), strict=True
    ):
        for number in dict.fromkeys(numbers):
            begin, end = numbers.index(number), len(numbers) - numbers[::-1].index(number)
            assert positions[begin:end] == list(range(end - begin)) and set(numbers[begin:end]) == {number}
            if number < 0:
                assert set(ids[begin:]) == {3} and set(labels[begin:]) == {-100}
            else:
                found.append((tuple(ids[begin:end]), tuple(labels[begin:end])))
    return sorted(found)


def expected_segments(tokenizer: Tokenizer, conversations: list[list[dict[str, str]]]) -> Segments:
    encoded = (encode_chat(tokenizer, messages) for messages in conversations)
    return sorted(
        (tuple(ids[:-1]), tuple(token if trained else -100 for token, trained in zip(ids[1:], mask[1:], strict=True)))
        for ids, mask in encoded
    )


def kept_turns(tokenizer: Tokenizer, messages: list[dict[str, str]], length: int) -> list[dict[str, str]]:
    """The longest beginning that ends with an answer and fits, by encoding each of them."""
    for end in range(len(messages), 0, -2):
        if len(encode_chat(tokenizer, messages[:end])[0]) - 1 <= length:
            return messages[:end]
    return []


def test_rows_hold_every_conversation_once_with_its_labels(chats, tokenizer):
    kept = [kept_turns(tokenizer, messages, LENGTH) for messages in CONVERSATIONS]
    assert any(map(len, kept)) and kept != CONVERSATIONS
    expected = expected_segments(tokenizer, [messages for messages in kept if messages])
    for epoch in (0, 1, 5):
        batch = epoch_of(chats, epoch)
        assert all(tensor.shape == (len(chats), LENGTH) for tensor in batch.values())
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert segments(batch) == expected


def test_packed_logits_are_those_of_each_conversation_alone(chats):
    config = LMConfig.preset("demo", vocab_size=290, hidden_size=32, num_hidden_layers=2)
    torch.manual_seed(0)
    model = MiniDeepSeek(config).eval()
    batch = chats.batch(range(4))
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
        packed = model(**inputs).logits
        for row in range(4):
            for number in batch["segment_ids"][row].unique():
                here = batch["segment_ids"][row] == number
                if number >= 0:
                    alone = model(batch["input_ids"][row][here][None]).logits[0]
                    torch.testing.assert_close(packed[row][here], alone, atol=1e-5, rtol=1e-4)


def test_without_packing_each_conversation_has_its_row(path, chats, tokenizer):
    plain = ChatDataset([path], tokenizer, LENGTH, packing=False, progress=False)
    assert len(plain) == plain.report.count > len(chats)
    batch = epoch_of(plain, 0)
    assert all(row[0] == tokenizer.bos_id for row in batch["input_ids"])
    assert segments(batch) == segments(epoch_of(chats, 0))


def test_a_sample_depends_on_seed_and_index_alone(path, chats, tokenizer):
    again = ChatDataset([path], tokenizer, LENGTH, progress=False)
    size = len(chats)
    indices = [3 * size + 1, 0, size - 1, size, 7 * size, 1]  # backwards and forwards over epochs
    together = again.batch(indices)
    for number, index in enumerate(indices):
        alone = chats.batch([index])
        assert all(torch.equal(alone[name][0], together[name][number]) for name in alone)


def test_epochs_and_seeds_change_order_and_company(path, chats, tokenizer):
    other = ChatDataset([path], tokenizer, LENGTH, seed=1, progress=False)
    assert len(other) == len(chats)
    first, *others = (epoch_of(*one)["input_ids"].tolist() for one in ((chats, 0), (chats, 1), (other, 0)))
    assert all(first != rows and sorted(first) != sorted(rows) for rows in others)


def test_validation_is_apart_and_keeps_copies_together(tmp_path, tokenizer):
    path = write_chats(tmp_path, CONVERSATIONS * 2)
    data = ChatDataset([path], tokenizer, LENGTH, val_fraction=0.2, progress=False)
    held, train = (segments(epoch_of(part, 0)) for part in (data.validation, data))
    assert not set(held) & set(train)
    assert len(held) + len(train) == data.report.count
    assert 0.05 < len(held) / data.report.count < 0.4
    other_seed = ChatDataset([path], tokenizer, LENGTH, seed=3, val_fraction=0.2, progress=False)
    assert segments(epoch_of(other_seed.validation, 0)) == held


def test_what_was_cut_and_dropped_is_counted(tmp_path, tokenizer, capsys):
    fits = conversation(1, 1, 1)
    cut = conversation(2, 12, 1)
    dropped = conversation(3, 1, 60)
    unanswered = [*conversation(4, 1, 1), {"role": "user", "content": "?"}]
    path = Path(write_chats(tmp_path, [fits, cut, dropped, unanswered]))
    path.write_text(path.read_text() + '{"messages": []}\n{"mess')
    data = ChatDataset([str(path)], tokenizer, LENGTH, progress=False)
    report = data.report
    assert (report.count, report.fates["cut"], report.fates["dropped"], report.fates["unanswered"]) == (3, 1, 1, 1)
    assert report.read.problems == {"no assistant turn": 1, "broken JSON": 1}
    assert report.tokens == sum(len(ids) + 1 for ids, _ in segments(epoch_of(data, 0)))
    assert report.trained == int((epoch_of(data, 0)["labels"] >= 0).sum())
    data.print_summary()
    text = " ".join(capsys.readouterr().out.split())  # lines that are too long are broken
    lines = "4 of 6 rows read, 2 skipped", f"{path}:6: broken JSON", "1 dropped", "1 cut after the last", "filled"
    assert all(line in text for line in lines)


def test_nothing_to_learn_says_why(tmp_path, tokenizer):
    path = write_chats(tmp_path, [conversation(1, 1, 90), conversation(2, 1, 90)])
    nothing = "no conversations to train on"
    with pytest.raises(UserError, match=rf"sft\.jsonl: {nothing}; all 2 dropped: the first .* 64 tokens; raise"):
        ChatDataset([path], tokenizer, LENGTH, progress=False)
    write(Path(path), [{"text": 1}, {"text": 2}])
    with pytest.raises(UserError, match=rf"{nothing}; 2 rows, all skipped: 2 x unknown layout; .*jsonl:1: has 'text'"):
        ChatDataset([path], tokenizer, LENGTH, progress=False)
    with pytest.raises(UserError, match="no file: no conversations to train on"):
        ChatDataset([], tokenizer, LENGTH, progress=False)


def test_a_small_fraction_holds_out_at_least_one_and_an_impossible_one_is_refused(tmp_path, path, tokenizer):
    assert len(ChatDataset([path], tokenizer, LENGTH, val_fraction=1e-9, progress=False).validation) == 1
    assert ChatDataset([path], tokenizer, LENGTH, progress=False).validation is None
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match="must be at least 0 and below 1"):
            ChatDataset([path], tokenizer, LENGTH, val_fraction=fraction, progress=False)
    single = write_chats(tmp_path, CONVERSATIONS[:1])
    with pytest.raises(UserError, match="holds out all 1 conversations"):
        ChatDataset([single], tokenizer, LENGTH, val_fraction=0.1, progress=False)


@pytest.mark.parametrize(
    ("length", "kept"),
    [(100, 9), (8, 9), (7, 6), (5, 6), (4, 3), (2, 3), (1, 0)],
)
def test_cuts_fall_behind_an_answer(length, kept):
    #       0  1  2 | 3  4  5 | 6  7  8 | 9
    mask = [0, 0, 1, 0, 1, 1, 0, 0, 1, 0]
    assert cut_at_turn(mask, length) == kept
    assert cut_at_turn([0, 0, 0], length) == cut_at_turn([], length) == 0


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), order=st.randoms(use_true_random=False))
def test_best_fit_places_everything_once_and_within_capacity(lengths, order):
    rows = pack_best_fit(np.array(lengths, dtype=np.int64), 40)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 40 for row in rows)
    # no two rows could have been one
    free = sorted(40 - sum(lengths[index] for index in row) for row in rows)
    assert sum(free[-2:]) < 40 or len(rows) < 2
    shuffled = order.sample(lengths, len(lengths))
    assert len(pack_best_fit(np.array(shuffled, dtype=np.int64), 40)) == len(rows)


def test_best_fit_takes_the_fullest_row_with_room():
    rows = pack_best_fit(np.array([6, 7, 3, 4, 2, 2]), 10)
    assert [[(6, 7, 3, 4, 2, 2)[index] for index in row] for row in rows] == [[7, 3], [6, 4], [2, 2]]
    with pytest.raises(ValueError, match="11 is over the capacity 10"):
        pack_best_fit(np.array([3, 11]), 10)


def test_no_label_crosses_into_the_next_conversation():
    one = (np.array([1, 20, 21, 2], dtype=np.uint16), np.array([0, 0, 1, 1], dtype=np.uint8))
    two = (np.array([1, 30, 2], dtype=np.uint16), np.array([0, 1, 1], dtype=np.uint8))
    row = {name: values.tolist() for name, values in write_row([one, two], 7, pad_id=3).items()}
    assert row == {
        "input_ids": [1, 20, 21, 1, 30, 3, 3],
        "labels": [-100, 21, 2, 30, 2, -100, -100],
        "segment_ids": [0, 0, 0, 1, 1, -1, -1],
        "position_ids": [0, 1, 2, 0, 1, 0, 1],
    }
