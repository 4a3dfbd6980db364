"""Replies of many providers: thoughts become the think part, errors keep the provider's words and status."""

from __future__ import annotations

import json

import pytest

from training.distill.answers import Answer
from training.distill.reply import NoAnswer, read_reply

THOUGHTS = "Four on the left, five on the right."
TEXT = {"type": "text", "text": "Nine."}


def reply(message: dict) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "Nine.", **message}}]}).encode()


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": THOUGHTS},
        {"reasoning": THOUGHTS},
        {"thinking": THOUGHTS},
        {"reasoning": THOUGHTS, "reasoning_content": THOUGHTS},
        {"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHTS}]},
        {"reasoning": THOUGHTS, "reasoning_details": [{"type": "reasoning.summary", "summary": THOUGHTS}]},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}, {"summary": f" {THOUGHTS}"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]}, TEXT]},
        {"content": [{"type": "thinking", "thinking": THOUGHTS, "signature": "x"}, TEXT]},
        {"content": f"<think>\n{THOUGHTS}\n</think>\n\nNine."},
        {"content": f"<think>\n{THOUGHTS}\n</think>\n\nNine.", "reasoning": THOUGHTS},
        {"content": f"\n{THOUGHTS}\n</think>\n\nNine."},
    ],
)
def test_thoughts_become_the_think_part(message):
    assert read_reply(200, reply(message)).text == f"<think>\n{THOUGHTS}\n</think>\n\nNine."


@pytest.mark.parametrize(
    "message",
    [
        {"content": [TEXT]},
        {"content": [{"type": "text", "text": "Ni"}, {"type": "image_url", "image_url": {}}, {"text": "ne."}]},
        {"content": "Nine.", "reasoning": "", "reasoning_content": None, "reasoning_details": []},
        {"content": [{"type": "thinking", "thinking": ""}, TEXT]},
    ],
)
def test_parts_are_joined_and_no_thoughts_make_no_think_part(message):
    assert read_reply(200, reply(message)) == Answer("Nine.", "stop", 0)


def test_blocks_of_thoughts_are_paragraphs():
    blocks = [{"type": "reasoning.text", "text": text} for text in ("one \n", "two")]
    assert read_reply(200, reply({"reasoning_details": blocks})).text.startswith("<think>\none\n\ntwo\n</think>\n\n")


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"error": {"message": "day is over", "code": 429}}, 429, "error 429 (day is over)"),
        ({"choices": None, "error": {"message": "Provider\nfailed", "code": "502", "metadata": {"raw": "CUDA"}}}, 502,
         "error 502 (Provider failed: 502: CUDA)"),
        ({"error": "model is loading"}, 200, "no answer (model is loading)"),
        ({"object": "error", "message": "overloaded", "code": 503}, 503, "error 503 (overloaded)"),
        ({"detail": [{"msg": "too late"}]}, 200, "no answer (too late)"),
        ({"choices": [{"error": {"message": "cut off", "code": 502}, "message": {"content": "Ni"}}]}, 502,
         "error 502 (cut off)"),
        ({"choices": [{"finish_reason": "error", "message": {"content": "Ni"}}]}, 200,
         'no answer ({"choices": [{"finish_reason": "error", "message": {"content": "Ni"}}]})'),
        ({"choices": None}, 200, 'no answer ({"choices": null})'),
        ({"choices": [None]}, 200, 'no answer ({"choices": [null]})'),
        ([], 200, "no answer ([])"),
        (b"", 200, "no answer (an empty reply)"),
        (b"<html>\x1b[2J", 200, "no answer (<html>\\x1b[2J)"),
    ],
)  # fmt: skip
def test_a_200_without_an_answer_has_the_servers_words_and_the_status_it_names(body, status, reason):
    with pytest.raises(NoAnswer) as caught:
        read_reply(200, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (caught.value.status, str(caught.value)) == (status, f"status 200 with {reason}")
