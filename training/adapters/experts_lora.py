"""Low-rank adapters of stacked experts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from errors import quiet_imports
from model.experts import NO_CORRECTIONS, LowRank

with quiet_imports():
    from peft.tuners.lora.layer import ParamWrapper


class ExpertsLora(ParamWrapper):
    """peft's wrapper of stacked experts, which would add B A to every expert's matrix in every step.

    Here an expert's rows go through its own A and B: no gradient of a whole matrix, and no sum rounded to bfloat16.
    """

    def forward(
        self,
        x_ND: Tensor,
        weights_NK: Tensor,
        indices_NK: Tensor,
        corrections: Mapping[str, LowRank] = NO_CORRECTIONS,
    ) -> Tensor:
        """As `model.experts.Experts`, which it wraps, perhaps around another wrapper."""
        if not self.disable_adapters and not self.merged:
            (name,) = self.active_adapters
            a = self.lora_A[name].weight.unflatten(0, (self.num_experts, -1))
            b = self.lora_B[name].weight.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1).contiguous()
            corrections = {**corrections, self.parameter_name: LowRank(a, b, self.scaling[name])}
        return self.base_layer(x_ND, weights_NK, indices_NK, corrections)
