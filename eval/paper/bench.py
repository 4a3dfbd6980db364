"""Trained arms to measure: what their logs say, and their models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from eval.answering import Answerer
from eval.compared_run import ComparedRun
from eval.curves import logged
from eval.paper import probes
from eval.paper.arms import BASE
from eval.paper.differences import Difference, centre
from eval.paper.training import Laboratory
from LMConfig import LMConfig

BITS = "val_bits_per_byte"
LAST = 0.1  # share of a run that the end of a measure is the mean of


class Bench:
    """Trained arms to measure. texts: held-out documents; others: folders of further commands, by what they are."""

    def __init__(self, lab: Laboratory, texts: Sequence[str], others: dict[str, Path]) -> None:
        self.lab, self.texts, self.others, self.page = lab, list(texts), others, lab.out

    def runs(self, arm: str) -> list[ComparedRun]:
        return [self.lab.run(arm, seed) for seed in self.lab.seeds]

    def finals(self, arm: str, key: str = BITS) -> list[float]:
        """Return a measure at the end of each seed."""
        return [run.last(key) for run in self.runs(arm)]

    def ends(self, arm: str, key: str) -> list[float]:
        """Return the mean of a measure over the end of each seed's run."""
        return [float(each[-max(round(LAST * len(each)), 1) :, 1].mean()) for each in self.logs(arm, key)]

    def logs(self, arm: str, key: str) -> list[np.ndarray]:
        return [logged(run, key) for run in self.runs(arm)]

    def against(self, arm: str, other: str = BASE, key: str = BITS) -> Difference:
        """Compare an arm with another."""
        return Difference.of(self.finals(other, key), self.finals(arm, key))

    def answerers(self, arm: str) -> list[Answerer]:
        device = "cpu" if self.lab.device == "auto" and not torch.cuda.is_available() else self.lab.device
        return [Answerer.open(str(self.lab.final(arm, seed)), device) for seed in self.lab.seeds]

    def config(self, arm: str) -> LMConfig:
        return LMConfig.from_pretrained(self.lab.final(arm, self.lab.seeds[0]))

    @cached_property
    def domains(self) -> dict[str, list[str]]:
        return probes.domains(self.texts)

    def figure(self, name: str) -> Path:
        """Return where a figure goes, in a folder that is there."""
        folder = self.page / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.png"

    def bits(self, *arms: str, other: str = BASE) -> list[list[str]]:
        """Return rows of held-out bits per byte: arm, value, difference from the first."""
        rows = [[other, centre(self.finals(other)), ""]]
        return rows + [[arm, centre(self.finals(arm)), self.against(arm, other).text()] for arm in arms]
