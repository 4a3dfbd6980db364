"""Judgements a second of a core's own time: plain numbers, marked or at a sentence's end, as rewards meet them.

python bench/judge.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from text.judging.judge import judge

REPLIES = {
    "#### mark": "48/2 = 24\n48+24 = {}\n#### {}",
    "answer tags": "<think>\n48/2 = 24, 48+24 = {}\n</think>\n<answer>\n{}\n</answer>",
    "box": "So it is \\boxed{{{}}}.",
    "sentence": "48/2 = 24 in May.\nShe sold 48+24 = {} clips altogether.",
    "Chinese sentence": "五月卖了24个，一共卖了{}个。",
}
COUNT = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in REPLIES}
    for _ in range(options.rounds):
        for name, reply in REPLIES.items():
            replies = [reply.format(number, number) for number in range(COUNT)]
            begin = time.process_time()
            for number, text in enumerate(replies):
                assert judge(str(number), text).right
            rates[name].append(COUNT / (time.process_time() - begin))
    for name, found in rates.items():
        print(f"{name:18} {statistics.median(found):8,.0f} a second ({min(found):,.0f} - {max(found):,.0f})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
