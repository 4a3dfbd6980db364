"""The chat layout: our rendering equals transformers', and only the assistant's words are learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from errors import UserError
from text.chat_template import Message, check_messages, encode_chat, encode_chats, render
from text.tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["你好，今天天气怎么样？ What is the weather today?\n" * 3] * 10, 290)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@st.composite
def conversations(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[Message]:
    """Any order of roles that the layout has, ended anywhere."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2))):
            messages.append({"role": "assistant", "content": draw(texts)})
            messages += [{"role": "tool", "content": draw(texts)} for _ in range(draw(st.integers(1, 2)))]
        messages.append({"role": "assistant", "content": draw(texts)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(texts)})
    return messages


def spelled() -> st.SearchStrategy[str]:
    return st.lists(st.one_of(st.text(max_size=10), st.sampled_from([*SPECIAL_TOKENS, "\n", " ", "{{ x }}"]))).map(
        "".join
    )


def plain() -> st.SearchStrategy[str]:
    """Texts that spell no special token: '<' is left out."""
    return st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(messages=conversations(spelled()))
def test_transformers_renders_the_same_string(theirs: PreTrainedTokenizerBase, messages: list[Message]) -> None:
    assert theirs.apply_chat_template(messages, tokenize=False) == render(messages)
    if messages[-1]["role"] != "assistant":
        ours = render(messages, add_generation_prompt=True)
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours


@settings(max_examples=150, deadline=None)
@given(messages=conversations(plain()), think=st.booleans())
def test_transformers_gives_the_same_ids_and_mask(
    theirs: PreTrainedTokenizerBase, tokenizer: Tokenizer, messages: list[Message], think: bool
) -> None:
    if think:
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = f"<think>{message['content']}\n</think>{message['content']}"
    encoded = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert encode_chat(tokenizer, messages) == (encoded["input_ids"], encoded["assistant_masks"])


def test_the_layout_is_deepseeks(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "Q2"},
    ]
    text = "<s><|system|>S<|user|>Q<|assistant|>A</s><|tool|>T<|assistant|>B</s><|user|>Q2"
    assert render(messages) == text
    assert render(messages, add_generation_prompt=True) == text + "<|assistant|>"
    ids, mask = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text + "<|assistant|>"
    assert mask[-1] == 0


@settings(max_examples=100, deadline=None)
@given(messages=conversations(plain()))
def test_learnt_are_the_assistants_words_and_their_end(tokenizer: Tokenizer, messages: list[Message]) -> None:
    ids, mask = encode_chat(tokenizer, messages)
    learnt = tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts], skip_special_tokens=False)
    assert learnt == "".join(m["content"] + "</s>" for m in messages if m["role"] == "assistant")


@settings(max_examples=100, deadline=None)
@given(messages=conversations(spelled()))
def test_nothing_spelled_becomes_a_special_token(tokenizer: Tokenizer, messages: list[Message]) -> None:
    ids, _ = encode_chat(tokenizer, messages)
    special = [tokenizer.raw.id_to_token(i) for i in ids if i < len(SPECIAL_TOKENS)]
    expected = ["<s>"]
    for message in messages:
        expected.append(f"<|{message['role']}|>")
        if message["role"] == "assistant":
            rest = message["content"]
            while marks := [mark for mark in ("<think>", "</think>") if mark in rest]:
                first = min(marks, key=rest.index)
                expected.append(first)
                rest = rest[rest.index(first) + len(first) :]
            expected.append("</s>")
    assert special == expected
    assert tokenizer.decode(ids, skip_special_tokens=False) == render(messages)


def test_a_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    short = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": ""}]
    long = [*short, {"role": "user", "content": "today?"}, {"role": "assistant", "content": "<think>x</think> y"}]
    assert encode_chats(tokenizer, [short, long, short]) == [encode_chat(tokenizer, m) for m in (short, long, short)]
    assert encode_chats(tokenizer, []) == []


USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "t"}


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        ([ASSISTANT], "message 1: role 'assistant' cannot come at the beginning; .* follows a user's"),
        ([TOOL], "message 1: role 'tool' cannot come at the beginning"),
        ([USER, USER], "message 2: role 'user' cannot come after 'user'"),
        ([USER, ASSISTANT, ASSISTANT], "message 3: role 'assistant' cannot come after 'assistant'"),
        ([USER, SYSTEM], "message 2: role 'system' cannot come after 'user'; .* comes first, once"),
        ([SYSTEM, SYSTEM], "message 2: role 'system' cannot come after 'system'"),
        ([SYSTEM, ASSISTANT], "message 2: role 'assistant' cannot come after 'system'"),
        ([USER, TOOL], "message 2: role 'tool' cannot come after 'user'; .* follows the assistant's call"),
        ([USER, ASSISTANT, TOOL, USER], "message 4: role 'user' cannot come after 'tool'"),
        ([{"role": "bot", "content": "x"}], "message 1 has the unknown role 'bot'; use system, user"),
        ([{"role": ["user"], "content": "x"}], "message 1 has the unknown role"),
        ([{"content": "x"}], "message 1 has the unknown role None"),
        ([{"role": "user"}], r"message 1 \(user\): 'content' is missing; it must be text"),
        ([{"role": "user", "content": ["x"]}], r"message 1 \(user\): 'content' is a list; it must be text"),
        ([USER, "a"], "message 2 is text; it must be an object"),
    ],
)
def test_wrong_messages_are_named(tokenizer: Tokenizer, messages: list[Message], what: str) -> None:
    for function in (check_messages, render, lambda wrong: encode_chat(tokenizer, wrong)):
        with pytest.raises(UserError, match=what):
            function(messages)


def test_a_generation_prompt_needs_something_to_answer() -> None:
    for messages in ([USER, ASSISTANT], [SYSTEM]):
        with pytest.raises(UserError, match="nothing to answer"):
            render(messages, add_generation_prompt=True)


def test_the_template_refuses_an_unknown_role_too(theirs: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="unknown role bot"):
        theirs.apply_chat_template([{"role": "bot", "content": "x"}], tokenize=False)
