"""Options of a mesh that do not go together, refused before anything is laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errors import UserError
from training.parallel.placement import chunk_sizes, stage_layers

if TYPE_CHECKING:
    from LMConfig import LMConfig
    from model import MiniDeepSeek
    from training.parallel.dist_settings import ShardSettings
    from training.settings import StageSettings


def check_mesh(settings: StageSettings, world: int, config: LMConfig) -> None:
    """Raise `UserError` for options that do not go together."""
    dist, kind = settings.dist, settings.optim.kind
    given = [f"--dist.{name} {getattr(dist, name)}" for name in ("pp", "ep") if getattr(dist, name) > 1]
    option = given[0] if given else f"--dist.zero {dist.zero}"
    if world % (dist.pp * dist.ep):
        shown, verb = " and ".join(given), "do" if len(given) > 1 else "does"
        raise UserError(f"{shown}: {verb} not divide the {world} ranks; see --nproc_per_node of torchrun")
    if config.n_routed_experts % dist.ep:
        raise UserError(f"--dist.ep {dist.ep}: does not divide --model.n_routed_experts {config.n_routed_experts}")
    if dist.pp > 1:
        check_pipeline(settings, world // dist.pp, config)
    if kind not in ("adamw", "adamw_bf16"):
        raise UserError(f"--optim.kind {kind}: needs whole matrices, {option} cuts them; take adamw or adamw_bf16")
    if dist.gradients != "fp32":
        raise UserError(f"--dist.gradients {dist.gradients}: does not go with {option}; leave one of them out")
    if settings.compile:
        raise UserError(f"--compile true: does not go with {option}; leave one of them out")


def check_pipeline(settings: StageSettings, pipelines: int, config: LMConfig) -> None:
    """Raise `UserError` where so many pipelines cannot run."""
    dist, depths = settings.dist, config.num_nextn_predict_layers
    option, stages, layers = f"--dist.pp {dist.pp}", dist.stages, config.num_hidden_layers
    if stages > layers + depths:
        shown = f"{layers} layers" + f" and {depths} of MTP" * bool(depths)
        raise UserError(f"{option}: {stages} stages ({dist.schedule}), but the model has {shown}; lower it")
    if depths > chunk_sizes(layers + depths, stages)[-1]:
        raise UserError(f"{option}: the last of {stages} stages cannot hold all {depths} layers of MTP; lower it")
    if dist.zero == 3:
        raise UserError(f"--dist.zero 3: does not go with {option}, whose stages are needed all the time; give 1")
    if settings.carry_optimizer:
        raise UserError(f"--carry_optimizer: does not go with {option}; leave one of them out")
    for rows in [rows // pipelines for rows in settings.rows_of_steps]:
        micro_rows = min(settings.micro_rows, rows)
        if rows % micro_rows:
            cut = f"does not cut the {rows} rows of a pipeline's step evenly"
            raise UserError(f"{option}: --micro_tokens {settings.micro_tokens} {cut}")
        if dist.schedule != "zbv" and rows // micro_rows < stages:
            raise UserError(
                f"{option}: {dist.schedule} needs {stages} micro-batches of a pipeline, a step has "
                f"{rows // micro_rows}; lower --micro_tokens, now {settings.micro_tokens}, or raise --batch_tokens"
            )


def check_stages(whole: MiniDeepSeek, settings: ShardSettings) -> None:
    """Raise `UserError` where the layers of a stage are all frozen, as where only some have adapters."""
    for number, layers in enumerate(stage_layers(whole.config.num_hidden_layers, len(whole.mtp), settings.stages), 1):
        if layers and not any(p.requires_grad for index in layers for p in whole.model.layers[index].parameters()):
            raise UserError(
                f"--dist.pp {settings.pp}: nothing trains in stage {number} of {settings.stages} "
                f"({settings.schedule}); lower it, or give --lora.targets attention too"
            )
