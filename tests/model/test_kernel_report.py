"""What a run says of its kernels is what it computes with; a flash-attn that cannot be imported is reported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import model.kernels as kernels
from LMConfig import LMConfig
from model.attention import AttentionMask
from model.kernels import attention, causal
from model.kernels.report import kernel_report
from model.ops import attend

BF16, FP32 = torch.bfloat16, torch.float32
SYMBOL = "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa"
MISSING = "torch/lib/libc10.so: cannot open shared object file"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What an import found is found again."""
    yield
    attention.flash_attention.cache_clear()
    sys.modules.pop("flash_attn", None)


@pytest.fixture
def install(tmp_path: Path, monkeypatch):
    """Put a flash_attn of this source in the place of any other."""

    def put(source: str) -> None:
        attention.flash_attention.cache_clear()
        sys.modules.pop("flash_attn", None)
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    return put


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"raise ImportError({SYMBOL!r})", SYMBOL),
        (f"raise OSError({MISSING!r})", MISSING),
        ("import flash_attn_2_cuda", "No module named 'flash_attn_2_cuda'"),
        ("raise RuntimeError('driver\\ntoo old')", "driver too old"),
    ],
)
def test_a_broken_flash_attn_is_reported_once_with_its_reason(source, reason, install, capsys):
    install(source)
    assert attention.flash_attention() is attention.flash_attention() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("notice: flash-attn ") and f"({reason})" in said


def test_no_flash_attn_is_nothing_to_report(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [])
    attention.flash_attention.cache_clear()
    assert attention.flash_attention() is None and not capsys.readouterr().err


@pytest.mark.parametrize("source", ["__version__ = '2'", f"raise ImportError({SYMBOL!r})"])
def test_a_compiled_graph_holds_whether_flash_attn_is_there(source, install):
    install(source)
    torch._dynamo.reset()  # or the graph of the case before would serve
    found = torch.compile(lambda x: x + attention.has_flash_attention(), backend="eager", fullgraph=True)
    assert found(torch.zeros(1)).item() == source.startswith("__version__")


def on_gpu(config: LMConfig, dtype: torch.dtype, monkeypatch) -> str:
    """The report for a GPU. Its few empty tensors are made on the CPU."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, dtype, device: empty(*sizes, dtype=dtype))
    return kernel_report(config, dtype, torch.device("cuda", 0), 512)


PLAIN = "attention by scaled_dot_product_attention ("
LARGE = {"qk_nope_head_dim": 200, "qk_rope_head_dim": 64, "v_head_dim": 64}
DENSE = {"first_k_dense_replace": LMConfig.preset("64m").num_hidden_layers, "num_nextn_predict_layers": 0}


@pytest.mark.parametrize(
    ("preset", "changes", "dtype", "flash", "capability", "expected"),
    [
        ("64m", {}, BF16, None, 8, f"{PLAIN}flash), of isolated samples by varlen_attn; experts one by one"),
        ("deepseek-v3", {}, BF16, None, 8, f"{PLAIN}flash), of isolated samples by varlen_attn; experts one by"),
        ("64m", {}, BF16, "2.8.3", 9, "attention by flash-attn 2.8.3; experts by grouped_mm"),
        ("64m", {}, FP32, "2.8.3", 9, PLAIN),
        ("64m", LARGE, BF16, "2.8.3", 9, PLAIN),
        ("64m", DENSE, BF16, "2.8.3", 9, "attention by flash-attn 2.8.3"),
    ],
)
def test_kernels_of_a_gpu_are_named(preset, changes, dtype, flash, capability, expected, on_cuda, install, monkeypatch):
    if flash:
        install(f"__version__ = {flash!r}")
    else:
        monkeypatch.setattr(attention, "flash_attention", lambda: None)
    monkeypatch.setattr(kernels, "capability", lambda device: capability)
    said = on_gpu(LMConfig.preset(preset, **changes), dtype, monkeypatch)
    assert said.startswith(expected) and ("flash-attn" in said) == ("flash-attn" in expected)
    assert ("experts" in said) == (changes is not DENSE)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("time", [40, 3000])
def test_what_is_said_of_a_cpu_is_what_attention_does_there(time, dtype, monkeypatch):
    config, used = LMConfig.preset("demo"), []
    heads, nope, rope, value = 2, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    said = kernel_report(config, dtype, torch.device("cpu"), time)
    compiled = kernel_report(config, dtype, torch.device("cpu"), time, compiled=True)
    q, kv = (
        torch.zeros(1, time, heads, nope + rope, dtype=dtype),
        torch.zeros(1, time, heads, nope + value, dtype=dtype),
    )
    assert said.startswith("attention by causal.c, of") == causal.fits(q, kv, q[:, :, 0, :rope])
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: used.append(1) or q)
    attend(q, q, q, 1.0, AttentionMask())
    plain = "scaled_dot_product_attention" if used else "chunks of queries"
    assert compiled == f"layers compiled; attention by {plain}" and said.endswith(f" by {plain}")
