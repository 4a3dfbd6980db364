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
    refused(script("full_sft.py", "--config", tmp_path / "laughs.yaml"), 2, "laughs.yaml: stands for more than")


def test_data_that_would_move_the_cursor(folder: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps({"conversations": [{"from": "\x1b[2J\n\ud800", "value": "x"}]}) + "\n")
    done = script("dataset.py", "check", folder / "a.jsonl", "--tokenizer", folder)
    refused(done, 2, "no usable row", "unknown role")
    assert "\x1b" not in done.stdout + done.stderr
