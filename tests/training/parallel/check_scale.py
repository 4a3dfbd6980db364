"""`make scale`: every mesh, on 2 to 8 processes, trains as one process does; short forms are in make test."""

from __future__ import annotations

import pytest
from test_equality import Packed, Uneven, assert_the_same_training
from test_sharding import TIED, imported, train  # noqa: F401
from toy_stage import TIME

pytestmark = pytest.mark.scale
ACCUMULATED = {"micro_tokens": TIME}
CUT = ACCUMULATED | {"gradient_checkpointing": True}
NO_MTP, TWO_MTP = {"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 2}
FEW = TIED | {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
TALL = {"num_hidden_layers": 7}
CASES = {  # ranks, how they cut, rows, model, and how the step is cut
    "pp 2, tied": (2, {"pp": 2}, Packed, TIED, CUT),
    "pp 2, tied, no MTP": (2, {"pp": 2}, Uneven, {**TIED, **NO_MTP}, ACCUMULATED),
    "pp 2, no MTP": (2, {"pp": 2}, Uneven, NO_MTP, ACCUMULATED),
    "pp 2, two MTP layers": (2, {"pp": 2}, Packed, TWO_MTP, CUT),
    "pp 2, zbv, tied": (2, {"pp": 2, "schedule": "zbv"}, Packed, TIED, CUT),
    "pp 2, zbv, tied, no MTP": (2, {"pp": 2, "schedule": "zbv"}, Packed, TIED | NO_MTP | TALL, CUT),
    "pp 2, zbv, two micro-batches": (2, {"pp": 2, "schedule": "zbv"}, Uneven, {}, {"micro_tokens": 4 * TIME}),
    "pp 2, dualpipev, tied, recomputed": (2, {"pp": 2, "schedule": "dualpipev"}, Packed, TIED, CUT),
    "pp 4": (4, {"pp": 4}, Packed, {}, CUT),
    "pp 4, zbv": (4, {"pp": 4, "schedule": "zbv"}, Packed, TALL, CUT),
    "pp 4, dualpipev": (4, {"pp": 4, "schedule": "dualpipev"}, Packed, TALL, CUT),
    "pp 2, zero 1": (4, {"pp": 2, "zero": 1}, Packed, {}, CUT),
    "pp 2, zbv, zero 1, tied": (4, {"pp": 2, "zero": 1, "schedule": "zbv"}, Packed, TIED, CUT),
    "pp 2, dualpipev, zero 1": (4, {"pp": 2, "zero": 1, "schedule": "dualpipev"}, Packed, {}, CUT),
    "pp 2, ep 2": (4, {"pp": 2, "ep": 2}, Packed, {}, CUT),
    "pp 2, zbv, ep 2": (4, {"pp": 2, "ep": 2, "schedule": "zbv"}, Uneven, {}, CUT),
    "pp 2, dualpipev, ep 2": (4, {"pp": 2, "ep": 2, "schedule": "dualpipev"}, Packed, {}, CUT),
    "pp 2, ep 2, data 2": (8, {"pp": 2, "ep": 2, "zero": 1}, Packed, {}, CUT),
    "pp 2, zbv, ep 2, data 2": (8, {"pp": 2, "ep": 2, "schedule": "zbv"}, Uneven, TIED, CUT),
    "pp 2, dualpipev, ep 2, data 2": (
        8, {"pp": 2, "ep": 2, "zero": 1, "schedule": "dualpipev"}, Packed, {}, {**CUT, "batch_tokens": 16 * TIME},
    ),
    "ep 4": (4, {"ep": 4}, Packed, NO_MTP, CUT),
    "zero 3, ep 2, tied, two MTP layers": (2, {"zero": 3, "ep": 2}, Packed, TIED | TWO_MTP, CUT),
    "zero 3, two MTP layers": (2, {"zero": 3}, Packed, TWO_MTP, CUT),
    "zero 1": (4, {"zero": 1}, Packed, TWO_MTP, ACCUMULATED),
    "zero 3": (4, {"zero": 3}, Uneven, TIED, CUT),
    "ep 2": (2, {"ep": 2}, Packed, {}, ACCUMULATED),
    "ep 4, zero 3, data 2": (8, {"ep": 4, "zero": 3}, Packed, {}, CUT),
    "ep 2, more copies than experts, zero 3, tied": (8, {"ep": 2, "zero": 3}, Packed, FEW, CUT),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_mesh_trains_as_one_process_does(case, train):  # noqa: F811
    world, cut, dataset, model, options = CASES[case]
    whole = {name: value for name, value in options.items() if name == "batch_tokens"}
    one = train("one", 1, dataset, model=model, val_every=5, max_steps=5, **whole)
    assert_the_same_training(train("cut", world, dataset, cut, model=model, val_every=5, max_steps=5, **options), one)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_eight_ranks_leave_one_process_all_that_it_needs(schedule, train):  # noqa: F811
    """Saved by two stages of two copies of halves of the experts, and gone on with by one process; then back."""
    options = {"val_every": 2, "batch_tokens": 16 * TIME}
    one = train("one", 1, Packed, max_steps=6, **options)
    cut = {"pp": 2, "ep": 2, "zero": 1, "schedule": schedule}
    for world, dist, steps in ((8, cut, 2), (1, {}, 4), (8, cut, 6)):
        moved = train("moved", world, Packed, dist, max_steps=steps, resume=True, micro_tokens=TIME, **options)
    assert_the_same_training(moved, one)
