"""The race against another program: what is held out, what counts as time, and that every token is scored once."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RACE = SimpleNamespace(**runpy.run_path(str(ROOT / "bench" / "race.py")))
WATCHED = SimpleNamespace(**runpy.run_path(str(ROOT / "bench" / "watched.py")))

# A program as others write it: its own loop, no minutes, no end; each pass takes 20 ms.
PROGRAM = """
import time, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(600, 8), nn.Linear(8, 600)
    def forward(self, ids):
        time.sleep(0.02)
        return type("Output", (), {"logits": self.head(self.embed(ids))})

net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
while True:
    logits = net(torch.tensor([[5, 6, 7]])).logits
    nn.functional.cross_entropy(logits[0], torch.tensor([6, 7, 2])).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def lines(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf8").split("\n") if line]


def test_no_text_is_trained_on_twice_or_scored(world, tmp_path):
    with open(world / "pretrain.csv", encoding="utf8") as file:
        text = file.read()
    (tmp_path / "twice.csv").write_text(text + text.split("\n", 1)[1], encoding="utf8")
    RACE.split_text(str(tmp_path / "twice.csv"), tmp_path, 5000)
    train, held_out = lines(tmp_path / "train.jsonl"), lines(tmp_path / "heldout.jsonl")
    assert len(train) == len(set(train)) and not set(train) & set(held_out)
    assert 5000 <= sum(len(text.encode("utf8")) for text in held_out) < 10000 < sum(map(len, train))


def test_a_text_with_nothing_left_to_train_on_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"nothing is left to train on; give more text or lower --held_out_kb"):
        RACE.split_text(str(world / "pretrain.csv"), tmp_path, 10**9)


@pytest.mark.parametrize("length", [1, 9, 10, 11, 57])
def test_every_token_is_scored_once_with_all_its_past_or_half_a_window(length):
    rows = WATCHED.rows_of(["text"], lambda text: [0, *range(1, length + 1), 99], window=10)
    scored = sorted(token for ids, first in rows for token in ids[first:])
    assert scored == [*range(1, length + 1), 99]
    for ids, first in rows:
        assert len(ids) - 1 <= 10 and (ids[0] == 0 or first >= 5)


def test_bits_are_those_of_the_probabilities_whatever_the_padding():
    """A network that finds every token equally likely pays log2(vocabulary) for each, ends included."""

    class Even(nn.Module):
        def forward(self, ids):
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 50))

    texts = ["好", "abcdefgh"]
    rows = WATCHED.rows_of(texts, lambda text: [1, *map(ord, text[:0]), *range(3, 3 + len(text)), 2], window=6)
    assert WATCHED.bits_per_byte(Even(), rows, texts) == pytest.approx((1 + 1 + 8 + 1) * math.log2(50) / (3 + 8))


def test_a_program_without_an_end_is_stopped_and_scored_at_each_moment(tokenizer_folder, tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf8")
    (tmp_path / "heldout.jsonl").write_text('{"text": "你好"}\n', encoding="utf8")
    contender = {
        "program": str(tmp_path / "program.py"), "arguments": [], "folder": str(tmp_path), "begin": "eos", "window": 8,
        "tokenizer": str(tokenizer_folder), "moments": [0.1, 0.2, 0.4], "threads": 1,
        "held_out": str(tmp_path / "heldout.jsonl"),
    }  # fmt: skip
    (tmp_path / "contender.json").write_text(json.dumps(contender), encoding="utf8")
    monkeypatch.setattr(sys, "argv", ["watched.py", str(tmp_path / "contender.json")])
    monkeypatch.chdir(tmp_path)
    WATCHED.main()
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf8"))
    points = result["points"]
    seconds = [point["seconds"] for point in points]
    assert seconds[0] == 0 and seconds == sorted(seconds) and seconds[-1] >= contender["moments"][-1]
    assert 2 <= len(points) <= 4  # moments that a busy machine lets pass together are one
    assert result["parameters"] == 600 * 8 + 600 * 8 + 600
    assert len({point["bits_per_byte"] for point in points}) == len(points)  # it trains on
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["--peer", "."], r"train_pretrain\.py: no such file; --peer needs a checkout"),
        (["--config", "none.yaml"], r"none\.yaml: no such file; give a recipe"),
        (["--out", "."], r"--out \.: not empty; choose another folder"),
    ],
)
def test_nonsense_is_refused_before_anything_is_done(given, what, tmp_path, world, monkeypatch, run):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    done = run(RACE.main, "--data", world / "pretrain.csv", "--out", "new", *given)
    assert done.code == 2 and re.search(what, done.err) and done.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
