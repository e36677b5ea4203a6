"""Triton kernels of cluster attention for leaves of at most 64 tokens, and the launchers of all.

Such a leaf is one tile of queries, and nothing is saved but the inputs; larger leaves are streamed (`streamed.py`).
Rows are gathered and scattered at the tokens of the order. Whatever stands in it, no address leaves the tensors.

M queries, N and S keys and D elements of a head make tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sizes import above
from .._triton import (
    INTERPRETED,
    accumulation_dtype,
    base_of,
    capability,
    divisor,
    dot,
    launch,
    load_both,
    load_columns,
    load_rows,
    matmul,
    node_start,
    on,
    power_of_2,
    refusal,
    store_rows,
    tokens_at,
    zeros,
)
from ..tree import Tree
from . import streamed
from .streamed import Call, leaf_runs, run_logits

SINGLE_TILE = 64  # tokens: larger leaves are streamed
__all__ = ["cluster_attention_backward", "cluster_attention_forward", "refusal"]


@triton.jit
def _joint_softmax(a, b):  # [M, N], [M, S] -> [M, N], [M, S], [M, 1]
    """Of the rows of two tiles: the weights, and the sums to divide them by."""
    base = base_of(tl.maximum(tl.max(a, 1), tl.max(b, 1)))[:, None]
    a, b = tl.exp2(a - base), tl.exp2(b - base)
    return a, b, divisor(tl.sum(a, 1) + tl.sum(b, 1))[:, None]


@triton.jit
def _cluster_attention_forward(
    q, k, v, out, order, heads, scale, QUERIES: tl.constexpr, KEYS: tl.constexpr, REST: tl.constexpr, SPEC: tl.constexpr
):
    """A leaf. Its run of keys is cut in two tiles, which have less padding than one."""
    program = tl.program_id(0)
    leaves = 1 << order.levels
    head, leaf, image = program % heads, program // heads % leaves, program // heads // leaves
    first, last, start, stop = leaf_runs(order, leaf)
    query = tokens_at(order, image, head, first, last, QUERIES)
    key = tokens_at(order, image, head, start, stop, KEYS)
    rest = tokens_at(order, image, head, start + KEYS, stop, REST)
    b_q = load_rows(q, image, head, query, SPEC)  # [M, D]
    b_k, b_rest = load_columns(k, image, head, key, SPEC), load_columns(k, image, head, rest, SPEC)  # [D, N], [D, S]
    b_v, b_vrest = load_rows(v, image, head, key, SPEC), load_rows(v, image, head, rest, SPEC)  # [N, D], [S, D]
    logits = run_logits(b_q, b_k, stop - start, scale, SPEC)  # [M, N]
    rlogits = run_logits(b_q, b_rest, stop - start - KEYS, scale, SPEC)  # [M, S]
    weights, rweights, total = _joint_softmax(logits, rlogits)
    b_out = matmul(tl.cast(weights, b_v.dtype), b_v, SPEC.PRECISION)
    b_out = dot(tl.cast(rweights, b_v.dtype), b_vrest, b_out, SPEC.PRECISION)
    store_rows(out, image, head, query, b_out / total, SPEC)


@triton.jit
def _cluster_attention_backward(
    dout, q, k, v, dqkv, order, heads, scale, LEAVES: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
    QUERIES: tl.constexpr, OWN: tl.constexpr, SHARED: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A pair of siblings: whatever its keys receive comes from here.

    The keys that both leaves attend to lie around the split, those of one leaf alone to either side: every key is
    loaded once, and nearly all pairs of a tile attend. Loads and stores stand where they leave registers to the rest.
    """
    program = tl.program_id(0)
    pairs = ((1 << order.levels) + 1) // 2
    head, pair, image = program % heads, program // heads % pairs, program // heads // pairs
    split = node_start(2 * pair + 1, order)
    shared = tokens_at(order, image, head, split - order.overlap, split + order.overlap, SHARED)
    b_ks, b_kst = load_both(k, image, head, shared, SPEC)  # [S, D], [D, S]
    b_vst = load_columns(v, image, head, shared, SPEC)  # [D, S]
    b_dks, b_dvs = zeros(SHARED, SPEC.BLOCK_D, b_ks.dtype), zeros(SHARED, SPEC.BLOCK_D, b_ks.dtype)
    for leaf in tl.range(0, LEAVES, loop_unroll_factor=UNROLL):
        first, last = node_start(2 * pair + leaf, order), node_start(2 * pair + leaf + 1, order)
        start, stop = first + leaf * order.overlap, last - (1 - leaf) * order.overlap
        own = tokens_at(order, image, head, start, stop, OWN)
        b_k, b_kt = load_both(k, image, head, own, SPEC)  # [N, D], [D, N]
        b_vt = load_columns(v, image, head, own, SPEC)  # [D, N]
        b_dk, b_dv = zeros(OWN, SPEC.BLOCK_D, b_k.dtype), zeros(OWN, SPEC.BLOCK_D, b_k.dtype)
        for part in range(PARTS):
            query = tokens_at(order, image, head, first + part * QUERIES, last, QUERIES)
            b_q, b_do = load_rows(q, image, head, query, SPEC), load_rows(dout, image, head, query, SPEC)  # [M, D]
            logits = run_logits(b_q, b_kt, stop - start, scale, SPEC)  # [M, N]
            slogits = run_logits(b_q, b_kst, 2 * order.overlap, scale, SPEC)  # [M, S]
            weights, sweights, total = _joint_softmax(logits, slogits)
            weights, sweights = tl.cast(weights * (1 / total), b_q.dtype), tl.cast(sweights * (1 / total), b_q.dtype)
            b_dv = dot(tl.trans(weights), b_do, b_dv, SPEC.PRECISION)
            if part == PARTS - 1:
                store_rows(dqkv, image, head, own, b_dv, SPEC, 2 * heads * SPEC.D)
            b_dvs = dot(tl.trans(sweights), b_do, b_dvs, SPEC.PRECISION)
            dweights, dsweights = matmul(b_do, b_vt, SPEC.PRECISION), matmul(b_do, b_vst, SPEC.PRECISION)
            delta = (tl.sum(weights * dweights, 1) + tl.sum(sweights * dsweights, 1))[:, None]
            dlogits = tl.cast(weights * (dweights - delta), b_q.dtype)
            dslogits = tl.cast(sweights * (dsweights - delta), b_q.dtype)
            b_dks = dot(tl.trans(dslogits), b_q, b_dks, SPEC.PRECISION)
            b_dk = dot(tl.trans(dlogits), b_q, b_dk, SPEC.PRECISION)
            if part == PARTS - 1:
                store_rows(dqkv, image, head, own, b_dk * scale, SPEC, heads * SPEC.D)
            b_dq = dot(dslogits, b_ks, matmul(dlogits, b_k, SPEC.PRECISION), SPEC.PRECISION)
            store_rows(dqkv, image, head, query, b_dq * scale, SPEC)
    store_rows(dqkv, image, head, shared, b_dks * scale, SPEC, heads * SPEC.D)
    store_rows(dqkv, image, head, shared, b_dvs, SPEC, 2 * heads * SPEC.D)


def _tile(tokens: int) -> int:
    """Tokens of a tile that holds so many."""
    return max(16, power_of_2(tokens))


def _heavy(x: Tensor) -> bool:
    """Whether tiles of these rows take eight warps."""
    return x.shape[-1] > 64 or x.dtype == torch.float32


def _forward_settings(call: Call) -> dict[str, int]:
    """Tiles and warps. The run of keys is cut where the padding is least: 69 are 64 and 16."""
    queries, run = _tile(call.tree.largest), call.tree.largest + call.overlap
    keys = max(16, power_of_2(run) // 2)
    tiles = {"QUERIES": queries, "KEYS": keys, "REST": _tile(run - keys)}
    return tiles if INTERPRETED else tiles | {"num_warps": 8 if _heavy(call.example) else queries // 16}


def _backward_settings(call: Call) -> dict[str, int]:
    """Tiles, warps and, where it buys resident blocks, a limit of registers.

    Chosen by what the compiler makes of the kernel for each chip (docs/kernels.md). Where tensor cores take
    operands from shared memory, a leaf is one tile of queries and both leaves are unrolled. Elsewhere operands fill
    the registers, and queries come in parts: of 16, or of 32 where that still fits.
    """
    x, queries, leaves = call.example, _tile(call.tree.largest), min(2, 1 << call.tree.levels)
    heavy, narrow = _heavy(x), x.shape[-1] <= 32
    arch = 0 if INTERPRETED else capability(x.device)
    whole = x.dtype != torch.float32 and (arch == 100 or (arch == 90 and not heavy))
    part = min(queries, 64 if whole else 16 if (narrow or heavy) and not INTERPRETED else 32)
    settings = {"OWN": _tile(call.tree.largest - call.overlap), "SHARED": _tile(2 * call.overlap)}
    settings |= {"LEAVES": leaves, "UNROLL": leaves if whole else 1, "QUERIES": part, "PARTS": queries // part}
    if INTERPRETED:
        return settings
    warps = 8 if heavy or (arch == 100 and queries == 64) else queries // 16
    if narrow and not heavy and queries == 64 and settings["OWN"] + settings["SHARED"] < 128:
        settings["maxnreg"] = 168 if warps == 4 else 128  # three blocks of four warps, or two of eight
    return settings | {"num_warps": warps, "num_stages": 1}


def cluster_attention_forward(
    q: Tensor,  # [B, N, heads, head_dim]
    k: Tensor,  # [B, N, heads, head_dim]
    v: Tensor,  # [B, N, heads, head_dim]
    order: Tensor,  # [B, heads, N] int32
    leaf_size: int,
    overlap: int,
    scale: float,
    check: bool,  # that the order is a permutation: not done here
) -> tuple[Tensor, Tensor]:  # [B, N, heads, head_dim], [B, N, heads] or [0, N, heads]
    """Attention in every leaf, and the statistic of every query where leaves are streamed."""
    out, single = q.new_empty(q.shape), Tree.of(q.shape[1], leaf_size).largest <= SINGLE_TILE
    kept = q.shape[0] * above(2 * leaf_size, SINGLE_TILE)
    statistic = q.new_empty(kept, *q.shape[1:3], dtype=accumulation_dtype(q))
    if out.numel() == 0:
        return out, statistic
    call = Call.of(order, leaf_size, overlap, scale, q, k, v, out)
    with on(q.device):
        if single:
            settings = call.arguments | _forward_settings(call)
            launch(_cluster_attention_forward, call.leaves, q.device, *call.rows, **settings)
        else:
            streamed.forward(call, statistic)
    return out, statistic


def cluster_attention_backward(
    dout: Tensor,  # [B, N, heads, head_dim]
    q: Tensor,  # [B, N, heads, head_dim]
    k: Tensor,  # [B, N, heads, head_dim]
    v: Tensor,  # [B, N, heads, head_dim]
    order: Tensor,  # [B, heads, N] int32
    statistic: Tensor,  # [B, N, heads] or [0, N, heads]
    leaf_size: int,
    overlap: int,
    scale: float,
) -> Tensor:  # [B, N, 3, heads, head_dim]
    """Gradients of q, k and v in one buffer."""
    batch, tokens, heads, head_dim = q.shape
    dqkv = q.new_empty(batch, tokens, 3, heads, head_dim)
    if dqkv.numel() == 0:
        return dqkv
    call = Call.of(order, leaf_size, overlap, scale, dout, q, k, v, *dqkv.unbind(2))
    with on(q.device):
        if call.tree.largest <= SINGLE_TILE:
            settings = call.arguments | _backward_settings(call)
            launch(_cluster_attention_backward, call.pairs, q.device, *call.rows[:5], **settings)
        else:
            streamed.backward(call, statistic)
    return dqkv
