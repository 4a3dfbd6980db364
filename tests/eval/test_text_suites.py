"""Bits per byte are those of the texts by hand."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from likelihoods import nats_by_hand, values

from errors import UserError
from eval.opened_model import OpenedModel
from eval.perplexity import score_text
from eval.suites.text_likelihood import TextLikelihood, _interval, rolling


@pytest.fixture(params=["own", "peer"])
def model(request) -> OpenedModel:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 4), (9, 8, 4), (50, 8, 4), (50, 8, 8), (50, 8, 1), (51, 64, 32)]
)
def test_windows_score_every_token_once_with_the_context_that_the_stride_leaves(length, window, stride):
    scored = []
    for first, start, end in rolling(length, window, stride):
        assert end - first <= window + 1 and start > first
        # Its own first window aside, each token has window - stride tokens before it, or all there are.
        assert start == 1 or start - first > window - stride
        scored += range(start, end)
    assert scored == list(range(1, length))


def test_bits_per_byte_are_those_of_the_texts_by_hand(model, tmp_path):
    texts = ["月牙镇的早晨很安静。", "a b c", "这是一篇长一些的文章，窗口装不下它。" * 4]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf8")
    suite = TextLikelihood(data=str(path), column="body", window=32, stride=16)
    items = suite.items(0)
    rows, nats, tokens = suite.measure(model, items, 0), 0.0, 0
    for text in texts:
        line = [model.eos, *model.encode_bare(text)]
        for first, scored, end in rolling(len(line), 32, 16):
            nats -= nats_by_hand(model, line[first:end], scored - first)
        tokens += len(line) - 1
    found = values(suite.scores(items, rows))
    assert found["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-4
    )
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)


def test_a_text_file_is_one_document_as_for_perplexity(own, world):
    suite = TextLikelihood(data=str(world / "heldout.txt"), window=10**6, stride=10**6)
    (item,) = suite.items(0)
    text = item.text[:600]  # one window of either
    rows = suite.measure(own, [item._replace(text=text)], 0)
    assert rows[0]["nats"] == pytest.approx(score_text(own.answerer, iter([text])).nll, rel=1e-4)
    (bits, _) = suite.scores([item], rows)
    assert bits.low is None  # one document says nothing of others


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"txt": "y"}\n',
            r":2: no text in column 'text', the columns are 'txt'; set column",
        ),
        ("a.csv", "txt\nx\n", r":2: no text in column 'text', the columns are 'txt'"),
        ("a.jsonl", '{"text": 3}\n', r":1: no text in column 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"te\n', r":2: broken JSON"),
        ("a.jsonl", '{"text": ""}\n', r": no text in it"),
        ("a.txt", "", r": no text in it"),
        ("a.txt", None, r": "),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_line(name, content, what, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{what}") as error:
        TextLikelihood(data=str(path)).items(0)
    assert "\n" not in str(error.value)


def test_the_interval_of_a_ratio_is_near_the_delta_methods():
    numbers = np.random.default_rng(1)
    size = numbers.integers(50, 500, 400).astype(float)
    nats = size * numbers.normal(2, 0.5, 400)
    ratio = nats.sum() / size.sum()
    error = np.sqrt(((nats - ratio * size) ** 2).sum()) / size.sum()
    assert _interval(nats, size) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.35 * error)
