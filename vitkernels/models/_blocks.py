"""What the four families share: the model around the stages, stochastic depth, the MLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._dispatch import check_family
from .._layer import AttentionLayer
from .._sizes import ceil_div, surely
from ..pooled_attention import MultiScaleAttention


class Model(nn.Module):
    """Four stages, each with a map of half the last one's side, and a classifier on the last map.

    A family fills in `_maps`, the map after every stage, and `_features`, what the classifier sees.

    Attributes:
        channels: of the map after each stage.
        num_classes: of the classifier; 0 leaves it out, and the model returns what it would see.
        features_only: whether the model returns the maps of the four stages instead, as detection and segmentation
            want them; it then has neither a final norm nor a classifier.
        backend: of all attention layers; None chooses by device.
    """

    channels: tuple[int, ...]
    classifier: str = "head"  # the Linear that knows the classes
    min_size: int = 4  # pixels, of the stem's stride
    layout = "[B, channels, H, W]"

    def __init__(self, num_classes: int, in_channels: int, features_only: bool):
        super().__init__()
        _checks.check_ints(num_classes=num_classes, in_channels=in_channels)
        if num_classes < 0 or in_channels < 1:
            raise ValueError(
                f"num_classes must be at least 0 and in_channels at least 1, got {num_classes} and {in_channels}"
            )
        self.num_classes, self.in_channels, self.features_only = num_classes, in_channels, features_only
        self._backend: str | None = None

    @property
    def backend(self) -> str | None:
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        if backend is not None:
            check_family(backend)
        self._backend = backend
        for module in self.modules():
            if isinstance(module, (AttentionLayer, MultiScaleAttention)):
                module.backend = backend

    def _classifier(self, width: int) -> nn.Module:
        return nn.Linear(width, self.num_classes) if self.num_classes else nn.Identity()

    def _check(self, images: Tensor) -> None:
        _checks.check_tensor("images", images, self.layout)
        if images.shape[1] != self.in_channels:
            last = images.shape[-1] == self.in_channels
            hint = (
                "channels come before height and width: permute them"
                if last
                else f"create_model(..., in_channels={images.shape[1]}) makes a model for these"
            )
            raise ValueError(
                f"images must be {self.layout} with {self.in_channels} channels, got {_checks.shape_of(images)}; {hint}"
            )
        if min(images.shape[-2:]) < self.min_size:
            raise ValueError(
                f"images must be at least {self.min_size} x {self.min_size} pixels, the stride of the stem, "
                f"got {_checks.shape_of(images)}"
            )

    def _maps(self, images: Tensor) -> list[Tensor]:  # [B, C, H, W] after every stage
        raise NotImplementedError

    def _features(self, images: Tensor) -> Tensor:  # [B, C]
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        self._check(images)
        return self._maps(images) if self.features_only else self.head(self._features(images))


class Stage(nn.Module):
    """Blocks, and the way to the next stage."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None = None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        for block in self.blocks:
            x = block(x)
        return x


class Pyramid(Model):
    """A model of token maps ``[B, H, W, C]``: an embedding, stages, LayerNorm, mean, classifier."""

    def _finish(self, embedding: nn.Module, stages: Iterable[Stage]) -> None:
        """The last part of the constructor of a family that names its parameters as Swin does."""
        self.patch_embed, self.layers = embedding, nn.ModuleList(stages)
        if not self.features_only:
            self.norm = nn.LayerNorm(self.channels[-1])
            self.head = self._classifier(self.channels[-1])
        initialise(self)

    def _parts(self) -> tuple[nn.Module, nn.ModuleList]:
        """The embedding and the stages."""
        return self.patch_embed, self.layers

    def _maps(self, images: Tensor) -> list[Tensor]:
        embedding, stages = self._parts()
        x, maps = embedding(images), []
        for stage in stages:
            x = stage(x)
            maps.append(nchw(x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def _features(self, images: Tensor) -> Tensor:
        return self.norm(nhwc(self._maps(images)[-1])).mean((1, 2))


def nchw(x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, C, H, W]
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, H, W, C]
    return x.permute(0, 2, 3, 1)


def pad_to_multiple(x: Tensor, of: int) -> Tensor:  # [B, C, H, W]
    """Zeros below and to the right of a map or an image whose sides do not divide."""
    below, right = (ceil_div(n, of) * of - n for n in x.shape[2:])
    return x if surely(below == 0) and surely(right == 0) else F.pad(x, (0, right, 0, below))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): drops a residual branch of whole images, and scales the others."""

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate:.3g}"


def drop_path_rates(most: float, depths: Sequence[int]) -> Iterator[float]:
    """The rate of every block: from 0 at the first to ``most`` at the last."""
    _checks.check_numbers(drop_path=most)
    blocks = sum(depths)
    return (most * i / max(blocks - 1, 1) for i in range(blocks))


class Mlp(nn.Module):
    """Linear, GELU, Linear over the last dimension."""

    def __init__(self, dim: int, ratio: float, out: int | None = None, *, approximate: str = "none"):
        super().__init__()
        _checks.check_numbers(mlp_ratio=ratio)
        hidden = int(dim * ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio must give the MLP of {dim} channels at least 1 hidden channel, got {hidden}")
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP on a token map, each behind a LayerNorm and with its residual."""

    def __init__(
        self,
        attn: AttentionLayer,
        mlp_ratio: float,
        drop_path: float,
        *,
        eps: float = 1e-5,
        approximate: str = "none",
    ):
        super().__init__()
        dim = attn.dim
        self.norm1, self.attn = nn.LayerNorm(dim, eps=eps), attn
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=eps), Mlp(dim, mlp_ratio, approximate=approximate)
        self.drop_path = DropPath(drop_path)

    def _between(self, x: Tensor) -> Tensor:
        """What a family does after the attention and before the MLP."""
        return x

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        x = self._between(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initialise(model: nn.Module) -> None:
    """Linear layers as all four papers' code has them: normal with deviation 0.02, truncated, no bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def per_stage(name: str, value: object, stages: int) -> tuple:
    """``value`` for each stage: one for all, or a sequence of as many."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} must be one value or one for each of the {stages} stages, got {_checks.shown(value)}")
    return values


def sizes_per_stage(name: str, value: object, stages: int | None = None) -> tuple[int, ...]:
    """`per_stage` of ints of at least 1. Without ``stages`` the value is a sequence, whose length is their number."""
    if stages is None and not (isinstance(value, (tuple, list)) and value):
        raise TypeError(f"{name} must be a sequence of ints, one for each stage, got {_checks.shown(value)}")
    values = tuple(value) if stages is None else per_stage(name, value, stages)
    for size in values:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be ints, one for each stage, got {_checks.shown(value)}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1 in every stage, got {_checks.shown(value)}")
    return values
