"""Checks of the public functions: each says what was expected, what came and what to do."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from ._sizes import is_size

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape_of(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def shown(value: object) -> str:
    """``value`` as a message shows it: a tensor by its shape, a long one cut."""
    return f"a Tensor {shape_of(value)}" if isinstance(value, Tensor) else reprlib.repr(value)


def check_tensor(name: str, x: object, layout: str) -> None:
    """``x`` is a floating-point tensor with as many dimensions as ``layout`` ("[B, H, W, C]") names."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(x).__name__}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must be {layout}, got {x.dim()} dimensions: {shape_of(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}; convert it with to_dense()")
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} must be one of {allowed}, got {str(x.dtype).removeprefix('torch.')}; convert it first")


def check_packed(qkv: object, layout: str) -> None:
    """``qkv`` is a fused projection viewed as ``layout``, "[..., 3, heads, head_dim]"."""
    check_tensor("qkv", qkv, layout)
    if qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv must be {layout}, got {shape_of(qkv)} with {qkv.shape[-3]} where 3 is expected; "
            f"view the projection's output as ({layout.strip('[]')})"
        )


_Public = TypeVar("_Public", bound=Callable)


def takes_packed(function: _Public) -> _Public:
    """``function(qkv, ...)`` with an error that says what to do with further arguments by position, as q, k and v."""
    parameters = inspect.signature(function).parameters.values()
    by_position = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @wraps(function)
    def checked(*args, **kwargs):
        if len(args) > len(by_position):
            raise TypeError(
                f"{function.__name__} takes {', '.join(by_position)} by position and the rest by name, got {len(args)} "
                "arguments by position. qkv is a single tensor, torch.stack((q, k, v), -3); sizes are given by name"
            )
        return function(*args, **kwargs)

    return checked


def check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v agree in shape, dtype and device."""
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"q, k and v must have one shape, got q {shape_of(q)} and {name} {shape_of(x)}")
    check_one_kind(q, k, v)


def check_one_kind(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v agree in dtype and device."""
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}; convert one of them"
            )
        check_device("q", q, name, x)


def check_device(first: str, x: Tensor, second: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(
            f"{first} and {second} must be on one device, got {x.device} and {y.device}; move one with .to()"
        )


def check_table(bias: object, q: Tensor, group: tuple[int, int]) -> None:
    """``bias`` is a relative position table for q's heads and ``group``."""
    layout = "[heads, 2 * group_h - 1, 2 * group_w - 1]"
    if isinstance(bias, int):
        raise TypeError(f"bias must be a torch.Tensor {layout} or None, got {bias}; sizes are given by name")
    heads, sides = q.shape[-2], tuple(2 * n - 1 for n in group)
    if isinstance(bias, Tensor) and tuple(bias.shape) != (heads, *sides):
        hint = _other_bias(tuple(bias.shape), heads, sides, group)
        raise ValueError(
            f"bias must be {layout} = {[heads, *sides]} for {heads} heads and groups of {group[0]} x {group[1]} "
            f"tokens, got {shape_of(bias)}{hint}"
        )
    check_tensor("bias", bias, layout)
    check_device("q", q, "bias", bias)


def _other_bias(shape: tuple[int, ...], heads: int, sides: tuple[int, int], group: tuple[int, int]) -> str:
    """Advice on a bias in another layout that is in use, for the end of a message."""
    if shape == (math.prod(sides), heads):
        return f", which is how Swin stores it: bias.t().unflatten(1, {sides})"
    if shape == (heads, math.prod(sides)):
        return f": bias.unflatten(1, {sides})"
    if shape[-2:] == (math.prod(group),) * 2:
        return "; that is a bias for each pair of tokens, expected one for each offset, query minus key"
    return ""


def check_ints(**values: object) -> None:
    """Sizes of a layer, by name, are ints."""
    for name, value in values.items():
        if not is_size(value):
            raise TypeError(f"{name} must be an int, got {shown(value)}")


def check_sizes(**values: object) -> None:
    """Sizes of a layer or a model, by name, are ints of at least 1."""
    check_ints(**values)
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_numbers(**values: object) -> None:
    """Rates and ratios of a model, by name, are finite numbers."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def check_scale(scale: object, head_dim: int) -> float:
    """``scale`` as a float; None is head_dim ** -0.5."""
    if head_dim == 0:
        raise ValueError("head_dim must be at least 1, got 0")
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None (head_dim ** -0.5), got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def _has_autocast(kind: str) -> bool:
    """True if devices of this kind have autocast. A traced graph cannot ask PyTorch, at least in 2.11."""
    return kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)


def follow_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device in the dtype that autocast asks for on it; float64 stays."""
    kind = tensors[0].device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Within it, operations on ``device`` keep the dtype of their inputs."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What logits, bias and sums are held in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
