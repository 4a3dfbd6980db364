"""Registries, YAML settings and command lines: read, or refused in one line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import distill
import dpo_train
import full_sft
import grpo_train
import lora_sft
import pretrain
from cli import parse
from fuzz.hostile import Thrower, thrown
from fuzz.mutations import DEEP, PLACES, damaged, put, strange, strange_json
from text.sources.registry import Registry, find_sources
from training.settings import model_config, save_resolved

ROOT = Path(__file__).parents[2]
LLAMA_FACTORY = {
    "alpaca": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}, "num_samples": 10},
    "pairs": {"file_name": "b.jsonl", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
    "talk": {"hf_hub_url": "owner/name", "subset": "zh", "split": "train", "formatting": "sharegpt",
             "columns": {"messages": "conversations"}, "tags": {"role_tag": "from", "user_tag": "human"}},
}  # fmt: skip
# A few lines that would be a billion values.
LAUGHS = "\n".join(["a0: &a0 [ha, ha]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))])


@st.composite
def strange_yaml(draw: Callable[..., Any], original: bytes) -> bytes:
    """The bytes of a YAML file, its structure or the bytes themselves changed; or values that grow as they are read."""
    kind = draw(st.sampled_from(("bytes", "structure", "structure", "structure", "laughs")))
    if kind == "bytes":
        return draw(damaged(original))
    text = yaml.safe_dump(draw(strange(yaml.safe_load(original))), allow_unicode=draw(st.booleans()))
    text = text.replace(f"'{DEEP}'", "[" * 3000 + "]" * 3000)
    if kind == "laughs":
        lines = text.splitlines()
        places = [number for number, line in enumerate(lines) if ": " in line] or [0]
        chosen = draw(st.sampled_from(places))
        lines[chosen] = lines[chosen].partition(": ")[0] + ": *a29"
        text = "\n".join([LAUGHS, *lines])
    return text.encode("utf-8", "surrogatepass")


def sources_of(file: Path) -> None:
    """Every entry asked for, as each stage would."""
    for name in Registry.read(file).entries:
        for kind in ("text", "chat", "preference", "prompt", None):
            find_sources(name or "./", file, kind)


@thrown()
@given(data=st.data())
def test_datasets_yaml(throw: Thrower, data: st.DataObject) -> None:
    content = data.draw(strange_yaml((ROOT / "datasets.yaml").read_bytes()))
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder, "datasets.yaml"), content, data.draw(st.sampled_from(PLACES)))
        throw(sources_of, Path(folder, "datasets.yaml"))


@thrown()
@given(data=st.data())
def test_dataset_info_json(throw: Thrower, data: st.DataObject) -> None:
    content = data.draw(strange_json(json.dumps(LLAMA_FACTORY).encode()))
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder, "dataset_info.json"), content, data.draw(st.sampled_from(PLACES)))
        throw(sources_of, Path(folder, "dataset_info.json"))


@thrown()
@given(text=st.text(max_size=40) | st.text("a=,./:-1e \0", max_size=12))
def test_what_data_names(throw: Thrower, text: str) -> None:
    throw(find_sources, text, ROOT / "datasets.yaml", None)


STAGES = {
    "demo/pretrain.yaml": (pretrain.PretrainSettings, {"data": "a", "out": "b"}),
    "demo/sft.yaml": (full_sft.SFTSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "demo/lora.yaml": (lora_sft.LoraSFTSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "demo/dpo.yaml": (dpo_train.DPOSettings, {"data": "a", "out": "b", "ckpt": "c"}),
    "demo/grpo.yaml": (grpo_train.GRPOSettings, {"data": "a", "out": "b", "ckpt": "c"}),
}


def settled(kind: type, arguments: list[str], out: Path) -> None:
    """As a script begins: settings, the model's sizes, and what was chosen kept."""
    settings = parse(kind, "", arguments)
    if hasattr(settings, "model"):
        model_config(settings.model)
    save_resolved(settings, out)


@pytest.mark.parametrize("name", STAGES)
@thrown(0.5)
@given(data=st.data())
def test_a_recipe(throw: Thrower, name: str, data: st.DataObject) -> None:
    kind, needed = STAGES[name]
    original = yaml.safe_dump({**yaml.safe_load((ROOT / "configs" / name).read_bytes()), **needed}).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        put(file, data.draw(strange_yaml(original)), data.draw(st.sampled_from(PLACES)))
        throw(settled, kind, ["--config", str(file)], Path(folder, "resolved.yaml"))


@thrown(0.5)
@given(data=st.data())
def test_a_command_line(throw: Thrower, data: st.DataObject) -> None:
    names = (
        "optim.lr",
        "model.hidden_size",
        "model",
        "optim",
        "max_steps",
        "out",
        "bias_speed",
        "resume",
        "config",
        "x",
    )
    given = data.draw(st.dictionaries(st.sampled_from(names), st.text(max_size=12) | st.sampled_from((
        "nan", "inf", "-1", "1e999", "{}", "[", "{a: b}", "null", "true", "9" * 400, "*a", "",
        "!!python/name:os.system",
    )), max_size=3))  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in {"data": "a", "out": "b", **given}.items()]
    with tempfile.TemporaryDirectory() as folder:
        throw(settled, pretrain.PretrainSettings, arguments, Path(folder, "resolved.yaml"))


def test_settings_that_distil(throw: Thrower) -> None:
    done = throw(
        parse, distill.DistillSettings, "", ["--data=a", "--out=b", "--teacher=c", "--student={hidden_size: x}"]
    )
    assert done.code in (0, 2)
