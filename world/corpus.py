"""The files of the demo corpus: documents to pretrain on, chats to fine-tune on, and what is held out of both."""

from __future__ import annotations

import csv
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import Progress

from errors import UserError, naming
from text.files import write_json_lines
from world.cast import World
from world.chats import chat, held_out_questions, preference
from world.facts import entry, roll_call
from world.lessons import lesson
from world.numbers import states_held_out
from world.requests import held_out_requests
from world.stories import story
from world.talk import conversation, diary, gossip, letter, riddle, romanised_names, two_languages
from world.verses import recital

ROW_CHARACTERS = 512
PRETRAIN_CHARACTERS = 6_500_000  # at scale 1
CHATS = 40_000  # at scale 1
HELDOUT_CHARACTERS = 36_000
ENGLISH_SHARE = 0.2
PREFERENCES = 3_000  # at scale 1
FILES = (
    "pretrain.csv", "sft.jsonl", "preferences.jsonl", "heldout.txt", "heldout_questions.jsonl", "heldout_favours.jsonl",
)  # fmt: skip

# Writers of documents with their weights, by language.
WRITERS = {
    "zh": {
        entry: 34, story: 16, conversation: 6, gossip: 6, letter: 3, diary: 3, riddle: 3, roll_call: 5,
        two_languages: 2, romanised_names: 1, recital: 2, lesson: 33,
    },
    "en": {entry: 38, story: 10, conversation: 7, gossip: 7, letter: 4, roll_call: 5, recital: 2, lesson: 36},
}  # fmt: skip


def documents(world: World, stream: str, characters: int) -> Iterator[str]:
    """Yield documents of at most 512 characters until `characters` are reached; a pure function of world and `stream`.

    English comes in whenever its share falls below one in five, so the share holds at every size. A document in
    which numbers happen to state something held out is drawn again.
    """
    rng = random.Random(f"{world.seed}/{stream}")
    written = {"zh": 0, "en": 0}
    while sum(written.values()) < characters:
        language = "en" if written["en"] < ENGLISH_SHARE * sum(written.values()) else "zh"
        writers = WRITERS[language]
        document = rng.choices(list(writers), weights=writers.values())[0](rng, world, language)
        if len(document) > ROW_CHARACTERS or states_held_out(document):
            continue
        written[language] += len(document)
        yield document


def generate(out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Write `FILES` into the folder `out`.

    The same seed and scale give the same bytes; the held-out files depend on the seed alone. Rows go to disk as they
    are made; each file appears under its name when it is whole. Raises UserError when `scale` or `out` cannot be used.
    """
    if not 0 < scale < math.inf:
        raise UserError(f"--scale {scale}: the size must be a number above 0; 1.0 gives about 6.5 million characters")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    world = World.build(seed)
    parts = {name: out / f"{name}.part" for name in FILES}
    held_out = list(documents(world, "heldout", HELDOUT_CHARACTERS))
    with _writing(parts["heldout.txt"]) as file:
        file.write("\n\n".join(held_out) + "\n")
    write_json_lines(parts["heldout_questions.jsonl"], held_out_questions(world))
    write_json_lines(parts["heldout_favours.jsonl"], held_out_requests(world))
    with Progress(console=Console(stderr=True)) as progress:
        _write_pretrain(parts["pretrain.csv"], world, scale, frozenset(held_out), progress)
        for name, stream, draw, count in (
            ("sft.jsonl", "chats", chat, CHATS),
            ("preferences.jsonl", "preferences", preference, PREFERENCES),
        ):
            rng = random.Random(f"{world.seed}/{stream}")
            rows = (draw(rng, world) for _ in range(max(1, round(count * scale))))
            write_json_lines(parts[name], progress.track(rows, total=max(1, round(count * scale)), description=name))
    for name, part in parts.items():
        os.replace(part, out / name)


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    """Open a text file to write, the same bytes on every system; a full disk names it."""
    with naming(path), path.open("w", encoding="utf-8", newline="") as file:
        yield file


def _write_pretrain(path: Path, world: World, scale: float, held_out: frozenset[str], progress: Progress) -> None:
    total = round(PRETRAIN_CHARACTERS * scale)
    task = progress.add_task("pretrain.csv", total=total)
    with _writing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text"])
        for document in documents(world, "pretrain", total):
            if document not in held_out:
                writer.writerow([document])
            progress.advance(task, len(document))
