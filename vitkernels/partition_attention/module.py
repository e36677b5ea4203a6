"""Attention layers on token maps: projection, position bias, partition attention, projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._layer import AttentionLayer, LocalPosition, bias_from_table
from .._sizes import above, larger, smaller, surely
from ..partition import Partition, Size, as_pair, crop, pad, whole
from ..position_bias import DynamicPositionBias
from .op import lsda_attention, partition_attention_qkvpacked


class LongShortDistanceAttention(AttentionLayer):
    """CrossFormer's SDA (``interval=1``) or LDA layer with its dynamic position bias.

    "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (Wang et al., ICLR 2022), sections
    3.2 and 3.3. Parameters are named as in the official code: ``qkv``, ``proj``, ``pos.pos_proj``, ``pos.pos1`` ...
    Maps of any size: places that padding would fill are masked as keys, which equals the official pad-and-mask.

    A map that is no longer than a group along one axis is small. Its groups are squares of neighbouring tokens, whose
    side the official codes choose differently: see ``small_map``. It is chosen at every call. The official option to
    pad a map on all sides (``pad_type=1``) is not offered: the kernels mask places below the map and to its right.

    Args:
        dim: channels C.
        heads: attention heads; head_dim is ``dim // heads``.
        group_size: tokens of a group along (height, width); None derives it from the map and the interval.
        interval: distance between the tokens of a group; 1 is SDA; None spreads the group over the map.
        qkv_bias: whether the fused projection has a bias.
        scale: multiplies ``q k^T``; ``head_dim ** -0.5`` if None.
        proj_drop: dropout after the output projection.
        residual: residual connections inside the position MLP.
        small_map: the side of the square groups of a small map: "longer", the map's longer side, and so a single group
            (the current code for detection and segmentation); "shorter", its shorter side (the first code for
            detection, and the code for classification).
        small_size: tokens along (height, width) up to which a map is small; ``group_size`` if None. Where the group
            size is derived, no map is small unless this is given.
        padding: "masked"; or "attended": the map is filled with zeros before the projection, and they are attended to
            (``no_mask`` in the official code).

    Shape:
        ``[B, H, W, C]`` to ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        group_size: Size | None = 7,
        interval: Size | None = 1,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        residual: bool = False,
        small_map: str = "longer",
        small_size: Size | None = None,
        padding: str = "masked",
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop)
        if small_map not in ("longer", "shorter"):
            raise ValueError(f"small_map must be 'longer' or 'shorter', got {small_map!r}")
        if padding not in ("masked", "attended"):
            raise ValueError(f"padding must be 'masked' or 'attended', below and to the right, got {padding!r}")
        self.partition = Partition(group_size, interval)
        small = self.partition.group if small_size is None else as_pair(small_size, "small_size", 1)
        self.small_map, self.small_size, self.padding = small_map, None if None in small else small, padding
        self.pos = DynamicPositionBias(dim, heads, residual=residual)

    def _partition(self, height: int, width: int) -> Partition:
        if self.small_size is None or all(surely(n > s) for n, s in zip((height, width), self.small_size)):
            return self.partition
        partition = self.partition.on(height, width)
        several = above(height, self.small_size[0]) * above(width, self.small_size[1])  # 0 where the map is small
        if self.small_map == "shorter":
            small = (smaller(height, width),) * 2
        elif self.padding == "attended":
            small = (larger(height, width),) * 2
        else:
            small = height, width  # what a square would add is masked
        group = (several * g + (1 - several) * larger(n, 1) for g, n in zip(partition.group, small))
        return Partition(tuple(group), tuple(several * (i - 1) + 1 for i in partition.interval))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        height, width = x.shape[1:3]
        partition = self._partition(height, width)
        if self.padding == "masked":
            return self._merge(self._attend(x, partition))
        partition = partition.on(height, width)
        sides = tuple(g * i for g, i in zip(partition.group, partition.interval))
        padded = pad(x, *whole((height, width), sides))
        return self._merge(crop(self._attend(padded, partition), height, width))

    def _attend(self, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C] -> [B, H, W, heads, head_dim]
        sizes = {"group_size": partition.group, "interval": partition.interval}
        return lsda_attention(self._project(x), self.pos, **sizes, scale=self.scale, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, group_size={self.partition.group}, interval={self.partition.interval}, "
            f"small_map={self.small_map!r}, small_size={self.small_size}, padding={self.padding!r}"
        )


class _TableAttention(AttentionLayer):
    """A layer whose bias is a learned table, stored as Swin stores it: ``[(2Gh-1)(2Gw-1), heads]``."""

    def __init__(self, dim: int, heads: int, group: tuple[int, int], **kwargs):
        super().__init__(dim, heads, **kwargs)
        self.group = group
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * group[0] - 1) * (2 * group[1] - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _attend(self, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C] -> [B, H, W, heads, head_dim]
        bias = bias_from_table(self.relative_position_bias_table, self.group)
        return partition_attention_qkvpacked(self._project(x), partition, bias, scale=self.scale, backend=self.backend)


def in_windows(
    attend: Callable[[Tensor, Partition], Tensor],
    x: Tensor,  # [B, H, W, ...]
    window: tuple[int, int],  # tokens
    shift: tuple[int, int],  # tokens
) -> Tensor:
    """``attend`` on the (shifted) windows of a map that need not divide: zeros are put below and to the right before
    it, and what it makes of them is cut off.
    """
    height, width = x.shape[1:3]
    padded = pad(x, *whole((height, width), window))
    out = attend(padded, Partition.window(window, shift))
    return out if padded is x else crop(out, height, width)


class WindowAttention(_TableAttention):
    """Swin's window attention layer, shifted or not, with its relative position bias table.

    "Swin Transformer" (Liu et al., ICCV 2021), section 3.2. A map that does not divide is padded with zeros below and
    to the right before the projection, as Swin's detection code and torchvision do; an axis of a single window is not
    shifted.

    Args:
        dim: channels C.
        heads: attention heads.
        window_size: tokens of a window along (height, width).
        shift: cyclic shift in tokens, usually ``window_size // 2`` in every second layer.
        qkv_bias, scale, proj_drop: as in `LongShortDistanceAttention`.

    Shape:
        ``[B, H, W, C]`` to ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: Size = 7,
        shift: Size = 0,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        group, self_shift = as_pair(window_size, "window_size", 1), as_pair(shift, "shift", 0)
        if any(s >= g for s, g in zip(self_shift, group)):
            raise ValueError(f"shift must be smaller than the window, got shift {self_shift} and window_size {group}")
        super().__init__(dim, heads, group, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop)
        self.shift = self_shift

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        shift = tuple(s * above(n, g) for s, n, g in zip(self.shift, x.shape[1:3], self.group))
        return self._merge(in_windows(self._attend, x, self.group, shift))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window_size={self.group}, shift={self.shift}"


class MaxSA(_TableAttention):
    """One half of MaxViT's multi-axis attention: block or grid attention with its relative position bias table.

    "MaxViT: Multi-Axis Vision Transformer" (Tu et al., ECCV 2022), section 3.2. Maps that do not divide, which the
    published code refuses, are masked.

    Args:
        dim: channels C.
        heads: attention heads; MaxViT has ``dim // 32``.
        mode: "block" (windows of neighbouring tokens) or "grid" (tokens spread evenly over the map).
        size: tokens of a block or of the grid along (height, width).
        qkv_bias, scale, proj_drop: as in `LongShortDistanceAttention`.

    Shape:
        ``[B, H, W, C]`` to ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mode: str,
        size: Size = 7,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        if mode not in ("block", "grid"):
            raise ValueError(f"mode must be 'block' or 'grid', got {mode!r}")
        group = as_pair(size, "size", 1)
        super().__init__(dim, heads, group, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop)
        self.partition = Partition.window(group) if mode == "block" else Partition.grid(group)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return self._merge(self._attend(x, self.partition))

    def extra_repr(self) -> str:
        mode = "block" if self.partition.interval == (1, 1) else "grid"
        return f"{super().extra_repr()}, mode={mode}, size={self.group}"


class _Stripes(nn.Module):
    """One direction of `CrossShapedWindowAttention`: attention inside the groups of a partition, and LePE of each."""

    def __init__(self, dim: int, partition: Partition):
        super().__init__()
        self.partition = partition
        self.get_v = LocalPosition(dim)

    def forward(self, qkv: Tensor, **options) -> Tensor:  # [B, H, W, 3, heads, head_dim]
        size = qkv.shape[1:3]
        out = partition_attention_qkvpacked(qkv, self.partition, **options)
        return out + self._position(qkv[:, :, :, 2], self.partition.on(*size))

    def _position(self, v: Tensor, stripes: Partition) -> Tensor:  # [B, H, W, heads, head_dim], and so is the result
        """LePE of every stripe by itself, which are one below the other on a single map, with a row of zeros between.

        They are not the batch of the convolution: PyTorch chooses its algorithm by that, so that a graph that is traced
        would not hold for all sizes.
        """
        (height, width), windows = stripes.group, stripes.split(v)  # [B, stripes, N, heads, head_dim]
        count, row = windows.shape[1], width * v.shape[3] * v.shape[4]
        parted = F.pad(windows.flatten(2), (0, row)).view(v.shape[0], count * (height + 1), width, *v.shape[3:])
        out = self.get_v(parted).unflatten(1, (count, height + 1))[:, :, :-1].contiguous()
        return stripes.merge(out.flatten(2, 3), *v.shape[1:3])


class CrossShapedWindowAttention(AttentionLayer):
    """CSWin's attention: half of the heads in standing stripes, half in lying ones, with LePE inside each stripe.

    "CSWin Transformer" (Dong et al., CVPR 2022), sections 3.2 and 3.3. Parameters are named as in the official code,
    which keeps them in the block: ``qkv``, ``proj``, ``attns.0.get_v`` (standing), ``attns.1.get_v`` (lying). On a map
    that does not divide, which the official code refuses, the last stripe is narrower.

    Args:
        dim: channels C.
        heads: attention heads, an even number unless ``last_stage``.
        stripe_width: tokens across a stripe; along it a stripe is as long as the map.
        last_stage: one window, the whole map, for all heads (``attns.0``); the stripe width is not used.
        qkv_bias, scale, proj_drop: as in `LongShortDistanceAttention`.

    Shape:
        ``[B, H, W, C]`` to ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        stripe_width: int = 7,
        *,
        last_stage: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop)
        _checks.check_sizes(stripe_width=stripe_width)
        if heads % 2 and not last_stage:
            raise ValueError(f"heads must be even, half for each direction of the stripes, got {heads}")
        partitions = [Partition.stripes(stripe_width, vertical) for vertical in (True, False)]
        if last_stage:
            partitions = [Partition(None)]
        self.attns = nn.ModuleList(_Stripes(dim // len(partitions), partition) for partition in partitions)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        halves = self._project(x).chunk(len(self.attns), -2)  # each [B, H, W, 3, heads / 2, head_dim]
        options = {"scale": self.scale, "backend": self.backend}
        return self._merge(torch.cat([attend(qkv, **options) for attend, qkv in zip(self.attns, halves)], -2))

    def extra_repr(self) -> str:
        across = "whole map" if len(self.attns) == 1 else self.attns[0].partition.group[1]
        return f"{super().extra_repr()}, stripe_width={across}"
