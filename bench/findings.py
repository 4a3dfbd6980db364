"""What a bench found: ratios with their spread, printed, and kept as JSON for `bench/summary.py`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Verdict:
    """Ours against a peer in one quantity, each measured several times in turn.

    Attributes:
        quantity: its name and unit; peer: whom against.
        ours, theirs: medians; ratio: of the medians, ours over theirs.
        low, high: the least and the largest ratio that the measurements allow.
    """

    quantity: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float

    @staticmethod
    def of(quantity: str, peer: str, ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
        mine, other = statistics.median(ours), statistics.median(theirs)
        return Verdict(
            quantity, peer, mine, other, mine / other, min(ours) / max(theirs), max(ours) / min(theirs)
        )  # fmt: skip

    @property
    def clear(self) -> bool:
        """Whether the ranges of the measurements do not overlap: only then is a difference shown."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        spread = f"{self.ratio:.2f}x ({self.low:.2f} - {self.high:.2f})"
        return spread if self.clear else f"{spread}, but the ranges overlap: no difference shown"


@dataclass
class Findings:
    """All that one run of a bench found.

    Attributes:
        title: what was measured, in a line.
        measured: of each contender, its measurements.
        verdicts: comparisons; facts: other figures by name, as text with their unit.
    """

    title: str
    measured: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def show(self, columns: dict[str, str]) -> None:
        """Print medians (smallest - largest) of these columns, the verdicts and the facts."""
        print(self.title)
        print(machine())
        width = max(map(len, self.measured), default=0)
        for name, results in self.measured.items():
            cells = []
            for key, form in columns.items():
                values = [result[key] for result in results]
                middle, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
                cells.append(f"{middle} ({low} - {high}) {key}")
            print(f"  {name:<{width}}  " + "  ".join(cells))
        for verdict in self.verdicts:
            print(f"{verdict.quantity} against {verdict.peer}: {verdict}")
        for name, value in self.facts.items():
            print(f"{name}: {value}")

    def save(self, file: str | None) -> None:
        """Write everything as JSON, if a file is named."""
        if not file:
            return
        verdicts: list[dict[str, Any]] = [{**asdict(verdict), "clear": verdict.clear} for verdict in self.verdicts]
        command = "python " + " ".join(_without_json(sys.argv))
        content = {"title": self.title, "command": command, "machine": machine(), "verdicts": verdicts}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(
            json.dumps({**content, "facts": self.facts, "measured": self.measured}, ensure_ascii=False, indent=2),
            "utf8",
        )


def machine() -> str:
    """Processor, threads and torch, in a line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in facts.get("flags", "").split()]
    return " ".join([facts.get("model name", platform.machine()), *units])


def _without_json(arguments: list[str]) -> list[str]:
    """The command line, less where its result goes."""
    shown = [os.path.relpath(arguments[0])]
    skip = False
    for argument in arguments[1:]:
        if not skip and argument != "--json" and not argument.startswith("--json="):
            shown.append(argument)
        skip = argument == "--json"
    return shown
