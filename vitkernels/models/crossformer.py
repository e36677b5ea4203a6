"""CrossFormer and CrossFormer++: embeddings at several scales, short- and long-distance attention in turns.

"CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (Wang et al., ICLR 2022);
"CrossFormer++: A Versatile Vision Transformer Hinging on Cross-scale Attention" (Wang et al., TPAMI 2023). Parameters
are named as in the official code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._layer import convolved, readable_convolution, same_strides
from ..partition_attention import LongShortDistanceAttention
from ._blocks import (
    Pyramid,
    Stage,
    TransformerBlock,
    drop_path_rates,
    nchw,
    nhwc,
    pad_to_multiple,
    per_stage,
    sizes_per_stage,
)

STRIDE = 4  # pixels between the tokens of the first stage

_PP = {"group_size": (4, 4, 14, 7), "interval": (4, 2, 1, 1), "cooling": True}

CONFIGS = {
    "crossformer_tiny": dict(embed_dim=64, depths=(1, 1, 8, 6), heads=(2, 4, 8, 16), drop_path=0.1),
    "crossformer_small": dict(embed_dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), drop_path=0.2),
    "crossformer_base": dict(embed_dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), drop_path=0.3),
    "crossformer_large": dict(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.5),
    "crossformer_pp_small": dict(embed_dim=64, depths=(2, 2, 18, 2), heads=(2, 4, 8, 16), drop_path=0.2, **_PP),
    "crossformer_pp_base": dict(embed_dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), drop_path=0.3, **_PP),
    "crossformer_pp_large": dict(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.5, **_PP),
    "crossformer_pp_huge": dict(embed_dim=128, depths=(6, 6, 18, 2), heads=(4, 8, 16, 32), drop_path=0.5, **_PP),
}


def _scales(dim: int, out: int, kernels: Sequence[int], stride: int) -> nn.ModuleList:
    """Convolutions around the same points: each takes half of the channels that are left, the last one all."""
    sizes = kernels if isinstance(kernels, (tuple, list)) else ()
    if not sizes or any(not isinstance(k, int) or k < stride or (k - stride) % 2 for k in sizes):
        raise ValueError(
            f"kernels with stride {stride} must be a sequence of {stride}, {stride + 2}, {stride + 4} ... pixels, got "
            f"{_checks.shown(kernels)} (patch_size or merge_size)"
        )
    if not out >> (len(kernels) - 1):
        raise ValueError(f"{out} channels are too few for {len(kernels)} kernels, of which each takes half of the rest")
    shares = [out >> (i + 1) for i in range(len(kernels) - 1)]
    shares.append(out - sum(shares))
    return nn.ModuleList(nn.Conv2d(dim, n, k, stride, (k - stride) // 2) for n, k in zip(shares, kernels))


def _squares(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C * 16, H / 4, W / 4]
    """`F.pixel_unshuffle`, which leaves an empty batch as it is."""
    return x.unflatten(3, (-1, STRIDE)).unflatten(2, (-1, STRIDE)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


class CrossScaleEmbedding(nn.Module):
    """Section 3.1: patches of several sizes around the same points, side by side in the channels; then LayerNorm."""

    def __init__(self, in_channels: int, dim: int, kernels: Sequence[int]):
        super().__init__()
        self.projs = _scales(in_channels, dim, kernels, STRIDE)
        self.kernels = tuple(kernels)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, H / 4, W / 4, C]
        images = pad_to_multiple(images, STRIDE)
        # Kernels of 8, 16 and 32 pixels begin and end 2 pixels off the patches. On squares of 4 x 4 pixels that lie so,
        # a pixel a channel, they go from square to neighbour: the same products, which are slow on three channels.
        squares = _squares(F.pad(images, (STRIDE // 2,) * 4))
        maps = []
        for kernel, proj in zip(self.kernels, self.projs):
            side = kernel // STRIDE  # squares
            sizes = ((n, n) for n in (kernel, STRIDE, (kernel - STRIDE) // 2))
            if kernel % (2 * STRIDE) or not readable_convolution(proj, *sizes):
                maps.append(convolved(proj, images))
            else:
                maps.append(F.conv2d(squares, _squares(same_strides(proj.weight)), proj.bias, padding=side // 2 - 1))
        return self.norm(nhwc(torch.cat(maps, 1)))


class Merging(nn.Module):
    """Section 3.1, between the stages: LayerNorm, then convolutions of several sizes at half the resolution."""

    def __init__(self, dim: int, kernels: Sequence[int]):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = _scales(dim, 2 * dim, kernels, 2)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, H / 2, W / 2, 2 C]
        x = pad_to_multiple(nchw(self.norm(x)), 2)
        return nhwc(torch.cat([convolved(reduction, x) for reduction in self.reductions], 1))


class Block(TransformerBlock):
    """Then, in some blocks of CrossFormer++, the amplitude cooling layer."""

    def __init__(self, attn: LongShortDistanceAttention, mlp_ratio: float, drop_path: float, cooling: bool):
        super().__init__(attn, mlp_ratio, drop_path)
        dim = attn.dim
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if cooling else None
        self.ex_ln = nn.LayerNorm(dim) if cooling else None

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        x = super().forward(x)
        return x if self.ex_conv is None else self.ex_ln(nhwc(convolved(self.ex_conv, nchw(x))))


class CrossFormer(Pyramid):
    """CrossFormer; with ``cooling`` and a group size for each stage, CrossFormer++.

    Images of any size: the last patches and tokens of sides that do not divide are filled with zeros, and the attention
    masks what it pads.

    Args:
        embed_dim: channels of the first stage; every stage doubles them.
        depths, heads: blocks and attention heads of each stage.
        group_size: tokens along a side of a group, one or one for each stage.
        interval: tokens from one token of a long-distance group to the next, one or one for each stage.
        long_distance: how the odd blocks group the map, all the same at 224 x 224: "long", groups of ``group_size`` at
            ``interval`` (the current official code); "grid", ``group_size`` tokens spread over the map (the first
            classification code); "interval", every ``interval``-th token of the map (the first detection code).
        small_map: the side of the groups where a map is no longer than ``group_size`` along one axis, as in
            `LongShortDistanceAttention`; None is the rule of the code that ``long_distance`` names, "longer" for "long"
            and "shorter" for the others. All the same for square images.
        padding: "masked" or "attended", as in `LongShortDistanceAttention`; all published weights were trained with
            "masked".
        patch_size: kernels of the embedding, in pixels.
        merge_size: kernels between the stages, one sequence for each step.
        mlp_ratio: hidden channels of the MLPs over their channels, one or one for each stage.
        cooling: the amplitude cooling layer of CrossFormer++ (section 4.2 there) after every third block of a stage
            but its last: a depthwise convolution and a LayerNorm.
        drop_path: stochastic depth at the last block.
        num_classes, in_channels, features_only: see `create_model`.

    Shape:
        ``[B, in_channels, H, W]`` to ``[B, num_classes]``.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        group_size: int | Sequence[int] = 7,
        interval: int | Sequence[int] = (8, 4, 2, 1),
        long_distance: str = "long",
        small_map: str | None = None,
        padding: str = "masked",
        patch_size: Sequence[int] = (4, 8, 16, 32),
        merge_size: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        mlp_ratio: float | Sequence[float] = 4.0,
        cooling: bool = False,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ):
        super().__init__(num_classes, in_channels, features_only)
        if long_distance not in ("long", "grid", "interval"):
            raise ValueError(f"long_distance must be 'long', 'grid' or 'interval', got {long_distance!r}")
        _checks.check_sizes(embed_dim=embed_dim)
        depths = sizes_per_stage("depths", depths)
        if not isinstance(merge_size, (tuple, list)) or len(merge_size) < len(depths) - 1:
            raise ValueError(f"merge_size must have kernels for each of {len(depths) - 1} steps, got {merge_size!r}")
        rates, ratios = drop_path_rates(drop_path, depths), per_stage("mlp_ratio", mlp_ratio, len(depths))
        values = {"heads": heads, "group_size": group_size, "interval": interval}
        heads, groups, intervals = (sizes_per_stage(name, value, len(depths)) for name, value in values.items())
        self.channels = tuple(embed_dim << s for s in range(len(depths)))
        if small_map is None:
            small_map = "longer" if long_distance == "long" else "shorter"
        stages = []
        for s, (dim, depth) in enumerate(zip(self.channels, depths)):
            near = (groups[s], 1)
            far = {"long": (groups[s], intervals[s]), "grid": (groups[s], None), "interval": (None, intervals[s])}
            small, blocks = {"small_map": small_map, "small_size": groups[s], "padding": padding}, []
            for i in range(depth):
                attn = LongShortDistanceAttention(dim, heads[s], *(far[long_distance] if i % 2 else near), **small)
                blocks.append(Block(attn, ratios[s], next(rates), cooling and i % 3 == 2 and i < depth - 1))
            stages.append(Stage(blocks, Merging(dim, merge_size[s]) if s < len(depths) - 1 else None))
        self._finish(CrossScaleEmbedding(in_channels, embed_dim, patch_size), stages)
