"""Attention layers on token maps: projection, position bias, partition attention, projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..partition import Partition, Size, as_pair
from ..position_bias import DynamicPositionBias
from .op import lsda_attention, partition_attention_qkvpacked


class _Attention(nn.Module):
    """What the layers share: the fused projection, the output projection, their checks."""

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool, scale: float | None, proj_drop: float):
        super().__init__()
        _checks.check_ints(dim=dim, heads=heads)
        for name, value in (("dim", dim), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and {heads} heads")
        self.dim, self.heads, self.scale = dim, heads, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _check(self, x: Tensor) -> None:
        _checks.check_tensor("x", x, "[B, H, W, C]")
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"x must be [B, H, W, C] with C = {self.dim}, got {_checks.shape_of(x)}; NCHW maps need a permute"
            )

    def _project(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to packed ``[B, H, W, 3, heads, head_dim]``."""
        return self.qkv(x).unflatten(-1, (3, self.heads, self.dim // self.heads))

    def _merge(self, out: Tensor) -> Tensor:
        """``[B, H, W, heads, head_dim]`` to ``[B, H, W, C]``."""
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class LongShortDistanceAttention(_Attention):
    """CrossFormer's SDA (``interval=1``) or LDA layer with its dynamic position bias.

    "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (Wang et al., ICLR 2022), sections
    3.2 and 3.3. Parameters are named as in the official code: ``qkv``, ``proj``, ``pos.pos_proj``, ``pos.pos1`` ...
    Maps of any size: places that padding would fill are masked as keys, which equals the official pad-and-mask; a map
    whose shorter side is no longer than the group becomes a single group, as in the official dense-prediction code,
    decided at every call.

    Args:
        dim: channels C.
        heads: attention heads; head_dim is ``dim // heads``.
        group_size: tokens of a group along (height, width); None derives it from the map and the interval.
        interval: distance between the tokens of a group; 1 is SDA; None spreads the group over the map.
        qkv_bias: whether the fused projection has a bias.
        scale: multiplies ``q k^T``; ``head_dim ** -0.5`` if None.
        proj_drop: dropout after the output projection.
        residual: residual connections inside the position MLP.

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
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop)
        self.partition = Partition(group_size, interval)
        self.pos = DynamicPositionBias(dim, heads, residual=residual)

    def _partition(self, height: int, width: int) -> Partition:
        group = self.partition.group
        if None not in group and (height <= group[0] or width <= group[1]):
            return Partition.window((max(height, 1), max(width, 1)))
        return self.partition

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        qkv = self._project(x)
        partition = self._partition(*x.shape[1:3])
        out = lsda_attention(qkv, self.pos, group_size=partition.group, interval=partition.interval, scale=self.scale)
        return self._merge(out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.partition.group}, interval={self.partition.interval}"


class _TableAttention(_Attention):
    """A layer whose bias is a learned table, stored as Swin stores it: ``[(2Gh-1)(2Gw-1), heads]``."""

    def __init__(self, dim: int, heads: int, group: tuple[int, int], **kwargs):
        super().__init__(dim, heads, **kwargs)
        self.group = group
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * group[0] - 1) * (2 * group[1] - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _bias(self) -> Tensor:
        return self.relative_position_bias_table.t().unflatten(1, tuple(2 * g - 1 for g in self.group))


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
        height, width = x.shape[1:3]
        below, right = -height % self.group[0], -width % self.group[1]
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        shift = tuple(s if n > g else 0 for s, n, g in zip(self.shift, x.shape[1:3], self.group))
        out = partition_attention_qkvpacked(
            self._project(x), Partition.window(self.group, shift), self._bias(), scale=self.scale
        )
        return self._merge(out[:, :height, :width])

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
        return self._merge(
            partition_attention_qkvpacked(self._project(x), self.partition, self._bias(), scale=self.scale)
        )

    def extra_repr(self) -> str:
        mode = "block" if self.partition.interval == (1, 1) else "grid"
        return f"{super().extra_repr()}, mode={mode}, size={self.group}"
