"""Layers by torch.compile (`--compile`), each kind of layer one graph for each shape."""

from __future__ import annotations

import torch

from errors import quiet_compiler
from model import MiniDeepSeek

GRAPHS = 64  # that torch.compile may make of one kind of layer


def compile_layers(model: MiniDeepSeek, is_asked_for: bool) -> None:
    """Compile every layer; where nobody asked for it, what cannot be compiled here runs as it is."""
    quiet_compiler()
    # Each shape is one: of training and validation, their last batches, and several numbers of segments.
    torch._dynamo.config.recompile_limit = GRAPHS
    if not is_asked_for:
        torch._dynamo.config.suppress_errors = True
    for layer in [*model.model.layers, *model.mtp]:
        layer.compile(dynamic=False)
