"""Checkpoint folders: what is written, what comes back, and what is said of a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek
from model.checkpoint.folder import TIED

ROOT = Path(__file__).parents[3]


@pytest.fixture
def saved(tiny_model, tmp_path) -> Path:
    """A checkpoint folder of the tiny model with two MTP layers."""
    tiny_model(num_nextn_predict_layers=2).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change_tensors(folder: Path, change, name: str = "model.safetensors") -> None:
    """Rewrite a file of weights after `change` has worked on its tensors in place."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def into_one_file(folder: Path) -> None:
    """Put all weights into model.safetensors, as older folders have them."""
    change_tensors(folder, lambda tensors: tensors.update(load_file(folder / "mtp.safetensors")))
    (folder / "mtp.safetensors").unlink()


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 2}, {"tie_word_embeddings": True}])
def test_what_is_saved_comes_back_to_the_bit(changes, tiny_model, tmp_path):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    again = MiniDeepSeek.from_pretrained(tmp_path)
    assert again.config == model.config
    state, state_again = model.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert any(name.endswith("e_score_correction_bias") and tensor.any() for name, tensor in state_again.items())
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files | ({"mtp.safetensors"} if model.mtp else set())


@pytest.mark.parametrize("left_out", [None, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_is_written_twice_and_read_from_either(left_out, tiny_model, tmp_path):
    """vLLM has no tied head of a DeepSeek-V3, and folders of transformers hold the embedding alone."""
    ours = tiny_model(tie_word_embeddings=True)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], ours.model.embed_tokens.weight)
    assert torch.equal(tensors["model.embed_tokens.weight"], ours.model.embed_tokens.weight)
    if left_out:
        change_tensors(tmp_path, lambda tensors: tensors.pop(left_out))
    model = MiniDeepSeek.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, ours.lm_head.weight)


def test_names_are_those_of_the_released_checkpoint(saved):
    main, mtp = (set(load_file(saved / file)) for file in ("model.safetensors", "mtp.safetensors"))
    for name in ("model.layers.1.mlp.experts.7.gate_proj.weight",):
        assert name in main
    # MTP layers count on from the last; each repeats the shared embedding and head.
    for name in (
        *(f"model.layers.3.{part}.weight" for part in ("enorm", "hnorm", "eh_proj", "embed_tokens")),
        *(f"model.layers.3.shared_head.{part}.weight" for part in ("norm", "head")),
        "model.layers.4.mlp.experts.0.up_proj.weight",
    ):
        assert name in mtp
    assert not [name for name in main | mtp if "mtp" in name or "gate_up" in name]
    assert all(name.startswith(("model.layers.3.", "model.layers.4.")) for name in mtp) and not main & mtp
    for name in ("model.safetensors", "mtp.safetensors"):
        with safe_open(saved / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_folder_with_all_weights_in_one_file_opens_to_the_bit_and_is_written_as_two(saved, tiny_model):
    before = {name: (saved / name).read_bytes() for name in ("model.safetensors", "mtp.safetensors")}
    into_one_file(saved)
    model, expected = MiniDeepSeek.from_pretrained(saved), tiny_model(num_nextn_predict_layers=2).state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    model.save_pretrained(saved)
    assert {name: (saved / name).read_bytes() for name in before} == before


def test_a_model_without_mtp_leaves_no_mtp_weights_of_another_behind(saved, tiny_model):
    tiny_model(num_nextn_predict_layers=0).save_pretrained(saved)
    assert not (saved / "mtp.safetensors").exists() and len(MiniDeepSeek.from_pretrained(saved).mtp) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "mtp.safetensors", "config.json", "generation_config.json"])
def test_a_save_that_fails_leaves_the_old_file(name, saved, monkeypatch):
    before = (saved / name).read_bytes()
    model, write = MiniDeepSeek.from_pretrained(saved), Path.write_text

    def on_full_disk(path, text, **options):
        """As much as fits of the one file, all of the others."""
        write(path, text[:10] if f".{name}" in f".{path.name}" else text, **options)
        if f".{name}" in f".{path.name}":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", on_full_disk)
    monkeypatch.setattr(
        "model.checkpoint.folder.save_file", lambda tensors, path, metadata: on_full_disk(Path(path), "x" * 20)
    )
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(saved)
    assert (saved / name).read_bytes() == before


def test_absent_mtp_weights_mean_no_mtp_with_a_notice(saved, tiny_model, capsys):
    (saved / "mtp.safetensors").unlink()
    model = MiniDeepSeek.from_pretrained(saved)
    notice = capsys.readouterr().err.splitlines()
    assert len(notice) == 1 and str(saved) in notice[0] and "num_nextn_predict_layers = 2" in notice[0]
    assert len(model.mtp) == 0 and model.config.num_nextn_predict_layers == 0
    ids = torch.randint(0, 61, (1, 8))
    assert torch.equal(model(ids).logits, tiny_model(num_nextn_predict_layers=2)(ids).logits)


@pytest.mark.parametrize("mtp", ["listed", "beside"])
def test_shards_listed_by_an_index_are_read(mtp, saved, tiny_model):
    if mtp == "listed":
        into_one_file(saved)
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == shard}, saved / shard)
    (saved / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    state, expected = MiniDeepSeek.from_pretrained(saved).state_dict(), tiny_model(num_nextn_predict_layers=2)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def tensors(change, name: str = "model.safetensors"):
    """Damage that `change` does to the tensors of a file in place."""
    return lambda folder: change_tensors(folder, change, name)


def config(**fields):
    """Damage to config.json."""

    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **fields}))

    return change


def index(content: object, weights: str | None = None):
    """A list of shards in the place of the weights, which move to the file `weights` or are gone."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / (weights or "gone"))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))

    return change


def truncate(folder: Path, name: str = "model.safetensors") -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1000])


def misspell(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"kv_lora_rank"', '"kv_lora_rnak"'))


def lose_embedding_and_head(folder: Path) -> None:
    config(tie_word_embeddings=True)(folder)
    change_tensors(folder, lambda t: [t.pop(name) for name in TIED])


EXPERTS = "model.layers.2.mlp.experts"
# Damage, what is said of it, and the exit code: 3 for damaged files, 2 for a mistake of the person.
DAMAGE = {
    "cut short": (truncate, "model.safetensors: damaged or cut short", 3),
    "MTP cut short": (
        lambda folder: truncate(folder, "mtp.safetensors"), "mtp.safetensors: damaged or cut short", 3,
    ),
    "no weight": (
        tensors(lambda t: t.pop("model.layers.1.self_attn.o_proj.weight")),
        "weight model.layers.1.self_attn.o_proj.weight is missing", 3,
    ),
    "no matrix of an expert": (
        tensors(lambda t: t.pop(f"{EXPERTS}.4.up_proj.weight")), f"weight {EXPERTS}.4.up_proj.weight is missing", 3,
    ),
    "another expert": (
        tensors(lambda t: t.update({f"{EXPERTS}.4.up_proj.weight": torch.zeros(15, 32)})),
        "experts.4.up_proj.weight has shape (15, 32), config.json says (16, 32)", 3,
    ),
    "another shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "weight model.norm.weight has shape (31,), config.json says (32,)", 3,
    ),
    "half of MTP": (
        tensors(lambda t: t.pop("model.layers.4.eh_proj.weight"), "mtp.safetensors"),
        "weight model.layers.4.eh_proj.weight is missing", 3,
    ),
    "too many": (
        tensors(lambda t: t.update({"model.layers.9.enorm.weight": torch.ones(32)})),
        "has no place in the network that config.json describes", 3,
    ),
    "another config": (config(hidden_size=64), "config.json says (61, 64)", 3),
    "tied, but different": (
        config(tie_word_embeddings=True),
        "lm_head.weight and model.embed_tokens.weight differ, though config.json ties them", 3,
    ),
    "tied, but none": (lose_embedding_and_head, "weight model.embed_tokens.weight is missing", 3),
    "a shard outside": (
        index({"lm_head.weight": "../other.safetensors"}, "other.safetensors"), "outside the checkpoint folder", 3,
    ),
    "no list": (index(3), "model.safetensors.index.json: not a list of shards", 3),
    "no shard": (index({"lm_head.weight": "model-1.safetensors"}), "model-1.safetensors: damaged or cut short", 3),
    "misspelt": (misspell, "no such field 'kv_lora_rnak', did you mean 'kv_lora_rank'?", 2),
    "no folder": (lambda folder: folder.rename(folder.parent / "elsewhere"), "give a checkpoint folder", 2),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no model.safetensors in it; give a checkpoint folder", 2,
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(), "config.json: not found; give a checkpoint folder", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_with_a_folder_is_named_in_one_line(damage, saved):
    change, said, code = DAMAGE[damage]
    change(saved)
    with pytest.raises(UserError) as caught:
        MiniDeepSeek.from_pretrained(saved)
    message = str(caught.value)
    assert caught.value.exit_code == code and isinstance(caught.value, DamagedCheckpoint) == (code == 3)
    assert message.startswith(str(saved)) and said in message and "\n" not in message
