"""YAML files that people write, and that others may have: read as data, and no larger than they look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from errors import UserError, with_home

# A few lines of aliases to aliases can stand for a billion values.
MOST_VALUES = 100_000
# The parser's time grows with the square of the depth.
DEEPEST = 100


def read_yaml(file: Path) -> Any:
    """The content of a file, `~` in its paths being the home folder.

    Raises `UserError` for one that is not there, not YAML, or blown up by aliases.
    """
    try:
        return _at_home(parse_yaml(file, file.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; check the path") from error
    except ValueError as error:  # bytes that are not UTF-8, or NUL in the name
        raise UserError(f"{file}: cannot be read ({error}); write it in UTF-8") from error


def parse_yaml(file: Path, text: str) -> Any:
    """The same of text that was read already; `file` is for messages."""
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{file}: lists in lists more than {DEEPEST} deep; write it flatter")
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise UserError(f"{file}: stands for more than {MOST_VALUES:,} values; write it without so many aliases")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}:{line}: not YAML ({error.problem}); mend it") from error
    # A date such as 2020-13-01 is a ValueError.
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not YAML ({error}); mend it") from error


def _at_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    return with_home(value) if isinstance(value, str) else value


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for, each alias counted as what it repeats; infinity where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (sum(_values(part, known) for part in inner) if isinstance(inner, list) else 0)
    return known[id(node)]
