"""What a run left behind, damaged: it is taken up right or refused in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset import PretrainDataset
from eval.perplexity import read_blocks
from eval.questions import read_questions
from eval.style import read_polite_requests
from fuzz.hostile import Thrower, thrown
from fuzz.mutations import PLACES, damaged, put, strange_json, strange_safetensors
from model import MiniDeepSeek
from text.corpus.shard_set import ShardSet
from text.corpus.shards import prepare_shards
from text.tokenizer import Tokenizer
from training.adapters.adapter import Adapter
from training.adapters.lora import LoraSettings
from training.alignment.reference import load_log_probs
from training.distill.answers import Answer, Ask, Journal
from training.fingerprinted import save_arrays
from training.optim.build import OptimSettings, build_optimizer
from training.run.checkpoint import Progress, Snapshot, load_training_state, newest, read_progress
from training.run.log import read_metrics
from training.run.resume import WholeModel, find_checkpoint


@contextlib.contextmanager
def copy_of(whole: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(whole, Path(folder, whole.name)))


def damage(data: st.DataObject, folder: Path, names: list[str]) -> None:
    """One of the files, damaged or replaced."""
    name = data.draw(st.sampled_from(names))
    content = (folder / name).read_bytes()
    kinds = {".json": strange_json, ".safetensors": strange_safetensors}
    put(folder / name, data.draw(kinds.get(Path(name).suffix, damaged)(content)), data.draw(st.sampled_from(PLACES)))


def stepped(model: MiniDeepSeek) -> torch.optim.Optimizer:
    """An optimiser with a state."""
    optimizer = build_optimizer(model, OptimSettings())
    model(torch.arange(20)[None]).logits.sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MiniDeepSeek:
    from conftest import TINY

    from LMConfig import LMConfig

    sizes = {**TINY, "vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    return MiniDeepSeek(LMConfig(**sizes))


@pytest.fixture(scope="module")
def a_run(model: MiniDeepSeek, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint in it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    out.mkdir()
    progress = Progress(step=3, tokens=300, seconds=1.5, run={"seed": 0})
    data = {"journal": torch.arange(5)}
    snapshot = Snapshot(WholeModel(model), tokenizer, stepped(model), progress, data)
    snapshot.write(out / "step-3", snapshot.tensors)
    return out


def resumed(out: Path, model: MiniDeepSeek) -> Progress:
    """As the loop takes a run up, and one step further."""
    found = find_checkpoint(out, True, {"seed": 0})
    optimizer = build_optimizer(model, OptimSettings())
    WholeModel(model).load(found[0])
    load_training_state(found[0], model, optimizer)
    optimizer.step()
    return found[1]


STATE = ["training/progress.json", "training/state.safetensors", "model.safetensors", "config.json"]


@thrown(2)
@given(data=st.data())
def test_resuming(throw: Thrower, a_run: Path, model: MiniDeepSeek, data: st.DataObject) -> None:
    with copy_of(a_run) as out:
        names = [name for name in (*STATE, "training/manifest.json") if (out / "step-3" / name).is_file()]
        damage(data, out / "step-3", names)
        progress = throw(resumed, out, model).value
    if progress is not None:
        assert isinstance(progress.step, int) and progress.step >= 0 and progress.seconds >= 0


@thrown(0.5)
@given(
    name=st.sampled_from(("step-9", "step-99999999999999999999", "final", "step-x", "step-")),
    place=st.sampled_from(PLACES),
)
def test_what_lies_beside_checkpoints(throw: Thrower, a_run: Path, model: MiniDeepSeek, name: str, place: str) -> None:
    with copy_of(a_run) as out:
        put(out / name, b"x", place)
        throw(newest, out)
        throw(resumed, out, model)


def test_a_whole_run_is_taken_up(throw: Thrower, a_run: Path, model: MiniDeepSeek) -> None:
    assert throw(resumed, a_run, model).value == read_progress(a_run / "step-3")


@pytest.fixture(scope="module")
def adapter(model: MiniDeepSeek, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    folder.mkdir()
    Adapter.add(MiniDeepSeek(model.config), LoraSettings(), "base").save(folder)
    return folder


@thrown()
@given(data=st.data())
def test_an_adapter(throw: Thrower, adapter: Path, model: MiniDeepSeek, data: st.DataObject) -> None:
    with copy_of(adapter) as folder:
        damage(data, folder, ["adapter_config.json", "adapter_model.safetensors"])
        throw(lambda: Adapter.open(MiniDeepSeek(model.config), folder).merge())


@pytest.fixture(scope="module")
def shards(world: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    prepare_shards(str(world / "pretrain.csv"), tokenizer, folder, workers=1, val_fraction=0.1)
    return folder


def read_shards(folder: Path, tokenizer: Tokenizer) -> np.ndarray:
    dataset = PretrainDataset([(ShardSet.open(folder, tokenizer), 1.0)], 64, isolate=True)
    return dataset.batch(range(len(dataset)))["input_ids"].numpy()


@thrown()
@given(data=st.data())
def test_shards(throw: Thrower, shards: Path, tokenizer: Tokenizer, data: st.DataObject) -> None:
    """The checksums leave no damaged token unseen."""
    whole = read_shards(shards, tokenizer)
    with copy_of(shards) as folder:
        damage(data, folder, ["index.json", "train-00000.bin", "train-00000.npy"])
        found = throw(read_shards, folder, tokenizer).value
    assert found is None or np.array_equal(found, whole)


@thrown()
@given(data=st.data())
def test_a_journal_of_answers(throw: Thrower, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answers.jsonl")
        journal = Journal(file)
        for number in range(3):
            journal.add(Ask.of([{"role": "user", "content": "Q"}], number), Answer(f"A{number}", "stop", 3))
        damage(data, Path(folder), ["answers.jsonl"])
        throw(Journal, file)


@thrown()
@given(data=st.data())
def test_metrics_and_log_probs(throw: Thrower, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 1.25}\n')
        save_arrays(Path(folder, "r.safetensors"), {"log_probs": np.zeros(5, np.float32)}, "f")
        damage(data, Path(folder), ["metrics.jsonl", "r.safetensors"])
        throw(read_metrics, Path(folder, "metrics.jsonl"))
        throw(load_log_probs, Path(folder, "r.safetensors"), "f")


QUESTIONS = b'{"question": "1+1?", "answer": "2", "kind": "sum", "opening": "a", "closing": "b"}\n' * 3
INPUTS = {"questions": read_questions, "requests": read_polite_requests, "text": lambda path: list(read_blocks(path))}


@pytest.mark.parametrize("name", INPUTS)
@thrown()
@given(data=st.data())
def test_what_evaluations_read(throw: Thrower, name: str, data: st.DataObject) -> None:
    content = data.draw(damaged(QUESTIONS) | strange_json(QUESTIONS.splitlines()[0]))
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder, "q.jsonl"), content, data.draw(st.sampled_from(PLACES)))
        throw(INPUTS[name], Path(folder, "q.jsonl"))


def test_json_of_a_state_is_what_was_saved(a_run: Path) -> None:
    """The tests above damage files that a run really reads."""
    assert json.loads((a_run / "step-3" / "training" / "progress.json").read_bytes())["step"] == 3
