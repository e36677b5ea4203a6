"""How a module of another library is recognised, and what runs in place of its methods.

Such a function takes the module and the method's arguments and computes from the module's parameters as they are at
that moment. Where it does not serve a call it returns None, and the method runs as it was. A block hands its attention
module the whole token map, and a `Partition` in the place of a mask: the module is still called, with its hooks and
its wrappers.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor, nn

from ..partition import Partition
from ..partition_attention import partition_attention_qkvpacked

Pair = tuple[int, int]  # (height, width) in tokens


class Unsuitable(Exception):
    """Why a module is left alone."""


@dataclass(frozen=True)
class Recipe:
    """What runs in place of methods of a class of another library.

    Args:
        library: whose class it is, as the report says it.
        name: of the class, with its module; a pattern, as of file names.
        methods: what runs instead, by the method's name in the module or in a part of it ("attn.forward").
        check: what will run, as the report says it; raises `Unsuitable`.
        inputs: some arguments of its forward, tensors of float32 on the CPU, to compare both ways with. It is given a
            copy of the module, of which it may set attributes.
        attention: the attention modules, by name within the module.
        by_name: whether the name tells what forward computes, as that of a library's class does. Else both ways are
            compared before anything is replaced.
    """

    library: str
    name: str
    methods: Mapping[str, Callable]
    check: Callable[[nn.Module], str]
    inputs: Callable[[nn.Module], Iterable[tuple]]
    attention: tuple[str, ...] = ("attn",)
    by_name: bool = True

    def fits(self, kind: type) -> bool:
        return fnmatch.fnmatchcase(f"{kind.__module__}.{kind.__qualname__}", self.name)


def dropout_rate(attn: nn.Module) -> float:
    """Of the attention weights, while they are dropped, which no kernel here does."""
    layer = getattr(attn, "attn_drop", None)
    return getattr(layer, "p", 0.0) if layer is not None else getattr(attn, "attention_dropout", 0.0)


def drops(attn: nn.Module) -> bool:
    """Whether it drops attention weights now."""
    layer = getattr(attn, "attn_drop", attn)
    return (attn.training or layer.training) and dropout_rate(attn) > 0


def on_a_map(forward: Callable) -> Callable:
    """What stands for an attention module's forward: ``forward`` of a whole map where there is a `Partition` instead
    of a mask.
    """

    @wraps(forward)
    def with_partition(attn: nn.Module, x: Tensor, partition: object = None, *_, **__) -> Tensor | None:
        return forward(attn, x, partition) if isinstance(partition, Partition) else None

    return with_partition


# What a check is made of: nothing is replaced unless it has the parts and the sizes that will be relied on.


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Unsuitable(otherwise)


def channels(layer: nn.Module) -> tuple[int, int]:
    """Channels into and out of a linear layer or of a 1 x 1 convolution."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    point = getattr(layer, "kernel_size", None) == (1, 1) and getattr(layer, "groups", None) == 1
    expect(point, f"it has a {type(layer).__name__} where a linear layer is expected")
    return layer.in_channels, layer.out_channels


def check_projections(qkv: nn.Module, proj: nn.Module, heads: int, head_dim: int) -> None:
    (_, out), (into, _), inner = channels(qkv), channels(proj), heads * head_dim
    expect(out == 3 * inner, f"its qkv projection gives {out} channels, expected 3 x {heads} heads x {head_dim}")
    expect(into == inner, f"its output projection takes {into} channels, expected {heads} heads x {head_dim}")
    weight = next(qkv.parameters(), None)
    expect(weight is not None, f"its qkv projection, a {type(qkv).__name__}, has no parameters")
    nothing = weight.detach().new_empty(0, 1, 1, 3, heads, head_dim)
    try:  # whether operators take heads of this size, in this dtype, on this device
        partition_attention_qkvpacked(nothing, Partition(1))
    except RuntimeError as error:
        raise Unsuitable(str(error)) from error


def expect_shape(table: Tensor, expected: tuple[int, ...]) -> None:
    expect(tuple(table.shape) == expected, f"it has a table {list(table.shape)}, expected {list(expected)}")


def check_scale(attn: nn.Module, scale: object, head_dim: int) -> None:
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    expect(number, f"its scale is {scale!r}, expected a number")
    ignored = getattr(attn, "fused_attn", False) and not math.isclose(scale, head_dim**-0.5)
    expect(not ignored, f"its scale is {scale}, which PyTorch's attention inside it does not use")


def check_kind(part: object, *names: str) -> None:
    kinds = [kind.__name__ for kind in type(part).__mro__]
    expect(any(name in kinds for name in names), f"it has a {kinds[0]} where a {' or '.join(names)} is expected")


def check_parts(module: nn.Module, *names: str) -> None:
    """It has no part that the function which replaces its forward does not know of."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    others = sorted({*own, *(name for name, part in module.named_children() if part is not None)} - set(names))
    expect(not others, f"it has {', '.join(others)}, which the published class has not")


def pair_of(value: object, name: str) -> Pair:
    """(height, width), of one int or of two."""
    pair = (value, value) if isinstance(value, int) else value
    fine = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
    expect(fine, f"its {name} is {value!r}, expected an int or two")
    return tuple(pair)


def times(size: Pair) -> str:
    return f"{size[0]} x {size[1]}"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu")


# Attention on a whole map


def packed(qkv: Tensor, heads: int) -> Tensor:  # [B, H, W, 3C] -> [B, H, W, 3, heads, head_dim]
    return qkv.view(*qkv.shape[:-1], 3, heads, -1)


def swin_table(table: Tensor, window: Pair) -> Tensor:  # [(2Gh-1)(2Gw-1), heads] -> [heads, 2Gh-1, 2Gw-1]
    return table.t().unflatten(1, tuple(2 * n - 1 for n in window))


def attend(qkv: Tensor, partition: Partition, bias: Tensor | None, scale: float) -> Tensor:
    """``[B, H, W, 3, heads, head_dim]`` to ``[B, H, W, C]``."""
    return partition_attention_qkvpacked(qkv, partition, bias, scale=scale).flatten(-2)
