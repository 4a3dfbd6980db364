"""Data of every format and content, damaged in every way, at every reader: rows are lost, never the program."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from data_files import file_bytes
from hypothesis import example, given
from hypothesis import strategies as st

import dataset
from dataset import ChatDataset, PreferenceDataset, PromptDataset
from errors import UserError
from fuzz.hostile import thrown
from fuzz.mutations import PLACES, damaged, put, strange, strange_json, strange_lines, values
from text.chats.chat_template import ROLE_MARKS, encode_chat, render
from text.chats.conversations import read_conversations, to_messages
from text.chats.literals import parse_list
from text.chats.preferences import read_preferences, to_preference
from text.chats.problems import read_problems, to_problem
from text.chats.prompts import read_prompts, to_prompt
from text.corpus.corpus import Corpus
from text.sources.formats import FORMATS, Layout
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport
from text.tokenizer import Tokenizer

TURNS = [{"from": "human", "value": "春天来了吗？"}, {"from": "gpt", "value": "<think>hm</think>来了。"}]
CONTENTS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"第{number}天，春天来了。\nIt's spring, no. {number}."} for number in range(6)],
    "chat": [
        {"instruction": "问", "input": "more", "output": "答", "system": "S", "history": [["a", "b"]]},
        {"conversations": TURNS, "system": "S", "tools": '[{"name": "f"}]'},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A",
                       "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        {"Question": "Q", "Complex_CoT": "thought", "Response": "A"},
        {"history": [["a", "b"]], "q": "Q", "a": "A"},
    ],
    "preference": [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "没有。"}},
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "A"}],
         "rejected": [{"role": "assistant", "content": "B"}]},
    ],
    "prompt": [
        {"question": "1+1?", "answer": "It is #### 2"}, {"question_zh-cn": "一加二？", "answer_only": "3"},
        {"prompt": "1/2?", "answer": 0.5, "kind": "halves"}, {"problem": "x?", "answer": "\\frac{1}{2}"},
    ],
}  # fmt: skip


NAMES = ("a.csv", "a.jsonl", "a.json", "a.parquet", "a.arrow", "file.arrow", "a.txt", "a.jsonl.gz")


@st.composite
def data_files(draw: Any, kinds: tuple[str, ...] = tuple(CONTENTS)) -> tuple[str, bytes, str]:
    """(name, damaged content, what is in its place)"""
    kind, name = draw(st.sampled_from(kinds)), draw(st.sampled_from(NAMES))
    original = file_bytes(name, CONTENTS[kind])
    if name == "a.json":
        found = draw(strange_json(original))
    elif name == "a.jsonl":
        found = draw(strange_lines(original))
    elif name == "a.jsonl.gz" and draw(st.booleans()):
        found = gzip.compress(draw(damaged(gzip.decompress(original))))
    else:
        found = draw(damaged(original))
    return name, found, draw(st.sampled_from(PLACES))


def read_all(reader: Any, path: Path, on_error: str) -> RowReport:
    report = RowReport()
    for _ in reader(path, on_error, report):
        pass
    return report


READERS = {
    "chat": partial(read_all, read_conversations),
    "preference": partial(read_all, read_preferences),
    "prompts": partial(read_all, lambda path, on_error, report: read_prompts([path], on_error=on_error, report=report)),
    "problems": read_problems,
    "text": lambda path, on_error: list(Corpus(str(path), on_error=on_error)),
}


@pytest.mark.parametrize("reader", READERS)
@thrown()
@given(file=data_files(), on_error=st.sampled_from(("skip", "stop")))
def test_a_reader(throw, reader, file, on_error):
    name, content, place = file
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder, name), content, place)
        given = Path(folder) if place == "folder" else Path(folder, name)
        done = throw(READERS[reader], given, on_error)
    if isinstance(done.value, RowReport):
        assert done.value.rows == done.value.accepted + done.value.left_out + done.value.problems.total()


@pytest.mark.parametrize("command", [dataset.check, dataset.preview])
@thrown()
@given(file=data_files())
def test_what_dataset_py_says(throw, tokenizer_folder, command, file):
    name, content, place = file
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder, name), content, place)
        throw(command, str(Path(folder, name)), tokenizer=str(tokenizer_folder), datasets="none.yaml")


def batches(kind: Any, path: Path, tokenizer: Tokenizer, **options: Any) -> None:
    made = kind([Source(str(path))], tokenizer, 64, **options)
    made.print_summary()
    if kind is not PromptDataset:
        made.batch(range(len(made)))


STAGES = {"chat": ChatDataset, "preference": PreferenceDataset, "prompt": PromptDataset}


@pytest.mark.parametrize("kind", STAGES)
@thrown()
@given(data=st.data())
def test_the_data_set_of_a_stage(throw, tokenizer, kind, data):
    name, content, place = data.draw(data_files((kind,)))
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder, name), content, place)
        throw(batches, STAGES[kind], Path(folder, name), tokenizer, val_fraction=data.draw(st.sampled_from((0, 0.3))))


# Rows of any structure

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | values()
FIELDS = st.sampled_from(
    ("role", "content", "from", "value", "messages", "conversations", "instruction", "input", "output", "history", "q",
     "a", "system", "tools", "tool_calls", "function", "name", "arguments", "prompt", "chosen", "rejected", "question",
     "answer", "Question", "Complex_CoT", "Response", "kind", "text", "type", "reasoning_content", "thinking",
     "function_call", "weight", "train", "loss")
)  # fmt: skip
ROLES = st.sampled_from((*ROLE_MARKS, "human", "gpt", "observation"))
ANYTHING = st.recursive(
    LEAVES | ROLES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS | st.text(max_size=5), inner, max_size=5),
    max_leaves=12,
)
ROWS = ANYTHING | st.sampled_from([row for rows in CONTENTS.values() for row in rows]).flatmap(strange)
LAYOUTS = st.sampled_from([Layout(), *(Layout(name) for name in FORMATS)]) | st.builds(
    Layout,
    st.sampled_from(("alpaca", "sharegpt", "openthoughts", "preference", "prompt")),
    st.dictionaries(
        st.sampled_from(("prompt", "response", "messages", "chosen", "system", "history")), FIELDS, max_size=3
    ),
    st.dictionaries(st.sampled_from(("role_tag", "content_tag", "user_tag", "assistant_tag")), FIELDS, max_size=3),
)
CONVERSATION = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=40)}), max_size=5)


def as_row(convert: Callable[..., Any], *given: Any) -> Any:
    """A row that cannot be used is the end that the readers count."""
    try:
        return convert(*given)
    except RowError as error:
        raise UserError(str(error)) from error


@pytest.mark.parametrize("convert", [to_messages, to_preference, to_problem, to_prompt])
@thrown()
@given(row=ROWS, layout=LAYOUTS)
def test_a_row(throw, tokenizer, convert, row, layout):
    messages = throw(as_row, convert, row, layout).value
    if convert is to_messages and messages is not None:
        assert throw(encode_chat, tokenizer, messages).code == 0


@thrown()
@given(messages=ANYTHING | CONVERSATION | CONVERSATION.flatmap(strange), prompt=st.booleans())
def test_messages(throw, tokenizer, messages, prompt):
    encoded, text = throw(encode_chat, tokenizer, messages, prompt), throw(render, messages, prompt)
    assert encoded.code == text.code
    if encoded.value is not None:
        ids, mask = encoded.value
        assert len(ids) == len(mask) and set(mask) <= {0, 1}
        marks = [number for number in ids if number < len(tokenizer.special_ids)]
        spoken = [message for message in messages if message["role"] == "assistant"]
        thoughts = sum(message["content"].count(mark) for message in spoken for mark in ("<think>", "</think>"))
        assert len(marks) == 1 + len(messages) + len(spoken) + thoughts + prompt


@thrown()
@given(text=st.text("[](){}'\"\\,: 0a1Ntrue\n", max_size=60) | st.text(max_size=30).map(lambda text: f"[{text!r}]"))
@example("[" * 100_000)
@example("[" + "'a'," * 60_000 + "]")
@example("[" + "9" * 5000 + "]")
@example("['" + "\\N{DIGIT ONE}" * 1000 + "']")
@example("[" + "-" * 10_000 + "1]")
def test_a_list_in_a_cell(throw, text):
    throw(as_row, parse_list, text, "history")
