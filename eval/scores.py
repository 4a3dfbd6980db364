"""Scores with their uncertainty, from what lm-evaluation-harness measured of each item."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Z = 1.959964  # of a two-sided 95% interval
RESAMPLES = 1000  # of the bootstrap
MOST_NATS = 700  # whose exponential a float still holds
WHOLE = ("all", "mean of subjects")
# Log-likelihoods over a count, (nats, count) an item: each as a function of nats per unit.
RATIOS = {
    "bits_per_byte": lambda nats: nats / math.log(2),
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity"), lambda n: math.exp(min(n, MOST_NATS))),
}


@dataclass(frozen=True)
class Score:
    """One number. `group`: of which items, "all" for the whole. `low`, `high`: its 95% interval, where there is one.

    `chance`: what guessing gives. `items`: how many it stands on. `share`: whether 0.5 means 50%.
    """

    group: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    items: int = 0
    share: bool = True


@dataclass(frozen=True)
class Measured:
    """A task's scores. cut: questions whose beginning had no room in the context. content: a hash of the items."""

    name: str
    settings: dict[str, Any]
    scores: list[Score]
    items: int
    cut: int
    seconds: float
    content: str = ""  # in older files


@dataclass
class Item:
    """What was measured of one item: the values of its metrics, and what guessing gives where it has choices."""

    group: str
    values: dict[str, Any] = field(default_factory=dict)
    chance: float | None = None


def score_items(items: Sequence[Item], totals: dict[str, float], bootstrap: bool = False) -> list[Score]:
    """Score all items, then each group where there are several; exams also the mean over their groups.

    Args:
        totals: lm-evaluation-harness's own value of each metric, which stands where it is not the mean over the items.
        bootstrap: take intervals of shares by resampling, not Wilson's.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    whole, others = [], []
    for metric in dict.fromkeys(metric for item in items for metric in item.values):
        score = _score("all", metric, items, bootstrap)
        if score and math.isclose(score.value, totals.get(metric, score.value), abs_tol=1e-9):
            whole.append(score)
        elif metric in totals:
            others.append(Score("all", metric, float(totals[metric]), items=len(items)))
    parts = []
    if len(groups) > 1:
        parts = [_mean_of_groups(score.metric, groups.values()) for score in whole if score.chance is not None]
        parts += [_score(name, score.metric, group, bootstrap) for name, group in groups.items() for score in whole]
    return [*whole, *others, *filter(None, parts)]


def _score(group: str, metric: str, items: Sequence[Item], bootstrap: bool) -> Score | None:
    """Return the mean of a metric, or a ratio of sums; None where its values are neither numbers nor (nats, count)."""
    having = [item for item in items if metric in item.values]
    values = [item.values[metric] for item in having]
    if metric in RATIOS and all(isinstance(value, tuple | list) and len(value) == 2 for value in values):
        nats, counts = (np.array(column, dtype=float) for column in zip(*values, strict=True))
        of = RATIOS[metric]
        low, high = (None if edge is None else of(edge) for edge in ratio_interval(-nats, counts))
        value = of(-nats.sum() / max(counts.sum(), 1))
        return Score(group, metric, value, low, high, items=len(values), share=False)
    if not values or not all(isinstance(value, bool | int | float | np.number) for value in values):
        return None
    mean, share = math.fsum(values) / len(values), metric != "characters" and all(0 <= value <= 1 for value in values)
    low, high = wilson(mean, len(values)) if share and not bootstrap else ratio_interval(np.array(values, dtype=float))
    levels = [item.chance for item in having if item.chance is not None]
    chance = sum(levels) / len(levels) if levels and metric.startswith("acc") else None
    return Score(group, metric, mean, low, high, chance, len(values), share)


def _mean_of_groups(metric: str, groups: Iterable[Sequence[Item]]) -> Score:
    """Return the mean over subjects, each of the same weight; a normal interval from the subjects' own variances."""
    scores = [score for group in groups if (score := _score("", metric, group, False)) is not None]
    # As if two right and two wrong answers came before: a subject that is all right is not certain.
    careful = [((score.value * score.items + 2) / (score.items + 4), score.items) for score in scores]
    width = Z * math.sqrt(sum(p * (1 - p) / count for p, count in careful)) / len(scores)
    mean, chance = (sum(values) / len(scores) for values in zip(*((s.value, s.chance) for s in scores), strict=True))
    low, high = max(mean - width, 0.0), min(mean + width, 1.0)
    return Score("mean of subjects", metric, mean, low, high, chance, sum(score.items for score in scores))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` items (Wilson 1927).

    For means of values between 0 and 1 it errs on the safe side: their variance is at most share * (1 - share).
    """
    width = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return max((middle - width) / scale, 0.0), min((middle + width) / scale, 1.0)


def ratio_interval(above: np.ndarray, below: np.ndarray | None = None) -> tuple[float | None, float | None]:
    """Return the 95% interval of a ratio of sums over items, or of a mean, by the bootstrap; none of a single item."""
    if len(above) < 2:
        return None, None
    below = np.ones(len(above)) if below is None else below
    numbers, ratios = np.random.default_rng(0), []
    for _ in range(RESAMPLES):  # one after another: together they would fill the memory for a large corpus
        drawn = numbers.integers(len(above), size=len(above))
        ratios.append(above[drawn].sum() / below[drawn].sum())
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
