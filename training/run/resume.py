"""What happens at --resume: find a checkpoint, verify it, refuse another run's. Its state: training/run/state.py."""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from errors import DamagedCheckpoint, UserError
from LMConfig import LMConfig
from training.run.checkpoint import MANIFEST, checksum
from training.run.progress import BEST, PROGRESS_FILE, Progress, Resume, checkpoints, give_back, newest, read_progress

LAST_GOOD = "last-good"
# As the identity of conversations and pairs begins, and that of pretraining's windows.
SAMPLES = re.compile(r"([\d:]+) (samples|windows)(?: of (\w+))?, shares ([\d:]+)")


def check_unused(out: Path, resume: Resume) -> None:
    """Raise `UserError` when there is a run in `out` but nobody asked to resume it."""
    found = newest(out) if out.is_dir() else None
    if found is None and (out / BEST).is_dir():  # of a run that died before its first other checkpoint
        found = out / BEST
    if found is not None and not resume:
        raise UserError(
            f"{out}: holds a run already ({found.name}); add --resume to continue it, or choose another --out"
        )


def find_checkpoint(out: Path, resume: Resume, run: dict[str, Any]) -> tuple[Path, Progress] | None:
    """Return the newest checkpoint of a run folder, verified, and how far it is, or None where there is none.

    Args:
        resume: `LAST_GOOD` sets checkpoints aside that are damaged, and takes the newest that is not.
        run: what the order of the data depends on, which must be what it was.

    Raises `UserError` when there is a run but nobody asked to resume it, or it was another one, and
    `DamagedCheckpoint` when the newest is damaged.
    """
    give_back(out / "final")
    give_back(out / BEST)
    check_unused(out, resume)
    while (found := newest(out) if out.is_dir() else None) is not None:
        try:
            verify(found)
            progress = read_progress(found)
            break
        except DamagedCheckpoint as error:
            if resume != LAST_GOOD:
                older = [path for path in checkpoints(out) if path != found]
                remedy = "no older checkpoint is there; choose another --out to begin again"
                remedy = f"--resume last-good continues from the one before it, {older[-1]}" if older else remedy
                raise DamagedCheckpoint(f"{error}; {remedy}") from None
            aside = found.with_name(f"damaged-{found.name}")
            shutil.rmtree(aside, ignore_errors=True)
            found.replace(aside)
            print(f"notice: {error}; set aside as {aside}", file=sys.stderr)
    else:
        return None
    for name, value in run.items():
        _unchanged(found, name, progress.run.get(name, value), value)
    progress.run = {**progress.run, **run}  # what an older run did not write down is held to from here on
    return found, progress


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
        if outside := [name for name in saved if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"{outside[0]!r} is not in the folder")
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from None
    for name, (size, digest) in saved.items():
        what = ""
        try:
            if (now := (folder / name).stat().st_size) != size:
                what = f"{now:,} bytes, {size:,} were saved"
            elif checksum(folder / name) != digest:
                what = "its checksum is not that of what was saved"
        except OSError as error:
            what = str(error.strerror)
        if what:
            raise DamagedCheckpoint(f"{folder / name}: damaged or cut short ({what})")


def contents(folder: Path) -> str | None:
    """Return the same for the same checkpoint, as this process sees it; None where it sees none."""
    digest = xxhash.xxh3_128()
    try:
        digest.update((folder / PROGRESS_FILE).read_bytes())
        with suppress(FileNotFoundError):  # of folders older than manifests
            digest.update((folder / MANIFEST).read_bytes())
    except OSError:
        return None
    return digest.hexdigest()


def same_shape(folder: Path, saved: LMConfig, config: LMConfig) -> None:
    """Raise `UserError` unless the model of `folder` has the configuration that this run has."""
    for name, value in asdict(config).items():
        _unchanged(folder, f"model.{name}", getattr(saved, name), value)


def _unchanged(folder: Path, name: str, before: Any, now: Any) -> None:
    if before != now:
        change = _other_data(name, before, now) or f"was trained with {name} = {before}, not {now}"
        other = ", a new one can: --ckpt DIR in place of --resume" if name.startswith("data") else ""
        raise UserError(f"{folder}: {change}; a run cannot change it midway{other}")


def _other_data(name: str, before: Any, now: Any) -> str:
    """Say without its hashes what has become of the data; empty where something else has changed."""
    if name == "data.content":
        return "the data changed (as many before and now, other content)"
    old, new = (SAMPLES.match(str(value)) for value in (before, now))
    if name != "data" or old is None or new is None or old[2] != new[2] or old.groups() == new.groups():
        return ""
    count, now = (sum(map(int, found[1].split(":"))) for found in (old, new))
    if count != now:
        return f"the data changed ({count} {new[2]} before, {now} now)"
    what = "in other shares" if (old[1], old[3]) == (new[1], new[3]) else "other content"
    return f"the data changed ({now} {new[2]} before and now, {what})"
