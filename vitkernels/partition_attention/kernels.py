"""Triton kernels of partition attention, and their launchers.

Groups of at most 64 tokens are one tile: persistent programs, one head each, loop over groups and save nothing but the
inputs. Larger groups are streamed (`streamed.py`).

M queries, N keys and D elements of a head make tiles; ``task`` numbers the groups of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._sizes import ceil_div
from .._triton import (
    INTERPRETED,
    Call,
    Geometry,
    accumulation_dtype,
    base_of,
    capability,
    divisor,
    group_tokens,
    hide,
    launch,
    load_both,
    load_columns,
    load_rows,
    matmul,
    on,
    pair_bias,
    pair_logits,
    place,
    power_of_2,
    processors,
    refusal,
    store_rows,
    zeros,
)
from ..position_bias.kernels import _mlp_rows
from . import streamed

__all__ = ["partition_attention_backward", "partition_attention_forward", "refusal"]
SINGLE_TILE = 64  # tokens: a larger group is streamed (one tile of 256 tokens always spills)


class Bias(NamedTuple):
    """Where a single-tile kernel takes its bias: a table, or the MLP, evaluated by every program for its own head."""

    table: Tensor | None  # [heads, 2Gh-1, 2Gw-1]
    mlp: tuple[Tensor, ...]
    tiles: Tensor | None  # [programs, BLOCK, BLOCK]: a program's own memory
    P: tl.constexpr  # hidden width of the MLP
    BLOCK_P: tl.constexpr  # padded
    RESIDUAL: tl.constexpr

    @classmethod
    def of(cls, table: Tensor | None, mlp: list[Tensor], residual: bool, tiles: Tensor | None) -> Bias:
        width = mlp[0].shape[0] if mlp else 0
        constants = map(tl.constexpr, (width, max(16, power_of_2(width)), residual))
        return cls(table, tuple(mlp), tiles, *constants)


@triton.jit
def _evaluate(bias, p_table, head, geometry):
    """Write the bias table of a head, for this program's own use."""
    side = 2 * geometry.group_w - 1
    size = (2 * geometry.group_h - 1) * side
    for start in range(0, size, 32):
        o = start + tl.arange(0, 32)
        y = tl.cast(o // side - (geometry.group_h - 1), p_table.dtype.element_ty)
        x = tl.cast(o % side - (geometry.group_w - 1), p_table.dtype.element_ty)
        tl.store(p_table + o, _mlp_rows(bias.mlp, head, y, x, bias.P, bias.BLOCK_P, bias.RESIDUAL), mask=o < size)
    tl.debug_barrier()


@triton.jit
def _own_tile(bias, BLOCK: tl.constexpr):  # [M, N]
    """Addresses of this program's own tile."""
    o_token = tl.arange(0, BLOCK)
    base = bias.tiles + tl.cast(tl.program_id(0), tl.int64) * (BLOCK * BLOCK)
    return base + o_token[:, None] * BLOCK + o_token[None, :]


@triton.jit
def _add_to_tile(p_tile, value):  # [M, N]
    """Add to this program's own tile. Loads and stores need not have one layout: all threads wait."""
    tl.store(p_tile, tl.load(p_tile) + value)
    tl.debug_barrier()


@triton.jit
def _program_bias(bias, head, geometry, BLOCK: tl.constexpr):  # [M, N]
    """The bias of all pairs of this program's head, from the table or from the MLP."""
    if bias.tiles is None:
        return tl.zeros((1, 1), tl.float32)
    else:
        if bias.table is None:
            p_table = bias.tiles + tl.cast(tl.program_id(0), tl.int64) * (BLOCK * BLOCK)
            _evaluate(bias, p_table, head, geometry)
        else:
            p_table = bias.table + head * (2 * geometry.group_h - 1) * (2 * geometry.group_w - 1)
        o_token = tl.arange(0, BLOCK)
        return pair_bias(p_table, o_token[:, None], o_token[None, :], geometry)


@triton.jit
def _partition_attention_forward(
    q, k, v, out, bias, geometry, heads, tasks, scale, BLOCK: tl.constexpr, SPEC: tl.constexpr
):
    """One tile per group."""
    program = tl.program_id(0)
    head, worker, workers = program % heads, program // heads, tl.num_programs(0) // heads
    o_token = tl.arange(0, BLOCK)
    within = (o_token < geometry.group_h * geometry.group_w)[None, :]  # keys, of the group
    b_bias = tl.where(within, _program_bias(bias, head, geometry, BLOCK), float("-inf"))
    for task in range(worker, tasks, workers):
        image, start = place(task, geometry)
        tokens = group_tokens(o_token, start, geometry)
        b_q, b_k = load_rows(q, image, head, tokens, SPEC), load_columns(k, image, head, tokens, SPEC)  # [M, D], [D, N]
        b_v = load_rows(v, image, head, tokens, SPEC)  # [N, D]
        products = matmul(b_q, b_k, SPEC.PRECISION)  # [M, N]
        logits = pair_logits(products, b_bias, tokens, tokens, scale, geometry)
        if geometry.ragged:
            logits = hide(logits, tokens)
        weights = tl.exp2(logits - base_of(tl.max(logits, 1))[:, None])
        b_out = matmul(tl.cast(weights, b_v.dtype), b_v, SPEC.PRECISION) / divisor(tl.sum(weights, 1))[:, None]
        store_rows(out, image, head, tokens, b_out, SPEC)


@triton.jit
def _partition_attention_backward(
    dout, q, k, v, dqkv, bias, geometry, heads, tasks, scale,
    HELD: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One tile per group. A program sums the bias gradient of its groups in its own tile.

    The sum is HELD in registers until the end, or where those are short added to the tile, in a cache, for every group.
    """
    program = tl.program_id(0)
    head, worker, workers = program % heads, program // heads, tl.num_programs(0) // heads
    o_token = tl.arange(0, BLOCK)
    b_bias = _program_bias(bias, head, geometry, BLOCK)
    b_dbias = zeros(BLOCK, BLOCK, q.pointer.dtype.element_ty)
    if bias.tiles is not None:
        tl.debug_barrier()  # the table of the MLP, which the threads have read, lies in the tile
        if not HELD:
            tl.store(_own_tile(bias, BLOCK), b_dbias)
            tl.debug_barrier()
    for task in range(worker, tasks, workers):
        image, start = place(task, geometry)
        tokens = group_tokens(o_token, start, geometry)
        b_q = load_rows(q, image, head, tokens, SPEC)  # [M, D]
        b_k, b_kt = load_both(k, image, head, tokens, SPEC)  # [N, D], [D, N]
        products = matmul(b_q, b_kt, SPEC.PRECISION)  # [M, N]
        logits = hide(pair_logits(products, b_bias, tokens, tokens, scale, geometry), tokens)
        weights = tl.exp2(logits - base_of(tl.max(logits, 1))[:, None])
        weights *= (1 / divisor(tl.sum(weights, 1)))[:, None]
        b_do = load_rows(dout, image, head, tokens, SPEC)  # [M, D]
        b_dv = matmul(tl.trans(tl.cast(weights, b_do.dtype)), b_do, SPEC.PRECISION)
        store_rows(dqkv, image, head, tokens, b_dv, SPEC, 2 * heads * SPEC.D)
        dweights = matmul(b_do, load_columns(v, image, head, tokens, SPEC), SPEC.PRECISION)  # [M, N]
        dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        if bias.tiles is not None:
            if HELD:
                b_dbias += dlogits
            else:
                _add_to_tile(_own_tile(bias, BLOCK), dlogits)
        dlogits = tl.cast(dlogits, b_q.dtype)
        b_dk = matmul(tl.trans(dlogits), b_q, SPEC.PRECISION) * scale
        store_rows(dqkv, image, head, tokens, b_dk, SPEC, heads * SPEC.D)
        b_dq = matmul(dlogits, b_k, SPEC.PRECISION) * scale
        store_rows(dqkv, image, head, tokens, b_dq, SPEC)
    if HELD and bias.tiles is not None:
        tl.store(_own_tile(bias, BLOCK), b_dbias)


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


def _tile(tokens: int) -> int:
    """Tokens of a tile that holds the whole group."""
    return max(16, power_of_2(tokens))


def _settings(kernel, call: Call) -> dict[str, int]:
    """Warps, pipeline stages, a limit of registers where it buys resident blocks; HELD for the backward.

    docs/kernels.md shows what the compiler makes of them for each chip; no GPU has compared them by time yet.
    """
    x, geometry, tile = call.example, call.arguments["geometry"], _tile(call.tokens)
    half, head_dim, backward = x.element_size() == 2, x.shape[-1], kernel is _partition_attention_backward
    narrow = head_dim <= 32 and half
    if INTERPRETED:
        return {"HELD": narrow} if backward else {}
    arch = capability(x.device)
    roomy = arch in (80, 90, 100)  # more than 100 KiB of shared memory
    plain = not geometry.shifted.value and not geometry.ragged.value
    # A warp takes 16 rows. With twice as many, which before sm_100 repeat products, what would spill does not.
    heavy = head_dim > 64 or not half or (arch == 100 and backward and not plain)
    settings = {"num_warps": 8 if heavy and tile == 64 else tile // 16}
    if backward:
        # Tensor cores that read shared memory need no registers for rows fetched ahead; elsewhere those would spill.
        stages = (3 if arch == 90 and narrow else 2) if half and 90 <= arch < 120 else 1
        limit = {"maxnreg": 168} if tile == 16 and narrow else {}
        return settings | {"num_stages": stages, "HELD": tile < 64 or narrow} | limit
    # With two stages the rows of the next group are asked for and waited for at once. With three they come while this
    # group is computed, if shared memory then still holds two blocks.
    settings["num_stages"] = 3 if head_dim <= 32 or (roomy and half and head_dim <= 64) else 2
    if narrow and tile == 64:
        settings["maxnreg"] = 128 if arch == 80 or (roomy and plain) else 168  # four blocks, or three
    elif narrow and tile == 16:
        settings["maxnreg"] = 96
    elif tile == 64 and roomy and arch < 100 and head_dim <= 32:
        settings["maxnreg"] = 128  # two blocks of eight warps in float32
    return settings


def _launch(kernel, call: Call, bias: Tensor | None, mlp: list[Tensor], residual: bool, *rows) -> Tensor | None:
    """Persistent programs: for each head as many as the registers hold at once, by their limit. Returns their tiles."""
    x, settings, tile = call.example, _settings(kernel, call), _tile(call.tokens)
    warps = 4 * (16384 // (32 * settings.get("maxnreg", 256)))  # that fit the four quarters of a multiprocessor
    resident = warps // settings.get("num_warps", 4)
    workers = min(call.tasks, ceil_div(processors(x.device) * resident, call.heads))
    tiles = None
    if bias is not None or mlp:
        tiles = x.new_empty(workers, call.heads, tile, tile, dtype=accumulation_dtype(x))
    source = Bias.of(bias, mlp, residual, tiles)
    settings |= call.arguments | dict(bias=source, tasks=call.tasks, BLOCK=tile)
    launch(kernel, workers * call.heads, x.device, *rows, **settings)
    return tiles


def _fold(partial: Tensor, dbias: Tensor, geometry: Geometry) -> None:
    """``dbias`` from partial sums [parts, heads, side, side]."""
    parts, heads, side, _ = partial.shape
    offsets, lanes = (64, 128) if INTERPRETED else (1, 1024)  # the interpreter's cost is its number of programs
    programs = heads * ceil_div(dbias[0].numel(), offsets)
    arguments = partial, dbias, geometry, parts, heads
    launch(_fold_bias_gradient, programs, partial.device, *arguments, SIDE=side, OFFSETS=offsets, LANES=lanes)


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
    geometry: Sequence[int],  # group, interval and shift, each along height and width
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, H, W, heads, head_dim], [B, H, W, heads] or [0, H, W, heads]
    """Attention in every group, and the statistic of every query where groups are streamed."""
    geometry = Geometry.of(*q.shape[1:3], *geometry)
    tokens = geometry.group_h * geometry.group_w
    single = tokens <= SINGLE_TILE
    _check_form(mlp, tokens)
    out = q.new_empty(q.shape)
    statistic = q.new_empty(0 if single else q.shape[0], *q.shape[1:4], dtype=accumulation_dtype(q))
    if out.numel() == 0:
        return out, statistic
    call = Call.of(geometry, scale, q, k, v, out)
    with on(q.device):
        if single:
            _launch(_partition_attention_forward, call, bias, mlp, residual, *call.rows)
        else:
            streamed.forward(call, bias, statistic)
    return out, statistic


def partition_attention_backward(
    dout: Tensor,  # [B, H, W, heads, head_dim]
    q: Tensor,  # [B, H, W, heads, head_dim]
    k: Tensor,  # [B, H, W, heads, head_dim]
    v: Tensor,  # [B, H, W, heads, head_dim]
    bias: Tensor | None,  # [heads, 2Gh-1, 2Gw-1]
    mlp: list[Tensor],
    residual: bool,
    statistic: Tensor,  # [B, H, W, heads] or [0, H, W, heads]
    geometry: Sequence[int],  # group, interval and shift, each along height and width
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, H, W, 3, heads, head_dim], [heads, 2Gh-1, 2Gw-1] or [0]
    """Gradients of q, k and v in one buffer, and of the bias table."""
    batch, height, width, heads, head_dim = q.shape
    geometry = Geometry.of(height, width, *geometry)
    group_h, group_w = geometry.group_h, geometry.group_w
    _check_form(mlp, group_h * group_w)
    dqkv = q.new_empty(batch, height, width, 3, heads, head_dim)
    table = (heads, 2 * group_h - 1, 2 * group_w - 1) if bias is not None or mlp else (0,)
    if dqkv.numel() == 0:
        return dqkv, q.new_zeros(table, dtype=accumulation_dtype(q))
    dbias = q.new_empty(table, dtype=accumulation_dtype(q))
    call = Call.of(geometry, scale, dout, q, k, v, *dqkv.unbind(3))
    with on(q.device):
        if group_h * group_w <= SINGLE_TILE:
            partial = _launch(_partition_attention_backward, call, bias, mlp, residual, *call.rows[:5])
        else:
            partial = streamed.backward(call, bias, statistic)
        if partial is not None:
            _fold(partial, dbias, geometry)
    return dqkv, dbias
