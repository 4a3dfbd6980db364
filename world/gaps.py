"""Held-out documents with a gap whose filling is known, to measure what a model that fills in the middle has learned.

python -m world.gaps --out data/demo        writes gaps.jsonl

value      a fact of a character, which the world's text states elsewhere
result     what a sum comes to
operand    the second number of a sum, which only what follows the gap tells
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from errors import command_line
from text.files import write_json_lines
from world.cast import ATTRIBUTES, World
from world.corpus import HELDOUT_CHARACTERS, documents

SUM = re.compile(r"(?<!\d)\d+(?:加|减|\+|-)(?P<operand>\d+)(?:等于|=)(?P<result>\d+)(?!\d)")


def gaps(rng: random.Random, world: World, text: str) -> Iterator[dict[str, str]]:
    """Yield gaps of up to three sums of a document, one of each kind in each, and of one fact."""
    sums = list(SUM.finditer(text))
    for found in rng.sample(sums, min(len(sums), 3)):
        for kind in ("operand", "result"):
            yield _gap(text, *found.span(kind), kind)
    values = [
        character.value(attribute)
        for character in world.characters
        for attribute in ATTRIBUTES
        if character.name in text and attribute != "friend" and text.count(character.value(attribute)) == 1
    ]
    if values:
        value = rng.choice(sorted(set(values)))
        yield _gap(text, text.index(value), text.index(value) + len(value), "value")


def _gap(text: str, begin: int, end: int, kind: str) -> dict[str, str]:
    return {"prefix": text[:begin], "middle": text[begin:end], "suffix": text[end:], "kind": kind}


def generate(out: Path, seed: int = 0) -> None:
    """Write gaps.jsonl into `out`: gaps of the documents of heldout.txt, of the same seed."""
    world, rng = World.build(seed), random.Random(f"{seed}/gaps")
    held_out = documents(world, "heldout", HELDOUT_CHARACTERS)
    write_json_lines(out / "gaps.jsonl", (gap for text in held_out for gap in gaps(rng, world, text)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/demo", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="which world (default 0)")
    options = parser.parse_args()
    generate(Path(options.out), options.seed)


if __name__ == "__main__":
    command_line(main)
