"""Chat data of every layout becomes messages; every row that does not is counted with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import write

from errors import UserError
from text.chats.conversations import read_conversations
from text.sources.row_report import RowReport

GOOD = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}
LINE = json.dumps(GOOD, ensure_ascii=False).encode()


def read_row(folder: Path, row: object) -> list[tuple[str, str]]:
    """(role, content) of the one conversation in a file of one row."""
    (messages,) = read_conversations(write(folder / "a.jsonl", [json.dumps(row)]), on_error="stop")
    return [(message["role"], message["content"]) for message in messages]


ASKED = [({"input": "cat"}, "Hi\ncat"), ({"input": ""}, "Hi"), ({"input": None}, "Hi"), ({}, "Hi")]


@pytest.mark.parametrize(("more", "asked"), ASKED)
def test_alpaca_joins_instruction_and_input(tmp_path, more, asked):
    row = {"instruction": "Hi", "output": " 猫\n", **more}
    assert read_row(tmp_path, row) == [("user", asked), ("assistant", " 猫\n")]


def test_sharegpt_names_become_roles(tmp_path):
    names = ["system", "human", "function_call", "observation", "gpt", "user", "assistant", "tool", "gpt"]
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool", "assistant"]
    turns = [{"from": name, "value": str(number)} for number, name in enumerate(names)]
    assert read_row(tmp_path, {"conversations": turns}) == [(role, str(number)) for number, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("extra", "system", "with_own"),
    [
        ({"system": "S"}, "S", "S\n\nown"),
        ({"tools": '[{"name": "查"}]'}, '[{"name": "查"}]', 'own\n\n[{"name": "查"}]'),
        ({"tools": [{"name": "查"}]}, '[{"name": "查"}]', 'own\n\n[{"name": "查"}]'),
        ({"system": "S", "tools": "T"}, "S\n\nT", "S\n\nown\n\nT"),
        ({"system": "", "tools": "[]"}, None, "own"),
        ({"system": None, "tools": None}, None, "own"),
    ],
)
def test_system_and_tools_of_the_row_are_the_system_prompt(tmp_path, extra, system, with_own):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    expected = [("user", "q"), ("assistant", "a")]
    row = {"conversations": turns, **extra}
    assert read_row(tmp_path, row) == ([("system", system), *expected] if system else expected)
    row["conversations"] = [{"from": "system", "value": "own"}, *turns]
    assert read_row(tmp_path, row)[0] == ("system", with_own)


def test_messages_may_be_a_bare_list(tmp_path):
    expected = [(message["role"], message["content"]) for message in GOOD["messages"]]
    assert read_row(tmp_path, GOOD["messages"]) == read_row(tmp_path, GOOD) == expected


BROKEN_ROWS = [
    ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn", "'messages' has no assistant turn"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "no assistant turn",
     "'conversations' has no assistant turn"),
    ({"conversations": []}, "no assistant turn", "'conversations' has no assistant turn"),
    ({"conversations": "q"}, "wrong type", "'conversations' is text; it must be a list of turns"),
    ({"conversations": ["q"]}, "wrong type", "turn 1 is text; it must be an object"),
    ({"conversations": [{"from": "human", "value": 3}]}, "wrong type", "the text of turn 1 (human) is a number"),
    ({"messages": [{"role": "user"}]}, "wrong type", "the text of turn 1 (user) is missing"),
    ({"messages": [{"role": "user", "tool_calls": 3}]}, "wrong type", "turn 1 has tool calls without a name"),
    ({"conversations": [{"from": "bot", "value": "q"}]}, "unknown role",
     "turn 1 is from 'bot'; known are system, user"),
    ({"messages": [{"content": "q"}]}, "unknown role", "turn 1 is from None"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "wrong order of roles",
     "'assistant' cannot come at the beginning"),
    ({"instruction": "q", "output": ""}, "empty text", "message 2 (assistant) is empty"),
    ({"instruction": "q", "output": " \n"}, "empty text", "message 2 (assistant) is empty"),
    ({"instruction": "", "output": "a"}, "empty text", "message 1 (user) is empty"),
    ({"instruction": "q"}, "wrong type", "'output' is missing; it must be text"),
    ({"instruction": "q", "output": ["a"]}, "wrong type", "'output' is a list; it must be text"),
    ({"instruction": "q", "input": 5, "output": "a"}, "wrong type", "'input' is a number"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, "wrong type", "'history' must be a list of"),
    ({"instruction": "q", "output": "a", "history": [["x", 1]]}, "wrong type", "an answer in 'history' is a number"),
    ({"instruction": "q", "output": "a", "system": {}}, "wrong type", "'system' is an object"),
    ({"instruction": "q", "output": "a\0"}, "NUL character", "message 2 (assistant) has a NUL character"),
    ({"text": "q"}, "unknown layout", "has 'text' but neither 'messages', 'conversations' nor 'instruction'"),
    ({}, "unknown layout", "has no keys but neither"),
    ("q", "not a conversation", "the row is text; it must be an object or a list"),
    (None, "not a conversation", "the row is missing"),
]  # fmt: skip
BROKEN_LINES = [
    (b'{"messages": [{"role": "us', "broken JSON", "broken JSON (Unterminated string"),
    ('{"instruction": "问", "output": "答"}'.encode("gbk"), "undecodable", "not UTF-8; convert it with iconv -f GBK"),
    (b'{"instruction": "q\x00", "output": "a"}', "NUL byte", "the text holds a NUL byte"),
    (b"[" * 100_000, "broken JSON", "broken JSON"),
    *((json.dumps(row).encode(), kind, what) for row, kind, what in BROKEN_ROWS),
]


@pytest.mark.parametrize(("line", "kind", "what"), BROKEN_LINES, ids=range(len(BROKEN_LINES)))
def test_a_broken_row_is_counted_and_shown_or_stops(tmp_path, line, kind, what):
    path = tmp_path / "sft.jsonl"
    path.write_bytes(b"\n".join([LINE, line, LINE, b"", line, LINE]))
    report = RowReport()
    assert list(read_conversations(path, report=report)) == [GOOD["messages"]] * 3
    assert report.problems == {kind: 2} and (report.rows, report.accepted) == (5, 3)
    first, second = report.examples[kind]
    assert first.startswith(f"{path}:2: ") and second.startswith(f"{path}:5: ") and what in first
    assert first in "\n".join(report.lines())
    with pytest.raises(UserError) as error:
        list(read_conversations(path, on_error="stop"))
    is_read = kind not in ("broken JSON", "undecodable", "NUL byte")
    assert str(error.value) == f"{first}{'; fix or drop the row' if is_read else ','} or pass --on_error skip"


def test_only_the_first_examples_are_shown(tmp_path):
    report = RowReport()
    list(read_conversations(write(tmp_path / "a.jsonl", ["{"] * 500), report=report))
    assert report.problems == {"broken JSON": 500} and len(report.examples["broken JSON"]) == 3
