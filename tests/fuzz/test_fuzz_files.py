"""Folders with a damaged file at all that reads them: read right or refused in one line, never taken for another."""

from __future__ import annotations

import copy
import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
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
from eval.compared_run import open_runs
from eval.comparison import markdown
from eval.experts import draw as draw_loads
from eval.held_out import held_out_documents
from eval.perplexity import read_blocks
from eval.questions import read_questions
from eval.score_files import read_scores, write_scores
from eval.scores import Item, Measured, Score, score_items
from eval.style import read_polite_requests
from eval.tasks.opened import open_tasks
from eval.tasks.problems import judge
from eval.tasks.replies import as_text, describe, first_answer, judge_answer, judge_style
from fuzz.hostile import Outcome, Thrower, thrown
from fuzz.mutations import PLACES, damaged_folder, files_of, lay_out, put, values, written
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.gguf_export import export_gguf
from model.checkpoint.hf_import import import_folder
from text.corpus.shard_set import ShardSet
from text.corpus.shards import prepare_shards
from text.sources.registry import Registry, find_sources
from text.tokenizer import Tokenizer
from training.adapters.adapter import Adapter
from training.adapters.lora import LoraSettings
from training.alignment.reference import load_log_probs, save_log_probs
from training.distill.answers import Answer, Ask, Journal
from training.optim.build import OptimSettings, build_optimizer
from training.run.checkpoint import Progress, Snapshot, newest
from training.run.log import RunLog, read_metrics
from training.run.plots import draw_run
from training.run.resume import WholeModel, find_checkpoint, restore
from training.settings import model_config, save_resolved
from training.startup import open_checkpoint

ROOT = Path(__file__).parents[2]
PROBES = ("", "Hello 123 你好\n\n\t\0 é", "".join(map(chr, range(0x250))), "</s><|user|><think>", "𝄞🙂" * 3)


def as_csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


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
    restore(path, WholeModel(tools.model), optimizer)
    optimizer.step()
    assert isinstance(progress.step, int) and progress.step >= 0 and progress.seconds >= 0


def adapted(folder: Path, tools: SimpleNamespace) -> None:
    Adapter.open(MiniDeepSeek(tools.model.config), folder).merge()


def read_shards(folder: Path, tools: SimpleNamespace) -> bytes:
    """The checksums leave no damaged token unseen."""
    data = PretrainDataset([(ShardSet.open(folder, tools.tokenizer), 1.0)], 64, isolate=True)
    return data.batch(range(len(data)))["input_ids"].numpy().tobytes()


def logged(folder: Path, tools: SimpleNamespace) -> None:
    """The log of a run: resumed, drawn as a script does at its end, and beside the loads of experts."""
    RunLog(folder, 2, True, "", {})
    assert all(entry["step"] <= 2 for entry in read_metrics(folder / "metrics.jsonl"))
    draw_run(folder)
    domains = {"a$b$": torch.ones(2, 4), "b": torch.ones(2, 4)}
    draw_loads("$x", domains, read_metrics(folder / "metrics.jsonl"), folder / "e.png")


def compared(folder: Path, tools: SimpleNamespace) -> None:
    runs = open_runs(["a", "b"])
    markdown(runs)
    eval.comparison.draw(runs, Path("c.png"), "tokens")


def held_out(folder: Path, tools: SimpleNamespace) -> None:
    assert list(held_out_documents(folder))


def sources_of(folder: Path, tools: Any = None) -> None:
    """Every entry of a registry asked for, as each stage would."""
    file = next(folder / name for name in ("datasets.yaml", "dataset_info.json") if (folder / name).exists())
    for name in Registry.read(file).entries:
        for kind in ("text", "chat", "preference", "prompt", None):
            find_sources(name or "./", file, kind)


def settled(kind: type) -> Callable[[Path, SimpleNamespace], None]:
    """As a script begins: settings, the model's sizes, and what was chosen kept."""

    def begin(folder: Path, tools: SimpleNamespace) -> None:
        settings = parse(kind, "", ["--config", str(folder / "recipe.yaml")])
        if hasattr(settings, "model"):
            model_config(settings.model)
        save_resolved(settings, folder / "resolved.yaml")

    return begin


JUDGES = {"exact_match": judge, "questions": judge_answer, "style": judge_style, "quality": describe}


def measured(folder: Path, tools: Any = None) -> list[Measured]:
    """As eval/run.py, but for lm-evaluation-harness and the model: the likeliest choice is the shortest, and the reply
    to a question its own beginning; a page, and no picture."""
    if (folder / "out").exists():
        read_scores(folder / "out")
    found = []
    for task in open_tasks(str(folder / "suite.yaml"), theirs_first=False):
        docs = task.settings.docs()
        assert docs
        samples = task.settings.keys().get("repeats", 1)
        items = [Item(doc["group"], values_of(task.kind, doc, samples), chance(doc)) for doc in docs]
        scores = score_items(items, {}, bootstrap=task.kind == "quality")
        assert items and scores
        found.append(Measured(task.name, vars(task.settings), scores, len(items), 0, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.score_files.draw", lambda *_: None)  # a tenth of a second
        write_scores(folder / "out", "model", {"ckpt": "a", "dtype": "fp32", "files": []}, found)
    return found


def values_of(kind: str, doc: dict[str, Any], samples: int) -> dict[str, Any]:
    if kind == "multiple_choice":
        assert doc["prompt"] and len(doc["choices"]) > doc["answer"]
        shortest = min(range(len(doc["choices"])), key=lambda place: len(doc["choices"][place]))
        return {"acc": float(shortest == doc["answer"])}
    if kind == "text":
        size = len(doc["text"].encode())
        return {"bits_per_byte": (-2.0 * size, size)}
    assert as_text(doc["turns"])
    return JUDGES[kind](doc, [[first_answer(doc["question"])] * samples])


def chance(doc: dict[str, Any]) -> float | None:
    return 1 / len(doc["choices"]) if "choices" in doc else None


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
    with Journal(folder / "answers.jsonl") as journal:
        for number in range(3):
            journal.add(Ask.of([{"role": "user", "content": "Q"}], number), Answer(f"A{number}", "stop", 3))
    save_log_probs(folder / "r.safetensors", np.zeros(5, np.float32), "f")
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
SCORES = [Score("all", "acc", 0.5, 0.4, 0.6, 0.25, 10), Score("all", "bits_per_byte", 2.0, items=10, share=False)]
WORDS = Measured("words", {"kind": "TextLikelihood", "chunk": 2}, SCORES, 10, 0, 1.0, "ab")
SCORED = json.dumps({"ckpt": "a", "weights": {}, "suites": {"words": WORDS.to_dict()}}).encode()
RUNS = {f"{name}/metrics.jsonl": as_lines(ENTRIES) for name in "ab"}
RUNS |= {f"{name}/eval/final/scores.json": SCORED for name in "ab"}
LLAMA_FACTORY = {
    "alpaca": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}, "num_samples": 10},
    "pairs": {"file_name": "b.jsonl", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
    "talk": {"hf_hub_url": "owner/name", "subset": "zh", "split": "train", "formatting": "sharegpt",
             "columns": {"messages": "conversations"}, "tags": {"role_tag": "from", "user_tag": "human"}},
}  # fmt: skip
QUESTIONS = b'{"question": "1+1?", "answer": "2", "kind": "sum", "opening": "a", "closing": "b"}\n' * 3
CHOICES = ["春天", "夏天, 也许", "autumn", "winter"]
ASKED = [f"第{number}题：现在是什么季节？" for number in range(5)]
HEADED = [[str(number), text, *CHOICES, "ABCD"[number % 4]] for number, text in enumerate(ASKED)]
PROBLEMS = as_lines([{"question": f"{n} + 1?", "answer": f"It is {n} + 1 = {n + 1}.\n#### {n + 1}"} for n in range(5)])
REPLIES = as_lines([{"question": f"{n}?", "answer": f"{n}", "kind": "$n$", "opening": "a", "closing": "b"}
                    for n in range(5)])  # fmt: skip
# What measures a layout, and its files.
SUITES: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {
    "ceval": ({"multiple_choice": {"data": ".", "split": "val", "shots": 2, "chat": True}}, {
        "val/law_val.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer"], *HEADED]),
        "dev/law_dev.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer", "explanation"],
                                   *([*row, "因为"] for row in HEADED)]),
    }),
    "cmmlu": ({"multiple_choice": {"data": ".", "split": "test", "form": "text", "cue": ""}}, {
        f"test/{name}.csv": as_csv([["", "Question", "A", "B", "C", "D", "Answer"], *HEADED]) for name in ("law", "art")
    }),
    "mmlu": ({"multiple_choice": {"data": ".", "split": "test", "intro": "About {subject}.\n\n"}},
             {"test/anatomy_test.csv": as_csv([row[1:] for row in HEADED])}),
    "arc": ({"multiple_choice": {"data": "a.jsonl"}}, {"a.jsonl": as_lines(
        [{"question": text, "choices": {"text": CHOICES, "label": list("ABCD")}, "answer": 1, "subject": "s"}
         for text in ASKED])}),
    "gsm8k": ({"exact_match": {"data": "test.jsonl", "max_new_tokens": 40}}, {"test.jsonl": PROBLEMS}),
    "sampled": ({"exact_match": {"data": "test.jsonl", "shots_data": "train.jsonl", "samples": 2, "temperature": 1.0,
                                 "k": [1, 2], "shots": 1, "max_new_tokens": 9}},
                {"test.jsonl": PROBLEMS, "train.jsonl": PROBLEMS}),
    "text": ({"text": {"data": "a.jsonl", "window": 16, "stride": 8}},
             {"a.jsonl": as_lines([{"text": t} for t in ASKED])}),
    "plain": ({"text": {"data": "a.txt", "window": 16, "stride": 8}}, {"a.txt": "\n".join(ASKED).encode()}),
    "questions": ({"questions": {"data": "q.jsonl", "max_new_tokens": 5}}, {"q.jsonl": REPLIES}),
    "style": ({"style": {"data": "q.jsonl", "max_new_tokens": 5}}, {"q.jsonl": REPLIES}),
    "quality": ({"quality": {"data": "p.jsonl", "max_new_tokens": 20}}, {"p.jsonl": REPLIES}),
}  # fmt: skip
STAGES = {
    "pretrain": (pretrain.PretrainSettings, {"data": "a", "out": "b"}),
    "sft": (full_sft.SFTSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "lora": (lora_sft.LoraSFTSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "dpo": (dpo_train.DPOSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "grpo": (grpo_train.GRPOSettings, {"data": "a", "out": "b", "ckpt": "c"}),
}


def suite(name: str) -> dict[str, bytes]:
    """The files of a suite, and what an earlier measurement left."""
    content, files = SUITES[name]
    return {**files, "suite.yaml": yaml.safe_dump(content).encode(), "out/scores.json": SCORED}


def recipe(name: str) -> dict[str, bytes]:
    content = {**yaml.safe_load((ROOT / "configs" / "demo" / f"{name}.yaml").read_bytes()), **STAGES[name][1]}
    return {"recipe.yaml": yaml.safe_dump(content).encode()}


class Target(NamedTuple):
    """What reads a folder; what makes it: files, or a function; the share of cases; which files are damaged, or all."""

    action: Callable[[Path, SimpleNamespace], Any]
    files: dict[str, bytes] | Callable[[Path, SimpleNamespace], dict[str, bytes]]
    share: float = 1.0
    names: tuple[str, ...] = ()


CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
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
    "log": Target(logged, {"metrics.jsonl": as_lines(ENTRIES)}, 0.2),
    "comparison": Target(compared, RUNS, 0.3),
    "pretraining": Target(held_out, pretraining, 0.5, ("config.yaml",)),
    "datasets.yaml": Target(sources_of, {"datasets.yaml": (ROOT / "datasets.yaml").read_bytes()}),
    "dataset_info.json": Target(sources_of, {"dataset_info.json": json.dumps(LLAMA_FACTORY).encode()}),
    "questions": Target(lambda folder, _: read_questions(folder / "q.jsonl"), {"q.jsonl": QUESTIONS}),
    "requests": Target(lambda folder, _: read_polite_requests(folder / "q.jsonl"), {"q.jsonl": QUESTIONS}),
    "text": Target(lambda folder, _: list(read_blocks(folder / "q.jsonl")), {"q.jsonl": QUESTIONS}),
    **{f"recipe of {name}": Target(settled(kind), recipe(name), 0.5) for name, (kind, _) in STAGES.items()},
    **{f"suite {name}": Target(measured, suite(name), 0.3) for name in SUITES},
}


@pytest.fixture(scope="module")
def tools(model: MiniDeepSeek, tokenizer: Tokenizer, checkpoint: dict[str, bytes], world: Path) -> SimpleNamespace:
    return SimpleNamespace(model=model, tokenizer=tokenizer, checkpoint=checkpoint, world=world)


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
def test_a_folder_with_a_damaged_file(name: str, throw: Thrower, tools: SimpleNamespace, tmp_path: Path) -> None:
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


@thrown(2)
@given(data=st.data())
def test_a_config_with_other_values(throw: Thrower, tools: SimpleNamespace, data: st.DataObject) -> None:
    """Single fields replaced, so that more of them get far; what `LMConfig` takes can be built, without memory."""
    config = json.loads(tools.checkpoint["config.json"])
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[name] = data.draw(values() | st.integers(-3, 100) | st.floats())
    made = throw(LMConfig.from_dict, config).value
    if made is not None and made.num_hidden_layers < 100 and made.num_nextn_predict_layers < 100:
        with torch.device("meta"):
            throw(MiniDeepSeek, made)
    with tempfile.TemporaryDirectory() as place:
        throw(opened, lay_out(Path(place), {**tools.checkpoint, "config.json": written(config)}), tools)


OTHERS = (
    {"type": "Lowercase"}, {"type": "NFKC"}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}, {"type": "Whitespace"}, {"type": "Strip"},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}, {"type": "Fuse"}, {"type": "Metaspace"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
    {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
    {"strategy": {"Fixed": 4}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
     "pad_token": "<pad>"},
)  # fmt: skip
PARTS = ("version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation",
         "padding", "model")  # fmt: skip


@thrown()
@given(part=st.sampled_from(PARTS), other=st.sampled_from(OTHERS).map(copy.deepcopy) | values())
def test_a_tokenizer_with_parts_of_another(throw: Thrower, tools: SimpleNamespace, part: str, other: Any) -> None:
    content = {**json.loads(tools.checkpoint["tokenizer.json"]), part: other}
    with tempfile.TemporaryDirectory() as place:
        throw(tokenised, lay_out(Path(place), {"tokenizer.json": written(content)}), tools)


@pytest.mark.parametrize("change", ["gap", "twice", "beyond", "lost byte"])
def test_ids_that_do_not_match_the_vocabulary(throw: Thrower, tools, change: str, tmp_path: Path) -> None:
    content = json.loads(tools.checkpoint["tokenizer.json"])
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    if change == "lost byte":
        vocab["Ġxyz"] = vocab.pop("Ā")  # the letter of the byte 0
    else:
        vocab[last] = {"gap": vocab[last] + 5, "twice": vocab[last] - 1, "beyond": 2**32 - 1}[change]
    done = throw(tokenised, lay_out(tmp_path, {"tokenizer.json": json.dumps(content).encode()}), tools)
    assert done.code == 2 and "tokenizer.json" in done.err, done


@pytest.mark.parametrize("place", sorted(set(PLACES)))
@pytest.mark.parametrize("name", ["step-9", "step-99999999999999999999", "final", "step-x", "step-"])
def test_what_lies_beside_checkpoints(throw: Thrower, tools: SimpleNamespace, name: str, place: str, tmp_path) -> None:
    saved_run(tmp_path, tools)
    put(tmp_path / name, b"x", place)
    throw(newest, tmp_path)
    throw(resumed, tmp_path, tools)
