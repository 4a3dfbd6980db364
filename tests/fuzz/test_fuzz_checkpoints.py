"""Checkpoints and tokenizers whose parts have other values, and run folders with strange things in them."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz.hostile import thrown
from fuzz.mutations import PLACES, lay_out, put, values, written
from fuzz.test_fuzz_files import opened, resumed, saved_run, tokenised
from LMConfig import LMConfig
from model import MiniDeepSeek
from training.run.progress import newest


@thrown(2)
@given(data=st.data())
def test_a_config_with_other_values(throw, tools, data):
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
def test_a_tokenizer_with_parts_of_another(throw, tools, part, other):
    content = {**json.loads(tools.checkpoint["tokenizer.json"]), part: other}
    with tempfile.TemporaryDirectory() as place:
        throw(tokenised, lay_out(Path(place), {"tokenizer.json": written(content)}), tools)


@pytest.mark.parametrize("change", ["gap", "twice", "beyond", "lost byte"])
def test_ids_that_do_not_match_the_vocabulary(throw, tools, change, tmp_path):
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
def test_what_lies_beside_checkpoints(throw, tools, name, place, tmp_path):
    saved_run(tmp_path, tools)
    put(tmp_path / name, b"x", place)
    throw(newest, tmp_path)
    throw(resumed, tmp_path, tools)
