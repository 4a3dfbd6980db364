"""Training and decoding on tensors of device="cuda" that have shapes, types and strides but no data.

LD_PRELOAD=fake_cuda.so python tests/fake_cuda.py      fake_cuda.so: fake_cuda.cpp; used by test_cuda_shapes.py

What a kernel for CUDA asks of its inputs is checked by torch's own rules for it, such as the strides of grouped_mm. A
call that waits for the device, because the host wants a number of it or copies to it from memory that is not pinned, is
written down with its place in this project.
Prints {case: {"error": line or "", "waits": [places], "kernels": [names]}}.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache, cache_dtype
from model.decoding.runner import runner_for
from model.experts import Experts
from model.quantized import Int8Weight, quantize_weights
from training.adapters.adapter import Adapter
from training.adapters.lora import LoraSettings
from training.alignment.policy_loss import GRPOLoss
from training.alignment.preference import PreferenceLoss, PreferenceSettings
from training.distill.distillation import DistillationLoss, DistillationSettings
from training.distill.teacher import CheckpointTeacher
from training.losses import NextTokenLoss
from training.parallel.ranks import Ranks
from training.settings import NextTokenSettings
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
CUDA, TIME, ROWS, VOCAB = torch.device("cuda", 0), 32, 4, 96
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=128,
)  # fmt: skip


class Rows:
    """Batches of nothing. packed: two samples a row, isolated."""

    def __init__(self, packed: bool = False) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return 100

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        batch = {name: torch.zeros(len(indices), TIME, dtype=torch.long) for name in ("input_ids", "labels")}
        extra = ("position_ids", "segment_ids") if self.packed else ()
        return batch | {name: torch.zeros(len(indices), TIME, dtype=torch.long) for name in extra}


def model(**changes: int) -> MiniDeepSeek:
    with CUDA:
        return MiniDeepSeek(LMConfig(**{**SIZES, **changes}))


def trainer(packed: bool = False, **changes: object) -> Trainer:
    settings = NextTokenSettings(
        out="none", batch_tokens=ROWS * TIME, micro_tokens=ROWS * TIME // 2, sequence_length=TIME, dtype="bf16",
        max_steps=4, **changes,
    )  # fmt: skip
    made = Trainer(settings, Ranks(0, 1, CUDA), model(), SimpleNamespace(fingerprint=""), Rows(packed), NextTokenLoss())
    made.module = made.model
    made._set_rates()
    return made


def step(made: Trainer) -> None:
    before = {name: p.shape for name, p in made.model.named_parameters()}
    made._step()
    assert {name: p.shape for name, p in made.model.named_parameters()} == before
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
    step(trainer())


def packed_step() -> None:
    step(trainer(packed=True))


def recomputed_step() -> None:
    step(trainer(gradient_checkpointing=True))


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
    policy = model()
    floats = {name: torch.empty(ROWS, 6, device=CUDA) for name in ("sampled_log_probs", "reference_log_probs")}
    batch = {
        "prompt_ids": ids(2, 5), "prompt_padding": ids(2), "prompt_of": ids(ROWS), "input_ids": ids(ROWS, 5),
        "labels": ids(ROWS, 6), "advantages": torch.empty(ROWS, device=CUDA), "absent": ids(2), **floats,
    }  # fmt: skip
    with bf16():
        total, _, _ = GRPOLoss("grpo", 6, beta=0.1)(policy, batch)
    backward(total, policy)


def preference_loss() -> None:
    policy = model()
    batch = {name: ids(ROWS, TIME) for name in ("input_ids", "position_ids", "segment_ids", "labels")}
    loss = PreferenceLoss(PreferenceSettings(), model().requires_grad_(False))
    # How many pairs there are is data: here every row holds one.
    sides = torch.empty(4, 2, ROWS, device=CUDA)
    with bf16(), patch("training.alignment.preference.sums_by_side", lambda values, _: sides + values.sum()):
        total, _, _ = loss(policy, batch)
    backward(total, policy)


def distillation_loss() -> None:
    student, teacher = model(), CheckpointTeacher(model(), VOCAB)
    loss = DistillationLoss(mtp=True, settings=DistillationSettings(loss="jsd"), teacher=teacher)
    with bf16():
        total, _, _ = loss(student, {"input_ids": ids(ROWS, TIME), "labels": ids(ROWS, TIME)})
    backward(total, student)


def lora_on_experts() -> None:
    with CUDA, patch("training.adapters.adapter.fingerprint", lambda _: ""):
        adapted = Adapter.add(model(), LoraSettings(targets="all", r=4), "base").model
    with bf16():
        total, _, _ = NextTokenLoss(mtp=False)(adapted, {"input_ids": ids(ROWS, TIME), "labels": ids(ROWS, TIME)})
    backward(total, adapted)


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


def static_decoding() -> None:
    with bf16():
        tokens = model().eval().generate(ids(ROWS, 5), max_new_tokens=4, static=True)
    assert tokens.shape == (ROWS, 9) and tokens.device == CUDA


CASES: list[Callable[[], None]] = [
    moe_layer, training_step, packed_step, recomputed_step, policy_loss, preference_loss, distillation_loss,
    lora_on_experts, quantized_experts, decoding, generation, static_decoding,
]  # fmt: skip


class Kernels(TorchDispatchMode):
    """Writes down the names of what is called, and the places of copies between host and device that are waited for."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.places = places

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name = str(function).split(".")[1]
        self.names.add(name)
        if name == "_to_copy" and not named.get("non_blocking"):
            to = torch.device(named.get("device") or arguments[0].device)
            if to.type != arguments[0].device.type:
                self.places.append(place())
        return function(*arguments, **named)


def place() -> str:
    """The line of this project that called."""
    here = next(frame for frame in reversed(traceback.extract_stack()[:-1]) if not outside(frame.filename))
    return f"{Path(here.filename).relative_to(ROOT)}: {here.line}"


def waiting(answer: Callable[[Tensor], object], places: list[str]) -> Callable[..., object]:
    """A method that writes down who called it for a number of the device's, and answers by shape alone."""

    def method(tensor: Tensor, *_: object, **__: object) -> object:
        if tensor.device == CUDA:
            places.append(place())
        return answer(tensor)

    return method


def outside(file: str) -> bool:
    return not file.startswith(str(ROOT)) or "site-packages" in file or file == __file__


def every_place(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel(), tensor.dim(), dtype=torch.long, device=tensor.device)


def run(case: Callable[[], None]) -> dict[str, object]:
    places: list[str] = []
    numbers = {"item": 1.0, "__bool__": True, "__int__": 1, "__float__": 1.0, "__index__": 1}
    patches = [patch.object(Tensor, name, waiting(lambda _, n=n: n, places)) for name, n in numbers.items()]
    patches.append(patch.object(Tensor, "nonzero", waiting(every_place, places)))
    patches.append(patch.object(Tensor, "tolist", waiting(lambda x: [1] * x.numel(), places)))
    kernels, error = Kernels(places), ""
    for each in patches:
        each.start()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), kernels:
            case()
    except Exception as wrong:
        error = f"{type(wrong).__name__}: {str(wrong).partition(chr(10))[0]}"
    for each in patches:
        each.stop()
    return {"error": error, "waits": sorted(set(places)), "kernels": sorted(kernels.names)}


def main() -> None:
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        patch("training.trainer.machine_peak", lambda *_: 1e15),
        patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        patch.object(Tensor, "pin_memory", lambda self: self),
        patch.object(torch.nn.Module, "to", lambda self, *_, **__: self),  # all is made where it stays
        torch.autograd.set_multithreading_enabled(False),
    ):
        print(json.dumps({case.__name__: run(case) for case in CASES}))


if __name__ == "__main__":
    main()
