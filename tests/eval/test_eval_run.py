"""eval/run.py says in one line what is wrong; what it measures is tested with lm-eval, by check_lm_eval.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import UserError
from eval.model_path import ModelPath
from eval.run import run as measure_all
from eval.scores import Measured, Score


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--suite", "demo-question"], "--tasks demo-question: no such task; did you mean demo-questions?"),
        (["--suite", "xyz"], "--tasks xyz: no such task; known are arithmetic, "),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml: No such file or directory; check the path"),
        (["--tasks", ","], "--tasks: names nothing"),
        ([], "--tasks: names nothing"),
        (["--tasks", "ceval=nowhere.csv"], "nowhere.csv: no such file"),
        (["--tasks", "arc_easy=a.csv"], "--tasks arc_easy: no such task"),
        (["--tasks", "arithmetic", "--limit", "-1"], "--limit -1: give 0"),
        (["--tasks", "arithmetic", "--ckpt", "nowhere"], "nowhere: no such checkpoint"),
        (["--tasks", "arithmetic", "--device", "tpu"], "--device tpu: one of"),
    ],
)
def test_a_wrong_option_is_one_line(options, what, pretrained, tmp_path, script):
    done = script(measure_all, "--ckpt", pretrained / "final", "--out", tmp_path / "out", *options)
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("error: ") and what in done.err
    assert not (tmp_path / "out").exists()


def test_without_lm_eval_the_command_that_installs_it_is_printed(pretrained, script, monkeypatch):
    monkeypatch.setattr("eval.run.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = script(measure_all, "--ckpt", pretrained / "final", "--tasks", "arithmetic")
    assert done.code == 2 and done.err.count("\n") == 1 and "; pip install lm-eval==" in done.err


def test_scores_stand_in_the_card_of_a_run_and_no_other_folder_gets_one(pretrained, tmp_path, script, monkeypatch):
    score = Measured("arithmetic", {}, [Score("all", "acc", 0.5, items=12)], 12, 0, 1.0)
    stub = SimpleNamespace(measure=lambda *_: score, name_of=str, open_lm=lambda *_: None)
    monkeypatch.setitem(sys.modules, "eval.harness", stub)
    monkeypatch.setattr("eval.run.find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pretrained, "run", ignore=shutil.ignore_patterns("state.safetensors"))
    alone = Path(shutil.copytree("run/final", "alone"))
    for folder in ("run/final", alone):
        assert script(measure_all, "--ckpt", folder, "--tasks", "arithmetic").code == 0
    assert "| arithmetic | acc | 50.0% |" in Path("run/final/README.md").read_text(encoding="utf8")
    assert not (alone / "README.md").exists()


def test_each_folder_is_opened_by_its_own_kind(pretrained, tokenizer, tmp_path):
    assert ModelPath.find(str(pretrained / "final")).is_own
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert ModelPath.find(str(tmp_path)) == ModelPath(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert ModelPath.find(str(tmp_path)).is_own  # whose reader says that it has no tokenizer
    tokenizer.save(tmp_path)
    assert ModelPath.find(str(tmp_path)).is_own
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf8").replace('"<unk>"', '"[UNK]"'), encoding="utf8")
    assert not ModelPath.find(str(tmp_path)).is_own
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json: not a JSON object; restore the file"):
        ModelPath.find(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("empty", "no config.json and no .gguf file in it"),
        ("two", "2 .gguf files; name one of them"),
        ("nowhere", "no such checkpoint; give a folder with config.json, or a .gguf file"),
    ],
)
def test_a_gguf_file_is_found_by_its_name_or_its_folder_and_what_holds_no_model_is_one_line(name, what, tmp_path):
    for file in ("empty/a.txt", "one/a.gguf", "two/a.gguf", "two/b.gguf"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"GGUF")
    for path in (tmp_path / "one" / "a.gguf", tmp_path / "one"):
        assert ModelPath.find(str(path)) == ModelPath(tmp_path / "one", "a.gguf")
    with pytest.raises(UserError, match=f"^{tmp_path / name}: {what}"):
        ModelPath.find(str(tmp_path / name))
