"""BOAT: attention among tokens that look alike, beside Swin's windows (BOAT-Swin) or CSWin's stripes (BOAT-CSWin).

"BOAT: Bilateral Local Attention Vision Transformer" (Yu et al., BMVC 2022), on "Swin Transformer" (Liu et al., ICCV
2021) and "CSWin Transformer" (Dong et al., CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _checks
from .._layer import convolved
from ..cluster_attention import FeatureSpaceAttention
from ..partition_attention import CrossShapedWindowAttention, WindowAttention
from ._blocks import Pyramid, Stage, TransformerBlock, drop_path_rates, nchw, nhwc, pad_to_multiple, sizes_per_stage

STRIDE = 4  # pixels between the tokens of the first stage

SWIN_CONFIGS = {
    "boat_swin_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), drop_path=0.2),
    "boat_swin_small": dict(embed_dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), drop_path=0.3),
    "boat_swin_base": dict(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.5),
}
CSWIN_CONFIGS = {
    "boat_cswin_tiny": dict(embed_dim=64, depths=(1, 2, 21, 1), heads=(2, 4, 8, 16), drop_path=0.2),
    "boat_cswin_small": dict(embed_dim=64, depths=(2, 4, 32, 2), heads=(2, 4, 8, 16), drop_path=0.4),
    "boat_cswin_base": dict(embed_dim=96, depths=(2, 4, 32, 2), heads=(4, 8, 16, 32), drop_path=0.5),
}


class PatchEmbedding(nn.Module):
    """Swin's: patches of 4 x 4 pixels and LayerNorm."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, STRIDE, STRIDE)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, H / 4, W / 4, C]
        return self.norm(nhwc(convolved(self.proj, pad_to_multiple(images, STRIDE))))


class PatchMerging(nn.Module):
    """Swin's: the four tokens of a square side by side, LayerNorm, Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, H / 2, W / 2, 2 C]
        x = nhwc(pad_to_multiple(nchw(x), 2))
        corners = [x[:, y::2, z::2] for z in (0, 1) for y in (0, 1)]  # the official order: down, then right
        return self.reduction(self.norm(torch.cat(corners, -1)))


class SwinBlock(TransformerBlock):
    """Window attention; where the windows are shifted, feature-space attention; MLP. Each with its residual."""

    def __init__(self, attn: WindowAttention, content: FeatureSpaceAttention | None, mlp_ratio: float, rate: float):
        super().__init__(attn, mlp_ratio, rate)
        self.norm4, self.attnC = (nn.LayerNorm(attn.dim), content) if content is not None else (None, None)

    def _between(self, x: Tensor) -> Tensor:
        # the official code never drops this branch
        return x if self.attnC is None else x + self.attnC(self.norm4(x))


class BoatSwin(Pyramid):
    """BOAT-Swin: Swin, with feature-space attention after the shifted windows of all stages but the last.

    Images of any size: sides that do not divide are filled with zeros, as in Swin's detection code. Parameters are
    named as in the official code.

    Args:
        embed_dim: channels of the first stage; every stage doubles them.
        depths, heads: blocks and attention heads of each stage.
        window_size: tokens along a side of a window.
        mlp_ratio: hidden channels of the MLPs over their channels.
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
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ):
        super().__init__(num_classes, in_channels, features_only)
        _checks.check_sizes(embed_dim=embed_dim, window_size=window_size)
        depths = sizes_per_stage("depths", depths)
        rates, heads = drop_path_rates(drop_path, depths), sizes_per_stage("heads", heads, len(depths))
        self.channels = tuple(embed_dim << s for s in range(len(depths)))
        stages, last = [], len(depths) - 1
        for s, (dim, depth) in enumerate(zip(self.channels, depths)):
            blocks = []
            for i in range(depth):
                attn = WindowAttention(dim, heads[s], window_size, i % 2 * (window_size // 2))
                content = FeatureSpaceAttention(dim, heads[s]) if i % 2 and s < last else None
                blocks.append(SwinBlock(attn, content, mlp_ratio, next(rates)))
            stages.append(Stage(blocks, PatchMerging(dim) if s < last else None))
        self._finish(PatchEmbedding(in_channels, embed_dim), stages)


class ConvEmbedding(nn.Module):
    """CSWin's: a convolution and LayerNorm, on the image (7 x 7, every 4th pixel) and between stages (3 x 3, every 2nd
    token).
    """

    def __init__(self, dim: int, out: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, (kernel - 1) // 2 if stride == 2 else 2)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, H / stride, W / stride, out]
        return self.norm(nhwc(convolved(self.conv, x)))


class ConvMerging(ConvEmbedding):
    """The same on a token map."""

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, H / 2, W / 2, 2 C]
        return super().forward(nchw(x))


class CSWinBlock(TransformerBlock):
    """Cross-shaped windows; in every second block feature-space attention; MLP. Each with its residual."""

    def __init__(
        self, attn: CrossShapedWindowAttention, content: FeatureSpaceAttention | None, mlp_ratio: float, rate: float
    ):
        super().__init__(attn, mlp_ratio, rate)
        self.norm3, self.content_attn = (nn.LayerNorm(attn.dim), content) if content is not None else (None, None)

    def _between(self, x: Tensor) -> Tensor:
        return x if self.content_attn is None else x + self.drop_path(self.content_attn(self.norm3(x)))


class BoatCSWin(Pyramid):
    """BOAT-CSWin: CSWin, with feature-space attention in every second block of all stages.

    Images of any size; the published code takes 224 x 224.

    Args:
        embed_dim: channels of the first stage; every stage doubles them.
        depths, heads: blocks and attention heads of each stage.
        stripe_width: tokens across a stripe, for each stage; the last stage is one window and uses none.
        content_scale: multiplies ``q k^T`` in the feature-space attention. The published weights expect 1.0, a slip of
            the official code; None is ``head_dim ** -0.5``.
        pair_across_batch: another slip of the official code that the published weights were trained with: where a map
            is a single leaf (stage 4 at 224 x 224) the images of a batch, which must be even, lend each other keys. See
            `FeatureSpaceAttention`.
        mlp_ratio: hidden channels of the MLPs over their channels.
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
        stripe_width: Sequence[int] = (1, 2, 7, 7),
        content_scale: float | None = 1.0,
        pair_across_batch: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ):
        super().__init__(num_classes, in_channels, features_only)
        _checks.check_sizes(embed_dim=embed_dim)
        depths = sizes_per_stage("depths", depths)
        rates, heads = drop_path_rates(drop_path, depths), sizes_per_stage("heads", heads, len(depths))
        stripe_width = sizes_per_stage("stripe_width", stripe_width, len(depths))
        self.channels = tuple(embed_dim << s for s in range(len(depths)))
        stages, last = [], len(depths) - 1
        for s, (dim, depth) in enumerate(zip(self.channels, depths)):
            blocks = []
            for i in range(depth):
                attn = CrossShapedWindowAttention(dim, heads[s], stripe_width[s], last_stage=s == last)
                slips = {"scale": content_scale, "pair_across_batch": pair_across_batch}
                content = None if i % 2 else FeatureSpaceAttention(dim, heads[s], **slips)
                blocks.append(CSWinBlock(attn, content, mlp_ratio, next(rates)))
            stages.append(Stage(blocks, ConvMerging(dim, 2 * dim, 3, 2) if s < last else None))
        self._finish(ConvEmbedding(in_channels, embed_dim, 7, STRIDE), stages)
