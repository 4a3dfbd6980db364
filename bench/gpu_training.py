"""Training: steps that equal the CPU's, compiled layers, waits of a micro-batch, and two ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from gpu_checks import trained
from gpu_decoding import waits
from gpu_place import Finding, NotRun, Place, gradients, relative
from torch import Tensor, nn

from LMConfig import LMConfig
from model import MiniDeepSeek
from training.losses import NextTokenLoss
from training.optim.build import OptimSettings, build_optimizer, step_scaled
from training.router_bias import update_router_biases

BF16 = torch.bfloat16
STEPS = 20
SECONDS = 90  # that two ranks may take
READS_ON_CPU = 9  # of a step: a CPU's own numbers are read without a wait, and counted all the same


@dataclass
class TrainStep:
    """A step as the trainer's: loss, gradients, AdamW that also clips, router biases; the host reads the norm."""

    model: MiniDeepSeek
    place: Place
    dtype: torch.dtype
    lr: float = 1e-3
    loss: NextTokenLoss = field(default_factory=NextTokenLoss)

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = build_optimizer(self.model, OptimSettings(lr=self.lr))

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the loss of a label of the main model, on the device."""
        count, total, loads = self.backward(ids)
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(found))
        step_scaled(self.optimizer, found, min(1.0 / (norm + 1e-6), 1.0))
        self.optimizer.zero_grad()
        if loads is not None:
            update_router_biases(self.model, loads, 1e-3)
        return total / count

    def backward(self, ids: Tensor) -> tuple[int, Tensor, Tensor | None]:
        """Return how many labels there are, their summed loss and the experts' loads."""
        with self.place.autocast(self.dtype):
            total, _, metrics = self.loss(self.model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        count = ids[:, 1:].numel()
        (total / count).backward()
        return count, metrics["main"], metrics.get("counts")


def steps(place: Place) -> Iterator[Finding]:
    """20 steps of `64m` in float32: the losses of the CPU."""
    config = place.config() if place.small else LMConfig.preset("64m", num_nextn_predict_layers=1)
    here = losses(place, config)
    with patch("model.kernels.on_cuda", lambda x: x.is_cuda):  # of a CPU its own branch
        there = losses(Place(torch.device("cpu"), timed=False), config)
    yield Finding("first loss", abs(here[0] - there[0]) / there[0], 1e-5)
    yield Finding("largest difference", max(abs(a - b) / b for a, b in zip(here, there, strict=True)), 2e-3)
    yield Finding("loss fell", here[-1] - here[0], -0.01)


def losses(place: Place, config: LMConfig) -> list[float]:
    """Return those of some steps, of the same weights and tokens everywhere."""
    step = TrainStep(place.model(config), place, torch.float32)
    rows, width = (4, 33) if config.num_hidden_layers < 4 else (4, 129)
    tokens = [place.ids(rows, width, min(config.vocab_size, 50), seed=number) for number in range(STEPS)]
    return [float(step(ids)) for ids in tokens]


def micro_batch(place: Place) -> Iterator[Finding]:
    """Waits for the device: none in a micro-batch in bfloat16, one in a step."""
    model = place.model(place.config(num_nextn_predict_layers=1))
    ids = place.ids(2, 41, model.config.vocab_size)
    step = TrainStep(model, place, BF16)
    for _ in range(2):
        step(ids)
    yield Finding("of a micro-batch", float(waits(place, lambda: step.backward(ids))), 0)
    yield Finding("of a step", float(waits(place, lambda: step(ids))), 1)


def trainer(place: Place) -> Iterator[Finding]:
    """The project's own loop: one wait for the device a step, none a micro-batch."""
    from eval.paper.speed import RandomRows
    from training.parallel.ranks import Ranks
    from training.settings import NextTokenSettings
    from training.trainer import Trainer

    rows, width = (8, 32) if place.small else (16, 512)
    found = []
    for cut in (1, 4):
        model = place.model()
        with tempfile.TemporaryDirectory() as folder:
            settings = NextTokenSettings(
                out=folder, batch_tokens=rows * width, micro_tokens=rows * width // cut, sequence_length=width,
                dtype="bf16", max_steps=100, device=place.device.type,
            )  # fmt: skip
            data, named = RandomRows(width, model.config.vocab_size), SimpleNamespace(fingerprint="")
            made = Trainer(settings, Ranks(0, 1, place.device), model, named, data, NextTokenLoss())
            try:
                for _ in range(3):
                    made.advance()
                found.append(waits(place, made.advance))
                seconds = place.seconds(made.advance, 2)
            finally:
                made.batches.close()
                made.checkpoints.saver.close()
    yield Finding("waits of a micro-batch more", float(found[1] - found[0]), 0)
    yield Finding("waits of a step", float(found[0]), READS_ON_CPU if place.small else 1)
    if place.timed:
        yield Finding("speed in four micro-batches", rows * width / seconds, unit="tokens/s")


def compiled(place: Place) -> Iterator[Finding]:
    """Compiled layers against plain ones, and what compiling breaks."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    model = place.model()
    ids = place.ids(2, 41 if place.small else 513, model.config.vocab_size)
    plain = {packed: trained(model, ids, place, BF16, packed) for packed in (False, True)}
    for layer in model.model.layers:
        layer.compile(dynamic=False, **({"backend": "aot_eager"} if place.small else {}))
    for packed, (total, gradient) in plain.items():
        torch._dynamo.reset()
        counters.clear()
        trained(model, ids, place, BF16, packed)
        compiled_total, compiled_gradient = trained(model, ids, place, BF16, packed)
        kind = "packed" if packed else "causal"
        yield Finding(f"{kind}: loss", relative(compiled_total, total), 1e-2)
        yield Finding(f"{kind}: gradients", relative(compiled_gradient, gradient), 0.2)  # routing may choose others
        yield Finding(f"{kind}: graph breaks", float(sum(counters["graph_break"].values())), 0)
        yield Finding(f"{kind}: graphs", float(counters["stats"]["unique_graphs"]), 2)  # a dense and a MoE layer
    torch._dynamo.reset()


def ranks(place: Place) -> Iterator[Finding]:
    """Two ranks by torchrun: the gradients of one."""
    if place.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise NotRun("one device")
    import training.parallel.replication  # noqa: F401 (a package that is missing there is missing here)

    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        root = str(Path(__file__).parent.parent)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        given = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen([*run, place.device.type, folder], env=env, **given) as started:
            try:
                _, told = started.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)  # with its ranks, which would keep the card busy
                raise RuntimeError(f"two ranks took more than {SECONDS} s") from None
        if started.returncode:
            errors = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): .+)", told, re.M)
            raise RuntimeError(errors[-1] if errors else f"torchrun ended with {started.returncode}")
        found = json.loads((Path(folder) / "found.json").read_text())
    yield Finding("gradients", found["gradients"], 1e-4)
    yield Finding("loss", found["loss"], 1e-5)


def work_as_rank(kind: str, folder: str) -> None:
    """Compute half of a batch, and on the main rank compare with the whole."""
    from training.parallel.ranks import Ranks
    from training.parallel.replication import replicate

    joined = Ranks.start(kind)
    place = Place(joined.device, timed=True)
    model = place.model().train()
    ids, loss = place.ids(4, 65, model.config.vocab_size), NextTokenLoss()

    def run(module: nn.Module, rows: Tensor) -> Tensor:
        model.zero_grad()
        total, count, _ = loss(module, {"input_ids": rows[:, :-1], "labels": rows[:, 1:]})
        (total / count).backward()
        return (total / count).detach()

    mine = run(replicate(model, joined), ids[joined.rank * 2 : joined.rank * 2 + 2])
    found, mean = gradients(model.parameters()), joined.sum(mine.clone()) / joined.world
    whole = run(model, ids)
    if joined.main:
        result = {"gradients": relative(found, gradients(model.parameters())), "loss": relative(mean, whole)}
        (Path(folder) / "found.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


CHECKS = {check.__name__: check for check in (steps, micro_batch, trainer, compiled, ranks)}

if __name__ == "__main__":
    work_as_rank(*sys.argv[1:])
