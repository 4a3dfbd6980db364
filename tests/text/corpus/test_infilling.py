"""Fill in the middle: the layout to the token, the share of documents, and what stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_files import write_texts

from errors import UserError
from text.corpus.infilling import Infilling, question
from text.corpus.shard_set import ShardSet
from text.corpus.shards import prepare_shards
from text.tokenizer import SPECIAL_TOKENS, Tokenizer
from text.tokenizer_training import train_bpe

TEXTS = [f"第{n}个故事：小猫去公园。Story {n} has {n * 7} words." for n in range(400)]
PREFIX, SUFFIX, MIDDLE = (SPECIAL_TOKENS.index(f"<|fim_{part}|>") for part in ("prefix", "suffix", "middle"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS[:50], 300, 1)


@pytest.fixture
def shards(tokenizer, tmp_path):
    write_texts(tmp_path / "corpus.jsonl", TEXTS)

    def shards(out: str = "out", **options: object) -> ShardSet:
        given = {"val_fraction": 0.1, "shard_tokens": 4000, **options}
        return prepare_shards(str(tmp_path / "corpus.jsonl"), tokenizer, tmp_path / out, **given)

    return shards


def documents(shards: ShardSet, split: str) -> list[list[int]]:
    stream = shards.split(split)
    return [stream.read(*stream.document(number)[:2]).tolist() for number in range(stream.documents)]


def read(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a document, its middle put back where it was."""
    if ids[0] != PREFIX:
        return tokenizer.decode(ids[:-1])
    suffix, middle = ids.index(SUFFIX), ids.index(MIDDLE)
    before, after, inside = ids[1:suffix], ids[suffix + 1 : middle], ids[middle + 1 : -1]
    return tokenizer.decode(before) + tokenizer.decode(inside) + tokenizer.decode(after)


def test_the_layout_is_prefix_suffix_middle_end(tokenizer):
    before, middle, after = (tokenizer.encode(part) for part in ("小猫", "去", "公园"))
    assert Infilling(1.0, 0, 0).join(tokenizer, before, middle, after) == [
        PREFIX,
        *before,
        SUFFIX,
        *after,
        MIDDLE,
        *middle,
    ]
    assert question(tokenizer, before, after) == [PREFIX, *before, SUFFIX, *after, MIDDLE]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_so_many_documents_are_cut_in_three_and_every_text_is_still_there(rate, shards, tokenizer, capsys):
    made = shards(fim_rate=rate)
    train, val = documents(made, "train"), documents(made, "val")
    moved = sum(ids[0] == PREFIX for ids in train)
    assert moved == pytest.approx(rate * len(train), abs=3 * (rate * (1 - rate) * len(train)) ** 0.5)
    assert not any(ids[0] == PREFIX for ids in val)
    assert sorted(read(tokenizer, ids) for ids in train + val) == sorted(TEXTS)
    assert all(ids[-1] == tokenizer.eos_id for ids in train)
    assert f"to the end, to be filled in, in {moved} documents" in capsys.readouterr().out
    assert sum(part.get("moved", 0) for part in made.index["parts"]) == moved


def test_which_ones_and_where_is_a_function_of_seed_and_text(shards):
    first, again, other = (documents(shards(name, fim_rate=0.3, fim_seed=seed), "train") for name, seed in
                           (("a", 1), ("b", 1), ("c", 2)))  # fmt: skip
    assert first == again != other
    many = [Infilling(1.0, 0, 0).parts("abcdef", digest) for digest in range(2000)]
    assert all(before + middle + after == "abcdef" for before, middle, after in many)
    assert {len(before) for before, _, _ in many} == set(range(7))
    assert sum(len(middle) for _, middle, _ in many) / 2000 == pytest.approx(16 / 7, rel=0.1)  # E|a - b| of 0 .. 6


def test_the_rate_belongs_to_the_shards_and_none_is_what_older_ones_have(shards, capsys):
    plain = shards()
    assert "fim_rate" not in plain.index["recipe"]
    shards(fim_rate=0.0, fim_seed=5)
    assert "are ready and used again" in capsys.readouterr().out
    shards(fim_rate=0.2)
    assert "another fim_rate (None, now 0.2)" in capsys.readouterr().out
    shards()
    assert "another fim_rate (0.2, now None)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"fim_rate 1\.5: give a share"):
        shards(fim_rate=1.5)


def test_a_pretraining_run_learns_from_them(run, pretrain_arguments, tmp_path: Path):
    import pretrain

    given = [*pretrain_arguments, "--out", tmp_path / "run", "--shards", tmp_path / "shards", "--fim_rate", 0.5]
    done = run(pretrain.main, *given, "--max_steps", 1)
    assert done.code == 0 and "middle moved" in done.out
