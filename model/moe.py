"""DeepSeekMoE with auxiliary-loss-free load balancing (DeepSeek-V3 section 2.1.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from LMConfig import LMConfig
from model.experts import Experts
from model.float32 import Float32Buffers, float32_only
from model.ops import Linear, route, swiglu


class SwiGLU(nn.Module):
    """The dense feed-forward layer, and the shared experts: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., hidden) -> (..., hidden)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Routing(NamedTuple):
    """The router's loads and balance loss of one forward pass.

    Attributes:
        counts: (E,) float32, how many tokens chose each expert.
        balance_loss: (B,) float32, the balance loss of each sequence (Eq. 17 to 20, before alpha) times its number of
            tokens, padding left out, so that sums over micro-batches and ranks stay sums over tokens.
    """

    counts: Tensor
    balance_loss: Tensor


class Router(Float32Buffers):
    """Sigmoid affinities, group-limited top-k, and the bias that balances the load by choosing only.

    Attributes: balances_batch: the balance loss counts loads over all sequences of a pass (section 4.5.3).
    """

    balances_batch = False

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))  # the centroids e_i
        # A buffer, not a parameter: no gradient, no weight decay, no optimiser state. Saved and loaded.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor, replayed_NK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (N, hidden) -> weights (N, K) float32, indices (N, K), scores s (N, E) float32.

        replayed: (N, K) experts to take in place of those that are best now; negative in rows without any.
        """
        with float32_only(x_ND.device):
            scores = F.linear(x_ND.float(), self.weight.float()).sigmoid()  # Eq. 15: s = sigmoid(u^T e)
        indices = self.choose(scores.detach())
        if replayed_NK is not None:
            indices = torch.where(replayed_NK < 0, indices, replayed_NK.long())
        weights = scores.gather(1, indices)  # Eq. 16: s + b chooses the experts, s alone weighs them
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # Eq. 13
        return weights * self.config.routed_scaling_factor, indices, scores

    @torch.no_grad()
    def choose(self, scores_NE: Tensor) -> Tensor:
        """The K experts with the highest s + b within the best groups (Eq. 16 and node-limited routing). (N, K)."""
        config = self.config
        biased = scores_NE + self.e_score_correction_bias
        if config.topk_group < config.n_group:
            groups = biased.unflatten(1, (config.n_group, -1))
            group_scores = groups.topk(2, dim=-1).values.sum(-1)
            best = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            lost = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
            # -inf, not 0: a chosen group may hold negative biased scores, which must still win over a lost group.
            biased = groups.masked_fill(lost.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


class DeepseekMoE(nn.Module):
    """Shared experts for every token plus K of E routed experts (Eq. 12). No token is dropped."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        inner = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, inner) if inner else None

    def forward(
        self,
        x_BTD: Tensor,
        token_mask_BT: Tensor | None = None,
        count: bool = True,
        replayed_BTK: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x: (batch, time, hidden) -> the same, and what the router did unless `count` is off (decoding).

        token_mask: (batch, time) bool, False where a position is padding and is not counted. replayed: see `Router`.
        """
        x_ND, replayed = x_BTD.flatten(0, 1), () if replayed_BTK is None else (replayed_BTK.flatten(0, 1),)
        weights, indices, *scores = self.gate(x_ND, *replayed) if count or replayed else route(self.gate, x_ND)
        out = self.experts(x_ND, weights, indices).view_as(x_BTD)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_BTD)
        if not count:
            return out, None
        scores_BTE, indices_BTK = (each.unflatten(0, x_BTD.shape[:2]) for each in (*scores, indices))
        return out, routing(scores_BTE, indices_BTK, token_mask_BT, self.gate.balances_batch)


def routing(scores_BTE: Tensor, indices_BTK: Tensor, token_mask_BT: Tensor | None, over_batch: bool = False) -> Routing:
    """Loads and the balance loss, each sequence for itself, or by loads counted `over_batch`.

    Eq. 18: f_i = E / (K T) * #tokens that chose i (no gradient); Eq. 19, 20: P_i = mean over t of s_i / sum_j s_j;
    Eq. 17: L = sum_i f_i P_i, which is 1 at perfect balance. Chosen is what is computed, with bias and groups, where
    Eq. 18 writes the top K of s alone.
    """
    batch, time, experts = scores_BTE.shape
    top_k = indices_BTK.shape[-1]
    chosen_BTE = torch.zeros_like(scores_BTE).scatter_(2, indices_BTK, 1.0)
    probability_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
    if token_mask_BT is None:
        length_B1 = scores_BTE.new_full((batch, 1), time)
    else:
        length_B1 = token_mask_BT.sum(1, keepdim=True).to(scores_BTE)
        chosen_BTE = chosen_BTE * token_mask_BT.unsqueeze(-1)
        probability_BTE = probability_BTE * token_mask_BT.unsqueeze(-1)
    counts_BE = chosen_BTE.sum(1)
    f_BE = counts_BE * experts / (top_k * length_B1.clamp(min=1))
    if over_batch:  # f of all tokens together; the sum over sequences of P, times their lengths, is P of all of them
        f_BE = counts_BE.sum(0) * experts / (top_k * length_B1.sum().clamp(min=1))
    p_BE = probability_BTE.sum(1) / length_B1.clamp(min=1)
    return Routing(counts_BE.sum(0), (f_BE * p_BE).sum(1) * length_B1.squeeze(1))
