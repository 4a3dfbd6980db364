"""The device that `--device` stands for on this machine, and why."""

from __future__ import annotations

import re
import warnings

import torch

from errors import UserError


def choose_device(name: str, local: int) -> tuple[torch.device, str]:
    """The device of process number `local` of this machine, and why it is that one (nothing where it was given).

    `auto` is CUDA where it can be used. Raises `UserError` for a device that cannot be used here.
    """
    if name == "mps":
        raise UserError("--device mps: Apple's GPUs are not supported; use --device cpu")
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu"), ""
    fault = why_not_cuda()
    if not fault:
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"LOCAL_RANK {local}: this machine has {count} CUDA devices; start one process for each "
                f"(torchrun --nproc_per_node {count}), or use --device cpu"
            )
        fault = why_no_kernels(local)
    if not fault:
        return torch.device("cuda", local), torch.cuda.get_device_name(local)
    if name == "cuda":
        raise UserError(f"--device cuda: {fault}; use --device cpu")
    return torch.device("cpu"), fault


def why_not_cuda() -> str:
    """Why this process can use no CUDA device, in words; nothing where it can."""
    if torch.version.hip:
        return "this torch is built for AMD GPUs (ROCm), which are not supported"
    if torch.version.cuda is None:
        return "this torch is built for CPUs only"
    try:
        with warnings.catch_warnings():  # torch warns of a GPU that it has no code for: see `why_no_kernels`
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except RuntimeError as error:  # no driver, one that is too old, no GPU; torch adds where to find another one
        sentences = re.split(r"(?<=[.?!])\s+", str(error))
        return " ".join(sentence for sentence in sentences if "http" not in sentence).strip(" .")
    return ""


def why_no_kernels(index: int) -> str:
    """Why torch cannot run on a CUDA device for which it was not compiled, in words; nothing where it can."""
    capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not built or any(runs_on(architecture, capability) for architecture in built):
        return ""
    place = f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
    return f"this torch has no code for {place}, only for {', '.join(built)}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, such as sm_90a or compute_90, runs on a device of that compute capability.

    Machine code (sm) runs on its own major version from its minor version on; PTX (compute) on all later ones too. With
    the suffix `a` it runs on that very version only, with `f` within its major version (CUDA C++ Programming Guide).
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if found is None:
        return False
    version = int(found[2]), int(found[3])
    if found[4] == "a":
        return version == capability
    forward = found[1] == "compute" and not found[4]
    return version <= capability and (forward or version[0] == capability[0])
