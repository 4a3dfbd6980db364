"""Every fast path of training against the plain one, forward and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_place import DTYPES, Finding, Place, gradients, relative
from gpu_plain import experts as plain_experts
from gpu_plain import hidden_states, loss_sum
from gpu_plain import norm as plain_norm
from gpu_plain import rotate as plain_rotate
from torch import Tensor

from model import MiniDeepSeek, ops
from model.experts import Experts, LowRank
from model.fp8 import BLOCK as FP8_BLOCK
from model.fp8 import TILE, Quantised
from model.fp8 import product as fp8_product
from model.norm import RMSNorm
from model.quantized import Int8Weight, QuantizedLinear, quantize_weights
from model.rope import RotaryEmbedding
from training.adapters.frozen import BLOCK, NF4Weight
from training.losses import NextTokenLoss, cross_entropy_sum
from training.optim.build import OptimSettings, build_optimizer, step_scaled

# The most that a result may differ, by the norm: sums in another order, or numbers rounded to 8 bits on the way.
BOUNDS = {"fp32": 1e-5, "bf16": 0.02}
GRADIENT_BOUNDS = {"fp32": 1e-4, "bf16": 0.04}


def norms(place: Place) -> Iterator[Finding]:
    """RMSNorm."""
    for name, dtype in DTYPES.items():
        module = RMSNorm(64 if place.small else 768, eps=1e-5).to(place.device)
        torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        x = torch.randn(37, len(module.weight), device=place.device, dtype=dtype).mul_(3).requires_grad_()
        yield from compared(
            name, lambda x, m=module: m(x), lambda x, w: plain_norm(x, w, 1e-5), [x], list(module.parameters())
        )


def rope(place: Place) -> Iterator[Finding]:
    """Rotary embedding, at positions up to the longest."""
    config = place.config()
    rotary = RotaryEmbedding(config).to(place.device)
    positions = torch.randint(0, config.max_position_embeddings, (2, 33), device=place.device)
    x = torch.randn(2, 33, 3, config.qk_rope_head_dim, device=place.device, requires_grad=True)
    for name, dtype in DTYPES.items():
        yield from compared(
            name,
            lambda x, d=dtype: ops.rotate(x.to(d), rotary(positions)),
            lambda x: plain_rotate(x, positions, config.rope_theta),
            [x],
            # Angles are thousands of radians in float32.
            bounds=(max(BOUNDS[name], 1e-3), max(GRADIENT_BOUNDS[name], 1e-3)),
        )


def experts(place: Place) -> Iterator[Finding]:
    """Grouped experts, some of them without tokens, one with most of them; and with low-rank corrections."""
    config = place.config()
    count, top_k, tokens = config.n_routed_experts, config.num_experts_per_tok, 75 if place.small else 3000
    torch.manual_seed(0)
    module = Experts(config).to(place.device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    likely = torch.tensor([0.0, 9.0, *[1.0] * (count - 3), 0.0])
    indices = torch.multinomial(likely.expand(tokens, -1), top_k).to(place.device)
    x = torch.randn(tokens, config.hidden_size, device=place.device, requires_grad=True)
    weights = torch.rand(tokens, top_k, device=place.device, requires_grad=True)
    a, b = (
        torch.randn(count, *shape, device=place.device).mul_(0.1).requires_grad_()
        for shape in ((4, config.hidden_size), (2 * config.moe_intermediate_size, 4))
    )
    for name, dtype in DTYPES.items():

        def run(x: Tensor, weights: Tensor, a: Tensor, b: Tensor, lora: bool, dtype: torch.dtype = dtype) -> Tensor:
            corrections = {"gate_up_proj": LowRank(a.to(dtype), b.to(dtype), 2.0)} if lora else {}
            with place.autocast(dtype):
                return module(x, weights, indices, corrections)

        for lora in (False, True):

            def plain(
                x: Tensor, weights: Tensor, a: Tensor, b: Tensor, gate_up: Tensor, down: Tensor, lora: bool = lora
            ) -> Tensor:
                return plain_experts(x, weights, indices, gate_up + 2.0 * b @ a if lora else gate_up, down)

            yield from compared(
                f"{name}, LoRA" if lora else name,
                lambda *given, run=run, lora=lora: run(*given, lora=lora),
                plain, [x, weights, a, b], list(module.parameters()),
            )  # fmt: skip


def loss(place: Place) -> Iterator[Finding]:
    """The vocabulary's loss in chunks with its gradient."""
    rows, size, vocab = (90, 64, 97) if place.small else (5000, 768, 6400)
    hidden = torch.randn(rows, size, device=place.device, requires_grad=True)
    head = torch.randn(vocab, size, device=place.device).mul_(0.1).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device=place.device)
    labels[::7] = -100
    for name, dtype in DTYPES.items():
        yield from compared(
            name,
            lambda h, w, d=dtype: cross_entropy_sum(h.to(d), w, labels),
            lambda h, w: loss_sum(h, w, labels),
            [hidden, head],
        )


def router(place: Place) -> Iterator[Finding]:
    """The router's scores in float32, whatever the network computes in: TF32 would be off by 1e-4 and more."""
    model = place.model()
    gate = model.routers()[0]
    torch.nn.init.normal_(gate.weight, std=0.1)
    x = torch.randn(256, model.config.hidden_size, device=place.device)
    with place.autocast(torch.bfloat16), torch.no_grad():
        scores = gate(x)[2]
    exact = (x.double() @ gate.weight.detach().double().t()).sigmoid()
    yield Finding("scores against float64", float((scores.double() - exact).abs().max()), 5e-6)


def network(place: Place) -> Iterator[Finding]:
    """The whole network and its loss, causal and with isolated segments in a row, against float64."""
    model = place.model()
    config, rows, time = model.config, 3, 48 if place.small else 512
    ids = place.ids(rows, time, config.vocab_size)
    labels = ids.roll(-1, 1)
    labels[:, ::5] = -100
    exact = copy.deepcopy(model).double()
    for packed in (False, True):
        inputs = {"input_ids": ids}
        if packed:
            inputs |= segments_of(rows, time, place.device)
        for name, dtype in DTYPES.items():
            found, chosen = loss_and_routing(model, inputs, labels, place, dtype)
            found_gradients = gradients(model.parameters())
            exact.zero_grad()
            hidden = hidden_states(exact, ids, inputs.get("segment_ids"), chosen)
            expected = loss_sum(hidden, exact.lm_head.weight, labels)
            expected.backward()
            kind = f"{'packed' if packed else 'causal'}, {name}"
            yield Finding(f"{kind}: loss", relative(found, expected), BOUNDS[name] / 2)
            difference = relative(found_gradients, gradients(exact.parameters()))
            yield Finding(f"{kind}: gradients", difference, GRADIENT_BOUNDS[name])


def bf16(place: Place) -> Iterator[Finding]:
    """A whole step in bfloat16, the router's own choices, beside float32."""
    model, (total, one) = place.model(), (None, None)
    ids = place.ids(4, 40 if place.small else 512, model.config.vocab_size)
    for name, dtype in DTYPES.items():
        found, gradient = trained(model, ids, place, dtype)
        if name == "fp32":
            total, one = found, gradient
    yield Finding("loss against fp32", relative(found, total), 0.01)
    yield Finding("gradients against fp32", relative(gradient, one), 0.2)  # a choice of experts may change


def checkpointing(place: Place) -> Iterator[Finding]:
    """Activations computed again in the backward pass."""
    model = place.model()
    ids = place.ids(2, 40 if place.small else 512, model.config.vocab_size)
    total, gradient = trained(model, ids, place, torch.bfloat16)
    model.gradient_checkpointing = True
    again, gradient_again = trained(model, ids, place, torch.bfloat16)
    yield Finding("loss", relative(again, total), 1e-6)
    yield Finding("gradients", relative(gradient_again, gradient), 1e-3)


def optimizer(place: Place) -> Iterator[Finding]:
    """Three steps of AdamW, its gradients scaled, against its formula (Loshchilov and Hutter 2019, algorithm 2)."""
    for kind, stored, bound in (("adamw", Tensor.double, 1e-6), ("adamw_bf16", Tensor.bfloat16, 1e-4)):
        layer = torch.nn.Linear(64, 33, bias=False, device=place.device)
        settings = OptimSettings(lr=0.01, weight_decay=0.1, kind=kind)
        made = build_optimizer(layer, settings)
        w = layer.weight.detach().double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        (first, second), eps = settings.betas, settings.eps
        for step in range(1, 4):
            layer.weight.grad = torch.randn(33, 64, device=place.device)
            gradient = layer.weight.grad.double() * 0.3**step
            step_scaled(made, [layer.weight.grad], 0.3**step)
            m, v = first * m + (1 - first) * gradient, second * v + (1 - second) * gradient**2
            w = w - 0.01 * (m / (1 - first**step) / ((v / (1 - second**step)).sqrt() + eps) + 0.1 * w)
            m, v = stored(m).double(), stored(v).double()
        yield Finding(f"{kind}: weights", relative(layer.weight.detach(), w), bound)


def quantized(place: Place) -> Iterator[Finding]:
    """Weights in 8 and 4 bits, of layers and experts: products, and the gradient of what goes in."""
    out, size = (64, 128) if place.small else (768, 1024)
    eight = Int8Weight.rounded(torch.randn(out, size, device=place.device))
    codes = torch.randint(0, 256, (out * size // 2,), dtype=torch.uint8, device=place.device)
    levels = torch.linspace(-1, 1, 16, device=place.device)
    scales = torch.randint(-127, 128, (4, out * size // BLOCK // 4), dtype=torch.int8, device=place.device)
    factors = torch.full((4,), 100.0, device=place.device)
    four = NF4Weight(
        torch.Size((out, size)), codes=codes, scales=scales, factors=factors, levels=levels,
        mean=torch.tensor(2.0, device=place.device),
    )  # fmt: skip
    # A byte holds two levels, the first in its high half.
    both = torch.stack((codes.long() // 16, codes.long() % 16), dim=1).flatten()
    scale = (scales.double() / 100.0).flatten() + 2.0
    exact = {
        "8 bits": eight.codes.double() * eight.scales.double(),
        "4 bits": (levels.double()[both].view(-1, BLOCK) * scale[:, None]).view(out, size),
    }
    x = torch.randn(50, size, device=place.device, requires_grad=True)
    for kind, weight in (("8 bits", eight), ("4 bits", four)):
        module = QuantizedLinear(torch.nn.Linear(size, out, bias=False, device=place.device), weight)

        def run(x: Tensor, module: QuantizedLinear = module) -> Tensor:
            with place.autocast(torch.bfloat16):
                return module(x)

        yield from compared("bf16", run, lambda x, w=exact[kind]: F.linear(x, w), [x], prefix=kind)

    config = place.config()
    routed = Experts(config).to(place.device)
    for parameter in routed.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    quantize_weights(routed, "", Int8Weight.rounded)
    dense = [weight.codes.double() * weight.scales.double() for weight in (routed.gate_up_proj, routed.down_proj)]
    x = torch.randn(50, config.hidden_size, device=place.device, requires_grad=True)
    weights = torch.rand(50, config.num_experts_per_tok, device=place.device)
    indices = torch.rand(50, config.n_routed_experts, device=place.device).topk(config.num_experts_per_tok).indices

    def run_experts(x: Tensor) -> Tensor:
        with place.autocast(torch.bfloat16):
            return routed(x, weights, indices)

    plain = lambda x: plain_experts(x, weights, indices, *dense)  # noqa: E731
    yield from compared("bf16", run_experts, plain, [x], prefix="experts in 8 bits")


def fp8(place: Place) -> Iterator[Finding]:
    """Products of FP8 numbers, by cuBLAS on Hopper from CUDA 12.9 on, against float64; partial tiles among them."""
    small = {"partial": (133, 200, 140)}
    for kind, (height, inner, width) in (small if place.small else {**small, "whole": (4096, 2048, 768)}).items():
        x, w = (torch.randn(size, inner, device=place.device) for size in (height, width))
        a = Quantised.of(x, TILE, powers=False)
        for name, block in (("tiles by blocks", FP8_BLOCK), ("tiles by tiles", TILE)):
            b = Quantised.of(w, block, powers=False)
            exact = a.dense().double() @ b.dense().double().t()
            # Tensor cores add 128 products with fewer bits than float32 has (DeepSeek-V3 section 3.3.2).
            yield Finding(f"{kind}: {name}", relative(fp8_product(a, b), exact), 3e-3)


def compared(
    name: str,
    fast: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    weights: list[Tensor] | None = None,
    bounds: tuple[float, float] | None = None,
    prefix: str = "",
) -> Iterator[Finding]:
    """Yield how far `fast(*inputs)` and its gradients are from `plain(*inputs, *weights)` in float64."""
    dtype, learns = name.partition(",")[0], [x for x in (*inputs, *(weights or [])) if x.requires_grad]
    bound, gradient_bound = bounds or (BOUNDS[dtype], GRADIENT_BOUNDS[dtype])
    for x in learns:
        x.grad = None
    found = fast(*inputs)
    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found.device)
    (found.double() * along).sum().backward()
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in (*inputs, *(weights or []))]
    expected = plain(*doubles)
    (expected * along).sum().backward()
    label = f"{prefix} {name}".strip()
    yield Finding(f"{label}: result", relative(found.detach(), expected.detach()), bound)
    pairs = zip(learns, (x for x in doubles if x.requires_grad), strict=True)
    worst = max((relative(gradients([a]), gradients([b])) for a, b in pairs if b.grad is not None), default=0.0)
    yield Finding(f"{label}: gradients", worst, gradient_bound)


def segments_of(rows: int, time: int, device: torch.device) -> dict[str, Tensor]:
    """Return ids of three samples a row and positions that restart in each, as batches have them."""
    cuts = [[0] * rows, [time // 3 + row for row in range(rows)], [time // 2 + 3 * row for row in range(rows)]]
    places, cut = torch.arange(time), torch.tensor(cuts)
    ids = (places >= cut[:, :, None]).sum(0) - 1
    positions = places - cut.t().gather(1, ids)
    return {"segment_ids": ids.to(device), "position_ids": positions.to(device)}


def loss_and_routing(
    model: MiniDeepSeek, inputs: dict[str, Tensor], labels: Tensor, place: Place, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Return the summed loss, of which gradients are left in the parameters, and the experts that were chosen."""
    chosen: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda _, __, out: chosen.append(out[1])) for gate in model.routers()]
    model.zero_grad()
    with place.autocast(dtype):
        out = model(**inputs)
        total = cross_entropy_sum(out.hidden, out.head, labels)
    total.backward()
    for hook in hooks:
        hook.remove()
    return total.detach(), chosen


def trained(
    model: MiniDeepSeek, ids: Tensor, place: Place, dtype: torch.dtype, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return loss and gradients of one forward and backward pass; packed: of isolated samples."""
    model.train().zero_grad()
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    if packed:
        batch |= segments_of(*batch["labels"].shape, place.device)
    with place.autocast(dtype):
        total, _, _ = NextTokenLoss()(model, batch)
    total.backward()
    return total.detach(), gradients(model.parameters())


CHECKS = {
    check.__name__: check
    for check in (norms, rope, experts, loss, router, network, bf16, checkpointing, optimizer, quantized, fp8)
}
