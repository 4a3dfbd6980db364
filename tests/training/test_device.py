"""What `--device` stands for, by what torch says of the machine; numbers in float32 are never rounded to TF32."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from forked import on_ranks

import training.parallel.group
import training.parallel.ranks
from errors import UserError, command_line
from training.machine import choose_device
from training.parallel.ranks import Ranks

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)


@pytest.fixture
def gpus(monkeypatch) -> Callable[..., None]:
    """`gpus(fault)`: two of them, and what torch says when it is asked, for a build of torch with CUDA."""

    def make(fault: str = "") -> None:
        def init() -> None:
            if fault:
                raise RuntimeError(fault)

        answers = dict(init=init, device_count=lambda: 2, get_device_name=lambda _: "X", set_device=lambda _: None)
        for name, answer in answers.items():
            monkeypatch.setattr(f"torch.cuda.{name}", answer)
        monkeypatch.setattr("torch.version.cuda", "13.0")
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: SimpleNamespace(add_=lambda _: torch.ones(1)))

    return make


def refused(name: str, local: int = 0) -> str:
    with pytest.raises(UserError) as caught:
        choose_device(name, local)
    return str(caught.value)


def test_a_gpu_that_torch_has_code_for_is_taken_by_one_process(gpus):
    gpus()
    for name in ("auto", "cuda"):
        assert choose_device(name, 1) == (torch.device("cuda", 1), "X")
        said = refused(name, local=2)
        assert said.startswith("LOCAL_RANK 2: this machine has 2 CUDA devices; ") and "--nproc_per_node 2" in said
    assert choose_device("cpu", 1) == (torch.device("cpu"), "")


NO_CODE = "CUDA error: no kernel image is available for execution on the device"
FAULTS = {
    f"{NO_CODE}\nCUDA kernel errors might": NO_CODE,
    TOO_OLD: "The NVIDIA driver on your system is too old (found version 11040)",
    "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized": "",  # as it is
}


@pytest.mark.parametrize("fault", FAULTS, ids=["no code for it", "old driver", "an error of its own"])
def test_a_gpu_that_cannot_be_used_is_explained(fault, gpus, capsys):
    gpus(fault)
    why = FAULTS[fault] or fault
    assert refused("cuda") == f"--device cuda: {why}; use --device cpu"
    assert choose_device("auto", 0) == (torch.device("cpu"), why)
    assert Ranks.start("auto").device.type == "cpu"
    assert capsys.readouterr().err == f"notice: computing on the CPU: {why}\n"


@pytest.mark.parametrize(("hip", "why"), [("7.0", r"AMD GPUs \(ROCm\)"), (None, "for CPUs only")])
def test_another_build_of_torch_is_named(hip, why, monkeypatch):
    monkeypatch.setattr("torch.version.hip", hip)
    monkeypatch.setattr("torch.version.cuda", None)
    assert re.search(rf"--device cuda: .*{why}.*; use --device cpu", refused("cuda"))
    device, said = choose_device("auto", 0)
    assert device.type == "cpu" and re.search(why, said)


@pytest.mark.parametrize(("name", "what"), [("mps", "Apple's GPUs"), ("tpu", "one of auto, cpu, cuda")])
def test_other_devices_are_refused(name, what):
    assert refused(name).startswith(f"--device {name}: ") and what in refused(name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_in_float32_are_never_tf32(device, gpus, request):
    """Whatever was set before: NVIDIA's containers set it to "high" by an environment variable."""
    gpus()
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    Ranks.start(device)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("device", "named"), [("cpu", None), ("cuda", torch.device("cuda", 1))])
def test_a_rank_names_its_gpu_to_the_others(device, named, gpus, monkeypatch):
    gpus()
    given = []
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training.parallel.group, "_store", lambda *_: None)
    monkeypatch.setattr(training.parallel.group, "_check_devices", lambda *_: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **named: given.append(named["device_id"]))
    Ranks.start(device)
    assert given == [named]


def test_ranks_that_chose_other_devices_do_not_wait_for_each_other(monkeypatch, tmp_path):
    def choose(name: str, local: int) -> tuple[torch.device, str]:
        return (torch.device("cuda", 0), "NVIDIA X") if local else (torch.device("cpu"), "no driver")

    monkeypatch.setattr(training.parallel.ranks, "choose_device", choose)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    ranks = on_ranks(2, lambda rank: command_line(lambda: Ranks.start("auto", timeout=20.0)), tmp_path)
    assert [rank.code for rank in ranks] == [2, 2]
    for rank in ranks:
        said = "rank 1 computes on cuda (NVIDIA X), rank 0 on cpu (no driver); give all the same --device"
        assert said in rank.output() and "Traceback" not in rank.output()
