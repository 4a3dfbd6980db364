"""Decoding: graphs against plain steps, in generation and in the engine, and the number of waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from gpu_checks import BOUNDS
from gpu_place import Finding, NotRun, Place, relative
from gpu_tape import HostReads, taped_graphs
from torch import Tensor

from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding import graph
from model.decoding.eager import EagerRunner, Step
from model.decoding.engine import Engine
from model.decoding.graph import GraphRunner
from model.decoding.runner import fits_graph
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.scheduler import Request
from model.decoding.slot_cache import SlotCache

BF16 = torch.bfloat16


def absorbed(place: Place) -> Iterator[Finding]:
    """Steps that read the latents against whole passes that expand them, with left padding too."""
    model = place.model().eval()
    config, time = model.config, 21
    ids, padding = place.ids(3, time, config.vocab_size), torch.tensor([0, 5, 2], device=place.device)
    with torch.inference_mode():
        for kind, pad in (("plain", None), ("padded", padding)):
            whole, parts = (LatentCache(config, 3, time, torch.float32, place.device, pad) for _ in range(2))
            expected = EagerRunner(model, whole).step(ids, 4).logits
            steps = EagerRunner(model, parts)
            steps.prefill(ids[:, : time - 4])
            found = torch.cat([steps.step(ids[:, at : at + 1]).logits for at in range(time - 4, time)], dim=1)
            yield Finding(f"{kind}: logits", relative(found, expected), BOUNDS["fp32"] * 10)


def graphs(place: Place) -> Iterator[Finding]:
    """Recorded steps of several rows and lengths against plain ones."""
    model = decoder(place)
    with recorded(place), torch.inference_mode():
        for kind in ("one length", "slots"):
            plain, replayed = (logits(kind, runs, model, place) for runs in (EagerRunner, GraphRunner))
            yield Finding(f"{kind}: logits", relative(replayed, plain), BOUNDS["bf16"] / 2)


def engine(place: Place) -> Iterator[Finding]:
    """Requests that join and leave, greedy and sampled: the tokens of plain steps, one replay and one wait a step."""
    model, made = decoder(place), []
    draw = torch.Generator().manual_seed(0)
    sampled = Sampling(temperature=0.9, top_k=20)
    vocab = model.config.vocab_size
    asked = [
        Request(
            torch.randint(0, vocab, (3 + 5 * (number % 3),), generator=draw).tolist(), 6 + 5 * (number % 4),
            sampled if number % 2 else GREEDY, (), torch.rand(40, generator=draw).tolist(),
        )
        for number in range(9)
    ]  # fmt: skip
    for kind in (EagerRunner, GraphRunner):
        with recorded(place), patch("model.decoding.engine.runner_for", kind):
            made.append([done.log_probs for done in Engine(model, 4, 64).run(asked)])
    plain, replayed = (torch.tensor([value for row in rows for value in row]) for rows in made)
    # One token chosen otherwise among close ones changes all that follow: most must agree.
    differ = float(((plain - replayed).abs() > 0.05).float().mean())
    yield Finding("tokens that differ", differ, 0.3)
    with recorded(place), patch("model.decoding.engine.runner_for", GraphRunner):
        running = Engine(model, 2, 200)
        for number in range(2):
            running.submit(Request([1, 2 + number], 190))
        for _ in range(5):
            running.step()
        # On a CPU a number of the host's own counts too: where the longest row ends.
        yield Finding("waits of a step", float(waits(place, running.step)), 2 if place.small else 1)
    if place.device.type == "cuda" and not isinstance(running.runner, GraphRunner):
        raise NotRun("the engine takes no graphs here")


def chosen_by_itself(place: Place) -> Iterator[Finding]:
    """Graphs are taken on CUDA without being asked for."""
    model = decoder(place)
    device = torch.device("cuda", 0)
    with ExitStack() as stack:
        if place.small:  # as on a card of compute capability 9.0
            stack.enter_context(patch("torch.cuda.get_device_capability", lambda *_: (9, 0)))
            stack.enter_context(patch("torch.version.hip", None))
        yield Finding("steps that no graph holds", float(not fits_graph(model, BF16, device)), 0)


def decoder(place: Place) -> MiniDeepSeek:
    return place.model().to(BF16).eval().requires_grad_(False)


def logits(kind: str, runs: Callable[..., EagerRunner], model: MiniDeepSeek, place: Place) -> Tensor:
    """Return those of 20 steps after prompts, rows of one length or slots that come and go."""
    config, found = model.config, []
    ids = place.ids(20, 4, config.vocab_size, seed=3)
    if kind == "one length":
        steps = runs(model, LatentCache(config, 4, 40, BF16, place.device))
        steps.prefill(place.ids(4, 5, config.vocab_size))
        return torch.cat([kept(steps.step(row[:, None])) for row in ids])
    cache = SlotCache(config, 4, 40, BF16, place.device)
    width = cache.latents.shape[-1]
    for length in (3, 9, 5, 6):
        made = torch.randn(config.num_hidden_layers, length, width, generator=torch.Generator().manual_seed(length))
        cache.occupy(made.to(place.device))
    steps = runs(model, cache)
    for number, row in enumerate(ids):
        if number in (6, 12):
            cache.release(0)
        rows = 4 if cache.used > 2 else 2
        found.append(kept(steps.step(row[:rows, None]))[: cache.used])
    return torch.cat(found)


def kept(step: Step) -> Tensor:
    return step.logits[:, -1].clone()


@contextmanager
def recorded(place: Place) -> Iterator[None]:
    """Let a CPU record tapes in the place of graphs, and lengths be short enough for several of them."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(graph, "SHORTEST", 8))
        if place.small:
            stack.enter_context(taped_graphs())
        yield


def waits(place: Place, work: Callable[[], object]) -> int:
    """Return how often the host waits for the device in `work`."""
    if place.device.type == "cpu":
        with HostReads() as reads:
            work()
        return reads.count
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)  # not that this mode is new


CHECKS = {check.__name__: check for check in (absorbed, graphs, engine, chosen_by_itself)}
