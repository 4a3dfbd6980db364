"""The numbers and formulas in a line of text: operands that operators join, without a word between."""

from __future__ import annotations

import re
from typing import NamedTuple

from text.judging.quantity import CURRENCY, VALUE

_NAMES = frozenset(("sqrt", "sin", "cos", "tan", "cot", "log", "ln", "exp", "pi"))
_TOKEN = re.compile(
    r"(?P<word>\d+(?:st|nd|rd|th)(?![a-z])|[A-Za-z][A-Za-z\d']+(?:\x20[A-Za-z]{2,}(?![\d']))*)"
    rf"|(?P<number>{CURRENCY}?{VALUE}(?:\x20?(?:mm|cm|dm|km|m|in|ft|yd)\^-?[1-3](?!\d))?)"
    r"|(?P<command>\\[A-Za-z]+|\\\\)|(?P<operator>(?<=[\d)])x(?=\d)|(?<=[\d)]\x20)x(?=\x20\d)"
    r"|<=|>=|[-+±*/×÷·^_=<>≤≥≠≈√&]|(?<=\d):(?=\d)|!(?=[+*/=)]))"
    r"|(?P<letter>[A-Za-z](?![A-Za-z\d']))"
    r"|(?P<open>\\?[(\[{])|(?P<close>\\?[)\]}])|(?P<sign>[π∞°])|(?P<space>\x20+)"
    r"|(?P<comma>,)"
    r"|(?P<other>[\u3001-\uffef]+|.|\n)"
)


class Piece(NamedTuple):
    """A number or formula, and where in the text it begins and ends."""

    text: str
    begin: int
    end: int


def pieces(text: str) -> list[Piece]:
    """Return the numbers and formulas of a text, from left to right, in a time linear in its length.

    text: as `text.judging.quantity.plain` leaves it.
    """
    found: list[Piece] = []
    begin, end, before, has_gap, opened = -1, -1, "", False, []
    for token in _TOKEN.finditer(text + "\n"):
        kind, word = token.lastgroup, token[0]
        if kind == "space":
            has_gap = True
            continue
        if kind == "word" and word in _NAMES:
            kind = "letter"
        # Two operands with a space between are two pieces, unless a bracket or a command holds them together.
        is_apart = has_gap and not opened and kind in ("number", "letter", "sign", "open")
        is_apart = is_apart and before in ("number", "letter", "sign", "close") and "\\" not in text[begin:end]
        is_hyphen = begin < 0 and word in ("-", "+") and bool(re.search("[A-Za-z]$", text[: token.start()][-1:]))
        ends = kind in ("word", "other") or is_hyphen or (kind in ("comma", "close") and not opened)
        if ends or is_apart:
            if end > begin >= 0:  # of a bracket that nothing closes, what stands in it
                _add(found, text, max([begin, *(place for place in opened if place < end)]), end)
            begin, before, opened = -1, "", []
        if not ends:
            begin = token.start() if begin < 0 else begin
            if kind == "open":
                opened.append(token.end())
            elif kind == "close":
                opened.pop()
            if kind not in ("operator", "comma", "open"):
                end = token.end()
            before = kind
        has_gap = False
    return found


def without(text: str, found: list[Piece]) -> str:
    """Return the text between the pieces."""
    ends = [0, *(piece.end for piece in found)]
    begins = [*(piece.begin for piece in found), len(text)]
    return " ".join(text[end:begin] for end, begin in zip(ends, begins, strict=True))


def is_calculation(text: str) -> bool:
    """Return whether the text is numbers that are still to be added or multiplied: no question answers itself."""
    bare = re.sub(r"\\frac|(?<=\d)\s[a-z]{2,}", "", text)
    is_sum = re.search(r"[\d)}%\u3400-\u9fff]\s*[-+*×÷·]\s*[-\d({$]", bare)
    return bool(is_sum) and not re.search(r"[A-Za-z\\√π]", bare)


def _add(found: list[Piece], text: str, begin: int, end: int) -> None:
    """Append a piece that has content; one that continues a calculation, `3 apples + 4`, joins the one before."""
    written = text[begin:end]
    unit = re.fullmatch(r"\s?(?:[a-z]+|[\u3400-\u9fff]{1,4})\s?", text[found[-1].end : begin]) if found else None
    if written[0] in "^_":  # the power of a unit
        return
    # 5个-3个 subtracts; 答案是-7 has a sign.
    if unit and (written[0] in "+*/×÷·" or written[:2] == "- " or (written[0] == "-" and len(unit[0]) == 1)):
        begin = found.pop().begin
    elif re.match(r"[-+] |[*/·]", written):  # a bullet
        begin += len(written) - len(written[1:].lstrip())
    written = text[begin:end]
    if re.search(r"[\dπ∞\\]|[A-Za-z)]\s*[-+*/^=<>≤≥]", written):
        found.append(Piece(written, begin, end))
