"""The one loop: exact accumulation, one bias update a step, budgets and what is logged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_stage import ROWS, TIME, VOCAB, Rows, biases

import model.transformer
import training.machine
import training.trainer
from errors import UserError
from model import MiniDeepSeek
from model.kernels.report import kernel_report
from training.losses import Batch, NextTokenLoss
from training.machine import machine_peak, measured_peak
from training.optim.build import OptimSettings
from training.parallel.ranks import Ranks
from training.router_bias import update_bias
from training.run.log import read_metrics
from training.settings import StageSettings
from training.startup import begin
from training.trainer import Trainer
from training.validation import BitsPerByte

CONTRACT = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"}


def test_a_step_without_labels_changes_no_weight(make):
    class Unlabelled(Rows):
        def batch(self, indices: Sequence[int]) -> Batch:
            batch = super().batch(indices)
            return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    trainer = make(dataset=Unlabelled(), max_steps=1, optim=OptimSettings(weight_decay=0.0))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert read_metrics(trainer.out / "metrics.jsonl")[1]["loss"] == 0


def test_the_bias_moves_once_a_step_by_the_counts_of_all_micro_batches(make, monkeypatch):
    trainer = make(max_steps=1, micro_tokens=2 * TIME, model={"num_nextn_predict_layers": 2})
    with torch.no_grad():
        for router in trainer.model.routers():
            router.e_score_correction_bias.uniform_(-0.3, 0.3)
    before, counts, call = biases(trainer.model), [], NextTokenLoss.__call__

    def spy(loss: NextTokenLoss, *inputs: object):
        result = call(loss, *inputs)
        counts.append(result[2]["counts"])
        return result

    monkeypatch.setattr(NextTokenLoss, "__call__", spy)
    trainer.run()  # which also validates, before and after
    assert len(counts) == 4 and counts[0].shape == (4, 8)  # two MoE layers and both MTP layers
    want = before.clone()
    for bias, load in zip(want, sum(counts), strict=True):
        update_bias(bias, load, 0.01)
    assert torch.equal(biases(trainer.model), want) and not torch.equal(before, want)


def test_validation_moves_nothing(make):
    trainer = make()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    entry = trainer._validate()
    assert entry["val_bits_per_byte"] > 0 and trainer.model.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_the_gradient_is_clipped(make):
    """A clip of 1e-9 under epsilon 1 leaves weights all but where they were; the norm that is logged is unclipped."""
    trainer = make(max_steps=1, optim=OptimSettings(clip=1e-9, eps=1.0, weight_decay=0.0))
    before = trainer.model.lm_head.weight.clone()
    trainer.run()
    assert (trainer.model.lm_head.weight - before).abs().max() < 1e-9
    assert read_metrics(trainer.out / "metrics.jsonl")[1]["grad_norm"] > 0.01


def test_a_gradient_within_the_clip_stays_as_it_is(make):
    """A clip of just above its norm and one of far above it give the same weights, where epsilon shows scale."""
    weights, norm = [], 0.0
    for clip in (1e9, 1.01):
        trainer = make(f"clip {clip}", max_steps=1, optim=OptimSettings(clip=clip * (norm or 1), eps=1.0))
        trainer.run()
        norm = read_metrics(trainer.out / "metrics.jsonl")[1]["grad_norm"]
        weights.append(trainer.model.lm_head.weight.clone())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


def test_every_logged_step_has_the_keys_people_rely_on(make):
    trainer = make(max_steps=7, log_every=3, val_every=2)
    trainer.run()
    entries = read_metrics(trainer.out / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3, 4, 6, 7]
    assert all(entry.keys() >= CONTRACT for entry in entries)
    assert [entry["step"] for entry in entries if "val_bits_per_byte" in entry] == [0, 2, 4, 6, 7]
    assert [entry["tokens"] for entry in entries] == [entry["step"] * ROWS * TIME for entry in entries]
    for entry in entries[1:]:
        assert entry["mtp_loss"] > 0 and entry["balance_loss"] > 0 and entry["memory"] > 1e6
        assert entry["tokens_per_second"] > 0 and entry["mfu"] > 0 and entry["grad_norm"] > 0
        assert len(entry["max_vio"]) == 3  # two MoE layers and the MTP layer
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(entries))
    load = torch.tensor(entries[-1]["expert_load"])
    assert load.shape == (2, 8)
    torch.testing.assert_close(load.sum(1), torch.ones(2))


def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_labels(make):
    trainer = make()
    entry, batch = trainer._validate(), trainer.validation.batches[0]
    logits = trainer.model(batch["input_ids"]).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").item()
    size = sum(len(trainer.tokenizer.raw.id_to_token(token)) for token in batch["labels"].flatten().tolist())
    assert entry["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert entry["val_loss"] == pytest.approx(nats / batch["labels"].numel(), rel=1e-5)


def test_the_weights_follow_their_schedules(make, monkeypatch):
    seen, call = [], NextTokenLoss.__call__

    def spy(loss: NextTokenLoss, *inputs: object):
        seen.append((loss.mtp_weight, loss.balance_weight))
        return call(loss, *inputs)

    monkeypatch.setattr(NextTokenLoss, "__call__", spy)
    trainer = make(
        max_steps=4, mtp_weight={"0": 0.3, "0.75": 0.1}, balance_weight={"0": 1e-3, "0.5": 0.0}, bias_speed=0
    )
    before = biases(trainer.model)
    trainer.run()
    assert seen == [(0.3, 1e-3), (0.3, 0.0), (0.1, 0.0), (0.1, 0.0)]
    assert torch.equal(biases(trainer.model), before)


BALANCES = {"bias": (1e-2, 1e-3), "aux": (0.0, 1e-3), "none": (0.0, 0.0)}  # gamma and alpha


@pytest.mark.parametrize("balance", BALANCES)
def test_experts_are_balanced_by_what_is_asked_for(balance, make):
    trainer = make(max_steps=1, balance=balance, balance_weight=1e-3)
    before = biases(trainer.model)
    trainer.run()
    assert (trainer.loss.bias_speed, trainer.loss.balance_weight) == BALANCES[balance]
    assert torch.equal(biases(trainer.model), before) == (balance != "bias")


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_the_balance_loss_is_of_the_scope_that_is_asked_for(scope, make):
    trainer = make(max_steps=1, balance="aux", balance_scope=scope)
    trainer.run()
    logged = read_metrics(trainer.out / "metrics.jsonl")[-1]["balance_loss"]
    ours = make("again", max_steps=1)
    for router in ours.model.routers():
        router.balances_batch = scope == "batch"
    batch = Rows().batch(range(ROWS))
    sums = ours.model(batch["input_ids"], mtp=1).balance_loss.sum() / 3 / batch["labels"].numel()  # of 3 MoE layers
    assert logged == pytest.approx(sums.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": None, "max_tokens": 5 * ROWS * TIME + 1}, 6),
        ({"max_steps": None}, 5),
        ({"max_steps": 6, "epochs": 0.5, "max_minutes": 99.0}, 3),
    ],
    ids=["tokens", "one epoch", "all of them"],
)
def test_the_schedule_ends_with_the_budget(budget, steps, make):
    optim = OptimSettings(lr=1e-3, final_lr_ratio=0.25, warmup=0.0, decay_from=0.5)
    trainer = make(**budget, optim=optim)
    assert trainer.run() == trainer.out / "final"
    last = read_metrics(trainer.out / "metrics.jsonl")[-1]
    assert last["step"] == steps and last["lr"] == pytest.approx(1e-3 * 0.25) and "val_bits_per_byte" in last


def test_a_budget_of_minutes_ends_with_a_finished_model(make, monkeypatch):
    ticks = count(step=3.0)
    monkeypatch.setattr(training.trainer, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    optim = OptimSettings(lr=1e-3, final_lr_ratio=0.1, warmup=0.0, decay_from=0.5)
    trainer = make(max_steps=None, max_minutes=1.0, optim=optim)
    assert trainer.run() == trainer.out / "final"
    entries = read_metrics(trainer.out / "metrics.jsonl")
    assert entries[-1]["seconds"] >= 60 > entries[-2]["seconds"]
    assert entries[-1]["lr"] < 1.3e-4 < 9.9e-4 < entries[2]["lr"]


def test_validating_and_sampling_are_not_training_time(make, monkeypatch):
    """Or a run limited by the clock would train less for being watched."""
    now, measure = [0.0], BitsPerByte.__call__

    def passes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(training.trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(BitsPerByte, "__call__", lambda *given: (passes(1000.0), measure(*given))[1])
    trainer = make(dataset=Rows(lambda _: passes(3.0)), val_every=1, max_steps=4)
    trainer.samples = SimpleNamespace(begin=id, due=lambda *_: True, write=lambda *_: passes(1000.0))
    trainer.run()
    entries = read_metrics(trainer.out / "metrics.jsonl")
    assert [entry["seconds"] for entry in entries] == [0, 3, 6, 9, 12]
    assert {entry["tokens_per_second"] for entry in entries[1:]} == {ROWS * TIME / 3.0}


class Squares:
    """A loss with a number of labels and measures of its own: no part of it is a prediction of tokens."""

    def __call__(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict]:
        squares = model(batch["input_ids"]).hidden.square().mean((1, 2))
        odd = batch["input_ids"][:, 0] % 2
        metrics = {"first": batch["input_ids"][:, 0].sum(), "of_odd": ((odd * batch["labels"][:, 0]).sum(), odd.sum())}
        return squares.sum(), torch.tensor(len(squares)), metrics


def test_a_stage_may_have_its_own_loss_measures_and_validation(tiny_config, tokenizer, tmp_path):
    """Sums are logged over the count of the step, pairs over their own count, however the step is cut."""
    ids = Rows().batch(range(ROWS))
    first, label = ids["input_ids"][:, 0], ids["labels"][:, 0]
    odd = first % 2 == 1
    for micro_rows in (ROWS, 3):
        settings = StageSettings(
            out=str(tmp_path / str(micro_rows)), batch_tokens=ROWS * TIME, micro_tokens=micro_rows * TIME,
            sequence_length=TIME, max_steps=1, dtype="fp32", val_every=1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = MiniDeepSeek(tiny_config(vocab_size=VOCAB, num_nextn_predict_layers=0))
        ranks = Ranks(0, 1, torch.device("cpu"))
        before = biases(model)
        Trainer(settings, ranks, model, tokenizer, Rows(), Squares(), lambda *_: {"val_loss": 7.0, "val_x": 8.0}).run()
        untrained, entry = read_metrics(tmp_path / str(micro_rows) / "metrics.jsonl")
        assert untrained.keys() >= CONTRACT and (untrained["loss"], untrained["val_x"]) == (7.0, 8.0)
        assert entry.keys() >= CONTRACT and (entry["val_x"], entry["labels"]) == (8.0, ROWS)
        assert entry["first"] == pytest.approx(first.sum().item() / ROWS)
        assert 0 < odd.sum() < ROWS and entry["of_odd"] == pytest.approx(label[odd].double().mean().item())
        assert torch.equal(biases(model), before)  # the loss named no loads and the settings no speed


def test_rows_that_do_not_divide_among_the_ranks_are_refused(make):
    with pytest.raises(UserError, match=f"{ROWS} rows do not divide among 3 ranks; choose a multiple of {3 * TIME}"):
        make(world=3)


def test_the_announcement_says_why_this_device(make, capsys):
    make(ranks=Ranks(0, 1, torch.device("cpu"), "no driver"), max_steps=1).run()
    assert "machine    1 x cpu (no driver), " in capsys.readouterr().out


def test_rows_longer_than_the_model_reads_are_refused(make):
    with pytest.raises(UserError, match="--sequence_length 128: the model reads 64 tokens"):
        make(sequence_length=128, batch_tokens=1024)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputing_activations_gives_the_same_step(dtype, make):
    given = dict(max_steps=2, dtype=dtype)
    trainers = [make("kept", **given), make("recomputed", **given, gradient_checkpointing=True)]
    for trainer in trainers:
        trainer.run()
    kept, recomputed = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_random_states_are_kept_for_recomputing_where_there_is_dropout_only(make, monkeypatch):
    """They are copied for each layer, on a GPU twice."""
    kept, recompute = [], model.transformer.checkpoint

    def spy(*inputs: object, preserve_rng_state: bool, **options: object) -> object:
        kept.append(preserve_rng_state)
        return recompute(*inputs, preserve_rng_state=preserve_rng_state, **options)

    monkeypatch.setattr(model.transformer, "checkpoint", spy)
    make("plain", max_steps=1, gradient_checkpointing=True).run()
    build = MiniDeepSeek.__init__

    def dropping(network: MiniDeepSeek, *given: object) -> None:
        build(network, *given)
        network.model.layers[0].post_attention_layernorm.register_module("dropout", torch.nn.Dropout(0.5))

    monkeypatch.setattr(MiniDeepSeek, "__init__", dropping)
    make("dropped", max_steps=1, gradient_checkpointing=True).run()
    assert kept == 4 * [False] + 4 * [True]  # three layers and MTP's


def test_bfloat16_products_keep_float32_weights(make):
    exact, rough = make("fp32", max_steps=2), make("bf16", max_steps=2, dtype="bf16")
    for trainer in (exact, rough):
        trainer.run()
    assert {value.dtype for value in rough.model.state_dict().values()} == {torch.float32}
    (_, *want), (_, *got) = (read_metrics(trainer.out / "metrics.jsonl") for trainer in (exact, rough))
    for ours, theirs in zip(got, want, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01) and ours["loss"] != theirs["loss"]


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """As if nothing were known of the machine yet, and again afterwards."""
    machine_peak.cache_clear()
    yield
    machine_peak.cache_clear()


def test_a_step_beyond_the_measured_peak_raises_it_and_says_so(unmeasured, make, monkeypatch, capsys):
    """MFU is a share: of what was measured while a neighbour was busy, it would be more than all."""
    monkeypatch.setattr(training.machine, "measured_peak", lambda *_: 1.0)
    trainer = make(max_steps=3)
    trainer.run()
    shares = [entry["mfu"] for entry in read_metrics(trainer.out / "metrics.jsonl")[1:]]
    assert trainer.peak > 1 and max(shares) == 1 and min(shares) > 0
    assert capsys.readouterr().out.count("is the machine's peak from here on") == shares.count(1) >= 1


def test_the_peak_is_measured_once_on_an_empty_device_and_memory_is_counted_from_there(unmeasured, make, monkeypatch):
    """By order: the statistics of a GPU begin after the measurement, which comes before the model is placed."""
    happened, device = [], torch.device("cuda", 0)
    monkeypatch.setattr(training.machine, "measured_peak", lambda *_: happened.append("measured") or 1e15)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, name=name: happened.append(name))
    assert machine_peak(torch.bfloat16, device) == machine_peak(torch.bfloat16, device) == 1e15
    assert happened == ["measured", "empty_cache", "reset_peak_memory_stats"]
    place = MiniDeepSeek.to
    monkeypatch.setattr(MiniDeepSeek, "to", lambda model, *to: happened.append("placed") or place(model, *to))
    make("fresh", max_steps=2).run()
    assert happened[3:] == ["measured", "placed"]


def test_a_stage_begins_with_the_peak(unmeasured, monkeypatch, tmp_path):
    """On the threads that it is given, before it opens a model."""
    threads = []
    monkeypatch.setattr(training.machine, "measured_peak", lambda *_: threads.append(torch.get_num_threads()) or 1e15)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.append(-count))
    begin(StageSettings(out=str(tmp_path), device="cpu", threads=1))
    assert threads == [-1, 1]


def test_measuring_the_peak_leaves_the_random_numbers_alone():
    """It comes between taking up a checkpoint and the next step, whose dropout must be that of an unbroken run."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert measured_peak(torch.bfloat16, torch.device("cpu"), size=16, patience=0) > 0
    assert torch.equal(torch.get_rng_state(), before)


class Products(TorchDispatchMode):
    """Writes down the types of products with the router's matrix, (12 experts, 32 features), or its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        if function is torch.ops.aten.mm.default and any({*x.shape} == {12, 32} for x in (*arguments, out)):
            self.types += [x.dtype for x in (*arguments, out)]
        return out


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_routers_products_of_the_backward_pass_are_in_float32(recomputed, make, monkeypatch):
    """In bfloat16 training too. Recomputed layers also route again; in float32 as in the forward pass."""
    products, backward = Products(), torch.Tensor.backward

    def spy(loss: torch.Tensor) -> None:
        assert not torch.is_autocast_enabled("cpu")
        with products:
            backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", spy)
    options = dict(model={"n_routed_experts": 12}, gradient_checkpointing=recomputed, micro_tokens=ROWS * TIME // 2)
    make(dtype="bf16", max_steps=1, **options).run()
    # A product for the gradient of the weight and one for that of the tokens, of three matrices each, in two
    # micro-batches, in two MoE layers and the MTP layer; the forward pass has one.
    assert len(products.types) == 3 * (3 if recomputed else 2) * 2 * 3
    assert set(products.types) == {torch.float32}


def test_float16_is_refused(make):
    with pytest.raises(UserError, match=r"--dtype fp16: one of auto, bf16, fp32 .float16 is not supported"):
        make(dtype="fp16")


def test_a_run_says_at_its_start_which_kernels_compute(make, capsys):
    trainer = make("run", max_steps=1, dtype="fp32")
    trainer.run()
    kernels = kernel_report(trainer.model.config, torch.float32, torch.device("cpu"), trainer.settings.row_tokens)
    assert f"\nkernels    {kernels}\n" in capsys.readouterr().out


def test_a_schedule_that_the_loss_does_not_name_is_refused(make, monkeypatch):
    """Misspelt, it would change nothing and say nothing."""
    monkeypatch.setattr(NextTokenLoss, "schedules", ("mtp_wieght", "balance_weight", "bias_speed"))
    with pytest.raises(UserError, match="NextTokenLoss has no schedule named mtp_weight"):
        make()
