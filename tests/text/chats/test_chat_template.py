"""The chat layout: our rendering equals transformers', and only the assistant's words are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from model.checkpoint.gguf_tokenizer import GENERATION_MARK
from text.chats.chat_template import Message, check_messages, encode_chat, encode_chats, render
from text.chats.conversations import to_messages
from text.chats.turns import THOUGHTS
from text.tokenizer import SPECIAL_TOKENS, Tokenizer
from text.tokenizer_training import train_bpe

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "t"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["你好，今天天气怎么样？ What is the weather today?\n" * 3] * 10, 290)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

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
    parts = st.text(max_size=10) | st.sampled_from([*SPECIAL_TOKENS, "\n", " ", "{{ x }}"])
    return st.lists(parts).map("".join)


def plain() -> st.SearchStrategy[str]:
    """Texts that spell no special token: '<' is left out."""
    return st.text(st.characters(exclude_characters="<\0", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=80, deadline=None)
@given(messages=conversations(spelled()))
def test_transformers_renders_the_same_string(theirs, messages):
    assert theirs.apply_chat_template(messages, tokenize=False) == render(messages)
    if messages[-1]["role"] != "assistant":
        ours = render(messages, add_generation_prompt=True)
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours


@settings(max_examples=80, deadline=None)
@given(messages=conversations(plain()), think=st.booleans())
def test_transformers_gives_the_same_ids_and_mask(theirs, tokenizer, messages, think):
    if think:
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = f"<think>{message['content']}\n</think>{message['content']}"
    encoded = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert encode_chat(tokenizer, messages) == (encoded["input_ids"], encoded["assistant_masks"])


def json_values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[object]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=5)


@st.composite
def sent_turns(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[dict]:
    """Conversations as programs send them: parts, thoughts, tool calls, and content that is null or missing."""
    words = texts.filter(str.strip)

    def content(text: str) -> object:
        return draw(st.sampled_from([text, [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]]))

    def answer(calls: bool) -> dict:
        turn: dict = {"role": "assistant"}
        if draw(st.booleans()):
            turn[draw(st.sampled_from(THOUGHTS))] = draw(texts)
        if calls:
            turn["tool_calls"] = [draw(tool_calls) for _ in range(draw(st.integers(1, 2)))]
        if not calls or draw(st.booleans()):
            turn["content"] = content(draw(words))
        elif draw(st.booleans()):
            turn["content"] = draw(st.sampled_from([None, "", "  "]))
        return turn

    arguments = st.dictionaries(texts, json_values(texts), max_size=2)
    spelled = arguments.map(lambda value: json.dumps(value, ensure_ascii=False))
    functions = st.fixed_dictionaries(
        {"name": texts}, optional={"arguments": arguments | spelled | st.just("") | st.none()}
    )
    tool_calls = functions | functions.map(lambda function: {"id": "c1", "type": "function", "function": function})
    turns = [{"role": "system", "content": content(draw(words))}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        turns.append({"role": "user", "content": content(draw(words))})
        if draw(st.booleans()):
            turns += [answer(calls=True), {"role": "tool", "content": content(draw(texts))}]
        turns.append(answer(calls=draw(st.booleans())))
    return turns


def tool_lists(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list | None]:
    return st.none() | st.lists(st.dictionaries(texts, json_values(texts), max_size=3), max_size=2)


@settings(max_examples=80, deadline=None)
@given(turns=sent_turns(plain()), tools=tool_lists(plain()))
def test_turns_as_programs_send_them_render_as_training_reads_them(theirs, tokenizer, turns, tools):
    messages = to_messages({"messages": turns, "tools": tools})
    options = {"tools": tools, "return_assistant_tokens_mask": True, "return_dict": True}
    assert theirs.apply_chat_template(turns, tools=tools, tokenize=False) == render(messages)
    encoded = theirs.apply_chat_template(turns, **options)
    assert encode_chat(tokenizer, messages) == (encoded["input_ids"], encoded["assistant_masks"])


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "海边镇", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
RENDERED = '{"name": "weather", "arguments": {"town": "海边镇", "days": 2}}'


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"content": None, "tool_calls": [CALL]}, RENDERED),
        ({"tool_calls": [CALL, CALL]}, f"{RENDERED}\n{RENDERED}"),
        ({"content": "", "tool_calls": [CALL["function"]]}, RENDERED),
        ({"content": "I look.", "tool_calls": [CALL]}, f"I look.\n{RENDERED}"),
        ({"content": "", "tool_calls": [{"name": "ping", "arguments": ""}]}, '{"name": "ping", "arguments": {}}'),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": " b ", "reasoning_content": "a\n"}, "<think>\na\n</think>\n\nb"),
        ({"content": "<think>a</think>b", "reasoning_content": "a"}, "<think>a</think>b"),
        ({"content": None, "reasoning": "a", "tool_calls": [CALL]}, f"<think>\na\n</think>\n\n{RENDERED}"),
    ],
)
def test_an_answer_of_any_form_has_one_rendering(theirs, turn, text):
    turns = [USER, {"role": "assistant", **turn}]
    assert theirs.apply_chat_template(turns, tokenize=False) == f"<s><|user|>q<|assistant|>{text}</s>"
    assert render(to_messages(turns)) == f"<s><|user|>q<|assistant|>{text}</s>"


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "S"}], [{"role": "system", "content": ""}]])
def test_tools_stand_in_the_system_prompt(theirs, before):
    turns = [*before, USER]
    given = theirs.apply_chat_template(turns, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    trained = to_messages({"messages": [*turns, ASSISTANT], "tools": json.dumps(TOOLS)})[:-1]
    assert given == render(trained, add_generation_prompt=True)
    assert given.count("<|system|>") == 1 and given.count('"name": "weather"') == 1
    assert theirs.apply_chat_template(turns, tools=[], tokenize=False) == render(turns)


def test_the_template_needs_no_more_than_a_small_engine_has(theirs):
    """llama.cpp and others implement a part of Jinja."""
    parsed = jinja2.Environment().parse(GENERATION_MARK.sub("", theirs.chat_template))
    filters = {node.name for node in parsed.find_all(jinja2.nodes.Filter)}
    tests = {node.name for node in parsed.find_all(jinja2.nodes.Test)}
    calls = {node.node.name for node in parsed.find_all(jinja2.nodes.Call) if isinstance(node.node, jinja2.nodes.Name)}
    assert filters == {"tojson", "trim"} and tests == {"string"} and calls == {"namespace", "raise_exception"}
    assert not list(parsed.find_all((jinja2.nodes.Macro, jinja2.nodes.Include, jinja2.nodes.FilterBlock)))


@pytest.mark.parametrize(
    ("turn", "what"),
    [({"content": [{"type": "image_url"}]}, "only text is read"), ({"role": "bot"}, "unknown role bot")],
)
def test_the_template_refuses_what_training_refuses(theirs, turn, what):
    with pytest.raises(Exception, match=what):
        theirs.apply_chat_template([{**USER, **turn}], tokenize=False)


def test_the_layout_is_deepseeks(tokenizer):
    turns = ("system", "S"), ("user", "Q"), ("assistant", "A"), ("tool", "T"), ("assistant", "B"), ("user", "Q2")
    messages = [{"role": role, "content": content} for role, content in turns]
    text = "<s><|system|>S<|user|>Q<|assistant|>A</s><|tool|>T<|assistant|>B</s><|user|>Q2"
    assert render(messages) == text
    assert render(messages, add_generation_prompt=True) == text + "<|assistant|>"
    ids, mask = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text + "<|assistant|>" and mask[-1] == 0


@settings(max_examples=100, deadline=None)
@given(messages=conversations(plain()))
def test_trained_on_are_the_assistants_words_and_their_end(tokenizer, messages):
    ids, mask = encode_chat(tokenizer, messages)
    trained = tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts], skip_special_tokens=False)
    assert trained == "".join(m["content"] + "</s>" for m in messages if m["role"] == "assistant")


@settings(max_examples=100, deadline=None)
@given(messages=conversations(spelled()))
def test_nothing_spelled_becomes_a_special_token(tokenizer, messages):
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


def test_a_batch_equals_one_by_one(tokenizer):
    short = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": ""}]
    long = [*short, {"role": "user", "content": "today?"}, {"role": "assistant", "content": "<think>x</think> y"}]
    assert encode_chats(tokenizer, [short, long, short]) == [encode_chat(tokenizer, m) for m in (short, long, short)]
    assert encode_chats(tokenizer, []) == []


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
def test_wrong_messages_are_named(tokenizer, messages, what):
    for function in (check_messages, render, lambda wrong: encode_chat(tokenizer, wrong)):
        with pytest.raises(UserError, match=what):
            function(messages)
    for ended in ([USER, ASSISTANT], [SYSTEM]):
        with pytest.raises(UserError, match="nothing to answer"):
            render(ended, add_generation_prompt=True)
