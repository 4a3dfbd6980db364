"""Every format becomes the same messages from every kind of file; rows that cannot are counted with their lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from data_files import write

from errors import UserError
from text.chats.conversations import read_conversations, to_messages
from text.chats.literals import parse_list
from text.chats.preferences import read_preferences, to_preference
from text.chats.problems import read_problems
from text.sources.formats import FORMATS, Layout
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport

THOUGHT = "<|begin_of_thought|>\n\nFirst 6.\nThen 7.\n\n<|end_of_thought|>"
SOLUTION = "<|begin_of_solution|>\n\nIt is **42**.\n\n<|end_of_solution|>"


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": name, "value": text} for name, text in turns]


# One row in each layout, as the original data have it, and the turns it must become.
ROWS = {
    "alpaca": (
        {"instruction": "译", "input": "cat", "output": "猫", "system": "S", "history": [["一", "二"]]},
        [("system", "S"), ("user", "一"), ("assistant", "二"), ("user", "译\ncat"), ("assistant", "猫")],
    ),
    "sharegpt": (
        {
            "conversations": said(
                ("human", "查"), ("function_call", '{"name": "查", "arguments": {"n": 1}}'),
                ("observation", '{"ok": true}'), ("gpt", "好"),
            ),
            "tools": '[{"name": "查"}]',
        },
        [
            ("system", '[{"name": "查"}]'), ("user", "查"), ("assistant", '{"name": "查", "arguments": {"n": 1}}'),
            ("tool", '{"ok": true}'), ("assistant", "好"),
        ],
    ),
    "messages": (
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"},
                {"role": "user", "content": "Q2"},
                {"role": "assistant", "content": "A2"},
            ]
        },
        [("user", "Q"), ("assistant", "<think>\nhm\n</think>\n\nA"), ("user", "Q2"), ("assistant", "A2")],
    ),
    "history_qa": (
        {"history": [["你好", "你好！'有'引号\n"]], "q": "几点？", "a": "三点。"},
        [("user", "你好"), ("assistant", "你好！'有'引号\n"), ("user", "几点？"), ("assistant", "三点。")],
    ),
    "openthoughts": (
        {"system": "Think.", "conversations": said(("user", "6*7?"), ("assistant", f"{THOUGHT}\n\n{SOLUTION}"))},
        [
            ("system", "Think."), ("user", "6*7?"),
            ("assistant", "<think>\nFirst 6.\nThen 7.\n</think>\n\nIt is **42**."),
        ],
    ),
    "medical_o1": (
        {"Question": "头痛？", "Complex_CoT": "先想。", "Response": "休息。"},
        [("user", "头痛？"), ("assistant", "<think>\n先想。\n</think>\n\n休息。")],
    ),
}  # fmt: skip


def turns(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


NAMES = ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.gz", "a.jsonl.GZ"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ROWS)
def test_every_format_reads_the_same_from_every_kind_of_file(format, name, tmp_path):
    row, expected = ROWS[format]
    source = Source(write(tmp_path / name, [row, row]), layout=Layout(format))
    for literal in (json.dumps, repr) if ".csv" in name else (json.dumps,):
        write(tmp_path / name, [row, row], literal)
        assert [turns(messages) for messages in read_conversations(source, "stop")] == [expected] * 2


@pytest.mark.parametrize("format", sorted(ROWS.keys() - {"openthoughts"}))
def test_a_format_that_is_not_named_is_seen(format):
    row, expected = ROWS[format]
    assert turns(to_messages(row)) == expected


@pytest.mark.parametrize("format", ROWS)
def test_columns_called_otherwise_read_the_same(format, tmp_path):
    """Every column under a name of its own, among others that mean nothing."""
    row, expected = ROWS[format]
    roles = {column: role for role, column in FORMATS[format].columns.items()}
    other = {f"my {name}": value for name, value in row.items()} | {"instruction": "no", "messages": "no", "id": 1}
    layout = Layout(format, {roles[name]: f"my {name}" for name in row})
    assert turns(to_messages(other, layout)) == expected
    # A column that plays one role plays no other: the format's own for `query` is 'input', the question here.
    layout = Layout("alpaca", {"prompt": "input", "response": "output"})
    assert turns(to_messages({"input": "Q", "output": "A"}, layout)) == [("user", "Q"), ("assistant", "A")]


def test_tags_name_the_turns():
    tags = {
        "role_tag": "wer", "content_tag": "was", "user_tag": "ich", "assistant_tag": "du", "function_tag": "ruf",
        "observation_tag": "echo", "system_tag": "regie",
    }  # fmt: skip
    names = {"system": "regie", "user": "ich", "assistant": "du", "tool": "echo"}
    expected = [("system", "S"), ("user", "Q"), ("assistant", "C"), ("tool", "R"), ("assistant", "A")]
    row = {"conversations": [{"wer": names[role], "was": text} for role, text in expected]}
    row["conversations"][2]["wer"] = "ruf"
    assert turns(to_messages(row, Layout("sharegpt", tags=tags))) == expected
    with pytest.raises(RowError, match="turn 1 is from None; known are"):
        to_messages({"conversations": [{"from": "human", "value": "Q"}]}, Layout("sharegpt", tags=tags))


@pytest.mark.parametrize(
    ("format", "row", "kind", "what"),
    [
        ("alpaca", {"instruction": "Q"}, "no such column", "has no 'output' (response); the columns are:"),
        ("medical_o1", {"Question": "Q", "Complex_CoT": " ", "Response": "A"}, "empty text", "'Complex_CoT' is empty"),
        ("medical_o1", {"Question": "Q", "Response": "A"}, "no such column", "has no 'Complex_CoT' (thought)"),
        ("history_qa", {"history": "[['a']]", "q": "Q", "a": "A"}, "wrong type", "[question, answer] pairs"),
        ("history_qa", {"history": "[['a', 'b'", "q": "Q", "a": "A"}, "unreadable list", "neither JSON nor a Python"),
        ("history_qa", {"history": "[__import__('os')]", "q": "Q", "a": "A"}, "unreadable list", "from character 2 on"),
        ("history_qa", {"history": "a, b", "q": "Q", "a": "A"}, "wrong type", "[question, answer] pairs"),
        ("openthoughts", {"conversations": [{"from": "user", "value": "Q"}, {"from": "gpt", "value": THOUGHT}]},
         "broken thought marks", "no whole solution"),
        ("openthoughts", {"conversations": [{"from": "user", "value": "Q"}, {"from": "gpt", "value": THOUGHT[:30]}]},
         "broken thought marks", "no whole thought"),
        ("messages", ["Q"], "not an object", "the row is a list; messages needs an object"),
    ],
)  # fmt: skip
def test_a_row_that_its_format_cannot_use_is_counted_with_its_line(format, row, kind, what, tmp_path):
    good = ROWS[format][0]
    path = write(tmp_path / "a.jsonl", [good, row, good])
    report, source = RowReport(), Source(str(path), layout=Layout(format))
    assert len(list(read_conversations(source, report=report))) == 2
    assert report.problems == {kind: 1} and (report.rows, report.accepted) == (3, 2)
    (example,) = report.examples[kind]
    assert example.startswith(f"{path}:2: ") and what in example
    with pytest.raises(UserError, match=r"a.jsonl:2: .*fix or drop the row"):
        list(read_conversations(source, "stop"))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_pairs_and_problems_are_read_from_every_kind_of_file(name, tmp_path):
    pairs = [{"prompt": f"[问{n}]", "chosen": "好", "rejected": "不"} for n in range(3)]
    assert list(read_preferences(write(tmp_path / name, pairs), "stop")) == [to_preference(pair) for pair in pairs]
    problems = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(3)]
    found, _ = read_problems(write(tmp_path / name, problems), "stop")
    assert [(problem.question, problem.answer) for problem in found] == [(f"{n}+1?", str(n + 1)) for n in range(3)]


def test_the_hub_is_streamed_with_its_subset_split_and_columns(monkeypatch):
    asked = []

    def load(*arguments: object, **options: object) -> Iterator[dict]:
        asked.append((arguments, options))
        rows = [{"frage": "Q", "antwort": "A", "system": None}, {"frage": "Q2", "antwort": None, "system": "S"}]
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    layout = Layout("alpaca", {"prompt": "frage", "response": "antwort"})
    source = Source("some/chats", "mine", layout, is_hub=True, subset="zh", split="test", folder="v2")
    report = RowReport()
    assert [turns(messages) for messages in read_conversations(source, report=report)] == [
        [("user", "Q"), ("assistant", "A")]
    ]
    assert asked == [(("some/chats", "zh"), {"split": "test", "streaming": True, "data_dir": "v2"})]
    assert report.examples["no such column"][0].startswith("some/chats:2: has no 'antwort' (response)")


def test_samples_are_always_the_same_and_other_with_another_seed(tmp_path):
    rows = [{"q": f"Q{n}", "a": f"A{n}"} for n in range(200)]
    rows[7] = {"q": "Q7", "a": ""}
    path = write(tmp_path / "a.csv", rows)

    def chosen(samples: int, seed: int = 0) -> list[str]:
        report = RowReport()
        source = Source(str(path), samples=samples, seed=seed)
        questions = [messages[0]["content"] for messages in read_conversations(source, report=report)]
        assert report.accepted == len(questions) and report.rows == 200 == report.accepted + report.left_out + 1
        return questions

    some = chosen(20)
    assert len(some) == 20 and some == chosen(20) != chosen(20, seed=1)
    assert some == sorted(some, key=lambda question: int(question[1:])) and set(some) < set(chosen(40))
    assert len(chosen(1000)) == 199
    taken = [int(question[1:]) for seed in range(40) for question in chosen(20, seed)]
    assert 85 < sum(taken) / len(taken) < 115  # each row has the same chance


# Lists that are spelled out in a cell: nothing is run


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[['你好', \"it's\"], ('a', 'b\\n')]", [["你好", "it's"], ("a", "b\n")]),
        ('[["a", null], [true, 1.5]]', [["a", None], [True, 1.5]]),
        ("[{'role': 'user', 'content': None, 'n': 3, 'ok': True}]",
         [{"role": "user", "content": None, "n": 3, "ok": True}]),
        ("[]", []),
        (r"['\'\\', 'x']", ["'\\", "x"]),
        ("[{'n': -1, 'a': 'b'}\n {'n': 2}]", [{"n": -1, "a": "b"}, {"n": 2}]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_lists_are_parsed_as_they_were_meant(text, value):
    assert parse_list(text, "it") == value


ENDLESS = (
    "[" * 1_000_000, "[" * 500_000 + "]" * 500_000, "(" * 40 + ")" * 40, "[" + "-" * 500_000 + "1]",
    "[" + "1-" * 400_000 + "1]", "[9**9**9**9]", "['a' * 10**9]", "[" + "'" * 999_999, "['" + "\\" * 999_990,
    "['" + "\\'" * 400_000, "[" + "'a'," * 250_000 + "]", "[" + "{" * 90, "[x for x in ()]", "[f'{1}']",
    "[lambda: 0]", "[" + "9" * 900_000 + "]", "['a'" + "\0" + "]", "[" + " " * 2_000_000 + "]", "['\\N{BULLET' ]",
)  # fmt: skip


@pytest.mark.parametrize("text", ENDLESS, ids=range(len(ENDLESS)))
def test_what_is_no_list_is_refused(text):
    with pytest.raises(RowError) as caught:
        parse_list(text, "'history'")
    assert caught.value.kind == "unreadable list" and len(str(caught.value)) < 200
