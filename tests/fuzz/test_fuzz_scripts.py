"""A few of the cases through the real scripts, as processes: the exit code, and one line instead of a traceback."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.test_fuzz_settings import LAUGHS

ROOT = Path(__file__).parents[2]
MEMORY = 8 << 30  # bytes of addresses: torch alone maps some


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def script(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, preexec_fn=limit_memory
    )


def refused(done: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), done.stderr


@pytest.fixture
def folder(checkpoint: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in checkpoint.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_network_beyond_any_memory(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**31 - 1}))
    done = script("-m", "model.hf", "import", "--from", folder, "--to", folder / "new")
    refused(done, 3, "config.json describes a network of", "restore config.json")
    assert not (folder / "new").exists()


def test_a_recipe_of_a_billion_values(tmp_path: Path) -> None:
    (tmp_path / "laughs.yaml").write_text(f"{LAUGHS}\ndata: *a29\n")
    refused(
        script("full_sft.py", "--config", tmp_path / "laughs.yaml"),
        2,
        "laughs.yaml: not YAML (more than 100,000 values",
    )


def test_data_that_would_move_the_cursor(folder: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps({"conversations": [{"from": "\x1b[2J\n\ud800", "value": "x"}]}) + "\n")
    done = script("dataset.py", "check", folder / "a.jsonl", "--tokenizer", folder)
    refused(done, 2, "no usable row", "unknown role")
    assert "\x1b" not in done.stdout + done.stderr


# Where each is thrown at: (file of this folder, test).
ENTRY_POINTS = {
    "pretrain.py": ("test_fuzz_settings", "test_a_recipe"),
    "full_sft.py": ("test_fuzz_rows", "test_the_data_set_of_a_stage"),
    "lora_sft.py": ("test_fuzz_runs", "test_an_adapter"),
    "dpo_train.py": ("test_fuzz_rows", "test_the_data_set_of_a_stage"),
    "grpo_train.py": ("test_fuzz_rows", "test_the_data_set_of_a_stage"),
    "distill.py": ("test_fuzz_talk", "test_what_an_endpoint_answers"),
    "collect.py": ("test_fuzz_talk", "test_collecting"),
    "train_tokenizer.py": ("test_fuzz_talk", "test_training_a_tokenizer"),
    "dataset.py": ("test_fuzz_rows", "test_what_dataset_py_says"),
    "LMConfig.py": ("test_fuzz_checkpoints", "test_a_config_of_its_own"),
    "model/hf.py": ("test_fuzz_checkpoints", "test_importing"),
    "eval/chat.py": ("test_fuzz_talk", "test_a_conversation"),
    "eval/compare.py": ("test_fuzz_comparisons", "test_a_comparison"),
    "eval/experts.py": ("test_fuzz_comparisons", "test_the_curves_of_a_run"),
    "eval/held_out.py": ("test_fuzz_comparisons", "test_the_settings_of_a_pretraining"),
    "eval/perplexity.py": ("test_fuzz_talk", "test_a_text_to_score"),
    "eval/questions.py": ("test_fuzz_runs", "test_what_evaluations_read"),
    "eval/reasoning.py": ("test_fuzz_talk", "test_the_options_of"),
    "eval/report.py": ("test_fuzz_comparisons", "test_the_settings_of_a_pretraining"),
    "eval/run.py": ("test_fuzz_suites", "test_the_data_of_a_suite"),
    "eval/style.py": ("test_fuzz_runs", "test_what_evaluations_read"),
    "world/__main__.py": ("test_fuzz_talk", "test_the_options_of_the_world"),
    "world/greeting_messages.py": ("test_fuzz_scripts", "test_a_world_into_a_file"),
    "world/reasoning.py": ("test_fuzz_scripts", "test_a_world_into_a_file"),
}
# Started by the others, never by a person; or another name of one of them.
OTHERS = {"model/decoding/native.py", "model/cost_table.py", "text/judging/verifier.py", "text/world.py"}


def test_every_entry_point_is_thrown_at() -> None:
    folders = ("eval", "model", "text", "training", "world")
    sources = {*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))}
    scripts = {str(path.relative_to(ROOT)) for path in sources if "\nif __name__ ==" in path.read_text("utf8")}
    assert scripts == ENTRY_POINTS.keys() | OTHERS
    for file, test in ENTRY_POINTS.values():
        assert f"\ndef {test}(" in (ROOT / "tests" / "fuzz" / f"{file}.py").read_text("utf8"), (file, test)


@pytest.mark.parametrize("name", ["greeting_messages", "reasoning"])
def test_a_world_into_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    refused(script("-m", f"world.{name}", "--out", tmp_path / "x"), 2, f"{tmp_path / 'x'}: ", "check the path")
