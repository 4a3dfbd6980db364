"""Bad input through the real scripts: one clear line, exit code 2 (3: a damaged checkpoint), no traceback, no loss."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import full_sft
import pretrain
import text.files
import train_tokenizer
import training.run.log
from cli import call
from errors import LONGEST, UserError, command_line, one_line
from text.tokenizer_training import train_bpe

ROWS = ["月牙镇的早晨很安静。", "Crescent Town is quiet in the morning.", "小明有3个苹果。"] * 40
ROWS = [f"{number}：{row}" for number, row in enumerate(ROWS)]
QUESTIONS = [{"role": "user", "content": f"{row}？"} for row in ROWS[:20]]
CHATS = [{"messages": [question, {"role": "assistant", "content": "你好！"}]} for question in QUESTIONS]


def tokenizer_script() -> None:
    call(train_tokenizer.train_tokenizer, "")


def refused(done, code: int, *parts: object) -> None:
    """One line of error, the last on stderr, which holds all `parts`; no traceback anywhere."""
    assert done.code == code, done
    lines = [line for line in done.err.splitlines() if not line.startswith("\rtokenise") and line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], done.err
    assert "Traceback" not in done.out + done.err
    for part in parts:
        assert str(part) in errors[0], errors[0]


@pytest.fixture
def train(run, pretrain_arguments, world, tmp_path) -> Callable[..., object]:
    """`train(*options)`: pretrain.py for one step, on the world or on what an option names."""
    given = [*pretrain_arguments, "--data", world / "pretrain.csv", "--shards", tmp_path / "shards"]
    return lambda *options: run(pretrain.main, *given, "--out", tmp_path / "run", "--max_steps", 1, *options)


@pytest.fixture
def tune(run, pretrained, world, tmp_path) -> Callable[..., object]:
    """`tune(*options)`: full_sft.py for one step, on the world's conversations or on what an option names."""
    given = ["--ckpt", pretrained / "final", "--data", world / "sft.jsonl", "--out", tmp_path / "run", "--max_steps", 1]
    given += ["--sequence_length", 64, "--batch_tokens", 128, "--dtype", "fp32"]
    return lambda *options: run(full_sft.main, *given, *options)


def csv_of(rows: list[str], column: str = "text") -> bytes:
    return ("\n".join([column, *rows]) + "\n").encode()


def chats_of(*lines: str) -> bytes:
    return "".join(line + "\n" for line in [*map(json.dumps, CHATS), *lines]).encode()


# Messages


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "\x1b[2Jx", "a\u2028b", "\ud800", "a\u202eb", "x\0y", "好\n" * 5000]
)
def test_a_message_is_one_line_that_a_terminal_only_shows(text, capsys):
    def fail() -> None:
        raise UserError(f"{text}; fix it")

    with pytest.raises(SystemExit) as end:
        command_line(fail)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and len(printed) < LONGEST + 50
    assert printed.startswith("error: ") and printed.endswith("; fix it\n")
    assert printed.rstrip("\n").isprintable() and printed.encode("utf-8")


def test_a_plain_message_stays_as_it_is():
    for message in ("数据.jsonl:3: 'a  b' is not text; fix it", "é ü 🙂 — …"):
        assert one_line(message) == message == str(UserError(message))


# Data: what each reader refuses is in tests/text; here it arrives through the scripts


STOP, HALF = ("--on_error", "stop"), '{"messages": [{"role": "us'
QUESTION = json.dumps({"messages": QUESTIONS[:1]}).encode() + b"\n"
REFUSED = {  # stage, name, content, options, what the error says behind the path
    "column": ("train", "a.csv", csv_of(ROWS, "body"), (), ":1: no column 'text', the columns are: 'body'; name one"),
    "GBK": ("train", "a.csv", csv_of(ROWS) + "镇\n".encode("gbk"), STOP, ":122: not UTF-8; convert it with"),
    "quote": ("train", "a.csv", csv_of([*ROWS, '"open']), STOP, ":122: a quote that is not closed"),
    "nothing": ("train", "a.csv", b"", (), ": is empty; name a file that has rows"),
    "folder": ("train", "folder/read.me", b"nothing", (), ": the folder has no data; put files of .csv"),
    "absent": ("train", "a.csv", None, (), ": no such file or folder; check the path"),
    "half a chat": ("tune", "a.jsonl", chats_of(HALF), STOP, ":21: broken JSON"),
    "no answer": ("tune", "a.jsonl", QUESTION, STOP, ":1: 'messages' has no assistant turn"),
    "no answers": ("tune", "a.jsonl", QUESTION, (), ": no conversations to train on"),
    "absent chats": ("tune", "a.jsonl", None, (), ": no such file or folder; check the path"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_data_that_are_refused(kind, train, tune, tmp_path):
    stage, name, content, options, what = REFUSED[kind]
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    path = path.parent if name == "folder/read.me" else path
    refused({"train": train, "tune": tune}[stage]("--data", path, *options), 2, path, what)


def test_what_can_be_skipped_is_counted(train, tune, tmp_path):
    """A byte order mark is no problem, another column can be named, a broken row costs only itself."""
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + csv_of([*ROWS, '"open'], "body"))
    done = train("--data", tmp_path / "a.csv", "--column", "body")
    assert done.code == 0 and f"{tmp_path / 'a.csv'}:{len(ROWS) + 2}: " in done.out
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + chats_of(HALF))
    done = tune("--data", tmp_path / "a.jsonl")
    assert done.code == 0 and "20 of 21 rows read, 1 skipped" in done.out


# Checkpoints and tokenizers


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf8")


def test_a_truncated_checkpoint(tune, checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(tune("--ckpt", checkpoint), 3, f"{weights}: damaged or cut short")


def test_a_checkpoint_that_is_none(tune, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        refused(tune("--ckpt", folder), 2, folder, "give a checkpoint folder")


def test_a_tokenizer_that_does_not_match(train, tune, checkpoint, tokenizer, tmp_path):
    train_bpe(ROWS, 300, 1).save(tmp_path / "other")
    done = train("--ckpt", checkpoint, "--tokenizer", tmp_path / "other")
    refused(done, 2, f"{tmp_path / 'other'}: not the tokenizer that {checkpoint} was trained with")
    assert train("--ckpt", checkpoint).code == 0
    content = json.loads(tokenizer.raw.to_str())
    content["model"]["vocab"] |= {f"Ġ{number}": number for number in range(600, 650)}  # which no text is made of
    (checkpoint / "tokenizer.json").write_text(json.dumps(content), encoding="utf8")
    remedy = "the model knows 600 tokens, the tokenizer 650; use the tokenizer that the checkpoint was trained with"
    refused(tune("--ckpt", checkpoint), 2, f"{checkpoint}: {remedy}")


def test_a_tokenizer_that_is_not_there(run, train, tune, checkpoint, world, tmp_path):
    refused(train("--tokenizer", tmp_path), 2, f"{tmp_path / 'tokenizer.json'}: No such file")
    (checkpoint / "tokenizer.json").unlink()
    refused(tune("--ckpt", checkpoint), 2, checkpoint / "tokenizer.json")
    done = run(pretrain.main, "--data", world / "pretrain.csv", "--out", tmp_path / "run")
    refused(done, 2, "give --tokenizer DIR", "or --ckpt DIR")


def test_special_tokens_at_other_places(tune, checkpoint):
    change_config(checkpoint, eos_token_id=9)
    refused(tune("--ckpt", checkpoint), 2, "eos_token_id is 9 in config.json and 2 in the tokenizer")


@pytest.mark.parametrize(
    ("options", "recipe", "parts"),
    [
        (["--model.hiden_size", 64], {}, ["model.hiden_size: no such field, did you mean 'hidden_size'"]),
        ([], {"model": {"preset": "demo", "n_grup": 2}}, ["model.n_grup: no such field, did you mean 'n_group'"]),
        (["--model.n_group", 3], {}, ["n_group = 3", "choose a divisor"]),
    ],
)
def test_a_setting_that_is_misspelled_or_contradicts_another(options, recipe, parts, train, tmp_path):
    if recipe:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
        options = ["--config", tmp_path / "run.yaml"]
    refused(train(*options), 2, *parts)


# Places


def test_an_out_that_is_a_file(train, tmp_path):
    (tmp_path / "run").write_text("in the way")
    refused(train(), 2, tmp_path / "run")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_under_the_metrics(train, tmp_path, monkeypatch):
    write_metrics = training.run.log.RunLog.write

    def write(log, metrics: dict) -> None:
        if metrics["step"] == 2:
            log.file.close()
            log.file = open("/dev/full", "a", encoding="utf8")  # noqa: SIM115
        write_metrics(log, metrics)

    monkeypatch.setattr(training.run.log.RunLog, "write", write)
    done = train("--max_steps", 3, "--save_every", 1)
    refused(done, 2, f"{tmp_path / 'run' / 'metrics.jsonl'}: No space left on device; free some space")
    assert (tmp_path / "run" / "step-1" / "model.safetensors").is_file()


def test_a_disk_that_fills_under_shards_and_tokenizer(run, train, world, tmp_path, monkeypatch):
    monkeypatch.setattr(text.files.os, "fsync", full)
    refused(train(), 2, "shards", "No space left on device; free some space")
    done = run(tokenizer_script, "--data", world / "pretrain.csv", "--out", tmp_path / "t", "--vocab_size", 300)
    refused(done, 2, tmp_path / "t", "No space left on device; free some space")
    assert not list((tmp_path / "t").iterdir())
