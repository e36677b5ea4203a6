"""MViT and MViTv2: attention of pooled tokens, on images and on videos.

"Multiscale Vision Transformers" (Fan et al., ICCV 2021); "MViTv2: Improved Multiscale Vision Transformers for
Classification and Detection" (Li et al., CVPR 2022). Parameters are named as in SlowFast's code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._layer import convolved
from .._sizes import surely
from ..pooled_attention import MultiScaleAttention, pool_tokens
from ._blocks import DropPath, Mlp, Model, drop_path_rates, initialise, sizes_per_stage

_V1 = {"kv_stride": 8, "has_cls": True, "abs_pos": True, "expand_in": "mlp", "dropout": 0.5, "num_classes": 400}
_V2 = {"rel_pos": True, "residual": "all_but_cls", "index": "slowfast", "pool_every_q": True}
_V2_VIDEO = {**_V2, "kv_stride": 8, "has_cls": True, "dropout": 0.5, "num_classes": 400}

CONFIGS = {
    "mvit_v1_base_16x4": dict(embed_dim=96, depths=(1, 2, 11, 2), frames=16, drop_path=0.2, **_V1),
    "mvit_v1_base_32x3": dict(embed_dim=96, depths=(1, 2, 11, 2), frames=32, drop_path=0.3, **_V1),
    "mvit_v2_tiny": dict(embed_dim=96, depths=(1, 2, 5, 2), drop_path=0.1, **_V2),
    "mvit_v2_small": dict(embed_dim=96, depths=(1, 2, 11, 2), drop_path=0.1, **_V2),
    "mvit_v2_base": dict(embed_dim=96, depths=(2, 3, 16, 3), drop_path=0.3, **_V2),
    "mvit_v2_large": dict(embed_dim=144, depths=(2, 6, 36, 4), heads=2, expand_in="mlp", drop_path=0.5, **_V2),
    "mvit_v2_small_16x4": dict(embed_dim=96, depths=(1, 2, 11, 2), frames=16, drop_path=0.2, **_V2_VIDEO),
    "mvit_v2_base_32x3": dict(embed_dim=96, depths=(2, 3, 16, 3), frames=32, drop_path=0.3, **_V2_VIDEO),
    "mvit_v2_large_40x3": dict(
        embed_dim=144, depths=(2, 6, 36, 4), heads=2, frames=40, image_size=312, drop_path=0.75, **_V2_VIDEO
    ),
}


class PatchEmbedding(nn.Module):
    """Overlapping patches: 7 x 7 pixels around every 4th, of three frames around every 2nd."""

    def __init__(self, in_channels: int, dim: int, video: bool):
        super().__init__()
        kind, kernel, stride = (nn.Conv3d, (3, 7, 7), (2, 4, 4)) if video else (nn.Conv2d, (7, 7), (4, 4))
        self.proj = kind(in_channels, dim, kernel, stride, tuple(k // 2 for k in kernel))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:  # [B, N, C] and the map
        x = convolved(self.proj, images)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])


def _overlapping(stride: tuple[int, ...]) -> tuple[int, ...]:
    """The kernel of a pool that has none given: one more than the stride where there is one."""
    return tuple(s + 1 if s > 1 else 1 for s in stride)


class Block(nn.Module):
    """Pooled attention and MLP; the width changes in one of them, and the skip path pools as the queries do."""

    def __init__(self, dim: int, out: int, attn: MultiScaleAttention, mlp_ratio: float, drop_path: float):
        super().__init__()
        width = attn.dim_out
        self.in_attn, self.stride = width != dim, attn.stride_q
        self.norm1, self.attn = nn.LayerNorm(dim, eps=attn.eps), attn
        self.norm2, self.mlp = nn.LayerNorm(width, eps=attn.eps), Mlp(width, mlp_ratio, out)
        self.proj = nn.Linear(dim, out) if dim != out else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, thw: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:  # [B, N, C] and its map
        normed = self.norm1(x)
        out, pooled = self.attn(normed, thw)
        x = self._skip(self.proj(normed) if self.in_attn else x, thw) + self.drop_path(out)
        normed = self.norm2(x)
        if self.proj is not None and not self.in_attn:
            x = self.proj(normed)
        return x + self.drop_path(self.mlp(normed)), pooled

    def _skip(self, x: Tensor, thw: tuple[int, ...]) -> Tensor:
        """Maxima over the neighbourhood of every query that stays; a class token goes through."""
        if max(self.stride) == 1:
            return x
        how = {"stride": self.stride, "kernel": _overlapping(self.stride), "mode": "max"}
        heads = x.unflatten(-1, (self.attn.heads, -1))
        return pool_tokens(heads, thw=thw, has_cls=self.attn.has_cls, backend=self.attn.backend, **how)[0].flatten(2)


class MViT(Model):
    """MViT and MViTv2.

    Images and videos of any size: tables of relative positions and position embeddings are interpolated.

    Args:
        embed_dim: channels of the first stage; every stage doubles them.
        depths: blocks of each stage.
        heads: attention heads of the first stage; every stage doubles them.
        frames: of the video that the positions are made for; None is a model of images.
        image_size: pixels along a side of the image that they are made for.
        kv_stride: of the pooling of keys and values in the first stage; every stage halves it.
        kernel: of all pools along time, height and width; None is one more than the stride (1 where it is 1), as
            SlowFast has it without a kernel.
        pool_every_q: whether the queries of every block pass a convolution (MViTv2), or of those alone that enter a
            stage, with a stride of 2 (MViT).
        expand_in: where the channels double: "attn", in the first block of a stage, or "mlp", in the last block before.
        has_cls: whether a class token is what the classifier sees, instead of the mean.
        abs_pos: separable position embeddings (MViT).
        rel_pos: decomposed relative positions in space and time (MViTv2).
        residual: of the pooled queries, as in `MultiScaleAttention`.
        index: how all layers round a relative distance where strides do not divide the map, as in `pooled_attention`:
            "exact", "slowfast" (timm too) or "torchvision". The named models have "slowfast"; the attribute ``index``
            changes it, and `load_checkpoint` sets it to the rule of the weights' author.
        mlp_ratio: hidden channels of the MLPs over their channels.
        dropout: before the classifier.
        drop_path: stochastic depth at the last block.
        num_classes, in_channels, features_only: see `create_model`.

    Shape:
        ``[B, in_channels, H, W]``, with ``frames`` ``[B, in_channels, T, H, W]``, to ``[B, num_classes]``; the maps of
        the stages have the same axes.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        heads: int = 1,
        *,
        frames: int | None = None,
        image_size: int = 224,
        kv_stride: int = 4,
        kernel: int | None = 3,
        pool_every_q: bool = False,
        expand_in: str = "attn",
        has_cls: bool = False,
        abs_pos: bool = False,
        rel_pos: bool = False,
        residual: str = "none",
        index: str = "exact",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ):
        super().__init__(num_classes, in_channels, features_only)
        if expand_in not in ("attn", "mlp"):
            raise ValueError(f"expand_in must be 'attn' or 'mlp', got {expand_in!r}")
        video = frames is not None
        chosen = {name: value for name, value in (("frames", frames), ("kernel", kernel)) if value is not None}
        _checks.check_sizes(embed_dim=embed_dim, heads=heads, image_size=image_size, kv_stride=kv_stride, **chosen)
        _checks.check_numbers(dropout=dropout)
        if image_size < self.min_size or (video and frames < 2):
            raise ValueError(
                f"image_size must be at least {self.min_size} and frames at least 2, the strides of the patches, "
                f"got {image_size} and {frames}"
            )
        depths = sizes_per_stage("depths", depths)
        if video:
            self.layout = "[B, channels, T, H, W]"
        self.depths, self.has_cls = depths, has_cls
        self.patch_embed = PatchEmbedding(in_channels, embed_dim, video)
        size = (*((frames // 2,) if video else ()), image_size // 4, image_size // 4)  # tokens
        self.size = size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if has_cls else None
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, size[-2] * size[-1], embed_dim)) if abs_pos else None
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, size[0], embed_dim)) if abs_pos and video else None
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, embed_dim)) if abs_pos and has_cls else None
        shared = {
            "has_cls": has_cls, "residual": residual, "index": index,
            "rel_pos_spatial": rel_pos, "rel_pos_temporal": rel_pos and video,
        }  # fmt: skip
        widths = [embed_dim << s for s in range(len(depths))]
        rates, dim, blocks, channels = drop_path_rates(drop_path, depths), embed_dim, [], []
        for s, depth in enumerate(depths):
            for i in range(depth):
                enters, leaves = s > 0 and i == 0, s < len(depths) - 1 and i == depth - 1
                stride_q, stride_kv = 2 if enters else 1, max(kv_stride >> s, 1)
                out = widths[s + 1] if expand_in == "mlp" and leaves else widths[s]
                pools = {
                    "stride_q": self._axes(stride_q), "stride_kv": self._axes(stride_kv),
                    "kernel_q": self._kernel(kernel, stride_q) if enters or pool_every_q else 1,
                    "kernel_kv": self._kernel(kernel, stride_kv),
                }  # fmt: skip
                width = dim if expand_in == "mlp" else out
                attn = MultiScaleAttention(dim, width, heads << s, size, **pools, **shared)
                blocks.append(Block(dim, out, attn, mlp_ratio, next(rates)))
                dim, size = out, (*size[:-2], *(n // stride_q for n in size[-2:]))
            channels.append(dim)
        self.channels, self.blocks = tuple(channels), nn.ModuleList(blocks)
        if not features_only:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.dropout, self.head = nn.Dropout(dropout), self._classifier(dim)
        initialise(self)
        for name, parameter in self.named_parameters():
            if name.startswith(("cls_token", "pos_embed")):
                nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def index(self) -> str:
        return self.blocks[0].attn.index

    @index.setter
    def index(self, index: str) -> None:
        for block in self.blocks:
            block.attn.index = index

    def _axes(self, stride: int) -> tuple[int, ...]:
        """Stride along each axis of the map for a stride in space; time is never pooled."""
        return (1,) * (len(self.size) - 2) + (stride, stride)

    def _kernel(self, kernel: int | None, stride: int) -> tuple[int, ...]:
        return _overlapping(self._axes(stride)) if kernel is None else (kernel,) * len(self.size)

    def _positions(self, thw: tuple[int, ...]) -> Tensor:  # [1, N, C]
        """Position embeddings of all tokens of a map, interpolated where it is not the one that they were made for."""
        space, time = self.pos_embed_spatial, self.pos_embed_temporal
        if not all(surely(n == own) for n, own in zip(thw[-2:], self.size[-2:])):
            image = space.transpose(1, 2).unflatten(2, self.size[-2:])
            space = F.interpolate(image, thw[-2:], mode="bilinear").flatten(2).transpose(1, 2)
        if time is None:
            return space
        if not surely(thw[0] == self.size[0]):
            time = F.interpolate(time.transpose(1, 2), thw[0], mode="linear").transpose(1, 2)
        return (time.unsqueeze(2) + space.unsqueeze(1)).flatten(1, 2)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        x, thw = self.patch_embed(images)
        if self.pos_embed_spatial is not None:
            x = x + self._positions(thw)
        if self.cls_token is None:
            return x, thw
        cls = self.cls_token if self.pos_embed_class is None else self.cls_token + self.pos_embed_class
        return torch.cat((cls.expand(len(x), -1, -1), x), 1), thw

    def _stages(self, images: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Tokens and map after every stage."""
        (x, thw), blocks, found = self._embed(images), iter(self.blocks), []
        for depth in self.depths:
            for _ in range(depth):
                x, thw = next(blocks)(x, thw)
            found.append((x, thw))
        return found

    def _maps(self, images: Tensor) -> list[Tensor]:
        return [x[:, int(self.has_cls) :].transpose(1, 2).unflatten(2, thw) for x, thw in self._stages(images)]

    def _features(self, images: Tensor) -> Tensor:
        x = self.norm(self._stages(images)[-1][0])
        return self.dropout(x[:, 0] if self.has_cls else x.mean(1))
