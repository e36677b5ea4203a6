"""MViT (Fan et al., ICCV 2021) and MViTv2 (Li et al., CVPR 2022), as timm and torchvision write them.

Relative distances are rounded as each of them does. A table of another length than the distances need is interpolated
by torchvision; timm takes its first rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .._layer import readable, silent
from ..pooled_attention import Pool, pool_qkv, pooled_attention
from .recipe import Recipe, Unsuitable, channels, check_projections, expect, packed, random


def _reads(operation: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether a pool and its norm may be read where the published forward calls them."""
    if isinstance(operation, (nn.MaxPool2d, nn.AvgPool2d)):
        return type(operation) in (nn.MaxPool2d, nn.AvgPool2d) and silent(operation)
    if operation is None:
        return norm is None
    timms = f"{type(norm).__module__}.{type(norm).__qualname__}" == "timm.layers.norm.LayerNorm"
    return readable(operation) and (silent(norm) if timms else readable(norm))


def _pool(operation: nn.Module | None, norm: nn.Module | None) -> Pool | None:
    if operation is None:
        return None
    if isinstance(operation, (nn.MaxPool2d, nn.AvgPool2d)):
        mode = "max" if isinstance(operation, nn.MaxPool2d) else "avg"
        return Pool(kernel=operation.kernel_size, stride=operation.stride, padding=operation.padding, mode=mode)
    return Pool(operation.weight, norm.weight, norm.bias, operation.stride, padding=operation.padding)


# timm


def _timm_attention(attn: nn.Module, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, list[int]] | None:
    parts = [(getattr(attn, f"pool_{name}"), getattr(attn, f"norm_{name}")) for name in "qkv"]
    if not all(_reads(*pair) for pair in parts):
        return None
    pools = [_pool(*pair) for pair in parts]
    has_cls, eps = attn.has_cls_token, _eps([attn.norm_q, attn.norm_k, attn.norm_v])
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


def _check_timm(attn: nn.Module) -> str:
    expect(attn.mode in ("conv", "max", "avg"), f"it pools in the mode {attn.mode!r}, which heads do not share")
    check_projections(attn.qkv, attn.proj, attn.num_heads, attn.head_dim)
    for name in "qkv":
        _check_pool(getattr(attn, f"pool_{name}"), getattr(attn, f"norm_{name}"), attn.head_dim, 2)
    _eps([attn.norm_q, attn.norm_k, attn.norm_v])
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
    pools = (attn.pool_q, attn.pool_k, attn.pool_v)
    if not silent(*pools, *(pool and pool.norm_act for pool in pools)):
        return None
    norms = [None if pool is None else pool.norm_act[0] for pool in pools]
    parts = [(pool and pool.pool, norm) for pool, norm in zip(pools, norms)]
    if not all(_reads(*pair) for pair in parts):
        return None
    pools = [_pool(*pair) for pair in parts]
    qkv = packed(attn.qkv(x), attn.num_heads)
    (q, q_thw), (k, k_thw), (v, _) = pool_qkv(qkv, *pools, thw=tuple(thw), has_cls=True, eps=_eps(norms))
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
    norms = []
    for name in "qkv":
        pool = getattr(attn, f"pool_{name}")
        if pool is not None:
            layers = list(pool.norm_act) if pool.norm_act is not None else []
            expect(len(layers) == 1 and not pool.norm_before_pool, "it pools otherwise than the published models")
            norms += layers
            _check_pool(pool.pool, layers[0], attn.head_dim, 3)
    _eps(norms)
    tables = [attn.rel_pos_t, attn.rel_pos_h, attn.rel_pos_w]
    expect(len({table is None for table in tables}) == 1, "it has some tables of relative positions and lacks others")
    if tables[0] is not None:
        _check_tables(attn.head_dim, *tables)
    return _describe(tables[0] is not None)


def _of_torchvision(attn: nn.Module) -> list[tuple]:
    thw = (2, 12, 12)
    if attn.rel_pos_h is not None:
        side = _side(attn.rel_pos_h.shape[0], *(pool and pool.pool for pool in (attn.pool_q, attn.pool_k)))
        thw = ((attn.rel_pos_t.shape[0] + 1) // 2, side, side)
    return [(random(1, math.prod(thw) + 1, channels(attn.qkv)[0]), thw)]


# Checks


def _check_pool(operation: nn.Module | None, norm: nn.Module | None, head_dim: int, axes: int) -> None:
    if operation is None:
        return expect(norm is None, "it has a norm without a pool")
    name = type(operation).__name__
    if name in ("MaxPool2d", "AvgPool2d") and axes == 2:
        plain = not operation.ceil_mode and getattr(operation, "dilation", 1) == 1
        plain = plain and getattr(operation, "count_include_pad", True) and norm is None
        plain = plain and getattr(operation, "divisor_override", None) is None
        return expect(plain, f"it pools otherwise than the published models: {operation}")
    expect(name == f"Conv{axes}d", f"it pools with a {name}, expected a Conv{axes}d")
    depthwise = operation.groups == operation.in_channels == operation.out_channels == head_dim
    plain = operation.bias is None and set(operation.dilation) == {1} and operation.padding_mode == "zeros"
    plain = plain and not isinstance(operation.padding, str)
    expect(depthwise and plain, f"it pools otherwise than the published models: {operation}")
    expect(isinstance(norm, nn.LayerNorm), f"its norm after pooling is a {type(norm).__name__}, expected a LayerNorm")
    expect(norm.weight is not None and norm.bias is not None, "its norm after pooling has no weight or no bias")
    shape = tuple(norm.normalized_shape)
    expect(shape == (head_dim,), f"its norm after pooling is over {shape}, expected {head_dim} channels")


def _eps(norms: Sequence[nn.Module | None]) -> float:
    """That of the norms, which must agree."""
    eps = {norm.eps for norm in norms if norm is not None} or {1e-6}
    expect(len(eps) == 1, f"its norms after pooling have different eps: {sorted(eps)}")
    return eps.pop()


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
