"""Low-rank adapters of a frozen model through peft: added, saved in peft's layout, merged into the weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import DamagedCheckpoint, UserError, naming
from model import MiniDeepSeek
from model.experts import NO_CORRECTIONS, Experts, LowRank
from model.packed import quiet_torchao
from text.tokenizer import Tokenizer
from training.dropout import Dropout
from training.stage import open_checkpoint

with quiet_torchao():
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners import lora
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Short names of what can be adapted: matrices in every main layer, by name. The MTP layers stay as they are.
MATRICES = {
    "attention": r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "ffn": r"mlp\.(shared_experts\.)?(gate|up|down)_proj",
}
STACKED = ("gate_up_proj", "down_proj")
TARGETS = (*MATRICES, "experts", "all")


@dataclass
class LoraSettings:
    """Low-rank adapters (LoRA, Hu et al. 2021): W + alpha / r * B A, of which A and B are trained.

    Args:
        targets: attention, ffn (dense layers and shared experts), experts (routed ones) or all, separated by commas.
        r: rank. alpha: scale.
        dropout: of what A reads; the routed experts have none.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023).
        dora: train magnitude and direction apart (DoRA, Liu et al. 2024); not for experts.
        plus_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024).
    """

    targets: str = "attention,ffn"
    r: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    rslora: bool = False
    dora: bool = False
    plus_ratio: float = 1.0

    def __post_init__(self) -> None:
        names = self.chosen
        if not names or (strange := names - set(TARGETS)):
            what = f"no target {min(strange)!r}" if names else "nothing chosen"
            raise UserError(f"--lora.targets {self.targets}: {what}; choose from {', '.join(TARGETS)}")
        if self.r < 1 or self.alpha <= 0 or self.plus_ratio <= 0:
            raise UserError("--lora.r, --lora.alpha and --lora.plus_ratio must be above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout {self.dropout}: must be at least 0 and below 1")
        if self.dora and self.adapts_experts:
            raise UserError("--lora.dora: not for stacked experts; choose --lora.targets attention,ffn")

    @property
    def chosen(self) -> set[str]:
        return {name.strip() for name in self.targets.split(",") if name.strip()}

    @property
    def adapts_experts(self) -> bool:
        return bool(self.chosen & {"experts", "all"})

    def peft_config(self, model: MiniDeepSeek, base: str) -> LoraConfig:
        """The same for peft. base: the name of the model that the adapter's folder gives."""
        kinds = [pattern for kind, pattern in MATRICES.items() if self.chosen & {kind, "all"}]
        moe = [f"model.layers.{place}.mlp.experts" for place, layer in enumerate(model.model.layers) if layer.is_moe]
        return LoraConfig(
            base_model_name_or_path=base,
            r=self.r,
            lora_alpha=self.alpha,
            # peft refuses any with stacked experts, even where others would have it; `Adapter.add` puts it in place.
            lora_dropout=0.0 if self.adapts_experts else self.dropout,
            target_modules=rf"model\.layers\.\d+\.({'|'.join(kinds)})" if kinds else [],
            target_parameters=[f"{of}.{name}" for of in moe for name in STACKED] if self.adapts_experts else None,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )


class ExpertsLora(ParamWrapper):
    """peft's wrapper of stacked experts, which would add B A to every expert's matrix in every step.

    Here an expert's rows go through its own A and B: no gradient of a whole matrix, and no sum rounded to bfloat16.
    """

    def forward(
        self,
        x_ND: Tensor,
        weights_NK: Tensor,
        indices_NK: Tensor,
        corrections: Mapping[str, LowRank] = NO_CORRECTIONS,
    ) -> Tensor:
        """As `model.experts.Experts`, which it wraps, perhaps around another wrapper."""
        if not self.disable_adapters and not self.merged:
            (name,) = self.active_adapters
            a = self.lora_A[name].weight.unflatten(0, (self.num_experts, -1))
            b = self.lora_B[name].weight.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1).contiguous()
            corrections = {**corrections, self.parameter_name: LowRank(a, b, self.scaling[name])}
        return self.base_layer(x_ND, weights_NK, indices_NK, corrections)


class Adapter:
    """An adapter in its place: `model` is the model with it, whose other weights are frozen. What checkpoints hold."""

    def __init__(self, model: MiniDeepSeek, config: LoraConfig) -> None:
        """Raises `UserError` when the configuration names what the model does not have."""
        self.model, self.config = model, config
        self.base, name, config.base_model_name_or_path = fingerprint(model), config.base_model_name_or_path, None
        try:
            self.peft: PeftModel = get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"the adapter does not fit the model ({error}); choose other --lora.targets") from None
        config.base_model_name_or_path = name  # peft has overwritten it with what a transformers model knows
        for module in model.modules():
            if isinstance(module, ParamWrapper) and isinstance(module.get_base_layer(), Experts):
                module.__class__ = ExpertsLora
            elif isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False  # autocast chooses the type; a float32 copy would cost memory

    @classmethod
    def add(cls, model: MiniDeepSeek, settings: LoraSettings, base: str) -> Adapter:
        """A fresh adapter: B is 0, so the model computes what it did."""
        adapter = cls(model, settings.peft_config(model, base))
        for module in model.modules():
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and settings.dropout:
                module.lora_dropout.update({name: Dropout(settings.dropout) for name in module.lora_dropout})
        return adapter

    @classmethod
    def open(cls, model: MiniDeepSeek, folder: Path) -> Adapter:
        """The adapter of a folder, ours or one that peft wrote, on its base model."""
        adapter = cls(model, read_config(folder))
        if adapter._put(folder) != adapter.base:
            print(f"notice: {folder} was trained on other weights than these; its answers will differ", file=sys.stderr)
        return adapter

    @property
    def parameters(self) -> int:
        """How many are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        """adapter_model.safetensors and adapter_config.json, as peft names and reads them."""
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt", "base": self.base})
        self._saved_config().save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Raises `UserError` for an adapter of another shape or base, `DamagedCheckpoint` for one cut short."""
        if self._put(folder) != self.base:
            raise UserError(f"{folder}: was trained on other weights; give the --ckpt that the run began with")

    def _put(self, folder: Path) -> str:
        """Put the adapter of a folder in place. Returns the fingerprint of its base, or ours where it tells none."""
        path = folder / WEIGHTS
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                base = (file.metadata() or {}).get("base", self.base)
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{path}: damaged or cut short ({error}); use an older one") from None
        own = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        if wrong := sorted(
            name
            for name in {*own, *tensors}
            if getattr(own.get(name), "shape", 0) != getattr(tensors.get(name), "shape", 1)
        ):
            raise UserError(f"{folder}: its {wrong[0]} does not fit the model; give the --ckpt that it was trained on")
        set_peft_model_state_dict(self.peft, tensors)
        return base

    def _saved_config(self) -> LoraConfig:
        """The configuration that also fits the model as transformers builds it.

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


def open_adapted(ckpt: str, folder: str) -> tuple[MiniDeepSeek, Tokenizer]:
    """The fp32 model of a checkpoint folder with the adapter of `folder` in its weights, and its tokenizer."""
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
        shutil.rmtree(out, ignore_errors=True)
        temporary.replace(out)
    print(f"merged: {out}", flush=True)


def read_config(folder: Path) -> LoraConfig:
    """adapter_config.json, ready for our model. Raises `UserError` when there is none, or it is no LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} in it; give a folder that lora_sft.py wrote, such as OUT/final")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: not of a LoRA; only those can be used")
    config.task_type, config.inference_mode = None, False  # peft's class for it expects a transformers model
    return config


def fingerprint(model: MiniDeepSeek) -> str:
    """The same for the same weights in the same type, the MTP layers aside."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("mtp."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
