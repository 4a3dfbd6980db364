"""The page: a section for each claim, with what the paper says, what is found here, and the command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from errors import naming
from eval.paper.claims import Claim
from eval.paper.measures import Result
from eval.score_files import table
from text.files import replacing


def overview(measured: Sequence[tuple[Claim, Result]]) -> list[str]:
    """Return the table of verdicts."""
    rows = [[f"[{claim.title}](#{claim.name})", result.verdict] for claim, result in measured]
    return table(rows, ["claim", "here"])


def section(claim: Claim, result: Result, command: str) -> list[str]:
    """Return the lines of a claim."""
    lines = [f'<a id="{claim.name}"></a>', f"## {claim.title}", ""]
    lines += [f"Paper: {claim.paper}.", "", *table(result.rows, result.header), ""]
    lines += [f"**{result.verdict[0].upper()}{result.verdict[1:]}.** {result.note}".rstrip(), ""]
    lines += [line for name in result.figures for line in (f"![{claim.title}](figures/{name})", "")]
    return [*lines, f"`{command} {claim.name}`", ""]


def write(out: Path, head: str, measured: Sequence[tuple[Claim, Result]], command: str) -> Path:
    """Write paper.md beside the figures.

    head: what was trained, on what, how long. command: measures a claim again, whose name follows.
    """
    lines = ["# The paper, measured", "", head, "", *overview(measured), ""]
    for claim, result in measured:
        lines += section(claim, result, command)
    path = out / "paper.md"
    with naming(path), replacing(path) as file:
        file.write("\n".join(lines).encode())
    return path
