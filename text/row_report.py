"""What became of the rows of a data set: how many were read, and which could not be used, by kind and place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES_SHOWN = 3


class RowError(Exception):
    """A row that cannot be used: the kind, for counting, and what is wrong with this one."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


@dataclass
class RowReport:
    """What was read. `rows` = `kept` + `left_out` (more than the samples wanted) + all `problems`.

    `examples` holds the first few places of each kind of problem; `notices` say what of the data was not read.
    """

    rows: int = 0
    kept: int = 0
    bytes_read: int = 0
    left_out: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add_problem(self, place: str, error: RowError) -> None:
        self.problems[error.kind] += 1
        examples = self.examples.setdefault(error.kind, [])
        if len(examples) < EXAMPLES_SHOWN:
            examples.append(f"{place}: {error}")

    def lines(self) -> list[str]:
        """The report for people: one line of totals, then each kind of problem with its first examples."""
        lines = [*self.notices, f"{self.kept} of {self.rows} rows read, {self.problems.total()} skipped"]
        if self.left_out:
            lines.append(f"  {self.left_out} good rows left out: more than the samples that were asked for")
        for kind, count in self.problems.most_common():
            lines.append(f"  {count} x {kind}")
            lines += [f"    {example}" for example in self.examples[kind]]
        return lines

    def why_empty(self) -> str:
        """One line of reasons why no row was kept."""
        counts = ", ".join(f"{count} x {kind}" for kind, count in self.problems.most_common())
        first = next((examples[0] for examples in self.examples.values()), "name a file")
        return f"{self.rows} rows, all skipped: {counts}; the first: {first}"


def kind_of(value: object) -> str:
    """What a JSON value is, in words for an error message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)
