"""Held-out data has a name by which two runs know that they were measured on the same."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from text.chats.problems import Problem
from text.tokenizer import SPECIAL_TOKENS, Tokenizer
from text.tokenizer_training import train_bpe
from training.losses import IGNORE
from training.run.log import read_metrics
from training.validation import held_out_batches, labels_name, problems_name


@pytest.fixture(scope="module")
def texts(world: Path) -> list[str]:
    with open(world / "pretrain.csv", encoding="utf8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][:12]


class Rows:
    """Documents one after the other, each with its end, in rows of labels."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, length: int) -> None:
        ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
        self.labels = torch.tensor([*ids, *[IGNORE] * (-len(ids) % length)]).view(-1, length)
        self.sequence_length = length

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"labels": self.labels[indices]}


def name(texts: list[str], tokenizer: Tokenizer, length: int = 32, tokens: int = 10**6, file: str = "a.csv") -> str:
    return labels_name([f"some/{file}"], held_out_batches(Rows(texts, tokenizer, length), tokens, 64), tokenizer)


def test_the_same_text_has_the_same_name_however_it_is_cut(texts, tokenizer):
    other = train_bpe(texts, len(SPECIAL_TOKENS) + 256 + 20)
    assert other.encode(texts[0]) != tokenizer.encode(texts[0])
    assert name(texts, tokenizer).startswith("a.csv ")
    assert name(texts, tokenizer) == name(texts, other) == name(texts, tokenizer, length=48)
    assert name(texts, tokenizer) == name(texts[::-1], tokenizer)


def test_another_text_has_another_name(texts, tokenizer):
    names = [name(texts, tokenizer), name(texts[1:], tokenizer), name(texts, tokenizer, tokens=64)]
    names += [name([*texts[:-1], texts[-1] + "。"], tokenizer), name(texts, tokenizer, file="b.csv")]
    assert len(set(names)) == len(names)


def test_problems_are_named_by_questions_and_answers():
    problem, other = Problem("1+1", "2", "sum"), Problem("1+1", "3", "sum")
    assert problems_name(["p.jsonl"], [problem]) != problems_name(["p.jsonl"], [other])
    assert problems_name(["p.jsonl"], [problem]) == problems_name(["p.jsonl"], [Problem("1+1", "2", "other kind")])
    assert problems_name(list("abcde"), []).startswith("a, b, c, and 2 more ")


def test_a_run_names_what_it_held_out(pretrained, world):
    named = [e["held_out"] for e in read_metrics(pretrained / "metrics.jsonl") if "val_bits_per_byte" in e]
    assert len(named) == 2 and named[0] == named[1] and named[0]["text"].startswith("pretrain.csv ")
