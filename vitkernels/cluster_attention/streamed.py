"""Triton kernels of cluster attention for leaves of any size, and their launches.

A program holds a tile of BLOCK queries (or keys) and streams STEP of the keys (or queries) that meet them at a time, by
an online softmax. Both are runs of the order, so that no step is spent on pairs that do not attend. The forward saves
one statistic per query, its log-sum-exp in base 2: the weights are exp2 of one difference.
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
    LOG2E,
    Order,
    Rows,
    Spec,
    accumulate,
    add_rows,
    capability,
    divisor,
    end_sums,
    launch,
    load_both,
    load_columns,
    load_rows,
    log_sum,
    matmul,
    node_start,
    rounded,
    softmax_step,
    start_sums,
    store_rows,
    tokens_at,
    zeros,
)
from ..tree import Tree

BLOCK, STEP = 64, 32  # tokens


class Call(NamedTuple):
    """What the launches of a call share."""

    rows: list[Rows]
    tree: Tree
    overlap: int
    arguments: dict[str, object]  # of every kernel

    @classmethod
    def of(cls, order: Tensor, leaf_size: int, overlap: int, scale: float, *tensors: Tensor) -> Call:
        """``tensors`` [B, N, heads, head_dim], in the order in which the kernels take them."""
        maps = [x.unsqueeze(1) for x in tensors]  # one row of N tokens
        spec, tree = Spec.of(*maps), Tree.of(order.shape[2], leaf_size)
        runs = Order.of(order, tree.levels, overlap)
        arguments = dict(order=runs, heads=order.shape[1], scale=scale, SPEC=spec)
        return cls([Rows.of(x, spec) for x in maps], tree, runs.overlap, arguments)

    @property
    def example(self) -> Tensor:
        return self.rows[0].pointer

    @property
    def leaves(self) -> int:
        """Of every image and head."""
        return self.example.shape[0] * self.example.shape[3] << self.tree.levels

    @property
    def pairs(self) -> int:
        """Of every image and head; a single leaf has an empty sibling."""
        return self.leaves // min(2, 1 << self.tree.levels)


class Statistics(NamedTuple):
    """Of every query, [B, N, heads]."""

    lse: Tensor  # log2 of the sum of 2**(logits * log2(e))
    delta: Tensor  # sum of weights * their gradient
    total: Tensor | None  # of the weights: 1 but for the rounding of lse, which only float32 and float64 show


@triton.jit
def leaf_runs(order, leaf):
    """Where the queries of a leaf begin and end, and where their keys do."""
    first, last = node_start(leaf, order), node_start(leaf + 1, order)
    borrowed = leaf % 2 * order.overlap  # before the leaf; behind it the rest
    return first, last, first - borrowed, last + order.overlap - borrowed


@triton.jit
def run_logits(b_q, b_kt, keys, scale, SPEC: tl.constexpr):  # [M, D], [D, N] -> [M, N]
    """Logits, times log2(e); -inf beyond the run's number of ``keys``."""
    lane = tl.arange(0, b_kt.shape[1])
    return tl.where((lane < keys)[None, :], matmul(b_q, b_kt, SPEC.PRECISION) * (scale * LOG2E), float("-inf"))


@triton.jit
def _held_queries(order, heads, tiles, BLOCK: tl.constexpr):
    """This program's head, image and tokens, and the run of their keys."""
    program = tl.program_id(0)
    leaves = 1 << order.levels
    head, tile, task = program % heads, program // heads % tiles, program // heads // tiles
    first, last, start, stop = leaf_runs(order, task % leaves)
    image = task // leaves
    return head, image, tokens_at(order, image, head, first + tile * BLOCK, last, BLOCK), start, stop


@triton.jit
def _held_keys(order, heads, own, shared, tiles, BLOCK: tl.constexpr):
    """This program's head, image and tokens, and the run of their queries.

    The keys of a sibling pair are three runs: those of the left leaf alone (``own`` tiles), those that both leaves
    attend to, around the split (``shared`` tiles), and those of the right leaf alone.
    """
    program = tl.program_id(0)
    pairs = ((1 << order.levels) + 1) // 2
    head, tile, task = program % heads, program // heads % tiles, program // heads // tiles
    pair, image = task % pairs, task // pairs
    start, split, stop = node_start(2 * pair, order), node_start(2 * pair + 1, order), node_start(2 * pair + 2, order)
    before, behind = split - order.overlap, split + order.overlap
    if tile < own:
        first, last, stop = start + tile * BLOCK, before, split
    elif tile < own + shared:
        first, last = before + (tile - own) * BLOCK, behind
    else:
        first, last, start = behind + (tile - own - shared) * BLOCK, stop, split
    return head, image, tokens_at(order, image, head, first, last, BLOCK), start, stop


@triton.jit
def _statistic_pointers(p_statistic, image, head, heads, tokens, order):  # [N]
    row = tl.cast(image, tl.int64) * order.tokens + tokens.x
    return p_statistic + row * heads + head


@triton.jit
def _load_statistics(statistics, image, head, heads, query, order):  # [M], [M]
    """Those of a query that is not inside make its weights and their gradients zero."""
    p_lse = _statistic_pointers(statistics.lse, image, head, heads, query, order)
    p_delta = _statistic_pointers(statistics.delta, image, head, heads, query, order)
    lse = tl.load(p_lse, mask=query.inside, other=float("inf"))
    return lse, tl.load(p_delta, mask=query.inside, other=0.0)


@triton.jit
def _over_total(statistics, image, head, heads, query, order):  # [M]
    """What the weights of a query that was given its lse are still to be multiplied by."""
    p_total = _statistic_pointers(statistics.total, image, head, heads, query, order)
    return 1 / tl.load(p_total, mask=query.inside, other=1.0)


@triton.jit
def _streamed_cluster_attention_forward(
    q, k, v, out, p_lse, order, heads, tiles, scale, BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr
):
    """A tile of queries over the keys of their leaf."""
    head, image, query, start, stop = _held_queries(order, heads, tiles, BLOCK)
    b_q = load_rows(q, image, head, query, SPEC)  # [M, D]
    b_out = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype)
    total = start_sums(b_out, STEP, b_q.dtype)
    highest = tl.sum(b_out, 1) - float("inf")
    for first in range(start, stop, STEP):
        key = tokens_at(order, image, head, first, stop, STEP)
        logits = run_logits(b_q, load_columns(k, image, head, key, SPEC), stop - first, scale, SPEC)  # [M, N]
        weights, shrink, highest, total = softmax_step(logits, highest, total)
        b_v = load_rows(v, image, head, key, SPEC)  # [N, D]
        b_out = accumulate(tl.cast(weights, b_v.dtype), b_v, b_out * shrink[:, None], SPEC.PRECISION)
    total = end_sums(total)
    store_rows(out, image, head, query, b_out / divisor(total)[:, None], SPEC)
    p_lse = _statistic_pointers(p_lse, image, head, heads, query, order)
    tl.store(p_lse, log_sum(highest, total), mask=query.inside)


@triton.jit
def _streamed_cluster_attention_backward_query(
    dout, q, k, v, dq, statistics, order, heads, tiles, scale,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A tile of queries over the keys of their leaf, twice: delta, then dq."""
    head, image, query, start, stop = _held_queries(order, heads, tiles, BLOCK)
    lse, _ = _load_statistics(statistics, image, head, heads, query, order)
    b_q, b_do = load_rows(q, image, head, query, SPEC), load_rows(dout, image, head, query, SPEC)  # [M, D]
    b_dq = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype)
    delta = start_sums(b_dq, STEP, b_q.dtype)
    total = delta
    for PASS in tl.static_range(2):
        for first in range(start, stop, STEP):
            key = tokens_at(order, image, head, first, stop, STEP)
            b_k, b_kt = load_both(k, image, head, key, SPEC)  # [N, D], [D, N]
            weights = tl.exp2(run_logits(b_q, b_kt, stop - first, scale, SPEC) - lse[:, None])  # [M, N]
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
        p_total = _statistic_pointers(statistics.total, image, head, heads, query, order)
        tl.store(p_total, total, mask=query.inside)
    store_rows(dq, image, head, query, b_dq * scale, SPEC)
    p_delta = _statistic_pointers(statistics.delta, image, head, heads, query, order)
    tl.store(p_delta, delta, mask=query.inside)


@triton.jit
def _streamed_cluster_attention_backward_key(
    dout, q, k, v, dk, dv, statistics, order, heads, own, shared, tiles, scale,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A tile of keys over the queries that attend to them: dk and dv. Keys are the rows: no weights are transposed."""
    head, image, key, start, stop = _held_keys(order, heads, own, shared, tiles, BLOCK)
    b_k, b_v = load_rows(k, image, head, key, SPEC), load_rows(v, image, head, key, SPEC)  # [M, D]
    b_dk, b_dv = zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype), zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype)
    for first in range(start, stop, STEP):
        query = tokens_at(order, image, head, first, stop, STEP)
        lse, delta = _load_statistics(statistics, image, head, heads, query, order)
        b_q, b_qt = load_both(q, image, head, query, SPEC)  # [N, D], [D, N]
        weights = tl.exp2(rounded(matmul(b_k, b_qt, SPEC.PRECISION), scale * LOG2E) - lse[None, :])  # [M, N]
        if statistics.total is not None:
            weights *= _over_total(statistics, image, head, heads, query, order)[None, :]
        b_do, b_dot = load_both(dout, image, head, query, SPEC)
        b_dv = accumulate(tl.cast(weights, b_do.dtype), b_do, b_dv, SPEC.PRECISION)
        dweights = matmul(b_v, b_dot, SPEC.PRECISION)
        b_dk = accumulate(tl.cast(weights * (dweights - delta[None, :]), b_q.dtype), b_q, b_dk, SPEC.PRECISION)
    store_rows(dk, image, head, key, b_dk * scale, SPEC)
    store_rows(dv, image, head, key, b_dv, SPEC)


def _settings(kernel, x: Tensor) -> dict[str, int]:
    """Warps and pipeline stages, chosen by what the compiler makes of the kernels for each chip (docs/kernels.md).

    Two stages prefetch the rows of a step, where rows are so short that three blocks still fit a multiprocessor; a tile
    of keys has more rows of queries and statistics under way without.
    """
    if INTERPRETED:
        return {}
    heavy, short = x.shape[-1] > 64 or x.dtype == torch.float32, x.shape[-1] <= 32
    ahead = short and not heavy and kernel is not _streamed_cluster_attention_backward_key
    settings = {"num_warps": 8 if heavy else 4, "num_stages": 2 if ahead else 1}
    arch, key = capability(x.device), kernel is _streamed_cluster_attention_backward_key
    if kernel is _streamed_cluster_attention_forward and not heavy and not short and arch == 90:
        settings["maxnreg"] = 96  # five blocks; without the limit four, at 104 registers
    if key and not heavy and short and not 90 <= arch < 120:
        settings["maxnreg"] = 128  # four blocks; without the limit three, at 136 to 140 registers
    return settings


def _launch(kernel, programs: int, *rows, call: Call, **arguments) -> None:
    arguments |= call.arguments | dict(BLOCK=BLOCK, STEP=STEP) | _settings(kernel, call.example)
    launch(kernel, programs, call.example.device, *rows, **arguments)


def forward(call: Call, lse: Tensor) -> None:
    """``call`` on q, k, v and out."""
    tiles = ceil_div(call.tree.largest, BLOCK)
    _launch(_streamed_cluster_attention_forward, call.leaves * tiles, *call.rows, call=call, p_lse=lse, tiles=tiles)


def backward(call: Call, lse: Tensor) -> None:
    """``call`` on dout, q, k, v, dq, dk and dv."""
    *inputs, dq, dk, dv = call.rows
    delta, total = torch.empty_like(lse), torch.empty_like(lse) if call.example.dtype == lse.dtype else None
    arguments, tiles = dict(call=call, statistics=Statistics(lse, delta, total)), ceil_div(call.tree.largest, BLOCK)
    _launch(_streamed_cluster_attention_backward_query, call.leaves * tiles, *inputs, dq, **arguments, tiles=tiles)
    own, shared = ceil_div(call.tree.largest - call.overlap, BLOCK), ceil_div(2 * call.overlap, BLOCK)
    arguments.update(own=own, shared=shared, tiles=min(2, 1 << call.tree.levels) * own + shared)
    _launch(_streamed_cluster_attention_backward_key, call.pairs * arguments["tiles"], *inputs, dk, dv, **arguments)
