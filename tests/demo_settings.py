"""Settings of a stage that does not exist, as its command line and a recipe give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cli import parse
from training.settings import NextTokenSettings


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
