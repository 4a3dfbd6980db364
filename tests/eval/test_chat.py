"""The chat obeys its commands and its options."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
import torch

from eval.answering import Answerer
from eval.chat import chat
from model.decoding.sampling import Sampling
from model.quantized import Int8Weight, QuantizedLinear


@pytest.fixture
def talk(pretrained, script, monkeypatch):
    """`talk(lines, *options)`: a session in which the person types these lines."""

    def talk(lines: str, *options: object):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        given = ["--ckpt", pretrained / "final", "--temperature", 0, "--max_new_tokens", 12, "--device", "cpu"]
        return script(chat, *given, *options)

    return talk


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[list[dict]]]:
    """The conversations that the model was asked to continue."""
    seen, stream = [], Answerer.stream_reply

    def spy(self, messages, *rest):
        seen.append(list(messages))
        return stream(self, messages, *rest)

    monkeypatch.setattr(Answerer, "stream_reply", spy)
    return seen


def test_once_answers_and_ends(talk, answerer):
    done = talk("", "--once", "你好", "--dtype", "fp32")
    pieces = answerer.stream_reply([{"role": "user", "content": "你好"}], Sampling(temperature=0), 12)
    want = "".join(piece for piece, _ in pieces)
    assert done.code == 0 and done.out == want + "\n" and "tok/s]" in done.err


def test_the_history_grows_until_it_is_reset(talk, asked):
    done = talk("一\n\n二\n/rest\n/reset\n三\n/quit\n四\n")
    assert done.code == 0 and "(forgotten)" in done.out
    said = [[message["content"] for message in messages if message["role"] == "user"] for messages in asked]
    assert said == [["一"], ["一", "二"], ["三"]]
    roles = [message["role"] for message in asked[1]]
    assert roles == ["user", "assistant", "user"] and asked[1][1]["content"] in done.out
    assert done.out.count("/reset forgets the conversation, /system TEXT") == 2  # at first, and for /rest


def test_bytes_that_are_not_text_are_reported_and_the_conversation_continues(talk, asked, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO("一\n".encode() + b"\xc4\xe3\xba\xc3\n" + "二\n".encode()), encoding="utf-8")
    monkeypatch.setattr(io, "StringIO", lambda lines: typed)
    done = talk("")
    assert done.code == 0 and "error: not all of this is utf-8; set the terminal to UTF-8" in done.err
    assert [m["content"] for m in asked[-1] if m["role"] == "user"] == ["一", "二"] and len(asked) == 2


def test_the_system_prompt_can_be_set_and_cleared(talk, asked):
    done = talk("一\n/system 你是月牙镇的导游。\n二\n/system\n三\n", "--system", "短。")
    systems = [[m["content"] for m in messages if m["role"] == "system"] for messages in asked]
    assert systems == [["短。"], ["你是月牙镇的导游。"], []]
    assert all(len(messages) <= 2 for messages in asked)  # a new system prompt begins a new conversation
    assert "(system prompt: 你是月牙镇的导游。)" in done.out and "(system prompt: none)" in done.out


def test_a_conversation_that_is_too_long_says_so_and_continues(talk, asked):
    done = talk("嗯" * 3000 + "\n好\n")
    assert done.err.count("error: the conversation has") == 1 and "/reset" in done.err
    assert [len(messages) for messages in asked] == [1, 1] and done.code == 0


@torch.no_grad()
def test_int8_weights_answer_as_their_rounded_values_would(pretrained):
    folder = str(pretrained / "final")
    packed, rounded = (Answerer.open(folder, "cpu", "fp32", quantize=bits).model for bits in ("int8", ""))
    ids, weights = torch.arange(100, 124)[None], dict(rounded.named_parameters())
    exact, changed = rounded(ids).logits, 0
    for name, module in packed.named_modules():
        held = {key: getattr(module, key, None) for key in ("gate_up_proj", "down_proj")}
        if isinstance(module, QuantizedLinear):
            held = {"weight": module.quantized}
        for key, value in held.items():
            if isinstance(value, Int8Weight):
                weights[f"{name}.{key}"].copy_(value.dense(torch.float32))
                changed += 1
    logits = packed(ids).logits
    torch.testing.assert_close(logits, rounded(ids).logits)
    assert changed > 10 and 0 < (logits - exact).norm() / exact.norm() < 0.05
    prompt = ids[:, :9]
    plain = rounded.generate(prompt, max_new_tokens=20)
    for model in packed, rounded:
        assert torch.equal(model.generate(prompt, max_new_tokens=20, speculative=True, draft_tokens=2), plain)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--temperature", -1], "temperature"),
        (["--top_p", 0], "top_p"),
        (["--temperatur", 1], "temperatur"),
        (["--ckpt", "nowhere"], "nowhere.*: "),
        (["--speculative", "--repetition_penalty", 1.5, "--once", "a"], "speculative.*without repetition penalty"),
        (["--draft_tokens", -1], "--draft_tokens -1"),
        (["--quantize", "int3"], "--quantize int3"),
    ],
)
def test_a_wrong_option_is_one_line(options, what, talk):
    done = talk("", *options)
    assert done.code == 2 and re.match(f"error: .*{what}", done.err) and done.err.count("\n") == 1


def test_without_a_seed_answers_differ_and_with_one_they_repeat(talk):
    options = ["--once", "月牙镇", "--temperature", 1.5, "--top_p", 1]
    answers = [talk("", *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
