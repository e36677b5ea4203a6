"""MViT's attention layer: projection, pooling of queries, keys and values, attention, projection."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _checks
from .._layer import readable, readable_convolution, same_strides
from .op import INDICES, RESIDUALS, pooled_attention
from .pool import MODES, Pool, check_axes, check_thw, pool_qkv


class MultiScaleAttention(nn.Module):
    """MViT's multi-scale attention layer: pooled queries attend to keys and values that are pooled further.

    "Multiscale Vision Transformers" (Fan et al., ICCV 2021), section 3.1; with ``rel_pos_spatial`` and ``residual``,
    "MViTv2" (Li et al., CVPR 2022), section 4.1. Parameters are named as in SlowFast and timm (``qkv``, ``proj``,
    ``pool_q``, ``norm_q``, ``rel_pos_h`` ...); `rename` turns torchvision's names into these. Along an axis where
    neither kernel nor stride is above 1, nothing is pooled, and where that holds for all axes the pool and its norm are
    left out. A pool or a norm that is pruned, parametrised, quantised, wrapped, hooked or of another make is called by
    PyTorch.

    Args:
        dim: channels of the input.
        dim_out: channels of q, k, v and of the output.
        heads: attention heads; head_dim is ``dim_out // heads``.
        input_size: the map that the layer is made for, (H, W) or (T, H, W) in tokens: it sets the lengths of the
            tables, not the maps that the layer takes.
        kernel_q, stride_q: of the queries' pooling, an int or one for each axis of the map.
        kernel_kv, stride_kv: of the keys' and of the values' pooling.
        mode: "conv" (depthwise, shared by the heads, with a LayerNorm), "max" or "avg" (without a norm).
        has_cls: whether the first token is a class token.
        rel_pos_spatial, rel_pos_temporal: whether there are tables of relative positions along height and width, and
            along time.
        residual: whether the pooled queries are added to the output: "none", "all" (timm), "all_but_cls" (SlowFast,
            torchvision).
        index: how a relative distance is rounded where the strides do not divide the map, as in `pooled_attention`:
            weights of SlowFast and timm give their numbers with "slowfast", torchvision's with "torchvision". Where
            they divide, all rules are one.
        qkv_bias: whether the fused projection has a bias.
        proj_drop: dropout after the output projection.
        eps: of the norms.

    ``backend``, an attribute, is that of its operators; None, which it is at first, chooses by device.

    Shape:
        ``forward(x, thw)``: ``[B, N, dim]`` and its map to ``[B, N', dim_out]`` and the map of the pooled queries.
    """

    backend: str | None = None

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        input_size: Sequence[int],
        *,
        kernel_q: int | Sequence[int] = 1,
        kernel_kv: int | Sequence[int] = 1,
        stride_q: int | Sequence[int] = 1,
        stride_kv: int | Sequence[int] = 1,
        mode: str = "conv",
        has_cls: bool = False,
        rel_pos_spatial: bool = False,
        rel_pos_temporal: bool = False,
        residual: str = "none",
        index: str = "exact",
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        _checks.check_sizes(dim=dim, dim_out=dim_out, heads=heads)
        if dim_out % heads:
            raise ValueError(f"dim_out must be a multiple of heads, got dim_out {dim_out} and {heads} heads")
        for name, value, known in (("mode", mode, MODES), ("residual", residual, RESIDUALS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        size = check_thw("input_size", input_size)
        axes = len(size)
        if rel_pos_temporal and axes == 2:
            raise ValueError(f"rel_pos_temporal needs a map with time: input_size (T, H, W), got {size}")
        self.dim, self.dim_out, self.heads, self.head_dim = dim, dim_out, heads, dim_out // heads
        self.mode, self.has_cls, self.residual, self.index, self.eps = mode, has_cls, residual, index, eps
        self.kernel_q, self.kernel_kv = (
            check_axes(name, value, axes, 1) for name, value in (("kernel_q", kernel_q), ("kernel_kv", kernel_kv))
        )
        self.stride_q, self.stride_kv = (
            check_axes(name, value, axes, 1) for name, value in (("stride_q", stride_q), ("stride_kv", stride_kv))
        )
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)
        self.proj_drop = nn.Dropout(proj_drop)
        for name, kernel, stride in self._pools():
            present = mode == "conv" and math.prod(kernel) * math.prod(stride) > 1
            self.register_module(f"pool_{name}", self._convolution(kernel, stride) if present else None)
            self.register_module(f"norm_{name}", nn.LayerNorm(self.head_dim, eps=eps) if present else None)
        wanted = (rel_pos_temporal, rel_pos_spatial, rel_pos_spatial)[-axes:]
        lengths = self._table_lengths(size)
        for name, length, want in zip("thw"[-axes:], lengths, wanted):
            table = nn.Parameter(nn.init.trunc_normal_(self.qkv.weight.new_empty(length, self.head_dim), std=0.02))
            self.register_parameter(f"rel_pos_{name}", table if want else None)

    @property
    def index(self) -> str:
        return self._index

    @index.setter
    def index(self, index: str) -> None:
        if index not in INDICES:
            raise ValueError(f"index must be one of {', '.join(INDICES)}, got {index!r}")
        self._index = index

    def _pools(self) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]:
        """Name, kernel and stride of the three pools."""
        keys = (self.kernel_kv, self.stride_kv)
        return ("q", self.kernel_q, self.stride_q), ("k", *keys), ("v", *keys)

    def _convolution(self, kernel: tuple[int, ...], stride: tuple[int, ...]) -> nn.Module:
        kind = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
        padding = tuple(k // 2 for k in kernel)
        return kind(self.head_dim, self.head_dim, kernel, stride, padding, groups=self.head_dim, bias=False)

    def _table_lengths(self, size: tuple[int, ...]) -> list[int]:
        """Rows of the official tables: height and width for the longer side, time as if it were not pooled."""
        side = max(size[-2:])
        longest = max(1, side // self.stride_q[1], side // self.stride_kv[1])
        return [2 * n - 1 for n in (*size[:-2], longest, longest)]

    def _pool(self, name: str, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Pool | None:
        """How the operator pools; None where nothing is pooled."""
        if math.prod(kernel) * math.prod(stride) == 1:
            return None
        if self.mode != "conv":
            return Pool(kernel=kernel, stride=stride, mode=self.mode)
        norm = getattr(self, f"norm_{name}")
        return Pool(same_strides(getattr(self, f"pool_{name}").weight), norm.weight, norm.bias, stride)

    def _is_called(self, name: str, kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
        """Whether a pool and its norm are called, as the operator cannot read them."""
        conv, norm = getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")
        if conv is None:
            return False
        padding = tuple(k // 2 for k in kernel)
        if not readable_convolution(conv, kernel, stride, padding, self.head_dim) or conv.bias is not None:
            return True
        usual = readable(norm) and isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (self.head_dim,)
        return not usual or norm.eps != self.eps or norm.weight is None or norm.bias is None

    def _call(self, name: str, x: Tensor, thw: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """A pool and its norm on tokens ``[B, N, heads, head_dim]``, by PyTorch."""
        cls, x = x[:, : int(self.has_cls)], x[:, int(self.has_cls) :]
        maps = x.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, thw)  # [B * heads, head_dim, *thw]
        maps = getattr(self, f"pool_{name}")(maps)
        pooled = maps.flatten(2).unflatten(0, (len(x), self.heads)).permute(0, 3, 1, 2)
        out = getattr(self, f"norm_{name}")(torch.cat((cls, pooled.to(x.dtype)), 1))
        return out.to(x.dtype), tuple(maps.shape[2:])

    def forward(self, x: Tensor, thw: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        _checks.check_tensor("x", x, "[B, N, C]")
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be [B, N, C] with C = {self.dim}, got {_checks.shape_of(x)}")
        thw = check_thw("thw", thw, x.shape[1], self.has_cls)
        if len(thw) != len(self.kernel_q):
            raise ValueError(f"thw must have the {len(self.kernel_q)} axes of input_size, got {thw}")
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        called = [self._is_called(*pool) for pool in self._pools()]
        pools = (None if by_torch else self._pool(*pool) for by_torch, pool in zip(called, self._pools()))
        how = {"has_cls": self.has_cls, "backend": self.backend}
        parts = zip("qkv", called, pool_qkv(qkv, *pools, thw=thw, eps=self.eps, **how))
        (q, q_thw), (k, k_thw), (v, _) = (self._call(name, *x) if by_torch else x for name, by_torch, x in parts)
        tables = [getattr(self, f"rel_pos_{name}") for name in "thw"[-len(thw) :]]
        out = pooled_attention(
            q, k, v, q_thw=q_thw, k_thw=k_thw, rel_pos=tables, residual=self.residual, index=self.index, **how
        )
        return self.proj_drop(self.proj(out.flatten(2))), q_thw

    @staticmethod
    def rename(key: str) -> str:
        """This layer's name of a parameter of torchvision's ``MultiscaleAttention``; SlowFast's and timm's are its own.

        ``layer.load_state_dict({layer.rename(key): value for key, value in theirs.state_dict().items()})``
        """
        first, *rest = key.split(".")
        if first == "project":
            return f"proj.{rest[-1]}"
        if first.startswith("pool_") and rest[:1] == ["norm_act"]:
            return f"norm_{first[-1]}.{rest[-1]}"
        if first.startswith("pool_") and rest[:1] == ["pool"]:
            return f"{first}.{rest[-1]}"
        return key

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, dim_out={self.dim_out}, heads={self.heads}, kernel_q={self.kernel_q}, "
            f"kernel_kv={self.kernel_kv}, stride_q={self.stride_q}, stride_kv={self.stride_kv}, mode={self.mode!r}, "
            f"residual={self.residual!r}"
        )
