"""What a run tells on the console and in metrics.jsonl."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from text.files import json_text
from training.run.log import RunLog, read_metrics

ROOT = Path(__file__).resolve().parents[3]


def console_line(out: Path, capsys: pytest.CaptureFixture, **metrics: object) -> str:
    out.mkdir(exist_ok=True)
    with RunLog(out, 0, True, "", {}) as log:
        log.write({"step": 1, "tokens": 10, **metrics})
    return capsys.readouterr().out


def test_no_two_measures_of_a_line_have_one_name(tmp_path, capsys):
    both = dict(accuracy=0.9, margin=1.5, val_accuracy=0.8, val_margin=1.25)
    line = console_line(tmp_path / "run", capsys, loss=0.4, **both)
    assert "preferred 90.0%  reward margin 1.500" in line
    assert "val  preferred 80.0%  reward margin 1.250" in line
    for shown in line.splitlines():
        names = re.findall(r"  ([a-zA-Z][-a-zA-Z ]*) [\d.]+", shown)
        assert len(names) == len(set(names))


def test_a_distilled_run_shows_divergence_and_cross_entropy(tmp_path, capsys):
    line = console_line(tmp_path / "run", capsys, loss=2.0, divergence=1.25, cross_entropy=2.75)
    assert "divergence 1.2500" in line and "cross entropy 2.7500" in line


def test_chinese_stays_chinese_in_the_log(tmp_path, capsys):
    """Through a resume too, which writes the lines again."""
    sample = {"question": "三加四等于几？", "completion": "七", "answer": "7", "rewards": {"correct": 1.0}}
    for step in (0, 1):
        with RunLog(tmp_path, step, True, "", {}) as log:
            log.write({"step": step + 1, "tokens": 10, "val_accuracy": 1.0, "sample": sample})
        assert "三加四等于几？" in (tmp_path / "metrics.jsonl").read_text(encoding="utf8").splitlines()[0]
    assert [entry["sample"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [sample, sample]


@pytest.mark.parametrize("text", ["小镇", "half \ud83d of 🙂", "\u2028 and \x00"])
def test_what_utf8_cannot_hold_is_an_escape(text):
    assert json.loads(json_text({"text": text}).encode("utf8")) == {"text": text}
    assert "小镇" not in text or "小镇" in json_text(text)


# Digests, headers and pipes, which only programs read.
FOR_PROGRAMS = {
    "measured_rows.py", "tokenizer.py", "verifier.py", "dpo_train.py"
}  # fmt: skip


def test_no_json_is_written_with_escapes_for_chinese():
    folders = (ROOT / name for name in ("model", "text", "training", "eval"))
    for path in sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("json.dump", "json.dumps"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                is_plain = options.get("ensure_ascii") == "False"
                assert is_plain or path.name in FOR_PROGRAMS, f"{path}:{call.lineno}"
