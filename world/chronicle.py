"""Long documents, in which questions are about what was told far above, and facts to plant in a haystack.

python -m world.chronicle --out data/demo/long

long.jsonl       chronicles of the town, to extend a model's context with (configs/extend.yaml)
needles.jsonl    facts that no training text states, with a question and the answers to choose from (eval/needle.py)
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import check_least, command_line
from text.files import write_json_lines
from world.cast import World, reserved
from world.corpus import documents
from world.facts import Exchange
from world.grammar import sentences
from world.reading import questions_and_answers, scene

# A fact, and its question with the answer up to the place: a who, x a thing, p a place.
PLANTED = (
    ("{a}在{p}捡到了{x}。", "问：{a}在哪里捡到了{x}？\n答：{a}在"),
    ("{a}把{x}忘在了{p}。", "问：{a}把{x}忘在了哪里？\n答：{a}把{x}忘在了"),
)


def chronicle(rng: random.Random, world: World, pages: Iterator[str]) -> str:
    """Return the pages as one document: each is followed by two small stories and a question about any story so far.

    Within the document no other story answers the question, and none is asked about twice.
    """
    lines: list[str] = []
    open_questions: list[Exchange] = []
    known: set[str] = set()
    for page in pages:
        lines.append(page)
        for _ in range(2):
            story, exchanges = scene(rng, world, "zh")
            asked = [exchange for exchange in exchanges if "谁" not in exchange.question]
            if asked and not known & {exchange.question for exchange in asked}:
                known |= {exchange.question for exchange in asked}
                lines.append(story)
                open_questions.append(rng.choice(asked))
        if open_questions:
            chosen = open_questions.pop(rng.randrange(len(open_questions)))
            lines.append(questions_and_answers([chosen], "zh"))
    return "\n".join(lines)


def needle(rng: random.Random, world: World) -> dict[str, Any]:
    """Return a fact of a character and a thing that are reserved, so that no training text has them together."""
    cast = sentences("cast")
    places = [place for place, _ in cast["places"]]
    while True:
        a, (measure, noun, _) = rng.choice(world.characters).name, rng.choice(cast["things"])
        if reserved(a, f"一{measure}{noun}"):
            break
    words = {"a": a, "x": f"一{measure}{noun}", "p": rng.choice(places)}
    fact, question = (form.format_map(words) for form in rng.choice(PLANTED))
    return {"fact": fact, "question": question, "answer": words["p"], "choices": places}


def generate(out: Path, seed: int = 0, count: int = 300, characters: int = 12_000, needles: int = 200) -> None:
    """Write both files into `out`: `count` documents of so many characters of pages, and the facts."""
    world, rng = World.build(seed), random.Random(f"{seed}/chronicles")
    pages = (documents(world, f"chronicle/{number}", characters) for number in range(count))
    write_json_lines(out / "long.jsonl", ({"text": chronicle(rng, world, own)} for own in pages))
    rng = random.Random(f"{seed}/needles")
    write_json_lines(out / "needles.jsonl", [needle(rng, world) for _ in range(needles)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/demo/long", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="which world (default 0)")
    parser.add_argument("--documents", type=int, default=300, help="chronicles (300)")
    parser.add_argument("--characters", type=int, default=12_000, help="of the pages in each (12000)")
    options = parser.parse_args()
    check_least(1, documents=options.documents, characters=options.characters)
    generate(Path(options.out), options.seed, options.documents, options.characters)


if __name__ == "__main__":
    command_line(main)
