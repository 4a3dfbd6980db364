"""How the town's texts are written down: sentences in YAML files beside this one, and tables of words."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from text.files import read_yaml


@cache
def sentences(name: str) -> dict[str, Any]:
    """Return what `name`.yaml holds."""
    return read_yaml(Path(__file__).with_name(f"{name}.yaml"))


def table(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the rows of `text`, separated by commas, each as its columns, separated by slashes."""
    return tuple(tuple(row.strip().split("/")) for row in text.split(","))


def joined(sentences: list[str], language: str) -> str:
    """Return sentences as one text, with spaces between them in English."""
    return ("" if language == "zh" else " ").join(sentences)
