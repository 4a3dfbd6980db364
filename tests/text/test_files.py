"""Small helpers of files and of the process."""

from __future__ import annotations

import subprocess
import sys

from text.files import peak_memory


def test_peak_memory_is_that_of_this_process_alone():
    """A small process that a large one starts is small; what it takes itself, and gives back, counts."""
    held = bytearray(b"x") * (300 << 20)
    program = "from text.files import peak_memory as m; a = m(); b = bytearray(b'x') * (50 << 20); del b; print(a, m())"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, started.stdout.split())
    assert before < 150 << 20 < len(held) <= peak_memory()
    assert after - before > 40 << 20
