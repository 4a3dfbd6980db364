"""A model that is cut begins without memory: each rank has its share of what one process begins with, and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from forked import Forked, at_scale
from resident import seen_while
from torch import nn

from errors import DamagedCheckpoint
from model import MiniDeepSeek
from training.parallel.dist_settings import ShardSettings
from training.parallel.ranks import Ranks
from training.settings import NextTokenSettings

DEEP = {"num_hidden_layers": 8, "num_nextn_predict_layers": 1}
MESHES = {  # ranks, which are looked at, how they cut, model
    "ep 2, two copies, zero 3": (4, (1,), {"ep": 2, "zero": 3}, {}),
    "pp 2, ep 2, tied, zero 1": (4, (1, 2), {"pp": 2, "ep": 2, "zero": 1}, {"tie_word_embeddings": True}),
    "pp 2, zbv, with biases": (2, (0, 1), {"pp": 2, "schedule": "zbv"}, {"attention_bias": True}),
}
FEW = ("ep 2, two copies, zero 3", "pp 2, ep 2, tied, zero 1")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Once, and not in each process that is forked."""
    for name in ("training.parallel.sharding", "torch.testing._internal.distributed.fake_pg"):
        import_module(name)


@pytest.fixture
def as_rank(tmp_path) -> Callable[..., None]:
    """`as_rank(rank, world, cut, work)`: `work(mesh, shard)` as that rank, whose peers are silent.

    `shard(model)` cuts one that has no memory, and returns its shards with their first weights.
    """

    def as_rank(rank: int, world: int, cut: dict, work: Callable) -> None:
        def call() -> None:
            from training.parallel.mesh import Mesh
            from training.parallel.schedule import Pipeline
            from training.parallel.sharding import Sharded

            store = import_module("torch.testing._internal.distributed.fake_pg").FakeStore()
            dist.init_process_group("fake", store=store, rank=rank, world_size=world)
            given = dict(out="none", sequence_length=16, batch_tokens=256, micro_tokens=16, dist=ShardSettings(**cut))
            settings = NextTokenSettings(**given)
            mesh = Mesh.of(settings, Ranks(rank, world, torch.device("cpu"), pp=settings.dist.pp))

            def shard(model: MiniDeepSeek) -> object:
                pipeline = Pipeline(model, mesh, settings.dist, torch.float32) if settings.dist.pp > 1 else None
                shards = Sharded(model, mesh, settings.dist.zero, torch.float32, pipeline).shards
                model.put_in(shards)
                return shards

            work(mesh, shard)

        process = Forked(call, tmp_path / "rank.log")
        process.wait(120)
        assert process.code == 0, process.output()

    return as_rank


@pytest.mark.parametrize("case", [*FEW, *at_scale("pp 2, zbv, with biases")])
def test_shares_are_those_of_one_process_to_the_bit(case, as_rank, tiny_config, tmp_path):
    """Of weights that are drawn, and of those that are read; all of a pipeline's are on some rank."""
    world, ranks, cut, changes = MESHES[case]
    config = tiny_config(**DEEP, **changes)
    torch.manual_seed(5)
    whole = MiniDeepSeek(config)
    drawn = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    whole.mtp[0].mlp.gate.e_score_correction_bias.normal_()
    whole.save_pretrained(tmp_path / "saved")
    saved, tied = whole.state_dict(), {"lm_head.weight"} if config.tie_word_embeddings else set()

    def work(mesh, shard: Callable) -> None:
        from training.parallel.initial import Deferred

        torch.manual_seed(5)
        models = (Deferred.drawn(config), drawn), (Deferred.read(tmp_path / "saved", lambda config: config), saved)
        torch.rand(9)  # data may be drawn meanwhile
        for model, expected in models:
            found = shard(model).places()
            assert len(found) > 20 and found.keys() <= expected.keys() - tied
            assert mesh.pp.size() > 1 or found.keys() == expected.keys() - tied
            for name, share in found.items():
                rows = expected[name]
                if name in dict(whole.named_parameters()):
                    for of in (mesh.ep, mesh.copies) if ".experts." in name else (mesh.data,):
                        rows = [*rows.chunk(of.size()), *of.size() * [rows[:0]]][of.get_local_rank()]
                assert torch.equal(share, rows), name
        (tmp_path / str(dist.get_rank())).write_text("\n".join(found))

    for rank in ranks:
        as_rank(rank, world, cut, work)
    everywhere = {name for rank in ranks for name in (tmp_path / str(rank)).read_text().split()}
    assert everywhere == saved.keys() - tied


@pytest.mark.parametrize(("targets", "base"), [("all", "auto"), ("all", "nf4"), ("attention,ffn", "dora")])
def test_an_adapter_begins_as_that_of_one_process_to_the_bit(targets, base, as_rank, tiny_config, tmp_path):
    """Drawn after weights that no rank draws, on weights that are rounded when they have been read.

    What is quantized, or measured for DoRA, is read for that alone: no other matrix of the base is there before.
    """
    from training.adapters.adapter import Adapter, LoraSettings
    from training.adapters.frozen import shrink_frozen

    torch.manual_seed(6)
    MiniDeepSeek(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "saved")

    def adapted(make: Callable) -> Adapter:
        torch.manual_seed(5)
        model = make(tmp_path / "saved", adapt=lambda config: config)
        model.mtp = nn.ModuleList()
        adapter = Adapter.add(model, LoraSettings(targets=targets, dora=base == "dora"), "base")
        shrink_frozen(model, "auto" if base == "dora" else base, torch.bfloat16)
        return adapter

    one = adapted(MiniDeepSeek.from_pretrained)
    expected, trained = one.model.state_dict(), {n for n, p in one.model.named_parameters() if p.requires_grad}

    def work(mesh, shard: Callable) -> None:
        adapter = adapted(Deferred.read)
        assert all(p.is_meta for p in adapter.model.parameters() if p.dim() > 1 and not p.requires_grad)
        places = shard(adapter.model).places()
        assert adapter.base == one.base and len(trained) > 20 and places.keys() == expected.keys() - {"lm_head.weight"}
        for name, share in places.items():
            rows = expected[name]
            if name in dict(one.model.named_parameters()):
                rows = [*rows.chunk(2), rows[:0]][mesh.data.get_local_rank()]
            assert torch.equal(share, rows) and share.dtype == rows.dtype, name

    from training.parallel.initial import Deferred

    as_rank(1, 2, {"zero": 3}, work)


def test_no_rank_ever_holds_what_it_does_not_keep(as_rank, tiny_config, tmp_path):
    """But one whole weight at a time. A pair that should be tied is refused."""
    config = tiny_config(**{**DEEP, "num_hidden_layers": 12})
    MiniDeepSeek(config).save_pretrained(tmp_path / "saved")
    with torch.device("meta"):
        sizes = [p.nbytes for p in MiniDeepSeek(config).parameters()]

    def work(_, shard: Callable) -> None:
        for make in (Deferred.drawn, lambda _: Deferred.read(tmp_path / "saved", lambda config: config)):
            shards = []
            seen = seen_while(lambda make=make, shards=shards: shards.append(shard(make(config))))
            held = sum(p.nbytes for p in shards[0].places().values())
            assert len(seen) > 100 and held <= max(seen) < held + 3 * max(sizes) < sum(sizes) / 2
        tied = Deferred.read(tmp_path / "saved", lambda config: replace(config, tie_word_embeddings=True))
        with pytest.raises(DamagedCheckpoint, match=r"saved: lm_head.weight and model.embed_tokens.weight differ"):
            shard(tied)

    from training.parallel.initial import Deferred

    as_rank(1, 4, {"zero": 3}, work)
