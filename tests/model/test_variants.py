"""Attention to compare MLA with: its definition, the cache, packing, drafts, equal parameters; the dense twin."""

from __future__ import annotations

import json

import pytest
import torch

from errors import UserError
from LMConfig import PRESETS, LMConfig
from model import MiniDeepSeek
from model.attention import AttentionMask
from model.cache import LatentCache
from model.checkpoint.card import card
from model.cost_table import main as costs_main
from model.costs import count, dense_twin
from model.decoding.engine import Engine
from model.decoding.native import NativeRunner
from model.decoding.scheduler import Request
from model.hf import main
from model.rope import rotate

KINDS = {"mha": {"attention": "mha"}, "gqa": {"attention": "gqa", "num_key_value_heads": 2}}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("bias", [False, True])
@kinds
def test_every_head_attends_with_the_key_and_value_of_its_group(kind, bias, tiny_model):
    model = tiny_model(**KINDS[kind], attention_bias=bias)
    layer, x = model.model.layers[1].self_attn.double(), torch.randn(1, 9, 32, dtype=torch.float64)
    rope = model.rotary(torch.arange(9)[None])
    q, k, v = (
        project(x).view(9, count, -1) for project, count in
        ((layer.q_proj, 4), (layer.k_proj, layer.groups), (layer.v_proj, layer.groups))
    )  # fmt: skip
    q, k = (rotate(each[None], rope)[0] for each in (q, k))
    heads = []
    for head in range(4):
        group = head // (4 // layer.groups)
        scores = [q[t, head] @ k[: t + 1, group].T / layer.size**0.5 for t in range(9)]
        heads.append(torch.stack([row.softmax(-1) @ v[: len(row), group] for row in scores]))
    expected = layer.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(layer(x, rope, AttentionMask())[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunks", [[10] + [1] * 6, [3, 9, 4]])
@kinds
@torch.no_grad()
def test_prefill_and_steps_equal_one_forward(kind, chunks, padded, tiny_model):
    model, ids = tiny_model(**KINDS[kind]), torch.randint(61, (2, 16))
    cache = LatentCache(model.config, 2, 16, torch.float32, "cpu", torch.tensor([2, 0]) if padded else None)
    logits = torch.cat([model(part, cache=cache).logits for part in ids.split(chunks, dim=1)], dim=1)
    first = 2 if padded else 0
    torch.testing.assert_close(logits[:1, first:], model(ids[:1, first:]).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, atol=1e-4, rtol=1e-4)


@kinds
def test_packed_rows_are_isolated_and_computing_again_changes_no_gradient(kind, tiny_model):
    model, parts = tiny_model(**KINDS[kind]), [torch.randint(61, (1, size)) for size in (5, 9)]
    packed = {
        "input_ids": torch.cat(parts, dim=1), "segment_ids": torch.tensor([[0] * 5 + [1] * 9]),
        "position_ids": torch.cat([torch.arange(5), torch.arange(9)])[None],
    }  # fmt: skip
    alone = torch.cat([model(part).logits for part in parts], dim=1)
    torch.testing.assert_close(model(**packed).logits, alone, atol=1e-4, rtol=1e-4)
    gradients = []
    for again in (False, True):
        model.zero_grad()
        model.gradient_checkpointing = again
        out = model(**packed, mtp=2)
        sum(each.square().mean() for each in (out.hidden, *out.mtp_hidden, *out.mtp_unrolled)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.parameters()])
    torch.testing.assert_close(*gradients)
    assert all(model.model.layers[0].self_attn.k_proj.weight.grad.flatten().tolist())


@kinds
@torch.no_grad()
def test_cached_and_drafted_tokens_are_those_of_whole_passes(kind, tiny_model):
    model, prompt = tiny_model(**KINDS[kind]), torch.randint(61, (1, 6))
    text = prompt
    for _ in range(9):
        text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), dim=1)
    for options in ({}, {"speculative": True}, {"speculative": True, "draft_tokens": 3}):
        assert torch.equal(model.generate(prompt, max_new_tokens=9, **options), text)
    engine = Engine(model, 2, 20)
    requests = [Request(prompt[0, start:].tolist(), 9) for start in (0, 2, 3)]
    served = [completion.tokens for completion in engine.run(requests)]
    alone = [model.generate(prompt[:, start:], max_new_tokens=9)[0, 6 - start :].tolist() for start in (0, 2, 3)]
    assert served == alone and isinstance(engine.runner, NativeRunner)
    assert engine.runner.program(0, prompt) is None  # C knows MLA only


@kinds
def test_parameters_and_cache_are_counted(kind, tiny_config):
    config = tiny_config(**KINDS[kind], attention_bias=True)
    model, found = MiniDeepSeek(config), count(config)
    assert found.total + found.mtp == sum(parameter.numel() for parameter in model.parameters())
    cache = LatentCache(config, 1, 1, torch.bfloat16, "cpu")
    assert found.cache_bytes == cache.latents.numel() * 2 and (found.cache_bytes < found.mha_cache_bytes) == (
        kind == "gqa"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_mlas_within_a_hundredth_and_flops_of_the_dense_twin_too(name):
    mla, heads = LMConfig.preset(name), LMConfig.preset(name).num_attention_heads
    for changes in ({"attention": "mha"}, {"attention": "gqa", "num_key_value_heads": heads // 2}):
        assert count(LMConfig.preset(name, **changes)).total == pytest.approx(count(mla).total, rel=0.01)
    dense = dense_twin(mla)
    assert count(dense).flops == pytest.approx(count(mla).flops, rel=0.01) and dense.intermediate_size % 8 == 0
    assert count(dense).activated == count(dense).total


def test_the_command_names_the_fields_of_the_dense_twin(monkeypatch, run):
    monkeypatch.setattr("sys.argv", ["LMConfig.py"])
    lines = run(costs_main, "--preset", "demo", "--num_hidden_layers", 2, "--dense_twin").out.splitlines()
    assert len(lines) == 4 and "--model.first_k_dense_replace 2 --model.intermediate_size 576" in lines[3]


@kinds
def test_a_checkpoint_says_what_it_is_and_no_export_takes_it_for_a_deepseek_v3(kind, tiny_model, tmp_path, run):
    model, folder = tiny_model(**KINDS[kind]), tmp_path / "checkpoint"
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf8"))
    assert written["model_type"] == f"mini_deepseek_v3_{kind}" and "Deepseek" not in str(written["architectures"])
    opened, ids = MiniDeepSeek.from_pretrained(folder), torch.randint(61, (1, 9))
    assert opened.config == LMConfig.from_pretrained(folder) == model.config
    assert torch.equal(opened(ids).logits, model(ids).logits)
    for kind_of_file, place in (("gguf", folder / "config.json"), ("vllm-cpu", folder)):
        done = run(main, "export", "--format", kind_of_file, "--ckpt", folder, "--out", tmp_path / "out")
        assert done.code == 2 and done.err.startswith(f"error: {place}: ") and done.err.count("\n") == 1
        assert kind in done.err and not (tmp_path / "out").exists()
    text = card(folder)
    assert f"with {kind.upper()} in place of MLA" in text and "transformers" not in text and "deepseek_v3" not in text


def test_a_checkpoint_of_mla_says_nothing_of_its_attention(tiny_config):
    assert "attention" not in tiny_config().to_dict() and tiny_config().to_dict()["model_type"] == "deepseek_v3"


@pytest.mark.parametrize("changes", [{"model_type": "deepseek_v3"}, {"attention": "mla"}, {"attention": "gqa"}])
def test_a_config_that_contradicts_itself_is_refused(changes, tiny_config):
    with pytest.raises(UserError, match=r"config: model_type is .*; only .* is read"):
        LMConfig.from_dict({**tiny_config(**KINDS["mha"]).to_dict(), **changes})
