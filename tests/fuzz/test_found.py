"""The smallest cases of what was found: each ended in a traceback, a hang, or a wrong success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pretrain
from fuzz.hostile import Thrower
from fuzz.test_fuzz_settings import LAUGHS, sources_of
from LMConfig import LMConfig
from model.gguf_tokenizer import GGUFTokenizer
from training.checkpoint import read_progress
from training.log import read_metrics
from training.settings import parse

DEEP = "[" * 30_000 + "]" * 30_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_info.json", '{"a": {"file_name": "a.json", "columns": 10}}'),
        ("dataset_info.json", DEEP),
        ("datasets.yaml", f"{LAUGHS}\na: {{path: a, weight: *a29}}"),
        ("datasets.yaml", f"a: {'[' * 3000}"),
        ("datasets.yaml", "a: 2020-13-01"),
    ],
)
def test_a_registry(throw: Thrower, name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert throw(sources_of, tmp_path / name).code == 2


@pytest.mark.parametrize(
    "line", ["batch_tokens: null", "max_minutes: .nan", "optim: {lr: .inf}", f"epochs: {'9' * 400}"]
)
def test_a_recipe(throw: Thrower, line: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"data: a\nout: b\n{line}\n")
    assert throw(parse, pretrain.PretrainSettings, "", ["--config", str(tmp_path / "r.yaml")]).code == 2


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": float("nan")}, {"vocab_size": 2**40}, {"num_hidden_layers": 10**6}]
)
def test_a_config(throw: Thrower, change: dict) -> None:
    assert throw(LMConfig.from_dict, {**LMConfig().to_dict(), **change}).code == 2


def test_files_nested_deeper_than_python_can_follow(throw: Thrower, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(DEEP)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "progress.json").write_text(DEEP)
    assert throw(LMConfig.from_pretrained, tmp_path).code == 2
    assert throw(GGUFTokenizer.from_folder, tmp_path, 600).code == 2
    assert throw(read_progress, tmp_path).code == 3
    assert throw(read_metrics, tmp_path / "metrics.jsonl").value == []


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"run": None}, {"seconds": float("nan")}, {"step": 1.5}, {"tokens": "9"}]
)
def test_a_progress_that_no_run_had(throw: Thrower, change: dict, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "progress.json").write_text(json.dumps({"step": 1, "tokens": 9, "seconds": 1.0, **change}))
    assert throw(read_progress, tmp_path).code == 3
