"""What the bench of meshes counts is what the plan's formulas say; replayed schedules idle as Table 2 of the paper."""

from __future__ import annotations

import pytest
from scale_run import SMALL, Mesh, count
from scale_trace import BOTH, FORWARD, Pass, held_of, idle_of, replayed

from training.parallel.formulas import BUBBLES


def test_bytes_sent_are_those_of_the_plan_and_each_product_is_computed_once():
    import scale  # noqa: F401  once, and not in each process that is forked

    tiny = {**SMALL, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    mesh = Mesh(2, {"ep": 2}, rows=2, time=16, model=tiny)
    formula, rows, ranks = mesh.plan().sent(0), sum(mesh.plan().rows[:2]), count(mesh, memory=False)
    for counted in ranks:
        assert counted.products == dict.fromkeys(("forward", "dX", "dW"), counted.of)
        for kind in ("reduce-scatter", "all-gather"):
            assert counted.sent[kind] == pytest.approx(formula[kind], rel=0.02)  # routers are gathered in float32
    # What a token sends is chance; the weights of its choices travel with it.
    sent, share = (
        sum(values) for values in zip(*((c.sent["all-to-all"], c.rows_sent / rows) for c in ranks), strict=True)
    )
    assert sent == pytest.approx(formula["all-to-all"] * share, rel=0.05)


@pytest.mark.parametrize("kind", ["1f1b", "dualpipev", "zbv"])
def test_a_replayed_schedule_idles_and_holds_what_table_2_says(kind):
    """ZB-V idles half of what the formula says, which is that of ZB1P."""
    from scale import order_of

    _, idle, held = BUBBLES[kind]
    share = 1 if kind == "1f1b" else 2
    ranks = replayed(order_of(kind, 4, 12), lambda _, one: (2 if one == BOTH else 1) / share)
    assert idle_of(ranks)[0] == pytest.approx(idle(4, 1, 2, 1) / (2 if kind == "zbv" else 1))
    assert held_of(ranks) == held(4)
    assert sorted({event.stage for events in ranks for event in events}) == list(range(4 * share))


def test_ranks_that_wait_for_each_other_are_found():
    with pytest.raises(ValueError, match="each rank waits"):
        replayed(
            [[[Pass(0, BOTH, 0)], [Pass(0, FORWARD, 0)]], [[Pass(1, FORWARD, 0)], [Pass(1, BOTH, 0)]]], lambda *_: 1
        )
