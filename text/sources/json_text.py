"""JSON that people read too."""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON in which Chinese stays Chinese. Half a surrogate pair, which UTF-8 cannot hold, becomes its escape."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf8", "backslashreplace").decode("utf8")
