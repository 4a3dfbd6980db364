"""Where the doctor's checks run, and what they find: numbers, some of them with a bound."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from varlen_cpu import varlen_on_cpu

from LMConfig import LMConfig
from model import MiniDeepSeek

SMALL = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=256,
    initializer_range=0.1, num_nextn_predict_layers=0,
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NotRun(Exception):
    """Why a check does not apply here."""


@dataclass(frozen=True)
class Finding:
    """One number of a check. bound: the most it may be, or None where it is only measured."""

    what: str
    value: float
    bound: float | None = None
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.bound is None or self.value <= self.bound  # no number is not below any bound

    def __str__(self) -> str:
        text = f"{self.what}: {number(self.value)}{self.unit and ' ' + self.unit}"
        return text if self.bound is None else f"{text} (at most {number(self.bound)})"


@dataclass(frozen=True)
class Place:
    """The device that checks run on. On a CPU the branches for CUDA are computed in small shapes.

    Attributes: timed: whether speed is measured; without it real shapes are counted instead.
    """

    device: torch.device
    timed: bool

    @property
    def small(self) -> bool:
        return self.device.type == "cpu"

    def config(self, **changes: int | bool | None) -> LMConfig:
        """Return small sizes on a CPU, else those of `64m` with three layers."""
        if self.small:
            return LMConfig(**{**SMALL, **changes})
        return LMConfig.preset("64m", **{"num_hidden_layers": 3, "num_nextn_predict_layers": 0, **changes})

    def model(self, config: LMConfig | None = None, seed: int = 0) -> MiniDeepSeek:
        """Return random weights, norms and router biases among them, the same on every device."""
        torch.manual_seed(seed)
        model = MiniDeepSeek(config or self.config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
            for router in model.routers():
                router.e_score_correction_bias.uniform_(-0.1, 0.1)
        return model.to(self.device)

    def ids(self, rows: int, time: int, vocab: int, seed: int = 1) -> Tensor:
        """Return (rows, time) random tokens, the same on every device."""
        drawn = torch.randint(0, vocab, (rows, time), generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device)

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def free(self) -> float:
        """Return bytes of memory that may be used: of the GPU, or a little of the machine's."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 2e9

    def need(self, size: float, what: str) -> None:
        """Raise `NotRun` where that many bytes are not free."""
        if size > 0.9 * self.free():
            raise NotRun(f"{what} needs {size / 1e9:.1f} GB, {self.free() / 1e9:.1f} GB are free")

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """Return the seconds that `work` takes, on average over so many calls."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give memory back between checks."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@contextmanager
def branches_for_cuda(place: Place) -> Iterator[None]:
    """Have a CPU's tensors take the branches for CUDA; `varlen_attn` has a kernel for CPUs from then on."""
    with ExitStack() as stack:
        if place.device.type == "cpu":
            stack.enter_context(patch("model.kernels.on_cuda", lambda x: True))
            varlen_on_cpu()
        yield


def relative(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, by the norm; infinite where there are no numbers."""
    found, expected = found.detach().double(), expected.detach().double()
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return difference if math.isfinite(difference) else math.inf


def gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return all of them in one vector, float64; zeros where a parameter has none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).detach().double().flatten() for p in parameters]
    )


def number(value: float) -> str:
    """1234567.0 -> '1,234,567'; 0.00012 -> '0.00012'."""
    if not math.isfinite(value) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.3g}"
