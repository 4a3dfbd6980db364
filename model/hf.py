"""Hugging Face checkpoint folders in and out: the one place that knows both namings."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import DamagedCheckpoint, UserError
from LMConfig import LMConfig
from model.transformer import MiniDeepSeek

WEIGHTS = "model.safetensors"
STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
SINGLE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def to_hugging_face(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Our state dict under the released names: single experts, MTP layers counted on from the main ones."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = re.sub(r"^mtp\.(\d+)\.", lambda m: f"model.layers.{config.num_hidden_layers + int(m[1])}.", name)
        if stacked := STACKED.match(name):
            prefix, kind = stacked.groups()
            for expert, matrix in enumerate(tensor):
                if kind == "down_proj":
                    out[f"{prefix}.{expert}.down_proj.weight"] = matrix
                else:
                    gate, up = matrix.chunk(2)
                    out[f"{prefix}.{expert}.gate_proj.weight"] = gate
                    out[f"{prefix}.{expert}.up_proj.weight"] = up
        else:
            out[name] = tensor
    if config.tie_word_embeddings:
        out.pop("lm_head.weight", None)
    for depth in range(config.num_nextn_predict_layers):
        # The released V3 repeats the shared embedding and head in the MTP layer, and its readers expect them there.
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        out[f"{prefix}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
        out[f"{prefix}.shared_head.head.weight"] = state["lm_head.weight"]
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


def from_hugging_face(tensors: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`; the MTP layers' copies of embedding and head are left out."""
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith((".shared_head.head.weight", ".rotary_emb.inv_freq")):
            continue
        if name.endswith(".embed_tokens.weight") and name != "model.embed_tokens.weight":
            continue
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            name = f"mtp.{int(layer[1]) - config.num_hidden_layers}.{layer[2]}"
        if single := SINGLE.match(name):
            experts.setdefault(single[1], {})[int(single[2]), single[3]] = tensor
        else:
            out[name] = tensor
    for prefix, parts in experts.items():
        count = max(index for index, _ in parts) + 1
        try:
            out[f"{prefix}.down_proj"] = torch.stack([parts[i, "down"] for i in range(count)])
            both = [torch.cat((parts[i, "gate"], parts[i, "up"])) for i in range(count)]
            out[f"{prefix}.gate_up_proj"] = torch.stack(both)
        except KeyError as missing:
            index, kind = missing.args[0]
            raise DamagedCheckpoint(f"weight {prefix}.{index}.{kind}_proj.weight is missing") from None
        except RuntimeError as error:
            raise DamagedCheckpoint(f"weights {prefix} differ in shape from expert to expert ({error})") from None
    if config.tie_word_embeddings and "model.embed_tokens.weight" in out:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


def save_pretrained(model: MiniDeepSeek, folder: str | Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, each complete or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    state = {name: tensor.to("cpu") for name, tensor in model.state_dict().items()}
    temporary = folder / f".{WEIGHTS}.partial"
    save_file(to_hugging_face(state, config), temporary, metadata={"format": "pt"})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / WEIGHTS)
    config.save_pretrained(folder)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": False}
    if config.pad_token_id is not None:
        generation["pad_token_id"] = config.pad_token_id
    partial = folder / ".generation_config.json.partial"
    partial.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf8")
    os.replace(partial, folder / "generation_config.json")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif index.is_file():
        try:
            files = sorted(
                {folder / name for name in json.loads(index.read_text(encoding="utf8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedCheckpoint(f"{index}: not a list of shards; restore the file") from None
        if strange := [file for file in files if file.parent != folder]:
            raise DamagedCheckpoint(f"{index}: names {strange[0]}, outside the checkpoint folder; restore the file")
    elif not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a checkpoint folder (it holds config.json and {WEIGHTS})")
    else:
        raise UserError(f"{folder}: no {WEIGHTS} in it; give a checkpoint folder such as OUT/final or OUT/step-N")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()  # not a dict: it cannot be iterated itself
                tensors.update({name: file.get_tensor(name) for name in names})
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{path}: damaged or cut short ({error}); use an older checkpoint") from None
    return tensors


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> MiniDeepSeek:
    """Open a checkpoint folder. Absent MTP weights mean no MTP, with a notice; any other difference is an error.

    Args:
        dtype: of the parameters; the router biases stay float32 whatever it is.
    Raises:
        UserError: no such folder, or a config that is not of a DeepSeek-V3.
        DamagedCheckpoint: weights cut short, missing, superfluous, or of another shape than config.json says.
    """
    folder = Path(folder)
    config = LMConfig.from_pretrained(folder)
    try:
        state = from_hugging_face(read_tensors(folder), config)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    if config.num_nextn_predict_layers and not any(name.startswith("mtp.") for name in state):
        print(
            f"notice: {folder} holds no MTP weights, though its config.json says "
            f"num_nextn_predict_layers = {config.num_nextn_predict_layers}: opened without MTP",
            file=sys.stderr,
        )
        config.num_nextn_predict_layers = 0
    model = MiniDeepSeek(config)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise DamagedCheckpoint(
                f"{folder}: weight {name} is missing; use another checkpoint, or correct config.json"
            )
        if state[name].shape != tensor.shape:
            raise DamagedCheckpoint(
                f"{folder}: weight {name} has shape {tuple(state[name].shape)}, config.json says {tuple(tensor.shape)}"
            )
    if extra := sorted(set(state) - set(own)):
        raise DamagedCheckpoint(f"{folder}: weight {extra[0]} has no place in the network that config.json describes")
    model.load_state_dict(state)
    return model.to(device=device, dtype=dtype)
