"""The ranks as a mesh: (edp, ep). Experts are spread over ep and copied over edp; all else is copied over both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errors import UserError
from training.parallel.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from training.settings import StageSettings


def make_mesh(settings: StageSettings, ranks: Ranks, experts: int) -> DeviceMesh:
    """Return the mesh of `--dist.ep`, with `data`, all ranks, beside its two axes. Called by all ranks together.

    Neighbouring ranks share the experts of a layer: those of a node, and with n_group nodes a group of experts each.
    Raises `UserError` for what the ranks, the experts or the optimiser cannot share.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import

    dist = settings.dist
    if ranks.world % dist.ep:
        raise UserError(f"--dist.ep {dist.ep}: does not divide the {ranks.world} ranks")
    if experts % dist.ep:
        raise UserError(f"--dist.ep {dist.ep}: does not divide --model.n_routed_experts {experts}")
    if settings.optim.kind in ("muon", "adamw8bit", "paged_adamw8bit"):
        raise UserError(
            f"--optim.kind {settings.optim.kind}: needs whole matrices, which --dist.zero {dist.zero} --dist.ep {dist.ep} "
            "cut; take adamw or adamw_bf16"
        )
    mesh = init_device_mesh(ranks.device.type, (ranks.world // dist.ep, dist.ep), mesh_dim_names=("edp", "ep"))
    mesh["edp", "ep"]._flatten("data")
    return mesh
