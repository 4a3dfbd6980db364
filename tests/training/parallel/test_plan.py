"""The plan of a run counts what the model has, what the router does, and what the report measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli import parse
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.attention import AttentionMask
from model.costs import count
from model.layer import DecoderLayer
from model.moe import Router
from model.rope import RotaryEmbedding
from training.parallel import plan
from training.parallel.dist_settings import ShardSettings
from training.parallel.formulas import BUBBLES, kept_bytes, rows_sent
from training.parallel.placement import chunk_sizes, parts
from training.parallel.plan import Plan, PlannedMesh, PlanSettings
from training.parallel.schedule import CLASSES

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
V3 = LMConfig.preset("deepseek-v3")
# The report's run: nothing of a layer is computed again but what costs little.
REPORT = {"gpus": 2048, "gradient_checkpointing": "false"}


@pytest.fixture(scope="module")
def report() -> Plan:
    words = [f"--{name}={value}" for name, value in REPORT.items()]
    return Plan(parse(PlanSettings, "", ["--config", str(CONFIGS / "deepseek-v3.yaml"), *words]))


def test_a_step_costs_what_the_report_measured(report):
    """2,048 H800: 180 K GPU hours a trillion tokens, 2.664 M for 14.8 trillion, less than two months (Table 1, 4.2)."""
    assert report.of["GPU hours a T tokens"] == pytest.approx(180e3, rel=0.05)
    assert report.of["GPU hours"] == pytest.approx(2.664e6, rel=0.05)
    assert report.of["days"] < 61
    assert report.of["parameters"] == pytest.approx(671e9, rel=0.001)
    assert report.of["activated"] == pytest.approx(37e9, rel=0.02)


def test_the_batch_of_the_report_grows_over_its_first_469_billion_tokens(report):
    """In stairs around a line from 3,072 rows to 15,360 (section 4.2), each a whole number of micro-batches a rank."""
    settings, (*rising, last) = report.settings, report.settings.budget(10**12).batches.phases
    reached = last.sample * settings.row_tokens
    assert reached == pytest.approx(469e9, rel=0.01) and last.rows == settings.rows == 15360
    middles = [(now.sample + after.sample) / 2 for now, after in zip(rising[1:], [*rising[2:], last], strict=True)]
    line = [3072 + 12288 * sample * settings.row_tokens / 469e9 for sample in middles]
    assert [phase.rows for phase in rising[1:]] == pytest.approx(line, abs=1100)
    assert rising[0].rows == 4096 and all(phase.rows % 128 == 0 for phase in rising)


def test_memory_is_that_of_the_report_with_its_recomputation_only(report):
    """A rank of four MoE layers, as counted over its parameters; 80 GB hold it, nothing computed again does not."""
    typical = {line.name: line.value for line in report.memory(5)}
    state = sum(typical[name] for name in ("weights in bf16", "gradients in fp32", "optimiser and fp32 weights"))
    assert state == pytest.approx(12.7e9, rel=0.01)
    for rank in range(16):
        lines = {line.name: line.value for line in report.memory(rank)}
        saved = lines["activations"] - report.recomputed(rank)[1].value
        assert lines["sum"] - saved < 80e9, rank
    assert report.verdict().startswith("does not fit") and "--gradient_checkpointing true" in report.verdict()


def test_every_schedule_of_training_can_be_planned():
    assert [*PlannedMesh.SCHEDULES] == [*ShardSettings.SCHEDULES[:2], "dualpipe", ShardSettings.SCHEDULES[2]]
    assert {*CLASSES} == {*ShardSettings.SCHEDULES}


def test_bubbles_are_those_of_table_2():
    """With 16 ranks, F = 1, B = 2, W = 1, and F&B = 3."""
    idle = {name: formula(16, 1, 2, 1) for name, (_, formula, _) in BUBBLES.items()}
    assert idle == {"1f1b": 45, "zbv": 15, "dualpipe": 14, "dualpipev": 15}
    assert [held(16) for _, _, held in BUBBLES.values()] == [16, 16, 17, 16.5]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("pp", "folded"), [(1, False), (4, False), (4, True), (16, True)])
def test_the_parts_of_all_ranks_are_the_model(pp, folded, tied):
    config = replace(V3, tie_word_embeddings=tied)
    costs, all_parts = count(config, 4096), parts(config, pp, folded, 4096)
    assert sorted(layer for part in all_parts for layer in part.layers) == list(range(62))
    again = config.vocab_size * config.hidden_size * (pp > 1 and not folded)  # the embedding, on the last rank too
    assert sum(part.weights + part.experts for part in all_parts) == costs.total + costs.mtp + again
    assert sum(part.flops for part in all_parts) == pytest.approx(costs.flops, rel=1e-5)


def test_each_layer_has_the_weights_that_the_model_has():
    config = LMConfig.preset("demo", num_hidden_layers=5, first_k_dense_replace=2, tie_word_embeddings=False)
    model = MiniDeepSeek(config)
    layers = [*model.model.layers, *model.mtp]
    for part in parts(config, 3, False, 256):
        held = [p for index in part.layers for p in layers[index].parameters()]
        if {0, 5} & {*part.layers}:  # MTP takes the embedding too
            held += model.model.embed_tokens.parameters()
        if 5 in part.layers:
            held += [model.lm_head.weight, model.model.norm.weight]
        assert sum(p.numel() for p in held) == part.weights + part.experts


def test_chunks_are_even_and_the_ends_get_fewer():
    assert chunk_sizes(62, 32) == [1, *[2] * 30, 1]
    assert chunk_sizes(9, 4) == [2, 3, 2, 2]


@pytest.mark.parametrize(("ep", "node"), [(4, 2), (8, 2), (2, 1)])
@pytest.mark.parametrize("limit", [2, 4])
def test_rows_sent_are_those_of_the_router(ep, node, limit):
    config = LMConfig.preset("64m", n_group=4, topk_group=limit)
    torch.manual_seed(0)
    tokens = 20000
    chosen = Router(config).choose(torch.rand(tokens, config.n_routed_experts))
    ranks = torch.zeros(tokens, ep).scatter_(1, chosen // (config.n_routed_experts // ep), 1.0)
    home = torch.arange(tokens) % ep  # of each token
    ranks[torch.arange(tokens), home] = 0
    beside = torch.arange(ep) // node == home[:, None] // node
    nodes = ranks.masked_fill(beside, 0).unflatten(1, (-1, node)).amax(2).sum(1)
    sent = rows_sent(config, ep, node)
    found = ((ranks * ~beside).sum(1).mean(), (ranks * beside).sum(1).mean(), nodes.mean())
    assert tuple(sent) == pytest.approx([value.item() for value in found], rel=0.03)


@pytest.mark.parametrize("layer", [0, 1])
def test_activations_are_those_that_a_layer_keeps(layer):
    """Within a fifth: the kernels of a CPU do not keep the keys of all heads, and pad the rows of experts."""
    config, time = LMConfig.preset("64m"), 512
    made = DecoderLayer(config, layer)
    weights, kept, held = {p.data_ptr() for p in made.parameters()}, {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)  # or its memory would be used again
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    rope = RotaryEmbedding(config)(torch.arange(time)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(torch.randn(1, time, config.hidden_size, requires_grad=True), rope, AttentionMask())
    assert sum(kept.values()) / time / 2 == pytest.approx(kept_bytes(config, layer > 0), rel=0.2)  # fp32, not bf16


def test_zero_shards_what_it_says():
    held = {}
    for zero in (0, 1, 3):
        settings = PlanSettings(model={"preset": "v2-lite"}, gpus=8, batch_tokens=8 * 8192, dist=PlannedMesh(zero=zero))
        held[zero] = {line.name: line.value for line in Plan(settings).memory(0)}
    parameters = count(LMConfig.preset("v2-lite")).total
    assert held[0]["optimiser and fp32 weights"] == pytest.approx(12 * parameters)
    assert (
        held[1]["optimiser and fp32 weights"]
        == held[3]["optimiser and fp32 weights"]
        == pytest.approx(1.5 * parameters)
    )
    assert held[1]["gradients in fp32"] == held[0]["gradients in fp32"] == 4 * parameters
    assert held[3]["gradients in fp32"] < held[3]["optimiser and fp32 weights"]
    assert Plan(settings).verdict().startswith("fits")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--gpus 12 --dist.ep 8", "--gpus 12: is no multiple of --dist.pp 1 x --dist.ep 8 = 8"),
        ("--gpus 64 --dist.ep 64", "--dist.ep 64: does not divide the 32 experts of a layer"),
        (
            "--gpus 16 --dist.pp 16",
            "--dist.pp 16: 32 stages (dualpipev), but the model has 16 layers and 1 of MTP; lower",
        ),
        ("--dist.pp 2 --dist.zero 3", "--dist.zero 3: does not go with --dist.pp 2"),
        ("--dist.pp 2 --dist.schedule gpipe", "--dist.schedule gpipe: one of 1f1b, zbv, dualpipe, dualpipev"),
        ("--gpus 48", "is no multiple of 48 ranks with the same layers x --micro_tokens 16384"),
        ("--gpu h900", "--gpu h900: one of a100, h100, h200, h800"),
        ("--dist.zero 2", "--dist.zero 2: one of 0, 1, 3"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(run, options, says):
    said = run(plan.main, "--config", CONFIGS / "1b-moe.yaml", *options.split())
    assert said.code == 2 and says in said.err and len(said.err.splitlines()) == 1


def test_the_command_prints_each_number_with_its_formula_and_the_verdict(run):
    said = run(plan.main, "--config", CONFIGS / "1b-moe.yaml", "--gpu", "h100", "--dist.ep", "4", "--dist.zero", "1")
    lines = said.out.splitlines()
    assert said.code == 0 and lines[-1].startswith("fits")
    assert any(line.split()[:3] == ["gradients", "in", "fp32"] and "4 x" in line for line in lines)
