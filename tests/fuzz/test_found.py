"""The smallest cases of what was found: each ended in a traceback, a hang, or a wrong success."""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import yaml

import pretrain
from cli import parse
from eval.compared_run import ComparedRun
from eval.comparison import draw as draw_runs
from eval.held_out import held_out_documents, pretraining_settings
from eval.score_files import draw, read_scores
from eval.scores import Measured, Score
from eval.style import style
from fuzz.hostile import Outcome, Thrower
from fuzz.mutations import lay_out
from fuzz.suites import SCORED
from fuzz.test_fuzz_files import sources_of
from fuzz.test_fuzz_words import REPLY, Misbehaving, gathered
from LMConfig import LMConfig
from model.checkpoint.gguf_tokenizer import read_tokenizer
from text.tokenizer import Tokenizer
from training.distill.answers import Journal
from training.distill.endpoint import MOST_BYTES
from training.run.log import RunLog, read_metrics
from training.run.plots import draw_run
from training.run.progress import read_progress

DEEP = "[" * 30_000 + "]" * 30_000


class Found(NamedTuple):
    """What was read of which file, the cases of its content, and the code that they must end with."""

    action: Callable[[Path], object]
    name: str
    contents: Sequence[str]
    code: int = 2


def lines_of(row: dict[str, Any], *changes: dict[str, Any]) -> list[str]:
    return [json.dumps({**row, **change}) + "\n" for change in changes]


def scored(**change: Any) -> str:
    content = json.loads(SCORED)
    content["suites"]["words"]["scores"][0].update(change)
    return json.dumps(content)


def parsed(file: Path) -> pretrain.PretrainSettings:
    return parse(pretrain.PretrainSettings, "", ["--config", str(file)])


RECIPE_LINES = ("batch_tokens: null", "max_minutes: .nan", "optim: {lr: .inf}", f"epochs: {'9' * 400}")
FOUND = {
    "registry": Found(lambda file: sources_of(file.parent), "datasets.yaml", [f"a: {'[' * 3000}", "a: 2020-13-01"]),
    "LLaMA-Factory's": Found(lambda file: sources_of(file.parent), "dataset_info.json",
                             ['{"a": {"file_name": "a.json", "columns": 10}}', DEEP]),
    "recipe": Found(parsed, "r.yaml", [f"data: a\nout: b\n{line}\n" for line in RECIPE_LINES]),
    "progress": Found(lambda file: read_progress(file.parents[1]), "training/progress.json",
                      lines_of({"step": 1, "tokens": 9, "seconds": 1.0}, {"step": -1}, {"run": None}, {"step": 1.5},
                               {"seconds": float("nan")}, {"tokens": "9"}), 3),
    "scores": Found(lambda file: read_scores(file.parent), "scores.json",
                    [scored(value="x"), scored(value=float("nan")), scored(low=0.1, high=None), scored(group=3),
                     scored(share=1), scored(items=None), scored(metric="\ud800")]),
    "journal": Found(Journal, "answers.jsonl",
                     lines_of({"key": "k", "answer": "A", "finish": "stop", "tokens": 1}, {"answer": 3},
                              {"finish": []}, {"tokens": "1"}, {"key": 1})),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind, found in FOUND.items() for number in range(len(found.contents))]
)
def test_a_file_that_nobody_wrote(kind, number, throw, tmp_path):
    action, name, contents, code = FOUND[kind]
    lay_out(tmp_path, {name: contents[number].encode()})
    assert throw(action, tmp_path / name).code == code


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": float("nan")}, {"vocab_size": 2**40}, {"num_hidden_layers": 10**6}]
)
def test_a_config(throw, change):
    assert throw(LMConfig.from_dict, {**LMConfig().to_dict(), **change}).code == 2


def test_files_nested_deeper_than_python_can_follow(throw, tmp_path):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "training/progress.json")
    lay_out(tmp_path, dict.fromkeys(names, DEEP.encode()))
    assert throw(LMConfig.from_pretrained, tmp_path).code == 2
    assert throw(read_tokenizer, tmp_path, LMConfig(vocab_size=600)).code == 2
    assert throw(read_progress, tmp_path).code == 3
    assert throw(read_metrics, tmp_path / "metrics.jsonl").value == []


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "3", "loss": 1.0}', '{"step": -1}', '{"step": 2, "loss": "low"}', '{"step": 2, "max_vio": 5}',
        '{"step": 2, "max_vio": [null]}', '{"step": 2, "expert_load": [[1], [1, 2]]}', '{"step": 2, "loss": 1e308}',
        '{"step": 2, "tokens": [1]}', '{"step": true}', '{"step": 2, "sample": "x"}',
    ],
)  # fmt: skip
def test_a_line_of_a_log_that_no_run_wrote(line, throw, tmp_path):
    """They ended in a traceback when a run was resumed, compared or drawn."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "tokens": 9, "loss": 2.0}}\n{line}\n')
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert throw(RunLog, tmp_path, 5, True).code == 0


def test_names_that_would_be_formulas(throw, tmp_path):
    r"""A subject or a folder with two dollars ended in a traceback of the picture's maker: `$\x$` is no formula."""
    scores = [Score(r"in $\x$ or $", "acc", 0.5, 0.4, 0.6, 0.25, 10)] * 2
    one = Measured(r"$\x$", {}, scores, 10, 0, 1.0)
    assert throw(draw, r"$\x$", [one], tmp_path / "a.png").code == 0 and (tmp_path / "a.png").is_file()
    run = ComparedRun(r"$\x$", [{"step": 1, "tokens": 2, "loss": 1.0}], {"s": asdict(one)})
    assert throw(draw_runs, [run, run], tmp_path / "b.png", "seconds").code == 0
    lay_out(tmp_path, {r"$\x$/metrics.jsonl": b'{"step": 1, "tokens": 2, "loss": 1.0}\n'})
    assert throw(draw_run, tmp_path / r"$\x$").value.is_file()


@pytest.mark.parametrize(
    "change",
    [{"finish_reason": ["stop"]}, {"finish_reason": 1}, {"message": {"content": ["a"]}}, {"message": "a"}],
)
def test_a_reply_of_another_type(change, throw, tmp_path):
    reply = {"choices": [{**REPLY["choices"][0], **change}]}
    assert not_answered(throw, tmp_path, lambda: httpx2.Response(200, json=reply)).code == 2


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (json.dumps({**REPLY, "usage": {"completion_tokens": float("inf")}}).encode(), {}),
        (b'{"choices": ' + DEEP.encode() + b"}", {}),
        (b"not packed", {"Content-Encoding": "gzip"}),
        (json.dumps(REPLY).encode() + b" " * MOST_BYTES, {}),
    ],
    ids=["infinite", "deep", "not packed", "endless"],
)
def test_a_reply_that_cannot_be_read(content, headers, throw, tmp_path):
    def respond() -> httpx2.Response:
        return httpx2.Response(200, headers=headers, stream=httpx2.ByteStream(content))

    assert not_answered(throw, tmp_path, respond).code == 2


def not_answered(throw: Thrower, folder: Path, respond: Callable[[], httpx2.Response]) -> Outcome:
    """What comes of a question whose every reply is this one; nothing of it is written down."""
    (folder / "p.jsonl").write_text('{"prompt": "Q"}\n')
    done = throw(gathered, folder / "p.jsonl", Misbehaving("http://x/v1", "m", attempts=1, respond=respond))
    assert (folder / "out" / "answers.jsonl").read_bytes() == b""
    return done


RUN = dict(
    data="a.csv", tokenizer="t", ckpt="", shards="s", encoding="utf-8", on_error="skip", datasets="none.yaml",
    min_chars=1, sequence_length=8, val_tokens=8, micro_tokens=8, column=None, val_fraction=0.5,
)  # fmt: skip


def test_what_was_held_out_of_a_run_that_began_with_a_checkpoint(throw, checkpoint, world, tmp_path):
    """Such a run names no tokenizer: it is the checkpoint's."""
    names = {"data": str(world / "heldout.txt"), "shards": str(tmp_path / "shards"), "ckpt": str(tmp_path)}
    lay_out(tmp_path, {**checkpoint, "config.yaml": yaml.safe_dump({**RUN, **names, "tokenizer": ""}).encode()})
    assert list(throw(held_out_documents, tmp_path).value)


@pytest.mark.parametrize(
    ("name", "value"), [("shards", "a\0"), ("encoding", "\0"), ("column", "\ud800"), ("tokenizer", "\ud800")]
)
def test_a_run_whose_settings_hold_no_text_is_refused(name, value, throw, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({**RUN, name: value}), encoding="utf8")
    done = throw(pretraining_settings, tmp_path)
    assert done.code == 2 and f"{name} has a NUL or half of a character; restore the file" in done.err
    (tmp_path / "config.yaml").write_text(json.dumps(RUN), encoding="utf8")
    assert throw(pretraining_settings, tmp_path).code == 0


def test_a_name_that_is_no_utf8_can_be_printed(throw):
    assert throw(print, os.fsdecode(b"caf\xe9")).out == "caf\\udce9\n"


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_a_path_that_no_file_system_has(value, throw):
    done = throw(parse, pretrain.PretrainSettings, "", ["--data=a", f"--out={value}"])
    assert done.code == 2 and "half of a character" in done.err


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be at least 0"),
        ({"seed": 10**30}, "a number from 0 to 2^64 - 1"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(option, what, throw):
    done = throw(style, "no checkpoint", "no file", **option)
    assert done.code == 2 and what in done.err


@pytest.mark.parametrize("content", [None, 5, ["x"], "\ud800"])
def test_an_added_token_that_is_no_text_is_refused(content, throw, checkpoint, tmp_path):
    whole = json.loads(checkpoint["tokenizer.json"])
    whole["added_tokens"][5]["content"] = content
    lay_out(tmp_path, {"tokenizer.json": json.dumps(whole).encode(), "tokenizer_config.json": b"{}"})
    assert throw(read_tokenizer, tmp_path, LMConfig(vocab_size=600)).code == 2


@pytest.mark.parametrize("kind", ["charsmap", "long token", "key twice", "no model", "no object"])
def test_a_tokenizer_that_would_take_all_memory_is_refused(kind, throw, checkpoint, tmp_path):
    """tokenizers ends the process when it cannot have the memory that it asks for."""
    content = json.loads(checkpoint["tokenizer.json"])
    whole, bomb = json.dumps(content), base64.b64encode(struct.pack("<I", 2**31) + b"a" * 60).decode()
    charsmap = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": bomb}}
    long = {"added_tokens": [*content["added_tokens"], {**content["added_tokens"][-1], "content": "x" * 10**7}]}
    text = {
        "charsmap": json.dumps(content | charsmap),
        "long token": json.dumps(content | long),
        "key twice": json.dumps(charsmap)[:-1] + "," + whole[1:],
        "no model": json.dumps({**content, "model": None}),
        "no object": "[]",
    }[kind]
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf8")
    done = throw(Tokenizer.from_folder, tmp_path)
    assert done.code == 2 and "tokenizer.json: not a tokenizer" in done.err
