"""Shares, intervals and estimators are what their definitions say."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from eval.suites.estimates import majority, pass_at_k, wilson


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 20, 0.2993, 0.7007), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.25, 1000, 0.2242, 0.2778)],
)
def test_wilson_intervals_are_those_of_the_textbook(share, count, low, high):
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-5)


def test_nothing_measured_may_be_anything():
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_a_wilson_interval_holds_the_true_share_in_95_of_100_draws():
    drawn = np.random.default_rng(0).binomial(40, 0.25, size=2000)
    inside = [low <= 0.25 <= high for low, high in (wilson(right / 40, 40) for right in drawn)]
    assert 0.93 < np.mean(inside) < 0.98


@pytest.mark.parametrize(("samples", "correct", "k"), [(8, 3, 1), (8, 3, 4), (6, 0, 3), (6, 6, 2), (5, 1, 5)])
def test_pass_at_k_is_the_share_of_all_draws_of_k_with_a_right_one(samples, correct, k):
    draws = list(combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("answers", "value"),
    [
        (["4", "5", "4"], 1.0),
        (["4", "5", "5"], 0.0),
        (["4", "5", "4", "5"], 0.5),  # as likely as not, when ties are broken by lot
        ([None, None, "4"], 1.0),  # no answer has no vote
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_the_majority_votes(answers, value):
    assert majority(answers, "4") == value
