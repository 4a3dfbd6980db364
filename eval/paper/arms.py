"""The arms of the comparisons: `configs/paper/*.yaml`, each a few changes of `base.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, require
from LMConfig import LMConfig
from model.costs import dense_twin
from training.settings import model_config

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
BASE = "base"


@dataclass(frozen=True)
class Arm:
    """What pretrain.py is given.

    Attributes: about: the comment at the head of its file; settings: of pretrain.py; equal_time_with: an arm that takes
    more time for a token, or less: this one trains for the time that it takes.
    """

    name: str
    about: str
    settings: dict[str, Any]
    equal_time_with: str = ""


def read_arms(size: str = "", folder: Path = FOLDER) -> dict[str, Arm]:
    """Return all arms by name. size: a YAML file of changes of the base, for larger models; the arms change that."""
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    require(BASE in files, f"{folder}: no {BASE}.yaml; restore the folder")
    base = read_settings(files[BASE])
    if size:
        base = merged(base, read_settings(Path(size)))
    arms = {}
    for name, path in files.items():
        changes = {} if name == BASE else read_settings(path)
        other, dense = changes.pop("equal_time_with", ""), changes.pop("dense_twin", False)
        require(not other or other in files, f"{path}: equal_time_with names {other!r}, which is no arm of {folder}")
        settings = merged(base, changes)
        if dense:
            settings["model"] = _dense(settings["model"])
        about = path.read_text(encoding="utf8").partition("\n")[0].removeprefix("# ")
        arms[name] = Arm(name, about, settings, other)
    return arms


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes, also of single fields of `model` and `optim`; "*4" and "/4" change a number."""
    result = dict(base)
    for name, value in changes.items():
        old = base.get(name)
        if name in ("model", "optim") and isinstance(old, dict):
            value = merged(old, value)
        elif isinstance(value, str) and value[:1] in ("*", "/") and value[1:].isdigit():
            if not isinstance(old, int):
                raise UserError(f"{name}: {value!r} is relative, but the base names no number")
            value = old * int(value[1:]) if value[0] == "*" else old // int(value[1:])
        result[name] = value
    return result


def _dense(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the model section of the dense twin: all fields that it sets otherwise than the preset."""
    twin, plain = asdict(dense_twin(model_config(choice))), asdict(LMConfig.preset(choice["preset"]))
    changes = {f.name: twin[f.name] for f in fields(LMConfig) if twin[f.name] != plain[f.name]}
    return {"preset": choice["preset"], **changes}


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings. Raises `UserError` for another file."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    require(isinstance(read, dict), f"{path}: not a YAML file of settings")
    return read
