"""Lists that a CSV cell holds as text: JSON, or a Python literal as str() and pandas write it. Nothing is ever run.

A column that is always a list goes through `list_of`, one that may be plain text through `turns_of`: there a text
counts as turns only if it spells nothing but objects with a role and a content, since an answer may itself be JSON.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from typing import Any

from text.sources.row_report import RowError

# A million characters, ten thousand brackets, strings and commas, and lists in lists 16 deep: far above any honest
# conversation, and parsed within a second, while Python's parser can be made to fill memory or overrun its stack.
LONGEST, MOST_TOKENS, DEEPEST = 1 << 20, 50_000, 16

# What a literal may be made of. Without operators the parser nests by brackets alone, which are counted.
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<open>[\[({]) | (?P<close>[\])}]) | [,:]
        | (?P<item>'[^'\\]*(?:\\.[^'\\]*)*' | "[^"\\]*(?:\\.[^"\\]*)*"
        | (?:None|True|False|null|true|false)\b | -?\d{1,18}(?:\.\d{1,18})?\b)
    )\s*""",
    re.VERBOSE | re.DOTALL,
)

_OBJECT = re.compile(r"""\s*[\[(]?\s*\{\s*['"]""")
ROLE_KEYS, SPEECH_KEYS = ("role", "from"), ("content", "value", "tool_calls", "function_call")


def list_of(name: str, value: object) -> object:
    """Return the list or object that a text spells; anything else as it is. Raises `RowError` for one that begins so.

    name: what to call it in the error.
    """
    return parse_list(value, name) if isinstance(value, str) and value.lstrip().startswith(("[", "(", "{")) else value


def turns_of(name: str, value: object, tags: Collection[str] = ()) -> object:
    """Return the turn or list of turns that a text spells; any other text, and what is not text, as it is.

    tags: what turns call their role and content beside the common names. Raises `RowError` for a text that begins as
    turns and cannot be parsed.
    """
    if not isinstance(value, str) or not _OBJECT.match(value):
        return value
    roles, speech = {*ROLE_KEYS, *tags}, {*SPEECH_KEYS, *tags}
    if not (_has_key(value, roles) and _has_key(value, speech)):
        return value
    spelled = parse_list(value, name)
    turns = spelled if isinstance(spelled, list | tuple) else [spelled]
    if all(isinstance(turn, dict) and roles & turn.keys() and speech & turn.keys() for turn in turns):
        return spelled
    return value


def _has_key(text: str, keys: Collection[str]) -> bool:
    return bool(re.search(rf"""(['"])(?:{"|".join(map(re.escape, sorted(keys)))})\1\s*:""", text))


def parse_list(text: str, name: str) -> Any:
    """Return the list that a text spells. `name`: what to call it in the `RowError` of a text that spells none."""
    if len(text) > LONGEST:
        raise RowError("unreadable list", f"{name} has {len(text):,} characters; {LONGEST:,} is the most")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(_checked(text, name).strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise RowError("unreadable list", f"{name} is neither JSON nor a Python list ({_first(error)})") from error


def _checked(text: str, name: str) -> str:
    """Return the text, if it is made of literals alone, few enough and not nested too deeply; else raise `RowError`.

    numpy, and so pandas, writes no commas between the items of an array: they are put in.
    """
    place = depth = tokens = 0
    parts, after_item = [], False
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
        is_item = bool(token["open"] or token["item"])
        parts += [","] * (after_item and is_item) + [token[0]]
        after_item = bool(token["close"] or token["item"])
        place = token.end()
    return "".join(parts)


def _first(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
