"""The data files in a folder: all of them or, where the folder has splits, those of one.

Splits are recognised as `datasets` does it. What `save_to_disk` wrote has them in dataset_dict.json, and the files of
each in its state.json: what else lies there (`cache-*`) are results of `map` and `filter`. In other folders, as those
from the Hub, they are in the names: train-00000-of-00001.parquet, test.jsonl, validation/0001.csv, chats_train.csv.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError

if TYPE_CHECKING:
    from text.sources.registry import Source
    from text.sources.row_report import RowReport

TRAIN = "train"
# What `save_to_disk` and the Hub write beside the data, and LLaMA-Factory's registry.
METADATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
SPLITS = {
    TRAIN: (TRAIN, "training"),
    "validation": ("validation", "valid", "val"),
    "dev": ("dev",),  # beside val it is another, as in C-Eval, whose worked examples it has
    "test": ("test", "testing", "eval", "evaluation"),
}
# What `save_to_disk` writes into the folder of a DatasetDict and of a Dataset, with the key of the list in it.
SAVED = {"dataset_dict.json": "splits", "state.json": "_data_files"}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
SHARD = re.compile(r"[-_.]\d{5,}-of-\d{5,}.*")
# Formats that may be packed with gzip, .gz behind their own suffix.
ZIPPED = (".csv", ".json", ".jsonl", ".ndjson", ".txt")
# Who reads which files, bound when one is met.
READERS = {
    ".csv": "text.sources.csv_rows:csv_rows",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "text.sources.json_rows:json_rows"),
    **dict.fromkeys((".parquet", ".arrow"), "text.sources.table_rows:table_rows"),
    ".txt": "text.sources.text_rows:text_rows",
}
SUFFIXES = tuple(suffix for suffix in READERS if suffix != ".txt")


def suffix_of(path: Path) -> str:
    """Return what decides how a file is read: its suffix in lower case, without .gz where the format may be packed."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner in ZIPPED else suffix


def row_files(source: Source, suffixes: Collection[str], report: RowReport) -> list[Path | str]:
    """Return the file itself, those in and below a folder, sorted, or the name of a data set on the Hub.

    What is left out for being of another split goes into the report. Raises `UserError` when there is none.
    """
    if source.is_hub:
        return [source.path]
    path, formats = Path(source.path), ", ".join(suffixes)
    try:
        if path.is_dir():
            folder = Folder.read(path, suffixes, source.split)
            if not folder.files:
                raise UserError(f"{path}: the folder has no data; put files of {formats} there")
            report.unread += folder.notices()
            return list(folder.files)
        if path.is_file():
            if suffix_of(path) not in suffixes or path.name in METADATA:
                raise UserError(f"{path}: a format that is not read; give one of {formats}")
            with open(path, "rb"):
                return [path]
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}; check the path and its permissions") from error
    raise UserError(f"{path}: no such file or folder; check the path")


@dataclass
class Folder:
    """What a folder and those below it hold, of the files of one split where it has several.

    `files`: of data, sorted; `strangers`: of other formats; `splits`: those there are; `others`: those left out.
    """

    path: Path
    split: str
    files: list[Path] = field(default_factory=list)
    strangers: list[Path] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: str | Path, suffixes: Collection[str], split: str = TRAIN) -> Folder:
        """Open a folder. Raises `UserError` where one cannot be read, or where there are splits but not this one.

        Names that indicate other splits alone, as those of a test set, do not keep a folder from being trained on.
        """
        folder = cls(Path(path), split)
        try:
            folder._walk(suffixes)
        except OSError as error:
            message = f"{error.filename or path}: {error.strerror}; check the path and its permissions"
            raise UserError(message) from error
        folder.files.sort()
        folder._choose()
        return folder

    def notices(self) -> list[str]:
        """Return one line each about splits and files that are left out."""
        others, strangers = ", ".join(sorted(self.others)), sorted(file.name for file in self.strangers)
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        return [f"{self.path}: only the split {self.split} is read, not {others}"] * bool(others) + [
            f"{self.path}: {len(strangers)} of other formats not read: {shown}"
        ] * bool(strangers)

    def _walk(self, suffixes: Collection[str]) -> None:
        def fail(error: OSError) -> None:
            raise error

        visited: set[str] = set()
        for parent, folders, names in os.walk(self.path, onerror=fail, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(parent)) in visited:  # a link to a folder above would be followed for ever
                folders.clear()
                continue
            visited.add(real)
            place = Path(parent)
            if saved := _listed(place, names, "dataset_dict.json"):
                names, folders[:] = [], [self._saved_split(place, saved)]
            elif saved := _listed(place, names, "state.json"):
                names = [Path(str(file.get("filename"))).name for file in saved if isinstance(file, dict)]
                folders.clear()
            for name in names:
                if name not in METADATA and not name.startswith("."):
                    (self.files if suffix_of(Path(name)) in suffixes else self.strangers).append(place / name)

    def _saved_split(self, place: Path, splits: list[Any]) -> str:
        """Return the folder in which `save_to_disk` put the split of a DatasetDict."""
        found = [name for name in splits if name == self.split] or [
            name for name in splits if isinstance(name, str) and SPLIT_OF.get(name) == SPLIT_OF.get(self.split, "")
        ]
        self.splits.update(map(str, splits))
        if not found:
            raise self._no_split()
        self.others.update(self.splits - {found[0]})
        return found[0]

    def _choose(self) -> None:
        """Leave out the files whose names indicate another split."""
        names = {file: _names(file.relative_to(self.path)) for file in self.files}
        splits = {
            file: next((SPLIT_OF[name] for name in found if name in SPLIT_OF), "") for file, found in names.items()
        }
        named = set(splits.values()) - {""}
        if not named:
            return
        self.splits |= named
        if self.split in SPLIT_OF:
            chosen = [file for file, split in splits.items() if split == SPLIT_OF[self.split]]
        else:
            chosen = [file for file, found in names.items() if self.split in found]
        if not chosen and self.split != TRAIN:
            raise self._no_split()
        if chosen and self.split == TRAIN:
            chosen = [file for file, split in splits.items() if split in (TRAIN, "")]
        if chosen:
            self.others.update(splits[file] for file in set(self.files) - set(chosen) if splits[file])
            self.files = chosen

    def _no_split(self) -> UserError:
        shown = ", ".join(sorted(self.splits)) or "none"
        return UserError(f"{self.path}: no split {self.split!r}, there are: {shown}; name one of them as split")


def _listed(place: Path, names: list[str], name: str) -> list[Any]:
    """Return the list in a file of `save_to_disk`; empty where there is none."""
    if name not in names:
        return []
    try:
        content = json.loads((place / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place / name}: not valid JSON ({error}); fetch or save the data set again") from error
    found = content.get(SAVED[name]) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def _names(file: Path) -> list[str]:
    """Return what may name a file's split, the likeliest first: its name, the words at its ends, its folders."""
    name = file.name.lower()
    stem = SHARD.sub("", name)
    if stem == name:
        stem = name.removesuffix(".gz").removesuffix(suffix_of(file))
    words = re.split(r"[-_. ]+", stem)
    return [stem, words[0], words[-1], *(part.lower() for part in reversed(file.parts[:-1]))]
