"""The recipe of the real shape on its 2,048 ranks, of which one is here: shapes and memory, no numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import Forked

from cli import parse
from model import MiniDeepSeek
from training.parallel.placement import parts
from training.parallel.plan import PlanSettings
from training.settings import model_config

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "deepseek-v3.yaml"
WORLD = 2048


@pytest.fixture
def on_rank(tmp_path) -> Callable[[int, Callable[[], None]], None]:
    """`on_rank(rank, work)`: calls it as one of the ranks, whose peers answer with anything."""

    def on_rank(rank: int, work: Callable[[], None]) -> None:
        def call() -> None:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
            work()

        process = Forked(call, tmp_path / f"{rank}.log")
        process.wait(120)
        assert process.code == 0, process.output()

    return on_rank


@pytest.mark.parametrize("rank", [0, WORLD - 1])
def test_each_rank_of_the_paper_holds_what_the_plan_says(rank, on_rank):
    def check() -> None:
        from training.parallel.mesh import Mesh
        from training.parallel.mesh_checks import check_mesh
        from training.parallel.ranks import Ranks
        from training.parallel.schedule import Pipeline
        from training.parallel.sharding import Sharded

        settings = parse(PlanSettings, "", ["--config", str(RECIPE)])
        config = model_config(settings.model)
        with torch.device("meta"):
            whole = MiniDeepSeek(config)
        ranks = Ranks(rank, WORLD, torch.device("cpu"), pp=settings.dist.pp)
        check_mesh(settings, WORLD, config)
        mesh = Mesh.of(settings, ranks)
        assert (mesh.pp.size(), mesh.data.size(), mesh.ep.size(), mesh.copies.size()) == (16, 128, 64, 2)
        pipeline = Pipeline(whole, mesh, settings.dist, torch.bfloat16)
        planned = parts(config, 16, True, settings.sequence_length)[mesh.pp.get_local_rank()]
        assert [*pipeline.stages] == [rank // 128, 31 - rank // 128]
        whole_weights = {name: p for stage in pipeline.stages.values() for name, p in stage.named_parameters()}
        experts = sum(p.numel() for name, p in whole_weights.items() if ".mlp.experts." in name)
        assert (experts, sum(p.numel() for p in whole_weights.values()) - experts) == (planned.experts, planned.weights)

        sharded = Sharded(whole, mesh, settings.dist.zero, torch.bfloat16, pipeline)
        held = {name: p.numel() for name, p in sharded.shards.named_parameters()}
        of_experts = sum(numel for name, numel in held.items() if ".mlp.experts." in name)
        assert of_experts == planned.experts // 128  # spread over 64 ranks, each share over its two copies
        assert sum(held.values()) - of_experts == pytest.approx(planned.weights / 128, rel=0.03)  # rows do not divide

    on_rank(rank, check)
