"""MaxViT: convolution, block attention and grid attention in every block.

"MaxViT: Multi-Axis Vision Transformer" (Tu et al., ECCV 2022). Parameters are named as in timm, but for the bias
tables, which are stored as Swin stores them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .._layer import convolved, same_strides
from ..partition_attention import MaxSA
from ._blocks import (
    DropPath,
    Pyramid,
    Stage,
    TransformerBlock,
    drop_path_rates,
    initialise,
    nchw,
    nhwc,
    sizes_per_stage,
)

HEAD_DIM = 32

CONFIGS = {
    "maxvit_tiny": dict(embed_dim=(64, 128, 256, 512), depths=(2, 2, 5, 2), stem_width=64, drop_path=0.2),
    "maxvit_small": dict(embed_dim=(96, 192, 384, 768), depths=(2, 2, 5, 2), stem_width=64, drop_path=0.3),
    "maxvit_base": dict(embed_dim=(96, 192, 384, 768), depths=(2, 6, 14, 2), stem_width=64, drop_path=0.4),
    "maxvit_large": dict(embed_dim=(128, 256, 512, 1024), depths=(2, 6, 14, 2), stem_width=128, drop_path=0.6),
    "maxvit_xlarge": dict(embed_dim=(192, 384, 768, 1536), depths=(2, 6, 14, 2), stem_width=192, drop_path=0.6),
}


@dataclass(frozen=True)
class Style:
    """What the published weights, TensorFlow's, timm's and torchvision's, do differently; TensorFlow's is given."""

    act: Callable[[], nn.Module] = partial(nn.GELU, "tanh")  # of the convolutions
    approximate: str = "tanh"  # GELU of the MLPs
    batch_norm: dict = field(default_factory=lambda: {"eps": 1e-3})
    eps: float = 1e-5  # of LayerNorm
    same: bool = True  # where a stride leaves one row over it is the last, not the first
    stem_bias: tuple[bool, bool] = (True, True)
    from_out: bool = True  # MBConv's inner channels: four times those of its output; of its input
    bias: bool = True  # of MBConv's last convolution and of its skip path
    skip: int = 2  # side of the squares that the skip path averages; 3 has zeros around the map
    always: bool = False  # whether the skip path has a convolution where the channels stay, too
    scale_by_width: bool = False  # logits divided by the root of C, not of head_dim
    hidden: bool = True  # the classifier has a hidden layer, and its LayerNorm after the mean; else before it
    head_bias: bool = True


STYLES = {
    "tf": Style(),
    "rw": Style(
        act=nn.SiLU, approximate="none", batch_norm={}, eps=1e-6, same=False, stem_bias=(False, False), from_out=False,
        bias=False, hidden=False,
    ),
    "torchvision": Style(
        act=nn.GELU, approximate="none", batch_norm={"eps": 1e-3, "momentum": 0.01}, same=False,
        stem_bias=(False, True), skip=3, always=True, scale_by_width=True, head_bias=False,
    ),
}  # fmt: skip


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution whose map has ``ceil(H / stride)`` rows, padded as PyTorch or as TensorFlow does."""

    def __init__(self, dim: int, out: int, stride: int = 1, *, same: bool, **options):
        shifts = same and stride == 2
        super().__init__(dim, out, 3, stride, 0 if shifts else 1, **options)
        self.shifts = shifts

    def forward(self, x: Tensor) -> Tensor:
        if self.shifts:  # an even side: nothing above, one row below
            (top, bottom), (left, right) = ((n % 2, 1) for n in x.shape[2:])
            x = F.pad(x, (left, right, top, bottom))
        return self._conv_forward(x, same_strides(self.weight), self.bias)


class Skip(nn.Module):
    """Halves the map by means, and widens it."""

    def __init__(self, dim: int, out: int, style: Style):
        super().__init__()
        self.side = style.skip
        self.expand = nn.Conv2d(dim, out, 1, bias=style.bias) if dim != out or style.always else None

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        x = F.avg_pool2d(x, 3, 2, 1) if self.side == 3 else F.avg_pool2d(x, 2, ceil_mode=True)
        return x if self.expand is None else convolved(self.expand, x)


class SqueezeExcitation(nn.Module):
    """Scales channels by what their means say (Hu et al., CVPR 2018)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        hidden = F.silu(convolved(self.fc1, x.mean((2, 3), keepdim=True)))
        return x * convolved(self.fc2, hidden).sigmoid()


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation (Sandler et al., CVPR 2018), its norm first."""

    def __init__(self, dim: int, out: int, stride: int, style: Style, drop_path: float):
        super().__init__()
        inner = 4 * (out if style.from_out else dim)
        self.shortcut = Skip(dim, out, style) if stride == 2 else None
        self.pre_norm = nn.BatchNorm2d(dim, **style.batch_norm)
        self.conv1_1x1 = nn.Conv2d(dim, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner, **style.batch_norm)
        self.conv2_kxk = Conv3x3(inner, inner, stride, same=style.same, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner, **style.batch_norm)
        self.act = style.act()
        self.se = SqueezeExcitation(inner, inner // 16)
        self.conv3_1x1 = nn.Conv2d(inner, out, 1, bias=style.bias)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        skip = x if self.shortcut is None else self.shortcut(x)
        x = self.act(self.norm1(convolved(self.conv1_1x1, self.pre_norm(x))))
        x = self.act(self.norm2(self.conv2_kxk(x)))
        return skip + self.drop_path(convolved(self.conv3_1x1, self.se(x)))


class Attention(TransformerBlock):
    """Block or grid attention and MLP, each with its residual."""

    def __init__(self, dim: int, mode: str, size: int, mlp_ratio: float, style: Style, drop_path: float):
        attn = MaxSA(dim, dim // HEAD_DIM, mode, size, scale=dim**-0.5 if style.scale_by_width else None)
        super().__init__(attn, mlp_ratio, drop_path, eps=style.eps, approximate=style.approximate)


class Block(nn.Module):
    """MBConv, block attention, grid attention."""

    def __init__(self, conv: MBConv, attn_block: Attention, attn_grid: Attention):
        super().__init__()
        self.conv, self.attn_block, self.attn_grid = conv, attn_block, attn_grid

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        return self.attn_grid(self.attn_block(nhwc(self.conv(nchw(x)))))


class Stem(nn.Module):
    """Two convolutions, to half of the image's resolution."""

    def __init__(self, in_channels: int, width: int, out: int, style: Style):
        super().__init__()
        first, second = style.stem_bias
        self.conv1 = Conv3x3(in_channels, width, 2, same=style.same, bias=first)
        self.norm1 = nn.BatchNorm2d(width, **style.batch_norm)
        self.act = style.act()
        self.conv2 = Conv3x3(width, out, same=style.same, bias=second)

    def forward(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, H / 2, W / 2, C]
        return nhwc(self.conv2(self.act(self.norm1(self.conv1(images)))))


class MaxViT(Pyramid):
    """MaxViT.

    Images of any size: the attention masks what it pads, and the grid spreads over the map that comes.

    Args:
        embed_dim, depths: channels and blocks of each stage.
        stem_width: channels of the stem, one or one for each of its convolutions.
        window_size: tokens along a side of a block, and of the grid: 7 for images of 224 x 224, 12 for 384, 16 for 512.
        style: whose weights it computes with: "tf" (Google's, which timm calls tf), "rw" (timm's own) or "torchvision".
        mlp_ratio: hidden channels of the MLPs over their channels.
        drop_path: stochastic depth at the last block.
        num_classes, in_channels, features_only: see `create_model`.

    Shape:
        ``[B, in_channels, H, W]`` to ``[B, num_classes]``.
    """

    min_size = 2
    classifier = "head.fc"

    def __init__(
        self,
        embed_dim: Sequence[int],
        depths: Sequence[int],
        stem_width: int | Sequence[int] = 64,
        *,
        window_size: int = 7,
        style: str = "tf",
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ):
        super().__init__(num_classes, in_channels, features_only)
        if style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
        self.style, how = style, STYLES[style]
        if isinstance(stem_width, (tuple, list)) and len(stem_width) != 2:
            raise ValueError(f"stem_width must be one int or one for each of the 2 convolutions, got {stem_width!r}")
        stem, depths = sizes_per_stage("stem_width", stem_width, 2), sizes_per_stage("depths", depths)
        rates = drop_path_rates(drop_path, depths)
        self.channels = sizes_per_stage("embed_dim", embed_dim, len(depths))
        if any(dim % HEAD_DIM for dim in self.channels):
            raise ValueError(f"embed_dim must be multiples of {HEAD_DIM}, the channels of a head, got {embed_dim!r}")
        self.stem, self.stages = Stem(in_channels, *stem, how), nn.ModuleList()
        dim = stem[1]
        for out, depth in zip(self.channels, depths):
            blocks = []
            for stride in (2, *(1,) * (depth - 1)):
                rate = next(rates)
                modes = [Attention(out, mode, window_size, mlp_ratio, how, rate) for mode in ("block", "grid")]
                blocks.append(Block(MBConv(dim, out, stride, how, rate), *modes))
                dim = out
            self.stages.append(Stage(blocks))
        if not features_only:
            self.norm = nn.Identity() if how.hidden else nn.LayerNorm(dim, eps=how.eps)
            self.head = self._classifier(dim)
        initialise(self)

    def _classifier(self, width: int) -> nn.Module:
        how = STYLES[self.style]
        fc = nn.Linear(width, self.num_classes, how.head_bias) if self.num_classes else nn.Identity()
        if not how.hidden:
            return nn.Sequential(OrderedDict(fc=fc))
        hidden = nn.Sequential(OrderedDict(fc=nn.Linear(width, width), act=nn.Tanh()))
        return nn.Sequential(OrderedDict(norm=nn.LayerNorm(width, eps=how.eps), pre_logits=hidden, fc=fc))

    def _parts(self) -> tuple[nn.Module, nn.ModuleList]:
        return self.stem, self.stages
