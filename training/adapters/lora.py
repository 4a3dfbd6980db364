"""What of a model low-rank adapters (LoRA) adapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from errors import UserError, quiet_imports, require
from model import MiniDeepSeek

# Short names of what can be adapted: matrices in every main layer, by name. The MTP layers stay as they are.
MATRICES = {
    "attention": r"self_attn\.(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "ffn": r"mlp\.(shared_experts\.)?(gate|up|down)_proj",
}
STACKED = ("gate_up_proj", "down_proj")
TARGETS = (*MATRICES, "experts", "all")


@dataclass
class LoraSettings:
    """Low-rank adapters (LoRA, Hu et al. 2021): W + alpha / r * B A, of which A and B are trained.

    Args:
        targets: attention, ffn (dense layers and shared experts), experts (routed ones) or all, separated by commas.
        r: rank.
        alpha: scale.
        dropout: of what A reads; the routed experts have none.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023).
        dora: train magnitude and direction apart (DoRA, Liu et al. 2024); not for experts.
        plus_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024).
    """

    targets: str = "attention,ffn"
    r: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    rslora: bool = False
    dora: bool = False
    plus_ratio: float = 1.0

    def __post_init__(self) -> None:
        names = self.chosen
        if not names or (strange := names - set(TARGETS)):
            what = f"no target {min(strange)!r}" if names else "nothing chosen"
            raise UserError(f"--lora.targets {self.targets}: {what}; choose from {', '.join(TARGETS)}")
        positive = self.r >= 1 and self.alpha > 0 and self.plus_ratio > 0
        require(positive, "--lora.r, --lora.alpha and --lora.plus_ratio must be above 0")
        require(0 <= self.dropout < 1, f"--lora.dropout {self.dropout}: must be at least 0 and below 1")
        if self.dora and self.adapts_experts:
            raise UserError("--lora.dora: not for stacked experts; choose --lora.targets attention,ffn")

    @property
    def chosen(self) -> set[str]:
        return {name.strip() for name in self.targets.split(",") if name.strip()}

    @property
    def adapts_experts(self) -> bool:
        return bool(self.chosen & {"experts", "all"})

    def peft_config(self, model: MiniDeepSeek, base: str) -> Any:
        """Return a peft.LoraConfig. base: folder of the model, for whoever opens the adapter with peft."""
        # Not as an annotation: the parser of the command line would import peft to read it.
        with quiet_imports():
            from peft import LoraConfig  # takes seconds to import, which --help need not wait for

        kinds = [pattern for kind, pattern in MATRICES.items() if self.chosen & {kind, "all"}]
        moe = [f"model.layers.{place}.mlp.experts" for place, layer in enumerate(model.model.layers) if layer.is_moe]
        return LoraConfig(
            base_model_name_or_path=base,
            r=self.r,
            lora_alpha=self.alpha,
            # peft refuses any with stacked experts, even where others would have it; `Adapter.add` puts it in place.
            lora_dropout=0.0 if self.adapts_experts else self.dropout,
            target_modules=rf"model\.layers\.\d+\.({'|'.join(kinds)})" if kinds else [],
            target_parameters=[f"{of}.{name}" for of in moe for name in STACKED] if self.adapts_experts else None,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )
