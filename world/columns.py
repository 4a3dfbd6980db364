"""Arithmetic worked out in words: the ones, the tens, and the result."""

from __future__ import annotations

import re
from collections.abc import Iterator

SIGNS = {"加": "+", "减": "-", "乘": "×", "plus": "+", "minus": "-", "times": "×"}
_STEP = re.compile(r"[-+×]|加|减|乘|plus|minus|times")
WORDS = {
    "zh": {"+": "加", "-": "减", "×": "乘", "is": "等于", "ones": "个位", "tens": "十位", "so": "，所以", "stop": "。"},
    "en": {"+": " plus ", "-": " minus ", "×": " times ", "is": " is ", "ones": "ones: ", "tens": "tens: ",
           "so": ", so ", "stop": "."},
}  # fmt: skip


def worked(question: str) -> str:
    """Return the thoughts that solve an arithmetic problem step by step, in its language."""
    words = WORDS["zh" if _is_chinese(question) else "en"]
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
    """Yield ones, then tens, where no carry or borrowing is in the way; nothing to say of smaller numbers."""
    if sign == "×" or max(a, b) < 10 or max(a, b) > 99:
        return
    (tens, ones), (more, other) = divmod(a, 10), divmod(b, 10)
    column = ones + other if sign == "+" else ones - other
    if not 0 <= column <= 9:
        return
    yield f"{words['ones']}{ones}{words[sign]}{other}{words['is']}{column}{words['stop']}"
    rest = tens + more if sign == "+" else tens - more
    yield f"{words['tens']}{tens}{words[sign]}{more}{words['is']}{rest}{words['stop']}"


def explained(question: str) -> str | None:
    """Return a sum's answer as a sentence that shows the columns first; None for a sum that has nothing to show.

    个位1加6等于7，所以51加6等于57。
    """
    chinese = _is_chinese(question)
    *columns, last = worked(question).split("\n")
    numbers = [int(digits) for digits in re.findall(r"\d+", question)]
    if not columns or len(numbers) > 2:
        return None
    if min(numbers) < 10:
        columns = columns[:1]  # the tens stay as they are
    shown = ("，" if chinese else ", ").join(line[:-1] for line in columns)
    return shown[0].upper() + shown[1:] + WORDS["zh" if chinese else "en"]["so"] + last


def _is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None
