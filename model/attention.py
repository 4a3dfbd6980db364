"""The attention mask: which positions see which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Which key positions each query position may attend to.

    Attributes:
        allowed: (batch, 1, queries, keys) bool, or None for plain causal attention and where `segment_ends` says all.
        padding: (batch,) the positions on the left that `allowed` hides, where that is all it does besides causality.
        segment_ends: where each segment of packed rows starts, and the end of the last, for kernels that take these.
    """

    allowed: Tensor | None = None
    padding: Tensor | None = None
    segment_ends: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Return whether each position sees all that came before."""
        return self.allowed is None and self.segment_ends is None

    @staticmethod
    def isolated(segment_ids: Tensor) -> AttentionMask:
        """Each position sees what came before in its own segment; segment_ids: (batch, time) integers."""
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return AttentionMask(same & causal(*same.shape[2:], segment_ids.device))

    @staticmethod
    def left_padded(queries: int, keys: int, padding: Tensor) -> AttentionMask:
        """The last `queries` of `keys` positions see what came before; padding: (batch,) left-padding of each row."""
        device = padding.device
        is_token = torch.arange(keys, device=device)[None, None, None, :] >= padding[:, None, None, None]
        # A padding position sees itself, or its softmax over nothing would be NaN.
        itself = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries)
        allowed = causal(queries, keys, device)
        return AttentionMask((allowed & is_token) | (allowed & itself), padding=padding)

    @staticmethod
    def up_to(positions_BT: Tensor, keys: int) -> AttentionMask:
        """Rows of different lengths that begin at key 0: each position sees the keys up to itself."""
        return AttentionMask(torch.arange(keys, device=positions_BT.device) <= positions_BT[:, None, :, None])

    def at(self, last_positions_B: Tensor, queries: int, keys: int) -> AttentionMask:
        """For one of the last `queries` of `keys` positions of each row, counted from the first of these."""
        if self.allowed is None:
            return AttentionMask.up_to((last_positions_B + keys - queries).unsqueeze(1), keys)
        return AttentionMask(select_positions(self.allowed.transpose(1, 2), last_positions_B).transpose(1, 2))

    def as_bool(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Bool, broadcastable to (batch, heads, queries, keys), for the last `queries` positions; None: all visible."""
        if queries == 1 or not self.plain:
            return self.allowed
        return causal(queries, keys, device)


def select_positions(x_BT: Tensor, last_positions_B: Tensor) -> Tensor:
    """(batch or 1, time, ...) -> (batch, 1, ...): one position of each row."""
    rows = torch.arange(len(last_positions_B), device=x_BT.device) if x_BT.shape[0] > 1 else 0
    return x_BT[rows, last_positions_B].unsqueeze(1)


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last `queries` of `keys` positions, each seeing itself and what came before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
