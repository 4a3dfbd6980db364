"""Perplexity counts every token once, with half a window of context or more."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval.perplexity
from eval.answering import Answerer
from eval.likelihood import CacheScorer
from eval.perplexity import perplexity, read_blocks, score_text


def nats_of(answerer: Answerer, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, in one pass."""
    line = torch.tensor([ids])
    with torch.no_grad():
        logits = answerer.model(line[:, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, line[0, 1:], reduction="none")


def test_a_short_text_has_the_loss_of_one_pass(answerer, world):
    text = (world / "heldout.txt").read_text(encoding="utf8")[:300]
    ids = answerer.tokenizer.encode(text)
    nats = nats_of(answerer, [answerer.tokenizer.eos_id, *ids]).sum().item()
    score = score_text(answerer, iter([text]))
    assert score.nll == pytest.approx(nats, rel=1e-5)
    assert (score.tokens, score.bytes) == (len(ids), len(text.encode()))
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)


@pytest.mark.parametrize("window", [64, 200])
def test_a_long_text_has_the_loss_of_its_windows(window, answerer, world):
    """Each token scored by hand in the last window that scores it: half a window of context or more."""
    text = (world / "heldout.txt").read_text(encoding="utf8")[:700]
    line = [answerer.tokenizer.eos_id, *answerer.tokenizer.encode(text)]
    assert len(line) > 2 * window
    nats, start, done = 0.0, 0, 1
    while done < len(line):
        piece = line[start : start + window + 1]
        nats += nats_of(answerer, piece)[done - start - 1 :].sum().item()
        done = start + len(piece)
        start = done - 1 - window // 2
    score = score_text(answerer, iter([text[:333], text[333:]]), window, batch=3)
    assert score.tokens == len(line) - 1 and score.nll == pytest.approx(nats, rel=1e-4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(2, 20), st.integers(1, 5))
def test_every_token_is_scored_once_with_half_a_window_before_it(sizes, window, batch):
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    blocks = ["".join(chr(1000 + n) for n in range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    tokenizer = SimpleNamespace(eos_id=2, encode=lambda text: [ord(letter) for letter in text])
    reader = SimpleNamespace(
        tokenizer=tokenizer, model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=1024))
    )
    scored: list[int] = []

    def score(_: object, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        assert len(rows) <= batch
        for context, ids in rows:
            assert len(context) + len(ids) <= window + 1
            for place, token in enumerate(ids, start=len(context)):
                known = token - 1000 + 1  # the end of the document before, and all letters before this one
                assert place >= min(known, window // 2)
            scored.extend(ids)
        return [0.0] * len(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheScorer, "score_windows", score)
        result = score_text(reader, iter(blocks), window, batch)
    assert scored == [ord(letter) for letter in "".join(blocks)]
    assert (result.tokens, result.bytes) == (len(scored), len("".join(blocks).encode()))


def test_a_file_is_read_in_blocks_that_lose_nothing(tmp_path, monkeypatch):
    text = "一行\r\n\n second line\u2028 with a separator\n" * 20 + "最后一行🙂"
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in (1, 7, 10_000):
        monkeypatch.setattr(eval.perplexity, "BLOCK", size)
        blocks = list(read_blocks(tmp_path / "text.txt"))
        assert "".join(blocks) == text and all(block.endswith("\n") for block in blocks[:-1])


def test_perplexity_prints_one_json_object(pretrained, tmp_path, world, script):
    text = (world / "heldout.txt").read_text(encoding="utf8")[:3000]
    (tmp_path / "text.txt").write_text(text, encoding="utf8")
    options = ["--ckpt", pretrained / "final", "--file", tmp_path / "text.txt"]
    done = script(perplexity, *options, "--json")
    score = json.loads(done.out)
    assert done.code == 0 and set(score) == {"nll", "tokens", "bytes", "bits_per_byte", "perplexity"}
    assert score["bytes"] == len(text.encode())
    assert score["bits_per_byte"] == pytest.approx(score["nll"] / math.log(2) / score["bytes"])
    assert f"{score['bits_per_byte']:.4f} bits per byte" in script(perplexity, *options).out


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty; give a file with text"),
        (b"\xef\xbb\xbf", "empty; give a file with text"),
        ("月牙镇".encode("gbk"), "not UTF-8 .*iconv -f GB18030 -t UTF-8"),
        ("月牙镇".encode()[:-1], "not UTF-8 .*; it ends within a character"),
        (None, "no such file; give a text file"),
    ],
    ids=["empty", "only a mark", "GBK", "cut short", "missing"],
)
def test_a_text_that_cannot_be_scored_is_one_line(content, what, pretrained, tmp_path, script):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    done = script(perplexity, "--ckpt", pretrained / "final", "--file", path)
    assert done.code == 2 and done.out == ""
    assert re.fullmatch(rf"error: {path}: {what}.*\n", done.err)
