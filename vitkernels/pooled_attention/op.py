"""Pooled attention: the registered operators, their autograd, and the public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import _checks, _dispatch
from .pool import check_thw
from .reference import index_of, resized
from .reference import pooled_attention as _reference

_LAYOUT = "[B, N, heads, head_dim]"
_LAUNCHER = "vitkernels.pooled_attention.kernels"
RESIDUALS = ("none", "all", "all_but_cls")  # by the operators' number
INDICES = ("exact", "slowfast", "torchvision")

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? table_t, Tensor? table_h, Tensor? table_w, "
    "Tensor? index_t, Tensor? index_h, Tensor? index_w"
)
_GEOMETRY = "SymInt[] q_thw, SymInt[] k_thw, bool has_cls, int residual, float scale"


def _forward_fake(q, k, v, *_, interpreted):
    # one log-sum-exp (of base 2) per query, kept for Triton's backward pass
    kept = q.shape[:3] if interpreted or q.device.type == "cuda" else (0,)
    return q.new_empty(q.shape), q.new_empty(kept, dtype=_checks.accumulation_dtype(q))


def _backward_fake(dout, q, k, v, table_t, table_h, table_w, *_, interpreted):
    wide = _checks.accumulation_dtype(q)
    tables = (q.new_empty((0,) if x is None else x.shape, dtype=wide) for x in (table_t, table_h, table_w))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *tables


_dispatch.define("pooled_attention_forward", f"({_INPUTS}, {_GEOMETRY}) -> (Tensor, Tensor)", _forward_fake, _LAUNCHER)
_dispatch.define(
    "pooled_attention_backward",
    f"(Tensor dout, {_INPUTS}, Tensor statistic, {_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    _LAUNCHER,
)


class _PooledAttention(Function):
    """(out, statistic) from q, k, v, the tables along time, height and width, any of which may be None, and for each
    the row of every pair along its axis.
    """

    @staticmethod
    @_dispatch.with_signature
    def forward(*inputs):
        backend, geometry, *tensors = inputs
        run = _dispatch.operator("pooled_attention_forward", backend, tensors[0].device)
        return run(*tensors, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.geometry, *tensors = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @_dispatch.first_derivative
    def backward(ctx, dout, _):
        statistic, *tensors = ctx.saved_tensors
        if dout.stride(-1) != 1:  # an expanded gradient, as of sum()
            dout = dout.contiguous()
        run = _dispatch.operator("pooled_attention_backward", ctx.backend, dout.device)
        gradients = run(dout, *tensors, statistic, *ctx.geometry)
        used = (None if x is None else dx for x, dx in zip(tensors, gradients))
        return None, None, *used, None, None, None


def _refusal(backend: str, q: Tensor, positions: bool) -> str | None:
    """Why ``backend`` cannot run this call, or None."""
    if backend == "triton":
        from .kernels import refusal

        return refusal(q.shape[-1], q.dtype)
    if backend == "sdpa" and positions:
        return "scaled_dot_product_attention takes no relative positions, except as a mask of all scores"
    return None


def _check_qkv(q: object, k: object, v: object) -> None:
    """Queries of one length, keys and values of another; the rest alike."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(name, x, _LAYOUT)
    for name, x in (("k", k), ("v", v)):
        if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(
                f"q, k and v must agree in batch, heads and head_dim, got q {_checks.shape_of(q)} and {name} "
                f"{_checks.shape_of(x)}"
            )
    _checks.check_one_kind(q, k, v)
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k and v must have one length, got k {_checks.shape_of(k)} and v {_checks.shape_of(v)}")


def _check_rel_pos(rel_pos: object, q: Tensor, q_thw: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """A table or None for each axis of the map."""
    names = ("rel_pos_t", "rel_pos_h", "rel_pos_w")[-len(q_thw) :]
    if rel_pos is None:
        return (None,) * len(names)
    if isinstance(rel_pos, Tensor) or not isinstance(rel_pos, Sequence) or len(rel_pos) != len(names):
        got = type(rel_pos).__name__ if not isinstance(rel_pos, (tuple, list)) else f"{len(rel_pos)} entries"
        raise ValueError(f"rel_pos must be ({', '.join(names)}), a table or None for each axis of q_thw, got {got}")
    for name, table in zip(names, rel_pos):
        if table is None:
            continue
        _checks.check_tensor(name, table, "[length, head_dim]")
        if table.shape[1] != q.shape[-1] or table.shape[0] < 1:
            raise ValueError(
                f"{name} must be [length, head_dim] = [any, {q.shape[-1]}], got {_checks.shape_of(table)}; it is "
                "shared by all heads"
            )
        _checks.check_device("q", q, name, table)
    return tuple(rel_pos)


# Queries and keys of which there must be more on a CPU for PyTorch's attention to be as fast as ours, which holds whole
# rows of scores: MViTv1-B 16x4, forward and backward (docs/performance.md).
_MANY = 1024


def _plain(q: Tensor, k: Tensor) -> bool:
    """Whether PyTorch's attention, which has no relative positions, is the better where there are none."""
    return q.device.type == "cuda" or (q.device.type == "cpu" and min(q.shape[1], k.shape[1]) > _MANY)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, has_cls: bool, residual: str, scale: float) -> Tensor:
    """The attention that has no relative positions, by PyTorch."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)
    if residual == "none":
        return out
    if residual == "all" or not has_cls:
        return out + q
    return out + F.pad(q[:, 1:], (0, 0, 0, 0, 1, 0))


def pooled_attention(
    q: Tensor,  # [B, Nq, heads, head_dim]
    k: Tensor,  # [B, Nk, heads, head_dim]
    v: Tensor,  # [B, Nk, heads, head_dim]
    *,
    q_thw: Sequence[int],
    k_thw: Sequence[int],
    rel_pos: Sequence[Tensor | None] | None = None,
    has_cls: bool = False,
    residual: str = "none",
    index: str = "exact",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, Nq, heads, head_dim]
    """MViT's attention of pooled queries to pooled keys with decomposed relative positions, as one fused operator.

    "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection" (Li et al., CVPR 2022), section
    4.1: ``softmax(scale * q k^T + q R) v + q``, where the relative term is the sum of the products of the unscaled q
    with the row of each axis' table that the pair's distance along it chooses. Nothing of size Nq x Nk is stored.

    Args:
        q: ``[B, Nq, heads, head_dim]``, float32, float64, float16 or bfloat16, any strides (a last dimension that is
            not contiguous is copied).
        k, v: ``[B, Nk, heads, head_dim]``.
        q_thw, k_thw: the maps of the queries and of the keys, (H, W) or (T, H, W) in tokens.
        rel_pos: tables ``[length, head_dim]`` for (height, width) or (time, height, width), shared by all heads, or
            None; a None among them leaves that axis out. Between maps of Q and K tokens along an axis the distances
            are ``2 * max(Q, K) - 1``; a table of another length is interpolated linearly, and learns through that. Used
            in float32 (float64 with float64 inputs).
        has_cls: whether the first query and the first key are class tokens, which have no place on the map: their row
            and column take no relative term.
        residual: what is added to the output: "none", "all" (the queries), "all_but_cls".
        index: how a distance is rounded to a row where Q and K do not divide: "exact" (rational arithmetic, rounded
            down), or "slowfast" or "torchvision", in float32 as those libraries do.
        scale: multiplies ``q k^T``; ``head_dim ** -0.5`` if None.
        backend: "triton", "cpu", "sdpa" (without rel_pos: PyTorch's ``scaled_dot_product_attention``) or "reference";
            None chooses by device, and without rel_pos "sdpa" on GPUs, and on CPUs for more than 1,024 queries and
            keys. A backend that is asked for runs or refuses.

    Returns:
        ``[B, Nq, heads, head_dim]`` in q's dtype (autocast's dtype where autocast is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend cannot run here or cannot run this call.
    """
    _check_qkv(q, k, v)
    q_thw = check_thw("q_thw", q_thw, q.shape[1], has_cls, "q")
    k_thw = check_thw("k_thw", k_thw, k.shape[1], has_cls, "k")
    if len(q_thw) != len(k_thw):
        raise ValueError(f"q_thw and k_thw must have the same axes, got {q_thw} and {k_thw}")
    tables = _check_rel_pos(rel_pos, q, q_thw)
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, got {residual!r}")
    if index not in INDICES:
        raise ValueError(f"index must be one of {', '.join(INDICES)}, got {index!r}")
    scale = _checks.check_scale(scale, q.shape[-1])
    q, k, v = _checks.follow_autocast(q, k, v)
    positions = any(table is not None for table in tables)
    if _dispatch.asked(backend) is None and not positions and _plain(q, k):
        backend = "sdpa"
    backend = _dispatch.select(
        "pooled_attention", q.device, backend, lambda backend: _refusal(backend, q, positions), others=("sdpa",)
    )
    if q.numel() == 0:  # nothing to attend to, and gradients of zero
        zeros = (x.sum() for x in (q, k, v, *tables) if x is not None)
        return q.new_empty(q.shape) + sum(zeros).to(q.dtype)
    if backend == "sdpa":
        return _sdpa(q, k, v, has_cls, residual, scale)
    wide = _checks.accumulation_dtype(q)
    # maps are volumes from here on
    missing = 3 - len(q_thw)
    tables, q_thw, k_thw = [None] * missing + list(tables), [1] * missing + list(q_thw), [1] * missing + list(k_thw)
    indices = [None] * 3
    for axis, (table, queries, keys) in enumerate(zip(tables, q_thw, k_thw)):
        if table is not None:
            tables[axis] = resized(table.to(wide), queries, keys).contiguous()
            indices[axis] = index_of(queries, keys, index, table.device)
    if backend == "reference":
        return _reference(q, k, v, tables, indices, q_thw, k_thw, has_cls, residual, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    geometry = (q_thw, k_thw, has_cls, RESIDUALS.index(residual), scale)
    return _dispatch.run(_PooledAttention, backend, geometry, q, k, v, *tables, *indices)[0]
