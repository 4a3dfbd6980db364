"""LoRA through peft: what it computes, what it leaves alone, and what transformers makes of its files."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek
from model.experts import LowRank
from training.adapters.lora import TARGETS, LoraSettings
from training.losses import NextTokenLoss
from training.optim.build import OptimSettings, build_optimizer, set_learning_rate

if TYPE_CHECKING:
    from training.adapters.adapter import Adapter

IDS = torch.randint(0, 600, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(tiny_model) -> MiniDeepSeek:
    return tiny_model(vocab_size=600)


def added(model: MiniDeepSeek, settings: LoraSettings, base: str = "base") -> Adapter:
    from training.adapters.adapter import Adapter  # peft takes seconds to import

    return Adapter.add(model, settings, base)


def opened(model: MiniDeepSeek, folder: Path) -> Adapter:
    from training.adapters.adapter import Adapter

    return Adapter.open(model, folder)


def trained(model: MiniDeepSeek, settings: LoraSettings, base: str = "base") -> Adapter:
    """An adapter whose B is no longer 0."""
    adapter = added(model, settings, base)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            if "magnitude" in name:
                parameter.mul_(1.1)
    return adapter


@pytest.mark.parametrize("targets", TARGETS)
def test_a_fresh_adapter_computes_what_its_base_does(base, targets):
    wanted = copy.deepcopy(base)(IDS).logits
    added(base, LoraSettings(targets=targets), "base")
    torch.testing.assert_close(base.eval()(IDS).logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(targets="attention"),
        LoraSettings(targets="ffn", rslora=True),
        LoraSettings(targets="experts"),
        LoraSettings(targets="all", rslora=True),
        LoraSettings(targets="attention,ffn", dora=True),
    ],
    ids=["attention", "ffn with rsLoRA", "experts", "all with rsLoRA", "DoRA"],
)
def test_the_adapter_opens_in_transformers_and_merges_into_the_same_numbers(base, settings, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base.save_pretrained(tmp_path / "base")
    wanted = base(IDS).logits.detach()
    adapter = trained(base, settings)
    base.eval()
    ours = base(IDS).logits.detach()
    assert (ours - wanted).abs().max() > 1e-2
    (tmp_path / "adapter").mkdir()
    adapter.save(tmp_path / "adapter")

    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base", experts_implementation="eager")
    if not settings.dora:  # which peft cannot put into transformers' DeepseekV3, see `Adapter._saved_config`
        reference = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        torch.testing.assert_close(reference(IDS).logits.float(), ours, rtol=1e-4, atol=2e-5)

    again = MiniDeepSeek.from_pretrained(tmp_path / "base")
    merged = opened(again, tmp_path / "adapter").merge()
    assert type(merged) is MiniDeepSeek
    torch.testing.assert_close(merged.eval()(IDS).logits, ours, rtol=1e-4, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager").eval()
    torch.testing.assert_close(reference(IDS).logits.float(), ours, rtol=1e-4, atol=2e-5)


def test_the_layout_is_that_of_peft_and_a_few_numbers(base, tmp_path):
    adapter = added(base, LoraSettings(targets="all", r=4), "out/sft/final")
    adapter.save(tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert len(modes) == 1  # who may read the one may read the other
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == adapter.parameters
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(Path.cwd() / "out/sft/final"), "CAUSAL_LM")


def test_experts_row_by_row_equal_peft_adding_the_product_to_their_matrices(base):
    trained(base, LoraSettings(targets="experts"))
    parameters = {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert parameters and all(".experts." in name for name in parameters)

    def values_and_gradients() -> list[torch.Tensor]:
        logits = base(IDS).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(parameters.values()))]

    from peft.tuners.lora.layer import ParamWrapper

    from training.adapters.experts_lora import ExpertsLora

    ours = values_and_gradients()
    for module in base.modules():
        if isinstance(module, ExpertsLora):
            module.__class__ = ParamWrapper
    for mine, theirs in zip(ours, values_and_gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_a_correction_of_stacked_experts_is_the_sum_of_the_matrices(base):
    experts = copy.deepcopy(base.model.layers[1].mlp.experts)
    count, out, features = experts.gate_up_proj.shape
    torch.manual_seed(0)
    a, b = torch.randn(count, 3, features), torch.randn(count, out, 3)
    x, weights = torch.randn(40, features), torch.rand(40, 2)
    indices = torch.randint(0, count, (40, 2))
    got = experts(x, weights, indices, {"gate_up_proj": LowRank(a, b, 0.1)})
    one = experts(x[:1], weights[:1], indices[:1], {"gate_up_proj": LowRank(a, b, 0.1)})
    with torch.no_grad():
        experts.gate_up_proj += 0.1 * b @ a
    torch.testing.assert_close(got, experts(x, weights, indices), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # a single token takes another path, which knows no corrections
        torch.testing.assert_close(one, experts(x[:1], weights[:1], indices[:1]), rtol=1e-4, atol=1e-5)


def test_short_names_choose_their_matrices_and_never_those_of_mtp(base):
    for targets, words in {"attention": "self_attn", "ffn": "_proj", "experts": "mlp.experts"}.items():
        model = copy.deepcopy(base)
        added(model, LoraSettings(targets=targets), "base")
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names and all(words in name and name.startswith("model.layers.") for name in names)
        others = {"attention": "mlp", "ffn": "self_attn", "experts": "shared"}[targets]
        assert not any(others in name for name in names)


def test_lora_plus_gives_the_rates_that_peft_gives(base):
    from peft.optimizers import create_loraplus_optimizer

    adapter = added(base, LoraSettings())
    ours = build_optimizer(base, OptimSettings(lr=1e-3, weight_decay=0.0), {"lora_B": 16.0})
    theirs = create_loraplus_optimizer(adapter.peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    set_learning_rate(ours, 1e-3)
    rates = [
        {p: group["lr"] for group in optimizer.param_groups for p in group["params"]} for optimizer in (ours, theirs)
    ]
    assert rates[0] == rates[1] and set(rates[0].values()) == {1e-3, 16e-3}


def test_dropout_is_that_of_the_settings_and_none_in_the_experts(base):
    added(base, LoraSettings(targets="all", dropout=0.25), "base")
    rates = {type(module): module.lora_dropout for module in base.modules() if hasattr(module, "lora_dropout")}
    assert {kind.__name__ for kind in rates} == {"Linear", "ExpertsLora"}
    for kind, dropout in rates.items():
        assert getattr(dropout["default"], "p", 0.0) == (0.25 if kind.__name__ == "Linear" else 0.0)


def test_a_frozen_model_keeps_less_for_its_gradients(base):
    """Neither rows for the gradients of frozen matrices nor the head's gradient: the point of freezing."""

    def kept(model: MiniDeepSeek) -> int:
        seen: dict[int, int] = {}
        own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _, _ = NextTokenLoss(mtp=False)(model, {"input_ids": IDS, "labels": IDS})
        loss.backward()
        return sum(seen.values())

    full = kept(copy.deepcopy(base))
    model = copy.deepcopy(base).requires_grad_(False)
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_(True)
    assert kept(model) < 0.7 * full
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(targets="atention"), "--lora.targets atention: no target 'atention'; choose from attention, ffn"),
        (dict(targets=""), "nothing chosen"),
        (dict(targets="all", dora=True), "--lora.dora: not for stacked experts"),
        (dict(r=0), "above 0"),
        (dict(dropout=1.0), "--lora.dropout 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        LoraSettings(**options)


def test_experts_of_a_model_without_any_are_refused(tiny_model):
    dense = tiny_model(first_k_dense_replace=2, num_hidden_layers=2, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"does not fit the model .* choose other --lora.targets"):
        added(dense, LoraSettings(targets="experts"), "base")


def saved(base: MiniDeepSeek, folder: Path, **settings) -> Path:
    folder.mkdir()
    trained(copy.deepcopy(base), LoraSettings(**settings)).save(folder)
    return folder


def test_an_adapter_of_another_model_is_refused_and_of_other_weights_noticed(base, tiny_model, tmp_path, capsys):
    folder = saved(base, tmp_path / "adapter")
    opened(copy.deepcopy(base), folder)
    assert capsys.readouterr().err == ""
    opened(tiny_model(seed=5, vocab_size=600), folder)
    assert "was trained on other weights" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not fit the model"):
        opened(tiny_model(vocab_size=600, num_hidden_layers=2), folder)


def test_damaged_adapters_are_named(base, tmp_path):
    folder = saved(base, tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for path, content, kind in (
        (weights, weights.read_bytes()[:-100], DamagedCheckpoint),
        (config, b"{", UserError),
        (config, json.dumps({"peft_type": "IA3"}).encode(), UserError),
    ):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(kind, match=str(path)):
            opened(copy.deepcopy(base), folder)
        path.write_bytes(kept)
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    with pytest.raises(UserError, match="does not fit the model"):
        opened(copy.deepcopy(base), folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"no adapter_config.json in it"):
        opened(base, folder)
