"""How many rows a step has: as many as a recipe says, fewer where the data would be used up in a few steps."""

from __future__ import annotations

import math
from pathlib import Path

from training.parallel.ranks import Ranks
from training.run.resume import saved_run
from training.settings import StageSettings

ENOUGH = 100  # steps that a run should have: schedules and Adam's moments need tens of them
FEW = 20


def fit_batch(settings: StageSettings, ranks: Ranks, samples: int) -> None:
    """Set `batch_tokens` to whole rows that the ranks share evenly and that leave the run enough steps, if it can.

    A value of the command line holds. A resumed run has the rows that it began with, whatever its budget is now.

    Args:
        samples: of an epoch.
    """
    if settings.holds("batch_tokens") or settings.uneven:
        return
    saved = ranks.on_main(lambda: saved_run(Path(settings.out), settings.resume)).get("rows")
    if type(saved) is int and saved > 0:
        settings.batch_tokens = saved * settings.row_tokens
        return
    ceiling = settings.rows
    rows = fitting_rows(settings, ranks.world, samples)
    if rows != ceiling:
        settings.batch_tokens = rows * settings.row_tokens
        budget = settings.budget(samples)
        ranks.say(
            f"notice: {rows} row{'s' * (rows > 1)} a step instead of {ceiling}, for a run of {budget.max_steps} steps "
            f"({budget.steps_by}, {samples} rows an epoch); "
            f"--batch_tokens {ceiling * settings.row_tokens} keeps {ceiling}"
        )


def fitting_rows(settings: StageSettings, world: int, samples: int) -> int:
    """The most rows, at most those of the settings and a multiple of `world`, that leave a run `ENOUGH` steps.

    Where no number does, the most of those that leave it as many as it can have; all, where only a clock ends it.
    """

    def steps(rows: int) -> float:
        most = settings.budget(samples, rows).max_steps
        return math.inf if most is None else most

    enough = min(ENOUGH, steps(world))
    choices = range(settings.rows - settings.rows % world, 0, -world)
    return next((rows for rows in choices if steps(rows) >= enough), settings.rows)


def warn_of_few_steps(settings: StageSettings, ranks: Ranks, samples: int) -> None:
    """Say in one line that a run is too short to learn from, and what makes it longer."""
    budget = settings.budget(samples)
    if budget.max_steps is None or budget.max_steps >= FEW:
        return
    option = budget.steps_by.split()[0]
    remedy = f"raise {option}"
    if option == "--epochs":
        remedy = f"give --epochs {math.ceil(ENOUGH * settings.rows / samples)} for {ENOUGH} steps"
        if settings.rows > ranks.world and not settings.uneven:
            remedy += ", or a smaller --batch_tokens"
    ranks.say(f"notice: this run ends after {budget.max_steps} steps ({budget.steps_by}), too few to learn; {remedy}")
