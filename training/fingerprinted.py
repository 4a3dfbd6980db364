"""Arrays on the disk, complete or not there, that belong to what their fingerprint was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from errors import naming
from model.checkpoint.weight_files import usual_mode


def save_arrays(path: Path, arrays: dict[str, np.ndarray], fingerprint: str) -> None:
    """Write a safetensors file. Raises `UserError` where the disk refuses."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with usual_mode(path.with_suffix(".partial")) as temporary:
            save_file(arrays, temporary, {"fingerprint": fingerprint})
        temporary.replace(path)


def open_arrays(path: Path, fingerprint: str) -> Any:
    """Open the safetensors file for reading; None where there is none that is whole and has this fingerprint."""
    try:
        opened = safe_open(path, "numpy")
        return opened if (opened.metadata() or {}).get("fingerprint") == fingerprint else None
    except (SafetensorError, OSError):
        return None
