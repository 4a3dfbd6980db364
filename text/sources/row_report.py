"""What became of the rows of a data set: how many were read, and which could not be used, by kind and place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

EXAMPLES_SHOWN = 3
MOST_NOTICES = 20


class RowError(Exception):
    """A row that cannot be used: the kind, for counting, and what is wrong with this one."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


class UnwantedRow(RowError):
    """A row that reads well and is not used all the same: counted, and no reason to stop."""


def balance(total: int, what: str, fates: Mapping[str, int]) -> str:
    """`7473 rows = 7234 to train on + 149 held out + 90 too long`: what became of each, once.

    fates: counts by name, which add up to the total. The first is always said, others where there are any.
    """
    first, *others = (f"{count} {name}" for name, count in fates.items() if count or name == next(iter(fates)))
    return f"{total} {what} = {' + '.join([first, *others])}"


@dataclass
class RowReport:
    """What was read. `rows` = `kept` + `left_out` (more than the samples wanted) + all `problems`.

    `examples` holds the first few places of each kind of problem. `notices`: what was found in rows that are used all
    the same, with the number of such rows and the place of the first; `pending`: those of the row at hand. `unread`:
    lines that say which files of a folder were not read.
    """

    rows: int = 0
    kept: int = 0
    bytes_read: int = 0
    left_out: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notices: dict[str, tuple[int, str]] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)

    def add_problem(self, place: str, error: RowError) -> None:
        self.problems[error.kind] += 1
        examples = self.examples.setdefault(error.kind, [])
        if len(examples) < EXAMPLES_SHOWN:
            examples.append(f"{place}: {error}")

    def settle_notices(self, place: str) -> None:
        """Count the notices of the row at `place`; of kinds beyond the first `MOST_NOTICES` none is remembered."""
        for notice in sorted(self.pending):
            count, first = self.notices.get(notice, (0, place))
            if count or len(self.notices) < MOST_NOTICES:
                self.notices[notice] = (count + 1, first)
        self.pending.clear()

    def lines(self) -> list[str]:
        """The report for people: one line of totals, then each kind of problem with its first examples."""
        lines = [*self.unread, f"{self.kept} of {self.rows} rows read, {self.problems.total()} skipped"]
        if self.left_out:
            lines.append(f"  {self.left_out} good rows left out: more than the samples that were asked for")
        for kind, count in self.problems.most_common():
            lines.append(f"  {count} x {kind}")
            lines += [f"    {example}" for example in self.examples[kind]]
        return lines + self.notice_lines()

    def notice_lines(self) -> list[str]:
        """One line for each kind of notice, the most frequent first."""
        counted = sorted(self.notices.items(), key=lambda item: -item[1][0])
        return [f"  notice: {count} x {notice}; the first: {first}" for notice, (count, first) in counted]

    @property
    def unused(self) -> dict[str, int]:
        """What became of the rows that were not kept, for `balance`."""
        return {"more than were asked for": self.left_out, "skipped": self.problems.total()}

    def why_empty(self) -> str:
        """One line of reasons why no row was kept."""
        counts = ", ".join(f"{count} x {kind}" for kind, count in self.problems.most_common())
        first = next((examples[0] for examples in self.examples.values()), "name a file")
        return f"{self.rows} rows, all skipped: {counts}; the first: {first}"


def kind_of(value: object) -> str:
    """What a JSON value is, in words for an error message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)
