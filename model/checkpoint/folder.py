"""Hugging Face checkpoint folders in and out: the one place that knows both namings."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from errors import DamagedCheckpoint, waiting
from LMConfig import TOKENS, LMConfig, write_json
from model.checkpoint.weight_files import MTP, WEIGHTS, WeightFiles, usual_mode
from model.costs import count

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek

CARD = "README.md"  # the model card, which a person may edit
STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
TIED = ("lm_head.weight", "model.embed_tokens.weight")  # one weight where config.tie_word_embeddings
MOST_TIMES = 4  # as many weights as the files hold, a network may have before it is built and compared


def released_name(name: str, config: LMConfig) -> str:
    """The released name of one of our weights: MTP layers are counted on from the main ones."""
    return re.sub(r"^mtp\.(\d+)\.", lambda m: f"model.layers.{config.num_hidden_layers + int(m[1])}.", name)


def single_experts(name: str, stack: Tensor, first: int = 0) -> dict[str, Tensor]:
    """A stack of experts, (E, ...) as a weight `name` that `STACKED` matches, as views under the released names.

    first: the number of its first expert.
    """
    prefix, kind = STACKED.fullmatch(name).groups()
    out: dict[str, Tensor] = {}
    for expert, matrix in enumerate(stack, first):
        if kind == "down_proj":
            out[f"{prefix}.{expert}.down_proj.weight"] = matrix
        else:
            out[f"{prefix}.{expert}.gate_proj.weight"], out[f"{prefix}.{expert}.up_proj.weight"] = matrix.chunk(2)
    return out


def released_views(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Our state dict under the released names, as views of the same memory: reading fills them, writing copies them."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = released_name(name, config)
        out.update(single_experts(name, tensor) if STACKED.match(name) else {name: tensor})
    return out


def mtp_copies(config: LMConfig) -> dict[str, str]:
    """The weights that the released V3 repeats in its MTP layers, and what they repeat: embedding and head."""
    out: dict[str, str] = {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        out[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        out[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return out


def to_hugging_face(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """A copy of our state dict under the released names, with what the released V3 repeats for its MTP layers.

    `lm_head.weight` is there when it is tied too: vLLM never ties the head of a DeepSeek-V3.
    """
    out = released_views(state, config)
    out.update({name: state[original] for name, original in mtp_copies(config).items()})
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


@torch.no_grad()
def fill(model: MiniDeepSeek, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy named tensors into the model, each straight into its place: single experts as released, or stacked ones.

    Embedding and head of a tied model are one place, which either of them fills; both must agree. On the meta device
    all that is only checked, but for the last.

    Raises:
        DamagedCheckpoint: a weight is missing, superfluous, or of another shape than in the model.
    """
    config, state = model.config, model.state_dict()
    places = released_views(state, config)
    stacks = {released_name(name, config): tensor for name, tensor in state.items() if STACKED.match(name)}
    missing, repeated = dict.fromkeys(places), mtp_copies(config)
    tied = set(TIED if config.tie_word_embeddings else ())
    for name, tensor in tensors:
        place = places.get(name, stacks.get(name))
        if place is None:
            if name in repeated or name.endswith(".rotary_emb.inv_freq"):
                continue
            raise DamagedCheckpoint(f"weight {name} has no place in the network that config.json describes")
        if place.shape != tensor.shape:
            raise DamagedCheckpoint(
                f"weight {name} has shape {tuple(tensor.shape)}, config.json says {tuple(place.shape)}"
            )
        first = name not in tied or name in missing
        if not (first or place.is_meta) and not torch.allclose(place, tensor.to(place), rtol=0, atol=0, equal_nan=True):
            raise DamagedCheckpoint(
                f"{' and '.join(TIED)} differ, though config.json ties them; set its tie_word_embeddings to false"
            )
        place.copy_(tensor)
        for filled in single_experts(name, place) if name in stacks else tied if name in tied else [name]:
            missing.pop(filled, None)
    if missing:
        raise DamagedCheckpoint(
            f"weight {next(iter(missing))} is missing; use another checkpoint, or correct config.json"
        )


def save_pretrained(model: MiniDeepSeek, folder: str | Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and, with MTP, mtp.safetensors.

    Each is complete or not there. MTP's weights have a file of their own, which vLLM and SGLang find by its ending,
    whereas transformers would report each of them as unexpected.
    """
    save_state(model.state_dict(), model.config, Path(folder))


def save_state(state: dict[str, Tensor], config: LMConfig, folder: Path) -> None:
    """The same from a state dict of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to("cpu") for name, tensor in state.items()}
    tensors = to_hugging_face(state, config)
    mtp = {name: tensors.pop(name) for name in list(tensors) if is_mtp(name, config)}
    write_weights({WEIGHTS: tensors} | ({MTP: mtp} if mtp else {}), folder)
    if not mtp:
        (folder / MTP).unlink(missing_ok=True)
    write_config(config, folder)


def is_mtp(name: str, config: LMConfig) -> bool:
    """Return whether a weight, under its released name, is in the file of the MTP layers."""
    return _layer(name) >= config.num_hidden_layers


def write_weights(files: dict[str, dict[str, Tensor]], folder: Path) -> None:
    """Write tensors under their released names, by the names of files; each is there when all are on the disk."""
    for name, part in files.items():
        with usual_mode(folder / f".{name}.partial") as path:
            save_file(part, path, metadata={"format": "pt"})
        with open(folder / f".{name}.partial", "rb") as file:
            os.fsync(file.fileno())
    for name in files:
        os.replace(folder / f".{name}.partial", folder / name)


def write_config(config: LMConfig, folder: Path) -> None:
    """Write config.json and generation_config.json."""
    config.save_pretrained(folder)
    generation = {name: getattr(config, name) for name in TOKENS if getattr(config, name) is not None}
    write_json({**generation, "do_sample": False}, folder / "generation_config.json")


def load_pretrained(
    cls: type[MiniDeepSeek],
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    adapt: Callable[[LMConfig], LMConfig] = lambda config: config,
) -> MiniDeepSeek:
    """Open a checkpoint folder. Absent MTP weights mean no MTP, with a notice; any other difference is an error.

    Weights go straight from the files into the float32 network, FP8 ones dequantised: memory holds one copy of them.

    Args:
        cls: the class of the model; dtype: of the parameters; the router biases stay float32 whatever it is.
        adapt: given the configuration of the folder, returns the one to build; the shapes must be the same.
    Raises:
        UserError, DamagedCheckpoint: no such folder, not a DeepSeek-V3, or weights that config.json does not describe.
    """
    config, files = describe(Path(folder), adapt)
    model = cls(config)
    try:
        with waiting(f"reading {folder}"):
            fill(model, files)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    return model.to(device=device, dtype=dtype)


def describe(folder: Path, adapt: Callable[[LMConfig], LMConfig]) -> tuple[LMConfig, WeightFiles]:
    """Return the configuration of the network to build for a folder, and its files. See `load_pretrained`."""
    config = LMConfig.from_pretrained(folder)
    files = WeightFiles(folder)
    if config.num_nextn_predict_layers and not any(_layer(name) >= config.num_hidden_layers for name in files.names):
        print(
            f"notice: {folder} holds no MTP weights, though its config.json says "
            f"num_nextn_predict_layers = {config.num_nextn_predict_layers}: opened without MTP",
            file=sys.stderr,
        )
        config.num_nextn_predict_layers = 0
    costs = count(config)
    size = costs.total + costs.mtp
    if size > MOST_TIMES * files.numbers:  # before memory is asked for; of a smaller difference `fill` says more
        raise DamagedCheckpoint(
            f"{folder}: config.json describes a network of {size:,} weights, the files hold {files.numbers:,}; "
            "restore config.json, or use another checkpoint"
        )
    return adapt(config), files


def _layer(name: str) -> int:
    """Return the layer of a weight under its released name; -1 for embedding, norm and head."""
    match = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(match[1]) if match else -1
