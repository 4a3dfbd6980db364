"""The files of the demo corpus: documents to pretrain on, chats to fine-tune on, and what is held out of both."""

from __future__ import annotations

import csv
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
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
from world.lessons import arithmetic_page, copy_page, lesson, number_page, reading_document, word_page
from world.numbers import states_held_out
from world.requests import held_out_requests
from world.stories import story
from world.talk import conversation, diary, gossip, letter, riddle, romanised_names, two_languages
from world.verses import recital

ROW_CHARACTERS = 512
PRETRAIN_CHARACTERS = 6_500_000  # at scale 1
LESSON_CHARACTERS = 2_200_000  # at scale 1
CHATS = 40_000  # at scale 1
HELDOUT_CHARACTERS = 36_000
ENGLISH_SHARE = 0.2
PREFERENCES = 3_000  # at scale 1
FILES = (
    "pretrain.csv", "lessons.csv", "sft.jsonl", "preferences.jsonl",
    "heldout.txt", "heldout_questions.jsonl", "heldout_favours.jsonl",
)  # fmt: skip

Writers = Mapping[str, Mapping[Callable[[random.Random, World, str], str], float]]
# Writers of documents with their weights, by language.
WRITERS: Writers = {
    "zh": {
        entry: 34, story: 16, conversation: 6, gossip: 6, letter: 3, diary: 3, riddle: 3, roll_call: 5,
        two_languages: 2, romanised_names: 1, recital: 2, lesson: 33,
    },
    "en": {entry: 38, story: 10, conversation: 7, gossip: 7, letter: 4, roll_call: 5, recital: 2, lesson: 36},
}  # fmt: skip
# More pages of the school book: a run of minutes reads too few of them among the stories to learn reading and copying.
PAGES = {arithmetic_page: 30, number_page: 22, word_page: 16, reading_document: 30, copy_page: 12}
LESSONS: Writers = {"zh": PAGES, "en": PAGES}


def documents(world: World, stream: str, characters: int, writers: Writers = WRITERS) -> Iterator[str]:
    """Yield documents of at most 512 characters until `characters` are reached; a pure function of world and `stream`.

    English comes in whenever its share falls below one in five, so the share holds at every size. A document in
    which numbers happen to state something held out is drawn again.
    """
    rng = random.Random(f"{world.seed}/{stream}")
    written = {"zh": 0, "en": 0}
    while sum(written.values()) < characters:
        language = "en" if written["en"] < ENGLISH_SHARE * sum(written.values()) else "zh"
        some = writers[language]
        document = rng.choices(list(some), weights=some.values())[0](rng, world, language)
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
        for name, stream, size, writers in (
            ("pretrain.csv", "pretrain", PRETRAIN_CHARACTERS, WRITERS),
            ("lessons.csv", "lessons", LESSON_CHARACTERS, LESSONS),
        ):
            total = round(size * scale)
            _write_texts(parts[name], documents(world, stream, total, writers), total, frozenset(held_out), progress)
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


def _write_texts(
    path: Path, texts: Iterator[str], characters: int, held_out: frozenset[str], progress: Progress
) -> None:
    task = progress.add_task(path.stem, total=characters)
    with _writing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text"])
        for text in texts:
            if text not in held_out:
                writer.writerow([text])
            progress.advance(task, len(text))
