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

from .._layer import bias_from_table
from .._sizes import above, surely
from ..partition import Partition, crop, pad, whole
from ..partition_attention import partition_attention
from ..partition_attention.module import in_windows
from .recipe import (
    Pair,
    Recipe,
    attend,
    channels,
    check_index,
    check_int,
    check_kind,
    check_parts,
    check_projections,
    check_scale,
    drops,
    expect,
    expect_shape,
    expect_values,
    is_shift_mask,
    on_a_map,
    packed,
    pair_of,
    random,
    shift_mask,
    takes_maps,
    times,
)

# The attention modules, on a whole map


@on_a_map
def _attention(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    """WindowAttention of Microsoft and timm, WindowMSA of MMDetection."""
    return attn.proj_drop(attn.proj(_dot_product(attn, attn.qkv(x), partition, _scale(attn))))


def _dot_product(attn: nn.Module, qkv: Tensor, partition: Partition, scale: float) -> Tensor:  # [B, H, W, C]
    bias = bias_from_table(attn.relative_position_bias_table, partition.group)
    return attend(packed(qkv, attn.num_heads), partition, bias, scale)


def _scale(attn: nn.Module) -> float:
    return attn.scale if hasattr(attn, "scale") else (channels(attn.proj)[0] // attn.num_heads) ** -0.5


def _cosine(attn: nn.Module, qkv: Tensor, partition: Partition) -> Tensor:  # [B, H, W, 3C] -> [B, H, W, C]
    """Swin V2, section 3.2: cosines, scaled for each head, and a bias between 0 and 16 from an MLP on log offsets."""
    q, k, v = packed(qkv, attn.num_heads).unbind(-3)
    scale = attn.logit_scale.clamp(max=math.log(100.0)).exp().flatten(1)  # [heads, 1]
    q, k = _unit(q) * scale, _unit(k)
    bias = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table))[0].permute(2, 0, 1)
    return partition_attention(q.to(v.dtype), k.to(v.dtype), v, partition, bias, scale=1.0).flatten(-2)


def _unit(x: Tensor) -> Tensor:
    """Unit vectors along the last axis; zero vectors stay zero.

    Keys of padded tokens are zero. The epsilon of the norm, 1e-12, is zero in float16, and the gradient at a zero
    vector, 1 / epsilon, is infinite there. So half types are normalised in float32, and zero vectors get no gradient.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
        x = x.masked_fill((x == 0).all(-1, keepdim=True), 0.0)
    return F.normalize(x, dim=-1)


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
    height, width = x.shape[1:3]
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    padded = whole((height, width), window)
    if not takes_maps(block.attn) or not _own_mask(block, padded):
        return None
    partition = Partition.window(window, shift)
    if all(surely(n == p) for n, p in zip((height, width), padded)):
        return block.attn(x, partition)
    back = tuple(-n for n in shift)
    x = pad(x.roll(back, (1, 2)), *padded).roll(shift, (1, 2))  # the operator rolls this back
    return crop(block.attn(x, partition).roll(back, (1, 2)), height, width).roll(shift, (1, 2))


def _own_mask(block: nn.Module, padded: Pair) -> bool:
    """Whether timm's block has the mask of the shift for this map: it makes it at every call, or stores it for maps of
    one size.
    """
    return not any(block.shift_size) or getattr(block, "dynamic_mask", False) or padded == _padded_resolution(block)


def _padded_resolution(block: nn.Module) -> Pair:
    return whole(pair_of(block.input_resolution, "input_resolution"), pair_of(block.window_size, "window_size"))


def _torchvision_attention(attn: nn.Module, x: Tensor) -> Tensor | None:  # [B, H, W, C]
    """Read the parameters of both projections, as torchvision does: it calls neither."""
    if drops(attn):
        return None
    window = tuple(attn.window_size)
    shift = tuple(s * above(n, g) for s, n, g in zip(attn.shift_size, x.shape[1:3], window))  # one window: no shift

    def on_map(x: Tensor, partition: Partition) -> Tensor:
        values = _torchvision_cosine if hasattr(attn, "logit_scale") else _torchvision_dot_product
        return F.linear(values(attn, x, partition), attn.proj.weight, attn.proj.bias)

    return F.dropout(in_windows(on_map, x, window, shift).contiguous(), attn.dropout, attn.training)


def _torchvision_dot_product(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    scale = (x.shape[-1] // attn.num_heads) ** -0.5
    return _dot_product(attn, F.linear(x, attn.qkv.weight, attn.qkv.bias), partition, scale)


def _torchvision_cosine(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    bias = attn.qkv.bias
    if bias is not None:  # that of the keys is not used
        q, k, v = bias.chunk(3)
        bias = torch.cat((q, torch.zeros_like(k), v))
    return _cosine(attn, F.linear(x, attn.qkv.weight, bias), partition)


def _microsoft_block(block: nn.Module, x: Tensor, *masks: object, **others: object) -> Tensor | None:  # [B, H W, C]
    """Block of the classification code, which does not pad, or of the detection code, whose stages set the size of the
    map and hand in the mask of the shift. With another mask it runs as before. Without a shift it ignores the mask.
    """
    padding = hasattr(block, "H")
    height, width = (block.H, block.W) if padding else block.input_resolution
    window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
    padded = whole((height, width), (block.window_size,) * 2)
    usual = not others and (len(masks) == 1 if padding else not masks and padded == (height, width))
    if not usual or not takes_maps(block.attn) or x.shape[1] != height * width:
        return None
    if padding and any(shift) and not is_shift_mask(masks[0], Partition.window(window, shift), *padded):
        return None
    out = in_windows(block.attn, block.norm1(x).unflatten(1, (height, width)), window, shift)
    x = x + block.drop_path(out.flatten(1, 2))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def _mmdetection_attention(  # [B, H W, C]
    attn: nn.Module, query: Tensor, hw_shape: Pair, *others: object, **more: object
) -> Tensor | None:
    if others or more or not takes_maps(attn.w_msa) or query.shape[1] != hw_shape[0] * hw_shape[1]:
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
    check_index(attn, window)
    shifted = f" shifted by {times(shift)}" if any(shift) else ""
    return f"partition_attention, windows {times(window)}{shifted}{', cosines' if cosine else ''}"


def _check_mask(block: nn.Module) -> None:
    """Raise `Unsuitable` unless the mask that a block stores, for maps of one size, is that of its shift."""
    window, shift = pair_of(block.window_size, "window_size"), pair_of(block.shift_size, "shift_size")
    mask = block.attn_mask
    expected = None
    if any(shift):
        like = mask if mask is not None else next(block.parameters())
        expected = shift_mask(Partition.window(window, shift), *_padded_resolution(block), like)
    expect_values("attn_mask", mask, expected, "the mask of its shift")


def _check_timm(block: nn.Module, cosine: bool = False) -> str:
    now = _check(block, cosine=cosine)
    if not getattr(block, "dynamic_mask", False):
        _check_mask(block)
    return now


def _check_file(
    module: nn.Module, parts: tuple[str, ...], attention: str = "attn", kind: str = "WindowAttention"
) -> str:
    check_parts(module, *parts)
    for name in ("window_size", "shift_size"):
        check_int(getattr(module, name), name)
    return _check(module, attention, kind)


def _check_microsoft(block: nn.Module) -> str:
    now = _check_file(block, ("norm1", "attn", "drop_path", "norm2", "mlp"))
    if not hasattr(block, "H"):
        if "attn_mask" in block._buffers:
            _check_mask(block)
        return now
    others = "; as before with other masks than the shift's (0 and -100), and in a graph, where no mask is known"
    return f"{now}{others}" if block.shift_size else now


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
        padded = whole((block.H, block.W), (window, window))
        x = random(1, block.H * block.W, block.dim)
        yield x, shift_mask(Partition.window(window, shift), *padded, x)


def _of_mmdetection(attn: nn.Module) -> Iterator[tuple]:
    for size in _sizes((attn.window_size, attn.window_size)):
        yield random(1, size[0] * size[1], channels(attn.w_msa.qkv)[0]), size


_TORCHVISION = "torchvision.models.swin_transformer."
RECIPES = (
    Recipe(
        "timm",
        "timm.models.swin_transformer.SwinTransformerBlock",
        {"_attn": _timm_attn, "attn.forward": _attention},
        _check_timm,
        _of_timm,
    ),
    Recipe(
        "timm",
        "timm.models.swin_transformer_v2.SwinTransformerV2Block",
        {"_attn": _timm_attn, "attn.forward": _timm_v2_attention},
        partial(_check_timm, cosine=True),
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
        _check_microsoft,
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
