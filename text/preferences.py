"""Preference data in the layouts people have: one prompt, an answer that was chosen and one that was rejected.

strings     {"prompt": Q, "chosen": A, "rejected": B}; Alpaca's "instruction" and "input" may stand for the prompt
messages    {"prompt": [{"role": "user", "content": Q}], "chosen": [{"role": "assistant", "content": A}], ...}
ShareGPT    {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A}, "rejected": ...}
whole lists {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}, perhaps with a "prompt"

The layout is seen row by row, so a file may mix them. What is preferred is the last answer; what comes before it, with
the answers in it, is the prompt, and must be the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from text.chat_template import Message
from text.conversations import (
    SEEN,
    check_conversation,
    history_of,
    question_of,
    turns_to_messages,
    with_system,
)
from text.formats import Layout
from text.registry import Source
from text.row_report import RowError, RowReport, kind_of
from text.rows import converted_rows


class Preference(NamedTuple):
    """Two whole conversations that differ in their last answer only."""

    chosen: list[Message]
    rejected: list[Message]


def read_preferences(
    source: Source | str | Path, on_error: str = "skip", report: RowReport | None = None
) -> Iterator[Preference]:
    """Pairs of a source, or of a file or folder, in order.

    A row without a pair in it is counted in `report` (`on_error="skip"`) or raises `UserError` (`on_error="stop"`). A
    file that cannot be read raises `UserError` always.
    """
    source = Source.of(source)
    convert = partial(to_preference, layout=source.layout)
    yield from converted_rows(source, convert, on_error, RowReport() if report is None else report)


def to_preference(row: object, layout: Layout = SEEN) -> Preference:
    """One row of any layout as a pair. Raises `RowError`."""
    row = layout.arrange(row)
    if not isinstance(row, dict):
        raise RowError("not a pair", f"the row is {kind_of(row)}; it must be an object with 'chosen' and 'rejected'")
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise RowError("nothing to prefer", f"{name!r} is {'empty' if name in row else 'missing'}")
    given = _given_prompt(row, layout)
    pair = Preference(*(_conversation(row, name, given, layout) for name in ("chosen", "rejected")))
    if pair.chosen[:-1] != pair.rejected[:-1]:
        raise RowError("prompts differ", "'chosen' and 'rejected' answer different prompts")
    if pair.chosen[-1] == pair.rejected[-1]:
        raise RowError("nothing to prefer", "'chosen' and 'rejected' are identical")
    return pair


def _given_prompt(row: dict, layout: Layout) -> list[Message]:
    """The turns that the row names beside the answers; none where the answers are whole conversations."""
    for name in ("conversations", "messages"):
        if name in row:
            return turns_to_messages(repr(name), row[name], layout)
    name = "instruction" if "instruction" in row else "prompt"
    prompt = row.get(name)
    if prompt is None:
        return []
    if isinstance(prompt, str) or name == "instruction":
        return [*history_of(row), question_of(row, name)]
    return turns_to_messages("'prompt'", prompt, layout)


def _conversation(row: dict, name: str, given: list[Message], layout: Layout) -> list[Message]:
    """The prompt and the answer `name`."""
    answer = row[name]
    if isinstance(answer, str):
        turns: list[Message] = [{"role": "assistant", "content": answer}]
    else:
        turns = turns_to_messages(repr(name), [answer] if isinstance(answer, dict) else answer, layout)
    *before, last = turns
    if last["role"] != "assistant":
        raise RowError("nothing to prefer", f"{name!r} ends with a turn of {last['role']!r}, not with an answer")
    if before and given and before[-len(given) :] != given:
        raise RowError("prompts differ", f"'prompt' is not what {name!r} answers")
    if not before and not given:
        raise RowError("no prompt", "has no 'prompt', and the answers are no lists of messages that begin with one")
    messages = with_system(row, [*(before or given), last])
    check_conversation(repr(name), messages)
    return messages
