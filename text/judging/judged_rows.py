"""Rows of a reference answer and a reply, read from a file to be judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, one_line
from text.chats.problems import bare_answer, is_missing, written_number
from text.judging.judge import Verdict, judge
from text.sources.registry import Source
from text.sources.row_report import kind_of
from text.sources.rows import every_row

SHOWN = 60  # characters of a reply, its end


@dataclass(frozen=True)
class JudgedRow:
    """`right`: the verdict that the row itself has; None without one."""

    answer: str
    reply: str
    right: bool | None

    def line(self, verdict: Verdict) -> str:
        """Return the verdict for people."""
        shown = one_line(self.reply)
        shown = f"...{shown[-SHOWN:]}" if len(shown) > SHOWN else shown
        taken = "no answer, or several" if verdict.taken is None else repr(verdict.taken)
        differs = "" if self.right in (None, verdict.right) else ", the row says otherwise"
        return (
            f"{'right' if verdict.right else 'wrong'}{differs}: {self.answer!r} expected, {taken} taken from {shown!r}"
        )


def judged_rows(file: str | Path) -> Iterator[tuple[JudgedRow, Verdict]]:
    """Yield each row of a file with its verdict, in order. Raises `UserError` for a row without answer or reply."""
    count = 0
    for place, row in every_row(Source.of(file)):
        judged = _to_row(place, row)
        yield judged, judge(bare_answer(judged.answer) or judged.answer, judged.reply)
        count += 1
    if not count:
        raise UserError(f"{file}: no row; give a file of rows with 'answer' and 'reply'")


def _to_row(place: str, row: object) -> JudgedRow:
    if not isinstance(row, dict):
        raise UserError(f"{place}: the row is {kind_of(row)}; it must be an object with 'answer' and 'reply'")
    texts = []
    for name in ("answer", "reply"):
        value = row.get(name)
        if is_missing(value) or (name == "answer" and not str(value).strip()):
            raise UserError(f"{place}: has no {name!r}; add it or drop the row")
        value = written_number(value)
        if not isinstance(value, str):
            raise UserError(f"{place}: {name!r} is {kind_of(value)}; it must be text or a number")
        texts.append(value)
    right = {"true": True, "false": False}.get(str(row.get("right")).strip().casefold())  # a CSV has text
    return JudgedRow(*texts, right)
