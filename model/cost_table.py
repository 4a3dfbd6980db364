"""What configurations cost, as a table.

python LMConfig.py                                              what each preset costs
python LMConfig.py --preset 26m --num_hidden_layers 6           a preset with other values, beside it
python LMConfig.py --preset 26m --dense_twin                    beside it the dense model of equal FLOPs a token
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from errors import command_line
from LMConfig import PRESETS, ConfigError, LMConfig, did_you_mean
from model.costs import count, dense_twin, human


def table(configs: dict[str, LMConfig], time: int = 512) -> str:
    """Return one line a configuration, for `python LMConfig.py`."""
    flops = f"train FLOPs/token at {time}"
    rows = [("preset", "total", "activated", "MTP adds", "cache/token", "MHA would", "ratio", flops)]
    for name, config in configs.items():
        costs = count(config, time)
        parameters = map(human, (costs.total, costs.activated, costs.mtp))
        caches = human(costs.cache_bytes, "B"), human(costs.mha_cache_bytes, "B")
        ratio = f"{costs.mha_cache_bytes / costs.cache_bytes:.1f}x"
        rows.append((name, *parameters, *caches, ratio, human(costs.flops)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """Print the size and the cost of every preset, or of one beside the same with other values."""
    parser = argparse.ArgumentParser(
        prog="LMConfig.py",
        usage="LMConfig.py [--preset NAME] [--FIELD VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--preset", default=None, help=f"one of {', '.join(PRESETS)}; 64m where only fields are given")
    twin = "beside it, and what to give --model for it: without experts, of equal training FLOPs a token"
    parser.add_argument("--dense_twin", action="store_true", help=twin)
    for f in fields(LMConfig):
        parser.add_argument(f"--{f.name}", metavar=str(f.type).replace(" | None", ""), help=f"{f.default} in 64m")
    try:
        given, unknown = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise ConfigError(f"LMConfig.py: {error}; see --help") from None
    for argument in unknown:
        name = argument.removeprefix("--").partition("=")[0]
        near = did_you_mean(f"--{name}", {"--preset", "--dense_twin", *(f"--{f.name}" for f in fields(LMConfig))})
        raise ConfigError(f"{argument}: no such option{near}; see --help")
    values = {name: value for name, value in vars(given).items() if value is not None}
    name, twin = values.pop("preset", None), values.pop("dense_twin")
    alone = name is None and not values and not twin
    configs = {one: LMConfig.preset(one) for one in (PRESETS if alone else [name or "64m"])}
    if values:
        changes = {key: _parsed(key, value) for key, value in values.items()}
        changed = LMConfig.preset(name or "64m", **changes)
        configs[", ".join(f"{key} {value}" for key, value in changes.items())] = changed
    if twin:
        dense = dense_twin([*configs.values()][-1])
        names = ("first_k_dense_replace", "intermediate_size")
        configs[" ".join(f"--model.{name} {getattr(dense, name)}" for name in names)] = dense
    print(table(configs))


def _parsed(name: str, text: str) -> Any:
    """Return the value of a field as the command line has it: JSON, or the text itself where the field is one."""
    kind = next(str(f.type) for f in fields(LMConfig) if f.name == name)
    if kind == "str":
        return text
    try:
        return json.loads(text.lower() if text in ("True", "False", "None", "none") else text)
    except (ValueError, RecursionError):
        raise ConfigError(f"--{name} {text}: not a value of this field; give {kind}") from None


if __name__ == "__main__":
    command_line(main)
