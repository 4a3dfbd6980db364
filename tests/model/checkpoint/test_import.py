"""`python -m model.hf import`: a deepseek_v3 folder in any of the usual forms becomes one of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import MiniDeepSeek
from model.checkpoint.hf_import import OWN_TOKENS
from model.hf import main
from text.tokenizer import SPECIAL_TOKENS

FORMS = {
    "one file": ({}, {}),
    "shards, tied": ({"tie_word_embeddings": True}, {"max_shard_size": "30KB"}),
    "stacked experts in shards": ({}, {"save_original_format": False, "max_shard_size": "30KB"}),
    "bf16": ({"dtype": torch.bfloat16}, {"max_shard_size": "30KB"}),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_folder_of_transformers_becomes_ours(form, their_model, run, tmp_path, transformers):
    changes, options = FORMS[form]
    source, target = tmp_path / "theirs", tmp_path / "ours"
    dtype = changes.get("dtype", torch.float32)
    changes = {name: value for name, value in changes.items() if name != "dtype"}
    model = their_model(num_nextn_predict_layers=1, **changes).to(dtype)
    model.save_pretrained(source, **options)
    names = {name for file in source.glob("*.safetensors") for name in load_file(file)}
    assert len(list(source.glob("*.safetensors"))) > 1 or "max_shard_size" not in options
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is ("save_original_format" in options)

    done = run(main, "import", "--from", source, "--to", target)
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in float32, 0 MTP layers"
    assert done.code == 0 and done.out == f"{target}: {parameters}\n"

    tensors = load_file(target / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in tensors  # single, as released
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    ids = torch.randint(0, 61, (2, 30))
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(MiniDeepSeek.from_pretrained(target)(ids).logits, expected, atol=1e-5, rtol=1e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(target)
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_mtp_layers_come_along(tiny_model, run, tmp_path):
    model = tiny_model(num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path / "theirs")
    done = run(main, "import", "--from", tmp_path / "theirs", "--to", tmp_path / "ours")
    assert done.code == 0 and "2 MTP layers" in done.out
    state = MiniDeepSeek.from_pretrained(tmp_path / "ours").state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_quantised_folder_becomes_a_plain_one(tiny_model, run, tmp_path):
    source, target = tmp_path / "theirs", tmp_path / "ours"
    tiny_model().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.25)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))

    assert run(main, "import", "--from", source, "--to", target).code == 0
    plain = load_file(target / "model.safetensors")
    assert torch.equal(plain[name], tensors[name].float() / 4) and f"{name}_scale_inv" not in plain
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


def test_the_tokenizer_comes_along(pretrained, run, tmp_path):
    target = tmp_path / "ours"
    done = run(main, "import", "--from", pretrained / "final", "--to", target)
    assert done.code == 0 and done.err == ""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (pretrained / "final" / name).read_bytes()
    assert not (target / "training").exists()


def larger(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf8"))
    content["model"]["vocab"]["xyz"] = 600
    path.write_text(json.dumps(content), encoding="utf8")


def other_marks(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf8").replace("<|user|>", "<｜User｜>"), encoding="utf8")


NOTICES = {
    Path.unlink: "no tokenizer.json: the weights, generate() on token ids and transformers work",
    other_marks: "tokenizer.json is not one of train_tokenizer.py (<|user|> is not token 5, ...): the weights",
    (lambda path: path.write_text("[]")): "tokenizer.json cannot be read: the weights",
    larger: "tokenizer.json has 601 tokens, the model's vocabulary 600: the weights",
}


@pytest.mark.parametrize(("change", "notice"), NOTICES.items(), ids=["none", "other marks", "broken", "larger"])
def test_another_tokenizer_is_carried_over_with_a_notice(change, notice, checkpoint, run, tmp_path):
    source, target = checkpoint, tmp_path / "ours"
    change(source / "tokenizer.json")
    done = run(main, "import", "--from", source, "--to", target)
    assert done.code == 0 and done.err.count("\n") == 1
    assert done.err.startswith(f"notice: {source}: {notice}")
    assert done.err.endswith("this project's stages and chat do not\n") or "copy the one" in done.err
    assert (target / "tokenizer.json").exists() is (source / "tokenizer.json").exists()


def test_the_notice_knows_how_our_tokenizers_begin():
    assert SPECIAL_TOKENS[: len(OWN_TOKENS)] == OWN_TOKENS


@pytest.mark.parametrize(("damaged", "code"), [("model.safetensors", 3), ("config.json", 2)])
def test_what_cannot_be_read_leaves_nothing_behind(damaged, code, tiny_model, run, tmp_path):
    source, target = tmp_path / "theirs", tmp_path / "ours"
    tiny_model().save_pretrained(source)
    (source / damaged).write_bytes((source / damaged).read_bytes()[:-100])
    done = run(main, "import", "--from", source, "--to", target)
    assert done.code == code and done.err.startswith(f"error: {source}") and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_a_full_disk_leaves_nothing_behind(tiny_model, run, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "theirs")

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(shutil, "copyfile", full)
    done = run(main, "import", "--from", tmp_path / "theirs", "--to", tmp_path / "ours")
    assert done.code == 2 and "No space left" in done.err
    assert list(tmp_path.iterdir()) == [tmp_path / "theirs"]


def test_a_folder_that_is_there_is_not_overwritten(tiny_model, run, tmp_path):
    tiny_model().save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    done = run(main, "import", "--from", tmp_path / "theirs", "--to", tmp_path / "ours")
    assert (done.code, done.err) == (2, f"error: {tmp_path / 'ours'}: is there already; choose a new folder\n")
