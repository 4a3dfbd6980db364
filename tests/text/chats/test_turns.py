"""Turns of every common form become the same messages; what is marked as not trained on never has a label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import write

from dataset import ChatDataset
from text.chats.conversations import read_conversations, to_messages
from text.chats.encoded import EncodedChats
from text.chats.preferences import read_preferences
from text.chats.problems import to_problem
from text.chats.prompts import to_prompt
from text.inspection import Limits, check_source
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport
from training.distill.answers import Answer, questions
from training.distill.curation import AnswerSettings, Rewards, curate

USER = {"role": "user", "content": "ping?"}
TOOL = {"role": "tool", "content": "pong"}
DONE = {"role": "assistant", "content": "It answers."}
TOOLS = [{"type": "function", "function": {"name": "ping", "description": "是否在线"}}]


def answer_of(**turn: object) -> str:
    return to_messages([USER, {"role": "assistant", **turn}])[-1]["content"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_become_the_think_part_of_an_answer(key):
    expected = "<think>\nFour.\n</think>\n\nNine."
    assert answer_of(content="Nine.", **{key: "Four."}) == expected
    shared = [{"from": "human", "value": "Q", key: ""}, {"from": "gpt", "value": "Nine.", key: " Four.\n"}]
    assert to_messages({"conversations": shared})[-1]["content"] == expected
    assert answer_of(content="Nine.", **{key: None}) == answer_of(content="Nine.", **{key: " "}) == "Nine."
    assert answer_of(content=expected, **{key: "Four."}) == expected
    with pytest.raises(RowError, match=r"turn 2 \(assistant\) has thoughts but no answer"):
        answer_of(content="", **{key: "Four."})


def test_text_in_parts_is_joined():
    assert answer_of(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
    with pytest.raises(RowError, match=r"part 2 of the text of turn 2 \(assistant\) is of type 'image_url'; only text"):
        answer_of(content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}])


@pytest.mark.parametrize("spell", [lambda tools: tools, lambda tools: json.dumps(tools), str])
def test_tools_in_a_system_turn_are_tools_of_the_row(spell):
    """However they are spelled: the exported chat template writes them with `tojson`."""
    system, text = {"role": "system", "content": "S"}, "S\n\n" + json.dumps(TOOLS, ensure_ascii=False)
    turn = {**system, "tools": spell(TOOLS)}
    for row in (
        {"messages": [turn, USER, DONE]},
        {"messages": [system, USER, DONE], "tools": spell(TOOLS)},
        {"messages": [turn, USER, DONE], "tools": spell(TOOLS)},
        {"messages": [USER, DONE], "system": "S", "tools": spell(TOOLS)},
    ):
        assert to_messages(row)[0] == {"role": "system", "content": text}


@pytest.mark.parametrize(
    "arguments", [{"arguments": value} for value in ("", " ", None, {}, "{}", "null")] + [{}], ids=str
)
def test_a_call_without_arguments_has_empty_ones(arguments):
    call = {"name": "ping", **arguments}
    for turn in (
        {"tool_calls": [{"id": "c1", "type": "function", "function": call}]},
        {"tool_calls": json.dumps([call])},
        {"function_call": call},
        {"function_call": json.dumps(call)},
    ):
        assert answer_of(content=None, **turn) == '{"name": "ping", "arguments": {}}'


@pytest.mark.parametrize("spell", [json.dumps, str, lambda calls: calls])
def test_calls_may_be_spelled_as_text_and_in_openais_older_way(spell):
    call, text = {"name": "hour", "arguments": {"town": "海边镇"}}, '{"name": "hour", "arguments": {"town": "海边镇"}}'
    functions = [{"type": "function", "function": call}] * 2
    assert answer_of(content="", tool_calls=spell(functions)) == f"{text}\n{text}"
    older = {"role": "assistant", "content": None, "function_call": spell(call)}
    messages = to_messages([USER, older, {"role": "function", "name": "hour", "content": "pong"}, DONE])
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] == text


@pytest.mark.parametrize(
    "calls", [3, "call it", "[{", [{}], [{"name": "p", "arguments": "{"}], [{"name": "p", "parameters": {"a": 1}}]]
)
def test_a_call_that_cannot_be_read_is_refused(calls):
    with pytest.raises(RowError, match="turn 2 has tool calls without a name and JSON arguments"):
        answer_of(content="", tool_calls=calls)


@pytest.mark.parametrize("spell", [lambda turns: turns, json.dumps, str])
def test_a_question_that_is_spelled_as_a_turn_is_its_text(spell):
    asked = {"role": "user", "content": "1+1?"}
    for turns in ([asked], asked):
        row = {"prompt": spell(turns), "answer": "2"}
        assert (to_problem(row).question, to_prompt(row).problem.answer) == ("1+1?", "2")
    system = {"role": "system", "content": "S"}
    assert to_prompt({"prompt": spell([system, asked])}).messages == (system, asked)
    with pytest.raises(RowError, match="'prompt' is a list; it must be text"):
        to_problem({"prompt": spell([system, asked]), "answer": "2"})


# What is trained on


def marked(**mark: object) -> dict:
    first = {"role": "assistant", "content": "not this", **mark}
    return {"messages": [USER, first, {"role": "user", "content": "再问"}, {"role": "assistant", "content": "that"}]}


OFF = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"train": "false"}, {"weight": 1, "loss": 0}]
ON = [{}, {"weight": 1}, {"train": True}, {"loss": 1.0}, {"weight": None}, {"weight": float("nan")}]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("mark", OFF + ON, ids=str)
def test_only_turns_that_are_not_marked_have_labels(mark, packing, tokenizer, tmp_path):
    data = ChatDataset([write(tmp_path / "a.jsonl", [marked(**mark)] * 2)], tokenizer, 60, packing=packing)
    batch = data.batch(range(len(data)))
    labels = batch["labels"][batch["labels"] >= 0].tolist()
    answers = ["that"] if mark in OFF else ["not this", "that"]
    assert tokenizer.decode(labels, skip_special_tokens=False) == "".join(f"{text}</s>" for text in answers) * 2
    assert "not this" in tokenizer.decode(batch["input_ids"].flatten().tolist())
    assert not data.report.read.notices


def test_what_follows_the_last_answer_that_is_trained_on_is_cut(tokenizer, tmp_path):
    turns = marked()["messages"]
    turns[3]["weight"] = 0
    chats = EncodedChats([write(tmp_path / "a.jsonl", [{"messages": turns}])], tokenizer, 60)
    assert tokenizer.decode(chats.ids.tolist()).endswith("not this") and chats.mask[-1] == 1
    assert chats.report.fates["unanswered"] == 1


def test_a_row_without_anything_to_train_on_is_counted(tmp_path):
    report, row = RowReport(), {"messages": [USER, {**DONE, "train": False}]}
    assert list(read_conversations(write(tmp_path / "a.jsonl", [row, marked()]), report=report)) == [
        to_messages(marked())
    ]
    assert report.problems == {"nothing to train on": 1}


def test_marks_are_part_of_what_a_run_depends_on(tokenizer, tmp_path):
    """Else a resumed run, or what a teacher said before, would go with other labels."""
    files = [
        write(tmp_path / name, [marked(**mark)] * 4) for name, mark in (("a.jsonl", {}), ("b.jsonl", {"weight": 0}))
    ]
    plain, weighted = (EncodedChats([file], tokenizer, 60) for file in files)
    assert plain.ids.tolist() == weighted.ids.tolist() and plain.fingerprint != weighted.fingerprint


def test_a_teacher_is_asked_without_marks_and_its_chats_keep_them():
    prompt = to_prompt({"messages": [*marked(weight=0)["messages"], USER]})
    (asks,) = questions([prompt], 1)
    assert asks == questions([to_prompt({"messages": [*marked()["messages"], USER]})], 1)[0]
    assert all(turn.keys() == {"role", "content"} for turn in asks[0].messages)
    known = {asks[0].key: Answer("pong", "stop")}
    (chat,), _ = curate([prompt], [asks], known, AnswerSettings(min_chars=1), Rewards.of({"correct": 1.0}), 9)
    assert [turn.get("train") for turn in to_messages(chat)] == [None, False, None, None, None, None]
    assert chat[-1] == {"role": "assistant", "content": "pong"}


def test_other_weights_are_counted_once_and_train_as_1(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [marked(), marked(weight=0.5), marked(weight=2), marked(loss="high")])
    found = check_source(Source.of(path), tokenizer, Limits(60))
    lines = found.lines(Limits(60))
    assert (
        f"  notice: 2 x 'weight' of a turn is neither 0 nor 1; the turn is trained on as with 1; the first: {path}:2"
        in lines
    )
    assert sum("'loss' of a turn" in line for line in lines) == 1
    assert found.trained == 4 * (len(tokenizer.encode("not this")) + len(tokenizer.encode("that")) + 2)


# Text that nothing reads


def notices(row: object, tmp_path: Path, read=read_conversations) -> list[str]:
    report = RowReport()
    assert len(list(read(write(tmp_path / "a.jsonl", [row] * 3), report=report))) == 3
    assert all(f"notice: 3 x {notice}" in "\n".join(report.lines()) for notice in report.notices)
    return sorted(report.notices)


SPEECH = "Four on the left, five on the right."
CHINESE = "先数左边四颗，再数右边五颗。"


@pytest.mark.parametrize("text", [SPEECH, CHINESE, [{"text": SPEECH}], {"steps": [CHINESE]}], ids=str)
def test_speech_that_is_not_read_is_named(text, tmp_path):
    turns = [USER, {**DONE, "inner_voice": text}]
    assert notices({"messages": turns}, tmp_path) == ["'inner_voice' of a turn of 'assistant' is not read"]
    for row in ({"messages": [USER, DONE]}, {"instruction": "Q", "output": "A"}, {"q": "Q", "a": "A"}):
        assert notices({**row, "rationale": text}, tmp_path) == ["the column 'rationale' is not read"]
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B", "critique": text}
    assert notices(pair, tmp_path, read_preferences) == ["the column 'critique' is not read"]


@pytest.mark.parametrize(
    ("turn", "notice"),
    [
        ({**USER, "reasoning_content": "Hm."}, "'reasoning_content' of a turn of 'user' is not read"),
        ({**USER, "tools": TOOLS}, "'tools' of a turn of 'user' is not read"),
        (
            {**USER, "weight": 1},
            "'weight' asks to train on a turn of 'user'; only the assistant's turns are trained on",
        ),
    ],
)
def test_what_has_no_place_in_a_turn_is_named(turn, notice, tmp_path):
    assert notices({"messages": [turn, DONE]}, tmp_path) == [notice]


@pytest.mark.parametrize(
    "more",
    [
        {"id": "7f3c 11 22 33 44", "prompt_id": SPEECH, "data_source": "a b c d e", "category": "about old maps etc"},
        {"chosenModel": "a b c d", "meta": {"note": SPEECH}, "url": "https://a.b/c?d=e f g h", "tags": ["a b c d e"]},
        {"score": 3.5, "ok": True, "nothing": None, "empty": "", "list": [], "kind": "a b c d", "lang": "zh"},
        {"file": "/a b c d.json", "hash": "0f" * 40, "code": "x" * 500, "text": "Q: ping? A: It answers. And so on."},
        {"prompt": "ping?", "raw": [{"role": "assistant", "content": "It answers."}], "short": "yes, it is"},
        {"conversations": json.dumps([USER, DONE])},
    ],
    ids=range(6),
)  # fmt: skip
def test_what_is_no_speech_or_was_read_is_not_named(more, tmp_path):
    """Ids, sources, scores, categories; columns that repeat the conversation."""
    row = {"messages": [{**USER, "id": "a b c d e", "weight": 0}, {**DONE, "weight": 1, "score": 0.5}], **more}
    assert notices(row, tmp_path) == []


def test_a_row_that_is_not_used_leaves_no_notice_and_notices_are_bounded(tmp_path):
    rows = [{"messages": [USER], "rationale": SPEECH}, {"messages": [USER, DONE]}]
    rows += [{"messages": [USER, DONE], f"x{chr(97 + n // 26)}{chr(97 + n % 26)}": SPEECH} for n in range(100)]
    for some, used in ((rows[:2], 1), (rows, 101)):
        report = RowReport()
        assert len(list(read_conversations(write(tmp_path / "a.jsonl", some), report=report))) == used
        assert bool(report.notices) == (used > 1) and len(report.lines()) < 30
