"""The ranks as a mesh: experts are spread over `ep` and copied over `copies`; all else is on all of `data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from errors import UserError, check_least
from training.parallel.ranks import DistSettings, Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from training.settings import StageSettings


@dataclass
class ShardSettings(DistSettings):
    """How ranks work together, and what is cut among them.

    Args:
        zero: 0: each rank holds all weights, gradients and optimiser state; 1: a share of the optimiser state, with its
            weights in float32; 3: of gradients and weights too.
        ep: ranks that the experts of a layer are spread over; more than 1 cuts the optimiser state too.
    """

    zero: int = 0
    ep: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(1, **{"dist.ep": self.ep})
        if self.zero not in (0, 1, 3):
            raise UserError(f"--dist.zero {self.zero}: one of 0, 1, 3")

    def cuts(self, world: int) -> bool:
        """Return whether each of `world` ranks holds less than the whole."""
        return self.ep > 1 or (self.zero > 0 and world > 1)


class Mesh(NamedTuple):
    """Attributes: data: all ranks; ep: neighbouring ones that share the experts of a layer; copies: of such a share."""

    data: DeviceMesh
    ep: DeviceMesh
    copies: DeviceMesh

    @classmethod
    def of(cls, settings: StageSettings, ranks: Ranks) -> Mesh:
        """Lay out the ranks; called by all of them together.

        Neighbours are on one node: with as many groups of experts as nodes, a token goes to `topk_group` nodes at most.
        """
        from torch.distributed.device_mesh import init_device_mesh  # slow to import

        ep = settings.dist.ep
        whole = init_device_mesh(ranks.device.type, (ranks.world // ep, ep), mesh_dim_names=("copies", "ep"))
        return cls(whole._flatten("data"), whole["ep"], whole["copies"])


def check_mesh(settings: StageSettings, world: int, experts: int) -> None:
    """Raise `UserError` for options that do not go together."""
    dist, kind = settings.dist, settings.optim.kind
    option = f"--dist.zero {dist.zero}" if dist.zero else f"--dist.ep {dist.ep}"
    if world % dist.ep:
        raise UserError(f"--dist.ep {dist.ep}: does not divide the {world} ranks; see --nproc_per_node of torchrun")
    if experts % dist.ep:
        raise UserError(f"--dist.ep {dist.ep}: does not divide --model.n_routed_experts {experts}")
    if kind not in ("adamw", "adamw_bf16"):
        raise UserError(f"--optim.kind {kind}: needs whole matrices, {option} cuts them; take adamw or adamw_bf16")
    if dist.gradients != "fp32":
        raise UserError(f"--dist.gradients {dist.gradients}: does not go with {option}; leave one of them out")
    if settings.compile:
        raise UserError(f"--compile true: does not go with {option}; leave one of them out")
