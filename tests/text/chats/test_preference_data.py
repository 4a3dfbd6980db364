"""Preference data: every layout gives the same pair, rows without a pair are named, and rows hold whole pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_files import write

from dataset import PreferenceDataset
from errors import UserError
from text.chats.chat_template import encode_chat
from text.chats.encoded import EncodedPairs
from text.chats.packed_dataset import CUT
from text.chats.preferences import Preference, to_preference
from text.sources.row_report import RowError

USER = {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
LAYOUTS = {
    "strings": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"prompt": "Q", "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    "Alpaca": {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},
    "whole lists": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole lists and the prompt": {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ShareGPT lists": {
        side: [{"from": "human", "value": "Q"}, {"from": "gpt", "value": answer}]
        for side, answer in (("chosen", "A"), ("rejected", "B"))
    },
    "UltraFeedback": {"prompt": "Q", "prompt_id": "ab12", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.0},
    "the rejected conversation once more": {**WHOLE, "messages": WHOLE["rejected"]},
    "another answer beside whole lists": {**WHOLE, "conversations": [USER, {"role": "assistant", "content": "C"}]},
    "a conversation and another answer": {"messages": [USER, GOOD], "chosen": "A", "rejected": "B"},
    "a prompt with space around it": {"prompt": " Q\n", **WHOLE},
    "a prompt that is one turn": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    "nothing in a column": {"messages": None, "prompt": "Q", "chosen": "A", "rejected": "B"},
}


def numpy_literal(value: object) -> str:
    """As pandas writes a cell that came from a Parquet file: no commas between the items of an array."""
    return str(np.array(value, dtype=object)) if isinstance(value, list) else str(value)


def some_pairs(count: int, words: int = 3) -> list[dict[str, str]]:
    return [
        {"prompt": f"问题{i}", "chosen": "好" * (1 + i % words), "rejected": "不" * (1 + i % (words + 1))}
        for i in range(count)
    ]


@pytest.mark.parametrize("literal", [None, json.dumps, str, numpy_literal])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pair_as_objects_or_spelled_in_the_cells_of_a_table(layout, literal):
    row = LAYOUTS[layout]
    if literal:
        row = {key: literal(value) if isinstance(value, list | dict) else value for key, value in row.items()}
    assert to_preference(row) == Preference([USER, GOOD], [USER, BAD])


CALL, OBJECT = '[{"name": "查", "arguments": {}}]', '{"role": "CEO", "age": 3}'


@pytest.mark.parametrize("answer", [CALL, OBJECT, "[1, 2]", "[]", "{'a'", "[{broken", '{"a": "role"'])
def test_an_answer_that_is_json_of_another_kind_is_text(answer):
    pair = to_preference({"prompt": answer, "chosen": answer, "rejected": "B"})
    assert [turn["content"] for turn in pair.chosen] == [answer, answer]
    with pytest.raises(RowError, match="'chosen' is neither JSON nor a Python list"):
        to_preference({"prompt": "Q", "chosen": "[{'role': 'assistant', 'content': 'A", "rejected": "B"})


def test_a_prompt_may_be_one_of_the_turns_before_the_answer():
    before = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "C"}, {**USER, "content": "R"}]
    sides = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
    for prompt in ("Q", "R", before, before[:2], before[1:]):
        assert to_preference({"prompt": prompt, **sides}) == Preference(**sides)
    with pytest.raises(RowError, match="'prompt' is not what 'chosen' answers"):
        to_preference({"prompt": "C", **sides})


def test_marks_mean_something_on_the_chosen_answer_only(tmp_path, tokenizer):
    earlier = [USER, {**GOOD, "weight": 0}, USER]
    row = {"chosen": [*earlier, {**GOOD, "weight": 1}], "rejected": [*earlier, {**BAD, "train": False}]}
    plain = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}
    assert to_preference(row) == Preference(**plain)
    files = [write(tmp_path / name, [pair]) for name, pair in (("a.jsonl", row), ("b.jsonl", plain))]
    marked, unmarked = (EncodedPairs([file], tokenizer, 60) for file in files)
    assert marked.mask.tolist() == unmarked.mask.tolist() and marked.fingerprint == unmarked.fingerprint
    with pytest.raises(RowError, match="'chosen' is marked as not trained on"):
        to_preference({**row, "chosen": [*earlier, {**GOOD, "loss": False}]})


def test_the_turns_before_the_last_answer_are_the_prompt():
    before = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "C"}, USER]
    for row in (
        {"prompt": before, "chosen": "A", "rejected": "B"},
        {"chosen": [*before, GOOD], "rejected": [*before, BAD]},
        {"system": "S", "prompt": before[1:], "chosen": GOOD, "rejected": BAD},
    ):
        assert to_preference(row) == Preference([*before, GOOD], [*before, BAD])
    # Answers may differ in their thoughts only.
    pair = to_preference({side: [USER, {**GOOD, "reasoning_content": side}] for side in ("chosen", "rejected")})
    assert pair.chosen[-1]["content"] == "<think>\nchosen\n</think>\n\nA" != pair.rejected[-1]["content"]


@pytest.mark.parametrize(
    ("row", "kind", "what"),
    [
        (["A", "B"], "not a pair", "the row is a list"),
        ({"prompt": "Q", "chosen": "A"}, "nothing to prefer", "'rejected' is missing"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "nothing to prefer", "'rejected' is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "nothing to prefer", "'rejected' is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "empty text", "is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "nothing to prefer", "are identical"),
        ({"prompt": "Q", "chosen": "A", "rejected": 3}, "wrong type", "'rejected' is a number"),
        ({"prompt": 3, "chosen": "A", "rejected": "B"}, "wrong type", "'prompt' is a number"),
        ({"chosen": "A", "rejected": "B"}, "no prompt", "has no 'prompt'"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "nothing to prefer", "ends with a turn of 'user'"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "R"}, BAD]},
            "prompts differ",
            "answer different prompts",
        ),
        ({"prompt": "R", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompts differ", "not what 'chosen'"),
        ({"prompt": [USER, GOOD], "chosen": "A", "rejected": "B"}, "wrong order of roles", "cannot come after"),
        ({"prompt": "Q", "chosen": {"role": "judge", "content": "A"}, "rejected": BAD}, "unknown role", "'judge'"),
    ],
)
def test_a_row_without_a_pair_is_named(row, kind, what):
    with pytest.raises(RowError, match=what) as caught:
        to_preference(row)
    assert caught.value.kind == kind


def test_a_pair_with_a_side_that_is_too_long_is_dropped_and_counted(tmp_path, tokenizer):
    rows = [LAYOUTS["strings"], {"prompt": "Q", "chosen": "A", "rejected": "长" * 60}]
    pairs = EncodedPairs([write(tmp_path / "pairs.jsonl", rows)], tokenizer, 40)
    assert (len(pairs), pairs.report.fates["dropped"]) == (1, 1)
    assert "1 dropped: the last turns alone end after 40 tokens" in "\n".join(pairs.report.lines())
    with pytest.raises(UserError, match=r"all 2 dropped: .* alone end after 2 tokens; raise --seq"):
        EncodedPairs([tmp_path / "pairs.jsonl"], tokenizer, 2)


def test_a_pair_that_is_too_long_loses_the_oldest_turns_of_its_prompt(tmp_path, tokenizer):
    """As few of them as give room; the system prompt and the last question stay, and both sides have one prompt."""
    system, asked = {"role": "system", "content": "S"}, [{"role": "user", "content": f"问{i}"} for i in range(4)]
    turns = [turn for question in asked[:3] for turn in (question, {"role": "assistant", "content": "旧" * 5})]
    whole = [system, *turns, asked[3]]
    sides = {"chosen": [*whole, GOOD], "rejected": [*whole, {**BAD, "content": "坏坏"}]}
    path = write(tmp_path / "pairs.jsonl", [sides])
    for left in (3, 2, 1, 0):
        begins = [system, *turns[len(turns) - 2 * left :], asked[3]]
        expected = [encode_chat(tokenizer, [*begins, side[-1]])[0] for side in (sides["chosen"], sides["rejected"])]
        pairs = EncodedPairs([path], tokenizer, max(map(len, expected)) - 1)
        assert [ids.tolist() for ids, _ in pairs[0]] == expected
        assert [int(mask.sum()) for _, mask in pairs[0]] == [
            len(ids) - len(encode_chat(tokenizer, begins, add_generation_prompt=True)[0]) for ids in expected
        ]
        assert pairs.report.fates["cut"] == (left < 3) == ("1 lost the oldest turns" in "\n".join(pairs.report.lines()))
        data = PreferenceDataset([path], tokenizer, max(map(len, expected)) - 1)
        assert data.identity.endswith(CUT) == (left < 3)
    shortest = max(map(len, expected)) - 1
    for length, cut in ((shortest - 1, True), (shortest, False)):
        with pytest.raises(UserError, match="no pairs to train on; all 1 dropped: the last turns alone"):
            EncodedPairs([path], tokenizer, length, cut=cut)


def test_only_the_last_answer_and_its_end_are_compared(tmp_path, tokenizer):
    turns = [USER, {"role": "assistant", "content": "C"}, USER]
    rows = [{"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}]
    pairs = EncodedPairs([write(tmp_path / "pairs.jsonl", rows)], tokenizer, 60)
    for (ids, mask), answer in zip(pairs[0], (GOOD, BAD), strict=True):
        whole, _ = encode_chat(tokenizer, [*turns, answer])
        assert ids.tolist() == whole
        want = [*tokenizer.encode(answer["content"]), tokenizer.eos_id]
        assert ids[mask.astype(bool)].tolist() == want and mask[-len(want) :].all()


def test_each_row_holds_whole_pairs_and_an_epoch_every_pair_once(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", some_pairs(40))
    data = PreferenceDataset([path], tokenizer, 40, seed=1)
    seen = []
    for index in range(len(data)):
        batch = data.batch([index])
        segments, labels, ids = (batch[name][0] for name in ("segment_ids", "labels", "input_ids"))
        assert segments.shape == (80,) and (segments.max() + 1) % 2 == 0
        for first in range(0, int(segments.max()) + 1, 2):
            sides = [(ids[segments == side], labels[segments == side]) for side in (first, first + 1)]
            prompts = [read[predicted < 0].tolist() for read, predicted in sides]
            answers = [predicted[predicted >= 0].tolist() for _, predicted in sides]
            assert prompts[0] == prompts[1] and answers[0] != answers[1]
            assert all(answer[-1] == tokenizer.eos_id for answer in answers)
            seen.append((tuple(prompts[0]), tuple(answers[0]), tuple(answers[1])))
    assert len(seen) == len(set(seen)) == len(data.pairs)
    again = PreferenceDataset([path], tokenizer, 40, seed=1).batch([0, len(data)])
    assert all((value == data.batch([0, len(data)])[name]).all() for name, value in again.items())


def test_what_is_known_of_the_reference_stands_beside_each_label(tmp_path, tokenizer):
    """A reference that gives each token its own id: then it must be the labels."""
    path = write(tmp_path / "pairs.jsonl", some_pairs(40))
    data = PreferenceDataset([path], tokenizer, 40, val_fraction=0.2)
    data.know_reference(data.pairs.ids.astype(np.float32))
    for part in (data, data.validation):
        batch = part.batch(range(len(part)))
        counted = batch["labels"] >= 0
        assert counted.any() and (batch["reference"][counted] == batch["labels"][counted]).all()


def test_pairs_of_one_prompt_are_held_out_together(tmp_path, tokenizer):
    rows = [{**pair, "prompt": f"问题{number % 20}"} for number, pair in enumerate(some_pairs(60))]
    data = PreferenceDataset([write(tmp_path / "pairs.jsonl", rows)], tokenizer, 40, val_fraction=0.3)
    train, held = (
        {
            tuple(ids[mask == 0].tolist())
            for row in range(len(part)) for ids, mask in [part.pairs[pair][0] for pair in part.members(row)]
        }
        for part in (data, data.validation)
    )  # fmt: skip
    assert train and held and not train & held and len(train | held) == 20


def test_a_log_file_is_told_how_much_is_read(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("text.chats.encoded.ROWS_AT_ONCE", 2)
    monkeypatch.setattr("text.chats.encoded.QUIET", 1e-9)
    file = write(tmp_path / "pairs.jsonl", some_pairs(8))
    for progress in (False, True):
        PreferenceDataset([file], tokenizer, 32, progress=progress)
        assert ("encoding pairs:  " in capsys.readouterr().err) == progress
