"""The GGUF file holds the checkpoint: each tensor, hyperparameter and token, read back by the gguf package.

That llama.cpp computes the same from it is shown by tests/checks/check_gguf.py, which needs llama.cpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import jinja2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.hf import main
from text.chats.chat_template import render
from text.tokenizer import SPECIAL_TOKENS

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.7}
SHAPES = {
    "one MTP layer": {},
    "tied": {"tie_word_embeddings": True},
    "no query latent": {"q_lora_rank": None},
    "YaRN, no groups": {"rope_scaling": YARN, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "all groups kept, no dense layer": {"topk_group": 4, "first_k_dense_replace": 0, "norm_topk_prob": False},
}


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path):
    """`saved(**changes)`: a checkpoint folder with the world's tokenizer and some embeddings to spare."""

    def make(**changes) -> Path:
        folder = tmp_path / "checkpoint"
        tiny_model(**{"vocab_size": tokenizer.vocab_size + 3, **changes}).save_pretrained(folder)
        tokenizer.save(folder)
        return folder

    return make


@pytest.fixture
def export(run, tmp_path):
    """`export(folder, kind)`: the file read back: its fields as values, its tensors in float32 and their types."""

    def make(folder: Path, kind: str = "f32") -> tuple[dict, dict[str, np.ndarray], dict[str, str]]:
        out = tmp_path / "new folder" / "model.gguf"
        done = run(main, "export", "--format", "gguf", "--ckpt", folder, "--out", out, "--type", kind)
        assert done.code == 0 and done.out.startswith(f"{out}: ")
        reader = gguf.GGUFReader(out)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}

    return make


def released(folder: Path, config: dict) -> dict[str, np.ndarray]:
    """The main model's weights in model.safetensors, under the names that the gguf package has for theirs."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    heads, nope, experts = config["num_attention_heads"], config["qk_nope_head_dim"], config["n_routed_experts"]
    weights, tensors = {}, load_file(folder / "model.safetensors")
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]  # llama.cpp takes the embedding where there is no head
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= config["num_hidden_layers"]:
            continue
        if ".experts." in name:
            prefix, _, kind = name.removesuffix(".weight").rsplit(".", 2)
            stack = [tensors[f"{prefix}.{expert}.{kind}.weight"] for expert in range(experts)]
            weights[f"{prefix}.{kind}.weight"] = torch.stack(stack)
        elif name.endswith("kv_b_proj.weight"):
            rows = tensor.view(heads, -1, tensor.shape[1])
            weights[name.replace("kv_b", "k_b")] = torch.stack([rows[head, :nope].T for head in range(heads)])
            weights[name.replace("kv_b", "v_b")] = torch.stack([rows[head, nope:] for head in range(heads)])
        else:
            weights[name.replace("correction_bias", "correction.bias")] = tensor
    return {names.get_name(name, (".weight", ".bias")): tensor.numpy() for name, tensor in weights.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_is_the_checkpoints(shape, saved, export):
    folder = saved(**SHAPES[shape])
    expected = released(folder, json.loads((folder / "config.json").read_text()))
    _, tensors, types = export(folder)
    assert tensors.keys() == expected.keys()
    assert set(types.values()) == {"F32"}
    for name, weight in expected.items():
        assert tensors[name].shape == weight.shape and np.array_equal(tensors[name], weight), name


def test_the_hyperparameters_are_the_checkpoints(saved, export):
    fields, _, _ = export(saved(routed_scaling_factor=2.5, rope_theta=5000.0, rms_norm_eps=1e-5))
    vocab = fields["deepseek2.vocab_size"]
    given = {name: value for name, value in fields.items() if name.startswith("deepseek2.")}
    assert given == {
        "deepseek2.vocab_size": vocab,
        "deepseek2.context_length": 64,
        "deepseek2.block_count": 3,
        "deepseek2.embedding_length": 32,
        "deepseek2.feed_forward_length": 48,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.attention.head_count": 4,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "deepseek2.attention.q_lora_rank": 24,
        "deepseek2.attention.kv_lora_rank": 16,
        "deepseek2.attention.key_length": 16 + 8,
        "deepseek2.attention.value_length": 16,
        "deepseek2.attention.key_length_mla": 12 + 8,
        "deepseek2.attention.value_length_mla": 10,
        "deepseek2.expert_count": 8,
        "deepseek2.expert_used_count": 3,
        "deepseek2.expert_shared_count": 1,
        "deepseek2.expert_feed_forward_length": 16,
        "deepseek2.expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_weights_scale": 2.5,
        "deepseek2.expert_group_count": 4,
        "deepseek2.expert_group_used_count": 2,
        "deepseek2.rope.dimension_count": 8,
        "deepseek2.rope.freq_base": 5000.0,
    }
    assert fields["general.architecture"] == "deepseek2"
    assert fields["general.file_type"] == gguf.LlamaFileType.ALL_F32


def test_hyperparameters_that_llama_cpp_wants_otherwise(saved, export):
    fields, _, _ = export(saved(rope_scaling=YARN, topk_group=4, q_lora_rank=None, norm_topk_prob=False))
    assert fields["deepseek2.attention.q_lora_rank"] == 0
    assert fields["deepseek2.expert_weights_norm"] is False
    assert "deepseek2.expert_group_count" not in fields  # it stops at groups of which all are kept
    rope = {name.removeprefix("deepseek2.rope.scaling."): value for name, value in fields.items() if "scaling" in name}
    assert rope == {
        "type": "yarn", "factor": 40, "original_context_length": 16, "yarn_log_multiplier": pytest.approx(0.07)
    }  # fmt: skip


def test_the_tokenizer_is_the_checkpoints(saved, export, tokenizer):
    fields, _, _ = export(saved())
    own = {name.removeprefix("tokenizer."): value for name, value in fields.items() if name.startswith("tokenizer.")}
    special = len(SPECIAL_TOKENS)
    tokens = [tokenizer.raw.id_to_token(number) for number in range(tokenizer.vocab_size)]
    template = own.pop("chat_template")
    assert own == {
        "ggml.model": "gpt2",
        "ggml.pre": "qwen2",
        "ggml.tokens": [*tokens, *(f"[PAD{tokenizer.vocab_size + extra}]" for extra in range(3))],
        "ggml.token_type": [3] * special + [1] * (tokenizer.vocab_size - special) + [5] * 3,
        "ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.raw.to_str())["model"]["merges"]],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.padding_token_id": 3,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
    }
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "你好"}]
    chat += [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    rendered = jinja2.Environment().from_string(template).render(messages=chat, add_generation_prompt=True)
    assert rendered == render(chat, add_generation_prompt=True)  # jinja2 alone does not know the marks of training


@pytest.mark.parametrize(("kind", "error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_matrices_are_rounded_and_nothing_else(kind, error, saved, export):
    folder = saved(kv_lora_rank=32, moe_intermediate_size=32)
    expected = released(folder, json.loads((folder / "config.json").read_text()))
    _, tensors, types = export(folder, kind)
    for name, weight in expected.items():
        if weight.ndim == 1 or "ffn_gate_inp" in name:
            assert types[name] == "F32" and np.array_equal(tensors[name], weight), name
        else:
            fits = kind != "q8_0" or weight.shape[-1] % 32 == 0
            assert types[name] == (kind.upper() if fits else "F16"), name
            assert 0 < np.abs(tensors[name] - weight).max() <= error * np.abs(weight).max(), name
    assert kind.upper() in types.values()


REFUSED = {
    "attention_bias is not read": {"attention_bias": True},
    "n_shared_experts = 0": {"n_shared_experts": 0},
    "q_lora_rank with num_hidden_layers = 26": {"num_hidden_layers": 26},
    "YaRN with mscale other than mscale_all_dim": {"rope_scaling": {**YARN, "mscale": 1.0}},
    "YaRN with attention_factor": {"rope_scaling": {**YARN, "attention_factor": 1.2}},
    "YaRN with beta_fast, beta_slow other than 32, 1": {"rope_scaling": {**YARN, "beta_fast": 16}},
    "YaRN with a factor below 1": {"rope_scaling": {**YARN, "factor": 0.5}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(reason, saved, run, tmp_path):
    folder = saved(**REFUSED[reason])
    refused = run(main, "export", "--format", "gguf", "--ckpt", folder, "--out", tmp_path / "model.gguf")
    assert refused.code == 2 and refused.err.count("\n") == 1 and not refused.out
    assert refused.err.startswith(f"error: {folder / 'config.json'}: llama.cpp cannot run this model: {reason}")
    assert not (tmp_path / "model.gguf").exists()


def test_what_llama_cpp_may_compute_otherwise_is_noticed(saved, run, tmp_path):
    folder = saved(rms_norm_eps=1e-5)
    done = run(main, "export", "--format", "gguf", "--ckpt", folder, "--out", tmp_path / "model.gguf")
    groups, eps = done.err.splitlines()
    assert groups.startswith("notice: experts are chosen within 2 of 4 groups: an older llama.cpp")
    assert eps.startswith("notice: llama.cpp takes rms_norm_eps = 1e-05 for the latents' norms too")


def json_change(change):
    """`change` of the tokenizer's JSON, in place."""

    def changed(path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf8")

    return changed


def other_split(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf8").replace(r"\\p{N}|", r"\\p{N}{1,3}|"), encoding="utf8")


TOKENIZERS = {
    "none": (Path.unlink, "No such file or directory; a GGUF holds the tokenizer"),
    "broken": (lambda path: path.write_text("{"), "not valid JSON"),
    "another split": (other_split, "not a tokenizer of train_tokenizer.py"),
    "prefix space": (
        json_change(lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
        "not a tokenizer of train_tokenizer.py",
    ),
    "normalised": (
        json_change(lambda content: content.update(normalizer={"type": "NFC"})), "not a tokenizer of train_tokenizer.py"
    ),
    "more tokens": (
        json_change(lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 603, "content": "<new>"})),
        "has 604 tokens, the model 603",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(kind, saved, run, tmp_path):
    folder = saved()
    (change, said), path, before = TOKENIZERS[kind], folder / "tokenizer.json", (folder / "tokenizer.json").read_bytes()
    change(path)
    assert not path.exists() or path.read_bytes() != before
    refused = run(main, "export", "--format", "gguf", "--ckpt", folder, "--out", tmp_path / "model.gguf")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert refused.err.startswith(f"error: {path}: {said}")
    assert list(tmp_path.iterdir()) == [folder]


def test_without_the_package_the_command_that_installs_it_is_named(saved, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused = run(main, "export", "--format", "gguf", "--ckpt", saved(), "--out", tmp_path / "model.gguf")
    assert refused.code == 2
    assert refused.err == "error: the package gguf is not installed; pip install gguf==0.19.0\n"
    pins = (Path(__file__).parents[3] / "requirements-dev.txt").read_text()
    assert "gguf==0.19.0" in pins.splitlines()  # the version that these tests read back


def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(saved, run, tmp_path, monkeypatch):
    folder, out = saved(), tmp_path / "model.gguf"
    out.write_bytes(b"old")

    def full(writer, **options) -> None:
        raise OSError(28, "No space left on device", "model.gguf")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    failed = run(main, "export", "--format", "gguf", "--ckpt", folder, "--out", out)
    assert failed.code == 2 and "No space left" in failed.err and failed.err.count("\n") == 1
    assert out.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == [folder, out]
