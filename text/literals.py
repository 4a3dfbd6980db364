"""Lists that a CSV cell holds as text: JSON, or a Python literal as str() and pandas write it. Nothing is ever run."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from text.row_report import RowError

# A million characters, ten thousand brackets, strings and commas, and lists in lists 16 deep: far above any honest
# conversation, and parsed within a second, while Python's parser can be made to fill memory or overrun its stack.
LONGEST, MOST_TOKENS, DEEPEST = 1 << 20, 50_000, 16

# What a literal may be made of. Without operators the parser nests by brackets alone, which are counted.
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<open>[\[({]) | (?P<close>[\])}]) | [,:]
        | '[^'\\]*(?:\\.[^'\\]*)*' | "[^"\\]*(?:\\.[^"\\]*)*"
        | (?:None|True|False|null|true|false)\b | \d{1,18}(?:\.\d{1,18})?\b
    )\s*""",
    re.VERBOSE | re.DOTALL,
)


def parse_list(text: str, name: str) -> Any:
    """The list that a text spells. `name`: what to call it in the `RowError` of a text that spells none."""
    if len(text) > LONGEST:
        raise RowError("unreadable list", f"{name} has {len(text):,} characters; {LONGEST:,} is the most")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    _check(text, name)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise RowError("unreadable list", f"{name} is neither JSON nor a Python list ({_first(error)})") from error


def _check(text: str, name: str) -> None:
    """Raise `RowError` unless the text is made of literals alone, and of few enough, not too deeply nested."""
    place = depth = tokens = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            raise RowError(
                "unreadable list", f"{name} is neither JSON nor a Python list, from character {place + 1} on"
            )
        depth += bool(token["open"]) - bool(token["close"])
        tokens += 1
        if depth > DEEPEST or tokens > MOST_TOKENS:
            raise RowError("unreadable list", f"{name} is nested more than {DEEPEST} deep or has too many parts")
        place = token.end()


def _first(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
