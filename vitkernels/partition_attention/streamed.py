"""Triton kernels of partition attention for groups of any size, and their launches.

A program holds a tile of BLOCK queries (or keys) of a group and streams STEP keys (or queries) at a time, by an online
softmax: no tile of all pairs fits the registers. The forward saves one statistic per query, its log-sum-exp in base 2:
the weights are exp2 of one multiply-add, and one rounding stands between forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sizes import ceil_div
from .._triton import (
    INTERPRETED,
    Call,
    accumulate,
    add_rows,
    capability,
    divisor,
    end_sums,
    group_tokens,
    hide,
    launch,
    load_both,
    load_columns,
    load_rows,
    log_sum,
    matmul,
    pair_bias,
    pair_logits,
    place,
    processors,
    softmax_step,
    start_sums,
    store_rows,
    zeros,
)

BLOCK, STEP = 64, 32  # tokens: with 64 to a step the backward spills


class Statistics(NamedTuple):
    """Of every query, [B, H, W, heads]."""

    lse: Tensor  # log2 of the sum of 2**(logits * log2(e))
    delta: Tensor  # sum of weights * their gradient
    total: Tensor | None  # of the weights: 1 but for the rounding of lse, which only float32 and float64 show


@triton.jit
def _held(geometry, heads, BLOCK: tl.constexpr):
    """This program's head, image and group, and the tokens that it holds: numbers and places."""
    tiles = tl.cdiv(geometry.group_h * geometry.group_w, BLOCK)
    program = tl.program_id(0)
    image, start = place(program // heads // tiles, geometry)
    o_token = program // heads % tiles * BLOCK + tl.arange(0, BLOCK)
    return program % heads, image, start, o_token, group_tokens(o_token, start, geometry)


@triton.jit
def _bias(p_table, head, o_query, o_key, geometry):
    """The bias of a tile of pairs, or of none."""
    if p_table is None:
        return 0.0
    else:
        size = (2 * geometry.group_h - 1) * (2 * geometry.group_w - 1)
        return pair_bias(p_table + tl.cast(head, tl.int64) * size, o_query, o_key, geometry)


@triton.jit
def _statistic_pointers(p_statistic, image, head, heads, tokens, geometry):  # [N]
    row = (tl.cast(image, tl.int64) * geometry.height + tokens.y) * geometry.width + tokens.x
    return p_statistic + row * heads + head


@triton.jit
def _load_statistics(statistics, image, head, heads, query, geometry):  # [M], [M]
    """Those of a query outside the map make its weights and their gradients zero."""
    p_lse = _statistic_pointers(statistics.lse, image, head, heads, query, geometry)
    p_delta = _statistic_pointers(statistics.delta, image, head, heads, query, geometry)
    lse = tl.load(p_lse, mask=query.inside, other=float("inf"))
    return lse, tl.load(p_delta, mask=query.inside, other=0.0)


@triton.jit
def _over_total(statistics, image, head, heads, query, geometry):  # [M]
    """What the weights of a query that was given its lse are still to be multiplied by."""
    p_total = _statistic_pointers(statistics.total, image, head, heads, query, geometry)
    return 1 / tl.load(p_total, mask=query.inside, other=1.0)


@triton.jit
def _streamed_attention_forward(
    q, k, v, out, p_table, p_lse, geometry, heads, scale, BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr
):
    """A tile of queries over all keys."""
    head, image, start, o_query, query = _held(geometry, heads, BLOCK)
    b_q = load_rows(q, image, head, query, SPEC)  # [M, D]
    b_out = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype)
    total = start_sums(b_out, STEP, b_q.dtype)
    highest = tl.sum(b_out, 1) - float("inf")
    for first in range(0, geometry.group_h * geometry.group_w, STEP):
        o_key = first + tl.arange(0, STEP)
        key = group_tokens(o_key, start, geometry)
        products = matmul(b_q, load_columns(k, image, head, key, SPEC), SPEC.PRECISION)  # [M, N]
        bias = _bias(p_table, head, o_query[:, None], o_key[None, :], geometry)
        logits = hide(pair_logits(products, bias, query, key, scale, geometry), key)
        weights, shrink, highest, total = softmax_step(logits, highest, total)
        b_v = load_rows(v, image, head, key, SPEC)  # [N, D]
        b_out = accumulate(tl.cast(weights, b_v.dtype), b_v, b_out * shrink[:, None], SPEC.PRECISION)
    total = end_sums(total)
    store_rows(out, image, head, query, b_out / divisor(total)[:, None], SPEC)
    p_lse = _statistic_pointers(p_lse, image, head, heads, query, geometry)
    tl.store(p_lse, log_sum(highest, total), mask=query.inside)


@triton.jit
def _streamed_attention_backward_query(
    dout, q, k, v, dq, p_table, statistics, geometry, heads, scale,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A tile of queries over all keys, twice: delta, then dq."""
    head, image, start, o_query, query = _held(geometry, heads, BLOCK)
    lse, _ = _load_statistics(statistics, image, head, heads, query, geometry)
    b_q, b_do = load_rows(q, image, head, query, SPEC), load_rows(dout, image, head, query, SPEC)  # [M, D]
    b_dq = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype)
    delta = start_sums(b_dq, STEP, b_q.dtype)
    total = delta
    for PASS in tl.static_range(2):
        for first in range(0, geometry.group_h * geometry.group_w, STEP):
            o_key = first + tl.arange(0, STEP)
            key = group_tokens(o_key, start, geometry)
            b_k, b_kt = load_both(k, image, head, key, SPEC)  # [N, D], [D, N]
            products = matmul(b_q, b_kt, SPEC.PRECISION)  # [M, N]
            bias = _bias(p_table, head, o_query[:, None], o_key[None, :], geometry)
            logits = hide(pair_logits(products, bias, query, key, scale, geometry), key)
            weights = tl.exp2(logits - lse[:, None])
            dweights = matmul(b_do, load_columns(v, image, head, key, SPEC), SPEC.PRECISION)
            if PASS == 0:
                delta = add_rows(delta, weights * dweights)
                total = add_rows(total, weights)
            else:
                b_dq = accumulate(tl.cast(weights * (dweights - delta[:, None]), b_k.dtype), b_k, b_dq, SPEC.PRECISION)
        if PASS == 0:
            delta, total = end_sums(delta), divisor(end_sums(total))
            if statistics.total is not None:
                delta /= total
    if statistics.total is not None:
        b_dq /= total[:, None]
        p_total = _statistic_pointers(statistics.total, image, head, heads, query, geometry)
        tl.store(p_total, total, mask=query.inside)
    store_rows(dq, image, head, query, b_dq * scale, SPEC)
    p_delta = _statistic_pointers(statistics.delta, image, head, heads, query, geometry)
    tl.store(p_delta, delta, mask=query.inside)


@triton.jit
def _streamed_attention_backward_key(
    dout, q, k, v, dk, dv, p_table, statistics, geometry, heads, scale,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A tile of keys over all queries: dk and dv. Keys are the rows of the tiles, so that no weights are transposed."""
    head, image, start, o_key, key = _held(geometry, heads, BLOCK)
    b_k, b_v = load_rows(k, image, head, key, SPEC), load_rows(v, image, head, key, SPEC)  # [M, D]
    b_dk, b_dv = zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype), zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype)
    for first in range(0, geometry.group_h * geometry.group_w, STEP):
        o_query = first + tl.arange(0, STEP)
        query = group_tokens(o_query, start, geometry)
        lse, delta = _load_statistics(statistics, image, head, heads, query, geometry)
        b_q, b_qt = load_both(q, image, head, query, SPEC)  # [N, D], [D, N]
        products = matmul(b_k, b_qt, SPEC.PRECISION)  # [M, N]
        bias = _bias(p_table, head, o_query[None, :], o_key[:, None], geometry)
        weights = tl.exp2(pair_logits(products, bias, key, query, scale, geometry) - lse[None, :])
        if statistics.total is not None:
            weights *= _over_total(statistics, image, head, heads, query, geometry)[None, :]
        b_do, b_dot = load_both(dout, image, head, query, SPEC)
        b_dv = accumulate(tl.cast(weights, b_do.dtype), b_do, b_dv, SPEC.PRECISION)
        dweights = matmul(b_v, b_dot, SPEC.PRECISION)
        b_dk = accumulate(tl.cast(weights * (dweights - delta[None, :]), b_q.dtype), b_q, b_dk, SPEC.PRECISION)
    store_rows(dk, image, head, key, b_dk * scale, SPEC)
    store_rows(dv, image, head, key, b_dv, SPEC)


@triton.jit
def _streamed_attention_backward_bias(
    dout, q, k, v, p_table, statistics, p_partial, geometry, heads, tasks, scale,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A tile of pairs, summed over a share of the groups."""
    tokens = geometry.group_h * geometry.group_w
    across = tl.cdiv(tokens, STEP)  # tiles
    tiles = tl.cdiv(tokens, BLOCK) * across
    program = tl.program_id(0)
    head, tile, share = program % heads, program // heads % tiles, program // heads // tiles
    shares = tl.num_programs(0) // heads // tiles
    o_query = tile // across * BLOCK + tl.arange(0, BLOCK)
    o_key = tile % across * STEP + tl.arange(0, STEP)
    total = tl.zeros((BLOCK, STEP), p_partial.dtype.element_ty)
    bias = _bias(p_table, head, o_query[:, None], o_key[None, :], geometry)
    for task in range(share, tasks, shares):
        image, start = place(task, geometry)
        query, key = group_tokens(o_query, start, geometry), group_tokens(o_key, start, geometry)
        lse, delta = _load_statistics(statistics, image, head, heads, query, geometry)
        b_q, b_do = load_rows(q, image, head, query, SPEC), load_rows(dout, image, head, query, SPEC)  # [M, D]
        products = matmul(b_q, load_columns(k, image, head, key, SPEC), SPEC.PRECISION)  # [M, N]
        logits = hide(pair_logits(products, bias, query, key, scale, geometry), key)
        if statistics.total is not None:
            over_total = _over_total(statistics, image, head, heads, query, geometry)
            b_do, delta = b_do * over_total[:, None], delta * over_total
        dweights = matmul(b_do, load_columns(v, image, head, key, SPEC), SPEC.PRECISION)
        total += tl.exp2(logits - lse[:, None]) * (dweights - delta[:, None])
    line = tl.cdiv(tokens, BLOCK) * BLOCK
    p_tile = p_partial + (tl.cast(share, tl.int64) * heads + head) * line * line
    tl.store(p_tile + (tl.cast(o_query, tl.int64) * line)[:, None] + o_key[None, :], total)


def _settings(kernel, x: Tensor) -> dict[str, int]:
    """Warps, pipeline stages and a limit of registers, without which the compiler may spill for one more block.

    docs/kernels.md shows what it makes of the kernels for each chip. Three stages fetch the keys of the next step while
    this one is computed; on sm_100 one leaves registers for more blocks, which do as well.
    """
    if INTERPRETED:
        return {}
    narrow = x.shape[-1] <= 32 and x.element_size() == 2
    warps = 8 if x.element_size() > 2 or x.shape[-1] > 64 else 4
    if kernel is _streamed_attention_forward:
        stages = 1 if capability(x.device) == 100 else 3
        return {"num_warps": warps, "num_stages": stages, "maxnreg": 168 if narrow else 255}
    return {"num_warps": warps, "num_stages": 1, "maxnreg": 255}


def _launch(kernel, programs: int, *rows, call: Call, **arguments) -> None:
    arguments |= call.arguments | dict(BLOCK=BLOCK, STEP=STEP) | _settings(kernel, call.example)
    launch(kernel, programs, call.example.device, *rows, **arguments)


def _programs(call: Call) -> int:
    """One for every tile of tokens, of every group and head."""
    return call.tasks * ceil_div(call.tokens, BLOCK) * call.heads


def forward(call: Call, bias: Tensor | None, lse: Tensor) -> None:
    """``call`` on q, k, v and out."""
    _launch(_streamed_attention_forward, _programs(call), *call.rows, call=call, p_table=bias, p_lse=lse)


def backward(call: Call, bias: Tensor | None, lse: Tensor) -> Tensor | None:  # [parts, heads, side, side]
    """``call`` on dout, q, k, v, dq, dk and dv; partial sums of the gradient of every pair's bias."""
    *inputs, dq, dk, dv = call.rows
    delta, total = torch.empty_like(lse), torch.empty_like(lse) if call.example.dtype == lse.dtype else None
    arguments = dict(call=call, p_table=bias, statistics=Statistics(lse, delta, total))
    _launch(_streamed_attention_backward_query, _programs(call), *inputs, dq, **arguments)
    _launch(_streamed_attention_backward_key, _programs(call), *inputs, dk, dv, **arguments)
    if bias is None:
        return None
    heads, side = call.heads, ceil_div(call.tokens, BLOCK)
    pairs = heads * side * ceil_div(call.tokens, STEP)
    shares = min(call.tasks, ceil_div(4 * processors(lse.device), pairs))
    partial = lse.new_empty(shares, heads, side * BLOCK, side * BLOCK)
    arguments.update(p_partial=partial, tasks=call.tasks)
    _launch(_streamed_attention_backward_bias, shares * pairs, *inputs, **arguments)
    return partial
