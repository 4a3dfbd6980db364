"""Token shards on disk: their layout, their index, and the streams of tokens that training reads from them.

A folder of shards holds
    index.json            recipe, sources, tokenizer fingerprint, counts, and for each shard its size and checksum
    train-00000.bin       tokens, uint16 little-endian: each document's tokens, then </s>; no begin token, since the
                          </s> before a document says the same
    train-00000.npy       (documents, 2) uint32: where each document ends in the .bin, in tokens after its </s>, and
                          its UTF-8 bytes
    val-00000.bin, .npy   the held-out documents among the same part of the corpus
    tokenizer/            the tokenizer that made them
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from errors import UserError
from text.corpus.corpus import Corpus
from text.order import content_hash
from text.sources.registry import Source
from text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from text.corpus.infilling import Infilling

INDEX = "index.json"
LAYOUT = 1
SPLITS = ("train", "val")
KINDS = {"complete": bool, "fingerprint": str, "eos_id": int, "sources": list, "recipe": dict, "parts": list}
COUNTS = ("tokens", "documents", "bytes")


@dataclass(frozen=True)
class Recipe:
    """What decides, with the corpus and the tokenizer, what the shards hold.

    `shard_tokens`: tokens of a part, 128 MB at the default. `val_fraction`: share of documents that is held out, chosen
    by their hash; of two documents or more each split gets at least one, unless the fraction is 0. `fim_rate`: share of
    the documents to train on whose middle is moved to the end, chosen by `fim_seed` (see `text.corpus.infilling`).
    """

    column: str | None = None
    on_error: str = "skip"
    encoding: str = "utf-8"
    min_chars: int = 1
    val_fraction: float = 0.005
    shard_tokens: int = 1 << 26
    fim_rate: float = 0.0
    fim_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"fim_rate {self.fim_rate}: give a share of the documents, from 0 to 1")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction {self.val_fraction}: give a share from 0 to below 1")

    def begun(self, data: str | Sequence[Source], tokenizer: Tokenizer) -> tuple[Corpus, dict[str, Any]]:
        """Return the corpus, and the index of a folder in which nothing is finished."""
        corpus = Corpus(data, self.column, self.on_error, self.encoding)
        made = {"layout": LAYOUT, "complete": False, "eos_id": tokenizer.eos_id, **self.work(tokenizer)}
        return corpus, {**made, "sources": corpus.identity(), "parts": []}

    def work(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return what of an index decides, with the data, what the shards hold."""
        recipe = asdict(self)
        if not self.fim_rate:  # as older programs wrote it
            del recipe["fim_rate"], recipe["fim_seed"]
        return {"fingerprint": tokenizer.fingerprint, "recipe": recipe}

    @property
    def infilling(self) -> Infilling | None:
        """Return which documents are rearranged, None for none."""
        if not self.fim_rate:
            return None
        return resolve_name("text.corpus.infilling:Infilling")(
            self.fim_rate, self.fim_seed, int(self.val_fraction * 2**64)
        )

    def folder(self, plain: Path, tokenizer: Tokenizer) -> Path:
        """Return the folder of this work on the data whose name is `plain`: no other work on them has the same one.

        An older program had one folder for all work on the same data; what it made there is used.
        """
        with suppress(UserError):
            if (index := read_index(plain)) and not other_work(index, self.work(tokenizer)):
                return plain
        recipe = self.work(tokenizer)["recipe"]
        special = [(name, value) for name, value in recipe.items() if value != getattr(Recipe, name)]
        return plain.with_name(f"{plain.name}-{content_hash([tokenizer.fingerprint, *special])[:8]}")


class TokenStream:
    """All tokens of one split in the order of the corpus, read from disk as they are asked for.

    `tokens`, `documents` and `bytes` (of UTF-8 text) are totals; each document's `</s>` is among the tokens.
    """

    def __init__(self, folder: Path, shards: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.tokens, self.documents, self.bytes = (sum(shard[what] for shard in shards) for what in COUNTS)
        self._shards = [shard for shard in shards if shard["tokens"]]
        self._token_starts = np.cumsum([0, *(shard["tokens"] for shard in self._shards)])
        self._document_starts = np.cumsum([0, *(shard["documents"] for shard in self._shards)])
        self._maps: dict[str, np.ndarray] = {}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start to stop of the split, (stop - start,) uint16. Raises `IndexError` outside the stream."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        parts = []
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while start < stop:
            first, last = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            parts.append(self._map(shard, "bin")[start - first : min(stop, last) - first])
            start, shard = min(stop, last), shard + 1
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def document(self, number: int) -> tuple[int, int, int]:
        """Return (start, stop, bytes) of a document: its place in the stream, `</s>` included, and its UTF-8 bytes."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        shard = int(np.searchsorted(self._document_starts, number, side="right")) - 1
        bounds = self._map(shard, "npy")
        place, first = number - int(self._document_starts[shard]), int(self._token_starts[shard])
        begin = int(bounds[place - 1, 0]) if place else 0
        return first + begin, first + int(bounds[place, 0]), int(bounds[place, 1])

    def document_at(self, token: int) -> int:
        """Return the number of the document that a token belongs to. Raises `IndexError` outside the stream."""
        if not 0 <= token < self.tokens:
            raise IndexError(f"token {token} of {self.tokens}")
        shard = int(np.searchsorted(self._token_starts, token, side="right")) - 1
        ends = self._map(shard, "npy")[:, 0]
        place = int(np.searchsorted(ends, token - int(self._token_starts[shard]), side="right"))
        return int(self._document_starts[shard]) + place

    def _map(self, shard: int, suffix: str) -> np.ndarray:
        name = f"{self._shards[shard]['name']}.{suffix}"
        if name not in self._maps:
            file = self.folder / name
            self._maps[name] = np.load(file, mmap_mode="r") if suffix == "npy" else np.memmap(file, "<u2", "r")
        return self._maps[name]


class ShardSet:
    """A finished folder of shards. `index` is its index.json; `fingerprint` and `eos_id` are its tokenizer's."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.fingerprint: str = index["fingerprint"]
        self.eos_id: int = index["eos_id"]
        self._streams = {
            split: TokenStream(folder, [part[split] for part in index["parts"] if part[split]]) for split in SPLITS
        }

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None, checksums: bool = True) -> ShardSet:
        """Open a finished folder. `checksums=False` checks the shards' sizes only, not their content.

        Raises `UserError` when there is no finished index, when a shard is damaged, which it names, or when
        `tokenizer` is not the one that made the shards.
        """
        folder = Path(folder)
        index = read_index(folder)
        if index is None or not index["complete"]:
            raise UserError(f"{folder}: no finished shards; prepare them first (pretrain.py does)")
        if tokenizer is not None and tokenizer.fingerprint != index["fingerprint"]:
            raise UserError(
                f"{folder}: made with tokenizer {index['fingerprint']}, not {tokenizer.fingerprint}; "
                f"use the tokenizer in {folder / 'tokenizer'} or prepare the shards again"
            )
        for part in index["parts"]:
            if damage := find_damage(folder, part, checksums):
                raise UserError(f"{damage}; delete it and prepare the shards again")
        return cls(folder, index)

    @property
    def content(self) -> str:
        """The same for the same tokens and documents: of the checksums in the index, without reading the shards."""
        shards = [part[split] for part in self.index["parts"] for split in SPLITS if part[split]]
        return content_hash((shard["name"], shard["bin_checksum"], shard["npy_checksum"]) for shard in shards)

    def split(self, name: str) -> TokenStream:
        """Return the stream of "train" or "val"."""
        return self._streams[name]


def read_index(folder: Path) -> dict[str, Any] | None:
    """Read index.json, of a finished folder or of one in work; None when there is none.

    Raises `UserError` if it is broken, or names a file that is not a shard.
    """
    file = folder / INDEX
    try:
        index = json.loads(file.read_bytes())
        if index["layout"] != LAYOUT:
            raise UserError(f"{file}: layout {index['layout']}, this program reads {LAYOUT}; delete the folder")
        for name, kind in KINDS.items():
            if not isinstance(index[name], kind):
                raise ValueError(f"{name} is {index[name]!r}")
        if not 0 <= index["eos_id"] < 1 << 16:
            raise ValueError(f"eos_id is {index['eos_id']}")
        for part in index["parts"]:
            if type(part["read"]) is not int or part["read"] < 1:
                raise ValueError("a part without its last document")
            for split in SPLITS:
                _check_entry(split, part[split])
        return index
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error}); delete the folder and prepare the shards again") from error


def other_work(found: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Return in which ways one index was made otherwise than `made`, from the same data, in words."""
    changes = []
    if found["fingerprint"] != made["fingerprint"]:
        changes.append(f"another tokenizer ({found['fingerprint']}, now {made['fingerprint']})")
    for name in {**made["recipe"], **found["recipe"]}:
        value = made["recipe"].get(name)
        if (before := found["recipe"].get(name)) != value:
            changes.append(f"another {name} ({before}, now {value})")
    return changes


def _check_entry(split: str, shard: dict[str, Any] | None) -> None:
    """Raise `ValueError` where the entry of a shard is not as `write_shard` made it. Its name becomes a file's."""
    if shard is None:
        return
    if not re.fullmatch(rf"{split}-\d{{5,9}}", shard["name"], re.ASCII):
        raise ValueError(f"a shard {shard['name']!r}")
    numbers = tokens, documents, _, bin_size, npy_size = [shard[name] for name in (*COUNTS, "bin_size", "npy_size")]
    is_whole = all(type(number) is int and number >= 0 for number in numbers)
    # .npy has a header
    if not is_whole or bin_size != 2 * tokens or not 8 * documents < npy_size < 8 * documents + 512:
        raise ValueError(f"counts of {shard['name']}")
    if not isinstance(shard["bin_checksum"], str) or not isinstance(shard["npy_checksum"], str):
        raise ValueError(f"checksums of {shard['name']}")


def find_damage(folder: Path, part: dict[str, Any], checksums: bool = True) -> str | None:
    """Return what is wrong with the files of one part of the index, in words; None when nothing is."""
    for shard in filter(None, (part[split] for split in SPLITS)):
        for suffix in ("bin", "npy"):
            file, size = folder / f"{shard['name']}.{suffix}", shard[f"{suffix}_size"]
            try:
                if (found := file.stat().st_size) != size:
                    return f"{file}: damaged shard, {found:,} bytes where {size:,} were written"
                if checksums and _checksum(file) != shard[f"{suffix}_checksum"]:
                    return f"{file}: damaged shard, its content is not what was written (checksum)"
            except OSError as error:
                return f"{file}: shard cannot be read ({error.strerror})"
    return None


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
