"""MViT (Fan et al., ICCV 2021) and MViTv2 (Li et al., CVPR 2022), as timm and torchvision write them.

Relative distances are rounded as each of them does. A table of another length than the distances need is interpolated
by torchvision; timm takes its first rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

from torch import Tensor, nn

from .._layer import readable, same_strides
from ..pooled_attention import Pool, pool_qkv, pooled_attention
from .recipe import Recipe, Unsuitable, channels, check_projections, expect, is_kind, packed, random, silent

Parts = Sequence[tuple[Optional[nn.Module], Optional[nn.Module]]]  # pool and norm of q, of k and of v


def _pool(operation: nn.Module | None, norm: nn.Module | None) -> Pool | None:
    if operation is None:
        return None
    if isinstance(operation, (nn.MaxPool2d, nn.AvgPool2d)):
        mode = "max" if isinstance(operation, nn.MaxPool2d) else "avg"
        return Pool(kernel=operation.kernel_size, stride=operation.stride, padding=operation.padding, mode=mode)
    return Pool(same_strides(operation.weight), norm.weight, norm.bias, operation.stride, padding=operation.padding)


# timm


def _timm_attention(attn: nn.Module, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, list[int]] | None:
    parts = _timm_parts(attn)
    if _misfit(parts, attn.head_dim, 2):
        return None
    pools, has_cls, eps = [_pool(*pair) for pair in parts], attn.has_cls_token, _eps(parts)
    qkv = packed(attn.qkv(x), attn.num_heads)
    (q, q_size), (k, k_size), (v, _) = pool_qkv(qkv, *pools, thw=tuple(feat_size), has_cls=has_cls, eps=eps)
    tables = None
    if attn.rel_pos_type == "spatial":
        rows = [2 * max(sizes) - 1 for sizes in zip(q_size, k_size)]
        tables = [table[:n] for table, n in zip((attn.rel_pos_h, attn.rel_pos_w), rows)]
        if any(table.shape[0] < n for table, n in zip(tables, rows)):
            return None  # an IndexError there
    out = pooled_attention(
        q,
        k,
        v,
        q_thw=q_size,
        k_thw=k_size,
        rel_pos=tables,
        has_cls=has_cls,
        residual="all" if attn.residual_pooling else "none",
        index="slowfast",
        scale=attn.scale,
    )
    return attn.proj(out.flatten(2)), feat_size if attn.pool_q is None else list(q_size)


def _timm_parts(attn: nn.Module) -> Parts:
    return [(getattr(attn, f"pool_{name}"), getattr(attn, f"norm_{name}")) for name in "qkv"]


def _check_timm(attn: nn.Module) -> str:
    expect(attn.mode in ("conv", "max", "avg"), f"it pools in the mode {attn.mode!r}, which heads do not share")
    check_projections(attn.qkv, attn.proj, attn.num_heads, attn.head_dim)
    _check_parts(_timm_parts(attn), attn.head_dim, 2)
    expect(attn.rel_pos_type in ("spatial", "", None), f"its rel_pos_type is {attn.rel_pos_type!r}")
    if attn.rel_pos_type == "spatial":
        _check_tables(attn.head_dim, attn.rel_pos_h, attn.rel_pos_w)
    return _describe(attn.rel_pos_type == "spatial")


def _pools_first(attn: nn.Module) -> str:
    raise Unsuitable("it pools before it projects, which no operator here does")


def _of_timm(attn: nn.Module) -> list[tuple]:
    side = _side(attn.rel_pos_h.shape[0], attn.pool_q, attn.pool_k) if attn.rel_pos_type == "spatial" else 12
    return [(random(1, side * side + attn.has_cls_token, channels(attn.qkv)[0]), [side, side])]


def _side(rows: int, *pools: nn.Module | None) -> int:
    """Tokens along the map that a table of so many rows was made for."""
    strides = [1 if pool is None else _last(pool.stride) for pool in pools]
    return (rows + 1) // 2 * min(strides)


def _last(stride: object) -> int:
    return stride if isinstance(stride, int) else stride[-1]


# torchvision


def _torchvision_attention(attn: nn.Module, x: Tensor, thw: Sequence[int]) -> tuple[Tensor, tuple[int, ...]] | None:
    parts = _torchvision_parts(attn)
    if parts is None or _misfit(parts, attn.head_dim, 3):
        return None
    pools = [_pool(*pair) for pair in parts]
    qkv = packed(attn.qkv(x), attn.num_heads)
    (q, q_thw), (k, k_thw), (v, _) = pool_qkv(qkv, *pools, thw=tuple(thw), has_cls=True, eps=_eps(parts))
    residual = "all" if attn.residual_with_cls_embed else "all_but_cls"
    out = pooled_attention(
        q,
        k,
        v,
        q_thw=q_thw,
        k_thw=k_thw,
        rel_pos=None if attn.rel_pos_h is None else (attn.rel_pos_t, attn.rel_pos_h, attn.rel_pos_w),
        has_cls=True,
        residual=residual if attn.residual_pool else "none",
        index="torchvision",
        scale=attn.scaler,
    )
    return attn.project(out.flatten(2)), q_thw


def _check_torchvision(attn: nn.Module) -> str:
    check_projections(attn.qkv, attn.project[0], attn.num_heads, attn.head_dim)
    parts = _torchvision_parts(attn)
    expect(parts is not None, _OTHERWISE)
    _check_parts(parts, attn.head_dim, 3)
    tables = [attn.rel_pos_t, attn.rel_pos_h, attn.rel_pos_w]
    expect(len({table is None for table in tables}) == 1, "it has some tables of relative positions and lacks others")
    if tables[0] is not None:
        _check_tables(attn.head_dim, *tables)
    return _describe(tables[0] is not None)


def _torchvision_parts(attn: nn.Module) -> Parts | None:
    """Pools and norms, or None if one of its `Pool` modules does something else than these two, or has hooks."""
    parts = []
    for pool in (attn.pool_q, attn.pool_k, attn.pool_v):
        if pool is None:
            parts.append((None, None))
            continue
        layers = pool.norm_act if is_kind(pool, "Pool") and not pool.norm_before_pool else None
        if layers is None or len(layers) != 1 or not silent(pool, layers):
            return None
        (norm,) = layers
        parts.append((pool.pool, norm))
    return parts


def _of_torchvision(attn: nn.Module) -> list[tuple]:
    thw = (2, 12, 12)
    if attn.rel_pos_h is not None:
        side = _side(attn.rel_pos_h.shape[0], *(pool and pool.pool for pool in (attn.pool_q, attn.pool_k)))
        thw = ((attn.rel_pos_t.shape[0] + 1) // 2, side, side)
    return [(random(1, math.prod(thw) + 1, channels(attn.qkv)[0]), thw)]


# Checks


_OTHERWISE = "it pools otherwise than the published models"


def _misfit(parts: Parts, head_dim: int, axes: int) -> str | None:
    """Reason why pools and norms cannot be read where the published forward calls them, or None."""
    reasons = (_misfit_of(operation, norm, head_dim, axes) for operation, norm in parts)
    reason = next((reason for reason in reasons if reason), None)
    eps = sorted({norm.eps for _, norm in parts if norm is not None}) if reason is None else []
    return f"its norms after pooling have different eps: {eps}" if len(eps) > 1 else reason


def _misfit_of(operation: nn.Module | None, norm: nn.Module | None, head_dim: int, axes: int) -> str | None:
    if operation is None:
        return None if norm is None else "it has a norm without a pool"
    if type(operation) in (nn.MaxPool2d, nn.AvgPool2d) and axes == 2:
        plain = not operation.ceil_mode and getattr(operation, "dilation", 1) == 1
        plain = plain and getattr(operation, "count_include_pad", True) and norm is None
        plain = plain and getattr(operation, "divisor_override", None) is None
        read = silent(operation)
    else:
        if not isinstance(operation, (nn.Conv2d, nn.Conv3d)[axes - 2]):
            return f"it pools with a {type(operation).__name__}, expected a Conv{axes}d"
        if not isinstance(norm, nn.LayerNorm):
            return f"its norm after pooling is a {type(norm).__name__}, expected a LayerNorm"
        if norm.weight is None or norm.bias is None:
            return "its norm after pooling has no weight or no bias"
        if tuple(norm.normalized_shape) != (head_dim,):
            return f"its norm after pooling is over {tuple(norm.normalized_shape)}, expected {head_dim} channels"
        plain = operation.groups == operation.in_channels == operation.out_channels == head_dim
        plain = plain and operation.bias is None and tuple(operation.dilation) == (1,) * axes
        plain = plain and operation.padding_mode == "zeros" and not isinstance(operation.padding, str)
        timms = f"{type(norm).__module__}.{type(norm).__qualname__}" == "timm.layers.norm.LayerNorm"
        read = readable(operation) and (silent(norm) if timms else readable(norm))
    if not plain:
        return f"{_OTHERWISE}: {operation}"
    return (
        None
        if read
        else "a pool or its norm acts only when it is called: it is wrapped, pruned or parametrised, or has hooks"
    )


def _check_parts(parts: Parts, head_dim: int, axes: int) -> None:
    misfit = _misfit(parts, head_dim, axes)
    expect(misfit is None, str(misfit))


def _eps(parts: Parts) -> float:
    """Epsilon of the norms, which agree."""
    return next((norm.eps for _, norm in parts if norm is not None), 1e-6)


def _check_tables(head_dim: int, *tables: Tensor) -> None:
    for table in tables:
        fine = table.dim() == 2 and table.shape[0] > 0 and table.shape[1] == head_dim
        expect(fine, f"its table of relative positions is {list(table.shape)}, expected [distances, {head_dim}]")


def _describe(positions: bool) -> str:
    return f"pool_qkv and pooled_attention{' with relative positions' if positions else ''}"


RECIPES = (
    Recipe(
        "timm",
        "timm.models.mvitv2.MultiScaleAttention",
        {"forward": _timm_attention},
        _check_timm,
        _of_timm,
        attention=("",),
    ),
    Recipe("timm", "timm.models.mvitv2.MultiScaleAttentionPoolFirst", {}, _pools_first, _of_timm, attention=("",)),
    Recipe(
        "torchvision",
        "torchvision.models.video.mvit.MultiscaleAttention",
        {"forward": _torchvision_attention},
        _check_torchvision,
        _of_torchvision,
        attention=("",),
    ),
)
