"""Chat data in the layouts people have, as lists of messages; every row that cannot be used is counted and shown.

Alpaca       {"instruction": Q, "input": more of Q, "output": A, "system": S, "history": [[Q, A], ...]}
ShareGPT     {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": S, "tools": T}
messages     {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, or the bare list
history_qa   {"history": [[Q, A], ...], "q": Q, "a": A}
medical_o1   {"Question": Q, "Complex_CoT": thought, "Response": A}
openthoughts ShareGPT whose answers have their thought and solution between marks; only where the format is named

The layout is seen row by row, so a file may mix them, unless the source names its format. A list may be text that
spells it, as in the cells of a CSV file. `turns.py` describes what a turn may hold. Text in columns that no layout
knows is not read, and named in the report where it may be speech (`text.chats.unread`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from errors import UserError
from text.chats.chat_template import Message, check_messages
from text.chats.literals import list_of
from text.chats.turns import SEEN, read_turn, text_of, thought_and_answer, tools_text
from text.chats.unread import unread
from text.sources.formats import Layout
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport, kind_of
from text.sources.rows import placed_rows


def read_conversations(
    source: Source | str | Path, on_error: str = "skip", report: RowReport | None = None
) -> Iterator[list[Message]]:
    """Yield the conversations of a source, or of a file or folder, in order. Contents are kept as they are.

    Roles become system, user, assistant and tool in an order that the chat template has, with at least one answer.
    A row without that is counted in `report` (`on_error="skip"`) or raises `UserError` (`on_error="stop"`). A file that
    cannot be read to its end raises `UserError` always: what follows the break cannot be counted.
    """
    source, report = Source.of(source), RowReport() if report is None else report
    convert = partial(to_messages, layout=source.layout, notices=report.pending)
    yield from (item for _, item in placed_rows(source, convert, on_error, report))


def to_messages(row: object, layout: Layout = SEEN, notices: set[str] | None = None) -> list[Message]:
    """Return one row of the layout's format or, where it has none, of any, as messages. Raises `RowError`.

    notices: collects what is reported of a row that is used all the same.
    """
    notices = set() if notices is None else notices
    given, row = row, layout.arrange(row)
    if isinstance(row, list):
        name, messages = "the list", turns_to_messages("the list", row, layout, notices)
    elif not isinstance(row, dict):
        raise RowError("not a conversation", f"the row is {kind_of(row)}; it must be an object or a list of messages")
    elif "messages" in row:
        name, messages = "'messages'", turns_to_messages("'messages'", row["messages"], layout, notices)
    elif "conversations" in row:
        name = "'conversations'"
        messages = turns_to_messages(name, row["conversations"], layout, notices)
        if layout.format == "openthoughts":
            messages = [_thought_through(message) for message in messages]
    elif "instruction" in row or "output" in row:
        name, messages = "'output'", _alpaca(row)
    elif "q" in row and "a" in row:
        name, messages = "'a'", [*history_of(row), *_exchange(row, "q", "a")]
    elif "Question" in row and "Response" in row:
        name, messages = "'Response'", _medical(row)
    else:
        shown = ", ".join(map(repr, row)) or "no keys"
        known = "neither 'messages', 'conversations' nor 'instruction' and 'output'"
        raise RowError("unknown layout", f"has {shown} but {known}")
    messages = with_system(row, messages) if isinstance(row, dict) else messages
    check_conversation(name, messages)
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise RowError("nothing to train on", f"{name} marks every assistant turn as not trained on")
    if isinstance(given, dict):
        note_unread(given, row, (name.strip("'"),), messages, notices)
    return messages


def note_unread(given: dict, row: dict, lists: Sequence[str], messages: Sequence[Message], notices: set[str]) -> None:
    """Report the columns of a row that hold speech which is not a part of the messages.

    given: the row as the file has it; lists: the columns of the arranged `row` whose turns were read one by one.
    """
    taken = [row[name] for name in (*lists, "system", "tools") if name in row]
    others = {name: value for name, value in given.items() if not any(value is column for column in taken)}
    for name in unread(others, [message["content"] for message in messages]):
        notices.add(f"the column {str(name)[:40]!r} is not read")


def turns_to_messages(
    name: str, turns: object, layout: Layout = SEEN, notices: set[str] | None = None
) -> list[Message]:
    """Return ShareGPT's from/value and role/content turns, or turns with the layout's tags, as messages."""
    turns = list_of(name, turns)
    if not isinstance(turns, list | tuple):
        raise RowError("wrong type", f"{name} is {kind_of(turns)}; it must be a list of turns")
    return [read_turn(number, turn, layout, notices) for number, turn in enumerate(turns, start=1)]


def history_of(row: dict) -> list[Message]:
    """Return the earlier exchanges in a row's 'history'."""
    history = list_of("'history'", row.get("history") or [])
    is_list = isinstance(history, list | tuple)
    if not is_list or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowError("wrong type", "'history' must be a list of [question, answer] pairs")
    turns = (("user", "a question in 'history'"), ("assistant", "an answer in 'history'"))
    return [
        {"role": role, "content": text_of(name, text)}
        for pair in history
        for (role, name), text in zip(turns, pair, strict=True)
    ]


def question_of(row: dict, name: str) -> Message:
    """Return the column `name` and what 'input' adds to it, as the user's turn."""
    more = row.get("input")
    parts = [text_of(repr(name), row.get(name)), "" if more is None else text_of("'input'", more)]
    return {"role": "user", "content": "\n".join(part for part in parts if part)}


def _alpaca(row: dict) -> list[Message]:
    answer = text_of("'output'", row.get("output"))
    return [*history_of(row), question_of(row, "instruction"), {"role": "assistant", "content": answer}]


def _exchange(row: dict, question: str, answer: str) -> list[Message]:
    names = {"user": question, "assistant": answer}
    return [{"role": role, "content": text_of(repr(name), row[name])} for role, name in names.items()]


def _medical(row: dict) -> list[Message]:
    question, answer = _exchange(row, "Question", "Response")
    thought = text_of("'Complex_CoT'", row.get("Complex_CoT"))
    for name, text in (("'Complex_CoT'", thought), ("'Response'", answer["content"])):
        if not text.strip():
            raise RowError("empty text", f"{name} is empty")
    return [question, {"role": "assistant", "content": thought_and_answer(thought, answer["content"])}]


def _thought_through(message: Message) -> Message:
    """Return an assistant's turn with OpenThoughts' marks turned into ours; others as they are."""
    text, parts = message["content"], []
    if message["role"] != "assistant" or "<|begin_of_" not in text:
        return message
    for part in ("thought", "solution"):
        _, begun, rest = text.partition(f"<|begin_of_{part}|>")
        content, ended, text = rest.partition(f"<|end_of_{part}|>")
        if not (begun and ended and content.strip()):
            raise RowError("broken thought marks", f"the answer has no whole {part} between its <|begin_of_...|> marks")
        parts.append(content)
    return {**message, "content": thought_and_answer(*parts)}


def with_system(row: dict, messages: list[Message]) -> list[Message]:
    """Put the row's own 'system' and 'tools', as text, into the system prompt; an empty system prompt is left out."""
    parts = []
    if row.get("system") is not None:
        parts.append(text_of("'system'", row["system"]))
    if messages and messages[0]["role"] == "system":
        parts.append(messages[0]["content"])
        messages = messages[1:]
    tools = tools_text(row.get("tools"))
    parts += [tools] if not any(tools in part for part in parts) else []
    system = "\n\n".join(part for part in parts if part.strip())
    return [{"role": "system", "content": system}, *messages] if system else messages


def check_conversation(name: str, messages: list[Message]) -> None:
    """Raise `RowError` unless the roles are in an order that the template has, with an answer, and no turn is empty."""
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn", f"{name} has no assistant turn")
    try:
        check_messages(messages)
    except UserError as error:
        raise RowError("wrong order of roles", str(error)) from error
    check_texts(messages, ("user", "assistant"))


def check_texts(messages: Sequence[Message], spoken: Sequence[str]) -> None:
    """Raise `RowError` for a NUL character, and for an empty turn of one of the roles `spoken`."""
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if "\0" in content:
            raise RowError("NUL character", f"message {number} ({role}) has a NUL character")
        if role in spoken and not content.strip():
            raise RowError("empty text", f"message {number} ({role}) is empty")
