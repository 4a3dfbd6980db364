"""A needle in a haystack: the fact stands where it should to the token, and a model that copies finds it everywhere."""

from __future__ import annotations

import json
import random
import re

import pytest

from errors import UserError
from eval.needle import Found, Haystack, Needle, Planted, draw, models_of, needle, read_needles, search
from text.tokenizer import Tokenizer
from training.run.plots import load_pyplot
from world.chronicle import generate


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    generate(folder, count=3, characters=3000, needles=40)
    return folder


@pytest.fixture(scope="module")
def facts(files) -> list[Needle]:
    return read_needles(files / "needles.jsonl")


@pytest.fixture(scope="module")
def texts(world) -> list[str]:
    return (world / "heldout.txt").read_text(encoding="utf8").split("\n\n")


def test_the_fact_stands_at_its_depth_and_the_row_has_its_length_to_the_token(facts, texts, tokenizer):
    haystack, rng = Haystack(tokenizer, texts), random.Random(0)
    for number, fact in enumerate(facts):
        length, depth = rng.randint(130, 2000), (0.0, 0.25, 1.0, rng.random())[number % 4]
        row = haystack.plant(fact, length, depth, rng)
        ids = tokenizer.encode(f"{fact.fact}\n")
        assert row.context[row.place : row.place + len(ids)] == ids
        assert len(row.context) + max(map(len, row.choices)) == length
        filler = len(row.context) - tokens_asked(fact, tokenizer) - len(ids) - 1
        assert row.place - 1 == round(depth * filler)
        whole = tokenizer.encode(fact.question + fact.answer)
        assert (row.context + row.choices[row.answer])[-len(whole) :] == whole  # as the tokenizer writes them in text
        assert row.context[0] == tokenizer.eos_id and row.context.count(tokenizer.eos_id) == 1


def tokens_asked(fact: Needle, tokenizer: Tokenizer) -> int:
    """Tokens of the question, up to where its choices part."""
    asked = tokenizer.encode_batch([fact.question + choice for choice in fact.choices])
    return next(n for n, column in enumerate(zip(*asked, strict=False)) if len(set(column)) > 1)


def test_a_model_that_copies_finds_all_and_one_that_does_not_read_finds_what_guessing_does(facts, texts, tokenizer):
    haystack = Haystack(tokenizer, texts)
    rows = [haystack.plant(fact, 400, n / len(facts), random.Random(n)) for n, fact in enumerate(facts)]
    choice = {tuple(ids): text for row, fact in zip(rows, facts, strict=True)
              for ids, text in zip(row.choices, fact.choices, strict=True)}  # fmt: skip

    def copies(pairs):
        for place, (context, continuation) in enumerate(pairs):
            fact = facts[place // len(facts[0].choices)]
            stands = fact.fact.replace(fact.answer, choice[tuple(continuation)]) in tokenizer.decode(context)
            yield place, (0.0 if stands else -9.0, stands)

    def blind(pairs):
        for place, _ in reversed([*enumerate(pairs)]):  # in any order
            yield place, (-float(place % len(facts[0].choices)), False)

    assert search(copies, rows) == (1.0, 1.0)
    assert search(blind, rows) == (sum(row.answer == 0 for row in rows) / len(rows), 0.0)
    assert len({row.answer for row in rows}) > 6  # else a favourite would look like a memory
    without = [Planted(row.context[:1] + row.context[-30:], row.choices, row.answer, 1) for row in rows]
    assert search(copies, without)[0] < 0.3


def test_facts_are_ones_that_no_long_document_states(files, facts, world):
    long = [json.loads(line)["text"] for line in (files / "long.jsonl").read_text(encoding="utf8").splitlines()]
    assert min(map(len, long)) > 3000
    told = "\n".join(long)
    for fact in facts:
        before, after = fact.fact.split(fact.answer)
        assert not re.search(f"{before}[^，。]*{after}", told)
    for text in long:
        asked = re.findall("问：(.*?)？\n答：(.*?)。", text)
        assert len(asked) > 10


def test_questions_of_a_chronicle_are_answered_above_them(files):
    for line in (files / "long.jsonl").read_text(encoding="utf8").splitlines():
        text = json.loads(line)["text"]
        distances = []
        for match in re.finditer("\n问：(?:.*？)\n答：(.*)。(?=\n|$)", text):
            above = text[: match.start()].rfind(match[1])
            if "捡到了" in match[1] or "忘在了" in match[1]:
                assert above >= 0, match[1]
                distances.append(match.start() - above)
        assert max(distances) > 1000  # characters


def test_the_script_shows_each_checkpoint_and_the_switch_alone(pretrained, files, world, script, tmp_path):
    given = ["--needles", files / "needles.jsonl", "--data", world / "heldout.txt", "--ckpt", pretrained / "final"]
    given += ["--lengths", "160,320", "--depths", "0,100", "--trials", 3, "--dtype", "fp32", "--device", "cpu"]
    done = script(needle, *given, "--yarn", 4, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "needle.json").read_text(encoding="utf8"))
    assert [one["name"].rpartition("final")[2] for one in found["models"]] == ["", ", YaRN x 4 untrained"]
    assert found["lengths"] == [160, 320] and found["depths"] == [0, 1] and found["chance"] == pytest.approx(1 / 12)
    assert all(len(one["chosen"]) == 2 and len(one["chosen"][0]) == 2 for one in found["models"])
    assert "| 160 tokens | 320 tokens |" in done.out
    assert (tmp_path / "out" / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_rows_longer_than_the_checkpoint_reads_keep_their_beginning(
    pretrained, files, world, script, monkeypatch, tmp_path
):
    """Which would be cut off, and the fact with it."""
    contexts = []

    def read(scorer, pairs):
        contexts.append((scorer.context, max(len(context) + len(choice) for context, choice in pairs)))
        return ((place, (0.0, False)) for place in range(len(pairs)))

    monkeypatch.setattr("eval.likelihood.CacheScorer.score_pairs", read)
    given = ["--needles", files / "needles.jsonl", "--data", world / "heldout.txt", "--ckpt", pretrained / "final"]
    done = script(needle, *given, "--lengths", 2000, "--depths", 0, "--trials", 1, "--out", tmp_path)
    assert done.code == 0 and contexts == [(2000, 2000)], done.err


def test_the_picture_has_axes_with_units_and_the_shares(monkeypatch, tmp_path):
    pyplot, drawn = load_pyplot(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    model = Found("m", [[1.0, 0.5], [0.25, 0.0]], [[0, 0], [0, 0]])
    draw([model], [256, 1024], [0.0, 1.0], 0.1, tmp_path / "n.png")
    axis = drawn[0].axes[0]
    assert axis.images[0].get_array().tolist() == [[100, 25], [50, 0]]
    assert axis.get_xlabel() == "context (tokens)" and "depth" in axis.get_ylabel()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["256", "1,024"]


BAD = {
    "no file": (["--needles", "nowhere.jsonl"], "nowhere.jsonl"),
    "too short": (["--lengths", "20"], "--lengths 20: a fact and its question alone have"),
    "no number": (["--lengths", "4k"], "--lengths 4k: give whole numbers separated by commas"),
    "too deep": (["--depths", "101"], "--depths 101: give whole numbers"),
    "no factor": (["--yarn", "1"], "--yarn 1: a factor above 1"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_what_cannot_be_is_one_line(given, message, pretrained, files, world, script, tmp_path):
    usual = ["--ckpt", pretrained / "final", "--needles", files / "needles.jsonl", "--data", world / "heldout.txt"]
    done = script(needle, *usual, "--out", tmp_path / "out", *given)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err


def test_a_needle_whose_answer_is_none_of_its_choices_is_refused(tmp_path):
    row = {"fact": "a b c", "question": "a", "answer": "b", "choices": ["c", "d"]}
    (tmp_path / "n.jsonl").write_text(json.dumps(row), encoding="utf8")
    with pytest.raises(UserError, match=r"n.jsonl: the answer 'b' is not among the choices"):
        read_needles(tmp_path / "n.jsonl")


def test_an_extended_checkpoint_has_no_switch(extended_checkpoint):
    (found,) = models_of(str(extended_checkpoint), 8)
    assert found[2] == {}


@pytest.fixture
def extended_checkpoint(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config |= {"rope_scaling": scaling, "rope_parameters": {**scaling, "rope_type": "yarn", "rope_theta": 1e4}}
    del config["rope_parameters"]["type"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint
