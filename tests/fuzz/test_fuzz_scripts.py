"""Every script is thrown at; a few cases through the scripts themselves, from the command line to the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dataset
from fuzz.mutations import lay_out
from fuzz.test_fuzz_files import ROOT, TARGETS
from fuzz.test_fuzz_words import as_script
from model import hf
from world import chronicle, gaps, greeting_messages, reasoning


def test_a_network_beyond_any_memory(throw, checkpoint, tmp_path):
    config = {**json.loads(checkpoint["config.json"]), "intermediate_size": 2**31 - 1}
    folder = lay_out(tmp_path / "old", {**checkpoint, "config.json": json.dumps(config).encode()})
    done = throw(as_script, hf.main, "import", "--from", folder, "--to", tmp_path / "new")
    assert done.code == 3 and "config.json describes a network of" in done.err and "restore config.json" in done.err
    assert not (tmp_path / "new").exists()


def test_data_that_would_move_the_cursor(throw, tokenizer_folder, tmp_path):
    row = {"conversations": [{"from": "\x1b[2J\n\ud800", "value": "x"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    done = throw(as_script, dataset.main, "check", tmp_path / "a.jsonl", "--tokenizer", tokenizer_folder)
    assert done.code == 2 and "no usable row" in done.err and "unknown role" in done.err
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("script", [greeting_messages, reasoning, chronicle, gaps])
def test_a_world_into_a_file(script, throw, tmp_path):
    (tmp_path / "x").write_text("")
    done = throw(as_script, script.main, "--out", tmp_path / "x")
    assert done.code == 2 and f"{tmp_path / 'x'}: " in done.err and "check the path" in done.err


# Each with its target or its test.
ENTRY_POINTS = {
    "pretrain.py": "recipe of pretrain", "full_sft.py": "recipe of sft", "lora_sft.py": "adapter",
    "dpo_train.py": "recipe of dpo", "grpo_train.py": "recipe of grpo", "distill.py": "test_what_an_endpoint_answers",
    "collect.py": "test_collecting", "train_tokenizer.py": "test_training_a_tokenizer",
    "dataset.py": "test_what_dataset_py_says", "LMConfig.py": "test_a_config_with_other_values",
    "model/hf.py": "import", "eval/chat.py": "test_a_conversation", "eval/compare.py": "comparison",
    "eval/experts.py": "log", "eval/held_out.py": "pretraining", "eval/infilling.py": "gaps",
    "eval/needle.py": "needles", "eval/paper/__main__.py": "test_the_options_of",
    "eval/perplexity.py": "test_a_text_to_score",
    "eval/questions.py": "questions", "eval/reasoning.py": "test_the_options_of", "eval/report.py": "pretraining",
    "eval/run.py": "suite questions", "eval/serve.py": "test_the_options_of", "eval/style.py": "requests",
    "training/parallel/plan.py": "test_a_plan", "world/__main__.py": "test_the_options_of_the_world",
    "world/chronicle.py": "test_a_world_into_a_file", "world/gaps.py": "test_a_world_into_a_file",
    "world/greeting_messages.py": "test_a_world_into_a_file", "world/reasoning.py": "test_a_world_into_a_file",
}  # fmt: skip
# Started by the others, never by a person; or another name of one of them.
OTHERS = {"model/decoding/native.py", "model/cost_table.py", "text/judging/verifier.py", "text/world.py"}


def test_every_entry_point_is_thrown_at():
    folders = ("eval", "model", "text", "training", "world")
    sources = {*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))}
    scripts = {str(path.relative_to(ROOT)) for path in sources if "\nif __name__ ==" in path.read_text("utf8")}
    assert scripts == ENTRY_POINTS.keys() | OTHERS
    tests = "".join(path.read_text("utf8") for path in Path(__file__).parent.glob("test_*.py"))
    for where in ENTRY_POINTS.values():
        assert where in TARGETS or f"\ndef {where}(" in tests, where
