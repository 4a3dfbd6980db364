"""Small models, a small world and a way to run scripts that several test files share."""

from __future__ import annotations

import csv
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from filelock import FileLock
from torch import nn
from toy_stage import Maker

import pretrain
import training.machine
import training.run.samples
import training.trainer
from cli import call
from errors import WIDTH, command_line
from LMConfig import LMConfig
from model import MiniDeepSeek, kernels
from model.kernels import compiled, decode
from model.norm import RMSNorm
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe
from training.parallel import rank_checks
from world.corpus import generate

TINY = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, q_lora_rank=24,
    kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, max_position_embeddings=64,
    initializer_range=0.15,
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: whoever has nothing left then takes short ones, and no worker stays alone with a long one."""
    items.sort(key=lambda item: "tests/training/" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small only wait for each other's threads, ten times as long as they compute on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def few_pictures() -> Iterator[None]:
    """Runs leave their curves out, which would take longer than the runs; test_plots.py draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.trainer.Trainer, "_draw", lambda trainer: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> Iterator[None]:
    """The model's own text is a few tokens, for runs of some steps would take longer to write than to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.run.samples, "NEW", 8)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_measuring() -> Iterator[None]:
    """The machine's peak is not measured, which would take longer than a run: PFLOP/s that no step goes beyond."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.machine, "measured_peak", lambda *_, **__: 1e15)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What a process wrote that is killed is there all the same; the power does not fail here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_version() -> Iterator[None]:
    """The sources do not change meanwhile: each run would read them all again."""
    version = rank_checks.code_version()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_checks, "code_version", lambda: version)
        yield


@pytest.fixture(scope="session", autouse=True)
def built_for_cpus() -> Iterator[None]:
    """Without a GPU a CUDA build of torch, which every command would say in a line, passes for a CPU build."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr("torch.version.cuda", None)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers each time, whichever tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of one `make test` share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def once(run_folder: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: a folder that `make(folder)` fills, in the process that first asks for `name`.

    The processes of one `make test` share it, so tests copy what they change.
    """

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = run_folder / name, run_folder / f"{name}.made"
        with FileLock(run_folder / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> Iterator[None]:
    """decode.c compiled without any instructions of this processor's own, and in less time."""
    monkeypatch.setattr(compiled, "FLAGS", ("-O1", *(flag for flag in compiled.FLAGS if flag[:2] not in ("-O", "-m"))))
    monkeypatch.setenv("XDG_CACHE_HOME", str(run_folder / "portable"))
    decode.library.cache_clear()
    yield
    decode.library.cache_clear()


@pytest.fixture
def tiny_config() -> Callable[..., LMConfig]:
    """`tiny_config(**changes)`: one dense and two MoE layers; no two sizes that could be confused are equal."""
    return lambda **changes: LMConfig(**{**TINY, **changes})


@pytest.fixture
def tiny_model(tiny_config) -> Callable[..., MiniDeepSeek]:
    """`tiny_model(seed=0, **changes)`: its norms, biases and router biases are random too, so none can be swapped."""

    def make(seed: int = 0, **changes: Any) -> MiniDeepSeek:
        torch.manual_seed(seed)
        model = MiniDeepSeek(tiny_config(**changes)).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, RMSNorm):
                    module.weight.uniform_(0.5, 1.5)
                elif isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.uniform_(-0.3, 0.3)
            for router in model.routers():
                router.e_score_correction_bias.uniform_(-0.3, 0.3)
        return model

    return make


@pytest.fixture
def their_model(tiny_config, transformers) -> Callable[..., nn.Module]:
    """`their_model(**changes)`: a DeepseekV3ForCausalLM with random norms, biases and router biases in +-0.3."""

    def make(**changes: Any) -> nn.Module:
        torch.manual_seed(1)
        rope = changes.pop("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
        fields = {**vars(tiny_config(num_nextn_predict_layers=0)), **changes}
        del fields["rope_theta"], fields["rope_scaling"], fields["attention"]
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields, rope_parameters=rope)).eval()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if "norm" in name:
                    tensor.uniform_(0.5, 1.5)
                elif name.endswith((".bias", "e_score_correction_bias")):
                    tensor.uniform_(-0.3, 0.3)
        return model

    return make


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor takes the branch for CUDA, of an H100, computed by the CPU."""
    monkeypatch.setattr(kernels, "on_cuda", lambda x: True)
    monkeypatch.setattr(kernels, "capability", lambda device: 9)


class Run(NamedTuple):
    """What a script left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def call_main(main: Callable[[], None], *arguments: object) -> int:
    """A script's `main` in this process, as its command line calls it. Returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [Path(inspect.getfile(main)).name, *map(str, arguments)])
        try:
            command_line(main)
        except SystemExit as end:
            return int(end.code)
    return 0


def as_options(given: dict[str, object]) -> list[object]:
    """Write settings as a command line does."""
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def long_lines(shown: str, *folders: Path) -> list[str]:
    """The lines that are longer than a line may be, where folders have names as short as people's."""
    for folder in folders:
        shown = shown.replace(str(folder), "out")
    return [line for line in shown.splitlines() if len(line) > WIDTH]


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., Run]:
    """`run(main, *arguments)`: exit code and output of a script, without the seconds that a process takes to start."""

    def run(main: Callable[[], None], *arguments: object) -> Run:
        capsys.readouterr()
        code = call_main(main, *arguments)
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The reference implementation, whose import takes seconds."""
    import transformers

    return transformers


@pytest.fixture
def open_silently(transformers, caplog, monkeypatch) -> Callable[[Path], nn.Module]:
    """`open_silently(folder)`: a folder in transformers, where every weight has its place and nothing is reported."""

    def opened(folder: Path) -> nn.Module:
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with caplog.at_level(logging.WARNING, logger="transformers"):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        said = [record for record in caplog.records if record.name.startswith("transformers")]
        assert not any(report.values()) and not said
        return model.eval()

    return opened


@pytest.fixture
def script(run) -> Callable[..., Run]:
    """`script(function, *arguments)`: `run` for a script of eval/, whose last line calls the function."""

    def script(function: Callable[..., None], *arguments: object) -> Run:
        def main() -> None:
            call(function, "")

        return run(main, *arguments)

    return script


@pytest.fixture(scope="session")
def world(once) -> Path:
    """The demo world in small: pretrain.csv, sft.jsonl, heldout.txt, heldout_questions.jsonl."""
    return once("world", lambda folder: generate(folder, scale=0.01))


@pytest.fixture(scope="session")
def tokenizer_folder(once, world: Path) -> Path:
    """A folder as train_tokenizer.py writes it: 600 tokens of the world's own text."""

    def make(folder: Path) -> None:
        with open(world / "pretrain.csv", encoding="utf8", newline="") as file:
            train_bpe([row["text"] for row in csv.DictReader(file)], 600).save(folder)

    return once("tokenizer", make)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """That tokenizer."""
    return Tokenizer.from_folder(tokenizer_folder)


RECIPE = dict(
    model=dict(
        preset="demo", hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
    ),
    sequence_length=64, batch_tokens=1024, micro_tokens=512, dtype="fp32", device="cpu", log_every=1, val_tokens=1024,
    val_fraction=0.1, workers=1, optim=dict(lr=5e-3),
)  # fmt: skip


@pytest.fixture(scope="session")
def pretrain_arguments(world: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a small pretraining run, all but --out and its end; its shards are this process's."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf8")
    given = {"config": folder / "tiny.yaml", "data": world / "pretrain.csv", "tokenizer": tokenizer_folder}
    given["shards"] = folder / "shards"
    return list(map(str, as_options(given)))


@pytest.fixture(scope="session")
def pretrained(once, pretrain_arguments: list[str]) -> Path:
    """A finished run folder of pretrain.py."""

    def make(folder: Path) -> None:
        assert call_main(pretrain.main, *pretrain_arguments, "--out", folder / "pretrain", "--max_steps", 40) == 0

    return once("stages", make) / "pretrain"


@pytest.fixture(scope="session")
def demo_path(once) -> Path:
    """What `make demo` leaves, at a tiny size: world, tokenizer, and a run folder of each stage."""
    import demo_path

    return once("demo", lambda folder: demo_path.walk(folder, RECIPE))


@pytest.fixture
def checkpoint(pretrained: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint of `pretrained`, to be changed."""
    return Path(shutil.copytree(pretrained / "final", tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def answerer(pretrained: Path) -> Any:
    """What answers with the checkpoint of `pretrained`, in float32."""
    from eval.answering import Answerer

    return Answerer.open(str(pretrained / "final"), "cpu", "fp32")


@pytest.fixture
def make(tiny_config, tokenizer, tmp_path) -> Maker:
    """Makes trainers of toy stages."""
    return Maker(tmp_path, tiny_config, tokenizer)
