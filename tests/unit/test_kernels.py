"""Kernels of the step: fused ones are plain torch's equals, or are not used."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedcunet.quant
from fedcunet.quant import kernels
from fedcunet.quant.agreement import disagreement
from fedcunet.quant.kernels import PLAIN, Kernels, kernels_for

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class WrongCode(Kernels):
    def pack(self, y: Tensor, stored: Tensor, layout: Any, grid: Any = None) -> None:
        super().pack(y, stored, layout, grid)
        if layout.bits == 6:
            stored.view(-1)[-1] += 1


class WrongValue(Kernels):
    def pack(self, y: Tensor, stored: Tensor, layout: Any, grid: Any = None) -> None:
        super().pack(y, stored, layout, None if grid is None else (grid[0] + grid[1], grid[1]))


class WrongPlace(Kernels):
    def unpack(self, stored: Tensor, place: Tensor, *rest: Any, raised: bool) -> None:
        super().unpack(stored, place, *rest, raised=raised)
        if raised:
            place.copy_(place.flip(2))


class WrongFactor(Kernels):
    def activate(self, x: Tensor, shift: Tensor, factor: Tensor, *rest: Any) -> Tensor:
        return super().activate(x, shift, factor * 1.0001, *rest)


class WrongRounding(Kernels):
    def pack(self, y: Tensor, stored: Tensor, layout: Any, grid: Any = None) -> None:
        if grid is not None:
            middle, step = (each[:, None, None] for each in grid)
            y.copy_(((y - middle) / step + 0.5).floor())  # halves go up, not to the even number
        super().pack(y, stored, layout)


class WrongEnd(Kernels):
    def unpack(self, stored: Tensor, place: Tensor, *rest: Any, raised: bool) -> None:
        super().unpack(stored, place, *rest, raised=raised)
        place[:, :, 1000:] = 0


class WrongActivation(Kernels):
    def activate(self, *arguments: Any) -> Tensor:
        return super().activate(*arguments[:5], "relu", *arguments[6:])


class WrongRows(Kernels):
    def activate(self, *arguments: Any) -> Tensor:
        x, padded, above = arguments[0], arguments[3], arguments[4]
        above = above if padded.shape[1] != x.shape[1] + 1 else 1 - above
        return super().activate(*arguments[:4], above, *arguments[5:])


class WrongRange(Kernels):
    def activate(self, *arguments: Any) -> Tensor:
        read = super().activate(*arguments)
        return read if arguments[6] is None else read.clamp(max=1)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (WrongCode, "packed codes of 6 bits"),
        (WrongValue, "codes of 2 bits"),
        (WrongPlace, "unpacked codes of 2 bits"),
        (WrongRounding, "codes of 2 bits"),
        (WrongEnd, "unpacked codes of 2 bits"),
        (WrongFactor, "activation none"),
        (WrongActivation, "activation none"),
        (WrongRows, "activation none"),
        (WrongRange, "what is read"),
    ],
)
def test_kernels_that_differ_from_plain_torch_are_found(wrong: type[Kernels], found: str) -> None:
    assert disagreement(wrong(), CPU, torch.float32) == found
    assert disagreement(PLAIN, CPU, torch.float32) == ""


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are chosen anew, for the CPU as well."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels._kernels_for.cache_clear()
    yield
    kernels._kernels_for.cache_clear()


def no_compiler() -> Kernels:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize(
    ("made", "reason"), [(no_compiler, "RuntimeError: no compiler"), (WrongFactor, "activation")]
)
def test_kernels_that_do_not_work_are_not_used(
    made: Any, reason: str, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = SimpleNamespace(FusedKernels=made)
    monkeypatch.setattr(fedcunet.quant, "fused", fused, raising=False)
    with pytest.warns(UserWarning, match=f"plain torch in place of fused kernels.*{reason}"):
        assert kernels_for(torch.empty(0)) is PLAIN
    assert kernels_for(torch.empty(0)) is PLAIN  # without another word


def test_kernels_that_work_are_used(no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = SimpleNamespace(FusedKernels=Kernels)
    monkeypatch.setattr(fedcunet.quant, "fused", fused, raising=False)
    assert kernels_for(torch.empty(0)) is not PLAIN
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernels_for(torch.empty(0, dtype=torch.float64)) is PLAIN


def test_triton_kernels_agree_with_plain_torch() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    script = """
import torch
from fedcunet.quant.fused import FusedKernels
from fedcunet.quant.agreement import disagreement
for dtype in (torch.float32, torch.float64):
    print(repr(disagreement(FusedKernels(), torch.device("cpu"), dtype)))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["''", "''"], run.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
def test_triton_kernels_compile_for_a_gpu() -> None:
    # The interpreter takes what the compiler refuses; the compiler needs no GPU.
    triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedcunet.quant import fused

    tensors = ("x", "y", "shift", "inverse", "factor", "place", "r", "read")
    numbers = ("inverse_step", "step", "most")

    def compiles(kernel: Any, stored: str = "", **constants: Any) -> bool:
        constants |= {"BLOCK": 1024}
        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(tensors, "*fp32")
        types |= dict.fromkeys(numbers, "fp32") | {"stored": f"*{stored}"}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = fused._OPTIONS
        built = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        return "cubin" in built.asm

    widths = {2: "u8", 4: "u8", 6: "u8", 8: "i8", 16: "i16", 32: "fp32"}
    rounding = fused._ROUND[torch.float32]
    for width, stored in widths.items():
        for either in (False, True):
            assert compiles(fused._unpack, stored, WIDTH=width, RAISED=either)
            assert compiles(fused._pack, stored, WIDTH=width, ENCODED=either, ROUND=rounding)
    for relu in (False, True):
        for read in (False, True):
            assert compiles(fused._activate, RELU=relu, READ=read, ROUND=rounding)
