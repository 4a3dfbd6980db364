"""What the ranks of each mesh send, hold and compute in a step of a small model, beside the formulas of the plan.

python bench/scale.py [--out out/scale]            all meshes, 2 to 8 processes: OUT/summary.md, OUT/pipelines.png
python bench/scale.py --picture docs/dualpipev.png  the picture alone
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch._dynamo  # noqa: F401  what is slow to import: once, and not in each process that is forked
from scale_run import SMALL, Counted, Mesh, count
from scale_trace import BOTH, FORWARD, INPUT, WEIGHT, Pass, costs_of, draw, held_of, idle_of, replayed
from torch.distributed.pipelining.schedules import get_schedule_class

import training.parallel.sharding  # noqa: F401
from errors import command_line
from model.costs import human
from training.parallel.dist_settings import ShardSettings
from training.parallel.formulas import BUBBLES
from training.parallel.schedule import CLASSES

FREE = {**SMALL, "topk_group": 4}  # of 4 groups
PIPELINES = {f"pp {pp}, {kind}": Mesh(pp, {"pp": pp, "schedule": kind}) for pp in (2, 4) for kind in CLASSES}
ALL = {"pp": 2, "ep": 2, "zero": 1, "schedule": "dualpipev"}
MESHES = {
    "data 2 (DDP)": Mesh(2),
    "zero 1, data 4": Mesh(4, {"zero": 1}),
    "zero 3, data 4": Mesh(4, {"zero": 3}),
    "ep 4": Mesh(4, {"ep": 4}),
    "ep 4, any group": Mesh(4, {"ep": 4}, model=FREE),
    "ep 4, recomputed": Mesh(4, {"ep": 4}, recomputed=True),
    **PIPELINES,
    "pp 4, dualpipev, recomputed": Mesh(4, {"pp": 4, "schedule": "dualpipev"}, recomputed=True),
    "pp 2 x ep 2 x data 2": Mesh(8, ALL),
}
EVEN = {**SMALL, "num_hidden_layers": 8, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}  # stages alike
TITLES = {"1f1b": "1F1B", "zbv": "ZB-V", "dualpipev": "DualPipeV"}
SPLIT = {BOTH: INPUT + WEIGHT}  # with a store of weight gradients
LONG, PASS = 256, 0.25  # of the picture: tokens of a micro-batch; seconds of a forward pass, for processes share cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/scale"))
    parser.add_argument("--picture", type=Path, help="write this picture, and nothing else")
    options = parser.parse_args()
    if options.picture:
        picture(options.picture)
        return
    found = {}
    for name, mesh in MESHES.items():
        print(f"{name}: {mesh.world} processes", flush=True)
        found[name] = count(mesh)
    text = "\n\n".join((head(), sent(found), held(found), bubbles(found)))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.md").write_text(text + "\n", "utf8")
    print(text)
    picture(options.out / "pipelines.png")
    print(options.out / "summary.md", options.out / "pipelines.png")


def head() -> str:
    """Return what was measured, in words."""
    mesh = Mesh(1)
    config = mesh.config
    return (
        f"A model of {config.num_hidden_layers} layers and one of MTP, hidden {config.hidden_size}, "
        f"{config.n_routed_experts} experts of which a token takes {config.num_experts_per_tok}, in bf16; "
        f"a step has {mesh.rows} rows of {mesh.time} tokens, a micro-batch one. Shown: counted / by the plan's formula."
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def stage_of(mesh: Mesh, rank: int) -> int:
    """Return the place of a rank in its pipeline."""
    return rank * mesh.cut.get("pp", 1) // mesh.world


def against(counted: float, formula: float, unit: str = "B") -> str:
    """Return both numbers, and the first as a multiple of the second."""
    if not formula:
        return human(counted, unit) if counted else "0"
    return f"{human(counted, unit)} / {human(formula, unit)} = {counted / formula:.3f}"


def sent(found: dict[str, list[Counted]]) -> str:
    """Return the bytes of one step by kind and rank; ranks with the same layers are one line, their mean."""
    kinds = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "point to point")
    rows = []
    for name, ranks in found.items():
        plan = MESHES[name].plan()
        for place in range(MESHES[name].cut.get("pp", 1)):
            mine = [rank for rank in range(len(ranks)) if stage_of(MESHES[name], rank) == place]
            formula = plan.sent(place)
            means = [sum(ranks[rank].sent.get(kind, 0) for rank in mine) / len(mine) for kind in kinds]
            shown = [against(mean, formula.get(kind, 0)) for kind, mean in zip(kinds, means, strict=True)]
            rows.append((name, f"{mine[0]}-{mine[-1]}" if len(mine) > 1 else mine[0], *shown))
    return table("Bytes that a rank sends in a step", ("mesh", "ranks", *kinds), rows)


def held(found: dict[str, list[Counted]]) -> str:
    """Return memory of each mesh's fullest rank, and of all ranks rows that a token and layer send, and products."""
    rows = []
    for name, ranks in found.items():
        mesh, plan, count_of = MESHES[name], MESHES[name].plan(), len(ranks)
        fullest = max(range(count_of), key=lambda rank: ranks[rank].state + ranks[rank].peak)
        lines = {line.name: line.value for line in plan.memory(stage_of(mesh, fullest))}
        beside = sum(lines[part] for part in ("weights in bf16", "gradients in fp32", "activations"))
        row = [name, fullest, against(ranks[fullest].state, lines["optimiser and fp32 weights"])]
        row += [against(ranks[fullest].peak, beside)]
        row += [against(sum(counted.rows_sent for counted in ranks) / count_of, sum(plan.rows[:2]), "")]
        possible = plan.micro_batches * sum(counted.of for counted in ranks)
        kinds = ("forward", "dX", "dW")
        rows.append((*row, *(f"{sum(counted.products[kind] for counted in ranks) / possible:.3f}" for kind in kinds)))
    columns = (
        "mesh", "fullest rank", "weights in fp32, moments", "most beside them: weights in bf16, gradients, activations",
        "rows a token sends", "products with a matrix in a micro-batch: forward", "by inputs (dX)", "by weights (dW)",
    )  # fmt: skip
    return table("What a rank holds and computes", columns, rows)


def order_of(kind: str, pp: int, micro_batches: int) -> list[list[list[Pass]]]:
    """Return what each rank does: 1F1B's order, or that of torch's schedule."""
    if kind not in ShardSettings.FOLDED:
        return [one_forward_one_backward(rank, min(pp - rank, micro_batches), micro_batches) for rank in range(pp)]
    given, out = SimpleNamespace(pp_group_size=pp, num_stages=2 * pp, _n_microbatches=micro_batches), []
    for rank in range(pp):
        actions = get_schedule_class(CLASSES[kind])._calculate_single_rank_operations(given, rank)
        out.append([passes_of(action.sub_actions or (action,)) for action in actions if action])
    return out


def passes_of(actions: Sequence) -> list[Pass]:
    """Return those of torch's actions; a whole backward pass has two, for there is a store of weight gradients."""
    return [Pass(stage, one, number) for stage, kind, number, _ in actions for one in SPLIT.get(kind.value, kind.value)]


def one_forward_one_backward(stage: int, first: int, micro_batches: int) -> list[list[Pass]]:
    """Return the passes of a stage that begins with `first` forward passes."""
    numbers = [(FORWARD, number) for number in range(first)]
    for number in range(micro_batches):
        numbers += [(BOTH, number), (FORWARD, number + first)]
    return [[Pass(stage, kind, number)] for kind, number in numbers if number < micro_batches]


def bubbles(found: dict[str, list[Counted]]) -> str:
    """Return Table 2 of the paper: what a rank idles in a step, by formula and replayed with F = 1, B = 2 and W = 1."""
    rows = []
    for pp, micro_batches in ((2, 16), (4, 16), (16, 120)):
        for kind in CLASSES:
            formula, idle, flying = BUBBLES[kind]
            share = 2 if kind in ShardSettings.FOLDED else 1  # stages of a rank
            order = order_of(kind, pp, micro_batches)
            given = replayed(order, lambda _, p, n=share: (2 if p == BOTH else 1) / n)
            seconds, part = idle_of(given)
            line = [TITLES[kind], pp, micro_batches, formula, f"{idle(pp, 1, 2, 1):g}", f"{seconds:g}", f"{part:.1%}"]
            line += [f"{flying(pp):g}", f"{held_of(given):g}"]
            if run := found.get(f"pp {pp}, {kind}"):
                events = [counted.events for counted in run]
                costs = costs_of(event for ranks in events for event in ranks)
                line.append(f"{idle_of(replayed(order, lambda stage, p, c=costs: c[stage, p]))[1]:.1%}")
            rows.append((*line, "") if len(line) == 9 else line)
    columns = (
        "schedule", "ranks P", "micro-batches", "bubble (Table 2)", "with F 1, B 2, W 1", "replayed", "of the step",
        "micro-batches held (Table 2)", "replayed", "idle, replayed with measured times",
    )  # fmt: skip
    return table("Bubbles", columns, rows)


def picture(file: Path) -> None:
    """Draw DualPipeV and 1F1B on 4 ranks, from runs whose passes last in proportion to what their layers compute."""
    folded, line = (Mesh(4, {"pp": 4, "schedule": kind}, 10, LONG, EVEN) for kind in ("dualpipev", "1f1b"))
    costs = costs_of(event for counted in count(folded, memory=False) for event in counted.events)
    slower = PASS / median(cost for (_, kind), cost in costs.items() if kind == FORWARD)
    pace = {key: slower * cost for key, cost in costs.items()}
    of_line: dict[tuple[int, str], float] = defaultdict(float)  # each of whose stages has the layers of two
    for (stage, kind), seconds in pace.items():
        of_line[stage // 2, FORWARD if kind == FORWARD else BOTH] += seconds
    runs = {"DualPipeV": count(folded, memory=False, pace=pace), "1F1B": count(line, memory=False, pace=dict(of_line))}
    draw({name: [counted.events for counted in ranks] for name, ranks in runs.items()}, file)


if __name__ == "__main__":
    command_line(main)
