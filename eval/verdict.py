"""Is my loss normal? Where a run leaves a reference curve's band, and what its settings and its log say to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from errors import one_line, require
from eval.compared_run import ComparedRun
from eval.curves import MEASURES, SIGMAS, Curve, logged, median
from eval.run_recipe import differences, settings_of

# What a sign that is far above the reference's points to.
HINTS = {
    "grad_norm": "the gradient's norm is {0:.2g} in the median, the reference's {1:.2g}: learning rate, or data",
    "max_vio_worst": "MaxVio is {0:.2g} in the median, the reference's {1:.2g}: experts out of balance (bias_speed, "
    "balance_weight)",
}  # fmt: skip
FAR = 1.5  # times the reference's
# Student's t of a two-sided 95% interval by the number of seeds, whose own spread is not well known.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass
class Verdict:
    """Of one measure: from where on the run is outside, on which side, and its last value beside the band.

    Attributes: deviations: (tokens, off the mean, allowed) of each stretch. last: value, and between what a further
        seed's would be.
    """

    measure: str
    left: float | None = None
    above: bool = False
    last: tuple[float, float, float] | None = None
    deviations: list[tuple[float, float, float]] = field(default_factory=list)


def compare_with(curve: Curve, run: ComparedRun) -> list[Verdict]:
    """Return a verdict for each measure that both have, over the tokens that both have.

    The run is outside where its mean over a stretch of the curve is not where a further seed's would be, which is the
    95% interval for one more of so few, blurred by what it has logged: t^2 sigma^2 (1 + 1/seeds) + 4 step^2 / steps.
    It has left the band where that is so twice in a row, on one side; in validations also where it is so at the end.
    """
    verdicts = []
    seeds = len(curve.facts["seeds"])
    wide = STUDENT.get(seeds, SIGMAS) * math.sqrt(1 + 1 / seeds)
    for measure, points in curve.points.items():
        own = logged(run, measure)
        tokens = np.array([point.tokens for point in points])
        # Half-way between two points of the curve a stretch ends and the next begins.
        middles = (tokens[1:] + tokens[:-1]) / 2
        own = own[(own[:, 0] >= tokens[0]) & (own[:, 0] <= curve.facts["tokens"])] if len(own) else own
        if not len(own):
            continue
        expected = np.interp(own[:, 0], tokens, [point.mean for point in points])
        verdict, places = Verdict(measure), np.searchsorted(middles, own[:, 0])
        for place in np.unique(places):
            point, here = points[place], places == place
            off = float((own[here, 1] - expected[here]).mean())
            allowed = math.hypot(wide * point.sigma, SIGMAS * point.step / math.sqrt(here.sum()))
            verdict.deviations.append((float(own[here, 0].max()), off, allowed))
        _judge(verdict)
        off, allowed = verdict.deviations[-1][1:]
        verdict.last = (expected[-1] + off, expected[-1] - allowed, expected[-1] + allowed)
        verdicts.append(verdict)
    return verdicts


def _judge(verdict: Verdict) -> None:
    outside = [math.copysign(1, off) if abs(off) > allowed else 0 for _, off, allowed in verdict.deviations]
    for place, side in enumerate(outside):
        again = outside[place + 1] == side if place + 1 < len(outside) else verdict.measure != "loss"
        if side and again:
            verdict.left, verdict.above = verdict.deviations[place][0], side > 0
            return


def report(curve: Curve, run: ComparedRun, verdicts: Sequence[Verdict]) -> list[str]:
    """Return what is to be said of a run: in the band or not, what is different about it, and what its log hints at."""
    facts, own = curve.facts, settings_of(run)
    lines = [f"{run.name} beside {curve.name}: {len(facts['seeds'])} seeds, {facts['tokens']:,} tokens"]
    if facts["held_out"] != own["held_out"]:
        verdicts = [verdict for verdict in verdicts if verdict.measure == "loss"]
        lines.append("held-out text: another one, so that bits per byte are not compared")
    require(bool(verdicts), f"{run.folder}: nothing logged yet that {curve.name} has")
    for verdict in verdicts:
        last, low, high = verdict.last
        place = f"{verdict.deviations[-1][0]:,.0f} tokens {last:.4g}, a further seed's {low:.4g} to {high:.4g}"
        where = "within the band"
        if verdict.left is not None:
            side, now = ("above" if out else "below" for out in (verdict.above, last > high))
            later = "inside again" if low <= last <= high else f"now {now}" if now != side else "still there"
            where = f"left the band at {verdict.left:,.0f} tokens, {side} ({later})"
        lines.append(f"{verdict.measure} ({MEASURES[verdict.measure]}): {where}; at {place}")
    changes = differences(own, facts)
    left = any(verdict.left is not None for verdict in verdicts)
    signs = [
        text.format(median(run, key), facts["signs"][key])
        for key, text in HINTS.items()
        if left and facts["signs"].get(key, 0) > 0 and median(run, key) > FAR * facts["signs"][key]
    ]
    skipped = run.last("skipped") or 0
    signs += [f"{skipped:,.0f} steps were skipped: their loss or gradient was not finite"] if skipped else []
    lines += [f"different: {change}" for change in changes] + [f"hint: {sign}" for sign in signs]
    if left and not changes and not signs:
        lines.append(
            "nothing in its settings or log explains it: about one further seed in twenty leaves a band; else look at "
            "the data (their order, duplicates, another file of the same name) and at changes of the code"
        )
    return [one_line(line) for line in lines]  # they quote settings of the run
