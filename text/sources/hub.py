"""Data sets on the Hugging Face Hub, streamed. Only `datasets` can do that; it is imported when one is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from text.sources.data_file import FileProblem
from text.sources.registry import Source


def hub_rows(source: Source) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the Hub. Raises `FileProblem` when the Hub does not give it."""
    import datasets

    more = {"data_dir": source.folder} if source.folder else {}
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True, **more)
        yield from rows
    except (OSError, ValueError, RuntimeError) as error:
        line = re.split(r"[\r\n]", str(error), maxsplit=1)[0] or type(error).__name__
        problem = f"no such path here, and the Hub does not give it ({line})"
        raise FileProblem("unreadable file", None, problem, "check the path or the name and the network") from error
