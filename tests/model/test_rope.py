"""Rotary embedding: interleaved pairs, relative positions, YaRN's frequencies and temperature."""

from __future__ import annotations

import json
import math

import pytest
import torch

from model import ops
from model.rope import RotaryEmbedding, attention_factor, inverse_frequencies, rotate, softmax_scale

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1}


def test_rope_turns_interleaved_pairs(tiny_config):
    config = tiny_config(qk_rope_head_dim=16)
    x = torch.randn(2, 5, 3, 16)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 30, 31]])
    turned = rotate(x, RotaryEmbedding(config)(positions))
    for pair in range(8):
        angle = positions.double() * config.rope_theta ** (-2 * pair / 16)
        number = torch.complex(x[..., 2 * pair].double(), x[..., 2 * pair + 1].double())
        expected = number * torch.polar(torch.ones_like(angle), angle).unsqueeze(-1)
        torch.testing.assert_close(turned[..., 2 * pair].double(), expected.real, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(turned[..., 2 * pair + 1].double(), expected.imag, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_compiled_graphs_turn_pairs_part_by_part(heads, dtype, tiny_config, monkeypatch):
    rope = RotaryEmbedding(tiny_config(qk_rope_head_dim=22))(torch.randint(5000, (2, 37)))
    x, found = torch.randn(2, 37, heads, 22).to(dtype).requires_grad_(), []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        out = ops.rotate(x, rope)
        found.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    for plain, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, plain, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_angles_stay_float32_in_a_bfloat16_model(tiny_model, tiny_config):
    model = tiny_model().bfloat16()
    assert model.rotary.inv_freq.dtype == torch.float32
    positions = torch.tensor([[63]])
    assert torch.equal(model.rotary(positions), RotaryEmbedding(tiny_config())(positions))


def test_frequencies_are_not_part_of_a_checkpoint(tiny_model):
    assert not [name for name in tiny_model().state_dict() if "inv_freq" in name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"mscale_all_dim": 0.7},
        {"attention_factor": 1.5},
        {"beta_fast": 8, "beta_slow": 2},
        {"beta_slow": 1e-7},  # the slowest pair there could be is the last
        {"factor": 40.0, "original_max_position_embeddings": 4096},
    ],
)
def test_yarn_equals_the_reference(changes, tiny_config, transformers):
    yarn = {**YARN, **changes}
    config = tiny_config(qk_rope_head_dim=32, rope_scaling=yarn, max_position_embeddings=1024)
    theirs = transformers.DeepseekV3Config(
        qk_rope_head_dim=32, max_position_embeddings=1024, rope_parameters={**yarn, "rope_theta": config.rope_theta}
    )
    frequencies, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
    torch.testing.assert_close(inverse_frequencies(config), frequencies)
    assert attention_factor(config) == pytest.approx(factor)
    start = RotaryEmbedding(config)(torch.tensor([[0]]))
    cos, sin = start.unbind(-1)
    torch.testing.assert_close(cos, torch.full_like(cos, factor))
    assert not sin.any()


def test_yarns_ranges_use_the_original_context_length(tiny_config):
    def frequencies(original: int, longest: int) -> torch.Tensor:
        yarn = {**YARN, "original_max_position_embeddings": original}
        config = tiny_config(qk_rope_head_dim=32, rope_scaling=yarn, max_position_embeddings=longest)
        return inverse_frequencies(config)

    assert torch.equal(frequencies(256, 1024), frequencies(256, 8192))
    assert not torch.equal(frequencies(256, 1024), frequencies(1024, 1024))


def test_mscale_enters_the_softmax_scale_squared(tiny_config):
    scaled = tiny_config(rope_scaling={**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7})
    assert softmax_scale(scaled) == pytest.approx(20**-0.5 * (0.1 * 0.7 * math.log(40) + 1) ** 2)
    assert softmax_scale(tiny_config(rope_scaling=YARN)) == pytest.approx(20**-0.5)


def test_config_json_says_nothing_of_yarn_when_the_context_was_not_extended(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in data and "yarn" not in json.dumps(data)
    tiny_config(rope_scaling=YARN).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == YARN
