"""`dataset.py preview` and `check`: what is shown is what is trained on, readable without colour; problems by line."""

from __future__ import annotations

import json
import re

import pytest
from data_files import write

import dataset
from dataset import ChatDataset
from text.chats.chat_template import encode_chat
from text.inspection import kind_of_source
from text.sources.registry import Source


@pytest.fixture
def look(run, tokenizer_folder):
    """`look("preview", data, *options)`: dataset.py with the small tokenizer."""
    return lambda command, data, *options: run(dataset.main, command, data, "--tokenizer", tokenizer_folder, *options)


CHAT = [
    {"role": "system", "content": "简短"},
    {"role": "user", "content": "小明有几个苹果？"},
    {"role": "assistant", "content": "<think>\n数\n</think>\n三个。"},
    {"role": "user", "content": "more\x1b[31m?"},
    {"role": "assistant", "content": "Yes."},
]


def shown(out: str) -> list[tuple[bool, str]]:
    """(whether trained on, text) of each line of tokens."""
    lines = [line for line in out.splitlines() if line.startswith(("+ ", "  "))]
    return [(line[0] == "+", line[2:].replace("┊", "").replace("↵", "\n")) for line in lines]


def test_a_preview_marks_exactly_what_is_trained_on(look, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    done = look("preview", path)
    ids, mask = encode_chat(tokenizer, CHAT)
    assert f"{path}:1   {len(ids)} tokens, {sum(mask)} trained on" in done.out
    for side in (0, 1):
        text = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m == side], skip_special_tokens=False)
        assert "".join(line for trained, line in shown(done.out) if trained == side) == text.replace("\x1b", "\\x1b")
    assert "\x1b" not in done.out  # neither colours in a pipe, nor a command to the terminal out of the data


def test_a_preview_shows_tokens_whole_characters_and_turns_that_are_not_trained_on(look, tokenizer, tmp_path):
    first, last = {"role": "assistant", "content": "鑫好", "weight": 0.0}, {"role": "assistant", "content": "Yes."}
    row = {"messages": [CHAT[1], first, CHAT[1], last], "rationale": "it has more than four words"}
    done = look("preview", write(tmp_path / "a.jsonl", [row]))
    assert [text for trained, text in shown(done.out) if trained] == ["Yes.</s>"]
    assert "鑫好</s>" in done.out.replace("┊", "") and "notice: 1 x the column 'rationale' is not read" in done.out
    assert "鑫" in done.out and "\ufffd" not in done.out and len(tokenizer.encode("鑫")) > 1
    assert [len(tokenizer.encode(text)) for text in ("苹果", "？", "苹果？")] == [1, 1, 2] and "┊苹果┊？" in done.out


def test_a_preview_skips_bad_rows_and_shows_as_many_as_asked(look, tmp_path):
    rows = ["{broken", *({"instruction": f"Q{n}", "output": "A"} for n in range(5))]
    path = write(tmp_path / "a.jsonl", rows)
    done = look("preview", path, "--rows", 2)
    assert f"{path}:2 " in done.out and f"{path}:3 " in done.out and f"{path}:4 " not in done.out
    done = look("preview", write(tmp_path / "bad.jsonl", rows[:1]))
    assert done.code == 2 and f"no usable row; 1 rows, all skipped: 1 x broken JSON; the first: {tmp_path}" in done.err


def test_a_preview_of_pairs_problems_text_and_sums(look, world, tmp_path):
    done = look("preview", world / "preferences.jsonl", "--rows", 1)
    sides = done.out.partition("chosen\n")[2].split("rejected\n")
    assert len(sides) == 2 and all(re.search(r"^\+ .*</s>$", side, re.MULTILINE) for side in sides)
    done = look("preview", write(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "2"}]))
    assert "the answer to find: 2" in done.out and not any(trained for trained, _ in shown(done.out))
    done = look("preview", world / "pretrain.csv", "--rows", 1)
    assert all(trained for trained, _ in shown(done.out)) and done.out.rstrip().endswith("</s>")
    assert "arithmetic:1 #3" in look("preview", "arithmetic:1").out


def test_what_a_sequence_length_does_is_said(look, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    size, first = (len(encode_chat(tokenizer, CHAT[:end])[0]) for end in (5, 3))
    assert "with --sequence_length" not in look("preview", path, "--sequence_length", size - 1).out
    assert f"cut after {first} tokens, its last answer" in look("preview", path, "--sequence_length", size - 2).out
    assert "left out with --sequence_length 4" in look("preview", path, "--sequence_length", 4).out
    pair = write(tmp_path / "p.jsonl", [{"messages": CHAT[:-1], "chosen": "Yes.", "rejected": "No."}])
    oldest = len(encode_chat(tokenizer, CHAT[1:3])[0]) - 1  # without the <s>
    shown = look("preview", pair, "--sequence_length", size - 2).out
    assert f"cut: {oldest} tokens of the prompt, its oldest turns, are left out with --sequence_length" in shown
    assert "left out with --sequence_length 4" in look("preview", pair, "--sequence_length", 4).out


def test_a_check_tells_the_lengths_and_what_would_be_cut(look, tokenizer, world):
    path, length = world / "sft.jsonl", 40
    done = look("check", path, "--sequence_length", length)
    data = ChatDataset([path], tokenizer, length, progress=False)
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf8").splitlines()]
    sizes = sorted(len(encode_chat(tokenizer, row)[0]) for row in rows)
    assert done.code == 0 and f"{len(rows)} of {len(rows)} rows read, 0 skipped" in done.out
    found = re.search(r"median ([\d,]+), 90 % up to ([\d,]+), longest ([\d,]+)", done.out)
    median, high, longest = (int(number.replace(",", "")) for number in found.groups())
    assert longest == sizes[-1]
    assert sum(size <= median for size in sizes) >= len(sizes) / 2 >= sum(size < median for size in sizes)
    assert sum(size <= high for size in sizes) >= 0.9 * len(sizes) > sum(size < high for size in sizes) * 0.99
    assert f"{data.report.fates['cut']:,} cut after the last answer" in done.out
    assert f"{data.report.fates['dropped']:,} of {len(rows):,} conversations are longer and left out" in done.out
    assert data.report.fates["cut"] > 0 and data.report.fates["dropped"] > 0


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (["{broken"], "no usable row; 1 rows, all skipped: 1 x broken JSON"),
        ([], "is empty; name a file that has rows"),
        (['[{"instruction": "Q", "output": "A"},', '{"instr'], ":2: the JSON array breaks off in element 2"),
    ],
)
def test_a_check_of_nothing_usable_or_half_a_file_fails(look, run, rows, what, tmp_path):
    path = write(tmp_path / "a.jsonl", rows)
    done = look("check", path)
    assert done.code == 2 and done.err.count("error: ") == 1 and str(path) in done.err and what in done.err
    done = run(dataset.main, "check", path)
    assert done.code == 2 and "give --tokenizer DIR (made by train_tokenizer.py) or --ckpt DIR" in done.err


def test_a_check_of_several_counts_problems_by_kind_and_continues_after_a_bad_one(look, world, tmp_path):
    good, empty = {"instruction": "Q", "output": "A"}, {"instruction": "Q", "output": ""}
    path = write(tmp_path / "a.jsonl", [good, "{broken", empty, good, "{broken"])
    done = look("check", path)
    assert done.code == 0 and "2 of 5 rows read, 3 skipped" in done.out
    assert "2 x broken JSON" in done.out and "1 x empty text" in done.out
    assert all(f"{path}:{line}: " in done.out for line in (2, 3, 5))
    bad = write(tmp_path / "b.jsonl", ["{broken"])
    done = look("check", f"{bad},{world / 'preferences.jsonl'},{world / 'pretrain.csv'}", "--sequence_length", 30)
    assert (
        done.code == 2
        and "pairs are longer and left out" in done.out
        and "continue in the next row; nothing is lost" in done.out
    )


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference"),
        ({"instruction": "Q", "output": "A"}, "chat"),
        ({"q": "Q", "a": "A"}, "chat"),
        ({"question": "Q", "answer": "#### 1"}, "prompt"),
        ({"text": "words", "id": 3}, "text"),
    ],
)
def test_the_kind_of_data_is_seen(row, kind, tmp_path):
    assert kind_of_source(Source(str(write(tmp_path / "a.jsonl", ["{broken", row])))) == kind
    (tmp_path / "a.txt").write_text("words")
    assert kind_of_source(Source(str(tmp_path / "a.txt"))) == "text"
