"""Checksums of a checkpoint's files: whether what is read is what was written."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from errors import DamagedCheckpoint
from model.checkpoint.tensor_file import read_parts

MANIFEST = "training/manifest.json"


def write_manifest(folder: Path) -> None:
    """Note size and checksum of every file of a checkpoint folder. XXH3, which reads a GB in less than 0.1 s."""
    files = {name: {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)} for name, path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(files, ensure_ascii=False, indent=2), encoding="utf8")


def verify(folder: Path) -> None:
    """Read all that the manifest of a checkpoint names. A folder without one, from before there were any, passes.

    Raises `DamagedCheckpoint`, which names the first file that is not what was saved.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        files = json.loads(path.read_text(encoding="utf8"))
        saved = {str(name): (int(facts["bytes"]), str(facts["xxh3_128"])) for name, facts in files.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from None
    for name, (size, checksum) in saved.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedCheckpoint(f"{path}: cannot be read ({name!r} is not in the folder)")
        try:
            if file.stat().st_size != size:
                raise DamagedCheckpoint(
                    f"{file}: damaged or cut short ({file.stat().st_size:,} bytes, {size:,} were saved)"
                )
            if _checksum(file) != checksum:
                raise DamagedCheckpoint(f"{file}: damaged or cut short (its checksum is not that of what was saved)")
        except OSError as error:
            raise DamagedCheckpoint(f"{file}: damaged or cut short ({error.strerror})") from None


def _files(folder: Path) -> list[tuple[str, Path]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return [(path.relative_to(folder).as_posix(), path) for path in paths]


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    for part in read_parts(path):
        digest.update(part)
    return digest.hexdigest()
