"""Checkpoints in DeepSeek's FP8: e4m3 numbers and a scale for each block of 128 x 128 (DeepSeek-V3, section 3.3)."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import model.checkpoint.fp8
from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek

# Sides below, at and above the block of 128, of which none but 128 is a multiple of it.
SIZES = dict(hidden_size=160, intermediate_size=300, moe_intermediate_size=136, kv_lora_rank=128, q_lora_rank=140)
QUANTISED = ("_proj.weight", "_proj_with_mqa.weight")


def quantise(weight: Tensor, size: int = 128) -> tuple[Tensor, Tensor]:
    """By the published rule: a block's scale maps its largest number to 448, the largest of e4m3."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // size) * size, -(-columns // size) * size)
    padded[:rows, :columns] = weight
    blocks = padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    numbers = (blocks / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scales


def worth(numbers: Tensor, scales: Tensor, size: int = 128) -> Tensor:
    """Number by number: what the quantised matrix stands for."""
    row, column = torch.arange(numbers.shape[0]) // size, torch.arange(numbers.shape[1]) // size
    return numbers.float() * scales[row[:, None], column]


@pytest.fixture
def published(tiny_model, tmp_path) -> Path:
    """A folder as DeepSeek publishes it: FP8 matrices, the rest bf16, router biases float32, MTP layer, two shards."""
    tiny_model(num_nextn_predict_layers=1, **SIZES).save_pretrained(tmp_path / "fp8")
    rewrite(tmp_path / "fp8", published_tensors)
    return tmp_path / "fp8"


def published_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(QUANTISED) and "eh_proj" not in name:
            out[name], out[f"{name}_scale_inv"] = quantise(tensor)
        else:
            out[name] = tensor if name.endswith("correction_bias") else tensor.bfloat16()
    return out


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: object) -> None:
    """Put `change` of all tensors in two shards, half of the FP8 matrices apart from their scales."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
        file.unlink()
    tensors = change(tensors)
    shards: list[dict[str, Tensor]] = [{}, {}]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[number % 2][name] = tensor
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    names = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    data = {"quantization_config": {**quantization, "activation_scheme": "dynamic"}, **config}
    data = {**json.loads((folder / "config.json").read_text()), **data}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_each_number_is_its_e4m3_number_times_its_blocks_scale(published):
    model, tensors = MiniDeepSeek.from_pretrained(published), tensors_of(published)

    def expected(name: str) -> Tensor:
        return worth(tensors[name], tensors[f"{name}_scale_inv"])

    layers = model.model.layers
    assert torch.equal(layers[0].mlp.gate_proj.weight, expected("model.layers.0.mlp.gate_proj.weight"))
    assert torch.equal(layers[1].self_attn.kv_b_proj.weight, expected("model.layers.1.self_attn.kv_b_proj.weight"))
    gate, up = layers[2].mlp.experts.gate_up_proj[5].chunk(2)
    assert torch.equal(gate, expected("model.layers.2.mlp.experts.5.gate_proj.weight"))
    assert torch.equal(up, expected("model.layers.2.mlp.experts.5.up_proj.weight"))
    assert torch.equal(model.mtp[0].self_attn.o_proj.weight, expected("model.layers.3.self_attn.o_proj.weight"))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].float())
    assert torch.equal(model.mtp[0].eh_proj.weight, tensors["model.layers.3.eh_proj.weight"].float())


@torch.no_grad()
def test_transformers_dequantises_to_the_same_weights_and_logits(tiny_model, tmp_path, transformers):
    # It derives the blocks from the number of scales, so it reads whole blocks only; and it computes in bf16.
    whole = dict(hidden_size=256, intermediate_size=384, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=128)
    heads = dict(qk_nope_head_dim=128, qk_rope_head_dim=128, v_head_dim=32, num_nextn_predict_layers=0)
    tiny_model(**whole, **heads).save_pretrained(tmp_path)
    rewrite(tmp_path, published_tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float().eval()
    ours = MiniDeepSeek.from_pretrained(tmp_path, dtype=torch.bfloat16).float()
    state = ours.state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, state[name]), name
    ids = torch.randint(0, 61, (2, 30))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_other_blocks_and_stacked_experts_are_read(published):
    single = MiniDeepSeek.from_pretrained(published).state_dict()

    def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As transformers keeps them in memory, in blocks of 32 x 64."""
        prefix = "model.layers.1.mlp.experts"
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]
        for kind in ("gate_up_proj", "down_proj"):
            experts = single[f"{prefix}.{kind}"]
            scales = torch.rand(8, -(-experts.shape[1] // 128), -(-experts.shape[2] // 128)) + 0.5
            tensors[f"{prefix}.{kind}"] = torch.randn(experts.shape).to(torch.float8_e4m3fn)
            tensors[f"{prefix}.{kind}_scale_inv"] = scales
        return tensors

    rewrite(published, stacked)
    tensors, model = tensors_of(published), MiniDeepSeek.from_pretrained(published)
    for kind in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{kind}"
        for expert in range(8):
            expected = worth(tensors[name][expert], tensors[f"{name}_scale_inv"][expert])
            assert torch.equal(model.state_dict()[name][expert], expected)


def test_scales_that_are_powers_of_two_in_a_byte_are_read(published):
    def bytes_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        power = {n: t.log2().ceil().exp2() for n, t in tensors.items() if n.endswith("_scale_inv")}
        return {**tensors, **{name: scales.to(torch.float8_e8m0fnu) for name, scales in power.items()}}

    rewrite(published, bytes_of)
    tensors, model = tensors_of(published), MiniDeepSeek.from_pretrained(published)
    name = "model.layers.0.mlp.down_proj.weight"
    assert tensors[f"{name}_scale_inv"].dtype == torch.float8_e8m0fnu
    assert torch.equal(model.state_dict()[name], worth(tensors[name], tensors[f"{name}_scale_inv"].float()))


def test_no_more_than_two_matrices_are_held_besides_the_model(published, monkeypatch):
    made: list[weakref.ref] = []
    original = model.checkpoint.fp8.dequantise

    def counted(*arguments):
        assert sum(reference() is not None for reference in made) <= 1
        matrix = original(*arguments)
        made.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(model.checkpoint.fp8, "dequantise", counted)
    MiniDeepSeek.from_pretrained(published)
    assert len(made) > 80


MATRIX = "model.layers.1.self_attn.o_proj.weight"


SCALES = f"{MATRIX}_scale_inv"
# What is done to the tensors, and what is said of them.
DAMAGE = {
    "no scales": (lambda t: t.pop(SCALES), f"weight {MATRIX} is FP8 without its scales {SCALES}"),
    "no matrix": (lambda t: t.pop(MATRIX), f"scales {SCALES} are there without their FP8 matrix"),
    "NaN scale": (lambda t: t[SCALES][1, 0].fill_(torch.nan), f"scales {SCALES} hold NaN"),
    "infinite scale": (lambda t: t[SCALES][0, 0].fill_(torch.inf), f"scales {SCALES} hold NaN, infinity"),
    "negative scale": (lambda t: t[SCALES][0, 0].neg_(), f"scales {SCALES} hold NaN, infinity or numbers below 0"),
    "other blocks": (
        lambda t: t.update({SCALES: torch.ones(1, 1)}),
        f"scales {SCALES} have shape (1, 1), but (160, 40) in blocks of (128, 128)",
    ),
    "one scale": (lambda t: t.update({SCALES: torch.tensor(1.0)}), f"scales {SCALES} have shape ()"),
    "NaN": (lambda t: t[MATRIX].view(torch.uint8)[7, 5].fill_(0x7F), f"weight {MATRIX} holds NaN or infinity"),
    "bf16": (
        lambda t: t.update({MATRIX: t[MATRIX].bfloat16()}),
        f"scales {SCALES} are there without their FP8 matrix",
    ),
    "bytes": (
        lambda t: t.update({MATRIX: t[MATRIX].view(torch.int8)}) or t.pop(SCALES),
        f"weight {MATRIX} is of torch.int8; only floating point is read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_scales_are_named_in_one_line(damage, published):
    change, said = DAMAGE[damage]

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors)
        return tensors

    rewrite(published, changed)
    with pytest.raises(DamagedCheckpoint) as caught:
        MiniDeepSeek.from_pretrained(published)
    message = str(caught.value)
    assert message.startswith(str(published)) and said in message and "\n" not in message


def test_fp8_without_a_word_of_it_in_the_config_is_not_guessed(published):
    rewrite(published, dict, quantization_config=None)
    with pytest.raises(DamagedCheckpoint, match=r"config\.json: no quantization_config, though model"):
        MiniDeepSeek.from_pretrained(published)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": None},
        {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": "128"},
        "fp8",
    ],
)
def test_another_quantisation_is_refused_in_one_line(quantization, published):
    rewrite(published, dict, quantization_config=quantization)
    with pytest.raises(UserError) as caught:
        MiniDeepSeek.from_pretrained(published)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{published / 'config.json'}: quantization_config has quant_method")
