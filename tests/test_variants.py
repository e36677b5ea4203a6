"""What every variant of the kernels must compile to, whatever the version of Triton."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vitkernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
ROOT = Path(__file__).parents[1]


def test_every_variant_compiles():
    """Every option of the registered operators, given and left out, for all chips, as far as the front end.

    `make variants` does so with several versions of the compiler.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "benchmarks" / "ahead_of_time.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["launchers"] == 10 and found["switches"] > 30 and found["sources"] > 400
    assert found["unasked"] == [], "give `variants` in benchmarks/ahead_of_time.py what asks for these options"
    assert found["refused"] == {}


EXPONENTS = r"""
import re, sys
import ahead_of_time as a

thw = 1, 4, 4
cases = [a.Maps(thw, thw, 0, 16, "float32"), a.Maps(thw, thw, 0, 16, "bfloat16", axes=(0, 0, 0))]
cases += [a.Leaves(16, 4, 16, "float32"), a.Leaves(72, 4, 16, "bfloat16")]
cases += [a.Groups(4, 16, "bfloat16"), a.Groups(9, 16, "float32"), a.Groups(9, 16, "bfloat16", biased=False)]
for kernel in (kernel for case in cases for kernel in a.compile_launches(case.launch, 80)):
    ptx = kernel.asm["ptx"]
    made_by = {name: operation for operation, name in re.findall(r"([a-z0-9.]+)\s+(%r\d+),", ptx)}
    for exponent in re.findall(r"ex2\.approx(?:\.ftz)?\.f32\s+%r\d+, (%r\d+)", ptx):
        print(made_by[exponent].split(".")[0], kernel.metadata.name)
"""


def test_no_exponent_of_a_weight_is_a_multiply_add():
    """A logit minus itself is 0 only where the difference is taken of rounded numbers, and forward and backward agree
    on weights only where all take it alike.
    """
    paths = [str(ROOT / "benchmarks"), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", EXPONENTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert len({name for _, name in found}) >= 11 and {operation for operation, _ in found} <= {"sub", "mul"}, found


def jitted() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in (ROOT / "vitkernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                yield f"{path.name}: {node.name}", node


def test_nothing_follows_a_branch_that_returns():
    """Triton compiles what stands behind `if FLAG: return`, also where the flag is known and holds."""
    functions, behind = list(jitted()), []
    for name, function in functions:
        bodies = (node.body for node in ast.walk(function) if isinstance(node, (ast.FunctionDef, ast.For, ast.If)))
        branches = (statement for body in bodies for statement in body[:-1] if isinstance(statement, ast.If))
        behind += [name for branch in branches if any(isinstance(node, ast.Return) for node in ast.walk(branch))]
    assert len(functions) > 80 and behind == []


@pytest.mark.parametrize(
    "capability, version, expected",
    [
        *((80, "3.6.0", False), (90, "3.6.0", True), (90, "3.7.0", True), (100, "3.6.0", True), (120, "3.6.0", False)),
        *((90, "3.7.1", False), (100, "3.8.0+git1234567", False), (110, "3.10.0", False)),
    ],
)
def test_no_prefetch_where_the_compiler_sets_no_fence(monkeypatch, capability, version, expected):
    from vitkernels import _triton

    launched = {}
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "capability", lambda device: capability)
    kernel = {(1,): lambda *arguments, **settings: launched.update(settings)}
    _triton.launch(kernel, 1, torch.device("cpu"), num_stages=3)
    assert (launched["num_stages"] == 1) == expected


@pytest.mark.parametrize(
    "version, expected", [("3.6.0", "prefetch is off on an H200; 3.7.1 or later has it"), ("3.7.1", "")]
)
def test_info_says_so(monkeypatch, version, expected):
    monkeypatch.setattr(triton, "__version__", version)
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "an H200")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    said = vitkernels.info()["triton"]
    assert said.endswith(expected) and ("prefetch" in said) == bool(expected)


PTX = {  # what stands between copies and products: whether a fence is missing
    "cp.async.ca.shared.global; cp.async.wait_group 0; bar.sync 0; wgmma.mma_async.sync.aligned.m64n64k16": True,
    "cp.async.wait_group 0; bar.sync 0; fence.proxy.async.shared::cta; wgmma.mma_async.sync.aligned.m64n64k16": False,
    "fence.proxy.async.shared::cta; cp.async.wait_group 0; tcgen05.mma.cta_group::1.kind::f16": True,
    "cp.async.wait_group 0; mma.sync.aligned.m16n8k16": False,
    "st.shared; fence.proxy.async.shared::cta; tcgen05.mma.cta_group::1.kind::f16": False,
}


@pytest.mark.parametrize("ptx, expected", PTX.items())
def test_a_missing_fence_is_seen(monkeypatch, ptx, expected):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module("kernel_report").unfenced(ptx.replace("; ", ";\n")) == expected


class _Kernel:
    """Stands for a kernel of Triton's: what it compiled, and what the compiled kernels were started with."""

    arg_names = ["rows", "count", "scale", "BLOCK"]

    def __init__(self) -> None:
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.compiled.append((grid, arguments, keywords)) or _Compiled(self)


class _Compiled:
    def __init__(self, kernel: _Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.started.append((grid, arguments))


def _launch(kernel: _Kernel, programs: int = 3, x=None, strides=(4, 1), count=1, scale=0.5, **settings) -> tuple:
    from vitkernels import _triton

    rows = torch.zeros(8) if x is None else x, *strides
    keywords = dict(num_warps=4, BLOCK=tl.constexpr(32), scale=scale, count=count) | settings
    _triton.launch(kernel, programs, torch.device("cpu"), rows, **keywords)
    return rows


def test_a_launch_alike_goes_straight_to_the_compiled_kernel():
    kernel = _Kernel()
    _launch(kernel)
    rows = _launch(kernel, 5, torch.ones(8))
    ((grid, arguments),) = kernel.started
    assert len(kernel.compiled) == 1 and grid == (5, 1, 1)
    assert arguments[0] is rows and arguments[1:3] == (1, 0.5) and arguments[3].value == 32


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(8, dtype=torch.float16)},
        {"x": torch.zeros(9)[1:]},  # not aligned
        {"strides": (4, 2)},
        {"strides": (4, 1, 1)},
        {"strides": (4, None)},
        {"count": 17},
        {"scale": 1},
        {"scale": 0.25},  # it may be a constant
        {"count": True},
        {"BLOCK": tl.constexpr(64)},
        {"num_warps": 8},
        {"num_stages": 2},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_launch_that_is_not_alike_is_compiled(other):
    kernel = _Kernel()
    _launch(kernel)
    _launch(kernel, **other)
    assert len(kernel.compiled) == 2 and not kernel.started
