"""Ahead-of-time compilation without a GPU: a launcher runs on CPU tensors while every launch only compiles.

The launcher itself chooses the arguments, constants, warps and stages: what is compiled is what would be launched.
Triton either interprets or compiles, so that this runs in a process without TRITON_INTERPRET.

python benchmarks/ahead_of_time.py --chip 80 90    whatever a launcher can be asked for, as far as Triton's own language
python benchmarks/ahead_of_time.py --whole          down to machine code, for every chip, which takes long
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import ASTSource
from triton.runtime.jit import JITFunction

CHIPS = (80, 86, 89, 90, 100, 120)  # compute capabilities


class _Enough(Exception):
    """What the compiler would still do is done already, or the same for all variants and slow."""


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


@contextmanager
def chip(capability: int) -> Iterator[None]:
    """Within it, Triton and the launchers find a GPU of the capability, for CPU tensors."""
    from vitkernels import _triton

    with mock.patch.object(triton.runtime.driver, "_active", _Driver(capability)):
        _triton.capability.cache_clear()
        try:
            yield
        finally:
            _triton.capability.cache_clear()


def compile_launches(call: Callable[[], object], capability: int) -> list:
    """The compiled kernels of every launch that ``call`` makes, in order."""
    compiled, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        with suppress(_Enough):
            compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    with chip(capability), mock.patch.object(JITFunction, "run", compile_only):
        call()
    return compiled


class Groups(NamedTuple):
    """Partition attention of a packed projection of three heads, with a bias table, an MLP of a hidden width, or
    nothing.
    """

    group: int  # tokens
    head_dim: int
    dtype: str
    shift: int = 0
    ragged: bool = False
    hidden: int = 0
    residual: bool = False
    biased: bool = True

    def launch(self) -> None:
        """A forward and a backward pass."""
        from vitkernels.partition_attention import kernels

        heads, p, side = 3, self.hidden, 2 * self.group + self.ragged
        qkv = torch.empty(2, side, side, 3, heads, self.head_dim, dtype=getattr(torch, self.dtype))
        bias = torch.empty(heads, 2 * self.group - 1, 2 * self.group - 1) if self.biased and not p else None
        mlp = [torch.empty(shape) for shape in _mlp(p, heads)] if p else []
        inputs = *qkv.unbind(3), bias, mlp, self.residual
        geometry = (self.group, self.group, 1, 1, self.shift, self.shift)
        out, statistic = kernels.partition_attention_forward(*inputs, geometry, 0.2)
        kernels.partition_attention_backward(out, *inputs, statistic, geometry, 0.2)

    @property
    def padding(self) -> float:
        return _real(self.group**2) * _real(self.head_dim)


def _mlp(hidden: int, heads: int) -> list[tuple[int, ...]]:
    """Shapes of the 14 parameters of a position MLP."""
    p = hidden
    return [(p, 2), (p,), *[(p,), (p,), (p, p), (p,)] * 2, (p,), (p,), (heads, p), (heads,)]


def _real(size: int) -> float:
    """The share of the lanes of a tile that stand for something."""
    tile = max(16, triton.next_power_of_2(size))
    return size / tile if tile <= 128 else size / (triton.cdiv(size, 64) * 64)


class Offsets(NamedTuple):
    """The table of a position MLP for groups of so many tokens along an axis."""

    group: int  # tokens
    hidden: int
    heads: int
    residual: bool = False

    def launch(self) -> None:
        """A forward and a backward pass."""
        from vitkernels.position_bias import kernels

        mlp = [torch.empty(shape) for shape in _mlp(self.hidden, self.heads)]
        table = kernels.dynamic_position_bias_forward(mlp, self.residual, self.group, self.group)
        kernels.dynamic_position_bias_backward(table, mlp, self.residual, self.group, self.group)

    @property
    def padding(self) -> float:
        return _real((2 * self.group - 1) ** 2)


class Leaves(NamedTuple):
    """Cluster attention of a packed projection of three heads, in leaves of a tree."""

    tokens: int
    overlap: int
    head_dim: int
    dtype: str
    leaves: int = 64
    check: bool = False

    def launch(self) -> None:
        """A forward and a backward pass."""
        from vitkernels.cluster_attention import kernels

        tokens = self.leaves * self.tokens
        q, k, v = torch.empty(2, tokens, 3, 3, self.head_dim, dtype=getattr(torch, self.dtype)).unbind(2)
        order = torch.empty(2, 3, tokens, dtype=torch.int32)
        out, statistic = kernels.cluster_attention_forward(q, k, v, order, self.tokens, self.overlap, 0.2, self.check)
        kernels.cluster_attention_backward(out, q, k, v, order, statistic, self.tokens, self.overlap, 0.2)

    @property
    def padding(self) -> float:
        return _real(self.tokens) * _real(self.head_dim)


class Maps(NamedTuple):
    """Pooled attention of queries and keys on maps of tokens, with a table for every axis that has a length."""

    q_thw: tuple[int, int, int]
    k_thw: tuple[int, int, int]
    cls: int
    head_dim: int
    dtype: str
    residual: int = 1
    axes: tuple[bool, bool, bool] = (True, True, True)

    def launch(self) -> None:
        """A forward and a backward pass."""
        from vitkernels.pooled_attention import kernels

        tokens = (math.prod(n) + self.cls for n in (self.q_thw, self.k_thw))
        q, k = (torch.empty(2, n, 4, self.head_dim, dtype=getattr(torch, self.dtype)) for n in tokens)
        lengths = [(a, b) if a * b > 1 and has else None for a, b, has in zip(self.q_thw, self.k_thw, self.axes)]
        tables = [n and torch.empty(2 * max(n) - 1, self.head_dim) for n in lengths]
        positions = *tables, *(n and torch.zeros(n, dtype=torch.long) for n in lengths)
        geometry = self.q_thw, self.k_thw, bool(self.cls), self.residual, 0.2
        out, statistic = kernels.pooled_attention_forward(q, k, k, *positions, *geometry)
        kernels.pooled_attention_backward(out, q, k, k, *positions, statistic, *geometry)

    @property
    def padding(self) -> float:
        return _real(self.head_dim)


class Pool(NamedTuple):
    """Pooling of a packed projection of four heads on a map: by weights, the maximum or the average."""

    thw: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    cls: int
    head_dim: int
    dtype: str
    maximum: bool = False
    average: bool = False
    norm: bool = True

    def launch(self) -> None:
        """A forward and a backward pass."""
        from vitkernels.pooled_attention import pool_kernels

        tokens = math.prod(self.thw) + self.cls
        qkv = torch.empty(2, tokens, 3, 4, self.head_dim, dtype=getattr(torch, self.dtype))
        weight = None if self.maximum or self.average else torch.empty(self.head_dim, math.prod(self.kernel))
        norm = [torch.empty(self.head_dim) if self.norm else None for _ in range(2)]
        padding = [n // 2 for n in self.kernel]
        geometry = self.thw, self.kernel, self.stride, padding, self.maximum, bool(self.cls), 1e-6
        x, dx, _ = qkv.unbind(2)
        inputs = x, weight, *norm, *geometry
        out = pool_kernels.pool_tokens_forward(*inputs)
        pool_kernels.pool_tokens_backward(out, *inputs, dx)

    @property
    def padding(self) -> float:
        return 1.0  # parts of 32 elements


EVERYWHERE = {  # on every chip
    "49 tokens, bf16, 32": Groups(7, 32, "bfloat16"),
    "49 tokens, bf16, 32, shifted": Groups(7, 32, "bfloat16", 3),
    "64 tokens, fp16, 64": Groups(8, 64, "float16"),
    "100 tokens, bf16, 32": Groups(10, 32, "bfloat16"),
    "196 tokens, fp16, 64": Groups(14, 64, "float16"),
    "196 tokens, bf16, 96": Groups(14, 96, "bfloat16"),
    "MLP of 12, 3 heads, 49 tokens": Offsets(7, 12, 3),
    "leaves of 49, bf16, 32": Leaves(49, 20, 32, "bfloat16"),
    "leaves of 49, fp16, 64": Leaves(49, 20, 64, "float16"),
    "leaves of 72, bf16, 32": Leaves(72, 20, 32, "bfloat16"),
    "leaves of 72, fp16, 64": Leaves(72, 20, 64, "float16"),
    "3136 queries, 196 keys, bf16, 96": Maps((1, 56, 56), (1, 14, 14), 0, 96, "bfloat16"),
    "1569 queries, 393 keys, bf16, 96": Maps((8, 14, 14), (8, 7, 7), 1, 96, "bfloat16"),
    "pool of 3x3, stride 2, bf16, 96": Pool((1, 56, 56), (1, 3, 3), (1, 2, 2), 0, 96, "bfloat16"),
}
ON_TWO = {  # on sm_80 and sm_90
    "16 tokens, bf16, 32": Groups(4, 32, "bfloat16"),
    "49 tokens, bf16, 32, ragged": Groups(7, 32, "bfloat16", ragged=True),
    "49 tokens, bf16, 32, no bias": Groups(7, 32, "bfloat16", biased=False),
    "100 tokens, bf16, 32, no bias": Groups(10, 32, "bfloat16", biased=False),
    "49 tokens, bf16, 32, MLP of 6": Groups(7, 32, "bfloat16", hidden=6),
    "49 tokens, bf16, 32, MLP of 12": Groups(7, 32, "bfloat16", hidden=12),
    "64 tokens, fp16, 64, shifted": Groups(8, 64, "float16", 4),
    "196 tokens, fp16, 64, ragged": Groups(14, 64, "float16", ragged=True),
    "49 tokens, bf16, 96": Groups(7, 96, "bfloat16"),
    "49 tokens, bf16, 128": Groups(7, 128, "bfloat16"),
    "49 tokens, fp32, 32": Groups(7, 32, "float32"),
    "100 tokens, fp32, 32": Groups(10, 32, "float32"),
    "MLP of 48, 24 heads, 49 tokens": Offsets(7, 48, 24),
    "leaves of 49, bf16, 96": Leaves(49, 20, 96, "bfloat16"),
    "leaves of 49, fp32, 32": Leaves(49, 20, 32, "float32"),
    "leaves of 64, bf16, 32": Leaves(64, 20, 32, "bfloat16"),
    "leaves of 72, bf16, 96": Leaves(72, 20, 96, "bfloat16"),
    "1569 queries, 1569 keys, bf16, 96": Maps((8, 14, 14), (8, 14, 14), 1, 96, "bfloat16"),
    "8001 queries, 2001 keys, bf16, 72": Maps((20, 20, 20), (20, 10, 10), 1, 72, "bfloat16"),
    "1569 queries, 1569 keys, bf16, 32": Maps((8, 14, 14), (8, 14, 14), 1, 32, "bfloat16"),
    "784 queries, 196 keys, fp16, 64": Maps((1, 28, 28), (1, 14, 14), 0, 64, "float16"),
    "784 queries, 196 keys, bf16, 128": Maps((1, 28, 28), (1, 14, 14), 0, 128, "bfloat16"),
    "196 queries, 196 keys, fp32, 96": Maps((1, 14, 14), (1, 14, 14), 0, 96, "float32"),
    "pool of 3x3, stride 1, fp16, 64": Pool((1, 56, 56), (1, 3, 3), (1, 1, 1), 0, 64, "float16"),
    "pool of 3x3, stride 4, fp32, 96": Pool((1, 56, 56), (1, 3, 3), (1, 4, 4), 0, 96, "float32"),
    "pool of 3x3x3, stride 2, bf16, 96": Pool((8, 56, 56), (3, 3, 3), (1, 2, 2), 1, 96, "bfloat16"),
    "pool of 3x3x3, stride 8, bf16, 96, maximum": Pool((8, 56, 56), (3, 3, 3), (1, 8, 8), 1, 96, "bfloat16", True),
}


def cases(capability: int) -> dict[str, NamedTuple]:
    """What is compiled for a chip."""
    return EVERYWHERE | (ON_TWO if capability in (80, 90) else {})


def _with_dtypes(*options: tuple) -> Iterator[tuple]:
    """All combinations, each with a dtype: by the parity of their places, so that every option meets both."""
    for choices in itertools.product(*map(enumerate, options)):
        places, values = zip(*choices)
        yield *values, ("float32", "bfloat16")[sum(places) % 2]


def variants() -> Iterator[NamedTuple]:
    """Every form of every launcher, on small tiles."""
    switch = (False, True)
    for biased, shift, ragged, dtype in _with_dtypes(switch, (0, 2), switch):
        yield Groups(4, 16, dtype, shift, ragged, biased=biased)
        yield Groups(9, 16, dtype, shift, ragged, biased=biased)  # streamed
    for residual, shift, ragged, dtype in _with_dtypes(switch, (0, 2), switch):
        yield Groups(4, 16, dtype, shift, ragged, hidden=6, residual=residual)
    for hidden, residual in itertools.product((6, 48), switch):
        yield Offsets(4, hidden, 3, residual)
    for tokens, overlap, leaves, dtype in _with_dtypes((16, 72), (0, 4), (1, 8)):
        yield Leaves(tokens, overlap, 16, dtype, leaves, check=overlap > 0)
    for residual, cls, positions, dtype in _with_dtypes((0, 1, 2), (0, 1), switch):
        yield Maps((2, 8, 8), (2, 4, 4), cls, 16, dtype, residual, (positions,) * 3)
    for t, y, x, dtype in _with_dtypes(switch, switch, switch):
        yield Maps((2, 8, 8), (2, 4, 4), 0, 16, dtype, axes=(t, y, x))
    yield Maps((1, 80, 80), (1, 80, 80), 0, 16, "bfloat16")  # columns in two parts
    for kind, cls, norm, stride, dtype in _with_dtypes(("", "maximum", "average"), (0, 1), switch, (1, 2)):
        chosen = {kind: True} if kind else {}
        yield Pool((2, 8, 8), (1, 3, 3), (1, stride, stride), cls, 16, dtype, norm=norm, **chosen)
    yield Pool((2, 8, 8), (1, 1, 11), (1, 1, 1), 0, 72, "bfloat16")  # taps and elements in parts


LAUNCHERS = ("partition_attention.kernels", "position_bias.kernels", "cluster_attention.kernels")
LAUNCHERS += ("pooled_attention.kernels", "pooled_attention.pool_kernels")


def _launchers() -> dict[str, tuple[object, dict[str, str]]]:
    """The module and the schema's options, with their types, of every operator that has Triton kernels."""
    modules = [importlib.import_module(f"vitkernels.{name}") for name in LAUNCHERS]
    found = {}
    for qualified in torch._C._dispatch_get_all_op_names():
        space, _, name = qualified.partition("::")
        if space != "vitkernels" or not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
            continue
        (module,) = (module for module in modules if hasattr(module, name))
        arguments = getattr(torch.ops.vitkernels, name).default._schema.arguments
        found[name] = module, {a.name: str(a.type) for a in arguments}
    return found


def compile_variants(chips: Sequence[int], whole: bool) -> dict[str, object]:
    """The variants that the compiler refuses, and the options of operators that no variant asks for.

    ``whole``: down to machine code. Otherwise as far as the front end, which makes the same of a source for all chips
    and settings; ``sources`` counts what it made.
    """
    refused, seen, launchers, make_ir, known = {}, defaultdict(set), _launchers(), ASTSource.make_ir, set()

    def make_once(source: ASTSource, target: GPUTarget, options: object, *rest: object) -> object:
        if source.hash() in known:
            raise _Enough
        made = make_ir(source, target, options, *rest)
        known.add(source.hash())
        return made

    def recorded(name: str, options: dict[str, str], launcher: Callable) -> Callable:
        def call(*values):
            for option, value in zip(options, values, strict=True):
                seen[f"{name}: {option}"].add(value if isinstance(value, bool) else value is None)
            return launcher(*values)

        return call

    with ExitStack() as stack:
        if not whole:
            stack.enter_context(triton.knobs.compilation.scope())
            triton.knobs.compilation.always_compile = True  # or a kernel that the cache has would not count
            stack.enter_context(mock.patch.object(ASTSource, "make_ir", make_once))
            stack.enter_context(mock.patch.object(CUDABackend, "make_ttgir", side_effect=_Enough))
        for name, (module, options) in launchers.items():
            stack.enter_context(mock.patch.object(module, name, recorded(name, options, getattr(module, name))))
        for capability, variant in itertools.product(chips, variants()):
            try:
                compile_launches(variant.launch, capability)
            except Exception as error:
                refused[f"sm_{capability} {variant}"] = f"{type(error).__name__}: {error}".strip()
    switches = {
        f"{name}: {option}"
        for name, (_, options) in launchers.items()
        for option, kind in options.items()
        if kind == "bool" or kind.startswith("Optional")
    }
    unasked = sorted(option for option in switches if seen[option] != {False, True})
    about = {"launchers": len(launchers), "switches": len(switches), "sources": len(known)}
    return about | {"refused": refused, "unasked": unasked}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/ahead_of_time.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--chip",
        type=int,
        nargs="+",
        choices=CHIPS,
        default=CHIPS,
        help="compute capabilities (all of them)",
    )
    parser.add_argument("--whole", action="store_true", help="down to machine code")
    args = parser.parse_args()
    found = compile_variants(args.chip, args.whole)
    print(json.dumps(found, indent=1))
    return int(bool(found["refused"]))


if __name__ == "__main__":
    raise SystemExit(main())
