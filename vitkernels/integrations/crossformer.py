"""CrossFormer and CrossFormer++ (Wang et al., ICLR 2022, TPAMI 2024), as their authors write them.

The block of the first classification code spreads a group over the map, that of the first detection code takes every
interval-th token, and that of CrossFormer++ has groups of fixed size and interval. What they pad they mask, as the
operator does with places outside the map.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .._layer import bias_from_table
from ..partition import Partition
from ..position_bias import dynamic_position_bias
from ..position_bias.module import parameters_of, readable_mlp
from .recipe import (
    Pair,
    Recipe,
    attend,
    check_index,
    check_kind,
    check_parts,
    check_projections,
    check_scale,
    expect,
    expect_values,
    on_a_map,
    packed,
    pair_of,
    random,
    silent,
    takes_maps,
    times,
)


@on_a_map
def _attention(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    bias = None
    if attn.position_bias:
        bias = _bias(attn.pos, partition.on(*x.shape[1:3]).group, x)
    return attn.proj_drop(attn.proj(attend(packed(attn.qkv(x), attn.num_heads), partition, bias, attn.scale)))


def _bias(pos: nn.Module, group: Pair, x: Tensor) -> Tensor:  # [heads, 2Gh-1, 2Gw-1]
    """Table from the weights of the position MLP, or from a call of the MLP where its weights may not be read."""
    if silent(pos) and readable_mlp(pos):
        return dynamic_position_bias(parameters_of(pos), group, residual=pos.residual)
    return bias_from_table(pos(_offsets(group, x)), group)


def _offsets(group: Pair, like: Tensor) -> Tensor:  # [(2Gh-1)(2Gw-1), 2]
    """Query minus key, in tokens, in the order of the table."""
    axes = [torch.arange(1 - n, n, device=like.device, dtype=like.dtype) for n in group]
    return torch.cartesian_prod(*axes)


def _partition(block: nn.Module) -> Partition:
    if not block.lsda_flag:
        return Partition.window(block.group_size)
    if not hasattr(block, "interval"):
        return Partition.grid(block.group_size)
    if not hasattr(block, "pad_type"):
        return Partition.interval_only(block.interval)
    return Partition.long(block.group_size, block.interval)


def _block(  # [B, H W, C]
    block: nn.Module, x: Tensor, H: int | None = None, W: int | None = None, *others: object, **more: object
) -> Tensor | None:
    if others or more or (H is None) != (W is None):
        return None
    height, width = block.input_resolution if H is None else (H, W)
    if H is not None:
        usual = min(height, width) > block.group_size  # else the block changes itself
    else:
        usual = hasattr(block, "interval") or not (height % block.group_size or width % block.group_size)
    if not usual or not takes_maps(block.attn) or x.shape[1] != height * width:
        return None
    out = block.attn(block.norm1(x).unflatten(1, (height, width)), _partition(block))
    x = x + block.drop_path(out.flatten(1, 2))
    x = x + block.drop_path(block.mlp(block.norm2(x)))
    if not hasattr(block, "ex_conv"):
        return x
    x = block.ex_conv(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))  # the amplitude cooling layer
    return block.ex_ln(x.permute(0, 2, 3, 1).flatten(1, 2))


def _on_maps(block: nn.Module) -> bool:
    """Whether its forward takes the map's height and width, as the detection code's does."""
    return len(inspect.signature(type(block).forward).parameters) == 4


def _check(block: nn.Module) -> str:
    check_parts(block, "norm1", "attn", "drop_path", "norm2", "mlp", "ex_conv", "ex_ln")
    for name in ("use_cpe", "no_mask", "adaptive_interval", "pad_type"):
        expect(not getattr(block, name, False), f"its {name} is {getattr(block, name, None)!r}")
    attn, group, interval = block.attn, block.group_size, getattr(block, "interval", 1)
    for name, value in (("group_size", group), ("interval", interval)):
        expect(isinstance(value, int) and value > 0, f"its {name} is {value!r}, expected an int")
    check_kind(attn, "Attention")
    check_projections(attn.qkv, attn.proj, attn.num_heads, attn.dim // attn.num_heads)
    check_scale(attn, attn.scale, attn.dim // attn.num_heads)
    if attn.position_bias:
        _check_positions(attn.pos, attn.num_heads)
        own = pair_of(getattr(attn, "group_size", group), "attention's group_size")
        check_index(attn, own)
        if getattr(attn, "biases", None) is not None:
            expect_values("biases", attn.biases, _offsets(own, attn.biases), f"groups of {times(own)} have")
    spread = f"every {interval} tokens" if hasattr(block, "interval") else "spread over the map"
    small = "; as before on maps no longer than a group" if _on_maps(block) else ""
    return f"partition_attention, groups {times((group, group))}{f', {spread}' if block.lsda_flag else ''}{small}"


def _check_positions(pos: nn.Module, heads: int) -> None:
    p = pos.pos_proj.weight.shape[0]
    layer = [(p,), (p,), (p, p), (p,)]
    expected = [(p, 2), (p,), *layer, *layer, (p,), (p,), (heads, p), (heads,)]
    got = [tuple(weight.shape) for weight in parameters_of(pos)]
    expect(got == expected, f"its position MLP has weights of {got}, expected {expected}")


def _inputs(block: nn.Module) -> Iterator[tuple]:
    if not _on_maps(block):
        height, width = block.input_resolution
        yield (random(1, height * width, block.dim),)
        return
    least, span = block.group_size + 1, block.group_size * getattr(block, "interval", 1)
    for height, width in ((least + 2, max(least, span + 3)), (max(least, span), max(least, span))):
        yield random(1, height * width, block.dim), height, width


RECIPES = (
    Recipe(
        "CrossFormer's",
        "*.CrossFormerBlock",
        {"forward": _block, "attn.forward": _attention},
        _check,
        _inputs,
        by_name=False,
    ),
)
