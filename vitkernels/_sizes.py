"""Arithmetic on sizes that are ints, or symbols of ints while a graph for all sizes is traced.

A Python branch on a symbol would make the graph hold for the size at hand alone. So sizes are computed without
branches, and code takes a shortcut only where `surely` says that it is right for all sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_size(value: object) -> bool:
    """Whether ``value`` is an int, or stands for one in a trace."""
    if type(value) is int:
        return True
    kinds = (int, torch.SymInt, Tensor) if torch.jit.is_tracing() else (int, torch.SymInt)
    return isinstance(value, kinds) and not isinstance(value, bool)


def surely(condition: object) -> bool:
    """Whether a condition on sizes holds; while a graph is traced, whether it holds for all sizes."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition is True


def known(*sizes: int) -> bool:
    """Whether all sizes are numbers, not symbols of a trace."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return all(has_static_value(size) for size in sizes)
    return all(type(size) is int for size in sizes)


def smaller(a: int, b: int) -> int:
    """Minimum of two sizes, without a branch where they are traced."""
    if type(a) is type(b) is int:
        return min(a, b)
    return torch.minimum(*_tensors(a, b)) if torch.jit.is_tracing() else torch.sym_min(a, b)


def larger(a: int, b: int) -> int:
    """Maximum of two sizes, without a branch where they are traced."""
    if type(a) is type(b) is int:
        return max(a, b)
    return torch.maximum(*_tensors(a, b)) if torch.jit.is_tracing() else torch.sym_max(a, b)


def _tensors(*sizes: int | Tensor) -> list[Tensor]:
    """The sizes of `torch.jit.trace`, which are tensors beside ints."""
    return [torch.as_tensor(size) for size in sizes]


def above(size: int, limit: int) -> int:
    """1 where ``size`` is above ``limit``, otherwise 0."""
    return smaller(larger(size - limit, 0), 1)


def divided(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder; ONNX has no remainder of a traced size."""
    quotient = a // b
    return quotient, a - quotient * b


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return (a + b - 1) // b  # not -(-a // b): ONNX divides towards zero
