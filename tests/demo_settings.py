"""Settings of the stages, and of one that does not exist, as their command line and a recipe give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from cli import parse
from training.settings import NextTokenSettings

STAGES = {
    "pretrain": "PretrainSettings", "full_sft": "SFTSettings", "lora_sft": "LoraSFTSettings",
    "dpo_train": "DPOSettings", "grpo_train": "GRPOSettings", "distill": "DistillSettings",
}  # fmt: skip


def settings_of(script: str) -> type:
    """Those of a script, which is imported where it is needed: lora_sft.py with peft, which takes seconds."""
    return getattr(import_module(script), STAGES[script])


@dataclass(kw_only=True)
class DemoSettings(NextTokenSettings):
    """Settings of a stage.

    Args:
        model: fields of the model.
    """

    model: dict[str, Any] = field(default_factory=dict)


def read(*arguments: object) -> DemoSettings:
    return parse(DemoSettings, "", ["--out", "o", *map(str, arguments)])


def write_yaml(folder: Path, **values: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf8")
    return path
