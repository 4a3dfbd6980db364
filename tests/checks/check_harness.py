"""eval/run.py with lm-eval: what it measures is written and resumes where it was stopped, for models of any make.

pytest tests/checks/check_harness.py, as `make check-lm-eval` does: lm-eval is no requirement of the other tests.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from cli import call
from errors import UserError
from eval.harness import CacheLM, OtherLM, measure, open_lm
from eval.likelihood import CacheScorer
from eval.model_path import ModelPath
from eval.run import run as measure_all
from eval.score_files import read_scores
from eval.scores import Measured
from eval.tasks.opened import Task, open_task
from text.tokenizer import SPECIAL_TOKENS, Tokenizer


def main() -> None:
    """The script, as its last line calls it."""
    call(measure_all, "")


def opened(folder: Path) -> CacheLM | OtherLM:
    return open_lm(ModelPath.find(str(folder)), torch.device("cpu"), torch.float32)


def measured(task: Task, lm: CacheLM | OtherLM, out: Path, limit: int = 0) -> Measured:
    return measure(task, task.settings.docs(limit) if task.settings else [], lm, {}, out, limit)


@pytest.fixture(scope="module")
def own(pretrained) -> CacheLM:
    return opened(pretrained / "final")


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer, tmp_path_factory) -> OtherLM:
    """Random weights in a folder as transformers writes it, with `tokenizer` and no chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=600)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).save_pretrained(folder)
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf8")
    return opened(folder)


@pytest.fixture
def tasks(tmp_path, world) -> dict[str, Task]:
    """A task of each way to ask: text, letters, choices' text, a conversation's choices, answers."""
    rng = random.Random(0)
    lines = (world / "heldout_questions.jsonl").read_text(encoding="utf8").splitlines(keepends=True)[::20]
    (tmp_path / "q.jsonl").write_text("".join(lines), encoding="utf8")
    (tmp_path / "t.txt").write_text((world / "heldout.txt").read_text(encoding="utf8")[:2000], encoding="utf8")
    for split, size in (("dev", 5), ("test", 300)):
        (tmp_path / "exam" / split).mkdir(parents=True)
        rows = [f"What is {rng.randrange(1000)}?,{rng.random()},x,yes,no,{rng.choice('ABCD')}\n" for _ in range(size)]
        (tmp_path / "exam" / split / f"high_school_{split}.csv").write_text("".join(rows), encoding="utf8")
    exam = {"data": str(tmp_path / "exam")}
    for name, content in {
        "words": {"text": {"data": str(tmp_path / "t.txt"), "window": 200, "stride": 100}},
        "letters": {"multiple_choice": {**exam, "shots": 2}},
        "choices": {"multiple_choice": {**exam, "form": "text"}},
        "chat": {"multiple_choice": {**exam, "form": "text", "shots": 1, "chat": True}},
        "asked": {"questions": {"data": str(tmp_path / "q.jsonl"), "max_new_tokens": 8}},
        "looks": {"quality": {"data": str(tmp_path / "q.jsonl"), "max_new_tokens": 8, "temperature": 0}},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf8")
    names = ("words", "letters", "choices", "chat", "asked", "looks")
    return {name: open_task(str(tmp_path / f"{name}.yaml")) for name in names}


def test_tasks_are_measured_and_written_as_json_page_and_picture(pretrained, tasks, tmp_path, run):
    out = tmp_path / "out"
    given = ["--ckpt", pretrained / "final", "--out", out, "--device", "cpu", "--dtype", "fp32"]
    done = run(main, *given, "--tasks", f"{tmp_path / 'words.yaml'},{tmp_path / 'asked.yaml'}")
    assert done.code == 0, done.err
    found = json.loads((out / "scores.json").read_text(encoding="utf8"))
    bits, perplexity = found["suites"]["words"]["scores"]
    assert bits["metric"] == "bits_per_byte" and 0 < bits["value"] < 8 and perplexity["value"] > 1
    asked = found["suites"]["asked"]
    assert asked["items"] == len(tasks["asked"].settings.docs())
    assert asked["settings"]["kind"] == "questions" and found["weights"]["dtype"] == "fp32"
    page = (out / "scores.md").read_text(encoding="utf8")
    assert f"| words | all | bits_per_byte | {bits['value']:.4f} |" in page and "## asked" in page
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "bits_per_byte" in done.out and str(out / "scores.json") in done.out
    # Another task joins; what other weights had is forgotten.
    assert run(main, *given, "--suite", tmp_path / "asked.yaml", "--limit", 3).code == 0
    again = read_scores(out)["suites"]
    assert again["words"] == found["suites"]["words"] and again["asked"]["items"] == 3
    assert run(main, *given, "--tasks", tmp_path / "words.yaml", "--dtype", "bf16").code == 0
    assert list(read_scores(out)["suites"]) == ["words"]


def test_a_measurement_that_was_stopped_asks_only_the_rest(own, tasks, tmp_path, monkeypatch):
    scored, score = [], CacheScorer._scores
    monkeypatch.setattr(CacheScorer, "_scores", lambda self, items: scored.extend(items) or score(self, items))
    monkeypatch.setattr("eval.likelihood.AT_ONCE", 1000)
    whole = measured(tasks["choices"], own, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stopping(self, items):
        for number, found in enumerate(score(self, items)):
            if number == 100:
                raise Stopped
            yield found

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(CacheScorer, "_scores", stopping)
        measured(tasks["choices"], own, tmp_path / "cut")
    scored.clear()
    assert measured(tasks["choices"], own, tmp_path / "cut").scores == whole.scores and 190 < len(scored) <= 200
    scored.clear()
    assert measured(tasks["choices"], own, tmp_path / "cut").scores == whole.scores and not scored  # all is known
    (file,) = (tmp_path / "cut").rglob("*.db")
    file.write_bytes(file.read_bytes()[:5000] + b"x" * 5000)
    assert measured(tasks["choices"], own, tmp_path / "cut").scores == whole.scores and len(scored) > 290


def test_this_projects_folder_through_transformers_gives_the_same(own, pretrained, tasks, tmp_path):
    other = open_lm(ModelPath(pretrained / "final"), torch.device("cpu"), torch.float32)
    assert isinstance(own, CacheLM) and isinstance(other, OtherLM)
    for name, task in tasks.items():
        ours, theirs = (measured(task, lm, tmp_path / str(type(lm)), limit=40) for lm in (own, other))
        assert ours.content == theirs.content
        for a, b in zip(ours.scores, theirs.scores, strict=True):
            assert (a.metric, a.items) == (b.metric, b.items) and a.value == pytest.approx(b.value, rel=1e-4), name


def test_a_model_that_knows_nothing_is_at_chance(llama, tiny_model, tokenizer, tasks, tmp_path):
    """Whatever the form and the number of worked questions, chance lies in the interval, and the interval is narrow."""
    tiny_model(vocab_size=600, max_position_embeddings=256).save_pretrained(tmp_path / "untrained")
    tokenizer.save(tmp_path / "untrained")
    for lm in (llama, opened(tmp_path / "untrained")):
        for name in ("letters", "choices"):
            for score in measured(tasks[name], lm, tmp_path / str(type(lm))).scores:
                assert score.low < score.chance == 0.25 < score.high and score.high - score.low < 0.11
                assert score.items == 300


def test_a_model_without_turns_is_asked_in_text(llama, tasks, tmp_path):
    assert not llama.chats and llama.max_length == 256
    found = measured(tasks["asked"], llama, tmp_path)
    assert found.items == len(tasks["asked"].settings.docs()) and found.scores[0].value == 0.0


def test_tasks_of_lm_eval_are_run_as_they_are(own, tmp_path, monkeypatch):
    rows = [{"q": f"{n} + 1 = ", "c": [str(n), str(n + 1)], "a": 1} for n in range(9)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "theirs.yaml").write_text(
        f"task: theirs\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'r.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: c\ndoc_to_target: a\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = measured(open_task(str(tmp_path / "theirs.yaml")), own, tmp_path / "out", limit=8)
    (score,) = found.scores
    assert (score.metric, score.items, score.chance) == ("acc", 8, 0.5) and score.low < score.value < score.high
    (tmp_path / "other.yaml").write_text((tmp_path / "theirs.yaml").read_text().replace("task: theirs", "task: other"))
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [theirs, other]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            "eval.harness.TaskManager", lambda **_: TaskManager(include_path=tmp_path, include_defaults=False)
        )
        found = measured(open_task("both"), own, tmp_path / "out")
    assert [(score.group, score.items) for score in found.scores] == [
        ("all", 18), ("mean of subjects", 18), ("theirs", 9), ("other", 9)
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--tasks demo-question: neither a task.*; did you mean demo-questions"):
        measured(open_task("demo-question"), own, tmp_path / "out")


def write_gguf(path: Path, tokenizer: Tokenizer) -> None:
    """A one-layer llama whose vocabulary is the tokenizer's."""
    model, hidden, inner = json.loads(tokenizer.raw.to_str())["model"], 32, 48
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in {
        "tokenizer_model": "gpt2", "tokenizer_pre": "qwen2", "token_list": tokens, "token_types": kinds,
        "token_merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "context_length": 128,
        "embedding_length": hidden, "block_count": 1, "feed_forward_length": inner, "head_count": 2,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": hidden // 2,
        "vocab_size": len(tokens),
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    shapes = {f"attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    shapes |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(tokens), hidden), "output.weight": (len(tokens), hidden)}
    rng = np.random.default_rng(0)
    for name, shape in {**tensors, "output_norm.weight": (hidden,)}.items():
        writer.add_tensor(name, (rng.normal(size=shape) / 6).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_measured(tokenizer, tasks, tmp_path):
    write_gguf(tmp_path / "small.gguf", tokenizer)
    found = opened(tmp_path / "small.gguf")
    assert isinstance(found, OtherLM) and (found.max_length, found.chats, found.eot_token_id) == (128, False, 2)
    assert found.tok_encode("月牙镇 the town") == tokenizer.encode("月牙镇 the town")
    score = measured(tasks["words"], found, tmp_path / "out").scores[0]
    assert score.metric == "bits_per_byte" and score.value > 1


def test_what_transformers_does_not_open_is_one_line(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF rest")
    for name, content in (("alien", {"model_type": "unheard_of"}), ("adapter", None)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / ("config.json" if content else "adapter_config.json")
        file.write_text(json.dumps(content or {}))
    for name, what in {
        "broken.gguf": "transformers does not open it",
        "alien": "transformers does not open it",
        "adapter": "is an adapter, not a model; give the checkpoint",
    }.items():
        with pytest.raises(UserError, match=f"^{tmp_path / name}: {what}") as error:
            opened(tmp_path / name)
        assert "\n" not in str(error.value)
