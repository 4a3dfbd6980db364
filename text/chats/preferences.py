"""Preference data in the layouts people have: one prompt, an answer that was chosen and one that was rejected.

strings     {"prompt": Q, "chosen": A, "rejected": B}; Alpaca's "instruction" and "input" may stand for the prompt
messages    {"prompt": [{"role": "user", "content": Q}], "chosen": [{"role": "assistant", "content": A}], ...}
ShareGPT    {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A}, "rejected": ...}
whole lists {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}, perhaps with a "prompt"

The layout is seen row by row, so a file may mix them. What is preferred is the last answer; what comes before it, with
the answers in it, is the prompt, and must be the same for both. Answers that are whole conversations bring their own:
a "prompt", "messages" or "conversations" beside them must only be a part of it, or a conversation that begins so.
Lists may be text that spells them, as in the cells of a CSV file; an answer that is JSON of another kind is text.

Only the last answers are compared, so marks such as "weight": 0 mean nothing on earlier turns. On the rejected answer
they mean what a pair means anyway, that it is not to be imitated; a pair whose chosen answer is marked is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from text.chats.chat_template import Message
from text.chats.conversations import (
    check_conversation,
    history_of,
    note_unread,
    question_of,
    turns_to_messages,
    with_system,
)
from text.chats.literals import turns_of
from text.chats.turns import SEEN
from text.sources.formats import Layout
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport, kind_of
from text.sources.rows import placed_rows


class Preference(NamedTuple):
    """Two whole conversations that differ in their last answer only."""

    chosen: list[Message]
    rejected: list[Message]


def read_preferences(
    source: Source | str | Path, on_error: str = "skip", report: RowReport | None = None
) -> Iterator[Preference]:
    """Yield the pairs of a source, or of a file or folder, in order; errors as in `read_conversations`."""
    source, report = Source.of(source), RowReport() if report is None else report
    convert = partial(to_preference, layout=source.layout, notices=report.pending)
    yield from (item for _, item in placed_rows(source, convert, on_error, report))


def to_preference(row: object, layout: Layout = SEEN, notices: set[str] | None = None) -> Preference:
    """Return one row of any layout as a pair. Raises `RowError`.

    notices: collects what is reported of a row that is used all the same.
    """
    notices = set() if notices is None else notices
    given, row = row, layout.arrange(row)
    if not isinstance(row, dict):
        raise RowError("not a pair", f"the row is {kind_of(row)}; it must be an object with 'chosen' and 'rejected'")
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise RowError("nothing to prefer", f"{name!r} is {'empty' if name in row else 'missing'}")
    answers = {name: _answer(row, name, layout, notices) for name in ("chosen", "rejected")}
    if not answers["chosen"][-1].get("train", True):
        raise RowError("nothing to train on", "'chosen' is marked as not trained on")
    prompt = _given_prompt(row, answers, layout, notices)
    pair = Preference(*(_conversation(row, name, prompt, turns) for name, turns in answers.items()))
    if pair.chosen[:-1] != pair.rejected[:-1]:
        raise RowError("prompts differ", "'chosen' and 'rejected' answer different prompts")
    if pair.chosen[-1] == pair.rejected[-1]:
        raise RowError("nothing to prefer", "'chosen' and 'rejected' are identical")
    note_unread(given, row, ("chosen", "rejected"), [*pair.chosen, pair.rejected[-1]], notices)
    return pair


def _given_prompt(row: dict, answers: dict[str, list[Message]], layout: Layout, notices: set[str]) -> list[Message]:
    """Return the turns that the row names beside the answers; none where the answers are whole conversations."""
    for name in ("conversations", "messages"):
        if row.get(name) is not None:
            turns = turns_to_messages(repr(name), row[name], layout, notices)
            ends = [answer[-1]["content"] for answer in answers.values()]
            whole = all(len(answer) > 1 for answer in answers.values())
            if turns and turns[-1]["role"] == "assistant" and (whole or turns[-1]["content"] in ends):
                return turns[:-1]  # a conversation with its answer, such as the chosen one once more
            return turns
    name = "instruction" if "instruction" in row else "prompt"
    if row.get(name) is None:
        return []
    prompt = row[name] if name == "instruction" else turns_of(repr(name), row[name], layout.tags.values())
    if name == "instruction" or isinstance(prompt, str):
        return [*history_of(row), question_of(row, name)]
    return turns_to_messages(repr(name), [prompt] if isinstance(prompt, dict) else prompt, layout, notices)


def _answer(row: dict, name: str, layout: Layout, notices: set[str]) -> list[Message]:
    """Return the answer `name`, after the conversation that it ends if it is a whole one."""
    answer = turns_of(repr(name), row[name], layout.tags.values())
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    turns = turns_to_messages(repr(name), [answer] if isinstance(answer, dict) else answer, layout, notices)
    if turns[-1]["role"] != "assistant":
        raise RowError("nothing to prefer", f"{name!r} ends with a turn of {turns[-1]['role']!r}, not with an answer")
    return turns


def _conversation(row: dict, name: str, prompt: list[Message], turns: list[Message]) -> list[Message]:
    """Return the prompt and the answer `name`, as they stand in `turns` or beside them."""
    *before, last = turns
    if before and prompt and not _stands_in(prompt, before):
        raise RowError("prompts differ", f"'prompt' is not what {name!r} answers")
    if not before and not prompt:
        raise RowError("no prompt", "has no 'prompt', and the answers are no lists of messages that begin with one")
    messages = with_system(row, [*(before or prompt), last])
    check_conversation(repr(name), messages)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _stands_in(prompt: list[Message], before: list[Message]) -> bool:
    """Return whether the turns of the prompt come one after the other in what an answer follows, anywhere in it."""
    asked, said = ([(turn["role"], turn["content"].strip()) for turn in turns] for turns in (prompt, before))
    return any(said[start : start + len(asked)] == asked for start in range(len(said) - len(asked) + 1))
