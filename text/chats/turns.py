"""One turn of a conversation in the forms that people and programs write, as a message.

role, text   {"role": R, "content": C}, ShareGPT's {"from": R, "value": C}, or the tags of the layout. The text may be
             in parts, [{"type": "text", "text": ...}, ...]
thoughts     `reasoning_content`, `reasoning` or `thinking` of an assistant's turn: its <think> part
calls        `tool_calls` or the older `function_call`: one {"name": ..., "arguments": {...}} a line after the text
tools        of a system turn: described after its text
training     `weight`, `train`, `loss` of an assistant's turn: 0 or false, and it is read but not trained on

`text.chats.chat_template.CHAT_TEMPLATE` renders the same for programs that are given such turns.
"""

from __future__ import annotations

import json
from contextlib import suppress

from text.chats.chat_template import Message
from text.chats.literals import ROLE_KEYS, list_of, turns_of
from text.chats.unread import unread
from text.sources.formats import Layout
from text.sources.row_report import RowError, kind_of

SEEN = Layout()
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MARKS = ("weight", "train", "loss")
OFF, ON, UNSET = ("0", "0.0", "false"), ("1", "1.0", "true"), ("none", "nan", "")


def read_turn(number: int, turn: object, layout: Layout = SEEN, notices: set[str] | None = None) -> Message:
    """Return turn `number`, from 1, as a message. Raises `RowError`.

    notices: collects what is reported of a turn that is used all the same.
    """
    if not isinstance(turn, dict):
        raise RowError("wrong type", f"turn {number} is {kind_of(turn)}; it must be an object")
    notices = set() if notices is None else notices
    role_key = layout.tags.get("role_tag") or ("from" if "from" in turn else "role")
    text_key = layout.tags.get("content_tag") or ("value" if turn.get("value") is not None else "content")
    name, text, roles = turn.get(role_key), turn.get(text_key), layout.roles
    if not isinstance(name, str) or name not in roles:
        raise RowError("unknown role", f"turn {number} is from {name!r}; known are {', '.join(roles)}")
    role, what = roles[name], f"turn {number} ({name})"
    fields = {key: turn[key] for key in turn if turn[key] is not None and key not in (role_key, text_key)}
    if not fields:
        return {"role": role, "content": _joined(f"the text of {what}", text)}
    calls = _calls(number, fields)
    tools = tools_text(fields.pop("tools")) if role == "system" and "tools" in fields else ""
    text = "" if (text is None or text == []) and (calls or tools) else _joined(f"the text of {what}", text)
    thoughts = [_optional(fields[key]) for key in THOUGHTS if key in fields and role == "assistant"]
    thought = next(filter(None, thoughts), "")
    if thought and "<think>" not in text:
        if not text.strip() and not calls:
            raise RowError("empty text", f"{what} has thoughts but no answer")
        text = thought_and_answer(thought, "\n".join(part for part in (text.strip(), *calls) if part))
    else:
        text = "\n".join(part for part in (text, *calls) if part)
    if tools:
        text = "\n\n".join(part for part in (text, tools) if part.strip())
    message: Message = {"role": role, "content": text}
    if not _is_trained(role, fields, notices):
        message["train"] = False
    notices.update(f"{_shown(key)} of a turn of {role!r} is not read" for key in _unread_fields(fields, text))
    return message


def question_text(name: str, value: object) -> object:
    """Return the text of a question given as one turn, alone, in a list or spelled out; other values as they are.

    name: what to call it in the `RowError` of turns that cannot be read.
    """
    turns = turns_of(name, value)
    one = turns[0] if isinstance(turns, list | tuple) and len(turns) == 1 else turns
    is_question = isinstance(one, dict) and "user" in (SEEN.roles.get(str(one.get(key))) for key in ROLE_KEYS)
    return read_turn(1, one)["content"] if is_question else turns


def thought_and_answer(thought: str, answer: str) -> str:
    """Return both in the form that R1 answers in."""
    return f"<think>\n{thought.strip()}\n</think>\n\n{answer.strip()}"


def tools_text(tools: object) -> str:
    """Return descriptions of tools, given as objects or spelled as text, as they stand in a system prompt.

    JSON is written as transformers' `tojson` writes it, so that a chat template gives a model what it was trained on.
    """
    if isinstance(tools, str):
        with suppress(RowError):  # a description in words may begin with a bracket
            tools = list_of("'tools'", tools)
    if not tools or isinstance(tools, str):
        return tools or ""
    try:
        return json.dumps(tools, ensure_ascii=False, default=str)
    except RecursionError as error:
        raise RowError("wrong type", "'tools' is nested too deeply") from error


def text_of(name: str, value: object) -> str:
    """Return the value, which must be text. `name`: what to call it in the `RowError`."""
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name} is {kind_of(value)}; it must be text")
    return value


def _joined(name: str, value: object) -> str:
    """Return a text, or a list of parts all of which are text, as one text."""
    if not isinstance(value, list) or not value:
        return text_of(name, value)
    for number, part in enumerate(value, start=1):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise RowError("wrong type", f"part {number} of {name} is of type {_shown(kind)}; only text is read")
    parts = [part.get("text") if isinstance(part, dict) else part for part in value]
    return "".join(text_of(f"part {number} of {name}", part) for number, part in enumerate(parts, start=1))


def _optional(value: object) -> str:
    """Return the text of a field that may be of another kind, without the space around it."""
    try:
        return _joined("", value).strip()
    except RowError:
        return ""


def _calls(number: int, fields: dict) -> list[str]:
    """Take the tool calls out of the fields of a turn, each as ShareGPT's function_call has it."""
    calls = [fields.pop(key, None) for key in ("tool_calls", "function_call")]
    try:
        calls = [list_of("'tool_calls'", call) for call in calls]
        several, one = ([value] if isinstance(value, dict) else value or [] for value in calls)
        return [_call(call) for call in [*several, *one]]
    except (TypeError, AttributeError, KeyError, ValueError, RecursionError, RowError) as error:
        raise RowError("wrong type", f"turn {number} has tool calls without a name and JSON arguments") from error


def _call(call: dict) -> str:
    function = call.get("function") or call
    arguments = function["arguments"] if "parameters" in function else function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else None
    # Spelled here, since the order and the spaces are part of what a model is trained on.
    call = {"name": function["name"], "arguments": arguments or {}}
    return json.dumps(call, ensure_ascii=False, default=str)


def _is_trained(role: str, fields: dict, notices: set[str]) -> bool:
    """Take the marks of a turn out of its fields; return whether it is trained on, as only an assistant's turn is."""
    trained = True
    for key in MARKS:
        mark = str(fields.pop(key, None)).strip().lower()
        if mark in OFF:
            trained = role != "assistant"
        elif mark in UNSET:
            continue
        elif role != "assistant":
            notices.add(f"{key!r} asks to train on a turn of {role!r}; only the assistant's turns are trained on")
        elif mark not in ON:
            notices.add(f"{key!r} of a turn is neither 0 nor 1; the turn is trained on as with 1")
    return trained


def _unread_fields(fields: dict, text: str) -> list[str]:
    """Return the fields that hold speech, or tools, which are not a part of the text that was read."""
    if tools_text(fields.pop("tools", None)).strip():
        return ["tools", *_unread_fields(fields, text)]
    thoughts = [key for key in THOUGHTS if key in fields and _optional(fields[key]) not in text]
    return thoughts + [key for key in unread(fields, [text]) if key not in thoughts]


def _shown(name: object) -> str:
    return repr(str(name)[:40])
