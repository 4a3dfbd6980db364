"""Training and decoding on tensors of device="cuda" that have shapes, types and strides but no data.

LD_PRELOAD=fake_cuda.so python tests/fake_cuda.py      fake_cuda.so: fake_cuda.cpp; used by test_cuda_shapes.py

What a kernel for CUDA asks of its inputs is checked by torch's own rules for it, such as the strides of grouped_mm. A
call that waits for the device is written down with its line in this project (host_waits.py).
Prints {case: {"error": line or "", "waits": [lines], "kernels": [names]}}.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from host_waits import HostWaits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache, cache_dtype
from model.decoding.runner import runner_for
from model.experts import Experts
from model.quantized import Int8Weight, quantize_weights
from training.adapters.adapter import Adapter
from training.adapters.lora import LoraSettings
from training.alignment.policy_loss import GRPOLoss
from training.alignment.preference import PreferenceLoss, PreferenceSettings, whole
from training.distill.distillation import DistillationLoss, DistillationSettings
from training.distill.teacher import CheckpointTeacher
from training.losses import IGNORE, Loss, NextTokenLoss
from training.machine import to_device
from training.parallel.ranks import Ranks
from training.run.log import RunLog
from training.settings import NextTokenSettings, StageSettings
from training.trainer import Trainer

CUDA, TIME, ROWS, VOCAB = torch.device("cuda", 0), 32, 4, 96
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=128,
)  # fmt: skip


class Rows:
    """Batches of ones, on the host. packed: two samples a row, isolated, half of their labels counted."""

    def __init__(self, packed: bool = False) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return 100

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        batch = {name: torch.ones(len(indices), TIME, dtype=torch.long) for name in ("input_ids", "labels")}
        if self.packed:
            batch["segment_ids"] = (torch.arange(TIME) >= TIME // 2).long().expand(len(indices), -1).contiguous()
            batch["position_ids"] = torch.arange(TIME).expand(len(indices), -1) % (TIME // 2)
            batch["labels"][:, ::2] = IGNORE
        return batch


def model(**changes: int) -> MiniDeepSeek:
    with CUDA:
        return MiniDeepSeek(LMConfig(**{**SIZES, **changes}))


def train(
    trained: MiniDeepSeek,
    rows: Rows,
    loss: Loss,
    kind: type = NextTokenSettings,
    steps: int = 1,
    parts: int = 1,
    **changes: object,
) -> None:
    """Steps of so many micro-batches. Every parameter that learns keeps its shape and has a moment on the device."""
    settings = kind(
        out="none", batch_tokens=ROWS * TIME, micro_tokens=ROWS * TIME // parts, sequence_length=TIME, dtype="bf16",
        max_steps=steps, **changes,
    )  # fmt: skip
    before = {name: p.shape for name, p in trained.named_parameters() if p.requires_grad}
    made = Trainer(settings, Ranks(0, 1, CUDA), trained, SimpleNamespace(fingerprint=""), rows, loss)
    try:
        for _ in range(steps):  # every number that is read is 1, that of ranks which were asked to stop too
            made._loop(RunLog(Path("none"), 0, False))
    finally:
        made.batches.close()
    assert made.progress.step == steps and made.progress.skipped == 0
    assert {name: p.shape for name, p in trained.named_parameters() if p.requires_grad} == before
    moments = [state["exp_avg"] for state in made.optimizer.state.values()]
    assert len(moments) == len(before) and all(moment.device == CUDA for moment in moments)


def backward(loss: Tensor, trained: MiniDeepSeek) -> None:
    """And every parameter that learns has a gradient of its own type and shape; MTP's layers may stay as they are."""
    loss.backward()
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and not name.startswith("mtp."):
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32 and parameter.grad.shape == parameter.shape, name


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long, device=CUDA)


def bf16() -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def training_step() -> None:
    train(model(), Rows(), NextTokenLoss(), steps=2, parts=2)


def packed_step() -> None:
    train(model(), Rows(packed=True), NextTokenLoss(), parts=2)


def looped_step() -> None:
    """On a card whose experts are computed one after the other: A100, 30x0, 40x0."""
    with patch("torch.cuda.get_device_capability", lambda *_: (8, 0)):
        train(model(), Rows(packed=True), NextTokenLoss())


def recomputed_step() -> None:
    train(model(), Rows(), NextTokenLoss(), gradient_checkpointing=True)


def fp8_step() -> None:
    """One of a model without MTP: each product is dozens of calls."""
    with patch("torch.version.cuda", "12.9"), redirect_stdout(None):
        trained = model(num_nextn_predict_layers=0)
        train(trained, Rows(packed=True), NextTokenLoss(mtp=False), fp8=True)


def preference_step() -> None:
    policy = model()
    policy.mtp.requires_grad_(False)
    loss = PreferenceLoss(PreferenceSettings(), whole(model().requires_grad_(False)))
    train(policy, Rows(packed=True), loss, StageSettings)


def distillation_step() -> None:
    teacher = CheckpointTeacher(model().requires_grad_(False), VOCAB)
    loss = DistillationLoss(mtp=True, settings=DistillationSettings(loss="jsd"), teacher=teacher)
    train(model(), Rows(packed=True), loss)


def lora_step() -> None:
    """On the experts too."""
    with CUDA, patch("training.adapters.adapter.fingerprint", lambda _: ""):
        adapted = Adapter.add(model(), LoraSettings(targets="all", r=4), "base").model
    adapted.mtp.requires_grad_(False)
    train(adapted, Rows(packed=True), NextTokenLoss(mtp=False))


def moe_layer() -> None:
    layer = model().model.layers[1].mlp
    x = torch.empty(1, 300, 64, device=CUDA, requires_grad=True)
    with bf16():
        out, report = layer(x)
    (out.float().square().sum() + report.balance_loss).backward()
    assert out.dtype == torch.bfloat16, out.dtype
    assert out.shape == x.shape == x.grad.shape, (out.shape, x.grad.shape)
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


def policy_loss() -> None:
    """On a batch as the trainer makes it: prepared on the host."""
    policy, loss = model(), GRPOLoss("grpo", 6, beta=0.1)
    with _disable_current_modes():
        floats = {name: torch.zeros(ROWS, 6) for name in ("sampled_log_probs", "reference_log_probs")}
        batch = {
            "prompt_ids": torch.ones(2, 5).long(), "prompt_padding": torch.zeros(2).long(),
            "prompt_of": torch.arange(ROWS) // 2, "input_ids": torch.ones(ROWS, 5).long(),
            "labels": torch.ones(ROWS, 6).long(), "advantages": torch.ones(ROWS), "absent": torch.zeros(2).long(),
            **floats,
        }  # fmt: skip
        batch = loss.prepare(batch)
    with bf16():
        total, _, _ = loss(policy, to_device(batch, CUDA))
    backward(total, policy)


def quantized_experts() -> None:
    """QLoRA: adapters on frozen experts in 8 bits, which are rounded without torchao."""
    with CUDA, patch("training.adapters.adapter.fingerprint", lambda _: ""):
        adapted = Adapter.add(model(), LoraSettings(targets="all", r=4), "base").model
        for name, module in list(adapted.named_modules()):
            if isinstance(module, Experts) and not name.startswith("mtp."):
                quantize_weights(adapted, name, Int8Weight.rounded)
    with bf16():
        total, _, _ = NextTokenLoss(mtp=False)(adapted, {"input_ids": ids(ROWS, TIME), "labels": ids(ROWS, TIME)})
    backward(total, adapted)


def decoding() -> None:
    decoder = model().eval()
    with torch.no_grad(), bf16():
        cache = LatentCache(decoder.config, ROWS, TIME, cache_dtype(decoder), CUDA, mtp=True)
        runner = runner_for(decoder, cache)
        step = runner.step(ids(ROWS, 5))
        for _ in range(3):
            chosen = step.choice
            step = runner.step(chosen)
        drafted = runner.draft(step.states, chosen, 1).logits
    assert cache.length == 8 and cache.latents.dtype == torch.bfloat16 and drafted.shape == (ROWS, 1, VOCAB)


def generation() -> None:
    with bf16():
        tokens = model().eval().generate(ids(ROWS, 5), max_new_tokens=4)
    assert tokens.shape == (ROWS, 9) and tokens.device == CUDA


CASES: list[Callable[[], None]] = [
    moe_layer, training_step, packed_step, looped_step, recomputed_step, fp8_step, preference_step, distillation_step,
    lora_step, policy_loss, quantized_experts, decoding, generation,
]  # fmt: skip


def on_device(call: Callable[[Tensor], object]) -> None:
    call(torch.zeros(4, device=CUDA))


# Each way to wait for the device, in one line; what does not wait, in the last ones.
WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "blocking to": lambda x: torch.zeros(4).pin_memory().to(x.device),
    "copy_": lambda x: x.copy_(torch.zeros(4).pin_memory()),
    "not pinned": lambda x: torch.zeros(4).to(x.device, non_blocking=True),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "nonzero of torch": lambda x: torch.nonzero(x),
    "mask": lambda x: x[x > 0],
    "assigned by mask": lambda x: x.__setitem__(x > 0, torch.ones(4, device=x.device)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
RUNNING_ON: dict[str, Callable[[Tensor], object]] = {
    "pinned": lambda x: torch.zeros(4).pin_memory().to(x.device, non_blocking=True),
    "full": lambda x: torch.full((), 3.0, device=x.device),
    "integers": lambda x: x[torch.arange(2, device=x.device)],
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long(), output_size=4),
    "on the host": lambda x: (torch.tensor([1.0]), torch.zeros(2).sum()),
}


def run(case: Callable[[], object]) -> dict[str, object]:
    waits, error = HostWaits(), ""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), waits.counting():
            case()
    except Exception as wrong:
        error = f"{type(wrong).__name__}: {str(wrong).partition(chr(10))[0]}"
    return {"error": error, "waits": waits.waits, "kernels": sorted(waits.names)}


def main() -> None:
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        patch("training.trainer.machine_peak", lambda *_: 1e15),
        patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        patch("torch.cuda.set_device", lambda _: None),
        patch("torch.cuda.max_memory_allocated", lambda _: 0),
        patch.object(torch.nn.Module, "to", lambda self, *_, **__: self),  # all is made where it stays
        torch.autograd.set_multithreading_enabled(False),
    ):
        seen = {case.__name__: run(case) for case in CASES}
        for kind, calls in (("waits", WAITING), ("runs on", RUNNING_ON)):
            seen |= {f"{kind}: {name}": run(partial(on_device, call)) for name, call in calls.items()}
        print(json.dumps(seen))


if __name__ == "__main__":
    main()
