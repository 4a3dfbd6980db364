"""The documents that a pretraining run held out, as a file that any model can be measured on.

python eval/held_out.py --run out/pretrain --out out/held_out.jsonl
python eval/run.py --ckpt DIR --suite text=out/held_out.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli import call
from errors import UserError, command_line, is_broken
from text.corpus.shard_set import ShardSet
from text.corpus.shards import open_sources
from text.files import read_yaml, write_json_lines
from text.sources.registry import REGISTRY, find_sources
from text.tokenizer import Tokenizer

READERS = ("column", "encoding", "min_chars", "val_fraction", "on_error")
# What is asked of a run's settings, by type.
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("data", "tokenizer", "ckpt", "shards", "encoding", "on_error", "datasets"), (str,)),
    **dict.fromkeys(("min_chars", "sequence_length", "val_tokens", "micro_tokens"), (int,)),
    "column": (str, type(None)),
    "val_fraction": (int, float),
}


def pretraining_settings(run: Path) -> dict[str, Any]:
    """Read a pretraining run's config.yaml. Raises `UserError` for another folder, or a damaged file."""
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: no such file; name the run folder of a pretraining")
    settings = read_yaml(config)
    if isinstance(settings, dict):
        settings = {"datasets": REGISTRY, "ckpt": "", **settings}  # which older runs do not have
    if not isinstance(settings, dict) or any(type(settings.get(name)) not in kinds for name, kinds in TYPES.items()):
        raise UserError(f"{config}: not the settings of a pretraining; name the run folder of one")
    for name, value in settings.items():
        if isinstance(value, str) and is_broken(value):
            raise UserError(f"{config}: {name} has a NUL or half of a character; restore the file")
    return settings


def open_corpus(settings: dict[str, Any], tokenizer: Tokenizer) -> list[tuple[ShardSet, float]]:
    """Return what the run was trained on, tokenised and cut as it was."""
    sources = find_sources(settings["data"], settings["datasets"], "text")
    options = {name: settings.get(name) for name in READERS}
    return open_sources(sources, tokenizer, settings["shards"], main=True, **options)


def held_out_documents(run: Path) -> Iterator[str]:
    """Yield the documents in order. Raises `UserError` for a folder that is not a pretraining run."""
    settings = pretraining_settings(run)
    tokenizer = Tokenizer.from_folder(settings["tokenizer"] or settings["ckpt"])
    for shard_set, _ in open_corpus(settings, tokenizer):
        stream = shard_set.split("val")
        for number in range(stream.documents):
            start, stop, _ = stream.document(number)
            yield tokenizer.decode(stream.read(start, stop - 1).tolist())  # without the </s> that ends it


def held_out(run: str, out: str) -> None:
    """Write the held-out documents of a pretraining run as JSON lines with the column text.

    Args:
        run: the run folder, with its config.yaml; its data and tokenised shards must be where they were
        out: file to write
    """
    path = Path(out)
    texts = list(held_out_documents(Path(run)))
    if not texts:
        raise UserError(f"{run}: nothing was held out (val_fraction)")
    write_json_lines(path, ({"text": text} for text in texts))
    print(f"{path}: {len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes")


if __name__ == "__main__":
    command_line(lambda: call(held_out, __doc__ or ""))
