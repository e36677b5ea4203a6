"""How a module of another library is recognised, and what runs in place of its methods.

Such a function takes the module and the method's arguments and computes from the module's parameters as they are at
that moment. Where it does not serve a call it returns None, and the method runs as it was. A block hands its attention
module the whole token map, and a `Partition` in the place of a mask: the module is still called, with its hooks and
its wrappers.

Two rules keep the results those of the original. A function calls the parts that the original calls, and reads the
parameters that the original reads; if it reads where the original calls, it serves only parts that are `readable`.
A buffer that the original reads is either read here too, or compared with its formula before anything is replaced.
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._layer import as_made
from ..partition import Partition
from ..partition_attention import partition_attention_qkvpacked
from ..partition_attention.reference import relative_position_index

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
    """Rate at which attention weights are dropped in training, which no kernel here does."""
    layer = getattr(attn, "attn_drop", None)
    return getattr(layer, "p", 0.0) if layer is not None else getattr(attn, "attention_dropout", 0.0)


def drops(attn: nn.Module) -> bool:
    """Whether ``attn`` drops attention weights now."""
    return dropout_rate(attn) > 0 and (attn.training or getattr(attn, "attn_drop", attn).training)


def on_a_map(forward: Callable) -> Callable:
    """The replacement of an attention module's forward. It runs ``forward`` on a whole map if it is given a `Partition`
    in the place of a mask, and leaves other calls to the module.
    """

    @wraps(forward)
    def with_partition(attn: nn.Module, x: Tensor, partition: object = None, *_, **__) -> Tensor | None:
        return forward(attn, x, partition) if isinstance(partition, Partition) else None

    with_partition.on_a_map = True
    return with_partition


# PyTorch's wrappers that hand their arguments on: where each keeps what it wraps.
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
# Parts of an attention module that a kernel replaces, and the classes that it can replace.
_REPLACED = {"softmax": (nn.Softmax,), "attn_drop": (nn.Dropout, nn.Identity)}


def takes_maps(attn: nn.Module) -> bool:
    """Whether ``attn``, called with a map and a `Partition`, computes what its own forward does group by group.

    It does while it, or the module in a wrapper of PyTorch's, runs a function of `on_a_map`, drops no attention weights
    and has no hooks on the parts that the kernel replaces. Else a block has to run its own method.
    """
    while not _runs_on_a_map(attn):
        attn = next((attn._modules[name] for name in _WRAPPED if name in attn._modules), None)
        if attn is None:
            return False
    if drops(attn) or unusual(attn):
        return False
    parts = attn._modules
    return silent(parts.get("softmax"), parts.get("attn_drop"), parts.get("rel_pos"))


def unusual(attn: nn.Module) -> str | None:
    """Name of a part of an attention module that no kernel can replace, if there is one."""
    for name, kinds in _REPLACED.items():
        if name in attn._modules and type(attn._modules[name]) not in kinds:
            return name
    return None


def silent(*parts: nn.Module | None) -> bool:
    """Whether ``parts`` may stay uncalled: they have no hooks and no forward of their own that would act."""
    for part in parts:  # a loop costs less than `all` at every call
        if part is not None and not as_made(part):
            return False
    return True


def _runs_on_a_map(attn: nn.Module) -> bool:
    forward = attn.__dict__.get("forward")
    return isinstance(forward, partial) and len(forward.args) > 0 and getattr(forward.args[0], "on_a_map", False)


def known(x: Tensor) -> bool:
    """Whether ``x`` has values that can be read now, while nothing is traced or captured."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


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


def expect_values(name: str, buffer: Tensor | None, expected: Tensor | None, of: str) -> None:
    """Raise `Unsuitable` unless ``buffer`` has the values of its formula. A meta tensor has no values and passes."""
    if buffer is None or expected is None:
        return expect(buffer is expected, f"its {name} is {'missing' if buffer is None else 'set'}, unlike {of}")
    if known(buffer):
        same = buffer.shape == expected.shape and torch.equal(buffer, expected.to(buffer.dtype))
        expect(same, f"its {name} has other values than {of}")


def check_index(part: nn.Module, group: Pair) -> None:
    """Raise `Unsuitable` unless pairs of tokens take the row of their offset, query minus key, from its table."""
    index = getattr(part, "relative_position_index", None)
    if index is None:
        return
    rows = relative_position_index(group, index.device)
    expect_values("relative_position_index", index.flatten(), rows.flatten(), f"groups of {times(group)} have")


def check_scale(attn: nn.Module, scale: object, head_dim: int) -> None:
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    expect(number, f"its scale is {scale!r}, expected a number")
    ignored = getattr(attn, "fused_attn", False) and not math.isclose(scale, head_dim**-0.5)
    expect(not ignored, f"its scale is {scale}, which PyTorch's attention inside it does not use")


def is_kind(part: object, *names: str) -> bool:
    """Whether the class of ``part``, or one that it derives from, has one of these names."""
    return any(kind.__name__ in names for kind in type(part).__mro__)


def check_kind(part: object, *names: str) -> None:
    expect(is_kind(part, *names), f"it has a {type(part).__name__} where a {' or '.join(names)} is expected")


def check_methods(part: nn.Module, besides: tuple[str, ...] = ("forward",)) -> None:
    """Raise `Unsuitable` if the instance overrides a method of its class, which replaced methods may call."""
    for name in vars(part).keys() - set(besides):
        own = getattr(type(part), name, None)
        theirs = inspect.isfunction(own) and not own.__module__.startswith("torch.nn.")
        expect(not theirs, f"its {name} was replaced by something else before")


def check_parts(module: nn.Module, *names: str) -> None:
    """Raise `Unsuitable` if ``module`` has parts besides ``names``: what replaces its forward does not know of them."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    others = sorted({*own, *(name for name, part in module.named_children() if part is not None)} - set(names))
    expect(not others, f"it has {', '.join(others)}, which the published class has not")


def pair_of(value: object, name: str) -> Pair:
    """(height, width), of one int or of two."""
    pair = (value, value) if isinstance(value, int) else value
    fine = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
    expect(fine, f"its {name} is {value!r}, expected an int or two")
    return tuple(pair)


def check_int(value: object, name: str) -> None:
    """Raise `Unsuitable` unless ``value`` is one int, which published files have for both axes."""
    axes = len(value) if isinstance(value, (tuple, list)) else 0
    more = f", and no kernel here is for windows of {axes} axes" if axes > 2 else ""
    expect(isinstance(value, int), f"its {name} is {value!r} where the published class has an int{more}")


def times(size: Pair) -> str:
    return f"{size[0]} x {size[1]}"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu")


# Attention on a whole map


def shift_mask(partition: Partition, height: int, width: int, like: Tensor) -> Tensor:  # [windows, N, N]
    """Swin's mask: -100 between tokens that only the shift brought together, which is what the operator adds.

    A map of 2 x 2 windows has all kinds: inside, at the right border, at the lower one, at both.
    """
    (h, w), device = partition.group, like.device
    wrapped = partition.on(2 * h, 2 * w).wrapped(2 * h, 2 * w, device)  # [4, N, 2]
    kinds = (wrapped[:, :, None] != wrapped[:, None]).any(-1).to(like.dtype) * -100.0
    lower, right = (torch.arange(g, n + 1, g, device=device) == n for n, g in ((height, h), (width, w)))
    return kinds[(2 * lower[:, None] + right).flatten()]


# mask -> its memory and version, the partition and the map that it was compared for, and whether it is theirs
_COMPARED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_shift_mask(mask: object, partition: Partition, height: int, width: int) -> bool:
    """Whether ``mask`` is known to equal `shift_mask`. A mask that all blocks of a stage share is compared once."""
    if not isinstance(mask, Tensor) or not known(mask) or not mask.is_floating_point() or mask.requires_grad:
        return False
    # changes of inference tensors leave no trace: those are compared at every call
    key = None if mask.is_inference() else (mask.data_ptr(), mask._version, partition, height, width)
    before, same = _COMPARED.get(mask, (None, False))
    if key is None or key != before:
        expected = shift_mask(partition, height, width, mask)
        same = mask.shape == expected.shape and torch.equal(mask, expected)
        if key is not None:
            _COMPARED[mask] = key, same
    return same


def packed(qkv: Tensor, heads: int) -> Tensor:  # [B, H, W, 3C] -> [B, H, W, 3, heads, head_dim]
    return qkv.view(*qkv.shape[:-1], 3, heads, -1)


def attend(qkv: Tensor, partition: Partition, bias: Tensor | None, scale: float) -> Tensor:
    """``[B, H, W, 3, heads, head_dim]`` to ``[B, H, W, C]``."""
    return partition_attention_qkvpacked(qkv, partition, bias, scale=scale).flatten(-2)
