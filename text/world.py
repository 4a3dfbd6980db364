"""The generated demo corpus: Crescent Town (月牙镇), a small bilingual world that a small model can learn in minutes.

    python -m text.world --out data/demo [--seed 0] [--scale 1.0]        python -m text.world --preview

Four in five characters are Chinese. What is held out, and how, is told in docs of `world_cast.World` (facts),
`world_numbers` (sums, comparisons, sequences), `world_words` (classes, opposites) and `world_cast.reserved` (the rest).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from errors import UserError, command_line
from text.world_cast import World
from text.world_chats import chat, held_out_questions
from text.world_facts import entry, roll_call
from text.world_lessons import lesson
from text.world_numbers import arithmetic_problem, held_out_arithmetic_problem, states_held_out
from text.world_stories_en import story as story_en
from text.world_stories_zh import story as story_zh
from text.world_talk import conversation, diary, gossip, letter, riddle, romanised_names, two_languages
from text.world_verses import recital

__all__ = ["arithmetic_problem", "documents", "generate", "held_out_arithmetic_problem"]

ROW_CHARACTERS = 512
PRETRAIN_CHARACTERS = 6_500_000  # at scale 1
CHATS = 40_000  # at scale 1
HELDOUT_CHARACTERS = 36_000
ENGLISH_SHARE = 0.2
FILES = ("pretrain.csv", "sft.jsonl", "heldout.txt", "heldout_questions.jsonl")

# Writers of documents with their weights, by language.
WRITERS = {
    "zh": (
        (partial(entry, language="zh"), 40),
        (story_zh, 16),
        (partial(conversation, language="zh"), 6),
        (partial(gossip, language="zh"), 6),
        (partial(letter, language="zh"), 3),
        (diary, 3),
        (riddle, 3),
        (partial(roll_call, language="zh"), 5),
        (two_languages, 2),
        (romanised_names, 1),
        (partial(recital, language="zh"), 2),
        (partial(lesson, language="zh"), 24),
    ),
    "en": (
        (partial(entry, language="en"), 42),
        (story_en, 10),
        (partial(conversation, language="en"), 7),
        (partial(gossip, language="en"), 7),
        (partial(letter, language="en"), 4),
        (partial(roll_call, language="en"), 5),
        (partial(recital, language="en"), 2),
        (partial(lesson, language="en"), 30),
    ),
}


def documents(world: World, stream: str, characters: int) -> Iterator[str]:
    """Documents of at most 512 characters until `characters` are reached; a pure function of world and `stream`.

    English comes in whenever its share falls below one in five, so the share holds at every size. A document in
    which numbers happen to state something held out is drawn again.
    """
    rng = random.Random(f"{world.seed}/{stream}")
    written = {"zh": 0, "en": 0}
    while sum(written.values()) < characters:
        language = "en" if written["en"] < ENGLISH_SHARE * sum(written.values()) else "zh"
        writers, weights = zip(*WRITERS[language], strict=True)
        document = rng.choices(writers, weights=weights)[0](rng, world)
        if len(document) > ROW_CHARACTERS or states_held_out(document):
            continue
        written[language] += len(document)
        yield document


def generate(out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Write pretrain.csv, sft.jsonl, heldout.txt and heldout_questions.jsonl into the folder `out`.

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
    parts["heldout.txt"].write_text("\n\n".join(held_out) + "\n", encoding="utf-8", newline="\n")
    with parts["heldout_questions.jsonl"].open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in held_out_questions(world))
    with Progress(console=Console(stderr=True)) as progress:
        _write_pretrain(parts["pretrain.csv"], world, scale, frozenset(held_out), progress)
        _write_chats(parts["sft.jsonl"], world, scale, progress)
    for name, part in parts.items():
        os.replace(part, out / name)


def preview(seed: int) -> None:
    """Print a few documents, chats and held-out questions."""
    world = World.build(seed)
    print("== documents ==")
    for document in documents(world, "preview", 4000):
        print(document, end="\n\n")
    print("== chats ==")
    rng = random.Random(f"{seed}/preview chats")
    for _ in range(12):
        for message in chat(rng, world)["messages"]:
            print(f"{message['role']}: {message['content']}")
        print()
    print("== held-out questions ==")
    questions = held_out_questions(world)
    for row in random.Random(f"{seed}/preview questions").sample(questions, 20):
        print(f"[{row['kind']}] {row['question']}  ->  {row['answer']}")


def _write_pretrain(path: Path, world: World, scale: float, held_out: frozenset[str], progress: Progress) -> None:
    total = round(PRETRAIN_CHARACTERS * scale)
    task = progress.add_task("pretrain.csv", total=total)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text"])
        for document in documents(world, "pretrain", total):
            if document not in held_out:
                writer.writerow([document])
            progress.advance(task, len(document))


def _write_chats(path: Path, world: World, scale: float, progress: Progress) -> None:
    rng = random.Random(f"{world.seed}/chats")
    count = max(1, round(CHATS * scale))
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for _ in progress.track(range(count), description="sft.jsonl"):
            file.write(json.dumps(chat(rng, world), ensure_ascii=False) + "\n")


def main() -> None:
    """The command line of `python -m text.world`."""
    parser = argparse.ArgumentParser(prog="python -m text.world", description="Generate the bilingual demo corpus.")
    parser.add_argument("--out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="which world (default 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="size; 1.0 is 6.5 million characters (default)")
    parser.add_argument("--preview", action="store_true", help="print samples instead of writing files")
    options = parser.parse_args()
    if options.preview:
        preview(options.seed)
    elif options.out is None:
        raise UserError("--out: no folder given; add --out DIR, or --preview to look at samples")
    else:
        generate(options.out, options.seed, options.scale)


if __name__ == "__main__":
    command_line(main)
