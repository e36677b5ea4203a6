"""Triton kernels of partition attention, and their launchers.

Groups of at most 64 tokens are one tile: persistent programs, one head each, loop over groups and save nothing but the
inputs. Larger groups stream tiles of keys under an online softmax and save one log-sum-exp per query.

M queries, N keys and D elements of a head make tiles; ``task`` numbers the groups of all images.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    INTERPRETED,
    LOG2E,
    Geometry,
    Rows,
    Spec,
    dot,
    group_start,
    group_tokens,
    load_rows,
    matmul,
    store_rows,
    zeros,
)
from ..position_bias.kernels import _mlp_rows

SHIFT_PENALTY = tl.constexpr(-100.0)  # added to the logit of a pair that only the shift brought together
SINGLE_TILE = 64  # tokens: a larger group is streamed (one tile of 256 tokens always spills)
LARGEST_HEAD = 128


@triton.jit
def _place(task, geometry):
    """The image of a task, and where its group begins."""
    groups = geometry.starts_y * geometry.starts_x
    return task // groups, group_start(task % groups, geometry)


@triton.jit
def _evaluate(mlp, p_table, head, geometry, P: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr):
    """Write the bias table of a head, for this program's own use."""
    side = 2 * geometry.group_w - 1
    size = (2 * geometry.group_h - 1) * side
    for start in range(0, size, 32):
        o = start + tl.arange(0, 32)
        y = tl.cast(o // side - (geometry.group_h - 1), mlp[0].dtype.element_ty)
        x = tl.cast(o % side - (geometry.group_w - 1), mlp[0].dtype.element_ty)
        tl.store(p_table + o, _mlp_rows(mlp, head, y, x, P, BLOCK_P, RESIDUAL), mask=o < size)
    tl.debug_barrier()


@triton.jit
def _bias(p_table, o_query, o_key, geometry):  # [M], [N] -> [M, N]
    """Bias of every pair, from the table of a head: the offset is query minus key."""
    side, tokens = 2 * geometry.group_w - 1, geometry.group_h * geometry.group_w
    row = o_query // geometry.group_w * side + o_query % geometry.group_w
    column = o_key // geometry.group_w * side + o_key % geometry.group_w
    centre = (geometry.group_h - 1) * side + geometry.group_w - 1
    mask = (o_query < tokens)[:, None] & (o_key < tokens)[None, :]
    return tl.load(p_table + (centre + row[:, None] - column[None, :]), mask=mask, other=0.0)


@triton.jit
def _logits(products, bias, query, key, scale, SHIFTED: tl.constexpr):  # [M, N]
    """Logits from q k^T; -inf for keys outside the map."""
    logits = products * scale + bias
    if SHIFTED:
        apart = query.wrapped[:, None] != key.wrapped[None, :]
        logits += tl.cast(apart, logits.dtype) * SHIFT_PENALTY
    return tl.where(key.inside[None, :], logits, float("-inf"))


@triton.jit
def _exp(logits, rows):  # [M, N], [M] -> [M, N]
    """exp(logits - rows), at the cost of one multiply-add and one exp2."""
    return tl.exp2(logits * LOG2E - (rows * LOG2E)[:, None])


@triton.jit
def _own_tile(p_tiles, BLOCK: tl.constexpr):  # [M, N]
    """Addresses of this program's own tile."""
    o_token = tl.arange(0, BLOCK)
    base = p_tiles + tl.cast(tl.program_id(0), tl.int64) * (BLOCK * BLOCK)
    return base + o_token[:, None] * BLOCK + o_token[None, :]


@triton.jit
def _program_bias(
    p_table, mlp, p_scratch, head, geometry,
    BIAS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bias of all pairs of this program's head, from the table or from the MLP."""
    size = (2 * geometry.group_h - 1) * (2 * geometry.group_w - 1)
    if BIAS == "inline":
        p_own = p_scratch + tl.program_id(0) * size
        _evaluate(mlp, p_own, head, geometry, P, BLOCK_P, RESIDUAL)
    else:
        p_own = p_table + head * size
    o_token = tl.arange(0, BLOCK)
    return _bias(p_own, o_token, o_token, geometry)


@triton.jit
def _partition_attention_forward(
    q, k, v, out, p_table, mlp, p_scratch, geometry, heads, tasks, scale,
    BIAS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One tile per group. BIAS: "none", "table", or "inline" (the table is evaluated first, into ``p_scratch``)."""
    program = tl.program_id(0)
    head, worker, workers = program % heads, program // heads, tl.num_programs(0) // heads
    o_token = tl.arange(0, BLOCK)
    bias = 0.0
    if BIAS != "none":
        bias = _program_bias(p_table, mlp, p_scratch, head, geometry, BIAS, P, BLOCK_P, RESIDUAL, BLOCK)
    for task in range(worker, tasks, workers):
        image, start = _place(task, geometry)
        tokens = group_tokens(o_token, start, geometry)
        b_q = load_rows(q, image, head, tokens, SPEC)  # [M, D]
        b_k = load_rows(k, image, head, tokens, SPEC)  # [N, D]
        b_v = load_rows(v, image, head, tokens, SPEC)  # [N, D]
        products = matmul(b_q, tl.trans(b_k), SPEC.PRECISION)  # [M, N]
        logits = _logits(products, bias, tokens, tokens, scale, SHIFTED)
        weights = _exp(logits, tl.max(logits, 1))
        b_out = matmul(tl.cast(weights, b_v.dtype), b_v, SPEC.PRECISION) / tl.sum(weights, 1)[:, None]
        store_rows(out, image, head, tokens, b_out, SPEC)


@triton.jit
def _partition_attention_backward(
    dout, q, k, v, dqkv, p_table, mlp, p_scratch, p_partial, geometry, heads, tasks, scale,
    BIAS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One tile per group; a program sums the bias gradient of its groups in registers and writes it to its own tile."""
    program = tl.program_id(0)
    head, worker, workers = program % heads, program // heads, tl.num_programs(0) // heads
    o_token = tl.arange(0, BLOCK)
    bias = 0.0
    if BIAS != "none":
        bias = _program_bias(p_table, mlp, p_scratch, head, geometry, BIAS, P, BLOCK_P, RESIDUAL, BLOCK)
    dbias = zeros(BLOCK, BLOCK, q.pointer.dtype.element_ty)
    for task in range(worker, tasks, workers):
        image, start = _place(task, geometry)
        tokens = group_tokens(o_token, start, geometry)
        b_q = load_rows(q, image, head, tokens, SPEC)  # [M, D]
        b_k = load_rows(k, image, head, tokens, SPEC)  # [N, D]
        products = matmul(b_q, tl.trans(b_k), SPEC.PRECISION)  # [M, N]
        logits = _logits(products, bias, tokens, tokens, scale, SHIFTED)
        weights = _exp(logits, tl.max(logits, 1))
        weights *= (1 / tl.sum(weights, 1))[:, None]
        b_do = load_rows(dout, image, head, tokens, SPEC)  # [M, D]
        b_dv = matmul(tl.trans(tl.cast(weights, b_do.dtype)), b_do, SPEC.PRECISION)
        store_rows(dqkv, image, head, tokens, b_dv, SPEC, 2 * heads * SPEC.D)
        b_v = load_rows(v, image, head, tokens, SPEC)  # [N, D]
        dweights = matmul(b_do, tl.trans(b_v), SPEC.PRECISION)  # [M, N]
        dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        if BIAS != "none":
            dbias += dlogits
        dlogits = tl.cast(dlogits, b_q.dtype)
        store_rows(dqkv, image, head, tokens, matmul(dlogits, b_k, SPEC.PRECISION) * scale, SPEC)
        store_rows(
            dqkv, image, head, tokens, matmul(tl.trans(dlogits), b_q, SPEC.PRECISION) * scale, SPEC, heads * SPEC.D
        )
    if BIAS != "none":
        tl.store(_own_tile(p_partial, BLOCK), dbias)


@triton.jit
def _fold_bias_gradient(
    p_partial, p_dbias, geometry, parts, heads, SIDE: tl.constexpr, OFFSETS: tl.constexpr, LANES: tl.constexpr
):
    """Sum partial gradients [parts, heads, SIDE, SIDE] over parts and the pairs of an offset, in a fixed order."""
    side, tokens = 2 * geometry.group_w - 1, geometry.group_h * geometry.group_w
    size = (2 * geometry.group_h - 1) * side
    blocks = tl.cdiv(size, OFFSETS)
    head, offset = tl.program_id(0) // blocks, tl.program_id(0) % blocks * OFFSETS + tl.arange(0, OFFSETS)
    offset_y, offset_x = offset // side - (geometry.group_h - 1), offset % side - (geometry.group_w - 1)
    total = tl.zeros((OFFSETS, LANES), p_partial.dtype.element_ty)
    for lane in range(0, parts * tokens, LANES):
        o = lane + tl.arange(0, LANES)
        part, query = o // tokens, o % tokens
        y = (query // geometry.group_w)[None, :] - offset_y[:, None]  # of the key, in the group
        x = (query % geometry.group_w)[None, :] - offset_x[:, None]
        inside = (y >= 0) & (y < geometry.group_h) & (x >= 0) & (x < geometry.group_w) & (part < parts)[None, :]
        p_line = p_partial + ((tl.cast(part, tl.int64) * heads + head) * SIDE + query) * SIDE
        total += tl.load(p_line[None, :] + y * geometry.group_w + x, mask=inside & (offset < size)[:, None], other=0.0)
    tl.store(p_dbias + head * size + offset, tl.sum(total, 1), mask=offset < size)


@triton.jit
def _streamed(geometry, heads, BLOCK: tl.constexpr):
    """This program's head, first token, image and group."""
    tiles = tl.cdiv(geometry.group_h * geometry.group_w, BLOCK)
    program = tl.program_id(0)
    image, start = _place(program // heads // tiles, geometry)
    return program % heads, program // heads % tiles * BLOCK, image, start


@triton.jit
def _row_pointers(p_statistic, image, head, heads, tokens, geometry):  # [N]
    """Places of the tokens in a statistic [B, H, W, heads]."""
    row = (tl.cast(image, tl.int64) * geometry.height + tokens.y) * geometry.width + tokens.x
    return p_statistic + row * heads + head


@triton.jit
def _tile_bias(p_table, head, o_query, o_key, geometry, HAS_BIAS: tl.constexpr):  # [M, N]
    """The bias of a pair of tiles."""
    if not HAS_BIAS:
        return 0.0
    size = (2 * geometry.group_h - 1) * (2 * geometry.group_w - 1)
    return _bias(p_table + tl.cast(head, tl.int64) * size, o_query, o_key, geometry)


@triton.jit
def _streamed_attention_forward(
    q, k, v, out, p_table, p_lse, geometry, heads, scale,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One tile of queries of a group, over all its keys."""
    head, first, image, start = _streamed(geometry, heads, BLOCK)
    o_query = first + tl.arange(0, BLOCK)
    query = group_tokens(o_query, start, geometry)
    b_q = load_rows(q, image, head, query, SPEC)  # [M, D]
    b_out = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype)
    total = tl.sum(b_out, 1)
    highest = total - float("inf")
    for o in range(0, geometry.group_h * geometry.group_w, BLOCK):
        o_key = o + tl.arange(0, BLOCK)
        key = group_tokens(o_key, start, geometry)
        b_k = load_rows(k, image, head, key, SPEC)  # [N, D]
        b_v = load_rows(v, image, head, key, SPEC)  # [N, D]
        products = matmul(b_q, tl.trans(b_k), SPEC.PRECISION)  # [M, N]
        bias = _tile_bias(p_table, head, o_query, o_key, geometry, HAS_BIAS)
        logits = _logits(products, bias, query, key, scale, SHIFTED)
        higher = tl.maximum(highest, tl.max(logits, 1))  # finite: the first token of a group lies inside the map
        shrink, weights = tl.exp2((highest - higher) * LOG2E), _exp(logits, higher)
        total = total * shrink + tl.sum(weights, 1)
        b_out = dot(tl.cast(weights, b_v.dtype), b_v, b_out * shrink[:, None], SPEC.PRECISION)
        highest = higher
    store_rows(out, image, head, query, b_out / total[:, None], SPEC)
    tl.store(_row_pointers(p_lse, image, head, heads, query, geometry), highest + tl.log(total), mask=query.inside)


@triton.jit
def _weights_and_gradient(
    b_q, b_k, b_v, b_do, lse, p_table, head, o_query, o_key, query, key, geometry, scale,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Weights of a pair of tiles, and their gradient, [M, N] each."""
    products = matmul(b_q, tl.trans(b_k), SPEC.PRECISION)
    bias = _tile_bias(p_table, head, o_query, o_key, geometry, HAS_BIAS)
    weights = _exp(_logits(products, bias, query, key, scale, SHIFTED), lse)
    return weights, matmul(b_do, tl.trans(b_v), SPEC.PRECISION)


@triton.jit
def _streamed_attention_backward_query(
    dout, q, k, v, dq, p_table, p_lse, p_delta, geometry, heads, scale,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all keys, twice: delta = sum of weights * their gradient, then dq."""
    head, first, image, start = _streamed(geometry, heads, BLOCK)
    o_query = first + tl.arange(0, BLOCK)
    query = group_tokens(o_query, start, geometry)
    lse = tl.load(_row_pointers(p_lse, image, head, heads, query, geometry), mask=query.inside, other=float("inf"))
    b_q = load_rows(q, image, head, query, SPEC)  # [M, D]
    b_do = load_rows(dout, image, head, query, SPEC)  # [M, D]
    b_dq = zeros(BLOCK, SPEC.BLOCK_D, b_q.dtype)
    delta = tl.sum(b_dq, 1)
    for o in range(0, geometry.group_h * geometry.group_w, BLOCK):
        o_key = o + tl.arange(0, BLOCK)
        key = group_tokens(o_key, start, geometry)
        b_k, b_v = load_rows(k, image, head, key, SPEC), load_rows(v, image, head, key, SPEC)  # [N, D]
        weights, dweights = _weights_and_gradient(
            b_q,
            b_k,
            b_v,
            b_do,
            lse,
            p_table,
            head,
            o_query,
            o_key,
            query,
            key,
            geometry,
            scale,
            HAS_BIAS,
            SHIFTED,
            SPEC,
        )
        delta += tl.sum(weights * dweights, 1)
    for o in range(0, geometry.group_h * geometry.group_w, BLOCK):
        o_key = o + tl.arange(0, BLOCK)
        key = group_tokens(o_key, start, geometry)
        b_k, b_v = load_rows(k, image, head, key, SPEC), load_rows(v, image, head, key, SPEC)  # [N, D]
        weights, dweights = _weights_and_gradient(
            b_q,
            b_k,
            b_v,
            b_do,
            lse,
            p_table,
            head,
            o_query,
            o_key,
            query,
            key,
            geometry,
            scale,
            HAS_BIAS,
            SHIFTED,
            SPEC,
        )
        b_dq = dot(tl.cast(weights * (dweights - delta[:, None]), b_k.dtype), b_k, b_dq, SPEC.PRECISION)
    store_rows(dq, image, head, query, b_dq * scale, SPEC)
    tl.store(_row_pointers(p_delta, image, head, heads, query, geometry), delta, mask=query.inside)


@triton.jit
def _streamed_attention_backward_key(
    dout, q, k, v, dk, dv, p_table, p_lse, p_delta, geometry, heads, scale,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One tile of keys over all queries: dk and dv."""
    head, first, image, start = _streamed(geometry, heads, BLOCK)
    o_key = first + tl.arange(0, BLOCK)
    key = group_tokens(o_key, start, geometry)
    b_k, b_v = load_rows(k, image, head, key, SPEC), load_rows(v, image, head, key, SPEC)  # [N, D]
    b_dk, b_dv = zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype), zeros(BLOCK, SPEC.BLOCK_D, b_k.dtype)
    for o in range(0, geometry.group_h * geometry.group_w, BLOCK):
        o_query = o + tl.arange(0, BLOCK)
        query = group_tokens(o_query, start, geometry)
        lse = tl.load(_row_pointers(p_lse, image, head, heads, query, geometry), mask=query.inside, other=float("inf"))
        delta = tl.load(_row_pointers(p_delta, image, head, heads, query, geometry), mask=query.inside, other=0.0)
        b_q, b_do = load_rows(q, image, head, query, SPEC), load_rows(dout, image, head, query, SPEC)  # [M, D]
        weights, dweights = _weights_and_gradient(
            b_q,
            b_k,
            b_v,
            b_do,
            lse,
            p_table,
            head,
            o_query,
            o_key,
            query,
            key,
            geometry,
            scale,
            HAS_BIAS,
            SHIFTED,
            SPEC,
        )
        b_dv = dot(tl.trans(tl.cast(weights, b_do.dtype)), b_do, b_dv, SPEC.PRECISION)
        dlogits = tl.cast(weights * (dweights - delta[:, None]), b_q.dtype)
        b_dk = dot(tl.trans(dlogits), b_q, b_dk, SPEC.PRECISION)
    store_rows(dk, image, head, key, b_dk * scale, SPEC)
    store_rows(dv, image, head, key, b_dv, SPEC)


@triton.jit
def _streamed_attention_backward_bias(
    dout, q, k, v, p_table, p_lse, p_delta, p_partial, geometry, heads, tasks, scale,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One tile of pairs, summed over a share of the groups."""
    tiles = tl.cdiv(geometry.group_h * geometry.group_w, BLOCK)
    program = tl.program_id(0)
    head, tile, share = program % heads, program // heads % (tiles * tiles), program // heads // (tiles * tiles)
    shares = tl.num_programs(0) // heads // (tiles * tiles)
    o_query = tile // tiles * BLOCK + tl.arange(0, BLOCK)
    o_key = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    bias = _tile_bias(p_table, head, o_query, o_key, geometry, True)
    total = tl.zeros((BLOCK, BLOCK), p_partial.dtype.element_ty)
    for task in range(share, tasks, shares):
        image, start = _place(task, geometry)
        query, key = group_tokens(o_query, start, geometry), group_tokens(o_key, start, geometry)
        lse = tl.load(_row_pointers(p_lse, image, head, heads, query, geometry), mask=query.inside, other=float("inf"))
        delta = tl.load(_row_pointers(p_delta, image, head, heads, query, geometry), mask=query.inside, other=0.0)
        b_q, b_do = load_rows(q, image, head, query, SPEC), load_rows(dout, image, head, query, SPEC)  # [M, D]
        b_k, b_v = load_rows(k, image, head, key, SPEC), load_rows(v, image, head, key, SPEC)  # [N, D]
        products = matmul(b_q, tl.trans(b_k), SPEC.PRECISION)  # [M, N]
        weights = _exp(_logits(products, bias, query, key, scale, SHIFTED), lse)
        dweights = matmul(b_do, tl.trans(b_v), SPEC.PRECISION)
        total += weights * (dweights - delta[:, None])
    line = tiles * BLOCK
    p_tile = p_partial + (tl.cast(share, tl.int64) * heads + head) * line * line
    tl.store(p_tile + (tl.cast(o_query, tl.int64) * line)[:, None] + o_key[None, :], total)


def refusal(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on heads of this size and dtype, or None."""
    if head_dim > LARGEST_HEAD:
        return f"head_dim {head_dim} > {LARGEST_HEAD}"
    if head_dim % 8:
        return f"head_dim {head_dim} is not a multiple of 8"
    if dtype == torch.float64 and not INTERPRETED:
        return "float64 runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    return None


@lru_cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter programs run one after another, so that two are plenty."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _capability(device: torch.device) -> int:
    """Of the current device, which is ``device``: 90 for compute capability 9.0."""
    return triton.runtime.driver.active.get_current_target().arch


def _on(device: torch.device):
    """Triton launches on the current device: make that the tensors'."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def _tile(tokens: int) -> int:
    """Tokens of a tile that holds the whole group, or of a streamed one."""
    return min(max(16, triton.next_power_of_2(tokens)), SINGLE_TILE)


def _settings(kernel, tile: int, x: Tensor, plain: bool = False) -> dict[str, int]:
    """Warps, pipeline stages and, where it buys resident blocks, a limit of registers.

    Chosen by what the compiler makes of the kernels for each chip (tests/test_ahead_of_time.py).
    """
    if INTERPRETED:
        return {}
    capability = _capability(x.device)
    asynchronous = 90 <= capability < 120  # tensor cores read shared memory: prefetched rows take no registers
    narrow = x.shape[-1] <= 32 and x.dtype != torch.float32
    wide = not narrow or kernel is _streamed_attention_backward_bias
    settings = {"num_warps": 8 if wide and tile == 64 else tile // 16, "num_stages": 2}
    if kernel in (_partition_attention_backward, _streamed_attention_backward_key):
        settings["num_stages"] = 2 if asynchronous and x.dtype != torch.float32 else 1
    if kernel is _streamed_attention_backward_bias and not asynchronous and (narrow or capability >= 120):
        settings["num_stages"] = 1
    if capability == 90 and narrow and plain and tile == 64:
        settings["maxnreg"] = 128 if kernel is _partition_attention_forward else 168
    return settings


def _programs(x: Tensor, tasks: int, settings: dict[str, int]) -> int:
    """Persistent programs: for each head as many as the registers of the device hold at once."""
    heads, threads = x.shape[3], 32 * settings.get("num_warps", 4)
    resident = 65536 // settings.get("maxnreg", 256) // threads
    return heads * min(tasks, triton.cdiv(_processors(x.device) * resident, heads))


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _bias_source(bias: Tensor | None, mlp: tuple[Tensor, ...], residual: bool, programs: int, offsets: int) -> dict:
    """The arguments of a single-tile kernel that say where its bias comes from."""
    if not mlp:
        form = "none" if bias is None else "table"
        return dict(p_table=bias, mlp=(), p_scratch=None, BIAS=form, P=0, BLOCK_P=0, RESIDUAL=False)
    width = mlp[0].shape[0]
    scratch, block = mlp[0].new_empty(programs * offsets), max(16, triton.next_power_of_2(width))
    return dict(p_table=None, mlp=mlp, p_scratch=scratch, BIAS="inline", P=width, BLOCK_P=block, RESIDUAL=residual)


def _fold(partial: Tensor, dbias: Tensor, geometry: Geometry) -> None:
    """``dbias`` from partial sums [parts, heads, side, side]."""
    parts, heads, side, _ = partial.shape
    offsets, lanes = (64, 128) if INTERPRETED else (1, 1024)  # the interpreter's cost is its number of programs
    programs = heads * triton.cdiv(dbias[0].numel(), offsets)
    _fold_bias_gradient[(programs,)](
        partial, dbias, geometry, parts, heads, SIDE=side, OFFSETS=offsets, LANES=lanes, num_warps=4
    )


def _check_form(mlp: list[Tensor], tokens: int) -> None:
    if mlp and tokens > SINGLE_TILE:
        raise ValueError(
            f"the position MLP is evaluated inside the kernel for groups of at most {SINGLE_TILE} tokens, got {tokens}"
            "; evaluate its table first (dynamic_position_bias) and pass that as bias"
        )


def partition_attention_forward(
    q: Tensor,  # [B, H, W, heads, head_dim]
    k: Tensor,  # [B, H, W, heads, head_dim]
    v: Tensor,  # [B, H, W, heads, head_dim]
    bias: Tensor | None,  # [heads, 2Gh-1, 2Gw-1]
    mlp: list[Tensor],
    residual: bool,
    group_h: int,
    group_w: int,
    interval_h: int,
    interval_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, H, W, heads, head_dim], [B, H, W, heads] or [0]
    """Attention in every group, and the log-sum-exp of every query where groups are streamed."""
    batch, height, width, heads, _ = q.shape
    geometry = Geometry.of(height, width, group_h, group_w, interval_h, interval_w, shift_h, shift_w)
    tokens, tasks, tile = group_h * group_w, batch * geometry.starts_y * geometry.starts_x, _tile(group_h * group_w)
    _check_form(mlp, tokens)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:4] if tokens > SINGLE_TILE else (0,), dtype=_accumulation_dtype(q))
    if out.numel() == 0:
        return out, lse
    spec = Spec.of(q, k, v, out)
    rows = [Rows.of(x, spec) for x in (q, k, v, out)]
    shifted, plain = shift_h + shift_w > 0, shift_h + shift_w == 0 and not geometry.ragged.value
    shared = dict(geometry=geometry, heads=heads, scale=scale, SHIFTED=shifted, BLOCK=tile, SPEC=spec)
    with _on(q.device):
        if tokens <= SINGLE_TILE:
            kernel = _partition_attention_forward
            settings = _settings(kernel, tile, q, plain)
            programs = _programs(q, tasks, settings)
            source = _bias_source(bias, tuple(mlp), residual, programs, (2 * group_h - 1) * (2 * group_w - 1))
            kernel[(programs,)](*rows, tasks=tasks, **source, **shared, **settings)
        else:
            kernel, programs = _streamed_attention_forward, tasks * triton.cdiv(tokens, tile) * heads
            source = dict(p_table=bias, HAS_BIAS=bias is not None)
            kernel[(programs,)](*rows, p_lse=lse, **source, **shared, **_settings(kernel, tile, q))
    return out, lse


def partition_attention_backward(
    dout: Tensor,  # [B, H, W, heads, head_dim]
    q: Tensor,  # [B, H, W, heads, head_dim]
    k: Tensor,  # [B, H, W, heads, head_dim]
    v: Tensor,  # [B, H, W, heads, head_dim]
    bias: Tensor | None,  # [heads, 2Gh-1, 2Gw-1]
    mlp: list[Tensor],
    residual: bool,
    statistic: Tensor,  # [B, H, W, heads] or [0]
    group_h: int,
    group_w: int,
    interval_h: int,
    interval_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, H, W, 3, heads, head_dim], [heads, 2Gh-1, 2Gw-1] or [0]
    """Gradients of q, k and v in one buffer, and of the bias table."""
    batch, height, width, heads, head_dim = q.shape
    geometry = Geometry.of(height, width, group_h, group_w, interval_h, interval_w, shift_h, shift_w)
    tokens, tasks, tile = group_h * group_w, batch * geometry.starts_y * geometry.starts_x, _tile(group_h * group_w)
    _check_form(mlp, tokens)
    biased = bias is not None or len(mlp) > 0
    dqkv = q.new_empty(batch, height, width, 3, heads, head_dim)
    table = (heads, 2 * group_h - 1, 2 * group_w - 1) if biased else (0,)
    if dqkv.numel() == 0:
        return dqkv, q.new_zeros(table, dtype=_accumulation_dtype(q))
    dbias = q.new_empty(table, dtype=_accumulation_dtype(q))
    gradients = dqkv.unbind(3)
    spec = Spec.of(dout, q, k, v, *gradients)
    rows, (dq, dk, dv) = [Rows.of(x, spec) for x in (dout, q, k, v)], [Rows.of(x, spec) for x in gradients]
    shifted, plain = shift_h + shift_w > 0, shift_h + shift_w == 0 and not geometry.ragged.value
    shared = dict(geometry=geometry, heads=heads, scale=scale, SHIFTED=shifted, BLOCK=tile, SPEC=spec)
    with _on(q.device):
        if tokens <= SINGLE_TILE:
            kernel = _partition_attention_backward
            settings = _settings(kernel, tile, q, plain)
            programs = _programs(q, tasks, settings)
            source = _bias_source(bias, tuple(mlp), residual, programs, dbias[:1].numel())
            partial = dbias.new_empty(programs // heads, heads, tile, tile) if biased else None
            kernel[(programs,)](*rows, dq, p_partial=partial, tasks=tasks, **source, **shared, **settings)
        else:
            delta, tiles, source = (
                torch.empty_like(statistic),
                triton.cdiv(tokens, tile),
                dict(HAS_BIAS=bias is not None),
            )
            shared.update(p_table=bias, p_lse=statistic, p_delta=delta)
            kernel = _streamed_attention_backward_query
            kernel[(tasks * tiles * heads,)](*rows, dq, **source, **shared, **_settings(kernel, tile, q))
            kernel = _streamed_attention_backward_key
            kernel[(tasks * tiles * heads,)](*rows, dk, dv, **source, **shared, **_settings(kernel, tile, q))
            if biased:
                kernel, pairs = _streamed_attention_backward_bias, heads * tiles**2
                shares = min(tasks, triton.cdiv(4 * _processors(q.device), pairs))
                partial = dbias.new_empty(shares, heads, tiles * tile, tiles * tile)
                kernel[(shares * pairs,)](*rows, p_partial=partial, tasks=tasks, **shared, **_settings(kernel, tile, q))
        if biased:
            _fold(partial, dbias, geometry)
    return dqkv, dbias
