"""Blocks that are published as files, not as a library: stand-ins with their names and parts, computed pair by pair.

Microsoft's Swin (classification and detection), MMDetection's Swin, CrossFormer in its three codes and CrossFormer++.
A pair of tokens of the map attends if its places are in one group; everything is a mask over all pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float = 2):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _heads(x: Tensor, heads: int) -> Tensor:  # [B, N, 3C] -> 3, B, heads, N, head_dim
    return x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _grouped(x: Tensor, groups: Tensor, tokens: int) -> Tensor:
    """[B, L, C] to [B * groups, N, C], by the group of every token, of which a group has N."""
    order = groups.argsort(stable=True)
    return x[:, order].reshape(-1, tokens, x.shape[-1])


def _ungrouped(x: Tensor, groups: Tensor) -> Tensor:
    order = groups.argsort(stable=True)
    return x.reshape(-1, len(groups), x.shape[-1])[:, order.argsort()]


def _index(height: int, width: int) -> Tensor:  # [N, N], the row of a table for every pair of tokens
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    return (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1


class WindowAttention(nn.Module):
    """On windows [B * windows, N, C], with a mask [windows, N, N]."""

    def __init__(self, dim: int, window_size: tuple[int, int], num_heads: int, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        h, w = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), num_heads))
        self.register_buffer("relative_position_index", _index(h, w))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = _heads(self.qkv(x), self.num_heads)
        logits = self.scale * q @ k.mT + self.relative_position_bias_table[self.relative_position_index].permute(
            2, 0, 1
        )
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = self.attn_drop(logits.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class WindowMSA(WindowAttention):
    """MMDetection's name for it."""


def raster(height: int, width: int, window: int) -> Tensor:
    """The window of every token of a map that divides."""
    y, x = torch.arange(height) // window, torch.arange(width) // window
    return (y[:, None] * (width // window) + x).flatten()


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:  # [windows, N, N]
    """-100 between tokens that only the shift brought together."""
    over_y, over_x = torch.arange(height) >= height - shift, torch.arange(width) >= width - shift
    region = (2 * over_y.int()[:, None] + over_x.int()).flatten()
    region = _grouped(region[None, :, None], raster(height, width, window), window**2)[..., 0]
    return (region[:, :, None] != region[:, None]) * -100.0


def in_shifted_windows(  # [B, H, W, C]
    attn: nn.Module, x: Tensor, window: int, shift: int, mask: Tensor | None
) -> Tensor:
    """Pads, shifts, attends."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window)).roll((-shift, -shift), (1, 2))
    size = x.shape[1:3]
    out = attn(_grouped(x.flatten(1, 2), raster(*size, window), window**2), mask)
    out = _ungrouped(out, raster(*size, window)).unflatten(1, size).roll((shift, shift), (1, 2))
    return out[:, :height, :width]


class _Swin(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size: int = 7, shift_size: int = 0, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.num_heads, self.window_size, self.shift_size = dim, num_heads, window_size, shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, (window_size, window_size), num_heads, attn_drop)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def _run(self, x: Tensor, height: int, width: int, mask: Tensor | None) -> Tensor:  # [B, L, C]
        maps = self.norm1(x).unflatten(1, (height, width))
        x = x + in_shifted_windows(self.attn, maps, self.window_size, self.shift_size, mask).flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class SwinTransformerBlock(_Swin):
    """Microsoft's, for maps of one size."""

    def __init__(self, dim: int, input_resolution: tuple[int, int], num_heads: int, **options):
        super().__init__(dim, num_heads, **options)
        self.input_resolution = input_resolution
        window, shift = self.window_size, self.shift_size
        self.register_buffer("attn_mask", shift_mask(*input_resolution, window, shift) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, *self.input_resolution, self.attn_mask)


class Detection:
    """Whose stages tell a block the size of the map, and make the mask."""

    class SwinTransformerBlock(_Swin):
        H = W = None

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.H = self.W = None

        def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
            return self._run(x, self.H, self.W, mask_matrix if self.shift_size else None)


class ShiftWindowMSA(nn.Module):
    """MMDetection's."""

    def __init__(self, dim: int, num_heads: int, window_size: int = 7, shift_size: int = 0):
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.w_msa = WindowMSA(dim, (window_size, window_size), num_heads)
        self.drop = nn.Identity()

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        window, shift = self.window_size, self.shift_size
        mask = shift_mask(*(-(-n // window) * window for n in hw_shape), window, shift) if shift else None
        out = in_shifted_windows(self.w_msa, query.unflatten(1, hw_shape), window, shift, mask)
        return self.drop(out.flatten(1, 2))


class DynamicPosBias(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.residual, self.num_heads, self.pos_dim = False, num_heads, dim // 16
        self.pos_proj = nn.Linear(2, self.pos_dim)
        for i, out in enumerate((self.pos_dim, self.pos_dim, num_heads), 1):
            layers = nn.LayerNorm(self.pos_dim), nn.ReLU(), nn.Linear(self.pos_dim, out)
            setattr(self, f"pos{i}", nn.Sequential(*layers))

    def forward(self, offsets: Tensor) -> Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class Attention(nn.Module):
    """CrossFormer's, on groups [B * groups, Gh Gw, C], with a mask [groups, N] of the places to attend to; that of the
    first classification code stores the offsets of its groups.
    """

    def __init__(self, dim: int, num_heads: int, group_size: int | None = None, position_bias: bool = True):
        super().__init__()
        self.dim, self.num_heads, self.position_bias = dim, num_heads, position_bias
        self.scale = (dim // num_heads) ** -0.5
        if position_bias:
            self.pos = DynamicPosBias(dim, num_heads)
        if group_size is not None:
            self.group_size = (group_size, group_size)
            self.register_buffer("biases", torch.cartesian_prod(*[torch.arange(1.0 - group_size, group_size)] * 2))
            self.register_buffer("relative_position_index", _index(*self.group_size))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, height: int, width: int, mask: Tensor | None = None) -> Tensor:
        q, k, v = _heads(self.qkv(x), self.num_heads)
        logits = self.scale * q @ k.mT
        if hasattr(self, "biases"):
            logits = logits + self.pos(self.biases)[self.relative_position_index].permute(2, 0, 1)
        elif self.position_bias:
            place = torch.arange(height * width)
            places = torch.stack((place // width, place % width), -1).to(x.dtype)
            logits = logits + self.pos(places[:, None] - places).permute(2, 0, 1)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None, None] * -1e6).flatten(0, 1)
        return self.proj(self.attn_drop(logits.softmax(-1)).matmul(v).transpose(1, 2).flatten(2))


def _axis(length: int, group: int, interval: int) -> tuple[Tensor, int]:
    """The group of every place of an axis that divides, and how many there are."""
    y = torch.arange(length)
    return y // (group * interval) * interval + y % interval, length // group


class _CrossFormer(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, group_size: int = 7, lsda_flag: int = 0, mlp_ratio: float = 2, **options
    ):
        super().__init__()
        self.dim, self.group_size, self.lsda_flag = dim, group_size, lsda_flag
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        for name, value in options.items():
            setattr(self, name, value)

    def _attend(self, x: Tensor, group: tuple[int, int], interval: tuple[int, int]) -> Tensor:  # [B, H, W, C]
        height, width = x.shape[1:3]
        pads = [-n % (g * i) for n, g, i in zip((height, width), group, interval)]
        x = F.pad(x, (0, 0, 0, pads[1], 0, pads[0]))
        outside = F.pad(torch.zeros(1, height, width, 1), (0, 0, 0, pads[1], 0, pads[0]), value=1.0)
        (y, _), (z, count) = (_axis(n, g, i) for n, g, i in zip(x.shape[1:3], group, interval))
        groups = (y[:, None] * count + z).flatten()
        mask = _grouped(outside.flatten(1, 2), groups, group[0] * group[1])[..., 0] if any(pads) else None
        out = self.attn(_grouped(x.flatten(1, 2), groups, group[0] * group[1]), *group, mask)
        return _ungrouped(out, groups).unflatten(1, tuple(x.shape[1:3]))[:, :height, :width]

    def _run(self, x: Tensor, height: int, width: int, group: tuple[int, int], interval: tuple[int, int]) -> Tensor:
        x = x + self._attend(self.norm1(x).unflatten(1, (height, width)), group, interval).flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class FirstClassification:
    class CrossFormerBlock(_CrossFormer):
        def __init__(self, dim: int, num_heads: int, group_size: int = 7, *args, **options):
            super().__init__(dim, num_heads, group_size, *args, **options)
            self.attn = Attention(dim, num_heads, group_size)

        def forward(self, x: Tensor) -> Tensor:
            height, width = self.input_resolution
            group = (self.group_size,) * 2
            interval = (height // group[0], width // group[1]) if self.lsda_flag else (1, 1)
            return self._run(x, height, width, group, interval)


class FirstDetection:
    class CrossFormerBlock(_CrossFormer):
        def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # noqa: N803
            if min(H, W) <= self.group_size:
                self.lsda_flag, self.group_size = 0, min(H, W)
            interval = (self.interval if self.lsda_flag else 1,) * 2
            group = tuple(-(-n // interval[0]) for n in (H, W)) if self.lsda_flag else (self.group_size,) * 2
            return self._run(x, H, W, group, interval)


class PlusPlus:
    class CrossFormerBlock(_CrossFormer):
        pad_type, use_cpe, adaptive_interval = 0, False, False

        def __init__(self, dim: int, *args, use_extra_conv: bool = False, **options):
            super().__init__(dim, *args, **options)
            if use_extra_conv:
                self.ex_conv, self.ex_ln = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim)

        def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # noqa: N803
            group = self.group_size
            if min(H, W) <= group:
                self.lsda_flag, group = 0, max(H, W)
            x = self._run(x, H, W, (group,) * 2, (self.interval if self.lsda_flag else 1,) * 2)
            if not hasattr(self, "ex_conv"):
                return x
            return self.ex_ln(
                self.ex_conv(x.unflatten(1, (H, W)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
            )
