"""Where data comes from: files, folders, Hub data sets and generators, or the names that `datasets.yaml` gives them.

`find_sources` is how every stage reads `--data a,b=2`. LLaMA-Factory's `dataset_info.json` is a registry too: a file
that ends in .json is read as one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import UserError, with_home
from text.files import read_yaml
from text.sources.folders import READERS, TRAIN
from text.sources.formats import FORMATS, KINDS, TAGS, Layout

REGISTRY = "datasets.yaml"
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
GENERATORS = ("arithmetic", "reasoning_gym")

TEXTS = ("path", "hub", "format", "subset", "split", "folder")
KEYS = (*TEXTS, "columns", "tags", "samples", "seed", "weight", "about")
# What LLaMA-Factory calls a key and a format.
LLAMA_FACTORY_KEYS = {
    "hf_hub_url": "hub", "file_name": "path", "subset": "subset", "split": "split", "folder": "folder",
    "num_samples": "samples", "formatting": "", "ranking": "", "columns": "", "tags": "",
    **dict.fromkeys(("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"), ""),
}  # fmt: skip
LLAMA_FACTORY_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}


@dataclass(frozen=True)
class Source:
    """One source of data.

    `path`: a file, a folder, a Hub data set or a generator. `weight`: its share of a mixture, None where none is given.
    `samples`: how many rows to take, chosen by `seed` and their number alone; None takes all.
    """

    path: str
    name: str = ""
    layout: Layout = field(default_factory=Layout)
    weight: float | None = None
    samples: int | None = None
    seed: int = 0
    is_hub: bool = False
    subset: str | None = None
    split: str = TRAIN
    folder: str = ""

    def __str__(self) -> str:
        return self.name or self.path

    @classmethod
    def of(cls, source: Source | str | Path | tuple[str, float]) -> Source:
        """Return a source, a path, or a path with its weight, as a source."""
        if isinstance(source, tuple):
            return cls(str(source[0]), weight=source[1])
        return source if isinstance(source, Source) else cls(str(source))


def find_sources(data: str, registry: str | Path = REGISTRY, kind: str | None = "chat") -> list[Source]:
    """Return `a.jsonl=2,general` as sources: each entry a path, a name in the registry or `owner/name` on the Hub.

    A path that exists is not cut at a '=' in it. kind: what the stage reads, one of `KINDS`; None for anything. Raises
    `UserError` for a name that is nowhere, for one that is a path here as well, and for data of another kind.
    """
    entries = [data] if Path(data).exists() else [part.strip() for part in data.split(",") if part.strip()]
    if not entries:
        raise UserError(f"--data {data!r}: names nothing; give a file, a folder, a name in {registry} or a Hub name")
    sources = []
    for entry in entries:
        path, weight = _split_weight(entry)
        source = _find(path, Path(registry), kind)
        known = FORMATS.get(source.layout.format)
        if known and kind and known.kind != kind:
            fitting = ", ".join(name for name, other in FORMATS.items() if other.kind == kind)
            raise UserError(
                f"--data {source}: its format {source.layout.format} is {KINDS[known.kind]}, and this reads "
                f"{KINDS[kind]} ({fitting}); name other data"
            )
        sources.append(source if weight is None else replace(source, weight=weight))
    return sources


def weights(sources: Iterable[Source]) -> list[float] | None:
    """Return the weights of a mixture, 1 where none is given; None where no source has one: all of the data is one."""
    given = [source.weight for source in sources]
    return None if all(weight is None for weight in given) else [1.0 if weight is None else weight for weight in given]


def _split_weight(entry: str) -> tuple[str, float | None]:
    path, mark, weight = entry.rpartition("=")
    if not mark or Path(entry).exists():
        return entry, None
    try:
        share = float(weight)
    except ValueError:
        raise UserError(f"--data {entry}: {weight!r} is not a weight; write PATH=NUMBER") from None
    if not path or not 0 < share < float("inf"):
        raise UserError(f"--data {entry}: each entry is PATH or PATH=WEIGHT with a weight above 0")
    return path, share


def _find(entry: str, registry: Path, kind: str | None) -> Source:
    exists, suffix = Path(entry).exists(), Path(entry).suffix
    is_word = not suffix and "/" not in entry
    names = Registry.read(registry) if registry.is_file() and (is_word or not exists) else None
    if names is not None and entry in names.entries:
        if exists:  # a downloaded folder gsm8k, an entry text beside a folder text: each would be a surprise
            hint = f"write ./{entry} for the path, or give the entry another name"
            raise UserError(f"--data {entry}: is a path here and a name in {registry}; {hint}")
        return names.source(entry)
    is_generator = kind in ("prompt", None) and entry.partition(":")[0] in GENERATORS
    if exists or suffix.lower() in (*READERS, ".gz") or is_generator:
        return Source(entry)  # a reader raises an error for a path that is not there
    # With a folder data here, data/chatz is a slip of the pen; asking the Hub for it would take half a minute.
    if not Path(entry).parent.is_dir() and (hub := HUB_NAME.fullmatch(entry)):
        return Source(hub["name"], name=entry, is_hub=True, subset=hub["config"])
    if "/" in entry:
        return Source(entry)
    if names is None:
        raise UserError(f"--data {entry}: no such path, and {registry}, where names are looked up, is not there")
    raise UserError(f"--data {entry}: no such path, and no name in {registry}{_hint(entry, names.entries)}")


@dataclass(frozen=True)
class Registry:
    """The entries of a registry file by name, as they are written; an entry is checked when it is asked for."""

    file: Path
    entries: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> Registry:
        """Open a registry. Raises `UserError` for a file that is not a table of names."""
        try:
            entries = json.loads(file.read_text("utf-8-sig")) if file.suffix == ".json" else read_yaml(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg}); fix it") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read ({error}); write it in UTF-8") from error
        entries = {} if entries is None else entries
        if not isinstance(entries, dict):
            raise UserError(f"{file}: is a {type(entries).__name__}; it must be a table of names, each with its entry")
        return cls(file, {str(name): entry for name, entry in entries.items()})

    def source(self, name: str) -> Source:
        """Return the entry of a name that is there. Raises `UserError` where something in the entry is unknown."""
        place, entry = f"{self.file}: {name}", self.entries[name]
        if not isinstance(entry, dict):
            raise UserError(f"{place}: must have keys such as path and format")
        _check_table(place, entry)
        if self.file.suffix == ".json":
            entry = _from_llama_factory(place, entry)
        _check_known(place, "key", entry, KEYS)
        if ("path" in entry) == ("hub" in entry):
            raise UserError(f"{place}: give either path, a file or folder, or hub, a data set's owner/name")
        for key in TEXTS:
            if key in entry and not (isinstance(entry[key], str) and entry[key]):
                raise UserError(f"{place}: {key} must be text")
        is_hub = "hub" in entry
        path = entry["hub"] if is_hub else str(self.file.parent / with_home(entry["path"]))
        if not is_hub and ("subset" in entry or "folder" in entry):
            raise UserError(f"{place}: subset and folder are for data on the Hub; name the file or folder you want")
        if not is_hub and Path(path).is_file() and entry.get("split", TRAIN) != TRAIN:
            raise UserError(f"{place}: a file has no split; leave it out, or name a folder")
        numbers = {
            "weight": _number(place, entry, "weight", (int, float), 0),
            "samples": _number(place, entry, "samples", int, 0),
            "seed": _number(place, entry, "seed", int, -1) or 0,
        }
        chosen = {key: entry[key] for key in ("subset", "split", "folder") if key in entry}
        return Source(path, name, _layout(place, entry), is_hub=is_hub, **numbers, **chosen)


def _layout(place: str, entry: Mapping[str, Any]) -> Layout:
    name, columns, tags = entry.get("format", ""), entry.get("columns") or {}, entry.get("tags") or {}
    if name:
        _check_known(place, "format", [name], FORMATS)
        _check_known(place, f"column of {name}", columns, FORMATS[name].columns)
    elif columns:
        raise UserError(f"{place}: columns say nothing without a format; give one of {', '.join(FORMATS)}")
    _check_known(place, "tag", tags, TAGS)
    return Layout(name, columns, tags)


def _check_table(place: str, entry: Mapping[str, Any]) -> None:
    for key in ("columns", "tags"):
        names = entry.get(key) or {}
        if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
            raise UserError(f"{place}: {key} must name one thing each, as in {{prompt: question, response: reply}}")


def _number(place: str, entry: Mapping[str, Any], key: str, kind: Any, above: int) -> Any:
    value = entry.get(key)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool) and above < value < float("inf")):
        return value
    raise UserError(f"{place}: {key} {value!r}; give a {'whole ' if kind is int else ''}number above {above}")


def _from_llama_factory(place: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of LLaMA-Factory's dataset_info.json in the keys of this project."""
    _check_known(place, "key", entry, LLAMA_FACTORY_KEYS)
    if not entry.get("hf_hub_url") and not entry.get("file_name"):
        raise UserError(f"{place}: has neither hf_hub_url nor file_name; download the data and give its file_name")
    columns, layout = entry.get("columns") or {}, entry.get("formatting", "alpaca")
    for role in ("images", "videos", "audios", "kto_tag"):
        if role in columns:
            raise UserError(f"{place}: has {role}, which no stage of this project reads; name a data set of text pairs")
    _check_known(place, "formatting", [layout], LLAMA_FACTORY_FORMATS)
    name = LLAMA_FACTORY_FORMATS[layout]
    if entry.get("ranking"):
        given = {"alpaca": {"prompt": "instruction", "query": "input"}, "openai": {"messages": "messages"}}
        name, columns = "preference", {**given.get(layout, {}), **columns}
    elif layout == "alpaca" and list(columns) == ["prompt"]:  # how its entries for pretraining look
        name, columns = "text", {"text": columns["prompt"]}
    taken = ("hf_hub_url" if entry.get("hf_hub_url") else "file_name", "subset", "split", "folder", "num_samples")
    made = {LLAMA_FACTORY_KEYS[key]: entry[key] for key in taken if entry.get(key) is not None}
    return {**made, "format": name, "columns": columns, "tags": entry.get("tags") or {}}


def _check_known(place: str, what: str, names: Iterable[Any], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{place}: {what} {name!r} is not known{_hint(str(name), known)}")


def _hint(name: str, known: Iterable[str]) -> str:
    """Return what may have been meant, or what there is."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {near[0]}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; known are {shown}" if known else "; it is empty"
