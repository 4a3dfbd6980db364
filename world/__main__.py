"""The command line of `python -m world`."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from errors import UserError, command_line
from world.cast import World
from world.chats import chat, held_out_questions, preference
from world.corpus import documents, generate


def main() -> None:
    """Write the corpus, or show samples of it."""
    parser = argparse.ArgumentParser(prog="python -m world", description="Generate the bilingual demo corpus.")
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
    print("== preferences ==")
    for _ in range(6):
        print(" | ".join(preference(rng, world).values()))
    print("== held-out questions ==")
    questions = held_out_questions(world)
    for row in random.Random(f"{seed}/preview questions").sample(questions, 20):
        print(f"[{row['kind']}] {row['question']}  ->  {row['answer']}")


if __name__ == "__main__":
    command_line(main)
