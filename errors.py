"""What a person sees when something is wrong, one line, an exit code, no traceback; and when it takes long."""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from unicodedata import category

LONGEST = 1000  # characters of a message; data may be quoted in it
ENDS = {"\n": " ", "\r": " ", "\t": " ", "\u2028": " ", "\u2029": " "}


class UserError(Exception):
    """Something the person can mend. The message names the file, the place in it and the remedy. Exit code 2.

    Whatever the message quotes, of a file or another program, it is one line that a terminal only shows.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DamagedCheckpoint(UserError):
    """A checkpoint that is truncated, incomplete or of another shape than its config says. Exit code 3."""

    exit_code = 3


def check_least(least: int, **values: int) -> None:
    """Raises `UserError` for an option that is below."""
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")


def is_broken(text: str) -> bool:
    """Whether it has a NUL or half of a character: no name of a file, and no text that can be written."""
    return "\0" in text or any("\ud800" <= letter < "\udc80" for letter in text)


def check_seed(seed: int | None) -> None:
    """Raises `UserError` for a number that not all generators take."""
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: give a number from 0 to 2^64 - 1")


def one_line(text: str) -> str:
    """The text without line ends, with controls and halves of characters spelled out; its middle left out if long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    shown = "".join(ENDS.get(letter) or (ascii(letter)[1:-1] if _moves(letter) else letter) for letter in text)
    return shown.strip()


def _moves(letter: str) -> bool:
    """Whether a terminal would obey it, or cannot show it: controls, directions of writing, surrogates."""
    return category(letter) in ("Cc", "Cf", "Cs")


# What is wrong with a path rather than with the disk.
PATHS = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


PATIENCE = 3.0

# What torch's errors say when the memory of a GPU, or of the machine, is full.
MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
MORE_MEMORY = (
    "in training lower --micro_tokens or pass --gradient_checkpointing (and --resume, if something was saved); "
    "elsewhere read less at once"
)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give an `OSError` the name of `file` where it has none: a write that fails does not say where."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


@contextmanager
def waiting(what: str, speaks: bool = True) -> Iterator[None]:
    """Say on stderr what takes so long, where something lasts more than `PATIENCE` seconds."""
    timer = threading.Timer(PATIENCE, print, (f"{what} ...",), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if speaks:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def with_home(text: str) -> str:
    """The text with the home folder for a `~` that begins it, or one of several paths in it: `a.csv=2,~/b.csv`.

    A shell does so only at the beginning of a word, and not in `--out=~/run` or in a file.
    """
    return re.sub(r"(^|[,=]\s*)~(?=[/,=]|$)", lambda found: found[1] + os.path.expanduser("~"), text)


def command_line(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` or a failing disk ends in one line on stderr and the error's exit code.

    `main` finds the home folder in the place of every `~` that begins a path.
    """
    sys.argv[1:] = map(with_home, sys.argv[1:])
    if isinstance(sys.stdout, TextIOWrapper):  # else a path that is no UTF-8 could not be printed, as it can on stderr
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # lines arrive in a file at once too
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        remedies = {
            **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run the same command again"),
            **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you may write to"),
            **dict.fromkeys(PATHS, "check the path"),
        }
        if error.errno not in remedies:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {one_line(f'{place}{error.strerror}')}; {remedies[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in MEMORY):
            raise
        what = ". ".join(str(error).split(". ")[:3]).rstrip(".")
        print(f"error: {one_line(what)}; {MORE_MEMORY}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
