"""Every schedule is a function of the share of the budget that is spent."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from errors import UserError
from training.chats import ChatSettings
from training.optim.build import OptimSettings
from training.schedule import Budget, learning_rate, value_at
from training.settings import StageSettings

RATE = dict(peak=2.0, warmup=0.1, decay_from=0.6, final_ratio=0.25)


@pytest.mark.parametrize(("share", "rate"), [(0.0, 0.0), (0.05, 1.0), (0.1, 2.0), (0.3, 2.0), (0.6, 2.0), (1.0, 0.5)])
def test_the_rate_warms_up_stays_and_falls_to_its_end(share, rate):
    assert learning_rate(share, **RATE) == pytest.approx(rate)


def test_the_fall_is_a_cosine():
    for part in (0.25, 0.5, 0.75):
        want = 0.5 + (2.0 - 0.5) * (1 + math.cos(math.pi * part)) / 2
        assert learning_rate(0.6 + 0.4 * part, **RATE) == pytest.approx(want)


def test_the_rate_jumps_nowhere_and_never_rises_after_the_warm_up():
    rates = [learning_rate(step / 1000, **RATE) for step in range(1001)]
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.021
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_constant_tails_follow_the_cosine_which_ends_where_they_begin():
    """DeepSeek-V3 section 4.2: 2.2e-4, along a cosine to 2.2e-5 over 4.3 T of 14.8 T tokens, then that, then 7.3e-6."""
    paper = dict(
        peak=2.2e-4, warmup=0.0, decay_from=10 / 14.8, final_ratio=0.1, tails={"0.9662": 0.1, "0.9887": 0.0332}
    )
    for trillions, rate in (
        (10, 2.2e-4),
        (12.15, 1.21e-4),
        (14.29, 2.2e-5),
        (14.4, 2.2e-5),
        (14.63, 2.2e-5),
        (14.7, 7.3e-6),
    ):
        assert learning_rate(trillions / 14.8, **paper) == pytest.approx(rate, rel=2e-3), trillions
    assert learning_rate(1.0, **paper) == pytest.approx(7.3e-6, rel=2e-3)


@pytest.mark.parametrize("tails", [{"0.3": 0.1}, {"1.0": 0.1}, {"0.9": -1.0}, {"late": 0.1}])
def test_tails_that_no_run_could_follow_are_refused(tails):
    with pytest.raises(UserError, match=r"--optim.tails .*: give shares between decay_from and 1"):
        OptimSettings(tails=tails)


def test_without_warm_up_or_fall_the_rate_is_the_peak():
    assert {learning_rate(share, 3.0, 0.0, 1.0, 0.1) for share in (0.0, 0.5, 1.0)} == {3.0}


@pytest.mark.parametrize(
    ("budget", "step", "seconds", "share"),
    [
        (Budget(200, None), 50, 1e9, 0.25),
        (Budget(None, 2.0), 10**9, 30.0, 0.25),
        (Budget(200, 2.0), 50, 60.0, 0.5),
        (Budget(200, 2.0), 150, 60.0, 0.75),
        (Budget(200, 2.0), 0, 0.0, 0.0),
        (Budget(200, 2.0), 201, 0.0, 1.0),
        (Budget(None, 2.0), 5, 500.0, 1.0),
    ],
)
def test_the_share_is_that_of_the_limit_that_comes_first(budget, step, seconds, share):
    assert budget.progress(step, seconds) == pytest.approx(share)


def test_tokens_are_a_share_too():
    assert Budget(None, None, 400).progress(3, 9.0, 100) == 0.25
    assert Budget(4, None, 400).progress(3, 9.0, 100) == 0.75


@pytest.mark.parametrize(
    ("limits", "steps", "ended"),
    [
        ({"epochs": 2.0, "max_minutes": 1.0}, 20, "--epochs 2"),
        ({"epochs": 2.0, "max_steps": 7, "max_tokens": 80}, 7, "--max_steps 7"),
        ({"epochs": 2.0, "max_steps": 30, "max_tokens": 80}, 8, "--max_tokens 80"),
        ({"epochs": 0.5, "max_steps": 30, "max_tokens": 80}, 5, "--epochs 0.5"),
        ({}, 10, "--epochs 1"),
        ({"max_steps": 30}, 30, "--max_steps 30"),
    ],
)
def test_all_limits_hold_and_the_first_is_named(limits, steps, ended):
    """Of 20 samples, 2 a step of 5 tokens each; epochs have a default only where nothing else ends the run."""
    settings = StageSettings(out="o", sequence_length=5, batch_tokens=10, **limits)
    budget = settings.budget(20)
    assert budget.progress(steps, 0.0) == 1 > budget.progress(steps - 1, 0.0)
    assert budget.first(steps, 0.0) == ended
    if "max_minutes" in limits:
        assert budget.progress(steps - 1, 60.0) == 1 and budget.first(steps - 1, 60.0) == "--max_minutes 1"


def test_conversations_are_passed_over_twice_where_nothing_else_ends_the_run():
    chats = ChatSettings(ckpt="c", data="d", out="o", sequence_length=5, batch_tokens=10)
    assert (chats.budget(20).max_steps, chats.budget(20).steps_by) == (20, "--epochs 2")


@pytest.mark.parametrize(("share", "value"), [(0.0, 0.3), (0.67, 0.3), (0.68, 0.1), (0.99, 0.1), (1.0, 0.0)])
def test_a_value_changes_at_its_shares(share, value):
    schedule = {"0.68": 0.1, "0": 0.3, "1": 0.0}  # YAML and the command line bring strings, in any order
    assert value_at(schedule, share) == value


def test_a_number_is_its_own_schedule():
    assert value_at(0.3, 0.9) == value_at(0.3, 0.0) == 0.3


@pytest.mark.parametrize(
    ("schedule", "what"), [({0.1: 0.3}, "begin at share 0"), ({}, "begin at share 0"), ({"late": 1.0}, "shares of the")]
)
def test_an_impossible_schedule_is_named(schedule, what):
    with pytest.raises(UserError, match=f"bias_speed.*{what}"):
        value_at(schedule, 0.5, "bias_speed")
