"""Chat data in the layouts people have, as lists of messages; every row that cannot be used is counted and shown.

Alpaca      {"instruction": Q, "input": more of Q, "output": A, "system": S, "history": [[Q, A], ...]}
ShareGPT    {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": S, "tools": T}
messages    {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, or the bare list

The layout is seen row by row, so a file may mix them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from text.chat_template import Message, check_messages
from text.json_rows import RowError, RowReport, converted_rows, kind_of

ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


def read_conversations(
    path: str | Path, on_error: str = "skip", report: RowReport | None = None
) -> Iterator[list[Message]]:
    """Conversations of a file, or of all JSON files in a folder, in order. Contents are kept as they are.

    Roles become system, user, assistant and tool in an order that the chat template has, with at least one answer.
    A row without that is counted in `report` (`on_error="skip"`) or raises `UserError` (`on_error="stop"`). A missing
    or empty file and a JSON array that breaks off raise `UserError` always: what follows the break cannot be counted.
    """
    yield from converted_rows(path, to_messages, on_error, RowReport() if report is None else report)


def to_messages(row: object) -> list[Message]:
    """One row of any layout as messages. Raises `RowError`."""
    if isinstance(row, list):
        name, messages = "the list", turns_to_messages("the list", row)
    elif not isinstance(row, dict):
        raise RowError("not a conversation", f"the row is {kind_of(row)}; it must be an object or a list of messages")
    elif "messages" in row:
        name, messages = "'messages'", turns_to_messages("'messages'", row["messages"])
    elif "conversations" in row:
        name, messages = "'conversations'", turns_to_messages("'conversations'", row["conversations"])
    elif "instruction" in row or "output" in row:
        name, messages = "'output'", _alpaca(row)
    else:
        keys = ", ".join(map(repr, row)) or "no keys"
        raise RowError(
            "unknown layout", f"has {keys} but neither 'messages', 'conversations' nor 'instruction' and 'output'"
        )
    messages = with_system(row, messages) if isinstance(row, dict) else messages
    check_conversation(name, messages)
    return messages


def turns_to_messages(name: str, turns: object) -> list[Message]:
    """ShareGPT's from/value and role/content turns."""
    if not isinstance(turns, list):
        raise RowError("wrong type", f"{name} is {kind_of(turns)}; it must be a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError("wrong type", f"turn {number} is {kind_of(turn)}; it must be an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in ROLE_NAMES:
            known = ", ".join(ROLE_NAMES)
            raise RowError("unknown role", f"turn {number} is from {role!r}; known are {known}")
        content = turn.get("value", turn.get("content"))
        if turn.get("tool_calls"):
            content = "\n".join(part for part in (content, _tool_calls(number, turn["tool_calls"])) if part)
        messages.append({"role": ROLE_NAMES[role], "content": text_of(f"the text of turn {number} ({role})", content)})
    return messages


def _alpaca(row: dict) -> list[Message]:
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("wrong type", "'history' must be a list of [question, answer] pairs")
    for question, answer in history:
        messages.append({"role": "user", "content": text_of("a question in 'history'", question)})
        messages.append({"role": "assistant", "content": text_of("an answer in 'history'", answer)})
    more = row.get("input")
    parts = [text_of("'instruction'", row.get("instruction")), "" if more is None else text_of("'input'", more)]
    messages.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    messages.append({"role": "assistant", "content": text_of("'output'", row.get("output"))})
    return messages


def with_system(row: dict, messages: list[Message]) -> list[Message]:
    """Put the row's own 'system' and 'tools', as text, into the system prompt; an empty system prompt is left out."""
    parts = []
    if row.get("system") is not None:
        parts.append(text_of("'system'", row["system"]))
    if messages and messages[0]["role"] == "system":
        parts.append(messages[0]["content"])
        messages = messages[1:]
    tools = row.get("tools")
    if tools:
        tools = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        parts.append("" if tools.strip() == "[]" else tools)
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
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if "\0" in content:
            raise RowError("NUL character", f"message {number} ({role}) has a NUL character")
        if role in ("user", "assistant") and not content.strip():
            raise RowError("empty text", f"message {number} ({role}) is empty")


def _tool_calls(number: int, calls: object) -> str:
    """OpenAI's tool calls as text, one {"name": ..., "arguments": {...}} a line, as ShareGPT's function_call has it."""
    lines = []
    try:
        for call in calls:
            function = call.get("function", call)
            arguments = function["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            lines.append(json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise RowError("wrong type", f"turn {number} has tool calls without a name and JSON arguments") from error
    return "\n".join(lines)


def text_of(name: str, value: object) -> str:
    """The value, which must be text. `name`: what to call it in the `RowError`."""
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name} is {kind_of(value)}; it must be text")
    return value
