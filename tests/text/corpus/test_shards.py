"""Shards are exact, checked, the same however they came about, and never made twice."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

import text.corpus.encoding
import text.corpus.shards
from errors import UserError
from text.corpus.encoding import Encoded, parts
from text.corpus.shard_set import ShardSet, read_index
from text.corpus.shards import open_sources, prepare_shards, sources_ready
from text.corpus.tokenising import _hold_out
from text.sources.registry import Source
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe

TEXTS = [
    f"第{number}个故事：小猫去公园。 Story {number} has {number * 7} words." * (1 + number % 4) for number in range(120)
]
OPTIONS = {"shard_tokens": 2500, "val_fraction": 0.1, "workers": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300, 1)


@pytest.fixture(scope="module")
def other_tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 310, 1)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.corpus.encoding, "BATCH_BYTES", 1000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [*TEXTS[:60], TEXTS[3], "", *TEXTS[60:]]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    file.write_text("\n".join([*lines[:30], '{"text": "ha', *lines[30:]]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def made(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of an uninterrupted run, for comparison."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.corpus.encoding, "BATCH_BYTES", 1000)
        prepare_shards(str(corpus), tokenizer, folder, **OPTIONS)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".bin", ".npy")}


def documents(shards: ShardSet, split: str) -> list[list[int]]:
    stream = shards.split(split)
    return [stream.read(*stream.document(number)[:2]).tolist() for number in range(stream.documents)]


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the size of each batch that is tokenised from now on."""
    sizes: list[int] = []
    encode = text.corpus.encoding._encode

    def counted(batch: list, *more: object) -> list[Encoded]:
        sizes.append(len(batch))
        return encode(batch, *more)

    monkeypatch.setattr(text.corpus.encoding, "_encode", counted)
    return sizes


def test_every_document_is_in_one_split_once_with_its_end_token_and_its_bytes(made, tokenizer):
    shards = ShardSet.open(made, tokenizer)
    train, val = documents(shards, "train"), documents(shards, "val")
    expected = [[*tokenizer.encode(row), tokenizer.eos_id] for row in TEXTS]
    assert sorted(train + val) == sorted(expected) and 3 <= len(val) <= 30
    order = [expected.index(document) for document in train]
    assert order == sorted(order)
    streams = [shards.split("train"), shards.split("val")]
    assert sum(stream.bytes for stream in streams) == sum(len(row.encode()) for row in TEXTS)
    for stream in streams:
        tokens = stream.read(0, stream.tokens)
        assert tokens.dtype == np.uint16 and int((tokens == tokenizer.eos_id).sum()) == stream.documents
        sizes = [stream.document(number)[2] for number in range(stream.documents)]
        assert sum(sizes) == stream.bytes == int(tokenizer.token_bytes[tokens].sum())


def test_a_stream_reads_across_shards(made):
    stream = ShardSet.open(made).split("train")
    assert len(list(made.glob("train-*.bin"))) > 3
    whole = np.concatenate([np.fromfile(file, "<u2") for file in sorted(made.glob("train-*.bin"))])
    for start, stop in [(0, stream.tokens), (2400, 5300), (7, 7), (stream.tokens - 1, stream.tokens)]:
        assert np.array_equal(stream.read(start, stop), whole[start:stop])
    with pytest.raises(IndexError):
        stream.read(0, stream.tokens + 1)


def test_the_shards_do_not_depend_on_workers_or_batches_and_are_used_again(
    corpus, made, tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(text.corpus.encoding, "BATCH_BYTES", 3333)
    prepare_shards(str(corpus), tokenizer, tmp_path, **OPTIONS | {"workers": 3})
    assert content(tmp_path) == content(made)
    encoded = count_encoded(monkeypatch)
    shards = prepare_shards(str(corpus), tokenizer, tmp_path, **OPTIONS | {"workers": 2})
    assert encoded == [] and "ready and used again" in capsys.readouterr().out
    assert shards.split("train").documents + shards.split("val").documents == len(TEXTS)


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_interrupted_work_resumes_to_the_same_bytes(corpus, made, tokenizer, tmp_path, monkeypatch, reason):
    """By Ctrl-C or a full disk: what was finished stays."""
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if "train-00002.bin" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise reason
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(reason)) as caught:
        prepare_shards(str(corpus), tokenizer, tmp_path, **OPTIONS)
    if isinstance(reason, OSError):
        assert re.search(r"No space left on device: .*train-00002.bin", str(caught.value))
    assert len(read_index(tmp_path)["parts"]) == 2 and not (tmp_path / "train-00002.npy").exists()
    monkeypatch.setattr(os, "fsync", sync)
    encoded = count_encoded(monkeypatch)
    (tmp_path / "train-00009.bin.tmp").write_bytes(b"left by a killed run")
    prepare_shards(str(corpus), tokenizer, tmp_path, **OPTIONS)
    assert 0 < sum(encoded) < len(TEXTS)
    assert content(tmp_path) == content(made) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "notice"),
    [("data", "the data changed"), ("option", "another min_chars (1, now 40)"), ("tokenizer", "another tokenizer (")],
)
def test_what_changed_is_noticed(corpus, copy, tokenizer, other_tokenizer, tmp_path, capsys, change, notice):
    with pytest.raises(
        UserError, match=f"made with tokenizer {tokenizer.fingerprint}, not {other_tokenizer.fingerprint}"
    ):
        ShardSet.open(copy, other_tokenizer)
    data = write_texts(tmp_path / "new.jsonl", TEXTS[:50]) if change == "data" else str(corpus)
    options = OPTIONS | ({"min_chars": 40} if change == "option" else {})
    opener = other_tokenizer if change == "tokenizer" else tokenizer
    shards = prepare_shards(data, opener, copy, **options)
    assert f"{notice}" in (shown := capsys.readouterr().out) and "; tokenising again" in shown
    assert (len(documents(shards, "train") + documents(shards, "val")) < len(TEXTS)) == (change != "tokenizer")
    assert opener.decode(documents(ShardSet.open(copy, opener), "train")[0]) in TEXTS
    names = {shard["name"] for part in shards.index["parts"] for shard in (part["train"], part["val"]) if shard}
    assert {Path(name).stem for name in content(copy)} == names


@pytest.mark.parametrize("damage", ["bit", "size", "missing", "bounds"])
def test_a_damaged_shard_is_named_and_made_again(corpus, made, copy, tokenizer, capsys, damage):
    file = copy / ("train-00002.npy" if damage == "bounds" else "train-00002.bin")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "size":
        file.write_bytes(data[:-2])
    else:
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00002\.\w+: .*; delete it and prepare the shards again"):
        ShardSet.open(copy)
    if damage in ("size", "missing"):
        with pytest.raises(UserError, match="train-00002"):
            ShardSet.open(copy, checksums=False)
    prepare_shards(str(corpus), tokenizer, copy, **OPTIONS)
    assert f"{file.name}: " in capsys.readouterr().out
    assert content(copy) == content(made)


def test_a_folder_without_finished_shards_is_named(made, copy):
    with pytest.raises(UserError, match="no finished shards"):
        ShardSet.open(copy.parent)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"complete": False}))
    with pytest.raises(UserError, match="no finished shards"):
        ShardSet.open(copy)
    (copy / "index.json").write_text(json.dumps(index)[:100])
    with pytest.raises(UserError, match=r"index.json: damaged"):
        ShardSet.open(copy)
    for count in ("tokens", "documents"):
        part = {**index["parts"][0]["train"], count: 1 << 20}
        changed = index | {"parts": [index["parts"][0] | {"train": part}]}
        (copy / "index.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"damaged \(counts of train-00000\)"):
            ShardSet.open(copy)


def test_what_cannot_be_made_is_named(corpus, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"val_fraction 1\.0: give a share from 0 to below 1"):
        prepare_shards(str(corpus), tokenizer, tmp_path, val_fraction=1.0)
    with pytest.raises(UserError, match="65,536 tokens do not fit 16-bit shards; use at most 65,535"):
        prepare_shards(str(corpus), SimpleNamespace(vocab_size=65_536), tmp_path)


def test_two_processes_do_not_prepare_the_same_folder_where_the_file_system_has_locks(
    corpus, tokenizer, tmp_path, monkeypatch, capfd
):
    only_one = text.corpus.shards._only_one
    with only_one(tmp_path), pytest.raises(UserError, match="another process is preparing these shards"):
        prepare_shards(str(corpus), tokenizer, tmp_path, **OPTIONS)

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with only_one(tmp_path):
        assert "has no locks (No locks available)" in capfd.readouterr().err


def test_who_waits_opens_what_another_process_prepares_and_no_shards_of_other_data(
    corpus, tokenizer, other_tokenizer, tmp_path
):
    data, asked = [Source(str(corpus))], []

    def prepared_by_another() -> None:
        asked.append(sources_ready(data, tokenizer, tmp_path, **OPTIONS))
        open_sources(data, tokenizer, tmp_path, main=True, **OPTIONS)

    ((shards, weight),) = open_sources(data, tokenizer, tmp_path, main=False, check=prepared_by_another, **OPTIONS)
    assert asked == [False] and shards.split("train").documents > 0 and weight == 1.0
    assert sources_ready(data, tokenizer, tmp_path, **OPTIONS)

    def failed() -> None:
        raise SystemExit(2)

    with pytest.raises(SystemExit):  # with a main that failed
        open_sources(data, other_tokenizer, tmp_path, main=False, check=failed, **OPTIONS)


def test_work_on_the_same_data_by_another_tokenizer_or_recipe_is_kept(
    corpus, tokenizer, other_tokenizer, tmp_path, monkeypatch, capsys
):
    def opened(options: dict, reader=tokenizer) -> str:
        open_sources([Source(str(corpus))], reader, tmp_path, main=True, **options)
        return capsys.readouterr().out

    plain, fewer = OPTIONS, OPTIONS | {"val_fraction": 0.25}
    assert "stays and is not used" not in opened(plain)
    assert f"another val_fraction ({plain['val_fraction']}, now 0.25); tokenising into" in opened(fewer)
    assert f"another tokenizer ({tokenizer.fingerprint}, now {other_tokenizer.fingerprint})" in opened(
        plain, other_tokenizer
    )
    with pytest.raises(UserError, match="no column 'txt'"):
        opened(plain | {"column": "txt"})
    capsys.readouterr()
    encoded, folders = count_encoded(monkeypatch), sorted(tmp_path.iterdir())
    for options, reader in ((plain, tokenizer), (fewer, tokenizer), (plain, other_tokenizer)):
        assert "ready and used again" in (shown := opened(options, reader)) and "stays" not in shown
    assert encoded == [] and sorted(tmp_path.iterdir()) == folders and len(folders) == 3


def test_a_folder_of_an_older_program_is_used_and_by_other_work_not_touched(corpus, tokenizer, tmp_path, capsys):
    data = [Source(str(corpus))]
    ((shards, _),) = open_sources(data, tokenizer, tmp_path, main=True, **OPTIONS)
    plain = shards.folder.rename(tmp_path / shards.folder.name.rpartition("-")[0])  # whose name had no work in it
    assert sources_ready(data, tokenizer, tmp_path, **OPTIONS)
    ((again, _),) = open_sources(data, tokenizer, tmp_path, main=True, **OPTIONS)
    ((other, _),) = open_sources(data, tokenizer, tmp_path, main=True, **OPTIONS | {"min_chars": 40})
    assert again.folder == plain != other.folder and sources_ready(data, tokenizer, tmp_path, **OPTIONS)
    assert f"{plain} stays and is not used: another min_chars (1, now 40)" in capsys.readouterr().out


REFUSED = {  # the texts that are written, what is read beside them, and the error
    "missing": (None, {}, "no such file or folder"),
    "empty": (["", " "], {}, r"no document is left.*\(2 x empty; .*:1"),
    "column": (TEXTS, {"column": "body"}, "no column 'body'"),
    "stop": (TEXTS, {"column": "b", "on_error": "stop"}, "no column"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_corpus_that_is_refused_leaves_nothing_but_what_was_there(kind, tokenizer, tmp_path):
    texts, options, what = REFUSED[kind]
    data, (other, new) = tmp_path / "a.jsonl", (tmp_path / "other", tmp_path / "b" / "c")
    other.mkdir()
    (other / "notes.txt").touch()
    if texts is not None:
        write_texts(data, texts)
    for out in (new, other):
        with pytest.raises(UserError, match=what):
            prepare_shards(str(data), tokenizer, out, workers=1, **options)
    assert [path.name for path in other.iterdir()] == ["notes.txt"] and not new.parent.exists()


def test_what_can_be_continued_stays_when_a_later_row_is_refused(tokenizer, corpus, tmp_path):
    rows = [json.dumps({"text": row}) for row in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{", ""]), encoding="utf-8")
    with pytest.raises(UserError, match="broken JSON"):
        prepare_shards(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "out", **OPTIONS, on_error="stop")
    assert read_index(tmp_path / "out")["parts"]


@pytest.mark.parametrize("count,train,val", [(1, 1, 0), (2, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("shard_tokens", [1, 10_000])
def test_each_split_has_a_document_if_there_are_two(tokenizer, tmp_path, count, train, val, shard_tokens):
    data = write_texts(tmp_path / "a.jsonl", TEXTS[:count])
    shards = prepare_shards(data, tokenizer, tmp_path / "out", workers=1, val_fraction=1e-9, shard_tokens=shard_tokens)
    assert (shards.split("train").documents, shards.split("val").documents) == (train, val)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20, unique=True), st.floats(0, 0.999))
def test_the_held_out_documents_are_a_share_by_hash(hashes, fraction):
    held_out = _hold_out(np.array(hashes, np.uint64), fraction, has_train=False, has_val=False)
    assert not held_out.all()
    assert held_out.any() == (fraction > 0 and len(hashes) > 1)
    by_hash = [digest < int(fraction * 2**64) for digest in hashes]
    assert sum(a != b for a, b in zip(held_out, by_hash, strict=True)) <= 1
    later = _hold_out(np.array(hashes, np.uint64), fraction, has_train=True, has_val=True)
    assert later.tolist() == by_hash


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40))
def test_parts_end_with_the_document_that_fills_them(lengths, shard_tokens):
    documents = (Encoded(n, n, 1, array("H", [n] * size)) for n, size in enumerate(lengths, 1))
    found = [np.array(part.tokens) for part in parts(documents, shard_tokens)]
    assert np.array_equal(np.concatenate(found), np.repeat(np.arange(len(lengths)) + 1, lengths))
    for tokens in found[:-1]:
        assert len(tokens) >= shard_tokens > len(tokens) - lengths[tokens[-1] - 1]
