"""Conversations and rows of any structure: read, or refused as a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from errors import UserError
from fuzz.hostile import Thrower, thrown
from fuzz.mutations import strange, values
from fuzz.test_fuzz_rows import CONTENTS
from text.chats.chat_template import ROLE_MARKS, encode_chat, render
from text.chats.conversations import to_messages
from text.chats.literals import parse_list
from text.chats.preferences import to_preference
from text.chats.problems import to_problem
from text.chats.prompts import to_prompt
from text.sources.formats import FORMATS, Layout
from text.sources.row_report import RowError
from text.tokenizer import Tokenizer

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | values()
NAMES = st.sampled_from(
    ("role", "content", "from", "value", "messages", "conversations", "instruction", "input", "output", "history", "q",
     "a", "system", "tools", "tool_calls", "function", "name", "arguments", "prompt", "chosen", "rejected", "question",
     "answer", "Question", "Complex_CoT", "Response", "kind", "text", "type", "reasoning_content", "thinking",
     "function_call", "weight", "train", "loss")
)  # fmt: skip
ROLES = st.sampled_from((*ROLE_MARKS, "human", "gpt", "observation"))
ANYTHING = st.recursive(
    LEAVES | ROLES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=5),
    max_leaves=12,
)
ROWS = ANYTHING | st.sampled_from([row for rows in CONTENTS.values() for row in rows]).flatmap(strange)
LAYOUTS = st.sampled_from([Layout(), *(Layout(name) for name in FORMATS)]) | st.builds(
    Layout,
    st.sampled_from(("alpaca", "sharegpt", "openthoughts", "preference", "prompt")),
    st.dictionaries(
        st.sampled_from(("prompt", "response", "messages", "chosen", "system", "history")), NAMES, max_size=3
    ),
    st.dictionaries(st.sampled_from(("role_tag", "content_tag", "user_tag", "assistant_tag")), NAMES, max_size=3),
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
def test_a_row(throw: Thrower, tokenizer: Tokenizer, convert: Callable[..., Any], row: Any, layout: Layout) -> None:
    messages = throw(as_row, convert, row, layout).value
    if convert is to_messages and messages is not None:
        assert throw(encode_chat, tokenizer, messages).code == 0


@thrown()
@given(messages=ANYTHING | CONVERSATION | CONVERSATION.flatmap(strange), prompt=st.booleans())
def test_messages(throw: Thrower, tokenizer: Tokenizer, messages: Any, prompt: bool) -> None:
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
def test_a_list_in_a_cell(throw: Thrower, text: str) -> None:
    throw(as_row, parse_list, text, "history")
