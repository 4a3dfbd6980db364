"""Conversations made by a program, as a file that the chat stages read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from errors import naming
from text.chats.chat_template import Message


def write_chats(path: Path, rows: Sequence[Sequence[Message]]) -> None:
    """JSONL of messages; complete or not there."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        lines = [json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n" for messages in rows]
        # Half a surrogate pair, which a broken escape leaves, is no character.
        temporary.write_bytes("".join(lines).encode("utf8", "replace"))
        temporary.replace(path)
