"""Files of JSON lines that tests write."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, rows: Iterable[object]) -> str:
    """A file of rows, objects as JSON and text as it is. Returns its path."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf8", errors="surrogatepass")
    return str(path)


def write_texts(path: Path, texts: Iterable[str]) -> str:
    """A file of text to pretrain on. Returns its path."""
    return write(path, [{"text": text} for text in texts])
