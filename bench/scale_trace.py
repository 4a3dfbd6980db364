"""Who computes what when in a pipeline: recorded as it runs, or replayed with given times; and a picture of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

from torch.distributed.pipelining import PipelineStage

from model.pipeline import WeightGradients
from training.run.plots import load_pyplot

FORWARD, INPUT, WEIGHT, BOTH = (
    "F",
    "I",
    "W",
    "B",
)  # passes of a stage over a micro-batch, as torch's schedules name them
COLOURS = {FORWARD: "#f2b84b", INPUT: "#5aa469", WEIGHT: "#5b8fd1", BOTH: "#9b89c9"}
NAMES = {
    FORWARD: "forward", INPUT: "backward for inputs", WEIGHT: "backward for weights", BOTH: "backward for both at once",
}  # fmt: skip


class Event(NamedTuple):
    """A pass: seconds of the clock of all processes, and seconds that this one computed."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float
    computed: float = 0.0


class Trace:
    """Records the passes of this process's stages from when it is entered; before there are any.

    Attributes: pace: seconds that a pass lasts at least, by stage and kind.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.pace: Mapping[tuple[int, str], float] = {}
        self._at = 0, 0, 0.0  # stage and micro-batch of a backward pass, and when it began
        self._stack = ExitStack()

    def __enter__(self) -> Trace:
        forward, backward = PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk
        weight, take = PipelineStage.backward_weight_one_chunk, WeightGradients.take

        def forward_one_chunk(stage: Any, number: int, *args: Any, **options: Any) -> Any:
            return self._timed(stage.stage_index, FORWARD, number, lambda: forward(stage, number, *args, **options))

        def backward_one_chunk(stage: Any, number: int, *args: Any, **options: Any) -> Any:
            self._at, kind = (stage.stage_index, number, time.perf_counter()), INPUT if stage.dw_builder else BOTH
            return self._timed(stage.stage_index, kind, number, lambda: backward(stage, number, *args, **options))

        def backward_weight_one_chunk(stage: Any, number: int, *args: Any, **options: Any) -> Any:
            self._at = stage.stage_index, number, 0.0
            return weight(stage, number, *args, **options)

        def taken(store: WeightGradients) -> Callable[[], None]:
            run = take(store)

            def weights() -> None:
                stage, number, began = self._at
                self._wait(began, stage, INPUT)  # a whole backward pass: its first part ends here
                self._timed(stage, WEIGHT, number, run)

            return weights

        for changed in (forward_one_chunk, backward_one_chunk, backward_weight_one_chunk):
            self._stack.enter_context(patch.object(PipelineStage, changed.__name__, changed))
        self._stack.enter_context(patch.object(WeightGradients, "take", taken))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _timed(self, stage: int, kind: str, number: int, work: Callable[[], Any]) -> Any:
        start, computing, place = time.perf_counter(), time.thread_time(), len(self.events)
        result = work()
        within = self.events[place:]  # the second part of a whole backward pass
        computed = time.thread_time() - computing - sum(event.computed for event in within)
        if not within:
            self._wait(start, stage, kind)
        end = within[0].start if within else time.perf_counter()
        self.events.insert(place, Event(stage, kind, number, start, end, computed))
        return result

    def _wait(self, began: float, stage: int, kind: str) -> None:
        time.sleep(max(began + self.pace.get((stage, kind), 0.0) - time.perf_counter(), 0.0))


def costs_of(events: Iterable[Event]) -> dict[tuple[int, str], float]:
    """Return the seconds that a stage computes in a pass, the median over micro-batches."""
    found = defaultdict(list)
    for event in events:
        found[event.stage, event.kind].append(event.computed)
    return {key: median(values) for key, values in found.items()}


class Pass(NamedTuple):
    """A pass of a stage over a micro-batch."""

    stage: int
    kind: str
    micro_batch: int


def replayed(orders: Sequence[Sequence[Sequence[Pass]]], seconds: Callable[[int, str], float]) -> list[list[Event]]:
    """Return when each rank's passes take place, one after the other in the given order, as soon as they can.

    A forward pass waits for that of the stage before it, a backward pass for that of the stage after it. What a rank
    does is given in blocks: results are sent at the end of one, as torch does.
    """
    last = max(one.stage for order in orders for block in order for one in block)
    done: dict[Pass, float] = {}
    out: list[list[Event]] = [[] for _ in orders]
    clocks, waiting = [0.0] * len(orders), [list(order) for order in orders]
    while any(waiting):
        before = len(done)
        for rank, order in enumerate(waiting):
            while order:
                ready = [
                    done.get(before_it, 0.0 if before_it is None else None)
                    for before_it in (_needs(one, last) for one in order[0])
                ]
                if None in ready:
                    break
                for one, earliest in zip(order[0], ready, strict=True):
                    start = max(earliest, clocks[rank])
                    clocks[rank] = start + seconds(one.stage, one.kind)
                    out[rank].append(Event(*one, start, clocks[rank]))
                done |= {_result(one): clocks[rank] for one in order.pop(0)}
        if len(done) == before:
            raise ValueError("each rank waits for another")
    return out


def _needs(one: Pass, last: int) -> Pass | None:
    if one.kind == FORWARD:
        return one._replace(stage=one.stage - 1) if one.stage else None
    return None if one.kind == WEIGHT or one.stage == last else Pass(one.stage + 1, INPUT, one.micro_batch)


def _result(one: Pass) -> Pass:
    return one._replace(kind=INPUT) if one.kind == BOTH else one


def idle_of(ranks: Sequence[Sequence[Event]]) -> tuple[float, float]:
    """Return what ranks idle between the first pass of any and the last, on average, in seconds and as a share."""
    begin, end = (pick(getattr(event, name) for events in ranks for event in events)
                  for pick, name in ((min, "start"), (max, "end")))  # fmt: skip
    busy = sum(event.end - event.start for events in ranks for event in events) / len(ranks)
    return end - begin - busy, 1 - busy / (end - begin)


def held_of(ranks: Sequence[Sequence[Event]]) -> float:
    """Return the most micro-batches whose activations a rank holds, a stage counted as its share of the rank."""
    most = 0.0
    for events in ranks:
        held = 0
        for event in events:
            held += {FORWARD: 1, INPUT: -1, BOTH: -1}.get(event.kind, 0)
            most = max(most, held / len({event.stage for event in events}))
    return most


def draw(panels: Mapping[str, Sequence[Sequence[Event]]], file: Path) -> None:
    """A panel for each schedule: a line for each rank, a box for each pass with the number of its micro-batch."""
    pyplot = load_pyplot()
    shape = (18, 2.3 * len(panels) + 0.6)
    figure, axes = pyplot.subplots(len(panels), figsize=shape, sharex=True, layout="constrained")
    for panel, (title, ranks) in zip(axes, panels.items(), strict=True):
        begin = min(event.start for events in ranks for event in events)
        for rank, events in enumerate(ranks):
            first_stage = min(event.stage for event in events)
            for event in events:
                left, width = 1e3 * (event.start - begin), 1e3 * (event.end - event.start)
                panel.barh(rank, width, 0.9, left, color=COLOURS[event.kind], edgecolor="white", linewidth=0.6)
                ink, size = "black" if event.stage == first_stage else "white", 6 if event.kind == WEIGHT else 8
                panel.text(
                    left + width / 2, rank, event.micro_batch, ha="center", va="center", fontsize=size, color=ink
                )
        panel.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"{title}: ranks idle {idle_of(ranks)[1]:.0%} of the time", loc="left", fontsize=10)
    axes[-1].set_xlabel("time (ms)")
    axes[-1].margins(x=0)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in NAMES]
    figure.legend(handles, NAMES.values(), loc="outside lower center", ncols=len(NAMES), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
