"""Swin (Liu et al., ICCV 2021) and Swin V2 (Liu et al., CVPR 2022), as timm, torchvision, Microsoft and MMDetection
write them.

They differ where a map does not divide into windows: timm rolls it and then pads it, the others pad and then roll. None
masks what it padded: zeros are projected, and attended to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._sizes import above, ceil_div, surely
from ..partition import Partition, crop, pad
from ..partition_attention import partition_attention
from ..partition_attention.module import in_windows
from .recipe import (
    Pair,
    Recipe,
    attend,
    channels,
    check_kind,
    check_parts,
    check_projections,
    check_scale,
    drops,
    expect,
    expect_shape,
    on_a_map,
    packed,
    pair_of,
    random,
    swin_table,
    times,
)

# The attention modules, on a whole map


@on_a_map
def _attention(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    """WindowAttention of Microsoft and timm, WindowMSA of MMDetection."""
    return attn.proj_drop(attn.proj(_values(attn, x, partition)))


def _values(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    bias = swin_table(attn.relative_position_bias_table, partition.group)
    return attend(packed(attn.qkv(x), attn.num_heads), partition, bias, _scale(attn))


def _scale(attn: nn.Module) -> float:
    return attn.scale if hasattr(attn, "scale") else (channels(attn.proj)[0] // attn.num_heads) ** -0.5


def _cosine(attn: nn.Module, qkv: Tensor, partition: Partition) -> Tensor:  # [B, H, W, 3C] -> [B, H, W, C]
    """Swin V2, section 3.2: cosines, scaled for each head, and a bias between 0 and 16 from an MLP on log offsets."""
    q, k, v = packed(qkv, attn.num_heads).unbind(-3)
    scale = attn.logit_scale.clamp(max=math.log(100.0)).exp().flatten(1)  # [heads, 1]
    q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    bias = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table))[0].permute(2, 0, 1)
    return partition_attention(q.to(v.dtype), k.to(v.dtype), v, partition, bias, scale=1.0).flatten(-2)


@on_a_map
def _timm_v2_attention(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    if attn.q_bias is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    return attn.proj_drop(attn.proj(_cosine(attn, qkv, partition)))


# The modules around them


def _timm_attn(block: nn.Module, x: Tensor) -> Tensor | None:  # [B, H, W, C]
    """The shift, then zeros below and to the right."""
    if drops(block.attn):
        return None
    height, width = x.shape[1:3]
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    padded = tuple(ceil_div(n, g) * g for n, g in zip((height, width), window))
    partition = Partition.window(window, shift)
    if all(surely(n == p) for n, p in zip((height, width), padded)):
        return block.attn(x, partition)
    back = tuple(-n for n in shift)
    x = pad(x.roll(back, (1, 2)), *padded).roll(shift, (1, 2))  # the operator rolls this back
    return crop(block.attn(x, partition).roll(back, (1, 2)), height, width).roll(shift, (1, 2))


def _torchvision_attention(attn: nn.Module, x: Tensor) -> Tensor | None:  # [B, H, W, C]
    if drops(attn):
        return None
    window = tuple(attn.window_size)
    shift = tuple(s * above(n, g) for s, n, g in zip(attn.shift_size, x.shape[1:3], window))  # one window: no shift

    def on_map(x: Tensor, partition: Partition) -> Tensor:
        values = _torchvision_cosine if hasattr(attn, "logit_scale") else _values
        return attn.proj(values(attn, x, partition))

    return F.dropout(in_windows(on_map, x, window, shift).contiguous(), attn.dropout, attn.training)


def _torchvision_cosine(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    bias = attn.qkv.bias
    if bias is not None:  # that of the keys is not used
        q, k, v = bias.chunk(3)
        bias = torch.cat((q, torch.zeros_like(k), v))
    return _cosine(attn, F.linear(x, attn.qkv.weight, bias), partition)


def _microsoft_block(block: nn.Module, x: Tensor, *mask: object, **others: object) -> Tensor | None:  # [B, H W, C]
    """Of the classification code, which does not pad, and of the detection code, whose stages set the map's size and
    give the mask of the shift.
    """
    padding = hasattr(block, "H")
    height, width = (block.H, block.W) if padding else block.input_resolution
    divides = height % block.window_size == 0 and width % block.window_size == 0
    usual = not others and (len(mask) == 1 if padding else not mask and divides)
    if drops(block.attn) or not usual or x.shape[1] != height * width:
        return None
    window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
    out = in_windows(block.attn, block.norm1(x).unflatten(1, (height, width)), window, shift)
    x = x + block.drop_path(out.flatten(1, 2))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def _mmdetection_attention(attn: nn.Module, query: Tensor, hw_shape: Pair) -> Tensor | None:  # [B, H W, C]
    if drops(attn.w_msa) or query.shape[1] != hw_shape[0] * hw_shape[1]:
        return None
    window, shift = (attn.window_size,) * 2, (attn.shift_size,) * 2
    return attn.drop(in_windows(attn.w_msa, query.unflatten(1, tuple(hw_shape)), window, shift).flatten(1, 2))


# Checks


def _check(module: nn.Module, attention: str = "attn", kind: str = "WindowAttention", cosine: bool = False) -> str:
    attn = module.get_submodule(attention)
    check_kind(attn, kind)
    window, shift = pair_of(module.window_size, "window_size"), pair_of(module.shift_size, "shift_size")
    expect(min(window) > 0, f"its window_size is {window}")
    expect(all(0 <= s < n for s, n in zip(shift, window)), f"its shift_size {shift} is not below its window, {window}")
    expect(pair_of(attn.window_size, "window_size") == window, f"its attention is for windows of {attn.window_size}")
    heads, dim, sides = attn.num_heads, channels(attn.proj)[0], tuple(2 * n - 1 for n in window)
    expect(heads > 0 and dim % heads == 0, f"its {dim} channels are not a multiple of its {heads} heads")
    check_projections(attn.qkv, attn.proj, heads, dim // heads)
    if cosine:
        expect_shape(attn.relative_coords_table, (1, *sides, 2))
        expect_shape(attn.logit_scale, (heads, 1, 1))
        sizes = channels(attn.cpb_mlp[0])[0], channels(attn.cpb_mlp[-1])[1]
        expect(sizes == (2, heads), f"its MLP of positions goes from {sizes[0]} to {sizes[1]}, expected 2 to {heads}")
    else:
        expect_shape(attn.relative_position_bias_table, (math.prod(sides), heads))
        check_scale(attn, _scale(attn), dim // heads)
    shifted = f" shifted by {times(shift)}" if any(shift) else ""
    return f"partition_attention, windows {times(window)}{shifted}{', cosines' if cosine else ''}"


def _check_file(
    module: nn.Module, parts: tuple[str, ...], attention: str = "attn", kind: str = "WindowAttention"
) -> str:
    check_parts(module, *parts)
    expect(isinstance(module.window_size, int) and isinstance(module.shift_size, int), "its windows are not square")
    return _check(module, attention, kind)


# Inputs to compare both ways with


def _sizes(window: Pair) -> list[Pair]:
    """Maps that do not divide, that are one window, that are one along an axis, that are smaller."""
    (h, w), (half_h, half_w) = window, (window[0] // 2, window[1] // 2)
    return [(2 * h + half_h, 2 * w + half_w), (h, w), (h, 2 * w), (half_h + 1, w + half_w)]


def _of_timm(block: nn.Module) -> Iterator[tuple]:
    yield (random(1, *pair_of(block.input_resolution, "input_resolution"), block.dim),)


def _of_torchvision(attn: nn.Module) -> Iterator[tuple]:
    for size in _sizes(tuple(attn.window_size)):
        yield (random(1, *size, channels(attn.qkv)[0]),)


def _of_microsoft(block: nn.Module) -> Iterator[tuple]:
    window, shift = block.window_size, block.shift_size
    if not hasattr(block, "H"):
        height, width = pair_of(block.input_resolution, "input_resolution")
        yield (random(1, height * width, block.dim),)
        return
    for block.H, block.W in _sizes((window, window)):
        padded = tuple(-(-n // window) * window for n in (block.H, block.W))
        wrapped = Partition.window(window, shift).on(*padded).wrapped(*padded, device="cpu")  # [windows, N, 2]
        mask = (wrapped[:, :, None] != wrapped[:, None]).any(-1).float() * -100
        yield random(1, block.H * block.W, block.dim), mask


def _of_mmdetection(attn: nn.Module) -> Iterator[tuple]:
    for size in _sizes((attn.window_size, attn.window_size)):
        yield random(1, size[0] * size[1], channels(attn.w_msa.qkv)[0]), size


_TORCHVISION = "torchvision.models.swin_transformer."
RECIPES = (
    Recipe(
        "timm",
        "timm.models.swin_transformer.SwinTransformerBlock",
        {"_attn": _timm_attn, "attn.forward": _attention},
        _check,
        _of_timm,
    ),
    Recipe(
        "timm",
        "timm.models.swin_transformer_v2.SwinTransformerV2Block",
        {"_attn": _timm_attn, "attn.forward": _timm_v2_attention},
        partial(_check, cosine=True),
        _of_timm,
    ),
    Recipe(
        "torchvision",
        f"{_TORCHVISION}ShiftedWindowAttention",
        {"forward": _torchvision_attention},
        partial(_check, attention="", kind="ShiftedWindowAttention"),
        _of_torchvision,
        attention=("",),
    ),
    Recipe(
        "torchvision",
        f"{_TORCHVISION}ShiftedWindowAttentionV2",
        {"forward": _torchvision_attention},
        partial(_check, attention="", kind="ShiftedWindowAttentionV2", cosine=True),
        _of_torchvision,
        attention=("",),
    ),
    Recipe(
        "Microsoft's",
        "*.SwinTransformerBlock",
        {"forward": _microsoft_block, "attn.forward": _attention},
        partial(_check_file, parts=("norm1", "attn", "drop_path", "norm2", "mlp")),
        _of_microsoft,
        by_name=False,
    ),
    Recipe(
        "MMDetection's",
        "*.ShiftWindowMSA",
        {"forward": _mmdetection_attention, "w_msa.forward": _attention},
        partial(_check_file, parts=("w_msa", "drop"), attention="w_msa", kind="WindowMSA"),
        _of_mmdetection,
        by_name=False,
        attention=("w_msa",),
    ),
)
