"""The index map: how a group of tokens lies in a token map.

Along each axis of a map of ``H`` tokens, with group size ``G``, interval ``I`` and a shift::

    y = ((r * G + g) * I + a + shift) mod H      r region, g token of the group (0..G-1), a residue (0..I-1)

and a group is one ``(r_y, r_x, a_y, a_x)``, its tokens all ``(g_y, g_x)``, both in raster order. Windows (Swin,
MaxViT block, CrossFormer SDA) have ``I = 1``; a grid has one region and ``I = ceil(H / G)``; everything between is
CrossFormer's LDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ._checks import shown

Size = Union[int, Tuple[int, int]]  # one int for both axes, or (height, width)
Derived = Union[Size, None, Tuple[Optional[int], Optional[int]]]  # None: derived from the map


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def as_pair(value: Derived, name: str, least: int, derived: bool = False) -> tuple:
    """``value`` as (height, width); each an int >= ``least``, or None (the map decides) where ``derived`` allows it."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one int or (height, width), got {shown(value)}")
    for size in pair:
        if size is None and derived:
            continue
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int or a pair of ints, got {shown(value)}")
        if size < least:
            raise ValueError(f"{name} must be at least {least} on both axes, got {value!r}")
    return pair


@dataclass(frozen=True)
class Partition:
    """A division of an ``[H, W]`` token map into groups that attend within themselves.

    Args:
        group: tokens of a group along (height, width); ``None`` on an axis takes all of it,
            ``ceil(H / interval)`` tokens.
        interval: distance in tokens between neighbours of a group; ``None`` spreads one region over the axis:
            ``ceil(H / group)``.
        shift: cyclic shift in tokens (Swin); the map must then be a multiple of ``group * interval``. Tokens that the
            shift brings together from opposite borders get -100 added to their logit.

    Places of a group that lie outside the map are masked as keys and not computed as queries.
    """

    group: Derived
    interval: Derived = 1
    shift: Size = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", as_pair(self.group, "group", 1, derived=True))
        object.__setattr__(self, "interval", as_pair(self.interval, "interval", 1, derived=True))
        object.__setattr__(self, "shift", as_pair(self.shift, "shift", 0))
        for group, interval in zip(self.group, self.interval):
            if group is None and interval is None:
                raise ValueError("group and interval cannot both be derived (None) on one axis; give one of them")

    @classmethod
    def window(cls, size: Size, shift: Size = 0) -> Partition:
        """Windows of neighbouring tokens: Swin (``shift`` > 0 for the shifted half), MaxViT block, CrossFormer SDA."""
        return cls(size, 1, shift)

    @classmethod
    def grid(cls, size: Size) -> Partition:
        """``size`` tokens spread over the whole map: MaxViT grid, CrossFormer LDA in its first classification code."""
        return cls(size, None)

    @classmethod
    def long(cls, group: Size, interval: Size) -> Partition:
        """Groups of fixed size and interval: CrossFormer LDA as in the current code and CrossFormer++."""
        return cls(group, interval)

    @classmethod
    def interval_only(cls, interval: Size) -> Partition:
        """Every ``interval``-th token of the whole map: CrossFormer LDA in its first detection code."""
        return cls(None, interval)

    @classmethod
    def stripes(cls, width: int, vertical: bool = False) -> Partition:
        """Full-length stripes ``width`` tokens wide, lying or standing (``vertical``): CSWin."""
        return cls((None, width) if vertical else (width, None))

    def on(self, height: int, width: int) -> Partition:
        """This partition on a map of ``height`` x ``width`` tokens: derived sizes made concrete, the shift checked."""
        axes = []
        for length, group, interval, shift in zip((height, width), self.group, self.interval, self.shift):
            group = max(_ceil_div(length, interval), 1) if group is None else group
            interval = max(_ceil_div(length, group), 1) if interval is None else interval
            if shift and length % (group * interval):
                raise ValueError(
                    f"a shift needs a map that is a multiple of group * interval: got a {height} x {width} map, "
                    f"group {self.group}, interval {self.interval}, shift {self.shift}; "
                    "pad the map first (WindowAttention does)"
                )
            axes.append((group, interval, shift % (group * interval)))
        return Partition(*zip(*axes))

    # The methods below want a concrete partition, as `on` returns it.

    @property
    def tokens(self) -> int:
        """Tokens of a group, N."""
        return self.group[0] * self.group[1]

    def regions(self, height: int, width: int) -> tuple[int, int]:
        """Regions (blocks of group * interval tokens) along each axis, the last one perhaps partly outside the map."""
        return tuple(_ceil_div(n, g * i) for n, g, i in zip((height, width), self.group, self.interval))

    def split(self, x: Tensor) -> Tensor:
        """``[B, H, W, ...]`` to ``[B, groups, N, ...]``; places outside the map are zero."""
        (gy, gx), (ay, ax), (sy, sx) = self.group, self.interval, self.shift
        ry, rx = self.regions(*x.shape[1:3])
        below, right = ry * gy * ay - x.shape[1], rx * gx * ax - x.shape[2]
        if sy or sx:
            x = x.roll((-sy, -sx), (1, 2))
        if below or right:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, right, 0, below))
        pattern = "b (ry gy ay) (rx gx ax) ... -> b (ry rx ay ax) (gy gx) ..."
        return rearrange(x, pattern, ry=ry, rx=rx, gy=gy, gx=gx)

    def merge(self, x: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `split`: ``[B, groups, N, ...]`` to ``[B, H, W, ...]``."""
        (gy, gx), (ay, ax), shift = self.group, self.interval, self.shift
        ry, rx = self.regions(height, width)
        pattern = "b (ry rx ay ax) (gy gx) ... -> b (ry gy ay) (rx gx ax) ..."
        x = rearrange(x, pattern, ry=ry, rx=rx, gy=gy, gx=gx, ay=ay, ax=ax)
        x = x[:, :height, :width]
        return x.roll(shift, (1, 2)) if any(shift) else x

    def index(self, height: int, width: int, device=None) -> Tensor:
        """Raster index of every token of every group, ``[groups, N]`` int64; -1 outside the map."""
        raster = torch.arange(1, height * width + 1, device=device).view(1, height, width)
        return self.split(raster)[0] - 1

    def wrapped(self, height: int, width: int, device=None) -> Tensor:
        """Whether the shift carried a token over the lower and the right border, ``[groups, N, 2]`` bool."""
        over_y = (torch.arange(height, device=device) < self.shift[0])[:, None].expand(height, width)
        over_x = (torch.arange(width, device=device) < self.shift[1])[None, :].expand(height, width)
        return self.split(torch.stack((over_y, over_x), -1)[None].int())[0].bool()
