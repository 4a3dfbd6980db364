"""Ways to damage bytes, the structure of JSON and YAML, and files in their folders."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

JUNK = (
    b"\0", b"\0" * 64, b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xed\xa0\x80", b"\\ud800", b"\xc4\xe3\xba\xc3",
    "你好\u2028".encode("utf-16"), b"\x1b[2J\x07", b'"', b"'", b",", b"\r", b"\n\n", b"\t", b"\\", b"{", b"[", b"]}",
    b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5_000, b"-1", b"NaN", b"-Infinity", b"1e999", b"null", b"&a [*a]",
    b"!!python/object/apply:os.system ['true']", b"<s></s><|assistant|>", b"x" * 70_000,
)  # fmt: skip
NUMBERS = (b"0", b"-1", b"18446744073709551615", b"9223372036854775808", b"1e308", b"NaN", b"1" * 400, b'"1"', b"0.5")
WORDS = tuple(struct.pack("<Q", word) for word in (0, 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
DEEP = "@deep@"  # stands for lists in lists, which no Python value can hold
VALUES = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), -0.5, "", "0", "x",
    "x" * 10_000,
    "\0", "\ud800", "../../outside", "/etc/passwd", "\x1b[2J", "</s>", "a\nb", DEEP, [], {}, [None], [[]], {"": None},
    {"a": {"b": []}}, [1, "two", None],
)  # fmt: skip


@st.composite
def damaged(draw: Callable[..., Any], original: bytes) -> bytes:
    """Bytes with one to three things done to them."""
    data = original
    for _ in range(draw(st.integers(1, 3))):
        data = _damage(draw, data)
    return data


def _damage(draw: Callable[..., Any], data: bytes) -> bytes:
    kind = draw(
        st.sampled_from(("flip", "cut", "remove", "insert", "number", "repeat", "word", "swap", "empty", "drop"))
    )
    place, other = sorted(draw(st.tuples(*[st.integers(0, max(len(data), 1))] * 2)))
    if kind == "flip" and data:
        place = min(place, len(data) - 1)
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "remove":
        return data[:place] + data[other:]
    if kind == "insert":
        return data[:place] + draw(st.sampled_from(JUNK)) + data[place:]
    if kind == "number" and (numbers := list(re.finditer(rb"-?\d+(\.\d+)?", data[:200_000]))):
        found = draw(st.sampled_from(numbers))
        return data[: found.start()] + draw(st.sampled_from(NUMBERS)) + data[found.end() :]
    if kind == "repeat":
        return data[:other] + data[place : place + 4096] * draw(st.integers(1, 3)) + data[other:]
    if kind == "word":
        place = 0 if draw(st.booleans()) else place
        return data[:place] + draw(st.sampled_from(WORDS)) + data[place + 8 :]
    if kind == "swap":
        lines = data.split(b"\n")
        if len(lines) > 1:
            first, second = draw(st.tuples(*[st.integers(0, len(lines) - 1)] * 2))
            lines[first], lines[second] = lines[second], lines[first]
        return b"\n".join(lines)
    if kind == "drop":
        return data[other:]
    return b"" if kind == "empty" else data


def values() -> st.SearchStrategy:
    """Of a kind, a size or a spelling that nobody expects."""
    return st.sampled_from(VALUES).map(copy.deepcopy)


@st.composite
def strange(draw: Callable[..., Any], value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed, renamed or put elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        value = _change(draw, value)
    return value


def _change(draw: Callable[..., Any], value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 30)) == 0:
        return draw(values())
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    if isinstance(value[key], dict | list) and value[key] and draw(st.integers(0, 3)):
        value[key] = _change(draw, value[key])
        return value
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "elsewhere")))
    if kind == "replace":
        value[key] = draw(values())
    elif kind == "remove":
        del value[key]
    elif kind == "rename" and isinstance(value, dict):
        value[draw(st.sampled_from(("", "\ud800", "x" * 1000, key + "s", key.upper(), "__class__")))] = value.pop(key)
    elif kind == "elsewhere":
        value[key], value[keys[-1]] = value[keys[-1]], value[key]
    return value


def written(value: Any, ascii_only: bool = True) -> bytes:
    """JSON of a strange value, with what JSON itself does not allow."""
    text = json.dumps(value, ensure_ascii=ascii_only).replace(f'"{DEEP}"', "[" * 30_000 + "]" * 30_000)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def strange_json(draw: Callable[..., Any], original: bytes) -> bytes:
    """The bytes of a JSON file, its structure or the bytes themselves changed."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(original))
    data = written(draw(strange(json.loads(original))), draw(st.booleans()))
    if draw(st.integers(0, 9)) == 0 and data.startswith(b"{") and len(data) > 2:  # every key twice
        data = data[:-1] + b"," + data[1:]
    return data


@st.composite
def strange_safetensors(draw: Callable[..., Any], original: bytes) -> bytes:
    """The bytes of a safetensors file, its header's structure or length or the bytes themselves changed."""
    size = struct.unpack("<Q", original[:8])[0]
    kind = draw(st.sampled_from(("header", "header", "length", "bytes", "data")))
    if kind == "header":
        header = written(draw(strange(json.loads(original[8 : 8 + size]))))
        return struct.pack("<Q", len(header)) + header + original[8 + size :]
    if kind == "length":
        return draw(st.sampled_from(WORDS)) + original[8:]
    if kind == "data":
        return original[: 8 + size] + draw(damaged(original[8 + size :]))
    return draw(damaged(original))


@st.composite
def strange_yaml(draw: Callable[..., Any], original: bytes) -> bytes:
    """The bytes of a YAML file, its structure or the bytes themselves changed."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(original))
    text = yaml.safe_dump(draw(strange(yaml.safe_load(original))), allow_unicode=draw(st.booleans()))
    return text.replace(f"'{DEEP}'", "[" * 3000 + "]" * 3000).encode("utf-8", "surrogatepass")


@st.composite
def strange_lines(draw: Callable[..., Any], original: bytes) -> bytes:
    """The bytes of JSON lines, one of them changed or the bytes themselves."""
    if draw(st.booleans()):
        return draw(damaged(original))
    lines = original.splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = draw(strange_json(lines[number]))
    return b"\n".join(lines)


DAMAGES = {".json": strange_json, ".jsonl": strange_lines, ".yaml": strange_yaml, ".safetensors": strange_safetensors}
# What may be in the place of a file.
PLACES = ("content", "content", "content", "content", "missing", "folder", "loop", "empty", "dangling")


@contextlib.contextmanager
def damaged_folder(draw: Callable[..., Any], files: dict[str, bytes], names: list[str]) -> Iterator[Path]:
    """A folder of these files, one of `names` damaged or something else in its place."""
    name = draw(st.sampled_from(names))
    content = draw(DAMAGES.get(Path(name).suffix, damaged)(files[name]))
    with tempfile.TemporaryDirectory() as made:
        lay_out(Path(made, "case"), files)
        put(Path(made, "case", name), content, draw(st.sampled_from(PLACES)))
        yield Path(made, "case")


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files, by their paths within the folder. Returns the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All files in and below a folder, by their paths within it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def put(file: Path, content: bytes, place: str = "content") -> None:
    """Write a file, or put something else where it should be."""
    file.unlink(missing_ok=True)
    if place == "folder":
        file.mkdir()
    elif place == "loop":
        file.symlink_to(file.name)
    elif place == "dangling":
        file.symlink_to("nowhere")
    elif place != "missing":
        file.write_bytes(b"" if place == "empty" else content)
