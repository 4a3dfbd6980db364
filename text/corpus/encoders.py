"""Several processes that turn batches of documents into tokens, in order."""

from __future__ import annotations

import array
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from errors import UserError

# More cores than this are used by threads inside the processes, so that memory does not grow with the machine.
MAX_PROCESSES = 4
# Batches under way for each process: one it works on and two that wait, so that it never does.
QUEUED = 3

Batch = TypeVar("Batch")


class Encoded(NamedTuple):
    """Tokens of a batch: all documents joined, each ended by `</s>` (tokens,) uint16; tokens of each (documents,)."""

    tokens: np.ndarray
    lengths: np.ndarray


class EncoderPool:
    """Processes that each hold the tokenizer of a folder and nothing else.

    They are `python -m text.corpus.encoders` behind pipes and not `multiprocessing`: fork is not safe once the
    tokenizer's threads run, and spawn would import the main script, torch with it, into each (300 MB instead of 60).
    `workers=0` uses all cores. A context manager; leaving it ends the processes.
    """

    def __init__(self, tokenizer_folder: Path, workers: int = 0) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or min(cores, MAX_PROCESSES)
        threads = 1 if workers else max(1, cores // self.workers)
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "RAYON_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "text.corpus.encoders", str(tokenizer_folder)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(self.workers)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._peaks: dict[int, int] = {}
        # One thread a process does no more than wait for it.
        self._threads = ThreadPoolExecutor(self.workers)

    @property
    def peak_memory(self) -> int:
        """Sum of the processes' peak resident memory so far, in bytes."""
        return sum(self._peaks.values())

    def map(self, batches: Iterable[tuple[Batch, list[bytes]]]) -> Iterator[tuple[Batch, Encoded]]:
        """Encode the UTF-8 documents of each (label, documents); gives (label, tokens) in the order of the batches."""
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for label, documents in batches:
            waiting.append((label, self._threads.submit(self._encode, documents)))
            if len(waiting) >= QUEUED * self.workers:
                label, future = waiting.popleft()
                yield label, future.result()
        while waiting:
            label, future = waiting.popleft()
            yield label, future.result()

    def _encode(self, documents: list[bytes]) -> Encoded:
        process = self._idle.get()
        try:
            sizes = np.array([len(document) for document in documents], np.uint32)
            _send(process.stdin, sizes, np.frombuffer(b"".join(documents), np.uint8))
            tokens, lengths, peak = _receive(process.stdout, np.uint16, np.uint32, np.int64)
            self._peaks[process.pid] = int(peak[0])
        except (EOFError, BrokenPipeError) as error:
            raise UserError(
                f"a tokenising process ended by itself (exit code {process.wait()}; -9 means out of memory); "
                "run the same command again, with fewer workers: finished shards are kept"
            ) from error
        finally:
            self._idle.put(process)  # a dead one too, or the next thread would wait for ever
        return Encoded(tokens, lengths)

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with suppress(BrokenPipeError):  # what was still to be written is for nobody
                process.stdin.close()
            process.stdout.close()
            process.wait()


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        # Not getrusage: a child's figure there begins with what its parent had.
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _send(stream: BinaryIO, *arrays: np.ndarray) -> None:
    for each in arrays:
        stream.write(each.nbytes.to_bytes(8, "little"))
        stream.write(each.data)
    stream.flush()


def _receive(stream: BinaryIO, *dtypes: type) -> list[np.ndarray]:
    """One array of each type; EOFError where the stream ends before."""

    def exactly(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    return [np.frombuffer(exactly(int.from_bytes(exactly(8), "little")), dtype) for dtype in dtypes]


def _serve(folder: str) -> None:
    """Answer each batch of documents on stdin with their tokens, until stdin ends."""
    import signal

    from text.tokenizer import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print into the answers
    tokenizer = Tokenizer.from_folder(folder)
    end_of_text = [tokenizer.eos_id]
    while True:
        try:
            sizes, text = _receive(sys.stdin.buffer, np.uint32, np.uint8)
        except EOFError:
            return
        ends = sizes.cumsum(dtype=np.int64).tolist()
        documents = [bytes(text[start:end]).decode("utf-8") for start, end in zip([0, *ends], ends, strict=False)]
        tokens, lengths = array.array("H"), array.array("I")
        for ids in tokenizer.encode_batch(documents):
            tokens.extend(ids)
            tokens.extend(end_of_text)
            lengths.append(len(ids) + 1)
        peak = np.array([peak_memory()], np.int64)
        _send(answers, np.frombuffer(tokens, np.uint16), np.frombuffer(lengths, np.uint32), peak)


if __name__ == "__main__":
    _serve(sys.argv[1])
