"""An adapter of a frozen model through peft: added, saved in peft's layout, opened, merged."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import DamagedCheckpoint, UserError, naming, quiet_imports
from model import MiniDeepSeek
from model.checkpoint.folder import CARD
from model.checkpoint.weight_files import usual_mode
from model.experts import Experts
from text.tokenizer import Tokenizer
from training.adapters.dropout import Dropout
from training.adapters.experts_lora import ExpertsLora
from training.adapters.lora import LoraSettings
from training.startup import open_checkpoint

with quiet_imports():
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners import lora
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@runtime_checkable
class Awaited(Protocol):
    """A model whose weights are still in their files (`training.parallel.initial.Deferred`)."""

    def stored(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Yield each weight by its name, in the order of names, in pieces of its bytes."""

    def extended(self) -> AbstractContextManager[None]:
        """Give what modules draw within the numbers that they would draw beside the whole model."""


class Adapter:
    """An adapter in its place: `model` is the model with it, whose other weights are frozen. What checkpoints hold."""

    def __init__(self, model: MiniDeepSeek, config: LoraConfig) -> None:
        """Raises `UserError` when the configuration names what the model does not have."""
        self.model, self.config = model, config
        self.shards: Shards | None = None
        self.base, name, config.base_model_name_or_path = fingerprint(model), config.base_model_name_or_path, None
        try:
            self.peft: PeftModel = get_peft_model(model, config)
        except Exception as error:  # peft raises what it likes for a configuration that it cannot use
            raise UserError(f"the adapter does not fit the model ({error}); choose other --lora.targets") from None
        config.base_model_name_or_path = name  # peft has overwritten it with what a transformers model knows
        for module in model.modules():
            if isinstance(module, ParamWrapper) and isinstance(module.get_base_layer(), Experts):
                module.__class__ = ExpertsLora
            elif isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False  # autocast chooses the type; a float32 copy would cost memory

    @classmethod
    def add(cls, model: MiniDeepSeek, settings: LoraSettings, base: str) -> Adapter:
        """Return a fresh adapter: B is 0, so the model computes what it did.

        base: folder of the model, absolute in the adapter's files, where peft looks for it from any folder.
        """
        with model.extended() if isinstance(model, Awaited) else nullcontext():
            adapter = cls(model, settings.peft_config(model, os.path.abspath(base)))
        for module in model.modules():
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and settings.dropout:
                module.lora_dropout.update({name: Dropout(settings.dropout) for name in module.lora_dropout})
        return adapter

    @classmethod
    def open(cls, model: MiniDeepSeek, folder: Path) -> Adapter:
        """Return the adapter of a folder, ours or one that peft wrote, on its base model."""
        adapter = cls(model, read_config(folder))
        if adapter._put(folder) != adapter.base:
            print(f"notice: {folder} was trained on other weights than these; its answers will differ", file=sys.stderr)
        return adapter

    @property
    def parameters(self) -> int:
        """How many are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def take_shards(self, shards: Shards) -> None:
        """From here on this rank has shards of A and B; all ranks call `tensors` together."""
        self.shards = shards

    def tensors(self) -> dict[str, Tensor]:
        """A and B under peft's names."""
        state = self._state()
        if self.shards is None:
            return state
        here = {name: tensor for name, tensor in state.items() if not tensor.is_meta}  # of this rank's stages
        return self.shards.gather(here, dict.fromkeys(state, 0))

    def _state(self) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.peft, save_embedding_layers=False)

    def save(self, folder: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json, as peft names and reads them."""
        self.write(self.tensors(), folder)

    def write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write a copy of `tensors()` as `save` would."""
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        with usual_mode(folder / WEIGHTS) as path:
            save_file(tensors, path, {"format": "pt", "base": self.base})
        self._saved_config().save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Raises `UserError` for an adapter of another shape or base, `DamagedCheckpoint` for one cut short."""
        if self._put(folder) != self.base:
            raise UserError(f"{folder}: was trained on other weights; give the --ckpt that the run began with")

    def _put(self, folder: Path) -> str:
        """Put the adapter of a folder in place. Returns the fingerprint of its base, or ours where it names none."""
        path = folder / WEIGHTS
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                base = (file.metadata() or {}).get("base", self.base)
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{path}: damaged or cut short ({error}); use an older one") from None
        ours, theirs = ({name: t.shape for name, t in state.items()} for state in (self._state(), tensors))
        if wrong := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
            raise UserError(
                f"{folder}: its {wrong[0]} does not fit the model; give the --ckpt and the --lora settings of its run"
            )
        if self.shards:
            # peft leaves the name of the adapter out, and puts its own before those of the model.
            names = {
                name.replace(".default", ""): name for name, p in self.shards.named_parameters() if p.requires_grad
            }
            theirs = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
            self.shards.load({ours: theirs[name] for name, ours in names.items()})
        else:
            set_peft_model_state_dict(self.peft, tensors)
        return base

    def _saved_config(self) -> LoraConfig:
        """Return the configuration that also fits the model as transformers builds it.

        There peft takes targets named gate_proj, up_proj or down_proj for routed experts in an older form, so those
        of dense layers and shared experts are named as parameters: the same A and B. DoRA has no such form.
        """
        targets = [name for name, module in self.model.named_modules() if isinstance(module, lora.Linear)]
        as_modules = [name for name in targets if self.config.use_dora or ".mlp." not in name]
        weights = [f"{name}.weight" for name in targets if name not in as_modules]
        changes = dict(
            task_type="CAUSAL_LM",
            inference_mode=True,
            auto_mapping=None,
            lora_dropout=0.0,  # refused for parameters, and without a meaning after training
            target_modules=as_modules,
            target_parameters=[*(self.config.target_parameters or []), *weights] or None,
        )
        return LoraConfig(**{**self.config.to_dict(), **changes})

    def merge(self) -> MiniDeepSeek:
        """Add the adapter to the weights for good. Returns the model, an ordinary one again."""
        for module in self.model.modules():
            if isinstance(module, ExpertsLora):
                module.__class__ = ParamWrapper
        return self.peft.merge_and_unload()


def read_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json for our model. Raises `UserError` when there is none, or it is of no LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} in it; give a folder that lora_sft.py wrote, such as OUT/final")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises what it likes for values that it does not know
        raise UserError(f"{path}: cannot be read ({error}); restore the file") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: not of a LoRA; only those can be used")
    config.task_type, config.inference_mode = None, False  # peft's class for it expects a transformers model
    return config


def fingerprint(model: MiniDeepSeek) -> str:
    """Return the same for the same weights in the same type, the MTP layers aside; of files where they are there."""
    digest = xxhash.xxh3_128()
    whole = ((name, [tensor]) for name, tensor in sorted(model.state_dict().items()))
    for name, pieces in model.stored() if isinstance(model, Awaited) else whole:
        if not name.startswith("mtp."):
            digest.update(name.encode())
            for piece in pieces:
                digest.update(piece.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def open_adapted(ckpt: str, folder: str) -> tuple[MiniDeepSeek, Tokenizer]:
    """Open the fp32 model of a checkpoint folder with the adapter of `folder` in its weights, and its tokenizer."""
    model, tokenizer = open_checkpoint(ckpt)
    theirs = Path(folder) / "tokenizer.json"
    if theirs.is_file() and Tokenizer.from_folder(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder}: has another tokenizer than {ckpt}; give the --ckpt that it was trained on")
    return Adapter.open(model, Path(folder)).merge(), tokenizer


def save_merged(ckpt: str, folder: Path, out: Path) -> None:
    """Write the checkpoint folder `ckpt` with the adapter of `folder` in its weights: complete or not there."""
    model, tokenizer = open_adapted(ckpt, str(folder))
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with naming(out):
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save(temporary)
        if (out / CARD).is_file():
            shutil.copyfile(out / CARD, temporary / CARD)
        shutil.rmtree(out, ignore_errors=True)
        temporary.replace(out)
    print(f"merged: {out}, with the adapter of {folder}", flush=True)
