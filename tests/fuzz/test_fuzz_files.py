"""Folders with a damaged file at all that reads them: read right or refused in one line, never taken for another."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from data_files import file_bytes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

import dpo_train
import eval.comparison
import full_sft
import grpo_train
import lora_sft
import pretrain
from cli import parse
from dataset import PretrainDataset
from eval.compared_run import ComparedRun, open_runs
from eval.comparison import markdown
from eval.curves import draw as draw_curve
from eval.curves import read_curve
from eval.experts import draw as draw_loads
from eval.held_out import held_out_documents
from eval.infilling import read_gaps
from eval.needle import Haystack, read_needles
from eval.page import write_page
from eval.perplexity import read_blocks
from eval.questions import read_questions
from eval.style import read_polite_requests
from eval.verdict import compare_with, report
from fuzz.hostile import Outcome, Thrower, thrown
from fuzz.mutations import damaged_folder, files_of, lay_out
from fuzz.suites import SCORED, SUITES, measured, suite
from model import MiniDeepSeek
from model.checkpoint.gguf_export import export_gguf
from model.checkpoint.hf_import import import_folder
from text.corpus.shard_set import ShardSet
from text.corpus.shards import prepare_shards
from text.sources.registry import Registry, find_sources
from text.tokenizer import Tokenizer
from training.adapters.adapter import Adapter
from training.adapters.lora import LoraSettings
from training.alignment.reference import load_log_probs
from training.distill.answers import Answer, Ask, Journal
from training.fingerprinted import save_arrays
from training.optim.build import OptimSettings, build_optimizer
from training.run.checkpoint import Snapshot, WholeModel
from training.run.log import RunLog, read_metrics
from training.run.plots import draw_run
from training.run.progress import Progress
from training.run.resume import find_checkpoint
from training.run.state import load_training_state
from training.settings import model_config, save_resolved
from training.startup import open_checkpoint

ROOT = Path(__file__).parents[2]
PROBES = ("", "Hello 123 你好\n\n\t\0 é", "".join(map(chr, range(0x250))), "</s><|user|><think>", "𝄞🙂" * 3)


# What reads a folder, as a script does; an assertion in it holds whatever is damaged


def opened(folder: Path, tools: SimpleNamespace) -> list[int]:
    """A checkpoint, opened and used; returns its sizes, of which a damaged one has no others."""
    network, tokenizer = open_checkpoint(str(folder))
    network(torch.tensor([tokenizer.encode("春天来了 and so on 12")])).logits.sum().item()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts", "kv_lora_rank", "v_head_dim")
    return [getattr(network.config, name) for name in names]


def imported(folder: Path, tools: SimpleNamespace) -> None:
    import_folder(folder, folder.with_name("made"))


def exported(folder: Path, tools: SimpleNamespace) -> None:
    export_gguf(folder, folder.with_name("made"), "q8_0")


def tokenised(folder: Path, tools: SimpleNamespace) -> None:
    check_tokenizer(Tokenizer.from_folder(folder))


def check_tokenizer(found: Tokenizer) -> None:
    """What opens gives text back and only ids of its vocabulary."""
    for probe in PROBES:
        ids = found.encode(probe)
        assert found.decode(ids, skip_special_tokens=False) == probe
        assert all(len(found.special_ids) <= number < found.vocab_size for number in ids)


def resumed(folder: Path, tools: SimpleNamespace) -> None:
    """As the loop resumes a run, and one step further."""
    path, progress = find_checkpoint(folder, True, {"seed": 0})
    optimizer = build_optimizer(tools.model, OptimSettings())
    WholeModel(tools.model).load(path)
    load_training_state(path, tools.model, optimizer)
    optimizer.step()
    assert isinstance(progress.step, int) and progress.step >= 0 and progress.seconds >= 0


def adapted(folder: Path, tools: SimpleNamespace) -> None:
    Adapter.open(MiniDeepSeek(tools.model.config), folder).merge()


def read_shards(folder: Path, tools: SimpleNamespace) -> bytes:
    """The checksums leave no damaged token unseen."""
    data = PretrainDataset([(ShardSet.open(folder, tools.tokenizer), 1.0)], 64, isolate=True)
    return data.batch(range(len(data)))["input_ids"].numpy().tobytes()


def logged(folder: Path, tools: SimpleNamespace) -> None:
    """The log of a run: resumed, drawn as a script does at its end; loads of experts, whatever they are called."""
    RunLog(folder, 2, True)
    assert all(entry["step"] <= 2 for entry in read_metrics(folder / "metrics.jsonl"))
    draw_run(folder)
    domains = {"a$b$": torch.ones(2, 4), "b": torch.ones(2, 4)}
    draw_loads("$x", domains, folder / "e.png")


def compared(folder: Path, tools: SimpleNamespace) -> None:
    runs = open_runs(["a", "b"])
    markdown(runs)
    eval.comparison.draw(runs, Path("c.png"), "tokens")
    write_page(["a", "b"], Path("page", "report.html"))


def referred(folder: Path, tools: SimpleNamespace) -> None:
    """A run beside a reference curve; what is said of it is in lines that a terminal only shows."""
    curve, run = read_curve("demo.csv"), ComparedRun.open("a")
    said = report(curve, run, compare_with(curve, run))
    assert all(line.isprintable() for line in said)
    draw_curve(curve, [run], Path("c.png"))


def planted(folder: Path, tools: SimpleNamespace) -> None:
    haystack = Haystack(tools.tokenizer, ["春天来了。", "a b c"])
    for needle in read_needles(folder / "q.jsonl"):
        haystack.plant(needle, 500, 0.5, random.Random(0))


def held_out(folder: Path, tools: SimpleNamespace) -> None:
    assert list(held_out_documents(folder))


def sources_of(folder: Path, tools: Any = None) -> None:
    """Every entry of a registry asked for."""
    for file in (folder / "datasets.yaml", folder / "dataset_info.json"):
        for name in Registry.read(file).entries if file.is_file() else ():
            find_sources(name or "./", file, None)


def settled(kind: type) -> Callable[[Path, SimpleNamespace], None]:
    """As a script begins: settings, the model's sizes, and what was chosen kept."""

    def begin(folder: Path, tools: SimpleNamespace) -> None:
        settings = parse(kind, "", ["--config", str(folder / "recipe.yaml")])
        if hasattr(settings, "model"):
            model_config(settings.model)
        save_resolved(settings, folder / "resolved.yaml")

    return begin


# The whole files that are damaged


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same weights in two files and a list of them."""
    tensors = load(files["model.safetensors"])
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {"total_size": 1}, "weight_map": {one: file for file, some in parts.items() for one in some}}
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    shards = {file: save({name: tensors[name] for name in members}) for file, members in parts.items()}
    return {**rest, **shards, "model.safetensors.index.json": json.dumps(index).encode()}


def saved_run(folder: Path, tools: SimpleNamespace) -> dict[str, bytes]:
    optimizer = build_optimizer(tools.model, OptimSettings())
    tools.model(torch.arange(20)[None]).logits.sum().backward()
    optimizer.step()
    progress = Progress(step=3, tokens=300, seconds=1.5, run={"seed": 0})
    snapshot = Snapshot(WholeModel(tools.model), tools.tokenizer, optimizer, progress, {"journal": torch.arange(5)})
    snapshot.write(folder / "step-3", snapshot.tensors)
    return files_of(folder)


def saved_adapter(folder: Path, tools: SimpleNamespace) -> dict[str, bytes]:
    Adapter.add(MiniDeepSeek(tools.model.config), LoraSettings(), "base").save(folder)
    return files_of(folder)


def saved_shards(folder: Path, tools: SimpleNamespace) -> dict[str, bytes]:
    prepare_shards(str(tools.world / "pretrain.csv"), tools.tokenizer, folder, workers=1, val_fraction=0.1)
    return {name: content for name, content in files_of(folder).items() if "/" not in name and name != "lock"}


def saved_journal(folder: Path, tools: SimpleNamespace) -> dict[str, bytes]:
    journal = Journal(folder / "answers.jsonl")
    for number in range(3):
        journal.add(Ask.of([{"role": "user", "content": "Q"}], number), Answer(f"A{number}", "stop", 3))
    save_arrays(folder / "r.safetensors", {"log_probs": np.zeros(5, np.float32)}, "f")
    return files_of(folder)


def read_journal(folder: Path, tools: SimpleNamespace) -> None:
    Journal(folder / "answers.jsonl")
    load_log_probs(folder / "r.safetensors", "f")


def pretraining(folder: Path, tools: SimpleNamespace) -> dict[str, bytes]:
    """What a pretraining leaves that eval/held_out.py and eval/report.py ask for."""
    tools.tokenizer.save(folder / "tokenizer")
    rows = (tools.world / "pretrain.csv").read_text(encoding="utf8").splitlines(keepends=True)[:40]
    (folder / "text.csv").write_text("".join(rows), encoding="utf8")
    config = {
        "data": "text.csv", "tokenizer": "tokenizer", "ckpt": "", "column": None, "shards": "shards",
        "encoding": "utf-8", "min_chars": 1, "val_fraction": 0.3, "on_error": "skip", "sequence_length": 32,
        "val_tokens": 100, "micro_tokens": 64, "datasets": "none.yaml",
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf8")
    return files_of(folder)


ENTRIES = [
    {
        "step": step, "tokens": 100 * step, "seconds": 1.5 * step, "loss": 5.0 - step, "lr": 0.1, "grad_norm": 1.0,
        "tokens_per_second": 100.0, "mfu": 0.1, "max_vio": [0.5, 0.25], "val_bits_per_byte": 2.0,
        "expert_load": [[0.5, 0.5], [0.25, 0.75]], "memory": 10**9, "skipped": 0, "held_out": {"text": "a.csv 01"},
    }
    for step in range(4)
]  # fmt: skip
RUNS = {f"{name}/metrics.jsonl": file_bytes("a.jsonl", ENTRIES) for name in "ab"}
RUNS |= {f"{name}/eval/final/scores.json": SCORED for name in "ab"}
LLAMA_FACTORY = {
    "alpaca": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}, "num_samples": 10},
    "pairs": {"file_name": "b.jsonl", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
    "talk": {"hf_hub_url": "owner/name", "subset": "zh", "split": "train", "formatting": "sharegpt",
             "columns": {"messages": "conversations"}, "tags": {"role_tag": "from", "user_tag": "human"}},
}  # fmt: skip
QUESTIONS = b'{"question": "1+1?", "answer": "2", "kind": "sum", "opening": "a", "closing": "b"}\n' * 3
NEEDLES = [
    {"fact": f"{n} 在河边。", "question": f"{n} 在", "answer": "河边", "choices": ["河边", "湖边"]} for n in "abc"
]
GAPS = [{"prefix": f"{n}加", "middle": "1", "suffix": "等于3", "kind": "sum"} for n in range(3)]
FACTS = {"seeds": [0, 1], "tokens": 300, "tokenizer": "t", "held_out": "a.csv 01", "settings": {"optim.lr": 0.1},
         "signs": {"grad_norm": 0.1, "max_vio_worst": 0.2}}  # fmt: skip
CURVE = "".join(f"# {line}\n" for line in yaml.safe_dump(FACTS).splitlines()) + "measure,tokens,mean,sigma,step_sigma\n"
CURVE += "".join(f"loss,{100 * n},{5 - n},0.1,0.2\nval_bits_per_byte,{100 * n},2,0.1,0\n" for n in (1, 2, 3))
REFERRED = {"demo.csv": CURVE.encode(), "a/metrics.jsonl": file_bytes("a.jsonl", ENTRIES),
            "a/config.yaml": b"seed: 1\noptim: {lr: 0.2}\nmodel: {preset: demo}\n"}  # fmt: skip
STAGES = {
    "pretrain": (pretrain.PretrainSettings, {"data": "a", "out": "b"}),
    "sft": (full_sft.SFTSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "lora": (lora_sft.LoraSFTSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "dpo": (dpo_train.DPOSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "grpo": (grpo_train.GRPOSettings, {"data": "a", "out": "b", "ckpt": "c"}),
}


def recipe(name: str) -> dict[str, bytes]:
    content = {**yaml.safe_load((ROOT / "configs" / "demo" / f"{name}.yaml").read_bytes()), **STAGES[name][1]}
    return {"recipe.yaml": yaml.safe_dump(content).encode()}


class Target(NamedTuple):
    """What reads a folder; what makes it: files, or a function; the share of cases; which files are damaged, or all."""

    action: Callable[[Path, SimpleNamespace], Any]
    files: dict[str, bytes] | Callable[[Path, SimpleNamespace], dict[str, bytes]]
    share: float = 1.0
    names: tuple[str, ...] = ()


TARGETS = {
    "checkpoint": Target(opened, lambda _, tools: tools.checkpoint),
    "sharded checkpoint": Target(opened, lambda _, tools: sharded(tools.checkpoint)),
    "import": Target(imported, lambda _, tools: tools.checkpoint),
    "export": Target(exported, lambda _, tools: tools.checkpoint),
    "tokenizer": Target(tokenised, lambda _, tools: tools.checkpoint, 2, ("tokenizer.json",)),
    "run": Target(resumed, saved_run, 2),
    "adapter": Target(adapted, saved_adapter),
    "shards": Target(read_shards, saved_shards),
    "journal": Target(read_journal, saved_journal),
    "log": Target(logged, {"metrics.jsonl": file_bytes("a.jsonl", ENTRIES)}, 0.2),
    "comparison": Target(compared, RUNS, 0.3),
    "pretraining": Target(held_out, pretraining, 0.5, ("config.yaml",)),
    "datasets.yaml": Target(sources_of, {"datasets.yaml": (ROOT / "datasets.yaml").read_bytes()}),
    "dataset_info.json": Target(sources_of, {"dataset_info.json": json.dumps(LLAMA_FACTORY).encode()}),
    "questions": Target(lambda folder, _: read_questions(folder / "q.jsonl"), {"q.jsonl": QUESTIONS}),
    "needles": Target(planted, {"q.jsonl": file_bytes("a.jsonl", NEEDLES)}),
    "gaps": Target(lambda folder, _: read_gaps(folder / "q.jsonl"), {"q.jsonl": file_bytes("a.jsonl", GAPS)}),
    "reference": Target(referred, REFERRED, 0.3),
    "requests": Target(lambda folder, _: read_polite_requests(folder / "q.jsonl"), {"q.jsonl": QUESTIONS}),
    "text": Target(lambda folder, _: list(read_blocks(folder / "q.jsonl")), {"q.jsonl": QUESTIONS}),
    **{f"recipe of {name}": Target(settled(kind), recipe(name), 0.5) for name, (kind, _) in STAGES.items()},
    **{f"suite {name}": Target(measured, suite(name), 0.3) for name in SUITES},
}


@pytest.fixture(autouse=True, scope="module")
def not_rendered() -> Iterator[None]:
    """Pictures are laid out, but not made, which would take seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        yield


def thrown_at(throw: Thrower, target: Target, folder: Path, tools: SimpleNamespace) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return throw(target.action, folder, tools)


@pytest.mark.parametrize("name", TARGETS)
def test_a_folder_with_a_damaged_file(name, throw, tools, tmp_path):
    target = TARGETS[name]
    files = target.files if isinstance(target.files, dict) else target.files(tmp_path, tools)
    whole = thrown_at(throw, target, lay_out(tmp_path / "whole" / "case", files), tools)
    assert whole.code == 0  # else the cases would prove nothing

    @thrown(target.share)
    @given(data=st.data())
    def case(data: st.DataObject) -> None:
        with damaged_folder(data.draw, files, list(target.names or files)) as folder:
            done = thrown_at(throw, target, folder, tools)
            if target.action in (opened, read_shards):
                assert done.value is None or done.value == whole.value
            if target.action in (imported, exported):
                assert folder.with_name("made").exists() == (done.code == 0)

    case()
