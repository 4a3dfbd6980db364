"""One run in a folder at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from pathlib import Path

from errors import UserError, naming
from text.files import json_text

LOCK = ".lock"


class RunLock:
    """The right to write into a run folder, of one process at a time.

    The kernel holds the lock, not the file: it ends with the process, however that ends, and is not passed on to its
    children. The file stays, and says who held it last.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._handle = out, -1

    def acquire(self) -> None:
        """Make the folder if need be. Raises `UserError` where another process holds the lock."""
        with naming(self._out / LOCK):
            self._out.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"notice: {self._out / LOCK}: this file system has no locks ({error.strerror})", file=sys.stderr)
                return
            self.release()
            holder = read_holder(self._out)
            who = "process {pid} on {host}".format_map(holder) if holder else "another process"
            raise UserError(f"{self._out}: {who} is training here; stop it, or choose another --out") from None

    def release(self) -> None:
        """Let others in; nothing happens without a lock."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def sign(self) -> None:
        """Write who we are into the file: from now on a restart by the same torchrun resumes this run."""
        if self._handle >= 0:
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "launch": _launch()}
            with naming(self._out / LOCK):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, json_text(facts).encode(), 0)


def restarted(out: Path) -> bool:
    """Return whether torchrun --max-restarts has started this process again after one that began the run of `out`."""
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    return not is_first and read_holder(out).get("launch") == _launch()


def read_holder(out: Path) -> dict[str, object]:
    """Return who signed last; empty where nobody did."""
    try:
        facts = json.loads((out / LOCK).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and {"pid", "host", "launch"} <= facts.keys() else {}


def _launch() -> str:
    """Name one torchrun by its id and its process, which is the parent of those that it starts."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {socket.gethostname()} {os.getppid()}"
