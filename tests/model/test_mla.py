"""Multi-head latent attention: the paper's equations, both forms, the cache, causality, packing."""

from __future__ import annotations

import math

import pytest
import torch

from model import MiniDeepSeek
from model.attention import AttentionMask
from model.cache import LatentCache, cache_dtype
from model.mla import ABSORB_UP_TO, MultiHeadLatentAttention
from model.rope import RotaryEmbedding

YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
SHAPES = {
    "plain": {},
    "without q_lora": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN},
    "attention bias": {"attention_bias": True},
    "wide rms eps": {"rms_norm_eps": 0.5},
    "values larger than keys": {"v_head_dim": 30},
}


@pytest.fixture
def mla(tiny_model, tiny_config):
    """`mla(**changes)`: attention of one layer in float64, its config and its rotary embedding."""

    def make(**changes) -> tuple[MultiHeadLatentAttention, RotaryEmbedding]:
        model = tiny_model(**changes)
        return model.model.layers[1].self_attn.double(), RotaryEmbedding(model.config)

    return make


def equations(layer: MultiHeadLatentAttention, x: torch.Tensor, rotary: RotaryEmbedding) -> torch.Tensor:
    """Section 2.1.1 word for word for one sequence, (time, hidden): head by head, query by query, pair by pair."""

    def norm(module, values):
        return values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    def turn(values):
        out = values.clone()
        for t in range(values.shape[0]):
            for pair, frequency in enumerate(rotary.inv_freq.tolist()):
                a, b = values[t, 2 * pair], values[t, 2 * pair + 1]
                cos, sin = math.cos(t * frequency) * rotary.scale, math.sin(t * frequency) * rotary.scale
                out[t, 2 * pair], out[t, 2 * pair + 1] = a * cos - b * sin, a * sin + b * cos
        return out

    if hasattr(layer, "q_proj"):
        queries = layer.q_proj(x)
    else:
        queries = layer.q_b_proj(norm(layer.q_a_layernorm, layer.q_a_proj(x)))
    down = layer.kv_a_proj_with_mqa(x)
    c_kv, k_rope = norm(layer.kv_a_layernorm, down[:, : layer.rank]), turn(down[:, layer.rank :])
    up = layer.kv_b_proj(c_kv)
    outputs = []
    for head in range(layer.heads):
        q = queries[:, head * (layer.nope + layer.rope) : (head + 1) * (layer.nope + layer.rope)]
        kv = up[:, head * (layer.nope + layer.value) : (head + 1) * (layer.nope + layer.value)]
        q = torch.cat((q[:, : layer.nope], turn(q[:, layer.nope :])), dim=-1)
        k, v = torch.cat((kv[:, : layer.nope], k_rope), dim=-1), kv[:, layer.nope :]
        rows = [((q[t] @ k[: t + 1].T) * layer.scale).softmax(-1) @ v[: t + 1] for t in range(x.shape[0])]
        outputs.append(torch.stack(rows))
    return layer.o_proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_mla_is_the_papers_equations(shape, mla):
    layer, rotary = mla(**SHAPES[shape])
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    out = layer(x, rotary(torch.arange(9)[None]), AttentionMask())
    expected = torch.stack([equations(layer, row, rotary) for row in x])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_absorbed_attention_equals_naive(shape, padded, mla):
    layer, rotary = mla(**SHAPES[shape])
    x = torch.randn(2, 14, 32, dtype=torch.float64)
    rope = rotary(torch.arange(14)[None])
    attention_mask = AttentionMask.left_padded(6, 14, torch.tensor([3, 0])) if padded else AttentionMask()
    queries, rope_of_last, latents = layer._queries(x)[:, -6:], rope[:, -6:], layer._latents(x, rope)
    naive = layer.attend_naive(queries, rope_of_last, latents, attention_mask)
    absorbed = layer.attend_absorbed(*layer._rotated(queries, rope_of_last), latents, attention_mask)
    torch.testing.assert_close(absorbed, naive, atol=1e-6, rtol=1e-5)


def test_cache_holds_the_latent_after_its_norm_and_the_key_after_rope(mla, tiny_config):
    layer, rotary = mla()
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    cache = LatentCache(tiny_config(), 1, 8, torch.float64, "cpu")
    layer(x, rotary(torch.arange(3, 8)[None]), AttentionMask(), cache)
    held = cache.latents[layer.layer, 0, :5]
    c_kv, k_rope = layer.kv_a_proj_with_mqa(x[0]).split((16, 8), dim=-1)
    normed = c_kv / (c_kv.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.kv_a_layernorm.weight
    torch.testing.assert_close(held[:, :16], normed, atol=1e-6, rtol=1e-6)
    angles = torch.arange(3, 8)[:, None] * rotary.inv_freq[None].double()
    turned = torch.view_as_complex(k_rope.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(angles * 0 + 1, angles)
    torch.testing.assert_close(held[:, 16:], torch.view_as_real(turned).flatten(-2), atol=1e-5, rtol=1e-5)


def decoded(model: MiniDeepSeek, ids: torch.Tensor, cache: LatentCache, chunks: list[int]) -> torch.Tensor:
    """Logits of a sequence that is read in chunks."""
    return torch.cat([model(part, cache=cache).logits for part in ids.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunks", [[12] + [1] * 20, [1] * 32, [20, 8, 4], [3, 9, 16, 4], [32]])
@torch.no_grad()
def test_prefill_and_steps_equal_one_forward(shape, chunks, tiny_model):
    model = tiny_model(**SHAPES[shape])
    ids = torch.randint(0, 61, (2, 32))
    assert max(chunks) > ABSORB_UP_TO or chunks == [1] * 32  # both forms take part
    cache = LatentCache(model.config, 2, 32, torch.float32, "cpu")
    torch.testing.assert_close(decoded(model, ids, cache, chunks), model(ids).logits, atol=1e-4, rtol=1e-4)
    assert cache.length == 32


@pytest.mark.parametrize("chunks", [[14] + [1] * 6, [7, 9, 4]])
@torch.no_grad()
def test_left_padding_changes_nothing(chunks, tiny_model):
    model = tiny_model()
    ids, padding = torch.randint(0, 61, (3, 20)), torch.tensor([0, 5, 2])
    cache = LatentCache(model.config, 3, 20, torch.float32, "cpu", padding)
    logits = decoded(model, ids, cache, chunks)
    assert logits.isfinite().all()
    for row, skipped in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, skipped:]).logits[0]
        torch.testing.assert_close(logits[row, skipped:], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_truncated_positions_are_forgotten(tiny_model):
    model = tiny_model()
    ids = torch.randint(0, 61, (1, 12))
    cache = LatentCache(model.config, 1, 20, torch.float32, "cpu")
    decoded(model, torch.cat((ids[:, :9], torch.randint(0, 61, (1, 5))), dim=1), cache, [10, 4])
    cache.truncate(9)
    logits = model(ids[:, 9:], cache=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 9:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_kept_rows_go_on_as_before(tiny_model):
    model = tiny_model()
    ids = torch.randint(0, 61, (3, 12))
    cache = LatentCache(model.config, 3, 12, torch.float32, "cpu", torch.tensor([0, 4, 1]))
    model(ids[:, :11], cache=cache)
    cache.keep_rows(torch.tensor([1, 0]))
    logits = model(ids[[1, 0], 11:], cache=cache).logits[:, 0]
    expected = torch.cat([model(ids[1:2, 4:]).logits[:, -1], model(ids[:1]).logits[:, -1]])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_cache_costs_rank_and_rope_numbers_a_token_and_layer(tiny_config):
    for mtp, layers in ((False, 3), (True, 4)):
        cache = LatentCache(tiny_config(), 2, 10, torch.bfloat16, "cpu", mtp=mtp)
        assert cache.latents[:, 0, 0].nbytes == layers * (16 + 8) * 2


def test_a_full_cache_is_an_error(tiny_model):
    model = tiny_model()
    cache = LatentCache(model.config, 1, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"5 positions, but only 4 were allocated"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)


@torch.no_grad()
def test_the_cache_is_of_the_type_of_the_weights_on_cpu(tiny_model):
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # decoding computes with the weights as they are
        assert cache_dtype(model) == torch.float32
    assert cache_dtype(model.bfloat16()) == torch.bfloat16


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_decoding_under_autocast_is_one_forward_to_bfloat16s_rounding(held, tiny_model):
    model, ids = tiny_model(), torch.randint(0, 61, (1, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = LatentCache(model.config, 1, 6, held, "cpu")
        logits = decoded(model, ids, cache, [3, 1, 1, 1])
        whole = model(ids).logits
    assert (logits - whole).norm() / whole.norm() < 0.05


@torch.no_grad()
def test_no_position_sees_what_comes_after_it(tiny_model):
    model = tiny_model(num_nextn_predict_layers=0)
    ids = torch.randint(0, 61, (1, 24))
    changed = ids.clone()
    changed[:, 13:] = (ids[:, 13:] + 7) % 61
    one, other = model(ids).logits, model(changed).logits
    torch.testing.assert_close(one[:, :13], other[:, :13], atol=1e-6, rtol=1e-6)
    assert ((one[:, 13:] - other[:, 13:]).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_packed_logits_equal_separate_ones(tiny_model):
    model = tiny_model()
    lengths = [[7, 1, 12], [5, 15]]
    ids = torch.randint(0, 61, (2, 20))
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model(ids, position_ids=positions, segment_ids=segments)
    for row, sizes in enumerate(lengths):
        samples = ids[row].split(sizes)
        for logits, sample in zip(packed.logits[row].split(sizes), samples, strict=True):
            torch.testing.assert_close(logits, model(sample[None]).logits[0], atol=1e-4, rtol=1e-4)
