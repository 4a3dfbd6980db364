"""A folder with splits gives the files of one, in whatever way it has them, and says what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import UserError
from text.corpus.corpus import Corpus
from text.sources.folders import Folder
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.sources.rows import SUFFIXES, read_rows


def texts(path: Path, split: str = "train") -> tuple[list[str], list[str]]:
    """The texts of a folder as rows, the same as documents, and what is said of the rest."""
    report, source = RowReport(), Source(str(path), split=split)
    rows = [row["text"] for _, row in read_rows(source, "stop", report)]
    corpus = Corpus([source])
    assert [document.text for document in corpus] == rows and corpus.report.unread == report.unread
    assert report.lines()[: len(report.unread)] == report.unread
    return rows, report.unread


@pytest.fixture
def save(tmp_path):
    """`save(train=["a"])`: texts by split, as `save_to_disk` writes them."""
    datasets = pytest.importorskip("datasets")

    def save(shards: dict[str, int] | None = None, **texts: list[str]) -> Path:
        splits = {name: datasets.Dataset.from_dict({"text": found}) for name, found in texts.items()}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards=shards)
        return tmp_path / "saved"

    return save


def test_what_save_to_disk_wrote_is_read_without_the_results_of_map(save):
    import datasets

    saved = save({"train": 2, "test": 1}, train=["a", "b"], test=["c"])
    loaded = datasets.load_from_disk(str(saved))
    loaded.map(lambda row: {"text": row["text"] * 2}, load_from_cache_file=False)
    assert list(saved.glob("train/cache-*"))
    assert texts(saved) == (["a", "b"], [f"{saved}: only the split train is read, not test"])
    assert texts(saved / "test") == (["c"], []) and texts(saved, "test")[0] == ["c"]
    with pytest.raises(UserError, match="saved: no split 'validation', there are: test, train; name one of them"):
        texts(saved, "validation")
    (saved / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json: not valid JSON \(.*\); fetch or save the data set again"):
        texts(saved)


LAYOUTS = {
    "a snapshot": ("data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
    "an older snapshot": ("data/train-00000-of-00001-0a1b.jsonl", "data/validation-00000-of-00001-0a1b.jsonl"),
    "shards with points": ("c4-train.00000-of-01024.jsonl.gz", "c4-validation.00000-of-00008.jsonl.gz"),
    "names": ("train.jsonl", "test.jsonl"),
    "ends of names": ("zh_train.jsonl", "zh-dev.jsonl"),
    "several kinds of a split": ("train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"),
    "folders": ("train/0001.jsonl", "test/0001.jsonl"),
}


def write(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}))
    return [folder / name for name in names]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_train_files_of_a_folder_with_splits_are_read(layout, tmp_path):
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    train, other = write(tmp_path, *LAYOUTS[layout])
    folder = Folder.read(tmp_path, SUFFIXES)
    assert folder.files == [train] and folder.splits == {"train", *folder.others} and len(folder.others) == 1
    assert folder.notices() == [
        f"{tmp_path}: only the split train is read, not {folder.others.pop()}",
        f"{tmp_path}: 1 of other formats not read: README.md",
    ]
    for name in ("test", "validation", "dev"):
        if name in folder.splits:
            assert Folder.read(tmp_path, SUFFIXES, name).files == [other]
    with pytest.raises(UserError, match=r"no split .gen., there are: \w+, \w+; name one of them"):
        Folder.read(tmp_path, SUFFIXES, "gen")


def test_a_split_may_be_named_in_full_and_must_be_without_a_train_split(save, tmp_path):
    write(tmp_path, *(f"data/{name}-00000-of-00001.jsonl" for name in ("train_sft", "train_gen", "test_sft")))
    assert texts(tmp_path)[0] == ["data/train_gen-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl"]
    assert texts(tmp_path, "train_sft")[0] == ["data/train_sft-00000-of-00001.jsonl"]
    saved = save(train_sft=["a"], train_gen=["b"])
    with pytest.raises(UserError, match="no split 'train', there are: train_gen, train_sft"):
        texts(saved)
    assert texts(saved, "train_sft")[0] == ["a"]


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "b.jsonl"],
        ["latest.jsonl", "training_and_more.jsonl", "pretrain.jsonl"],  # words that only hold the name of a split
        ["test.jsonl", "val.jsonl"],  # whoever trains on such a folder means it
        ["more.jsonl", "train.jsonl"],
    ],
)
def test_other_folders_are_read_whole(names, tmp_path):
    write(tmp_path, *names, ".hidden.jsonl")
    assert texts(tmp_path) == (sorted(names), [])
