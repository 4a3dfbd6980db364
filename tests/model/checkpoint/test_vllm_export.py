"""The folder for vLLM's CPU build: YaRN by a factor of 1, and the same numbers.

That vLLM computes the same from it is shown by tests/checks/check_vllm.py, which needs vLLM.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.hf import main

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.7}


@pytest.fixture
def export(run, tmp_path):
    """`export()`: the folder made of tmp_path/plain."""

    def make():
        done = run(main, "export", "--format", "vllm-cpu", "--ckpt", tmp_path / "plain", "--out", tmp_path / "vllm")
        assert (done.code, done.err) == (0, "") and done.out.startswith(f"{tmp_path / 'vllm'}: ")
        return tmp_path / "vllm"

    return make


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_yarn_by_one_gives_the_plain_folders_logits(tied, tiny_model, export, tmp_path, open_silently):
    model = tiny_model(tie_word_embeddings=tied, qk_rope_head_dim=32, num_nextn_predict_layers=0)
    model.save_pretrained(tmp_path / "plain")
    folder = export()
    assert "rope_scaling" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 1.0, 64)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    ids = torch.randint(0, 61, (2, 60))
    expected = model(ids).logits
    torch.testing.assert_close(MiniDeepSeek.from_pretrained(folder)(ids).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(open_silently(folder)(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_extended_context_stays_extended(tiny_model, export, tmp_path):
    tiny_model(rope_scaling=YARN).save_pretrained(tmp_path / "plain")
    assert LMConfig.from_pretrained(export()).rope_scaling == YARN


def test_the_type_of_a_gguf_is_refused(run, tmp_path):
    done = run(main, "export", "--format", "vllm-cpu", "--ckpt", tmp_path, "--out", tmp_path / "o", "--type", "f32")
    assert (done.code, done.err) == (2, "error: --type: is of --format gguf; leave it out\n")
