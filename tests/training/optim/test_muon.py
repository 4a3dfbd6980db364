"""Muon: the same update as torch.optim.Muon's, over stacks of matrices too, and AdamW for the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from forked import script_on_ranks

import pretrain
from errors import UserError
from training.optim.build import OptimSettings, build_optimizer, set_learning_rate
from training.optim.muon import orthogonal
from training.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = dict(lr=3e-3, weight_decay=0.2, momentum=0.9)


def step(model, optimizer, seed: int) -> None:
    """One update from gradients that this seed draws."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def matrices(name: str, p: torch.Tensor) -> list[torch.Tensor]:
    """Copies of the matrices that a parameter holds: of each expert one, or gate and up."""
    stack = p.detach().clone().reshape(-1, *p.shape[-2:])
    return [half for matrix in stack for half in (matrix.chunk(2) if "gate_up" in name else (matrix,))]


def test_each_matrix_of_each_stack_moves_as_torchs_muon_moves_it(tiny_model):
    model = tiny_model()
    optimizer = build_optimizer(model, OptimSettings(kind="muon", **SETTINGS))
    inside = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() >= 2 and not any(word in name for word in ("embed_tokens", "lm_head", "mlp.gate."))
    }
    assert sum(p.dim() == 3 for p in inside.values()) == 6  # two MoE layers and the MTP layer's
    alone = {name: [torch.nn.Parameter(m) for m in matrices(name, p)] for name, p in inside.items()}
    plain = torch.optim.Muon([m for ms in alone.values() for m in ms], adjust_lr_fn="match_rms_adamw", **SETTINGS)
    before = {name: torch.cat(matrices(name, p)) for name, p in inside.items()}
    for seed in range(3):
        step(model, optimizer, seed)
        for name, p in inside.items():
            for m, grad in zip(alone[name], matrices(name, p.grad), strict=True):
                m.grad = grad
        plain.step()
    for name, p in inside.items():
        got, wanted = torch.cat(matrices(name, p)), torch.cat(alone[name]).detach()
        # Both round to bfloat16 on the way where the machine has it, and torch's does everywhere.
        assert (got - wanted).norm() < 0.01 * (wanted - before[name]).norm(), name


def test_embedding_head_router_and_norms_are_adamws(tiny_model):
    by_muon, by_adamw = tiny_model(), tiny_model()
    optimizers = [
        build_optimizer(by_muon, OptimSettings(kind="muon", **SETTINGS)),
        build_optimizer(by_adamw, OptimSettings(**SETTINGS)),
    ]
    for seed in range(3):
        for model, optimizer in zip((by_muon, by_adamw), optimizers, strict=True):
            set_learning_rate(optimizer, 1e-3)
            step(model, optimizer, seed)
    others = dict(by_adamw.named_parameters())
    same = {name for name, p in by_muon.named_parameters() if torch.equal(p, others[name])}
    looked_up = {"model.embed_tokens.weight", "lm_head.weight", *(n for n in others if n.endswith("mlp.gate.weight"))}
    assert same == looked_up | {name for name, p in others.items() if p.dim() == 1}


def test_what_adamw_has_moves_at_a_rate_of_its_own(tiny_model):
    """Without decay a step's length is the learning rate's: of AdamW's parameters four times as long."""
    plain, faster = tiny_model(), tiny_model()
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for model, ratio in ((plain, 1.0), (faster, 4.0)):
        optimizer = build_optimizer(model, OptimSettings(kind="muon", weight_decay=0.0, adamw_lr_ratio=ratio))
        set_learning_rate(optimizer, 1e-3)
        step(model, optimizer, 0)
    others = dict(faster.named_parameters())
    for name, p in plain.named_parameters():
        by_adamw = p.dim() == 1 or "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight")
        moved = (4.0 if by_adamw else 1.0) * (p - before[name])
        torch.testing.assert_close(others[name] - before[name], moved, rtol=1e-3, atol=1e-6)


def test_orthogonal_leaves_the_directions_and_levels_the_lengths():
    x = torch.randn(3, 20, 50)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    made = orthogonal(x).float()
    assert (made - u @ vt).norm() < 0.3 * (u @ vt).norm()
    lengths = torch.linalg.svdvals(made)
    assert lengths.min() > 0.6 and lengths.max() < 1.3
    assert not orthogonal(torch.zeros(1, 4, 8)).any()


def test_a_weight_without_a_gradient_stays(tiny_model):
    """The MTP layer takes no part while its weight is 0."""
    model = tiny_model()
    optimizer = build_optimizer(model, OptimSettings(kind="muon", **SETTINGS))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = None if name.startswith("mtp.") else torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("mtp."), name


def test_a_run_does_not_change_its_optimiser(make):
    make(max_steps=2).run()
    with pytest.raises(UserError, match=r"was trained with optim\.kind = adamw, not muon"):
        make(resume=True, optim=OptimSettings(kind="muon")).run()


def test_two_ranks_with_muon_train_as_one_process_does(pretrain_arguments, tmp_path, run):
    # The rounding of sums turns around singular values of a gradient that are almost 0, so few steps at a low rate.
    recipe = [*pretrain_arguments, "--optim.kind", "muon", "--optim.eps", "1e-3", "--max_steps", "3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(pretrain.main, *recipe, "--micro_tokens", "512", "--out", one).code == 0
    script_on_ranks(2, pretrain.main, [*recipe, "--micro_tokens", 512, "--out", two], tmp_path)
    alone, together = (read_metrics(out / "metrics.jsonl") for out in (one, two))
    for name in ("loss", "grad_norm"):
        assert [e[name] for e in together if name in e] == pytest.approx(
            [e[name] for e in alone if name in e], rel=2e-3
        )


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["--optim.kind", "moun"], "--optim.kind moun: one of adamw, .*muon"),
        (["--optim.momentum", "1"], "--optim.momentum 1.0: give a number from 0 to below 1"),
        (["--optim.kind", "muon", "--optim.adamw_lr_ratio", "0"], "adamw_lr_ratio 0.0: give a number above 0"),
    ],
)
def test_nonsense_is_refused_in_one_line(given, what, run, pretrain_arguments, tmp_path):
    done = run(pretrain.main, *pretrain_arguments, "--out", tmp_path / "out", *given)
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert done.err.count("\n") == 1 and re.search(what, done.err)
