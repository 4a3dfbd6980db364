"""Checkpoint folders with damaged files: opened right, or refused in one line; never a model of another shape."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fuzz.hostile import Thrower, thrown
from fuzz.mutations import PLACES, put, strange, strange_json, strange_safetensors, values
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.gguf_export import export_gguf
from model.checkpoint.hf_import import import_folder
from text.tokenizer import Tokenizer
from training.startup import open_checkpoint

INDEX = "model.safetensors.index.json"


def test_the_whole_one_opens(throw: Thrower, checkpoint: dict[str, bytes]) -> None:
    """Else the other tests would prove nothing."""
    with folder_of(checkpoint) as folder:
        assert throw(open_checkpoint, str(folder)).code == 0
    with folder_of(sharded(checkpoint)) as folder:
        assert throw(open_checkpoint, str(folder)).code == 0


@contextlib.contextmanager
def folder_of(files: dict[str, bytes], name: str = "", place: str = "content") -> Iterator[Path]:
    """A folder of these files, with something else in the place of `name`."""
    with tempfile.TemporaryDirectory() as made:
        for each, content in files.items():
            put(Path(made, each), content, place if each == name else "content")
        yield Path(made)


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same weights in two files and a list of them."""
    tensors = load(files["model.safetensors"])
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    shards = {file: save({name: tensors[name] for name in members}) for file, members in parts.items()}
    return {**rest, **shards, INDEX: json.dumps(index).encode()}


@st.composite
def damaged_folders(draw: Any, files: dict[str, bytes]) -> tuple[dict[str, bytes], str, str]:
    """(files, the damaged one, what is in its place)"""
    name = draw(st.sampled_from(sorted(files)))
    damage = strange_json if name.endswith(".json") else strange_safetensors
    return {**files, name: draw(damage(files[name]))}, name, draw(st.sampled_from(PLACES))


def opened(folder: Path) -> MiniDeepSeek:
    """Opened and used."""
    model, tokenizer = open_checkpoint(str(folder))
    ids = tokenizer.encode("春天来了 and so on 12")
    model(torch.tensor([ids])).logits.sum().item()
    return model


@thrown(2)
@given(data=st.data())
def test_opening(throw: Thrower, checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    files = sharded(checkpoint) if data.draw(st.booleans()) else checkpoint
    with folder_of(*data.draw(damaged_folders(files))) as folder:
        done = throw(opened, folder)
        if done.value is not None:
            check_shapes(done.value, files)


def check_shapes(model: MiniDeepSeek, files: dict[str, bytes]) -> None:
    """What was opened is of the shapes of the weights that were saved."""
    whole = LMConfig.from_dict(json.loads(files["config.json"]))
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts", "kv_lora_rank", "v_head_dim"):
        assert getattr(model.config, name) == getattr(whole, name)


@thrown(2)
@given(data=st.data())
def test_a_config(throw: Thrower, checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    """Single fields replaced, so that more of them get far."""
    config = json.loads(checkpoint["config.json"])
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[name] = data.draw(values() | st.integers(-3, 100) | st.floats())
    files = {**checkpoint, "config.json": json.dumps(config).encode()}
    with folder_of(files) as folder:
        done = throw(opened, folder)
        if done.value is not None:
            check_shapes(done.value, checkpoint)


@thrown()
@given(data=st.data())
def test_a_config_of_its_own(throw: Thrower, checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    """What `LMConfig` takes can be built, without memory."""
    config = throw(LMConfig.from_dict, data.draw(strange(json.loads(checkpoint["config.json"])))).value
    if config is not None and config.num_hidden_layers < 100 and config.num_nextn_predict_layers < 100:
        with torch.device("meta"):
            throw(MiniDeepSeek, config)


@thrown()
@given(data=st.data())
def test_importing(throw: Thrower, checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    with folder_of(*data.draw(damaged_folders(checkpoint))) as folder, tempfile.TemporaryDirectory() as target:
        done = throw(import_folder, folder, Path(target, "imported"))
        assert [path.name for path in Path(target).iterdir()] == ([] if done.code else ["imported"])


@thrown()
@given(data=st.data())
def test_exporting(throw: Thrower, checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    with folder_of(*data.draw(damaged_folders(checkpoint))) as folder, tempfile.TemporaryDirectory() as target:
        done = throw(export_gguf, folder, Path(target, "m.gguf"), data.draw(st.sampled_from(("f32", "q8_0"))))
        assert [path.name for path in Path(target).iterdir()] == ([] if done.code else ["m.gguf"])


PROBES = ("", "Hello 123 你好\n\n\t\0 é", "".join(map(chr, range(0x250))), "</s><|user|><think>", "𝄞🙂" * 3)


@thrown(2)
@given(data=st.data())
def test_a_tokenizer(throw: Thrower, checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    """What opens gives text back and only ids of its vocabulary."""
    content = data.draw(strange_json(checkpoint["tokenizer.json"]))
    files = {"tokenizer.json": content, "tokenizer_config.json": checkpoint["tokenizer_config.json"]}
    with folder_of(files, "tokenizer.json", data.draw(st.sampled_from(PLACES))) as folder:
        found: Tokenizer | None = throw(Tokenizer.from_folder, folder).value
    for probe in PROBES if found else ():
        ids = found.encode(probe)
        assert found.decode(ids, skip_special_tokens=False) == probe
        assert all(len(found.special_ids) <= number < found.vocab_size for number in ids)


TOKENIZER_PARTS = ("version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation",
                   "padding", "model")  # fmt: skip
OTHERS = (
    {"type": "Lowercase"}, {"type": "NFKC"}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}, {"type": "Whitespace"}, {"type": "Strip"},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}, {"type": "Fuse"}, {"type": "Metaspace"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}, {"direction": "Right", "max_length": 1,
     "strategy": "LongestFirst", "stride": 0}, {"strategy": {"Fixed": 4}, "direction": "Left",
     "pad_to_multiple_of": None,
     "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"},
)  # fmt: skip


@thrown()
@given(part=st.sampled_from(TOKENIZER_PARTS), other=st.sampled_from(OTHERS).map(copy.deepcopy) | values())
def test_a_tokenizer_with_parts_of_another(throw: Thrower, checkpoint: dict[str, bytes], part: str, other: Any) -> None:
    content = {**json.loads(checkpoint["tokenizer.json"]), part: other}
    with folder_of({"tokenizer.json": json.dumps(content).encode()}) as folder:
        found: Tokenizer | None = throw(Tokenizer.from_folder, folder).value
    for probe in PROBES if found else ():
        assert found.decode(found.encode(probe), skip_special_tokens=False) == probe


@pytest.mark.parametrize("change", ["gap", "twice", "beyond", "lost byte"])
def test_ids_that_do_not_match_the_vocabulary(throw: Thrower, checkpoint: dict[str, bytes], change: str) -> None:
    content = json.loads(checkpoint["tokenizer.json"])
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    if change == "gap":
        vocab[last] += 5
    elif change == "twice":
        vocab[last] -= 1
    elif change == "beyond":
        vocab[last] = 2**32 - 1
    else:
        vocab["Ġxyz"] = vocab.pop("Ā")  # the letter of the byte 0
    with folder_of({"tokenizer.json": json.dumps(content).encode()}) as folder:
        done = throw(Tokenizer.from_folder, folder)
    assert done.code == 2 and "tokenizer.json" in done.err, done
