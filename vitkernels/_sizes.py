"""Arithmetic on sizes: ints, or what stands for them while a graph is traced that shall serve all sizes.

A branch on a traced size holds for the size at hand alone. So sizes are computed without branches, and a shortcut is
taken where `surely` says that it is the right way for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_size(value: object) -> bool:
    kinds = (int, torch.SymInt, Tensor) if torch.jit.is_tracing() else (int, torch.SymInt)
    return isinstance(value, kinds) and not isinstance(value, bool)


def surely(condition: object) -> bool:
    """Whether a condition holds: an int's, or a traced size's for all its values."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition is True


def known(*sizes: int) -> bool:
    """Whether sizes are numbers; not so those that a graph is traced for."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return all(has_static_value(size) for size in sizes)
    return all(type(size) is int for size in sizes)


def smaller(a: int, b: int) -> int:
    if type(a) is type(b) is int:
        return min(a, b)
    return torch.minimum(*_tensors(a, b)) if torch.jit.is_tracing() else torch.sym_min(a, b)


def larger(a: int, b: int) -> int:
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
    return (a + b - 1) // b  # not -(-a // b): ONNX divides towards zero
