"""The MTP layer and the head in 8 bits, for drafts: half the reading, and what is drafted is verified anyway."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from model.experts import Experts
from model.mtp import MTPLayer
from model.quantized import Int8Weight, quantize_weights
from model.transformer import MiniDeepSeek


class Drafter(NamedTuple):
    """Copies of a model's last MTP layer and head. made_of: types and some numbers of what the copies were made of."""

    layer: MTPLayer
    head: Int8Weight
    made_of: tuple[list[torch.dtype], list[float]]


@torch.no_grad()
def drafter(model: MiniDeepSeek) -> Drafter:
    """Made when it is first asked for, and again when weights have changed."""
    layer, head = model.mtp[-1], model.lm_head.weight
    weights = [*layer.parameters(), head]
    # Fused optimisers change weights without a trace. Copies that were a little old would only be kept less often.
    some = torch.cat([weight.flatten()[:: max(weight.numel() // 16, 1)] for weight in weights])
    made_of, found = ([weight.dtype for weight in weights], some.tolist()), model.drafter
    if found is None or found.made_of != made_of:
        # Weights are left out of the copy that are quantized below.
        matrices = [weight for weight in layer.parameters() if weight.dim() > 1]
        light = copy.deepcopy(layer, {id(weight): weight for weight in matrices})
        # Every matrix but the router's, whose choices are made among close numbers.
        for name, module in list(light.named_modules()):
            if isinstance(module, (Experts, nn.Linear)):
                quantize_weights(light, name, Int8Weight.rounded)
        found = model.drafter = Drafter(light, Int8Weight.rounded(head), made_of)
    return found
