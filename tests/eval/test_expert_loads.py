"""Loads of experts are counted by domain, padding left out, and the picture shows them."""

from __future__ import annotations

import json

import pytest
import torch

import eval.experts
from errors import UserError
from eval.answering import Answerer
from eval.experts import draw, experts, loads, relative, specialisation
from training.run.plots import load_pyplot


def test_every_token_is_counted_once_in_each_layer_and_padding_never(answerer, monkeypatch):
    """The same loads whether windows are read together, the last one padded, or one by one."""
    texts = ["月牙镇的早晨很安静。" * 30, "the town by the river " * 20]
    config = answerer.model.config
    tokens = sum(len(answerer.tokenizer.encode(text)) + 1 for text in texts)
    found = loads(answerer, texts, 10**6)
    assert found.shape == (1, config.n_routed_experts)
    assert found.sum(1).tolist() == [tokens * config.num_experts_per_tok]
    monkeypatch.setattr(eval.experts, "AT_ONCE", 1)
    assert torch.equal(loads(answerer, texts, 10**6), found)
    assert loads(answerer, texts, 100).sum() == 100 * config.num_experts_per_tok


def test_loads_are_relative_to_the_mean_and_domains_to_each_other():
    one, other = torch.tensor([[8.0, 0, 0, 0], [2, 2, 2, 2]]), torch.tensor([[0.0, 8, 0, 0], [4, 4, 0, 0]])
    assert relative(one).tolist() == [[4, 0, 0, 0], [1, 1, 1, 1]]
    assert specialisation([one, other]) == [1.0, 0.5] and specialisation([one]) == [0.0, 0.0]
    assert specialisation([one, one * 100]) == [0.0, 0.0]  # domains of different sizes


def test_the_script_writes_loads_page_and_picture(pretrained, world, tmp_path, script):
    (tmp_path / "english.txt").write_text("the town by the river " * 50, encoding="utf8")
    files = f"{world / 'heldout.txt'},{tmp_path / 'english.txt'}"
    options = ["--ckpt", pretrained / "final", "--out", tmp_path / "out", "--tokens", 500, "--dtype", "fp32"]
    done = script(experts, *options, "--file", files)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "experts.json").read_text(encoding="utf8"))
    assert list(found["domains"]) == ["heldout", "english"] and 0 < found["distance"][0] < 1
    for domain in found["domains"].values():
        assert sum(domain["relative"][0]) == pytest.approx(8) and len(domain["max_vio"]) == 1
    page = (tmp_path / "out" / "experts.md").read_text(encoding="utf8")
    assert "| heldout |" in page and "| distance of the domains |" in page
    assert (tmp_path / "out" / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_loads(monkeypatch, tmp_path):
    pyplot = load_pyplot()
    drawn, domains = [], {"zh": torch.rand(2, 8), "en": torch.rand(2, 8)}
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw("a model", domains, tmp_path / "experts.png")
    maps = [torch.tensor(axis.images[0].get_array()) for axis in drawn[0].axes if axis.images]
    assert len(maps) == 2
    for layer, shown in enumerate(maps):
        torch.testing.assert_close(shown, torch.stack([relative(counts)[layer] for counts in domains.values()]))


def test_what_has_no_loads_is_one_line(pretrained, tiny_model, tmp_path, tokenizer, script):
    with pytest.raises(UserError, match="has no experts"):
        loads(Answerer(tiny_model(first_k_dense_replace=3, vocab_size=600), tokenizer), ["a"], 10)
    (tmp_path / "empty.txt").write_text("")
    for file, what in (("nowhere.txt", "nowhere.txt: "), ("empty.txt", "no text in it")):
        done = script(experts, "--ckpt", pretrained / "final", "--file", tmp_path / file)
        assert done.code == 2 and what in done.err and done.err.count("\n") == 1
