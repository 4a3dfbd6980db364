"""The branch for CUDA, computed by the CPU: losses and gradients of whole models are those of the CPU's own branch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import far
from torch import Tensor
from varlen_cpu import varlen_on_cpu

from LMConfig import LMConfig
from model import MiniDeepSeek, kernels
from model.kernels import attention, grouped, grouped_cuda
from model.ops import packed_mask
from training.losses import IGNORE, NextTokenLoss

# Head sizes that varlen_attn takes; two experts of eight that no token chooses.
SIZES = {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1}
UNUSED = [2, 7]
TIME = 40


@pytest.fixture
def model(tiny_model) -> MiniDeepSeek:
    made = tiny_model(**SIZES).train()
    for router in made.routers():
        router.e_score_correction_bias[UNUSED] = -9
    return made


def whole_rows() -> dict[str, Tensor]:
    ids = torch.randint(61, (3, TIME + 1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def packed_rows() -> dict[str, Tensor]:
    """Segments of many lengths, padding, and labels that do not count."""
    batch = whole_rows()
    segments = (torch.rand(3, TIME) < 0.2).cumsum(1)
    segments[1, -7:] = -1
    batch["labels"] = batch["labels"].masked_fill((segments < 0) | (torch.rand(3, TIME) < 0.3), IGNORE)
    return {**batch, "segment_ids": segments, "position_ids": torch.arange(TIME).expand(3, -1)}


def step(model: MiniDeepSeek, batch: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradients of what is trained."""
    model.zero_grad()
    torch.manual_seed(0)  # of dropout, where there is any
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, count, _ = NextTokenLoss(mtp_steps=2, balance_weight=0.1)(model, batch)
    (total / count).backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def compare(model, batch: dict[str, Tensor], dtype: torch.dtype, capability: int, patch: pytest.MonkeyPatch) -> None:
    """CUDA's branch in float32 is the CPU's; in bfloat16 both are as near to it. What is left unwritten is NaN."""
    loss, exact = step(model, batch, torch.float32)
    _, rounded = step(model, batch, dtype)
    varlen_on_cpu()
    patch.setattr(attention, "flash_attention", lambda: None)
    patch.setattr(kernels, "on_cuda", lambda x: True)
    patch.setattr(kernels, "capability", lambda device: capability)
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written
    try:
        assert torch.empty(1).isnan()
        found, branch = step(model, batch, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert exact.keys() == branch.keys()
    if dtype == torch.float32:
        torch.testing.assert_close(found, loss)
        for name, gradient in branch.items():
            torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-5, msg=name)
    else:
        torch.testing.assert_close(found, loss, rtol=3e-3, atol=0)
        assert far(flat(branch), flat(exact)) < 1.3 * far(flat(rounded), flat(exact)) + 1e-2


CARDS = {"fp32": (torch.float32, 9), "bf16 in one launch": (torch.bfloat16, 9), "bf16 in a loop": (torch.bfloat16, 8)}


@pytest.mark.parametrize("rows", [whole_rows, packed_rows])
@pytest.mark.parametrize("card", CARDS)
def test_a_training_step_has_the_same_loss_and_gradients(card, rows, model, monkeypatch):
    compare(model, rows(), *CARDS[card], monkeypatch)
    for layer in (*model.model.layers[1:], *model.mtp):
        assert not layer.mlp.experts.down_proj.grad[UNUSED].any()


def test_recomputed_layers_have_them_too(model, monkeypatch):
    model.gradient_checkpointing = True
    compare(model, packed_rows(), torch.bfloat16, 8, monkeypatch)


@pytest.mark.parametrize("card", CARDS)
def test_adapters_of_experts_have_them_too(card, tiny_model, monkeypatch):
    from training.adapters.adapter import Adapter  # peft takes seconds to import
    from training.adapters.lora import LoraSettings

    model = Adapter.add(tiny_model(**SIZES), LoraSettings(targets="all", r=3), "base").model
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    compare(model, whole_rows(), *CARDS[card], monkeypatch)


def calls_of(monkeypatch, *names: str) -> list[str]:
    """Note the calls of these functions of model/kernels/grouped_cuda.py."""
    calls: list[str] = []

    def noted(name: str, function: Callable) -> Callable:
        return lambda *given: calls.append(name) or function(*given)

    for name in names:
        monkeypatch.setattr(grouped_cuda, name, noted(name, getattr(grouped_cuda, name)))
    return calls


@pytest.mark.parametrize(("card", "reads"), [("fp32", 1), ("bf16 in one launch", 0), ("bf16 in a loop", 1)])
def test_the_host_reads_the_ends_of_the_groups_once_a_layer(card, reads, model, on_cuda, monkeypatch):
    dtype, capability = CARDS[card]
    monkeypatch.setattr(kernels, "capability", lambda device: capability)
    calls = calls_of(monkeypatch, "read_ends", "each_expert", "each_gradient")
    step(model, whole_rows(), dtype)
    layers = 2 + 2  # with experts, and the MTP layer of two steps
    assert calls.count("read_ends") == reads * layers
    assert calls.count("each_expert") == reads * layers * 4  # two products and their gradients by the rows
    assert calls.count("each_gradient") == reads * layers * 2


def test_products_in_a_loop_are_those_of_a_cpu_where_experts_have_no_rows():
    x, weight = torch.randn(24, 6), torch.randn(4, 5, 6)
    ends, found = torch.tensor([8, 8, 20, 20], dtype=torch.int32), []
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written
    try:
        for product, given in (
            (grouped_cuda.LoopedLinear, (ends,)),
            (grouped.GroupedLinear, (ends.tolist(), grouped.GradBuffer())),
        ):
            inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            out = product.apply(*inputs, *given)[:20]
            to_x, to_weight = torch.autograd.grad(out.square().sum(), inputs)
            found.append((out, to_x[:20], to_weight))
    finally:
        torch.use_deterministic_algorithms(False)
    for looped, plain in zip(*found, strict=True):
        torch.testing.assert_close(looped, plain)


def test_which_cards_multiply_all_experts_in_one_launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 + device.index, 6))
    half = {index: grouped_cuda.without_host(torch.bfloat16, torch.device("cuda", index)) for index in range(5)}
    assert half == {0: False, 1: True, 2: True, 3: False, 4: False}  # 9: H100, 10: B200; not 12: 50x0
    assert not grouped_cuda.without_host(torch.float32, torch.device("cuda", 1))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not grouped_cuda.without_host(torch.bfloat16, torch.device("cuda", 1))


def test_packed_rows_whose_ends_come_with_the_batch_need_no_count_of_the_device(model, on_cuda, monkeypatch):
    varlen_on_cpu()
    monkeypatch.setattr(attention, "flash_attention", lambda: None)
    batch = packed_rows()
    inputs = {name: batch[name] for name in ("input_ids", "segment_ids", "position_ids")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(**inputs).state
        ends = attention.segment_ends(batch["segment_ids"])
        monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: pytest.fail("waits for the device"))
        assert torch.equal(model(**inputs, segment_ends=ends).state, want)


def test_heads_too_large_for_kernels_are_masked(tiny_config, on_cuda):
    x, ids = torch.zeros(1, 5, 8).bfloat16(), torch.tensor([[0, 0, 1, 1, 1]])
    config: LMConfig = tiny_config(qk_nope_head_dim=300, v_head_dim=16)
    assert packed_mask(ids, None, x, config).segment_ends is None
    assert packed_mask(ids, None, x.float(), tiny_config(**SIZES)).segment_ends is None
    assert packed_mask(ids, None, x, tiny_config(**SIZES)).allowed is None
