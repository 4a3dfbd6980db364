"""Bad input through the real scripts: one clear line, exit code 2 (3: a damaged checkpoint), no traceback, no loss."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError

import full_sft
import pretrain
import text.files
import train_tokenizer
import training.run.checkpoint
import training.run.log
from cli import call
from errors import LONGEST, UserError, command_line, one_line
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe
from training.run.log import read_metrics

ROWS = ["月牙镇的早晨很安静。", "Crescent Town is quiet in the morning.", "小明有3个苹果。"] * 40
ROWS = [f"{number}：{row}" for number, row in enumerate(ROWS)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{row}？"}, {"role": "assistant", "content": "你好！"}]}
    for row in ROWS[:20]
]


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
def train(run, pretrain_arguments, tmp_path) -> Callable[..., object]:
    """`train(data, *options)`: pretrain.py on other data, for one step."""

    def train(data: Path, *options: object):
        given = ["--data", data, "--shards", tmp_path / "shards", "--out", tmp_path / "run", "--max_steps", 1]
        return run(pretrain.main, *pretrain_arguments, *given, *options)

    return train


@pytest.fixture
def tune(run, pretrained, tmp_path) -> Callable[..., object]:
    """`tune(data, *options)`: full_sft.py on these conversations, for one step."""

    def tune(data: Path, *options: object):
        given = ["--ckpt", pretrained / "final", "--data", data, "--out", tmp_path / "run", "--max_steps", 1]
        shape = ["--sequence_length", 64, "--batch_tokens", 128, "--dtype", "fp32"]
        return run(full_sft.main, *given, *shape, *options)

    return tune


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def csv_of(rows: list[str], column: str = "text") -> str:
    return "\n".join([column, *rows]) + "\n"


def chats_of(*lines: str) -> str:
    return "".join(line + "\n" for line in [*map(json.dumps, CHATS), *lines])


# Messages


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "\x1b[2Jx", "a\u2028b", "\ud800", "a\u202eb", "x\0y", "好\n" * 5000]
)
def test_a_message_is_one_line_that_a_terminal_only_shows(text: str, capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise UserError(f"{text}; mend it")

    with pytest.raises(SystemExit) as end:
        command_line(fail)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and len(printed) < LONGEST + 50
    assert printed.startswith("error: ") and printed.endswith("; mend it\n")
    assert printed.rstrip("\n").isprintable() and printed.encode("utf-8")


def test_a_plain_message_stays_as_it_is() -> None:
    for message in ("数据.jsonl:3: 'a  b' is not text; mend it", "é ü 🙂 — …"):
        assert one_line(message) == message == str(UserError(message))


# Data


def test_a_missing_column(train, tmp_path):
    path = write(tmp_path / "a.csv", csv_of(ROWS, "body"))
    refused(train(path), 2, f"{path}:1: no column 'text', the columns are: 'body'", "column")
    assert train(path, "--column", "body").code == 0


def test_a_wrong_column(train, tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    refused(train(path, "--column", "content"), 2, f"{path}:1: no column 'content'", "'text'")


def test_a_byte_order_mark_is_no_problem(train, tune, tmp_path):
    assert train(write(tmp_path / "a.csv", b"\xef\xbb\xbf" + csv_of(ROWS).encode())).code == 0
    shutil.rmtree(tmp_path / "run")
    assert tune(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + chats_of().encode())).code == 0


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("月牙镇".encode("gbk"), "iconv -f GBK -t UTF-8"),
        (b"a\0b", "NUL byte; delete such bytes"),
        (b'"a quote that is not closed', "a quote that is not closed"),
    ],
    ids=["GBK", "NUL", "broken quote"],
)
def test_a_row_that_cannot_be_read(broken, what, train, tmp_path):
    """on_error stop names it; skip counts it and goes on."""
    path = write(tmp_path / "a.csv", csv_of(ROWS).encode() + broken + b"\n")
    refused(train(path, "--on_error", "stop"), 2, f"{path}:{len(ROWS) + 2}: ", what)
    done = train(path)
    assert done.code == 0 and f"{path}:{len(ROWS) + 2}: " in done.out


def test_a_file_in_gbk_throughout(train, tmp_path):
    path = write(tmp_path / "a.csv", csv_of(["月牙镇的早晨很安静。"] * 3).encode("gbk"))
    refused(train(path), 2, f"{path}:2: ", "iconv -f GBK -t UTF-8")


def test_half_a_json_line(train, tune, tmp_path):
    lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in ROWS)
    path = write(tmp_path / "a.jsonl", lines + '{"text": "ha')
    refused(train(path, "--on_error", "stop"), 2, f"{path}:{len(ROWS) + 1}: broken JSON")
    path = write(tmp_path / "chat.jsonl", chats_of('{"messages": [{"role": "us'))
    refused(tune(path, "--on_error", "stop"), 2, f"{path}:21: broken JSON")
    done = tune(path)
    assert done.code == 0 and "20 of 21 rows read, 1 skipped" in done.out


@pytest.mark.parametrize(
    "content", [b"", b"\xef\xbb\xbf", b"text\n", b"\n\n"], ids=["empty", "mark", "header", "blank"]
)
def test_an_empty_file(content, train, tmp_path):
    path = write(tmp_path / "a.csv", content)
    refused(train(path), 2, path)


def test_an_empty_file_of_conversations(tune, tmp_path):
    path = write(tmp_path / "a.jsonl", b"")
    refused(tune(path), 2, f"{path}: is empty; name a file that has rows")


def test_a_folder_without_data(train, tune, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "read.me", "nothing")
    refused(train(folder), 2, f"{folder}: the folder has no data; put files of .csv")
    refused(tune(folder), 2, f"{folder}: the folder has no data; put files of .csv")


def test_data_that_is_not_there(train, tune, tmp_path):
    path = tmp_path / "nowhere.csv"
    refused(train(path), 2, f"{path}: no such file or folder; check the path")
    refused(tune(tmp_path / "nowhere.jsonl"), 2, "nowhere.jsonl: no such file or folder; check the path")


def test_conversations_without_an_answer(tune, tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": CHATS[0]["messages"][:1]}) + "\n")
    refused(tune(path, "--on_error", "stop"), 2, f"{path}:1: 'messages' has no assistant turn")
    refused(tune(path), 2, path, "no conversations to train on", "no assistant turn")


# Checkpoints and tokenizers


@pytest.fixture
def checkpoint(pretrained, tmp_path) -> Path:
    return Path(shutil.copytree(pretrained / "final", tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf8")


def test_a_truncated_checkpoint(tune, checkpoint, world):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(tune(world / "sft.jsonl", "--ckpt", checkpoint), 3, f"{weights}: damaged or cut short")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 96},
        {"n_routed_experts": 16},
        {"num_hidden_layers": 3},
        {"vocab_size": 700},
        {"q_lora_rank": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_of_another_shape(changes, tune, checkpoint, world):
    change_config(checkpoint, **changes)
    refused(tune(world / "sft.jsonl", "--ckpt", checkpoint), 3, checkpoint)


def test_a_checkpoint_that_is_none(tune, tmp_path, world):
    refused(tune(world / "sft.jsonl", "--ckpt", tmp_path), 2, tmp_path, "give a checkpoint folder")
    refused(tune(world / "sft.jsonl", "--ckpt", tmp_path / "nowhere"), 2, "nowhere", "give a checkpoint folder")


def with_tokens(tokenizer: Tokenizer, size: int, folder: Path) -> Path:
    """The tokenizer with more tokens, which no text is made of, in a folder."""
    content = json.loads(tokenizer.raw.to_str())
    content["model"]["vocab"] |= {f"Ġ{number}": number for number in range(tokenizer.vocab_size, size)}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf8")
    return folder


def test_a_tokenizer_that_does_not_match(tune, checkpoint, world, tokenizer):
    with_tokens(tokenizer, 650, checkpoint)
    want = "the model knows 600 tokens, the tokenizer 650; use the tokenizer that the checkpoint was trained with"
    refused(tune(world / "sft.jsonl", "--ckpt", checkpoint), 2, f"{checkpoint}: {want}")


def test_another_tokenizer_than_the_checkpoints(train, checkpoint, world, tmp_path):
    train_bpe(ROWS, 300, 1).save(tmp_path / "other")
    done = train(world / "pretrain.csv", "--ckpt", checkpoint, "--tokenizer", tmp_path / "other")
    refused(done, 2, f"{tmp_path / 'other'}: not the tokenizer that {checkpoint} was trained with")
    assert train(world / "pretrain.csv", "--ckpt", checkpoint).code == 0


def test_a_folder_without_a_tokenizer(train, tune, checkpoint, world, tmp_path):
    refused(train(world / "pretrain.csv", "--tokenizer", tmp_path), 2, f"{tmp_path / 'tokenizer.json'}: No such file")
    (checkpoint / "tokenizer.json").unlink()
    refused(tune(world / "sft.jsonl", "--ckpt", checkpoint), 2, checkpoint / "tokenizer.json")


def test_neither_tokenizer_nor_checkpoint(run, world, tmp_path):
    done = run(pretrain.main, "--data", world / "pretrain.csv", "--out", tmp_path / "run")
    refused(done, 2, "give --tokenizer DIR", "or --ckpt DIR")


def test_special_tokens_at_other_places(tune, checkpoint, world):
    change_config(checkpoint, eos_token_id=9)
    refused(
        tune(world / "sft.jsonl", "--ckpt", checkpoint), 2, "eos_token_id is 9 in config.json and 2 in the tokenizer"
    )


def test_a_misspelled_field_of_the_model(train, world, tmp_path):
    done = train(world / "pretrain.csv", "--model.hiden_size", 64)
    refused(done, 2, "model.hiden_size: no such field, did you mean 'hidden_size'")
    path = write(tmp_path / "run.yaml", yaml.safe_dump({"model": {"preset": "demo", "n_grup": 2}}))
    refused(train(world / "pretrain.csv", "--config", path), 2, "model.n_grup: no such field, did you mean 'n_group'")
    refused(train(world / "pretrain.csv", "--model.preset", "demos"), 2, "no preset 'demos'", "demo, 26m")


def test_a_misspelled_setting(train, world, tmp_path):
    path = write(tmp_path / "run.yaml", "batch_tokns: 4096\n")
    refused(train(world / "pretrain.csv", "--config", path), 2, "batch_tokns")
    refused(train(world / "pretrain.csv", "--optim.lrr", 1), 2, "lrr")


def test_a_field_that_contradicts_another(train, world):
    refused(train(world / "pretrain.csv", "--model.n_group", 3), 2, "n_group = 3", "choose a divisor")


def test_a_vocabulary_above_65535(run, train, world, tmp_path, tokenizer):
    options = ["--data", world / "pretrain.csv", "--out", tmp_path / "t"]
    done = run(tokenizer_script, *options, "--vocab_size", 65_536)
    refused(done, 2, "--vocab_size 65536: must be from 269", "to 65535")
    large = with_tokens(tokenizer, 65_536, tmp_path / "large")
    done = train(world / "pretrain.csv", "--tokenizer", large, "--model.hidden_size", 4)
    refused(done, 2, "65,536 tokens do not fit 16-bit shards; use at most 65,535")


# Places


def test_an_out_that_is_a_file(train, world, tmp_path):
    write(tmp_path / "run", "in the way")
    refused(train(world / "pretrain.csv"), 2, tmp_path / "run")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_under_a_checkpoint(train, world, tmp_path, monkeypatch):
    """The third checkpoint does not fit: the first two stay, and the run goes on from there once there is room."""
    saves, save = [], training.run.checkpoint.save_file

    def save_file(*given: object) -> None:
        saves.append(given)
        if len(saves) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(*given)

    options = ["--max_steps", 4, "--save_every", 1, "--keep", 5]
    with monkeypatch.context() as patch:
        patch.setattr(training.run.checkpoint, "save_file", save_file)
        done = train(world / "pretrain.csv", *options)
    out = tmp_path / "run"
    refused(done, 2, f"{out / 'step-3'}: could not be saved", "No space left", f"{out / 'step-2'}; free some space")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["step-1", "step-2"]
    done = train(world / "pretrain.csv", *options, "--resume")
    assert done.code == 0 and f"resuming from {out / 'step-2'}: step 2" in done.out
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_disk_that_fills_under_the_metrics(train, world, tmp_path, monkeypatch):
    write_metrics = training.run.log.RunLog.write

    def write(log, metrics: dict) -> None:
        if metrics["step"] == 2:
            log.file.close()
            log.file = open("/dev/full", "a", encoding="utf8")  # noqa: SIM115
        write_metrics(log, metrics)

    monkeypatch.setattr(training.run.log.RunLog, "write", write)
    done = train(world / "pretrain.csv", "--max_steps", 3, "--save_every", 1)
    refused(done, 2, f"{tmp_path / 'run' / 'metrics.jsonl'}: No space left on device; free some space")
    assert (tmp_path / "run" / "step-1" / "model.safetensors").is_file()


def test_a_disk_that_fills_under_the_shards(train, world, monkeypatch):
    monkeypatch.setattr(text.files.os, "fsync", full)
    refused(train(world / "pretrain.csv"), 2, "shards", "No space left on device; free some space")


def test_a_disk_that_fills_under_the_tokenizer(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(text.files.os, "fsync", full)
    done = run(tokenizer_script, "--data", world / "pretrain.csv", "--out", tmp_path / "t", "--vocab_size", 300)
    refused(done, 2, tmp_path / "t", "No space left on device; free some space")
    assert not list((tmp_path / "t").iterdir())
