"""Triton kernels of pooled attention.

A program holds a tile of BLOCK queries (or keys) and streams STEP keys (or queries) at a time, by an online softmax.
Relative positions are further columns of q (`positions.py`), computed before and added to the logits of a step as one
more product, with keys that are one-hot and are made in registers. The forward saves one statistic per query, its
log-sum-exp in base 2: the weights are exp2 of one difference.

M and N queries or keys, D elements of a head and C columns make tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    LOG2E,
    Rows,
    Tokens,
    accumulate,
    add_rows,
    divisor,
    dot,
    end_sums,
    load_both,
    load_columns,
    load_rows,
    log_sum,
    matmul,
    rounded,
    softmax_step,
    start_sums,
    store_rows,
    zeros,
)
from .positions import Columns, one_hot


class Sizes(NamedTuple):
    """Of the whole call, in tokens but for ``batch`` and ``heads``."""

    batch: int
    heads: int
    queries: int
    keys: int
    cls: int


class Relative(NamedTuple):
    """The relative products of queries, [parts * B, 1, Nq, heads, C], and which of them a key takes."""

    products: Rows
    columns: Columns


class Statistics(NamedTuple):
    """Of every query, [B, Nq, heads]."""

    lse: Tensor  # log2 of the sum of 2**(logits * log2(e))
    delta: Tensor  # sum of weights * their gradient
    total: Tensor | None  # of the weights: 1 but for the rounding of lse, which only float32 and float64 show


@triton.jit
def _tokens(first, tokens, N: tl.constexpr):
    """N tokens from ``first`` on; those beyond the last are not inside."""
    token = first + tl.arange(0, N)
    zero = tl.zeros_like(token)
    return Tokens(zero, token, token < tokens, zero)


@triton.jit
def _held(tokens, heads, BLOCK: tl.constexpr):
    """This program's head, plane (an image, of one of several parts) and tokens."""
    program, tiles = tl.program_id(0), tl.cdiv(tokens, BLOCK)
    tile = program // heads % tiles
    return program % heads, program // heads // tiles, _tokens(tile * BLOCK, tokens, BLOCK)


@triton.jit
def _with_place(query, sizes):
    """The queries but for the class token, which has no place on the map."""
    return Tokens(query.y, query.x, query.inside & (query.x >= sizes.cls), query.wrapped)


@triton.jit
def _statistic_pointers(p_statistic, image, head, query, sizes):  # [N]
    row = tl.cast(image, tl.int64) * sizes.queries + query.x
    return p_statistic + row * sizes.heads + head


@triton.jit
def _load_statistic(p_statistic, image, head, query, sizes, OTHER: tl.constexpr):  # [N]
    return tl.load(_statistic_pointers(p_statistic, image, head, query, sizes), mask=query.inside, other=OTHER)


@triton.jit
def _store_statistic(p_statistic, image, head, query, sizes, value):  # [N]
    tl.store(_statistic_pointers(p_statistic, image, head, query, sizes), value, mask=query.inside)


@triton.jit
def _logits(
    b_rows, b_columns, relative, image, head, query, key, sizes, scale,
    QUERIES: tl.constexpr, PARTS: tl.constexpr, SPEC: tl.constexpr, COLUMNS: tl.constexpr,
):  # [M, D], [D, N] -> [M, N]  # fmt: skip
    """Logits, times log2(e). With QUERIES rows are queries, and keys beyond the last have -inf; else rows are keys."""
    logits, factor = matmul(b_rows, b_columns, SPEC.PRECISION), scale * LOG2E
    if PARTS > 0:
        logits, factor = logits * scale, LOG2E
    for part in tl.static_range(PARTS):
        plane = part * sizes.batch + image
        o_column = part * COLUMNS.D + tl.arange(0, COLUMNS.BLOCK_D)
        if QUERIES:
            b_products = load_rows(relative.products, plane, head, _with_place(query, sizes), COLUMNS)  # [M, C]
            taken = one_hot(key.x[None, :], o_column[:, None], relative.columns, b_rows.dtype)  # [C, N]
            logits = dot(b_products, taken, logits, SPEC.PRECISION)
        else:
            b_products = load_columns(relative.products, plane, head, _with_place(query, sizes), COLUMNS)  # [C, N]
            taken = one_hot(key.x[:, None], o_column[None, :], relative.columns, b_rows.dtype)  # [M, C]
            logits = dot(taken, b_products, logits, SPEC.PRECISION)
    logits = rounded(logits, factor)
    return tl.where(key.inside[None, :], logits, float("-inf")) if QUERIES else logits


@triton.jit
def attention_forward(
    q, k, v, out, p_lse, relative, sizes, scale, PARTS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of queries over all keys."""
    head, image, query = _held(sizes.queries, sizes.heads, BLOCK)
    b_q = load_rows(q, image, head, query, SPEC)  # [M, D]
    b_out = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype)
    total = start_sums(b_out, STEP, b_q.dtype)
    highest = tl.sum(b_out, 1) - float("inf")
    for first in range(0, sizes.keys, STEP):
        key = _tokens(first, sizes.keys, STEP)
        b_kt = load_columns(k, image, head, key, SPEC)  # [D, N]
        logits = _logits(b_q, b_kt, relative, image, head, query, key, sizes, scale, True, PARTS, SPEC, COLUMNS)
        weights, shrink, highest, total = softmax_step(logits, highest, total)
        b_v = load_rows(v, image, head, key, SPEC)  # [N, D]
        b_out = accumulate(tl.cast(weights, b_v.dtype), b_v, b_out * shrink[:, None], SPEC.PRECISION)
    total = end_sums(total)
    b_out = _add_residual(b_out / divisor(total)[:, None], b_q, query, sizes, RESIDUAL)
    store_rows(out, image, head, query, b_out, SPEC)
    _store_statistic(p_lse, image, head, query, sizes, log_sum(highest, total))


@triton.jit
def _add_residual(b_out, b_q, query, sizes, RESIDUAL: tl.constexpr):  # [M, D]
    """Of no query, of every query, or of those on the map."""
    if RESIDUAL == 0:
        return b_out
    else:
        b_q = tl.cast(b_q, b_out.dtype)
        return b_out + (b_q if RESIDUAL == 1 else tl.where((query.x >= sizes.cls)[:, None], b_q, 0.0))


@triton.jit
def attention_backward_query(
    dout, q, k, v, dq, dproducts, statistics, relative, sizes, scale, PARTS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of queries over all keys, twice: delta, then dq and the gradient of one part of the relative products."""
    head, plane, query = _held(sizes.queries, sizes.heads, BLOCK)
    part, image = plane // sizes.batch, plane % sizes.batch
    lse = _load_statistic(statistics.lse, image, head, query, sizes, float("inf"))  # no weights where no query is
    b_q, b_do = load_rows(q, image, head, query, SPEC), load_rows(dout, image, head, query, SPEC)  # [M, D]
    b_dq, b_dproducts = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype), zeros(BLOCK, COLUMNS.BLOCK_D, b_q.dtype)
    delta = start_sums(b_dq, STEP, b_q.dtype)
    total = delta
    o_column = part * COLUMNS.D + tl.arange(0, COLUMNS.BLOCK_D)
    for PASS in tl.static_range(2):
        for first in range(0, sizes.keys, STEP):
            key = _tokens(first, sizes.keys, STEP)
            b_k, b_kt = load_both(k, image, head, key, SPEC)  # [N, D], [D, N]
            logits = _logits(b_q, b_kt, relative, image, head, query, key, sizes, scale, True, PARTS, SPEC, COLUMNS)
            weights = tl.exp2(logits - lse[:, None])  # [M, N]
            dweights = matmul(b_do, load_columns(v, image, head, key, SPEC), SPEC.PRECISION)
            if PASS == 0:
                delta = add_rows(delta, weights * dweights)
                total = add_rows(total, weights)
            else:
                dlogits = tl.cast(weights * (dweights - delta[:, None]), b_k.dtype)
                b_dq = accumulate(dlogits, b_k, b_dq, SPEC.PRECISION)
                if PARTS > 0:
                    taken = one_hot(key.x[:, None], o_column[None, :], relative.columns, b_k.dtype)  # [N, C]
                    b_dproducts = dot(dlogits, taken, b_dproducts, SPEC.PRECISION)
        if PASS == 0:
            delta, total = end_sums(delta), divisor(end_sums(total))
            if statistics.total is not None:
                delta /= total
    if statistics.total is not None:
        b_dq, b_dproducts = b_dq / total[:, None], b_dproducts / total[:, None]
    if part == 0:
        store_rows(dq, image, head, query, _add_residual(b_dq * scale, b_do, query, sizes, RESIDUAL), SPEC)
        _store_statistic(statistics.delta, image, head, query, sizes, delta)
        if statistics.total is not None:
            _store_statistic(statistics.total, image, head, query, sizes, total)
    if PARTS > 0:
        store_rows(dproducts, plane, head, query, b_dproducts, COLUMNS)


@triton.jit
def attention_backward_key(
    dout, q, k, v, dk, dv, statistics, relative, sizes, share, scale,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of keys over a share of the queries: dk and dv, or parts of them. No weights are transposed."""
    head, plane, key = _held(sizes.keys, sizes.heads, BLOCK)
    image, start = plane % sizes.batch, plane // sizes.batch * share
    b_k, b_v = load_rows(k, image, head, key, SPEC), load_rows(v, image, head, key, SPEC)  # [M, D]
    b_dk, b_dv = zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype), zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype)
    for first in range(start, tl.minimum(start + share, sizes.queries), STEP):
        query = _tokens(first, sizes.queries, STEP)
        lse = _load_statistic(statistics.lse, image, head, query, sizes, float("inf"))  # no weights where no query is
        b_q, b_qt = load_both(q, image, head, query, SPEC)  # [N, D], [D, N]
        logits = _logits(b_k, b_qt, relative, image, head, query, key, sizes, scale, False, PARTS, SPEC, COLUMNS)
        weights = tl.exp2(logits - lse[None, :])  # [M, N]
        if statistics.total is not None:
            weights /= _load_statistic(statistics.total, image, head, query, sizes, 1.0)[None, :]
        b_do, b_dot = load_both(dout, image, head, query, SPEC)
        b_dv = accumulate(tl.cast(weights, b_do.dtype), b_do, b_dv, SPEC.PRECISION)
        dweights = matmul(b_v, b_dot, SPEC.PRECISION)
        delta = _load_statistic(statistics.delta, image, head, query, sizes, 0.0)
        dlogits = tl.cast(weights * (dweights - delta[None, :]), b_q.dtype)
        b_dk = accumulate(dlogits, b_q, b_dk, SPEC.PRECISION)
    store_rows(dk, plane, head, key, b_dk * scale, SPEC)
    store_rows(dv, plane, head, key, b_dv, SPEC)
