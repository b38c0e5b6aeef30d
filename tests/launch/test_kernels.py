"""Deterministic kernels are in force, and what has none is one line."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from programs import ROOT, finish, start

from lockstep.errors import UserError
from lockstep.launch.kernels import choose_kernels, missing_kernels_explained
from lockstep.settings.config import RuntimeConfig


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.set_deterministic_debug_mode("default")
    yield
    torch.set_deterministic_debug_mode(before[0])
    torch.backends.cudnn.benchmark = before[1]
    torch.set_float32_matmul_precision(before[2])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_exact_takes_deterministic_kernels(on_cpu: bool) -> None:
    choose_kernels(RuntimeConfig(), on_cpu=on_cpu)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_a_workspace_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_kernels(RuntimeConfig(), on_cpu=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_without_exact_the_fastest_may_be_picked_by_time() -> None:
    choose_kernels(RuntimeConfig(exact=False), on_cpu=False)
    assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


# ---- portable


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What torch says of its kernels, to be changed; the environment is put back."""
    for name in PORTABLE:
        monkeypatch.setenv(name, "of the user")
    told = ["AVX2"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: told[0])
    yield told


PORTABLE = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")


def test_portable_kernels_are_asked_of_every_library(capability: list[str]) -> None:
    choose_kernels(RuntimeConfig(), on_cpu=True)
    assert [os.environ[name] for name in PORTABLE] == ["of the user"] * 3
    choose_kernels(RuntimeConfig(portable=True), on_cpu=True)
    assert [os.environ[name] for name in PORTABLE] == ["avx2", "AVX2", "COMPATIBLE"]


LATE = """
import ctypes, pathlib, runpy, sys, torch
runpy.run_path(sys.argv[1], run_name="imported")
from lockstep.launch.accelerator import build_accelerator
from lockstep.settings.config import RuntimeConfig
build_accelerator(RuntimeConfig(portable=True))
torch.ones(64, 64) @ torch.ones(64, 64)
ask = getattr(ctypes.CDLL(pathlib.Path(torch.__file__).parent / "lib/libtorch_cpu.so"), "mkl_serv_cbwr_get", None)
print("no MKL" if ask is None else ask(-1))
"""
MKL_COMPATIBLE = "3"  # MKL_CBWR_COMPATIBLE of its mkl_types.h; 1 is what it chooses by itself


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_mkl_has_chosen_nothing_before_it_is_asked(program: str, tmp_path: Path) -> None:
    """It chooses at its first product: one at an import, or while the accelerator is built, would come too early."""
    done = finish(start([sys.executable, "-c", LATE, str(ROOT / program)], tmp_path), 120)
    if "needs an x86-64 CPU" in done.stderr or "no MKL" in done.stdout:
        pytest.skip("no portable kernels here")
    assert done.stdout.split() == [MKL_COMPATIBLE], done.stderr


@pytest.mark.parametrize("kernels", ["DEFAULT", "AVX512", "SVE256"])
def test_portable_kernels_that_cannot_be_had_are_refused(kernels: str, capability: list[str]) -> None:
    capability[0] = kernels
    with pytest.raises(UserError, match=f"needs an x86-64 CPU with AVX2: torch's kernels here are {kernels}"):
        choose_kernels(RuntimeConfig(portable=True), on_cpu=True)


def test_a_gpu_has_no_portable_kernels(capability: list[str]) -> None:
    with pytest.raises(UserError, match="--runtime.portable=true is for CPUs"):
        choose_kernels(RuntimeConfig(portable=True), on_cpu=False)


def test_an_operation_without_such_a_kernel_is_named() -> None:
    """One that torch has none for on CPUs either."""
    choose_kernels(RuntimeConfig(), on_cpu=True)
    with pytest.raises(UserError, match=r"^put_ has no kernel here.*--runtime\.exact=false") as caught:
        with missing_kernels_explained():
            torch.zeros(4).put_(torch.tensor([1]), torch.tensor([1.0]))
    assert "\n" not in str(caught.value)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="must match"), missing_kernels_explained():
        torch.ones(2) + torch.ones(3)
