"""How far a tokenizer shortens text, by kind of text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from text.tokenizer import Tokenizer

KINDS = ("Chinese", "English", "digits", "code")
MIXED = "mixed"

BUILT_IN_TEXTS = {
    "Chinese": """\
清晨的阳光洒在小河边，老人牵着孙子慢慢地走。孙子问：“爷爷，河水要流到哪里去？”老人笑着说：“流到很远很远的大海里。”
人工智能是研究如何让计算机完成需要人类智能的工作的一门学科。近年来，随着数据和算力的增长，它发展得很快。
""",
    "English": """\
The old lighthouse keeper climbed the stairs every evening, carrying a lamp and a book he never finished.
Scientists have found that regular sleep improves memory, although the reasons are not understood.
""",
    "digits": """\
3.14159265358979 2024-02-29 13:45:07 1,048,576 138-0013-8000 0.000125 65535 42
1 + 27 = 28, 36 * 36 = 1296, 144 / 12 = 12
""",
    "code": """\
def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

for (int i = 0; i < 10; i++) {
    printf("%d\\n", values[i]);
}
""",
}

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LETTERS = re.compile(r"[A-Za-z]")
_DIGITS = re.compile(r"[0-9]")
_CODE_MARKS = re.compile(r"[{}\[\]()<>=;_#*/\\|&$]")


@dataclass
class Compression:
    """Size of a text in characters, UTF-8 bytes and tokens."""

    kind: str
    source: str
    characters: int
    bytes: int
    tokens: int


def kind_of_line(line: str) -> str:
    """Return Chinese, English, digits or code, by what the line is made of; mixed for several, or where it is short."""
    visible = len(line) - line.count(" ")
    if visible < 4:
        return MIXED
    if len(_DIGITS.findall(line)) > 0.5 * visible:
        return "digits"
    if len(_CHINESE.findall(line)) > 0.5 * visible:
        return "Chinese"
    if len(_CODE_MARKS.findall(line)) > 0.08 * visible:
        return "code"
    return "English" if len(_LETTERS.findall(line)) > 0.8 * visible else MIXED


def measure_compression(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Compression]:
    """For each kind: its built-in text, and the lines of that kind in `texts`, where there are any; then all `texts`.

    Each line is of one kind, so their characters and bytes add up to those of all.
    """
    lines: dict[str, list[str]] = {kind: [] for kind in (*KINDS, MIXED)}
    everything = list(texts)
    for text in everything:
        for line in text.splitlines(keepends=True):
            lines[kind_of_line(line)].append(line)
    rows = []
    for kind in lines:
        if kind in BUILT_IN_TEXTS:
            rows.append(_measure(tokenizer, kind, "built-in", [BUILT_IN_TEXTS[kind]]))
        if lines[kind]:
            rows.append(_measure(tokenizer, kind, "held out", lines[kind]))
    if everything:
        rows.append(_measure(tokenizer, "all", "held out", everything))
    return rows


def _measure(tokenizer: Tokenizer, kind: str, source: str, texts: list[str]) -> Compression:
    ids = [token for encoded in tokenizer.encode_batch(texts) for token in encoded]
    return Compression(kind, source, sum(map(len, texts)), int(tokenizer.token_bytes[ids].sum()), len(ids))
