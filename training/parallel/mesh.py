"""The ranks as a mesh: layers are spread over `pp`, a layer's experts over `ep`, copied over `copies`; `data`: both."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from training.parallel.ranks import Ranks
    from training.settings import StageSettings


class Mesh(NamedTuple):
    """The ranks that work with this one.

    Attributes: data: those with the same layers; ep: neighbours among them that share the experts of a layer; copies:
    those with the same share; pp: those with the other layers, a pipeline.
    """

    data: DeviceMesh
    ep: DeviceMesh
    copies: DeviceMesh
    pp: DeviceMesh

    @classmethod
    def of(cls, settings: StageSettings, ranks: Ranks) -> Mesh:
        """Lay out the ranks; called by all of them together.

        Neighbours are on one node: with as many groups of experts as nodes, a token goes to `topk_group` nodes at most.
        """
        from torch.distributed.device_mesh import init_device_mesh  # slow to import

        pp, ep = settings.dist.pp, settings.dist.ep
        sizes = (pp, ranks.world // pp // ep, ep)
        whole = init_device_mesh(ranks.device.type, sizes, mesh_dim_names=("pp", "copies", "ep"))
        return cls(whole["copies", "ep"]._flatten("data"), whole["ep"], whole["copies"], whole["pp"])
