"""Worked arithmetic for the R1 path: thoughts between tags before the answer, and problems of other kinds to mix in.

python -m world.reasoning --out data/demo/r1

format.jsonl       a few short ones: what the tags look like
cold_start.jsonl   arithmetic worked out step by step (DeepSeek-R1 section 2.3.1)
problems.jsonl     comparing, continuing and counting, with answers that are numbers
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from errors import command_line
from text.chats.arithmetic import arithmetic_problem
from text.files import write_json_lines
from world.columns import worked
from world.numbers import comparison, counting, sequence


def written(thoughts: str, answer: str) -> str:
    """Return thoughts and answer in the strict format."""
    return f"<think>\n{thoughts}\n</think>\n<answer>\n{answer}\n</answer>"


def cold_start(rng: random.Random, levels: tuple[int, ...], brief: bool) -> dict[str, list[dict[str, str]]]:
    """Return a conversation: a problem that is not held out, and its answer in the strict format."""
    question, answer = arithmetic_problem(rng, rng.choice(levels))
    thoughts = answer if brief else worked(question)
    reply = written(thoughts, re.findall(r"\d+", answer)[-1])
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def problems(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Yield problems of other kinds, none of them held out."""
    makers = {"comparison": comparison, "sequence": sequence, "counting": counting}
    for number in range(count):
        kind = list(makers)[number % len(makers)]
        exchange = makers[kind](rng, "zh" if rng.random() < 0.8 else "en")
        answer = re.findall(r"\d+", exchange.answer)
        # "19 is larger than 7": the winner comes first; the others name one number.
        yield {"question": exchange.question, "answer": answer[0], "kind": kind}


def generate(out: Path, seed: int = 1, few: int = 400, many: int = 6000) -> None:
    """Write the three files into `out`."""
    rng = random.Random(f"{seed}/reasoning")
    files = {
        "format.jsonl": [cold_start(rng, (1, 2), brief=True) for _ in range(few)],
        "cold_start.jsonl": [cold_start(rng, (1, 1, 2, 2, 2, 3), brief=False) for _ in range(many)],
        "problems.jsonl": list(problems(rng, many)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_json_lines(out / name, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/demo/r1", help="folder to write into")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    generate(Path(options.out), options.seed)


if __name__ == "__main__":
    command_line(main)
