"""The tokenizer: any text comes back, spelled special tokens stay text, equal data gives equal files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from text.corpus.compression import KINDS, kind_of_line, measure_compression
from text.stream_decoder import StreamDecoder
from text.tokenizer import SPECIAL_TOKENS, Tokenizer
from text.tokenizer_training import sample_by_size, train_bpe
from train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]

TEXTS = [
    f"第{number}天，小明在河边看见了{number % 7}只白鹭，他说：“今天天气真好！”\n"
    f"On day {number} Anna wrote {number * 37} letters; nobody's reply came. It'll rain.\n"
    f"for i in range({number}):\n    print(i, '<s>', \"</s>\")\n"
    for number in range(300)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 340)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


def any_text() -> st.SearchStrategy[str]:
    """Any characters, among them pieces that tokenizers stumble over."""
    pieces = st.sampled_from([*SPECIAL_TOKENS, "\x00", "\r\n", "  ", "é", "👩‍👩‍👧", "１２", "\ufeff", "'LL"])
    return st.lists(st.one_of(st.text(), pieces)).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=any_text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    # Half a surrogate pair is no character.
    assert tokenizer.decode(tokenizer.encode(f"{text}\ud800b")) == f"{text}\ufffdb"
    assert tokenizer.encode_batch(["\udc80", "\ud83d\ude00"]) == [*map(tokenizer.encode, ("\ufffd", "😀"))]


def test_special_tokens_and_all_bytes_have_the_lowest_ids(tokenizer):
    assert [tokenizer.raw.id_to_token(number) for number in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    first = len(SPECIAL_TOKENS)
    assert set(tokenizer.token_bytes[first : first + 256].tolist()) == {1}
    assert tokenizer.token_bytes[first + 256 :].min() >= 2
    assert tokenizer.token_bytes[:first].max() == 0
    assert tokenizer.token_bytes.dtype == np.int32


def test_every_digit_is_a_token(tokenizer):
    assert len(tokenizer.encode("20240229")) == 8
    years = train_bpe(["2024 2024 1999 hello hello\n"] * 99, 273)
    assert len(years.encode("2024")) == 4
    assert len(tokenizer.encode("a 37,111.5")) == len(tokenizer.encode("a ,.")) + 6


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_spelled_special_token_stays_text(tokenizer, folder, special):
    texts = [special, f"说{special}完", f"a{special}{special} b", f" {special} "]
    for same in (tokenizer, Tokenizer.from_folder(folder)):
        encoded = [*same.encode_batch(texts), *map(same.encode, texts)]
        assert min(min(ids) for ids in encoded) >= len(SPECIAL_TOKENS)
        assert [same.decode(ids) for ids in encoded] == texts * 2


def test_a_corpus_of_spelled_special_tokens_teaches_none_of_them():
    text = "".join(SPECIAL_TOKENS) + " " + " ".join(SPECIAL_TOKENS)
    tokenizer = train_bpe([text] * 50, 13 + 256 + 20, min_frequency=1)
    assert min(tokenizer.encode(text)) >= len(SPECIAL_TOKENS)
    assert tokenizer.token_bytes.tolist().count(0) == len(SPECIAL_TOKENS)


def test_size_and_longest_token_are_those_asked_for():
    texts = ["abcdefghijklmnopqrstuvwxyz " * 3] * 50
    assert train_bpe(texts, 290, max_token_bytes=8).token_bytes.max() == 8
    assert train_bpe(texts, 292, max_token_bytes=9).token_bytes.max() == 9
    assert [train_bpe(TEXTS, size).vocab_size for size in (269, 270, 333)] == [269, 270, 333]
    with pytest.raises(UserError, match=r"only \d+ of 6400 tokens; add data, pass --vocab_size \d+ or less"):
        train_bpe(["abcabc abcabc"], 6400)


@pytest.mark.parametrize("size", [268, 65_536])
def test_impossible_vocabulary_sizes_are_refused(size):
    with pytest.raises(UserError, match=r"must be from 269 .* to 65535"):
        train_bpe(TEXTS, size)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 343), max_size=40), skip=st.booleans())
def test_streaming_gives_what_decoding_gives(tokenizer, ids, skip):
    """Ids beyond the vocabulary too. An unfinished character is flushed once."""
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    assert tokenizer.vocab_size == 340
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
    assert stream.push(tokenizer.encode("😀")[0]) == ""
    assert [stream.flush(), stream.flush()] == ["\ufffd", ""]
    assert "".join(map(stream.push, tokenizer.encode("😀"))) == "😀"


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"version": "1.0", "model"', "中".encode("gbk")])
def test_a_missing_or_broken_file_says_so(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    what = "No such file" if content is None else "not "
    with pytest.raises(UserError, match=rf"tokenizer\.json: {what}.*train_tokenizer\.py"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_with_other_special_tokens_is_refused(folder, tmp_path):
    content = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|user|>", "<|human|>")
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: special token '<\|user\|>' has id None, not 5"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("in_a_checkpoint", [False, True])
def test_transformers_opens_the_folder_with_the_same_ids(folder, tmp_path, in_a_checkpoint):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.save(tmp_path)
    if in_a_checkpoint:  # the model's type must not bring another tokenizer class with it
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (1, 2, 0, 3)
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    assert "\n" not in theirs.chat_template and "{#" not in theirs.chat_template  # as small engines read it
    assert len(theirs) == tokenizer.vocab_size
    for text in [*(text.replace("<", "(") for text in TEXTS[:20]), "  a , b .  c\n\n\n", "don't 12,345 １２ 好 吧"]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_the_fingerprint_follows_the_content_not_the_file(folder, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert Tokenizer.from_folder(tmp_path).fingerprint == tokenizer.fingerprint
    assert Tokenizer.from_folder(folder).fingerprint == tokenizer.fingerprint
    assert train_bpe(TEXTS, 341).fingerprint != tokenizer.fingerprint
    assert train_bpe([*TEXTS, "Zebrazebra " * 500], 340).fingerprint != tokenizer.fingerprint


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_texts(tmp_path / "corpus.csv", TEXTS)


def test_the_script_writes_equal_files_for_equal_data(corpus, tmp_path):
    files = []
    for threads in ("1", "2"):  # the order in which threads count pairs must not matter
        given = ["--data", corpus, "--out", tmp_path / threads, "--vocab_size", 330]
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "COLUMNS": "120"}
        command = [sys.executable, "train_tokenizer.py", *map(str, given)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files.append([(tmp_path / threads / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")])
        assert Tokenizer.from_folder(tmp_path / threads).vocab_size == 330
        words = [*KINDS, "mixed", "and all is their sum", "bytes/token", "MB/s", "peak memory"]
        assert all(word in done.stdout for word in words)
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"vocab_size": 6400}, "the data gave only .* of 6400 tokens; add data, pass --vocab_size"),
        ({"sample_mb": 0.0}, "--sample_mb 0.0: must be above 0"),
        ({"column": "body"}, "corpus.csv.*body"),
    ],
)
def test_the_script_samples_as_much_as_asked_and_names_what_is_wrong(corpus, tmp_path, capsys, options, what):
    train_tokenizer(corpus, str(tmp_path / "small"), vocab_size=300, sample_mb=0.02)
    assert "300 documents, 0.1 MB; a sample of 0.0 MB\n300 documents = 98 to train on + " in capsys.readouterr().out
    assert Tokenizer.from_folder(tmp_path / "small").vocab_size == 300
    with pytest.raises(UserError, match=what):
        train_tokenizer(**{"data": corpus, "out": str(tmp_path / "out"), "vocab_size": 300} | options)
    assert not (tmp_path / "out").exists()


def test_a_failed_save_keeps_the_old_file(folder, tokenizer, monkeypatch):
    before = (folder / "tokenizer.json").read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        train_bpe(TEXTS, 300).save(folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=40), size=st.integers(1, 200), seed=st.integers(0, 5))
def test_a_sample_has_the_size_and_the_order_of_the_corpus(texts, size, seed):
    sample = sample_by_size(texts, size, seed)
    kept = sum(len(text.encode()) for text in sample.texts)
    assert sample.size == kept or (sample.size == size and 0 < size - kept <= 3)  # a character is not cut
    assert sample.size <= size
    assert (sample.documents_seen, sample.size_seen) == (len(texts), sum(len(text.encode()) for text in texts))
    rest = iter(texts)
    assert all(any(whole.startswith(text) for whole in rest) for text in sample.texts)
    assert sample_by_size(texts, size, seed) == sample
    if sample.size_seen <= size:
        assert sample.texts == texts


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=20, max_size=60), seed=st.integers(0, 9))
def test_every_text_has_the_same_chance_in_a_sample(lengths, seed):
    """Whatever was drawn lower than a kept text is kept too: short late texts do not fill the gap of a long one."""
    texts = [chr(0x4E00 + number) + "x" * length for number, length in enumerate(lengths)]
    kept = sample_by_size(texts, 300, seed).texts
    draw = random.Random(seed).random
    draws = {text: draw() for text in texts}
    lost = [draws[text] for text in texts if text not in kept]
    assert max(draws[text] for text in kept) < min(lost, default=1)


def test_lines_are_classified_by_kind(tokenizer):
    kinds = {
        "今天天气真好，我们去公园吧": "Chinese", "The weather is fine today.": "English", "2024-02-29 13:45": "digits",
        "    for (i = 0; i < n; i++) {": "code", "ab": "mixed", "Привет, как дела сегодня": "mixed",
    }  # fmt: skip
    assert {line: kind_of_line(line) for line in kinds} == kinds
    rows = measure_compression(tokenizer, ["今天天气真好，我们去公园吧\n", "2024-02-29\nab"])
    sources = [(row.kind, row.source) for row in rows if row.source != "built-in"]
    kinds = ("Chinese", "digits", "mixed", "all")
    assert sources == [(kind, "held out") for kind in kinds] and len(rows) == 8
    *parts, everything = (row for row in rows if row.source == "held out")
    assert everything.characters == sum(part.characters for part in parts)
    assert everything.bytes == sum(part.bytes for part in parts)
    digits = parts[1]
    assert (digits.characters, digits.bytes, digits.tokens) == (11, 11, len(tokenizer.encode("2024-02-29\n")))
    assert everything.characters == 14 + 13 and parts[2].characters == len("ab")
