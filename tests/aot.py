"""Ahead-of-time compilation without a GPU: a launcher runs on CPU tensors while every launch only compiles.

The launcher itself chooses the arguments, constants, warps and stages: what is compiled is what would be launched. Run
as a program, in a process of its own (Triton either interprets or compiles), it prints what the kernels of a chip take.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _Driver:
    """Stands for a driver: there is a device of the given capability, and nothing runs on it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(call: Callable[[], object], capability: int) -> list:
    """The compiled kernels of every launch that ``call`` makes, in order."""
    compiled, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    driver = mock.patch.object(triton.runtime.driver, "_active", _Driver(capability))
    with driver, mock.patch.object(JITFunction, "run", compile_only):
        call()
    return compiled


def resources(kernel) -> dict[str, int]:
    """Registers of a thread, bytes it spills, KiB of shared memory of a block, and loads of 16 bytes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text.stdout)}
    loads, stores = (
        re.findall(rf"tt\.{access} (%\w+).*64x64x!tt\.ptr<f32>", kernel.asm["ttgir"]) for access in ("load", "store")
    )
    wide = re.findall(r"ld\.global\.v4|cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", kernel.asm["ptx"])
    return dict(
        warps=kernel.metadata.num_warps,
        registers=found["REG"],
        spilled=found["STACK"],
        shared=-(-kernel.metadata.shared // 1024),
        wide=len(wide),
        own=bool(stores)
        and set(stores) <= set(loads),  # one pointer, and so one layout, loads and stores the program's tile
    )


class Case(NamedTuple):
    """A packed projection of three heads, with a bias table, or an MLP of a hidden width."""

    group: int
    head_dim: int
    dtype: str
    shift: int = 0
    ragged: bool = False
    hidden: int = 0


def attention(case: Case) -> Callable[[], object]:
    """A forward and a backward of partition attention."""
    from vitkernels.partition_attention import kernels

    heads, p, side = 3, case.hidden, 2 * case.group + case.ragged
    qkv = torch.empty(2, side, side, 3, heads, case.head_dim, dtype=getattr(torch, case.dtype))
    bias = None if p else torch.empty(heads, 2 * case.group - 1, 2 * case.group - 1)
    shapes = [(p, 2), (p,), *[(p,), (p,), (p, p), (p,)] * 2, (p,), (p,), (heads, p), (heads,)] if p else []
    geometry = (case.group, case.group, 1, 1, case.shift, case.shift)

    def call() -> None:
        inputs = *qkv.unbind(3), bias, [torch.empty(shape) for shape in shapes], False
        out, statistic = kernels.partition_attention_forward(*inputs, *geometry, 0.2)
        kernels.partition_attention_backward(out, *inputs, statistic, *geometry, 0.2)

    return call


class Leaves(NamedTuple):
    """A packed projection of three heads, in leaves of a tree."""

    tokens: int
    overlap: int
    head_dim: int
    dtype: str


def clusters(case: Leaves) -> Callable[[], object]:
    """A forward and a backward of cluster attention."""
    from vitkernels.cluster_attention import kernels

    qkv = torch.empty(2, 64 * case.tokens, 3, 3, case.head_dim, dtype=getattr(torch, case.dtype))
    order = torch.empty(2, 3, 64 * case.tokens, dtype=torch.int32)

    def call() -> None:
        q, k, v = qkv.unbind(2)
        out, statistic = kernels.cluster_attention_forward(q, k, v, order, case.tokens, case.overlap, 0.2, False)
        kernels.cluster_attention_backward(out, q, k, v, order, statistic, case.tokens, case.overlap, 0.2)

    return call


class Maps(NamedTuple):
    """Queries and keys on maps of tokens, with a table for every axis that has a length."""

    q_thw: tuple[int, int, int]
    k_thw: tuple[int, int, int]
    cls: int
    head_dim: int
    dtype: str


def pooled(case: Maps) -> Callable[[], object]:
    """A forward and a backward of pooled attention."""
    from vitkernels.pooled_attention import kernels

    dtype = getattr(torch, case.dtype)
    q, k = (torch.empty(2, math.prod(n) + case.cls, 4, case.head_dim, dtype=dtype) for n in (case.q_thw, case.k_thw))
    lengths = [(a, b) if a * b > 1 else None for a, b in zip(case.q_thw, case.k_thw)]
    tables = [n and torch.empty(2 * max(n) - 1, case.head_dim) for n in lengths]
    positions = *tables, *(n and torch.zeros(n, dtype=torch.long) for n in lengths)
    geometry = *case[:2], bool(case.cls), 1, 0.2

    def call() -> None:
        out, statistic = kernels.pooled_attention_forward(q, k, k, *positions, *geometry)
        kernels.pooled_attention_backward(out, q, k, k, *positions, statistic, *geometry)

    return call


class Pool(NamedTuple):
    """A packed projection of four heads on a map, pooled with a norm: a convolution, or the maximum."""

    thw: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    cls: int
    head_dim: int
    dtype: str
    maximum: bool = False


def pools(case: Pool) -> Callable[[], object]:
    """A forward and a backward of the pooling of tokens."""
    from vitkernels.pooled_attention import pool_kernels

    qkv = torch.empty(2, math.prod(case.thw) + case.cls, 3, 4, case.head_dim, dtype=getattr(torch, case.dtype))
    weight = None if case.maximum else torch.empty(case.head_dim, math.prod(case.kernel))
    padding = [n // 2 for n in case.kernel]
    geometry = case.thw, case.kernel, case.stride, padding, case.maximum, bool(case.cls), 1e-6

    def call() -> None:
        x, dx, _ = qkv.unbind(2)
        inputs = x, weight, torch.empty(case.head_dim), torch.empty(case.head_dim), *geometry
        out = pool_kernels.pool_tokens_forward(*inputs)
        pool_kernels.pool_tokens_backward(out, *inputs, dx)

    return call


KINDS = {"leaves": (clusters, Leaves), "keys": (pooled, Maps), "pool": (pools, Pool)}  # by a word of the name

if __name__ == "__main__":
    capability, cases = int(sys.argv[1]), json.loads(sys.argv[2])
    found = {}
    for name, case in cases.items():
        build, kind = next((pair for word, pair in KINDS.items() if word in name), (attention, Case))
        found[name] = {}
        for kernel in compile_launches(build(kind(*case)), capability):  # the most that any launch of a kernel takes
            taken = found[name].setdefault(kernel.name.strip("_"), {})
            taken.update({key: max(n, taken.get(key, 0)) for key, n in resources(kernel).items()})
    print(json.dumps(found))
