"""A reply's text is cut, and parted into thoughts, content and calls, the same however its characters arrive."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.serving.replies import spoken
from eval.serving.reply_text import ChatSplitter, ReplyText, StopFilter

CALL = '{"name": "add", "arguments": {"a": 1, "b": "二"}}'
REPLIES = [
    ("你好！", {"content": "你好！"}),
    ("  spaces stay \n", {"content": "  spaces stay \n"}),
    ("<think>\n一加一\n是二\n</think>\n\n二", {"reasoning_content": "一加一\n是二", "content": "二"}),
    ("<think></think>a < b </think>", {"content": "a < b </think>"}),
    ("<think>\n never done <", {"reasoning_content": "never done <"}),
    ("a <think>b</think>", {"content": "a <think>b</think>"}),
    (CALL, {"tool_calls": ["add"]}),
    (f"我来算。\n{CALL}\n{CALL}", {"content": "我来算。", "tool_calls": ["add", "add"]}),
    (f"<think>\nuse it\n</think>\n\n{CALL}", {"reasoning_content": "use it", "tool_calls": ["add"]}),
    ('{"name": "other", "arguments": {}}\nx', {"content": '{"name": "other", "arguments": {}}\nx'}),
    ('{"name": "add", "argu', {"content": '{"name": "add", "argu'}),
    ("a\n{b}\n\n{", {"content": "a\n{b}\n\n{"}),
    (f"say {CALL}", {"content": f"say {CALL}"}),
    ("[" * 5000 + "\n{" * 3, {"content": "[" * 5000 + "\n{" * 3}),
]


def split(parts: list[str]) -> dict:
    splitter = ChatSplitter(["add"])
    pieces = [piece for part in parts for piece in splitter.push(part)] + list(splitter.flush())
    fields = spoken(pieces)
    if "tool_calls" in fields:
        fields["tool_calls"] = [call["function"]["name"] for call in fields["tool_calls"]]
    return fields


@pytest.mark.parametrize(("text", "fields"), REPLIES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_an_answer_is_parted_however_it_arrives(text, fields, size):
    assert split([text[start : start + size] for start in range(0, len(text), size)]) == fields


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "{", "}", CALL, "\n", " ", "字"]), max_size=12), st.data())
def test_no_character_of_an_answer_is_lost_or_doubled(parts, data):
    whole = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=4).map(sorted))
    assert split([whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]) == split([whole])
    if "<think>" not in whole and CALL not in whole:
        assert split([whole]) == ({"content": whole} if whole else {})


def test_a_call_keeps_its_arguments_as_json():
    (piece,) = [*(splitter := ChatSplitter(["add"])).push(CALL), *splitter.flush()]
    assert json.loads(piece.text["function"]["arguments"]) == {"a": 1, "b": "二"}


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("abcabd!", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("one two", ["two", "e t"], "on"),
        ("ab", ["abc"], "ab"),
        ("xyz", [], "xyz"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_text_ends_before_the_first_stop(text, stops, kept, size):
    held = StopFilter(stops)
    out = "".join(held.push(text[start : start + size]) for start in range(0, len(text), size)) + held.flush()
    assert out == kept


def test_a_character_that_the_limit_cut_is_left_out_and_one_that_the_model_left_open_is_marked(tokenizer):
    first, *_ = (token for token in range(13, 600) if tokenizer.raw.id_to_token(token) == "ä")  # byte e4
    for finish, text in (("length", ""), ("stop", "\ufffd")):
        reply = ReplyText(tokenizer, [], None)
        pieces = reply.push(first, "length")[0] if finish == "length" else reply.push(first, "")[0]
        if finish == "stop":
            pieces += reply.push(tokenizer.eos_id, finish)[0]
        assert "".join(piece.text for piece in pieces) == text
