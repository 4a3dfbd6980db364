"""The best validation of a run, and how many have passed without a better one."""

from __future__ import annotations

import math
from typing import Any

from training.run.checkpoint import Progress

# A stage is judged by the first of these that its validation has; 1 where more is better, -1 where less is.
MEASURES = {"val_accuracy": 1, "val_bits_per_byte": -1, "val_loss": -1}


def judge(progress: Progress, held_out: dict[str, Any]) -> bool:
    """Note a validation in `progress.best` and `progress.stale`. Returns whether it is better than all before.

    held_out: what was measured after `progress.step` steps. A number that is not finite is never better.
    """
    name = next((name for name in MEASURES if name in held_out), None)
    value = math.nan if name is None else float(held_out[name])
    before = progress.best.get("value") if progress.best.get("measure") == name else None
    better = math.isfinite(value) and (before is None or MEASURES[name] * (value - before) > 0)
    if better:
        progress.best = {"measure": name, "value": value, "step": progress.step}
    progress.stale = 0 if better else progress.stale + 1
    return better
