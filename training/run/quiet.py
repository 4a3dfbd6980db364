"""Other libraries without the remarks that are none of a person's business."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Of torch's compiler, on parts of this project and of torchao that it compiles well enough.
COMPILER = ("Torchinductor does not support code generation for complex", ".*_stable_hash_for_caching")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import or open torchao, transformers, or what imports them, without remarks on versions and missing kernels.

    Errors still come through. Later remarks of transformers are quieted too, unless TRANSFORMERS_VERBOSITY says how
    much of them is wanted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # which it reads when it is imported
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_compiler() -> None:
    """From now on torch compiles without `COMPILER`."""
    for message in COMPILER:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
