"""What a GPU would run, by shape: every stage on fake tensors of device="cuda", with autograd, in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
# A step waits for the device once, however many micro-batches it has. The host then knows what the gradients are
# divided by, whether loss and gradient are finite, what is logged, and whether a rank was asked to stop.
STEP = ["on_host = summed.cpu()"]
WAITS = {
    "moe_layer": [],
    "training_step": 2 * STEP,  # of two steps
    "packed_step": STEP,
    "looped_step": STEP + 2 * ["plan = replace(plan, ends=kernels.grouped_cuda.read_ends(plan.ends))"],
    "recomputed_step": STEP,
    "fp8_step": STEP + 2 * ["numbers = torch.cat((plan.ends, plan.counts)).tolist()"],  # for each product of experts
    "preference_step": STEP,
    "distillation_step": STEP,
    "lora_step": STEP,
    "policy_loss": [],
    "quantized_experts": [],
    "decoding": [],
    "generation": 4 * ["tokens = chosen.cpu()"],  # one a step
}


@pytest.fixture(scope="module")
def seen(once) -> dict[str, dict]:
    """What tests/fake_cuda.py saw in each case."""
    if torch.backends.cuda.is_built():
        pytest.skip("a CUDA build of torch lets nobody else register a device; make gpu is for it")

    def make(folder: Path) -> None:
        library, torch_lib = folder / "fake_cuda.so", f"{TORCH}/lib"
        build = ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{TORCH}/include", str(HERE / "fake_cuda.cpp")]
        build += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-o", str(library)]
        subprocess.run([*build, f"-L{torch_lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_lib}"], check=True)
        env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent)}
        script = [sys.executable, str(HERE / "fake_cuda.py")]
        done = subprocess.run(script, cwd=HERE.parent, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        (folder / "seen.json").write_text(done.stdout)

    return json.loads((once("fake_cuda", make) / "seen.json").read_text())


@pytest.mark.parametrize("case", WAITS)
def test_every_stage_runs_on_cuda_by_shape_and_waits_for_the_device_at_these_lines_only(case, seen):
    assert seen[case]["error"] == ""
    waits, known = seen[case]["waits"], list(WAITS[case])
    for wait in waits:
        line = next((line for line in known if f": {line}" in wait), None)
        assert line, f"the host waits for the device where it did not before, or more often: {wait}"
        known.remove(line)
    assert not known, f"no longer waited for: {known}"


def test_every_way_to_wait_is_counted_once_and_nothing_else_is(seen):
    calls = {name: case for name, case in seen.items() if ": " in name}
    assert {case["error"] for case in calls.values()} == {""}
    assert len(calls) >= 25 and all(len(case["waits"]) == name.startswith("waits") for name, case in calls.items())
    source = (HERE / "fake_cuda.py").read_text(encoding="utf8").splitlines()
    for name, case in calls.items():
        for wait in case["waits"]:  # "tests/fake_cuda.py:216: code (kind)"
            assert f'"{name.partition(": ")[2]}": lambda' in source[int(wait.split(":")[1]) - 1], (name, wait)


PACKED = ("packed_step", "looped_step", "preference_step", "distillation_step", "lora_step")
KERNELS = {
    "_grouped_mm": tuple(case for case in WAITS if case not in ("fp8_step", "looped_step")),
    "each_expert": ("looped_step",),
    "each_gradient": ("looped_step",),
    "_scaled_mm_v2": ("fp8_step",),
    "_varlen_attn": PACKED,
    "_varlen_attn_backward": PACKED,
    "_fused_adamw_": tuple(case for case in WAITS if case.endswith("_step")),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_are_grouped_isolated_packing_and_the_optimiser_have_kernels_of_their_own(kernel, seen):
    assert {case for case in WAITS if kernel in seen[case]["kernels"]} >= set(KERNELS[kernel])
