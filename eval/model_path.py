"""What a path holds: a checkpoint of this project, another model's folder, or a GGUF file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from LMConfig import MODEL_TYPES
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelPath:
    """A folder with a model. `gguf`: the file in it, where it is one. `is_own`: this project's network opens it."""

    folder: Path
    gguf: str = ""
    is_own: bool = False

    def __str__(self) -> str:
        return str(self.folder / self.gguf)

    @classmethod
    def find(cls, path: str) -> ModelPath:
        """Find what a path holds. A `deepseek_v3` folder is this project's, unless its tokenizer is another's.

        Raises `UserError` for a path that holds no model.
        """
        folder = Path(path)
        if folder.suffix == ".gguf" and folder.is_file():
            return cls(folder.parent, folder.name)
        if not folder.is_dir():
            raise UserError(f"{path}: no such checkpoint; give a folder with config.json, or a .gguf file")
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return cls(folder, is_own=_is_own(folder))
        found = sorted(file.name for file in folder.glob("*.gguf"))
        if len(found) != 1:
            what = f"{len(found)} .gguf files; name one of them" if found else "no config.json and no .gguf file in it"
            raise UserError(f"{path}: {what}")
        return cls(folder, found[0])


def _is_own(folder: Path) -> bool:
    """Return whether this project's network and tokenizer are the ones to open a folder with."""
    if not (folder / "config.json").is_file():
        return True  # an adapter, for which the checkpoint's reader has a message
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf8")).get("model_type")
    except (ValueError, AttributeError, OSError):
        raise UserError(f"{folder / 'config.json'}: not a JSON object; restore the file") from None
    if kind not in MODEL_TYPES.values():
        return False
    if (folder / "tokenizer.json").is_file():
        try:
            Tokenizer.from_folder(folder)
        except UserError:
            print(f"notice: {folder}: another project's tokenizer; opened through transformers", file=sys.stderr)
            return False
    return True
