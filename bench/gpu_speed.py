"""Speed on a card: training beside transformers, decoding, GRPO; with launches, waits and memory."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from gpu_decoding import BF16, waits
from gpu_place import Finding, NotRun, Place
from gpu_shape import CARDS
from gpu_training import TrainStep
from torch import Tensor, nn

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache
from model.costs import activation_numbers, count
from model.decoding.eager import EagerRunner
from model.decoding.runner import runner_for
from training.machine import measured_peak
from training.optim.build import OptimSettings, build_optimizer

TIME = 512  # positions of a row
MOST_ROWS = 64  # in one micro-batch
STATE = 16  # bytes a weight: itself, its gradient, two moments
ROUNDS = 3  # A B A B A B


def card(place: Place) -> Iterator[Finding]:
    """Products and memory of this card, which the rest is a share of."""
    size = 256 if place.small else 2048
    bf16, fp32 = (measured_peak(dtype, place.device, size) for dtype in (BF16, torch.float32))
    yield Finding("products in bf16", bf16 / 1e12, unit="TFLOP/s")
    yield Finding("products in fp32", fp32 / 1e12, unit="TFLOP/s")
    numbers = torch.ones(2**20 if place.small else 2**28, device=place.device)
    read = place.seconds(lambda: numbers.sum(), 10)
    yield Finding("memory read", numbers.nbytes / read / 1e9, unit="GB/s")
    if (published := published_peak(place)) is not None:
        yield Finding("bf16 products over the published peak", bf16 / published, 1.2)


def train_64m(place: Place) -> Iterator[Finding]:
    """Training steps of `64m` in bf16, beside transformers' DeepseekV3 where it is installed."""
    yield from training(place, "64m")


def train_1b_moe(place: Place) -> Iterator[Finding]:
    """Training steps of `1b-moe` in bf16, beside transformers' DeepseekV3 where it is installed."""
    yield from training(place, "1b-moe")


def training(place: Place, preset: str) -> Iterator[Finding]:
    """Yield speed, MFU, memory, launches and waits; then the same speed beside the other program."""
    config = place.config() if place.small else LMConfig.preset(preset, num_nextn_predict_layers=0)
    rows, time = rows_that_fit(place, config)
    ids = place.ids(rows, time + 1, config.vocab_size)
    step = TrainStep(place.model(config), place, BF16, lr=1e-4)
    place.clear()
    speed = timed(place, step, ids)
    yield Finding("speed", speed, unit=f"tokens/s, {rows} x {time}, layers not compiled")
    yield from launches(place, lambda: step(ids))
    yield Finding("waits of a step", float(waits(place, lambda: step(ids))), 1)
    if not place.small:  # as on CUDA by default
        for layer in step.model.model.layers:
            layer.compile(dynamic=False)
        place.clear()
        speed = timed(place, step, ids)
        yield Finding("speed, layers compiled", speed, unit="tokens/s")
        yield Finding("memory", torch.cuda.max_memory_allocated(place.device) / 2**30, unit="GiB")
        yield from launches(place, lambda: step(ids), "compiled: ")
    flops = speed * count(config, time).flops
    yield Finding("of the measured peak", flops / measured_peak(BF16, place.device, 256 if place.small else 2048))
    if (published := published_peak(place)) is not None:
        yield Finding("of the published peak", flops / published)
    yield from beside(place, step, ids)


def timed(place: Place, step: TrainStep, ids: Tensor) -> float:
    """Return tokens a second of five steps after three."""
    for _ in range(3):
        step(ids)
    return ids[:, 1:].numel() / place.seconds(lambda: step(ids), 5)


def beside(place: Place, step: TrainStep, ids: Tensor) -> Iterator[Finding]:
    """Yield both speeds, measured in turn on fewer rows, which both hold in memory, neither compiled."""
    ids = ids[: max(len(ids) // 4, 1)]
    for experts in ("grouped_mm", "eager"):  # as they choose, and where that does not run
        try:
            their_step = step_of_transformers(place, step.model, ids, experts)
            their_step()
            break
        except (ImportError, NotRun):
            return
        except RuntimeError:
            place.clear()
    else:
        return
    sides: dict[str, Callable[[], object]] = {"here": lambda: step(ids), f"transformers, {experts}": their_step}
    found: dict[str, list[float]] = {name: [] for name in sides}
    with nullcontext() if place.small else torch.compiler.set_stance("force_eager"):
        for turn in range(ROUNDS + 1):
            for name, run in sides.items():
                seconds = place.seconds(run, 3)
                if turn:  # the first warms up
                    found[name].append(ids[:, 1:].numel() / seconds)
    for name, speeds in found.items():
        yield Finding(f"in turn, {name}", statistics.median(speeds), unit=f"tokens/s, {len(ids)} rows")
    ours, theirs = found.values()
    yield Finding("least ratio", min(ours) / max(theirs))


def step_of_transformers(place: Place, model: MiniDeepSeek, ids: Tensor, experts: str) -> Callable[[], None]:
    """Return a step of transformers with the same weights. Raises ImportError without it, NotRun without memory."""
    from errors import quiet_imports

    with quiet_imports():
        from transformers import AutoModelForCausalLM
    place.need(STATE * sum(p.numel() for p in model.parameters()) * 1.3, "transformers' model beside ours")
    with tempfile.TemporaryDirectory() as folder, quiet_imports():
        model.save_pretrained(folder)
        opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts)
    theirs = opened.train().to(place.device)
    optimizer = build_optimizer(theirs, OptimSettings(lr=1e-4))

    def step() -> None:
        with place.autocast(BF16):
            value = theirs(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
        value.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def decode(place: Place) -> Iterator[Finding]:
    """Greedy decoding of `64m` in bf16 at batch 1, 16 and 128, after prompts of 128 tokens."""
    config = place.config() if place.small else LMConfig.preset("64m", num_nextn_predict_layers=0)
    model = place.model(config).to(BF16).eval().requires_grad_(False)
    prompt, new = (8, 6) if place.small else (128, 100)
    with torch.inference_mode():
        for rows in (1, 16, 128):
            for kind in (runner_for, EagerRunner) if rows == 1 else (runner_for,):
                steps = kind(model, LatentCache(config, rows, prompt + 2 * new + 9, BF16, place.device))
                chosen = [steps.prefill(place.ids(rows, prompt, config.vocab_size)).argmax(-1)]

                def step(steps: EagerRunner = steps, chosen: list[Tensor] = chosen) -> None:
                    chosen[0] = steps.step(chosen[0][:, None]).choice[:, -1]
                    chosen[0].cpu()

                for _ in range(4):
                    step()
                speed = rows / place.seconds(step, new)
                label = f"batch {rows}{', without graphs' if kind is EagerRunner else ''}"
                yield Finding(label, speed, unit="tokens/s")
                if kind is runner_for and rows == 1:
                    yield from launches(place, step)
                    yield Finding("waits of a step", float(waits(place, step)), 1)


def grpo(place: Place) -> Iterator[Finding]:
    """GRPO steps of `64m` in bf16: 128 completions of 64 tokens sampled, and trained on."""
    from training.alignment.policy_loss import GRPOLoss
    from training.alignment.sampler import Sampler, sample_groups

    config = place.config() if place.small else LMConfig.preset("64m", num_nextn_predict_layers=0)
    prompts, group, new = (2, 2, 6) if place.small else (16, 8, 64)
    policy = place.model(config).train()
    sampler, loss, rows = Sampler(policy, BF16), GRPOLoss("grpo", new), prompts * group
    optimizer = build_optimizer(policy, OptimSettings(lr=1e-6))
    given = place.ids(prompts, 24, config.vocab_size)
    drawn = torch.rand(prompts, group, new, generator=torch.Generator().manual_seed(0))
    of = torch.arange(prompts, device=place.device).repeat_interleave(group)
    advantages, none = torch.randn(rows, device=place.device), torch.zeros(2, dtype=torch.long, device=place.device)

    def step() -> Tensor:
        made = list(sample_groups(sampler.refresh(), given.tolist(), drawn, stop=-1))
        tokens = torch.cat([each.tokens for each in made]).to(place.device)
        sampled = torch.cat([each.log_probs for each in made]).to(place.device)
        batch = {
            "prompt_ids": given, "prompt_padding": torch.zeros_like(given[:, 0]), "prompt_of": of,
            "input_ids": tokens[:, :-1], "labels": tokens, "sampled_log_probs": sampled, "advantages": advantages,
            "absent": none,
        }  # fmt: skip
        with place.autocast(BF16):
            total, labels, metrics = loss(policy, batch)
        (total / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        away, counted = metrics["mismatch"]
        return away / counted

    yield Finding("mean difference of log p, sampled and trained", float(step()), 0.1)
    if place.timed:
        yield Finding("speed", rows / place.seconds(step, 2), unit=f"samples/s, {rows} x {new} tokens")


def launches(place: Place, work: Callable[[], object], kind: str = "") -> Iterator[Finding]:
    """Yield how many kernels the device runs, and how many calls of the host start them, where a profiler can see."""
    if place.device.type != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        place.wait()
    events = profiler.events()
    on_device = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    calls = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    started = sum(event.name.startswith(calls) for event in events)
    if on_device or started:
        yield Finding(f"{kind}kernels and copies", float(on_device))
        yield Finding(f"{kind}launches by the host", float(started))


def rows_that_fit(place: Place, config: LMConfig) -> tuple[int, int]:
    """Return rows and positions of a micro-batch that half of the free memory holds, weights and moments apart."""
    if place.small:
        return 4, 32
    costs = count(config)
    place.need(STATE * costs.total * 1.2, f"training {costs.total / 1e6:,.0f} M weights")
    each = 2 * 2 * activation_numbers(config) + 8 * config.vocab_size  # in bf16, and as much again for what is between
    rows = int((place.free() * 0.8 - STATE * costs.total) * 0.6 / (each * TIME))
    if rows < 1:
        raise NotRun("not enough memory for a row")
    return min(rows, MOST_ROWS), TIME


def published_peak(place: Place) -> float | None:
    """Return what the maker says of this card; None where the table has no such card."""
    if place.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(place.device)
    known = [card.flops for key, card in CARDS.items() if key.removeprefix("RTX ") in name and "PCIe" not in name]
    return known[0] if known else None


CHECKS = {check.__name__: check for check in (card, decode, grpo, train_64m, train_1b_moe)}
