"""Gaps of held-out documents: what is asked, and when an answer counts."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from eval.infilling import Gap, _cut, fill, infilling, read_gaps, scores
from eval.likelihood import CacheScorer
from text.corpus.infilling import question
from world.gaps import SUM, generate


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaps")
    generate(folder)
    return folder / "gaps.jsonl"


def test_gaps_are_of_held_out_documents_and_have_one_filling(file, world):
    rows = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
    counts = Counter(row["kind"] for row in rows)
    assert counts.keys() == {"operand", "result", "value"} and min(counts.values()) > 30
    held_out = (world / "heldout.txt").read_text(encoding="utf8")
    for row in rows:
        text = row["prefix"] + row["middle"] + row["suffix"]
        assert text in held_out
        if row["kind"] == "value":
            assert text.count(row["middle"]) == 1
        else:
            a, sign, b, c = re.search(
                r"(\d+)(加|减|\+|-)(\d+)(?:等于|=)(\d+)", _sum_at(text, len(row["prefix"]))
            ).groups()
            assert int(c) == int(a) + int(b) * (1 if sign in "加+" else -1)
            assert row["middle"] == (b if row["kind"] == "operand" else c)


def _sum_at(text: str, place: int) -> str:
    return next(match[0] for match in SUM.finditer(text) if match.start() < place < match.end())


def test_only_the_middle_and_nothing_after_it_counts(answerer, monkeypatch):
    """With the suffix the model must end; from before alone it must go on as the text does."""
    gaps = [Gap("3加", "4", "等于7。", "operand")] * 4 + [Gap("", "狐狸", "", "value")]
    asked = []

    def completions(prompts, longest):
        asked.append((prompts, longest))
        return ["4", "43", "4等于7", "", "狐狸"] if len(asked) == 1 else ["4等于9", "43等于", "4", "等于", "狐狸在"]

    model = type(
        "Stub",
        (),
        {"tokenizer": answerer.tokenizer, "model": answerer.model, "completions": lambda _, *a: completions(*a)},
    )()
    monkeypatch.setattr(CacheScorer, "score_pairs", lambda self, pairs: ((n, (-1.0, True)) for n in range(len(pairs))))
    filled = fill(model, gaps)
    assert [one.exact for one in filled] == [True, False, False, False, True]
    assert [one.before for one in filled] == [True, False, False, False, True]
    encode = answerer.tokenizer.encode
    assert asked[0][0][0] == question(answerer.tokenizer, encode("3加"), encode("等于7。"))
    found = scores(filled)
    assert found["operand"]["exact"] == 0.25 and found["all"]["gaps"] == 5
    assert found["value"]["bits"] == pytest.approx(1.4427, abs=1e-3)


def test_what_comes_before_is_cut_where_the_documents_own_tokens_end(answerer, file):
    tokenizer = answerer.tokenizer
    for gap in read_gaps(file)[:60]:
        ids, expected = _cut(answerer, gap)
        whole = tokenizer.encode(gap.prefix + gap.middle + gap.suffix)
        assert ids[1:] == whole[: len(ids) - 1] and ids[0] == tokenizer.eos_id
        text = tokenizer.decode(ids[1:])
        assert gap.prefix.startswith(text) and (text + expected).startswith(gap.prefix + gap.middle)


def test_bits_are_those_of_the_middle_and_its_end(answerer):
    gap = Gap("小橘住在", "河边", "。", "value")
    (one,) = fill(answerer, [gap])
    encode, eos = answerer.tokenizer.encode, answerer.tokenizer.eos_id
    asked = question(answerer.tokenizer, encode(gap.prefix), encode(gap.suffix))
    pair = (asked, [*encode(gap.middle), eos])
    (nats,) = CacheScorer(answerer).score_windows([pair])
    assert one.bits == pytest.approx(-nats / 0.693147, rel=1e-3)


def test_the_script_prints_a_table_and_refuses_other_rows(pretrained, file, script, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(file.read_text(encoding="utf8").splitlines()[:12]), encoding="utf8")
    given = ["--ckpt", pretrained / "final", "--dtype", "fp32", "--device", "cpu", "--file"]
    done = script(infilling, *given, few)
    assert done.code == 0 and "filled exactly" in done.out and "operand" in done.out, done.err
    found = json.loads(script(infilling, *given, few, "--json").out)
    assert found["scores"]["all"]["gaps"] == 12 and len(found["gaps"]) == 12
    few.write_text('{"prefix": "a", "middle": "", "suffix": "b"}', encoding="utf8")
    refused = script(infilling, *given, few)
    assert refused.code == 2 and "a gap without a middle" in refused.err and refused.err.count("\n") == 1
