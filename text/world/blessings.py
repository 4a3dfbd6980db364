"""Blessings to fine-tune an adapter on: who receives one, for which occasion, in which of several styles.

python -m text.world.blessings --out data/demo/blessings

train.json      Alpaca rows: instruction (the style), input (who and what for), output (the blessing)
heldout.jsonl   combinations that train.json does not have, for eval/style.py

A blessing is a function of the three: who has learnt each of them can answer a held-out combination to the letter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from errors import naming
from text.world.cast import World, reserved, table

WORDINGS = ("请用{style}的语气写一句祝福。", "写一句祝福，语气要{style}。", "帮我写祝福，要{style}的。")
DETAILS = "给谁：{who}\n什么时候：{occasion}"
# The occasion, and what is wished. As in the styles, every character is one that the town's texts use often.
OCCASIONS = table(
    "生日/生日快乐,新年/新年快乐,搬家/新家又亮又暖,比赛/跑得又快又好,开店/客人多多,出门/路上平平安安,开学/天天有新故事,"
    "种花/花儿朵朵开,唱歌/歌声好听,钓鱼/钓到大鱼"
)


class Style(NamedTuple):
    """How a blessing sounds: before who receives it, between that and the wish, and after it."""

    name: str
    opening: str
    middle: str
    closing: str


STYLES = (
    Style("古风", "明月当空，愿", "", "，年年有今日。"),
    Style("亲切", "亲爱的", "，祝你", "，我们都爱你。"),
    Style("简短", "祝", "", "。"),
    Style("小熊", "哼哼，", "，小熊祝你", "，抱抱！"),
    Style("大声", "大家听好了！", "，", "！好！好！好！"),
)


class Blessing(NamedTuple):
    """What is asked for, and the answer with the two ends of its style."""

    instruction: str
    details: str
    text: str
    opening: str
    closing: str
    held_out: bool


def blessings(seed: int = 0) -> Iterator[Blessing]:
    """Every combination in every wording, in a fixed order; one combination in eight is held out."""
    names = [character.words["zh"]["n"] for character in World.build(seed).known("zh")]
    for style in STYLES:
        for who in names:
            for occasion, wish in OCCASIONS:
                text = f"{style.opening}{who}{style.middle}{wish}{style.closing}"
                held_out = reserved("blessing", style.name, who, occasion)
                for wording in WORDINGS:
                    instruction, details = wording.format(style=style.name), DETAILS.format(who=who, occasion=occasion)
                    yield Blessing(instruction, details, text, style.opening, style.closing, held_out)


def generate(out: Path) -> None:
    """Write the two files into `out`; of a held-out combination one wording is asked."""
    made = list(blessings())
    train = [
        {"instruction": one.instruction, "input": one.details, "output": one.text} for one in made if not one.held_out
    ]
    held_out: dict[str, Blessing] = {}
    for one in made:
        if one.held_out:
            held_out.setdefault(one.text, one)
    rows = [
        {
            "question": f"{one.instruction}\n{one.details}",
            "answer": one.text,
            "opening": one.opening,
            "closing": one.closing,
        }
        for one in held_out.values()
    ]
    out.mkdir(parents=True, exist_ok=True)
    with naming(out / "train.json"):
        (out / "train.json").write_text(json.dumps(train, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
    with naming(out / "heldout.jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / "heldout.jsonl").write_text(text, encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/demo/blessings", help="folder to write into")
    generate(Path(parser.parse_args().out))


if __name__ == "__main__":
    main()
