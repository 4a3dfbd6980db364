"""Greeting messages to fine-tune an adapter on: for whom, for which occasion, in which of several styles.

python -m world.greeting_messages --out data/demo/blessings

train.json      Alpaca rows: instruction (the style), input (who and what for), output (the message)
heldout.jsonl   combinations that train.json does not have, for eval/style.py

A message is a function of the three: a model trained on each of them can answer a held-out combination to the letter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from errors import command_line, naming
from text.files import write_json_lines
from world.cast import World, reserved
from world.grammar import table

WORDINGS = ("请用{style}的话写一句祝福。", "写一句祝福，像{style}说的那样。", "帮我写祝福，要像{style}的话。")
DETAILS = "给谁：{who}\n什么时候：{occasion}"
# The occasion, and what is wished. As in the styles, words are of those that the town's texts use often: an adapter
# does not train the head, and to the head rare tokens are all alike.
OCCASIONS = table(
    "生日/送给你一个大蛋糕,新年/每天都有好朋友,搬家/你的家在花园里,比赛/你是最好的,开店/大家都买你的东西,出门/回家的路上都很高兴,"
    "开学/老师都喜欢你,种花/花园里的花都很大,唱歌/大家都最喜欢你,放假/每天讲故事"
)


class Style(NamedTuple):
    """How a message sounds: before who receives it, between that and the wish, and after it."""

    name: str
    opening: str
    middle: str
    closing: str


STYLES = (
    Style("老师", "你好，我是老师。", "，", "。知道吗？"),
    Style("船长", "我是船长，很高兴认识你，", "，", "。谢谢你！"),
    Style("小猫", "亲爱的", "，我是小猫，", "，我们在一起！"),
    Style("医生", "医生想了想，又说：“", "，", "。”"),
    Style("邮递员", "我是邮递员，早上好，", "，我把一张贺卡送给你：“", "。”"),
)


class GreetingMessage(NamedTuple):
    """What is asked for, and the answer with the two ends of its style."""

    instruction: str
    details: str
    text: str
    opening: str
    closing: str
    held_out: bool


def messages(seed: int = 0) -> Iterator[GreetingMessage]:
    """Yield every combination in every wording, in a fixed order; one combination in eight is held out."""
    names = [character.words["zh"]["n"] for character in World.build(seed).known("zh")]
    for style in STYLES:
        for who in names:
            for occasion, wish in OCCASIONS:
                text = f"{style.opening}{who}{style.middle}{wish}{style.closing}"
                held_out = reserved("blessing", style.name, who, occasion)
                for wording in WORDINGS:
                    instruction, details = wording.format(style=style.name), DETAILS.format(who=who, occasion=occasion)
                    yield GreetingMessage(instruction, details, text, style.opening, style.closing, held_out)


def generate(out: Path) -> None:
    """Write the two files into `out`; of a held-out combination one wording is asked."""
    train, held_out = [], {}
    for one in messages():
        if not one.held_out:
            train.append({"instruction": one.instruction, "input": one.details, "output": one.text})
        else:
            question = f"{one.instruction}\n{one.details}"
            row = {"question": question, "answer": one.text, "opening": one.opening, "closing": one.closing}
            held_out.setdefault(one.text, row)
    out.mkdir(parents=True, exist_ok=True)
    with naming(out / "train.json"):
        (out / "train.json").write_text(json.dumps(train, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
    write_json_lines(out / "heldout.jsonl", held_out.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/demo/blessings", help="folder to write into")
    generate(Path(parser.parse_args().out))


if __name__ == "__main__":
    command_line(main)
