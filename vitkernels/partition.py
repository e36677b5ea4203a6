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
from ._sizes import ceil_div, divided, is_size, known, larger, surely

Size = Union[int, Tuple[int, int]]  # one int for both axes, or (height, width)
Derived = Union[Size, None, Tuple[Optional[int], Optional[int]]]  # None: derived from the map


def as_pair(value: Derived, name: str, least: int, derived: bool = False) -> tuple:
    """``value`` as (height, width); each an int >= ``least``, or None (the map decides) where ``derived`` allows it."""
    if type(value) is int and value >= least:
        return value, value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one int or (height, width), got {shown(value)}")
    for size in pair:
        if size is None and derived:
            continue
        if not is_size(size):
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
        shift: cyclic shift in tokens (Swin), smaller than ``group * interval``, of which the map must then be a
            multiple. Tokens that the shift brings together from opposite borders get -100 added to their logit.

    Places of a group that lie outside the map are masked as keys and not computed as queries.
    """

    group: Derived
    interval: Derived = 1
    shift: Size = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", as_pair(self.group, "group", 1, derived=True))
        object.__setattr__(self, "interval", as_pair(self.interval, "interval", 1, derived=True))
        object.__setattr__(self, "shift", as_pair(self.shift, "shift", 0))
        for group, interval, shift in zip(self.group, self.interval, self.shift):
            if group is None and interval is None:
                raise ValueError("group and interval cannot both be derived (None) on one axis; give one of them")
            if group is not None and interval is not None and surely(shift >= group * interval):
                raise ValueError(
                    f"shift must be smaller than group * interval on both axes, got shift {self.shift}, group "
                    f"{self.group} and interval {self.interval}; a shift of {shift % (group * interval)} instead of "
                    f"{shift} makes the same groups"
                )

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
        lengths, concrete = (height, width), self
        if any(size is None for size in (*self.group, *self.interval)):
            sizes = []
            for length, group, interval in zip(lengths, self.group, self.interval):
                group = larger(ceil_div(length, interval), 1) if group is None else group
                sizes.append((group, larger(ceil_div(length, group), 1) if interval is None else interval))
            concrete = Partition(*zip(*sizes), self.shift)
        for length, group, interval, shift in zip(lengths, concrete.group, concrete.interval, self.shift):
            if not surely(shift == 0) and length % (group * interval):
                raise ValueError(
                    f"a shift needs a map that is a multiple of group * interval: got a {height} x {width} map, "
                    f"group {self.group}, interval {self.interval}, shift {self.shift}; "
                    "pad the map first (WindowAttention does)"
                )
        return concrete

    @property
    def tokens(self) -> int:
        """Tokens of a group, N."""
        if None in self.group:
            raise ValueError(f"the map decides how many tokens a group of {self} has: .on(height, width).tokens")
        return self.group[0] * self.group[1]

    def within(self, height: int, width: int) -> Partition:
        """A partition that `on` returned, with groups and intervals no larger than the map, where that is known.

        What they have outside the map has no weight.
        """
        if not known(height, width):
            return self
        lengths = max(height, 1), max(width, 1)
        interval = tuple(min(i, n) for i, n in zip(self.interval, lengths))
        group = tuple(min(g, ceil_div(n, i)) for g, n, i in zip(self.group, lengths, interval))
        fits = (group, interval) == (self.group, self.interval)
        return self if fits else Partition(group, interval, self.shift if height and width else 0)

    def _axes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Group, interval and shift along both axes of a map."""
        concrete = self.on(height, width)
        return concrete.group, concrete.interval, concrete.shift

    def regions(self, height: int, width: int) -> tuple[int, int]:
        """Regions (blocks of group * interval tokens) along each axis, the last one perhaps partly outside the map."""
        group, interval, _ = self._axes(height, width)
        return tuple(ceil_div(n, g * i) for n, g, i in zip((height, width), group, interval))

    def split(self, x: Tensor) -> Tensor:
        """``[B, H, W, ...]`` to ``[B, groups, N, ...]``; places outside the map are zero."""
        height, width = x.shape[1:3]
        (gy, gx), (ay, ax), (sy, sx) = self._axes(height, width)
        if not known(height, width):  # the last place is zero
            tokens = F.pad(x.flatten(1, 2), (0, 0) * (x.dim() - 3) + (0, 1))
            return tokens[:, self.index(height, width, x.device)]
        ry, rx = self.regions(height, width)
        if sy or sx:
            x = x.roll((-sy, -sx), (1, 2))
        x = pad(x, ry * gy * ay, rx * gx * ax)
        pattern = "b (ry gy ay) (rx gx ax) ... -> b (ry rx ay ax) (gy gx) ..."
        return rearrange(x, pattern, ry=ry, rx=rx, gy=gy, gx=gx)

    def merge(self, x: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `split`: ``[B, groups, N, ...]`` to ``[B, H, W, ...]``."""
        (gy, gx), (ay, ax), shift = self._axes(height, width)
        if not known(height, width):
            return x.flatten(1, 2)[:, self.places(height, width, x.device)]
        ry, rx = self.regions(height, width)
        pattern = "b (ry rx ay ax) (gy gx) ... -> b (ry gy ay) (rx gx ax) ..."
        x = rearrange(x, pattern, ry=ry, rx=rx, gy=gy, gx=gx, ay=ay, ax=ax)
        x = x[:, :height, :width]
        return x.roll(shift, (1, 2)) if any(shift) else x

    def index(self, height: int, width: int, device=None) -> Tensor:
        """Raster index of every token of every group, ``[groups, N]`` int64; -1 outside the map."""
        (gy, gx), (ay, ax), (sy, sx) = self._axes(height, width)
        ry, rx = self.regions(height, width)
        regions, x = divided(torch.arange(ry * rx * ay * ax, device=device)[:, None], ax)
        regions, y = divided(regions, ay)
        region_y, region_x = divided(regions, rx)
        token_y, token_x = divided(torch.arange(gy * gx, device=device), gx)
        y, x = (region_y * gy + token_y) * ay + y, (region_x * gx + token_x) * ax + x
        inside = (y < height) & (x < width)
        y, x = divided(y + sy, height)[1], divided(x + sx, width)[1]
        return (y * width + x).where(inside, -1)

    def places(self, height: int, width: int, device=None) -> Tensor:
        """Position of every token of the map in a flattened `index`, ``[H, W]`` int64."""
        (gy, gx), (ay, ax), (sy, sx) = self._axes(height, width)
        _, rx = self.regions(height, width)
        y = divided(torch.arange(height, device=device)[:, None] + (height - sy), height)[1]
        x = divided(torch.arange(width, device=device) + (width - sx), width)[1]
        (y, residue_y), (x, residue_x) = divided(y, ay), divided(x, ax)
        (region_y, token_y), (region_x, token_x) = divided(y, gy), divided(x, gx)
        group = ((region_y * rx + region_x) * ay + residue_y) * ax + residue_x
        return group * (gy * gx) + token_y * gx + token_x

    def wrapped(self, height: int, width: int, device=None) -> Tensor:
        """Whether the shift carried a token over the lower and the right border, ``[groups, N, 2]`` bool."""
        index = self.index(height, width, device)
        y, x = divided(index, width)
        return torch.stack((y < self.shift[0], x < self.shift[1]), -1) & (index >= 0)[..., None]


def whole(size: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Size of the smallest map that holds one of ``size`` and is a multiple of ``sides``, in tokens."""
    return tuple(ceil_div(n, side) * side for n, side in zip(size, sides))


def pad(x: Tensor, height: int, width: int) -> Tensor:  # [B, H, W, ...] -> [B, height, width, ...]
    """Zeros below and to the right of a map."""
    below, right = height - x.shape[1], width - x.shape[2]
    if surely(below == 0) and surely(right == 0):
        return x
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, right, 0, below))


def crop(x: Tensor, height: int, width: int) -> Tensor:  # [B, H, W, ...] -> [B, height, width, ...]
    """What is left of a map without its last rows and columns. Traced, a copy: whether a slice is contiguous depends on
    the sizes.
    """
    if known(height, width):
        return x[:, :height, :width]
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    return x.flatten(1, 2)[:, rows[:, None] * x.shape[2] + columns]
