"""Which kernels a model's attention and experts take in training on this machine: what a run prints at its start."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

from LMConfig import LMConfig
from model.attention import FLASH_ATTN, LONGEST_CHUNKED, SDPA, cuda_kernel, flash_attention
from model.grouped_linear import without_host
from model.kernels import causal

TIME = 16  # positions of the tensors that are asked about; no rule depends on how many they are


def kernel_report(config: LMConfig, dtype: torch.dtype, device: torch.device, time: int, compiled: bool = False) -> str:
    """One line. dtype: of the products; time: positions of a row; compiled: by torch.compile."""
    on_cpu = device.type == "cpu"
    if on_cpu:
        whole, isolated = (_attention_on_cpu(config, dtype, time, in_c) for in_c in (not compiled, False))
    else:
        whole, isolated = (_attention_on_cuda(config, dtype, device, segments) for segments in (False, True))
    attention = f"attention by {whole}" + ("" if isolated == whole else f", of isolated samples by {isolated}")
    if on_cpu or not config.is_moe_layer(config.num_hidden_layers - 1):
        return attention
    if without_host(dtype, device):
        return f"{attention}; experts by grouped_mm"
    return f"{attention}; experts one by one, waiting for the device (in one launch: bf16 on sm90 and sm100)"


def _attention_on_cpu(config: LMConfig, dtype: torch.dtype, time: int, in_c: bool) -> str:
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    q = torch.empty(1, TIME, heads, nope + rope, dtype=dtype)
    kv, k_rope = q.new_empty(1, TIME, heads, nope + config.v_head_dim), q.new_empty(1, TIME, rope)
    if in_c and causal.fits(q, kv, k_rope):
        return "causal.c"
    return "chunks of queries" if time <= LONGEST_CHUNKED else SDPA


def _attention_on_cuda(config: LMConfig, dtype: torch.dtype, device: torch.device, isolated: bool) -> str:
    q = torch.empty(1, TIME, config.num_attention_heads, config.qk_head_dim, dtype=dtype, device=device)
    kernel = cuda_kernel(q, config.v_head_dim, plain=not isolated, isolated=isolated)
    if kernel == FLASH_ATTN:
        return f"{FLASH_ATTN} {flash_attention().__version__}"
    return f"{SDPA} ({sdpa_backend(q, config.v_head_dim, isolated)})" if kernel == SDPA else kernel


def sdpa_backend(q_BTHQ: torch.Tensor, value_size: int, isolated: bool) -> str:
    """What `scaled_dot_product_attention` takes in training, by torch's own choice: flash, efficient, cudnn or math.

    v comes padded to the size of q and k (see `model.attention.attend`), and isolated segments as a mask.
    """
    q = q_BTHQ.transpose(1, 2).requires_grad_()
    v = q if value_size <= q.shape[-1] else q.new_empty(*q.shape[:-1], value_size)
    mask = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device) if isolated else None
    choice = torch._fused_sdp_choice(q, q, v, attn_mask=mask, is_causal=mask is None)
    return SDPBackend(choice).name.lower().removesuffix("_attention")
