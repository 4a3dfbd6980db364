"""The choice of what runs a model over a cache: steps in C on a CPU, CUDA graphs, or plain PyTorch."""

from __future__ import annotations

import sys
from functools import lru_cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cache import LatentCache
from model.decoding.eager import EagerRunner
from model.experts import Experts
from model.kernels.grouped_cuda import without_host
from model.ops import FEW_TOKENS

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek


def runner_for(model: MiniDeepSeek, cache: LatentCache) -> EagerRunner:
    """Return what is fastest here: steps in C on a CPU, as graphs on CUDA where they can be recorded."""
    device, drafts = cache.latents.device, len(cache.latents) > model.config.num_hidden_layers
    if device.type == "cpu":
        return resolve_name("model.decoding.native:NativeRunner")(model, cache)
    # Drafts are verified several positions at once.
    if drafts or not fits_graph(model, cache.latents.dtype, device, cache.latents.shape[1]):
        return EagerRunner(model, cache)
    return resolve_name("model.decoding.graph:GraphRunner")(model, cache)


def fits_graph(model: MiniDeepSeek, dtype: torch.dtype, device: torch.device, rows: int = 1) -> bool:
    """Return whether a step in this type holds nothing but work of the device: no hooks, which a graph would leave
    out, and no wait for the device, which is reported."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    experts = [layer.mlp.experts for layer in model.model.layers if layer.is_moe]
    dense = all(type(each) is Experts and isinstance(each.gate_up_proj, Tensor) for each in experts)
    if device.type != "cuda" or not experts or without_host(dtype, device) or (dense and rows <= FEW_TOKENS):
        return True
    kind, capability = str(dtype).removeprefix("torch."), ".".join(map(str, torch.cuda.get_device_capability(device)))
    what = f"of more than {FEW_TOKENS} rows" if dense else "with adapters or quantized"
    waits = f"experts' products {what} in {kind} on compute capability {capability} wait for the device"
    _report(f"decoding without a CUDA graph: {waits}; those in bfloat16 on 9.x and 10.x do not")
    return False


@lru_cache
def _report(text: str) -> None:
    """Print a notice, once."""
    print(f"notice: {text}", file=sys.stderr)
