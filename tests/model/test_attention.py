"""The attention kernels: chunks on CPU, the fused one, flash-attn; each against plain operations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import attention as plain_attention
from kernel_cases import far

from model.attention import AttentionMask, causal
from model.kernels import attention
from model.ops import attend


def attention_case(queries: int, keys: int, kind: str, value_size: int):
    """Random q, k, v with gradients, an attention mask and the mask that it stands for."""
    q, k = torch.randn(2, queries, 3, 6), torch.randn(2, keys, 3, 6)
    tensors = [x.requires_grad_() for x in (q, k, torch.randn(2, keys, 3, value_size))]
    attention_mask = AttentionMask()
    mask = causal(queries, keys, q.device)
    if kind == "packed":
        segments = (torch.rand(2, queries) < 0.1).cumsum(1)
        attention_mask = AttentionMask.isolated(segments)
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    elif kind == "padded":
        padding = torch.tensor([keys // 3, 0])
        attention_mask = AttentionMask.left_padded(queries, keys, padding)
        columns = torch.arange(keys)
        itself = columns[None, :] == columns[keys - queries :, None]
        mask = (mask & (columns >= padding[:, None, None])) | (mask & itself)
        mask = mask[:, None]
    return tensors, attention_mask, mask


CASES = [
    (1, 1, "causal", 6), (1, 37, "causal", 6), (5, 5, "causal", 4), (127, 127, "causal", 9), (128, 128, "packed", 6),
    (129, 129, "causal", 4), (300, 300, "causal", 6), (300, 300, "packed", 8), (300, 300, "padded", 4),
    (130, 171, "causal", 5), (33, 270, "padded", 6),
]  # fmt: skip


@pytest.mark.parametrize("longest_chunked", [2048, 0])
@pytest.mark.parametrize(("queries", "keys", "kind", "value_size"), CASES)
def test_attention_and_its_gradient_equal_plain_operations_in_chunks_and_fused(
    queries, keys, kind, value_size, longest_chunked, monkeypatch
):
    monkeypatch.setattr(attention, "LONGEST_CHUNKED", longest_chunked)
    tensors, attention_mask, mask = attention_case(queries, keys, kind, value_size)
    out, expected = attend(*tensors, 0.37, attention_mask), plain_attention(*tensors, 0.37, mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, direction)
    for grad, want in zip(grads, torch.autograd.grad(expected, tensors, direction), strict=True):
        torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "packed", "padded"])
def test_attention_in_bfloat16_under_autocast_stays_near_the_plain_attention(kind):
    tensors, attention_mask, mask = attention_case(150, 150, kind, 4)
    half = [x.detach().bfloat16().requires_grad_() for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*half, 0.37, attention_mask)
    expected = plain_attention(*(x.float() for x in half), 0.37, mask)
    direction = torch.randn_like(expected)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, half, direction.bfloat16())
    expected_grads = torch.autograd.grad(expected, half, direction)
    for ours, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert far(ours, want.float()) < 2e-2


@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_fused_kernels_get_one_head_size(kind, monkeypatch):
    monkeypatch.setattr(attention, "LONGEST_CHUNKED", 0)
    sizes = []
    fused = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        sizes.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    tensors, attention_mask, _ = attention_case(9, 9, kind, 4)
    assert attend(*tensors, 0.3, attention_mask).shape == (2, 9, 3, 4)
    assert sizes == [(6, 6, 6)]


def fake_flash_attn(calls: list[str]) -> SimpleNamespace:
    """The two functions of flash-attn by plain operations; they insist on one head size, as the kernels do."""

    def flash_attn_func(q, k, v, softmax_scale, causal):
        calls.append("whole")
        assert causal and q.shape == k.shape == v.shape
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        return plain_attention(q.float(), k.float(), v.float(), softmax_scale, mask).to(q.dtype)

    def flash_attn_varlen_func(q, k, v, starts_q, starts_k, longest_q, longest_k, softmax_scale, causal):
        calls.append("segments")
        assert causal and q.shape == k.shape == v.shape and q.dim() == 3
        assert starts_q.dtype == starts_k.dtype == torch.int32 and torch.equal(starts_q, starts_k)
        lengths = starts_q.diff().tolist()
        assert starts_q[0] == 0 and sum(lengths) == q.shape[0] and max(lengths) <= min(longest_q, longest_k)
        parts = [
            flash_attn_func(a[None], b[None], c[None], softmax_scale, True)[0]
            for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        return torch.cat(parts)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def test_segments_without_flash_attn_go_to_torch_with_the_same_numbers(on_cuda, monkeypatch):
    def varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, window_size):
        assert window_size == (-1, 0)  # all that came before, nothing after
        flash = fake_flash_attn([]).flash_attn_varlen_func
        return flash(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, True)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "LONGEST_CHUNKED", 0)
    monkeypatch.setattr(attention, "flash_attention", lambda: None)
    q, k = torch.randn(2, 2, 20, 3, 16).bfloat16().unbind()
    v = torch.randn(2, 20, 3, 8).bfloat16()
    segments = torch.arange(40).view(2, 20) // 7
    out = attend(q, k, v, 0.37, AttentionMask(segment_ends=attention.segment_ends(segments)))
    assert out.shape == v.shape
    expected = plain_attention(q.float(), k.float(), v.float(), 0.37, AttentionMask.isolated(segments).allowed)
    assert far(out, expected) < 2e-2


def test_ends_of_segments_come_in_few_sizes_with_empty_segments_behind():
    one = attention.segment_ends(torch.tensor([[0, 0, 1, 1, -1], [3, 4, 4, 3, 3]]))
    assert one.dtype == torch.int32 and len(one) == 65
    assert one[:8].tolist() == [0, 2, 4, 5, 6, 8, 10, 10] and (one[6:] == 10).all()
    for segments, size in ((1, 64), (64, 64), (65, 128), (300, 512)):
        assert len(attention.segment_ends(torch.arange(segments)[None])) == size + 1


@pytest.mark.parametrize(("kind", "call"), [("causal", "whole"), ("packed", "segments"), ("padded", None)])
def test_flash_attn_is_used_where_it_applies_with_the_same_numbers(kind, call, on_cuda, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(attention, "LONGEST_CHUNKED", 0)
    monkeypatch.setattr(attention, "flash_attention", lambda: fake_flash_attn(calls))
    tensors, attention_mask, mask = attention_case(20, 20, kind, 4)
    tensors = [x.detach().bfloat16() for x in tensors]
    if kind == "packed":
        begins = mask[:, 0].int().argmax(-1)  # the first key that each position sees
        attention_mask = AttentionMask(segment_ends=attention.segment_ends(begins))
    out = attend(*tensors, 0.37, attention_mask)
    assert out.shape == (2, 20, 3, 4)
    assert calls[:1] == ([call] if call else [])
    expected = plain_attention(*(x.float() for x in tensors), 0.37, mask)
    assert far(out, expected) < 2e-2
