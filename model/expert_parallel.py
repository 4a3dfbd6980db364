"""Experts over ranks (DeepSeek-V3 section 3.2.2): a token travels once to each rank that holds some of its experts.

There its experts' weighted outputs are summed, and one row travels back. No token is dropped, and a rank without any
has no case of its own: every table of rows ends with one of zeros.

Shapes: N tokens of this rank, K experts a token, S rows sent and R received, P pairs (row, expert), D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.experts import NO_CORRECTIONS, Combine, Dispatch, Experts, LowRank
from model.ops import autocast


class AllToAll(torch.autograd.Function):
    """Send rows to the ranks of a group, and get theirs; the gradient of a row goes back to where the row came from.

    (S + 1, F) -> (R + 1, F): the last row stays, as zeros.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.ways = received, sent, group
        out = rows.new_empty(sum(received) + 1, *rows.shape[1:])
        out[-1] = 0
        dist.all_to_all_single(out[:-1], rows[:-1].contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return AllToAll.forward(ctx, grad, *ctx.ways), None, None, None


class Rows(NamedTuple):
    """Some of the choices, each a row, sorted by a key.

    Attributes:
        token: (rows + 1,) of each row; choice: the flat (token, choice); both those of the last token in the last row.
        of_choice: (tokens, K) the row of each choice; of those without one, the last row.
        counts: rows of each key.
    """

    token: Tensor
    choice: Tensor
    of_choice: Tensor
    counts: Tensor

    @staticmethod
    def of(key_NK: Tensor, has_row_NK: Tensor, keys: int) -> Rows:
        """key: 0 .. keys - 1."""
        tokens, top_k = key_NK.shape
        key = key_NK.masked_fill(~has_row_NK, keys).flatten()
        counts = torch.bincount(key, minlength=keys + 1)[:keys]
        choice = key.sort(stable=True).indices[: int(counts.sum())]
        of_choice = torch.full_like(key, len(choice))
        of_choice[choice] = torch.arange(len(choice), device=key.device)
        choice = torch.cat((choice, choice.new_tensor([tokens * top_k - 1])))
        return Rows(choice // top_k, choice, of_choice.view(tokens, top_k), counts)


class ExpertsOverRanks(Experts):
    """The experts of this rank, a share of a layer's, called like all of them.

    Attributes: group: the ranks that share a layer's; rows_sent: to other ranks, in forward passes so far.
    """

    def __init__(self, whole: Experts, group: dist.ProcessGroup) -> None:
        """Take this rank's share of `whole`."""
        nn.Module.__init__(self)
        vars(self).update({name: value for name, value in vars(whole).items() if name not in vars(self)})
        self.group, self.later, self.rows_sent = group, None, 0
        ranks, rank = group.size(), group.rank()
        for name, stack in whole.named_parameters():
            share = stack.detach().chunk(ranks)[rank].clone()
            setattr(self, name, nn.Parameter(share, requires_grad=stack.requires_grad))

    @torch._disable_dynamo
    def forward(
        self,
        x_ND: Tensor,
        weights_NK: Tensor,
        indices_NK: Tensor,
        corrections: Mapping[str, LowRank] = NO_CORRECTIONS,
    ) -> Tensor:
        """sum_k weight_k * expert_k(x) for each token, as `Experts.forward`, over the experts of all ranks."""
        x_ND, share, ranks = autocast(x_ND), len(self.gate_up_proj), self.group.size()
        rank_NK = indices_NK // share
        # A row for the first of the choices that a token has on a rank; the others travel with it.
        again = (rank_NK[:, :, None] == rank_NK[:, None, :]).tril(-1).any(2)
        out = Rows.of(rank_NK, ~again, ranks)
        received = torch.empty_like(out.counts)
        dist.all_to_all_single(received, out.counts, group=self.group)
        ways = out.counts.tolist(), received.tolist(), self.group
        self.rows_sent += sum(ways[0]) - ways[0][self.group.rank()]

        x_SD = Dispatch.apply(x_ND, out.token, out.of_choice)
        here_SK = rank_NK[out.token] == rank_NK.flatten()[out.choice][:, None]
        weights_SK, local_SK = weights_NK[out.token] * here_SK, torch.where(here_SK, indices_NK[out.token] % share, -1)
        x_RD = AllToAll.apply(x_SD, *ways)
        weights_RK, local_RK = AllToAll.apply(torch.cat((weights_SK, local_SK + 1), 1), *ways).chunk(2, 1)
        local_RK = local_RK.long() - 1  # the row of zeros has none

        pairs = Rows.of(local_RK, local_RK >= 0, share)
        x_PD = Dispatch.apply(x_RD, pairs.token, pairs.of_choice)
        weights_P, local_P = (values.flatten()[pairs.choice] for values in (weights_RK, local_RK.clamp(min=0)))
        y_PD = super().forward(x_PD, weights_P[:, None], local_P[:, None], corrections)
        y_RD = Combine.apply(y_PD, pairs.token, pairs.of_choice)
        y_SD = AllToAll.apply(y_RD, ways[1], ways[0], self.group)
        return Combine.apply(y_SD, out.token, out.of_choice)


def over_ranks(whole: Experts, group: dist.ProcessGroup) -> ExpertsOverRanks:
    """Return this rank's share of `whole`, whose products are made as there: in FP8, say."""
    own = type(whole)
    kind = ExpertsOverRanks if own is Experts else type(f"{own.__name__}OverRanks", (ExpertsOverRanks, own), {})
    return kind(whole, group)
