"""Shares, intervals, estimators and pages are what their definitions say."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from errors import UserError
from eval.score_files import markdown, out_folder, read_scores, write_scores
from eval.scores import Item, Measured, Score, ratio_interval, score_items, wilson
from eval.tasks.problems import majority, pass_at_k


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 20, 0.2993, 0.7007), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.25, 1000, 0.2242, 0.2778)],
)
def test_wilson_intervals_are_those_of_the_textbook(share, count, low, high):
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_ratio_is_near_the_delta_methods():
    numbers = np.random.default_rng(1)
    size = numbers.integers(50, 500, 400).astype(float)
    nats = size * numbers.normal(2, 0.5, 400)
    ratio = nats.sum() / size.sum()
    error = np.sqrt(((nats - ratio * size) ** 2).sum()) / size.sum()
    assert ratio_interval(nats, size) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.35 * error)


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


def values(scores: list[Score], group: str = "all") -> dict[str, float]:
    return {score.metric: score.value for score in scores if score.group == group}


def test_exams_are_scored_as_a_whole_by_subject_and_as_the_mean_of_subjects():
    answers = [("a", 1, 0), ("a", 0, 1), ("b", 1, 1), ("a", 0, 0)]
    items = [Item(subject, {"acc": float(x), "acc_norm": float(y)}, 0.25) for subject, x, y in answers]
    scores = score_items(items, {"acc": 0.5, "acc_norm": 0.5})
    assert values(scores) == {"acc": 0.5, "acc_norm": 0.5}
    assert values(scores, "a") == pytest.approx({"acc": 1 / 3, "acc_norm": 1 / 3}) and values(scores, "b")["acc"] == 1
    assert values(scores, "mean of subjects") == pytest.approx({"acc": 2 / 3, "acc_norm": 2 / 3})
    assert {score.chance for score in scores} == {0.25} and (scores[0].low, scores[0].high) == wilson(0.5, 4)
    assert [score.group for score in scores] == [
        "all", "all", "mean of subjects", "mean of subjects", "a", "a", "b", "b",
    ]  # fmt: skip
    assert {score.group for score in score_items([Item("a", {"acc": 1.0}, 0.5)], {})} == {"all"}


def test_the_interval_of_the_mean_over_subjects():
    """Each subject's share with two right and two wrong answers more: 8 of 10 and 5 of 10."""
    items = [Item("sure", {"acc": 1.0}, 0.25)] * 6 + [Item("torn", {"acc": float(n % 2)}, 0.25) for n in range(6)]
    width = 1.959964 * math.sqrt((0.8 * 0.2 + 0.5 * 0.5) / 6) / 2
    (found,) = [score for score in score_items(items, {}) if score.group == "mean of subjects"]
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75 - width, min(0.75 + width, 1)), abs=1e-4)
    assert found.items == 12


def test_texts_are_ratios_of_sums_over_documents():
    items = [Item(name, {"bits_per_byte": (-nats, size), "perplexity": (-nats, 2)}) for name, nats, size in
             (("a", 3.0, 4), ("a", 5.0, 6), ("b", 1000.0, 1))]  # fmt: skip
    scores = score_items(items, {"bits_per_byte": 1008 / math.log(2) / 11})
    assert values(scores)["bits_per_byte"] == pytest.approx(1008 / math.log(2) / 11)
    assert values(scores, "a") == pytest.approx({"bits_per_byte": 8 / math.log(2) / 10, "perplexity": math.exp(2)})
    assert math.isfinite(values(scores, "b")["perplexity"])
    alone = [score for score in scores if score.group == "b"]
    assert all(score.low is None and not score.share for score in alone)  # one document says nothing of others
    assert scores[0].low < scores[0].value <= scores[0].high


def test_what_is_not_a_mean_over_items_is_lm_evals_own_number():
    """The F1 of a whole has pairs for items, and a perplexity is not a mean of log-likelihoods."""
    items = [Item("t", {"f1": (0, 1), "perplexity": -2.0, "acc": 1.0, "odd": "x"}) for _ in range(3)]
    scores = score_items(items, {"f1": 0.4, "perplexity": 7.4, "acc": 1.0})
    assert values(scores) == {"f1": 0.4, "perplexity": 7.4, "acc": 1.0}
    assert [score.low is None for score in scores] == [False, True, True]


def test_means_that_are_no_shares_have_intervals_by_resampling():
    items = [Item("all", {"characters": float(n), "empty": float(n == 0)}) for n in range(20)]
    characters, empty = score_items(items, {}, bootstrap=True)
    assert (characters.value, characters.share) == (9.5, False) and characters.low < 9.5 < characters.high
    assert empty.share and (empty.low, empty.high) != wilson(0.05, 20)
    assert score_items(items, {})[1].low == wilson(0.05, 20)[0]


def test_a_page_has_interval_and_chance_beside_each_value_and_says_what_was_cut():
    scores = [Score("all", "acc", 0.5, 0.25, 0.75, 0.25, 2), Score("a|b", "acc", 1.0, items=1)]
    page = markdown("m", [Measured("made", {}, scores, 2, 1, 1.0)])
    assert "| made | all | acc | 50.0% | 25.0% to 75.0% | 25.0% | 2 |" in page
    assert "| made | a\\|b | acc | 100.0% |  |  | 1 |" in page and "made: 1 of 2 questions had no room" in page


def test_results_stand_in_the_run_of_the_checkpoint_and_damaged_ones_are_named(pretrained, tmp_path):
    assert out_folder(str(pretrained / "final")) == pretrained / "eval" / "final"
    (tmp_path / "theirs").mkdir()
    assert out_folder(str(tmp_path / "theirs")) == Path("out/eval/theirs")
    assert out_folder("some/model.q8.gguf") == Path("out/eval/model.q8")
    write_scores(tmp_path, "m", {}, [Measured("a", {}, [Score("all", "acc", 0.5, items=2)], 2, 0, 1.0)])
    for content in ('{"suites": {"a": {}}}', (tmp_path / "scores.json").read_text().replace("0.5", "1" * 400)):
        (tmp_path / "scores.json").write_text(content)
        with pytest.raises(UserError, match=r"scores\.json: not scores as eval/run\.py writes them"):
            read_scores(tmp_path)
