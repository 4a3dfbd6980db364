"""Small files, read or written whole: YAML, JSON that people read too, and writing that a full disk survives."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from errors import UserError, naming, with_home

LARGEST_YAML = 1 << 20  # bytes


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON in which Chinese stays Chinese; half a surrogate pair, which UTF-8 cannot hold, is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf8", "backslashreplace").decode("utf8")


def read_yaml(file: Path) -> Any:
    """Return the content of a file, with the home folder for `~` in its paths. Raises `UserError` if it is not YAML."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(LARGEST_YAML + 1)
        if len(content) > LARGEST_YAML:
            raise UserError(f"{file}: more than {LARGEST_YAML:,} bytes; name a file of settings")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; check the path") from error
    except ValueError as error:  # bytes that are not UTF-8, or NUL in the name
        raise UserError(f"{file}: cannot be read ({error}); write it in UTF-8") from error
    try:
        return _at_home(yaml.safe_load(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}:{line}: not YAML ({error.problem}); fix it") from error
    # A date such as 2020-13-01 is a ValueError.
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not YAML ({error}); fix it") from error


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `file`, flushed to the disk, if nothing goes wrong; else `file` stays."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(file)  # a failed write does not say where
        raise


def write_json_lines(file: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines, whole or not at all; half a surrogate pair, which is no character, becomes a question mark."""
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False).encode("utf8", "replace") + b"\n")


def peak_memory() -> int:
    """Return the most memory this process has held, in bytes."""
    # On Linux getrusage counts what the parent held when it started this one.
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _at_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    return with_home(value) if isinstance(value, str) else value
