"""The formats of data that have a name, the roles that columns play in each, and how a source's rows are laid out.

A role is what a column is for (`prompt`, `response`, ...); a format names the column that plays it by default.
The names of roles and tags are those of LLaMA-Factory, whose registry is read as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from text.sources.row_report import RowError, kind_of


class Format(NamedTuple):
    """What a format holds, the column of each role, and the roles that no row can do without."""

    kind: str
    columns: Mapping[str, str]
    needed: tuple[str, ...] = ()


KINDS = {
    "text": "text to pretrain on",
    "chat": "conversations",
    "preference": "pairs of answers",
    "prompt": "problems with answers",
}

_TURNS = {"system": "system", "tools": "tools"}
FORMATS = {
    "text": Format("text", {"text": "text"}),
    "alpaca": Format(
        "chat",
        {"prompt": "instruction", "query": "input", "response": "output", "history": "history", **_TURNS},
        ("prompt", "response"),
    ),
    "sharegpt": Format("chat", {"messages": "conversations", **_TURNS}, ("messages",)),
    "messages": Format("chat", {"messages": "messages", **_TURNS}, ("messages",)),
    "history_qa": Format(
        "chat", {"history": "history", "prompt": "q", "response": "a", "system": "system"}, ("prompt", "response")
    ),
    "openthoughts": Format("chat", {"messages": "conversations", "system": "system"}, ("messages",)),
    "medical_o1": Format(
        "chat",
        {"prompt": "Question", "thought": "Complex_CoT", "response": "Response", "system": "system"},
        ("prompt", "thought", "response"),
    ),
    "preference": Format(
        "preference",
        {"prompt": "prompt", "query": "input", "messages": "conversations", "history": "history", "chosen": "chosen",
         "rejected": "rejected", **_TURNS},
        ("chosen", "rejected"),
    ),
    "prompt": Format("prompt", {"prompt": "question", "response": "answer", "kind": "kind"}, ("prompt", "response")),
}  # fmt: skip

# What the roles of a turn are called in the data people have.
ROLE_NAMES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool"},
}
# The tags that name a role, and the role.
ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "assistant",
    "system_tag": "system",
}  # fmt: skip
TAGS = ("role_tag", "content_tag", *ROLE_TAGS)


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are laid out.

    `format`: one of `FORMATS`; "" recognises it row by row. `columns`: role -> column, for those called otherwise.
    `tags`: how turns name their role, their text and the roles.
    """

    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def arrange(self, row: Any) -> Any:
        """Return the row with its columns under the names that the format knows; as it is without a format.

        Raises `RowError` for a row without a column that the format needs.
        """
        # preference and prompt have several layouts, recognised row by row.
        if not self.format or (self.format in ("preference", "prompt") and not self.columns):
            return row
        if not isinstance(row, dict):
            raise RowError("not an object", f"the row is {kind_of(row)}; {self.format} needs an object")
        known = FORMATS[self.format]
        for role in known.needed:
            column = self.columns.get(role, known.columns[role])
            if column not in row:
                shown = ", ".join(map(repr, row)) or "none"
                raise RowError("no such column", f"has no {column!r} ({role}); the columns are: {shown}")
        return self.rename(row)

    def rename(self, row: Any) -> Any:
        """Do as `arrange` where no column is needed, such as for a question that nobody has answered."""
        if not self.format or not isinstance(row, dict):
            return row
        known, taken = FORMATS[self.format], set(self.columns.values())
        columns = {role: self.columns.get(role, name) for role, name in known.columns.items()}
        return {
            known.columns[role]: row[name]
            for role, name in columns.items()
            if name in row and (role in self.columns or name not in taken)
        }

    @property
    def roles(self) -> dict[str, str]:
        """Return what the data calls a role -> the role."""
        return {**ROLE_NAMES, **{self.tags[tag]: role for tag, role in ROLE_TAGS.items() if tag in self.tags}}
