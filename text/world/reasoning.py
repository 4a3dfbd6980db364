"""Worked sums for the R1 path: thoughts between tags before the answer, and problems of other kinds to mix in.

python -m text.world.reasoning --out data/demo/r1

format.jsonl       a few short ones: what the tags look like
cold_start.jsonl   sums worked out step by step (DeepSeek-R1 section 2.3.1)
explained.jsonl    sums with their columns in a sentence, for the demo's fine-tuning: rewards make a habit of it
problems.jsonl     comparing, continuing and counting, with answers that are numbers
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from errors import naming
from text.world.numbers import arithmetic_problem, comparison, counting, sequence

SIGNS = {"加": "+", "减": "-", "乘": "×", "plus": "+", "minus": "-", "times": "×"}
_STEP = re.compile(r"[-+×]|加|减|乘|plus|minus|times")
WORDS = {
    "zh": {"+": "加", "-": "减", "×": "乘", "is": "等于", "ones": "个位", "tens": "十位", "so": "所以是", "stop": "。"},
    "en": {"+": " plus ", "-": " minus ", "×": " times ", "is": " is ", "ones": "ones: ", "tens": "tens: ",
           "so": "so it is ", "stop": "."},
}  # fmt: skip


def written(thoughts: str, answer: str) -> str:
    """Thoughts and answer in the strict format."""
    return f"<think>\n{thoughts}\n</think>\n<answer>\n{answer}\n</answer>"


def worked(question: str) -> str:
    """The thoughts that solve a sum of `text.world.numbers.arithmetic_problem`, step by step, in its language."""
    words = WORDS["zh" if re.search(r"[\u4e00-\u9fff]", question) else "en"]
    numbers = [int(digits) for digits in re.findall(r"\d+", question)]
    signs = [SIGNS.get(sign, sign) for sign in _STEP.findall(question)]
    lines, value = [], numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = {"+": value + number, "-": value - number, "×": value * number}[sign]
        lines += _columns(value, sign, number, words)
        lines.append(f"{value}{words[sign]}{number}{words['is']}{result}{words['stop']}")
        value = result
    return "\n".join(lines)


def _columns(a: int, sign: str, b: int, words: dict[str, str]) -> Iterator[str]:
    """Ones, then tens, where no carry or borrowing is in the way; nothing to say of smaller numbers."""
    if sign == "×" or max(a, b) < 20 or max(a, b) > 99:
        return
    (tens, ones), (more, other) = divmod(a, 10), divmod(b, 10)
    column = ones + other if sign == "+" else ones - other
    if not 0 <= column <= 9:
        return
    yield f"{words['ones']}{ones}{words[sign]}{other}{words['is']}{column}{words['stop']}"
    rest = tens + more if sign == "+" else tens - more
    yield f"{words['tens']}{tens}{words[sign]}{more}{words['is']}{rest}{words['stop']}"


def explained(question: str) -> str | None:
    """A sum's answer as a sentence that shows the columns first; None for a sum that has nothing to show.

    个位1加6等于7，所以51加6等于57。
    """
    *columns, last = worked(question).split("\n")
    if not columns or len(re.findall(r"\d+", question)) > 2:
        return None
    if min(int(digits) for digits in re.findall(r"\d+", question)) < 10:
        columns = columns[:1]  # the tens stay as they are
    chinese = re.search(r"[\u4e00-\u9fff]", question)
    text = ("，" if chinese else ", ").join([*(line[:-1] for line in columns), ("所以" if chinese else "so ") + last])
    return text[0].upper() + text[1:]


def explanations(rng: random.Random, count: int, level: int = 2) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Conversations that explain a sum which is not held out."""
    while count:
        question, _ = arithmetic_problem(rng, level)
        if (reply := explained(question)) is not None:
            count -= 1
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def cold_start(rng: random.Random, levels: tuple[int, ...], brief: bool) -> dict[str, list[dict[str, str]]]:
    """One conversation: a sum that is not held out, and its answer in the strict format."""
    question, answer = arithmetic_problem(rng, rng.choice(levels))
    thoughts = answer if brief else worked(question)
    reply = written(thoughts, re.findall(r"\d+", answer)[-1])
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def problems(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Problems of other kinds, none of them held out."""
    makers = {"comparison": comparison, "sequence": sequence, "counting": counting}
    for number in range(count):
        kind = list(makers)[number % len(makers)]
        exchange = makers[kind](rng, "zh" if rng.random() < 0.8 else "en")
        answer = re.findall(r"\d+", exchange.answer)
        # "19 is larger than 7": the winner comes first; the others name one number.
        yield {"question": exchange.question, "answer": answer[0], "kind": kind}


def generate(out: Path, seed: int = 1, few: int = 400, many: int = 4000) -> None:
    """Write the three files into `out`."""
    rng = random.Random(f"{seed}/reasoning")
    files = {
        "format.jsonl": [cold_start(rng, (1, 2), brief=True) for _ in range(few)],
        "cold_start.jsonl": [cold_start(rng, (1, 2, 3), brief=False) for _ in range(many)],
        "problems.jsonl": list(problems(rng, many)),
        "explained.jsonl": list(explanations(rng, many)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        with naming(out / name):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / name).write_text(text, encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/demo/r1", help="folder to write into")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    generate(Path(options.out), options.seed)


if __name__ == "__main__":
    main()
