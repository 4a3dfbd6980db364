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
    """Return `7473 rows = 7234 to train on + 149 held out + 90 too long`: what became of each, once.

    fates: counts by name, which add up to the total. The first is always shown, others where they are not 0.
    """
    first, *others = (f"{count} {name}" for name, count in fates.items() if count or name == next(iter(fates)))
    return f"{total} {what} = {' + '.join([first, *others])}"


@dataclass
class RowReport:
    """What was read. `rows` = `accepted` + `left_out` (more than the requested samples) + all `problems`.

    `files`: whole files that could not be read, by kind; `examples`: the first places of each kind. `notices`: what was
    found in rows that are used all the same, with the number of such rows and the place of the first; `pending`: those
    of the current row. `unread`: lines that say which files of a folder were not read.
    """

    rows: int = 0
    accepted: int = 0
    bytes_read: int = 0
    left_out: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    first_error: str = ""
    notices: dict[str, tuple[int, str]] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)

    def add_problem(self, place: str, error: RowError) -> None:
        """Count a row that cannot be used."""
        self._count(self.problems, error.kind, f"{place}: {error}")
        self.first_error = self.first_error or f"{place}: {error}"

    def add_file(self, place: str, error: RowError) -> None:
        """Count a file that cannot be read, or not from `place` on."""
        self._count(self.files, error.kind, f"{place}: {error}")
        self.first_error = self.first_error or f"{place}: {error}"

    def drop(self, kind: str, place: str) -> None:
        """Count a row that reads well and is not accepted."""
        self._count(self.problems, kind, place)

    def settle_notices(self, place: str) -> None:
        """Count the notices of the row at `place`; of kinds beyond the first `MOST_NOTICES` none is remembered."""
        for notice in sorted(self.pending):
            count, first = self.notices.get(notice, (0, place))
            if count or len(self.notices) < MOST_NOTICES:
                self.notices[notice] = (count + 1, first)
        self.pending.clear()

    def lines(self) -> list[str]:
        """Return the report for people: one line of totals, then each kind of problem with its first examples."""
        lines = [*self.unread, f"{self.accepted} of {self.rows} rows read, {self.problems.total()} skipped"]
        if self.left_out:
            lines.append(f"  {self.left_out} good rows left out: more than the samples that were asked for")
        return lines + self.problem_lines() + self.notice_lines()

    def problem_lines(self) -> list[str]:
        """Return each kind of problem with its first examples, the most frequent first; those of whole files last."""
        return self._counted(self.problems, "") + self.file_lines()

    def file_lines(self) -> list[str]:
        """Return each kind of problem of whole files with its first examples."""
        return self._counted(self.files, "file not read to its end: ")

    def notice_lines(self) -> list[str]:
        """Return one line for each kind of notice, the most frequent first."""
        counted = sorted(self.notices.items(), key=lambda item: -item[1][0])
        return [f"  notice: {count} x {notice}; the first: {first}" for notice, (count, first) in counted]

    @property
    def unused(self) -> dict[str, int]:
        """Return what became of the rows that were not accepted, for `balance`."""
        return {"more than were asked for": self.left_out, "skipped": self.problems.total()}

    @property
    def unused_by_kind(self) -> dict[str, int]:
        """Return the same, with the problems by kind."""
        return {"more than were asked for": self.left_out, **self.problems}

    def why_empty(self) -> str:
        """Return one line of reasons why no row was accepted."""
        counts = ", ".join(f"{count} x {kind}" for kind, count in (self.problems + self.files).most_common())
        first = next((examples[0] for examples in self.examples.values()), "name a file")
        return f"{self.rows} rows, all skipped: {counts}; the first: {first}"

    def _count(self, counts: Counter[str], kind: str, example: str) -> None:
        counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_SHOWN:
            examples.append(example)

    def _counted(self, counts: Counter[str], what: str) -> list[str]:
        shown = [(f"  {count} x {what}{kind}", self.examples[kind]) for kind, count in counts.most_common()]
        return [line for first, examples in shown for line in (first, *(f"    {example}" for example in examples))]


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words for an error message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)
