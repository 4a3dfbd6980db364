"""What is printed of data adds up: every row that was read has one fate, whatever reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from data_files import write

import dataset
from dataset import ChatDataset, PreferenceDataset, PromptDataset
from dpo_train import DPOSettings
from full_sft import SFTSettings
from grpo_train import GRPOSettings
from text.chats.prompts import read_prompts
from text.corpus.shards import prepare_shards
from text.inspection import Limits
from text.sources.formats import Layout
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from train_tokenizer import train_tokenizer
from training.distill.curation import AnswerSettings, gather_answers

LINE = re.compile(r"^\W*(?:of the corpus\s+)?(\d+) ([\w -]+) = (\d+ .*)$", re.MULTILINE)


def fates(printed: str) -> dict[str, int]:
    """The fates of the only balance that was printed, which adds up."""
    ((total, _, parts),) = LINE.findall(printed)
    counted = {name: int(count) for count, name in (part.split(" ", 1) for part in parts.split(" + "))}
    assert int(total) == sum(counted.values()), printed
    return counted


@pytest.fixture
def printed(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    def call(work: Callable[..., object], *arguments: object, **options: object) -> str:
        capsys.readouterr()
        work(*arguments, **options)
        return capsys.readouterr().out

    return call


CHATS = [
    *({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(40)),
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long " * 90}]},
    {"messages": [{"role": role, "content": "x" * size} for role, size in (("user", 1), ("assistant", 2)) * 30]},
    {"messages": [{"role": role, "content": "y"} for role in ("user", "assistant", "user")]},
    "{broken",
    {"messages": []},
]
PAIRS = [
    *({"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(40)),
    {"prompt": "q", "chosen": "same", "rejected": "same"},
    {"prompt": "q", "chosen": "long " * 90, "rejected": "b"},
    {"messages": CHATS[-4]["messages"][:-1], "chosen": "x", "rejected": "y"},
    "{broken",
]
PROBLEMS = [
    *({"question": f"What is {n} + 1?", "answer": n + 1} for n in range(80)),
    {"question": "What is 1 + 1?", "answer": 2},
    {"question": "long " * 90, "answer": 2},
    {"question": "What?"},
    "{broken",
]
TEXTS = [
    *({"text": f"Story {n} of a cat and {n} mice. " * 3} for n in range(50)),
    {"text": "Story 1 of a cat and 1 mice. " * 3}, {"text": "Story 2 of a cat and 2 mice. " * 3},
    {"text": " "}, {"text": None}, {"texts": "?"}, "{broken", "",
]  # fmt: skip


@pytest.mark.parametrize("samples", [None, 30])
@pytest.mark.parametrize(("kind", "rows"), [(ChatDataset, CHATS), (PreferenceDataset, PAIRS)])
def test_conversations_and_pairs(kind, rows, samples, tokenizer, printed, tmp_path):
    found = kind([Source(write(tmp_path / "a.jsonl", rows), samples=samples)], tokenizer, 64, val_fraction=0.1)
    reported = fates(printed(found.print_summary))
    assert sum(reported.values()) == len(rows) and reported["skipped"] == 2 and reported["held out"] > 0
    if samples:
        assert reported["more than were asked for"] == len(rows) - 2 - samples
    else:
        cut = (found.report.fates["cut"], found.report.fates["unanswered"])
        assert reported["dropped"] == 1 and cut == ((1, 1) if kind is ChatDataset else (1, 0))


@pytest.mark.parametrize("samples", [None, 60])
def test_problems_to_learn_from(samples, tokenizer, printed, tmp_path):
    sources = [Source(write(tmp_path / "a.jsonl", PROBLEMS), samples=samples), Source("arithmetic:1")]
    found = PromptDataset(sources, tokenizer, 64, val_fraction=0.2, val_problems=8)
    shown = printed(found.print_summary)
    reported = fates(shown)
    assert sum(reported.values()) == len(PROBLEMS) and reported["skipped"] == 3 and reported["held out"] > 4
    assert "; 8 of those held out are measured on" in shown
    assert samples is not None or reported["left out"] == 1


@pytest.mark.parametrize("most", [0, 20])
@pytest.mark.parametrize("samples", [None, 60])
def test_prompts_to_ask(most, samples, tmp_path):
    report = RowReport()
    sources = [Source(write(tmp_path / "a.jsonl", PROBLEMS), samples=samples), Source("arithmetic:1")]
    found = list(read_prompts(sources, most=most, report=report))
    reported = fates(balance(report.rows, "rows", {"prompts to ask": len(found), **report.unused}))
    assert report.accepted == len(found) == reported["prompts to ask"]
    if not most:
        assert report.rows == len(PROBLEMS) + 10_000 and report.problems["question asked before"] > 1000


def test_a_teachers_prompts(printed, tmp_path):
    class Silent:
        def answers(self, asks):
            yield from ((ask, collect_answer) for ask in asks)

    from training.distill.answers import Answer

    collect_answer = Answer("2", "stop", 1)
    source = Source(write(tmp_path / "a.jsonl", [*PROBLEMS, {"prompt": "Say 2."}]))
    settings = AnswerSettings(rewards={"overlong": 1.0}, at_least=-1)
    shown = printed(gather_answers, tmp_path / "out", [source], False, "skip", settings, Silent(), 0, (), 4)
    reported = fates(shown)
    assert sum(reported.values()) == len(PROBLEMS) + 1 and reported["skipped"] == 2
    answers, kept, dropped = map(int, re.search(r"(\d+) answers to .*: (\d+) kept.*, (\d+) dropped", shown).groups())
    assert answers == kept + dropped == reported["prompts to ask"]


@pytest.mark.parametrize("samples", [None, 30])
def test_text_of_pretraining_and_of_check_is_the_same(samples, tokenizer, tokenizer_folder, run, printed, tmp_path):
    path, registry = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "datasets.yaml"
    registry.write_text(
        "a: {path: a.jsonl, format: text" + (f", samples: {samples}" if samples else "") + "}", encoding="utf8"
    )
    source = Source(path, layout=Layout("text"), samples=samples)
    shown = printed(prepare_shards, [source], tokenizer, tmp_path / "out", workers=1, val_fraction=0.1)
    reported = fates(shown)
    assert sum(reported.values()) == len(TEXTS) - 1 and reported["held out"] > 0  # a blank line is no row
    done = run(dataset.main, "check", "a", "--datasets", registry, "--tokenizer", tokenizer_folder)
    checked = fates(done.out)
    assert done.code == 0 and checked.pop("documents") == reported.pop("to train on") + reported.pop("held out")
    assert checked == reported and (samples or checked["exact duplicate"] == 2)
    assert re.search(r"([\d,]+) tokens, ", done.out)[1] == re.search(r"tokens +([\d,]+), ", shown)[1]


def test_whole_files_are_no_rows(tokenizer, tokenizer_folder, run, printed, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", TEXTS)
    (folder / "empty.jsonl").touch()
    (folder / "c.csv").write_text("title,body\na,b\n", encoding="utf8")
    (folder / "notes.md").touch()
    reported = fates(printed(prepare_shards, str(folder), tokenizer, tmp_path / "out", workers=1, val_fraction=0.1))
    assert sum(reported.values()) == len(TEXTS) - 1 and reported["no such column"] == 1
    done = run(dataset.main, "check", folder, "--tokenizer", tokenizer_folder)
    checked = fates(done.out)
    assert checked.pop("documents") == reported.pop("to train on") + reported.pop("held out") and checked == reported
    assert "1 x file not read to its end: empty file" in done.out


@pytest.mark.parametrize(("kind", "rows"), [(ChatDataset, CHATS), (PreferenceDataset, PAIRS)])
@pytest.mark.parametrize("length", [16, 64])
def test_a_check_cuts_and_drops_as_training_does(
    kind, rows, length, tokenizer, tokenizer_folder, run, printed, tmp_path
):
    path = write(tmp_path / "a.jsonl", rows)
    done = run(dataset.main, "check", path, "--tokenizer", tokenizer_folder, "--sequence_length", length)
    report, trained = (data := kind([path], tokenizer, length)).report, fates(printed(data.print_summary))
    checked = fates(done.out)
    assert done.code == 0 and checked["cut"] == report.fates["cut"] > 0
    assert checked.pop(report.what) + checked.pop("cut") == trained.pop("to train on") and checked == trained
    assert f"{report.tokens:,} tokens, {report.trained:,} of them trained on" in done.out


def test_a_check_leaves_out_the_prompts_that_training_leaves_out(tokenizer, tokenizer_folder, run, printed, tmp_path):
    path = write(tmp_path / "a.jsonl", [*PROBLEMS, {"question": "7" * 300, "answer": 3}])  # a digit, a token
    for longest, given in ((32, ("--sequence_length", 64, "--max_new_tokens", 32)), (256, ())):
        trained = fates(printed(PromptDataset([path], tokenizer, longest).print_summary))
        done = run(dataset.main, "check", path, "--tokenizer", tokenizer_folder, *given)
        checked = fates(done.out)
        assert checked.pop("prompts") == trained.pop("to train on")
        assert checked.pop("dropped") == trained.pop("left out") == (2 if longest == 32 else 1)
        assert checked == trained
    done = run(dataset.main, "check", path, "--tokenizer", tokenizer_folder, "--sequence_length", 256)
    assert done.code == 2 and "max_new_tokens 256: leaves no room for a prompt" in done.err


def test_a_check_has_the_lengths_of_the_stages():
    names = {"ckpt": "c", "data": "d", "out": "o"}
    of = {"chat": SFTSettings(**names), "preference": DPOSettings(**names), "prompt": GRPOSettings(**names)}
    assert {kind: Limits().row(kind) for kind in of} == {kind: given.sequence_length for kind, given in of.items()}
    assert Limits().max_new_tokens == of["prompt"].max_new_tokens and Limits(context=64).row("preference") == 64


def test_a_check_of_a_file_that_breaks_off(tokenizer_folder, run, tmp_path):
    text = "[" + ",\n".join(json.dumps(row) for row in PROBLEMS[:80])
    (tmp_path / "a.json").write_text(text, encoding="utf8")
    done = run(dataset.main, "check", tmp_path / "a.json", "--tokenizer", tokenizer_folder)
    assert done.code == 2 and "breaks off in element 81" in done.err and fates(done.out) == {"prompts": 80}


@pytest.mark.parametrize("sample_mb", [0.002, 1.0])
def test_a_tokenizers_corpus(sample_mb, printed, tmp_path):
    rows = [*TEXTS, *({"text": f"number {n}"} for n in range(200))]
    given = dict(vocab_size=290, sample_mb=sample_mb, min_frequency=1)
    reported = fates(printed(train_tokenizer, write(tmp_path / "a.jsonl", rows), str(tmp_path / "out"), **given))
    assert sum(reported.values()) == len(rows) - 1
    assert ("beyond --sample_mb" in reported) == (sample_mb < 1) and (reported.get("held out") == 2) == (sample_mb == 1)
