"""A benchmark calls a difference one only where the measurements of both sides lie apart."""

from __future__ import annotations

import pytest
from harness import Verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "clear"),
    [
        ([3.0, 4.0, 5.0], [1.0, 2.0, 2.5], True),
        ([1.0, 2.0, 2.5], [3.0, 4.0, 5.0], True),
        ([3.0, 4.0, 5.0], [1.0, 2.0, 3.1], False),
        ([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], False),
    ],
)
def test_overlapping_ranges_show_no_difference(ours, theirs, clear):
    verdict = Verdict.of("tokens/s", "baseline", ours, theirs)
    assert verdict.clear is clear and ("no difference shown" in str(verdict)) is not clear


def test_a_ratio_is_that_of_the_medians_with_the_least_and_the_largest_there_may_be():
    verdict = Verdict.of("tokens/s", "baseline", [3.0, 4.0, 9.0], [1.0, 2.0, 2.5])
    assert (verdict.ratio, verdict.low, verdict.high) == (2.0, 1.2, 9.0)
    assert str(verdict) == "2.00x (1.20 - 9.00)"
