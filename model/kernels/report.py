"""Which kernels a run takes, said at its start."""

from __future__ import annotations

import torch

from LMConfig import LMConfig
from model.kernels import attention, causal, grouped_cuda


def kernel_report(config: LMConfig, dtype: torch.dtype, device: torch.device, time: int, compiled: bool = False) -> str:
    """Say in one line which kernels training takes here. time: positions of a row; compiled: by torch.compile."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    q = torch.empty(1, 16, heads, nope + rope, dtype=dtype, device=device)  # no rule depends on how many positions
    if device.type == "cpu":
        kv, k_rope = q.new_empty(1, 16, heads, nope + config.v_head_dim), q.new_empty(1, 16, rope)
        isolated = "chunks of queries" if time <= attention.LONGEST_CHUNKED else attention.SDPA
        in_c = config.attention == "mla" and not compiled and causal.fits(q, kv, k_rope)
        whole = "causal.c" if in_c else isolated
    else:
        whole, isolated = (attention.report(q, config.v_head_dim, segments) for segments in (False, True))
    report = "layers compiled; " * compiled + f"attention by {whole}"
    report += "" if isolated == whole else f", of isolated samples by {isolated}"
    if device.type == "cpu" or not config.is_moe_layer(config.num_hidden_layers - 1):
        return report
    if grouped_cuda.without_host(dtype, device):
        return f"{report}; experts by grouped_mm"
    return f"{report}; experts one by one, a wait for the device in each layer (none: bf16 on sm90 and sm100)"
