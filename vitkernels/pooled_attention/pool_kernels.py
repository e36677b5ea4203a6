"""Triton kernels of the pooling of tokens, and their launchers.

A program holds a tile of M runs of RUN tokens that follow each other along the width. Taps along the width see the same
rows for a run, so that a row is loaded once for all of them: WIDTH taps and a run make a window of rows. The other taps
are lines, one after the other; the rows that several of them see come from a cache. Rows come in parts of D elements,
which hold a head_dim of 96 or 72 with less padding than a power of two. An average is a convolution whose weights are
equal.

The backward takes three kernels: the gradient of the pooled tokens before the norm, unless that is dout, then from it
the gradient of the taps and that of x. A gradient that comes through a norm is rounded to x's dtype in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sizes import ceil_div
from .._triton import (
    INTERPRETED,
    Rows,
    Spec,
    Tokens,
    _row_starts,
    accumulation_dtype,
    launch,
    on,
    processors,
    refusal,
    zeros,
)

__all__ = ["pool_tokens_backward", "pool_tokens_forward", "refusal"]
RUNS = 16  # of a tile
WIDEST = 9  # taps along the width that share rows, and taps whose gradients a program holds
WINDOW = 8  # rows of a run that are loaded at a time


class Pooling(NamedTuple):
    """A pooling of a map. Triples are along time, height and width."""

    size: tuple[int, int, int]  # tokens
    pooled: tuple[int, int, int]  # tokens
    kernel: tuple[int, int, int]  # tokens
    stride: tuple[int, int, int]  # tokens
    padding: tuple[int, int, int]  # tokens
    CLS: int  # tokens before the map
    STRIDE: int  # along the width
    WIDTH: int  # taps along the width that share rows
    STEPS: int  # of WIDTH along the width

    @classmethod
    def of(cls, size, kernel, stride, padding, has_cls: bool) -> Pooling:
        pooled = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding))
        width = kernel[2] if kernel[2] <= WIDEST else 1
        constants = map(tl.constexpr, (int(has_cls), stride[2], width, kernel[2] // width))
        return cls(*(tuple(n) for n in (size, pooled, kernel, stride, padding)), *constants)

    @property
    def tokens(self) -> int:
        return math.prod(self.pooled) + self.CLS.value

    @property
    def lines(self) -> int:
        """Of WIDTH taps each."""
        return math.prod(self.kernel) // self.WIDTH.value


class Tiles(NamedTuple):
    """How runs of tokens tile a map."""

    size: tuple[int, int, int]  # along time, height and width, in tokens
    runs: int  # along the width
    count: int
    RUN: int  # tokens

    @classmethod
    def of(cls, size: Sequence[int], run: int) -> Tiles:
        run = min(run, size[2])
        runs = ceil_div(size[2], run)
        return cls(tuple(size), runs, ceil_div(size[0] * size[1] * runs, RUNS), tl.constexpr(run))


class Runs(NamedTuple):
    """Where the runs of a tile begin, one per lane, and whether they are of the map."""

    t: tl.tensor
    y: tl.tensor
    x: tl.tensor
    inside: tl.tensor


class Window(NamedTuple):
    """Tokens of runs."""

    first: tl.tensor  # token, one per lane
    line: tl.tensor  # whether the line is of the map
    inside: tuple[tl.tensor, ...]  # whether a token is, if its line is: for each token of the runs


@triton.jit
def _runs(tile, tiles, M: tl.constexpr):
    """The y of a run changes fastest: a tile is nearly square, and its rows serve many of its taps."""
    run = tile * M + tl.arange(0, M)
    column = run // tiles.size[1]
    t = column // tiles.runs
    return Runs(t, run % tiles.size[1], column % tiles.runs * tiles.RUN, t < tiles.size[0])


@triton.jit
def _place(task, heads, tiles):
    """Head, tile and image of a task; tasks number them so that neighbours in memory are read at about one time."""
    rest = task // heads
    return task % heads, rest % tiles.count, rest // tiles.count


@triton.jit
def _window(t, y, x, inside, size, COUNT: tl.constexpr, STEP: tl.constexpr, CLS: tl.constexpr):
    """COUNT tokens of a line of a map, STEP apart, from x on."""
    inside, masks = inside & (t >= 0) & (t < size[0]) & (y >= 0) & (y < size[1]), ()
    for i in tl.static_range(COUNT):
        masks += (tl.cast(x + i * STEP, tl.uint32) < tl.cast(size[2], tl.uint32),)
    return Window(CLS + (t * size[1] + y) * size[2] + x, inside, masks)


@triton.jit
def _class_token(M: tl.constexpr):
    """The first token, in the first lane."""
    lane = tl.arange(0, M)
    return Window(lane, lane == 0, (lane == 0,))


@triton.jit
def _load_window(rows, image, head, window, part, SPEC: tl.constexpr):  # [M, D] each
    """Rows of tokens that follow each other, from element ``part`` on; zero outside the map."""
    base, starts = _row_starts(rows, image, head, Tokens(0, window.first, True, 0), SPEC, 0)
    o_d, step, values = tl.arange(0, SPEC.BLOCK_D)[None, :] + part, tl.cast(rows.x, tl.int64) * SPEC.UNIT, ()
    o_row, m_line = starts[:, None] + o_d, window.line[:, None]
    if SPEC.D % SPEC.BLOCK_D:
        m_line = m_line & (o_d < SPEC.D)
    for i in tl.static_range(len(window.inside)):
        values += (tl.load(base + i * step + o_row, mask=m_line & window.inside[i][:, None], other=0.0),)
    return values


@triton.jit
def _store_token(rows, image, head, window, PLACE: tl.constexpr, STEP: tl.constexpr, value, part, SPEC: tl.constexpr):
    """Write rows of one token of every run of a window whose tokens are STEP apart, from element ``part`` on."""
    tokens = Tokens(0, window.first + PLACE * STEP, True, 0)
    base, starts = _row_starts(rows, image, head, tokens, SPEC, 0)
    o_d, mask = tl.arange(0, SPEC.BLOCK_D)[None, :] + part, (window.line & window.inside[PLACE])[:, None]
    if SPEC.D % SPEC.BLOCK_D:
        mask = mask & (o_d < SPEC.D)
    tl.store(base + starts[:, None] + o_d, tl.cast(value, rows.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _vector(p, part, SPEC: tl.constexpr):  # [1, D]
    """A parameter of the elements of a head, from ``part`` on."""
    o_d = tl.arange(0, SPEC.BLOCK_D) + part
    if SPEC.D % SPEC.BLOCK_D:
        return tl.load(p + o_d, mask=o_d < SPEC.D, other=0.0)[None, :]
    else:
        return tl.load(p + o_d)[None, :]


@triton.jit
def _copies(tile, COUNT: tl.constexpr):
    tiles = ()
    for _i in tl.static_range(COUNT):
        tiles += (tile,)
    return tiles


@triton.jit
def _some(tiles, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles from FIRST on, STEP apart."""
    some = ()
    for i in tl.static_range(COUNT):
        some += (tiles[FIRST + i * STEP],)
    return some


@triton.jit
def _seen(runs, k_t, k_y, k_x, pooling, RUN: tl.constexpr):
    """The tokens of x that runs of pooled tokens see by the WIDTH taps from one on."""
    t = runs.t * pooling.stride[0] - pooling.padding[0] + k_t
    y = runs.y * pooling.stride[1] - pooling.padding[1] + k_y
    x = runs.x * pooling.STRIDE - pooling.padding[2] + k_x
    count: tl.constexpr = (RUN - 1) * pooling.STRIDE + pooling.WIDTH
    return _window(t, y, x, runs.inside, pooling.size, count, 1, pooling.CLS)


@triton.jit
def _convolve(
    sums, values, p_tap, part, WIDTH: tl.constexpr, NEXT: tl.constexpr, STRIDE: tl.constexpr, SPEC: tl.constexpr
):
    """Add to every token of the runs its products with WIDTH taps, each NEXT taps after the one before it."""
    weights, added = (), ()
    for K in tl.static_range(WIDTH):
        weights += (_vector(p_tap + K * NEXT * SPEC.D, part, SPEC),)
    for J in tl.static_range(len(sums)):
        total = sums[J]
        for K in tl.static_range(WIDTH):
            total += tl.cast(values[J * STRIDE + K], total.dtype) * weights[K]
        added += (total,)
    return added


@triton.jit
def _compete(best, winners, values, window, tap, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """The higher of every token's best and its values, and their taps, from the last to ``tap``, the first.

    Of equal values the first tap wins, and a NaN against all values; of NaNs, the last tap.
    """
    higher, taps = (), ()
    for J in tl.static_range(len(best)):
        value, winner = best[J], winners[J]
        for BACK in tl.static_range(WIDTH):
            rival = tl.cast(values[J * STRIDE + WIDTH - 1 - BACK], value.dtype)
            inside = (window.line & window.inside[J * STRIDE + WIDTH - 1 - BACK])[:, None]
            wins = inside & ((rival >= value) | ((rival != rival) & (value == value)))
            value, winner = tl.where(wins, rival, value), tl.where(wins, tap + WIDTH - 1 - BACK, winner)
        higher += (value,)
        taps += (winner,)
    return higher, taps


@triton.jit
def _pool(x, image, head, runs, taps, part, pooling, RUN: tl.constexpr, SPEC: tl.constexpr):  # RUN tiles [M, D] each
    """The tokens of runs, pooled, and the winning taps, which mean nothing where ``taps`` make a convolution."""
    start = zeros(runs.x.shape[0], SPEC.BLOCK_D, x.pointer.dtype.element_ty)
    if taps is None:
        start -= float("inf")
    pooled, winners = _copies(start, RUN), _copies(tl.zeros((start.shape[0], SPEC.BLOCK_D), tl.int32), RUN)
    kernel = pooling.kernel
    for a in range(kernel[0]):
        for b in range(kernel[1]):
            for c in range(pooling.STEPS):
                if taps is None:  # backwards
                    k_t, k_y, k_x = kernel[0] - 1 - a, kernel[1] - 1 - b, (pooling.STEPS - 1 - c) * pooling.WIDTH
                else:
                    k_t, k_y, k_x = a, b, c * pooling.WIDTH
                window, tap = _seen(runs, k_t, k_y, k_x, pooling, RUN), (k_t * kernel[1] + k_y) * kernel[2] + k_x
                values = _load_window(x, image, head, window, part, SPEC)
                if taps is None:
                    pooled, winners = _compete(pooled, winners, values, window, tap, pooling.WIDTH, pooling.STRIDE)
                else:
                    p_tap = taps + tap * SPEC.D
                    pooled = _convolve(pooled, values, p_tap, part, pooling.WIDTH, 1, pooling.STRIDE, SPEC)
    return pooled, winners


@triton.jit
def _load_class_token(x, image, head, token, PARTS: tl.constexpr, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """Its parts."""
    parts = ()
    for i in tl.static_range(PARTS):
        parts += (tl.cast(_load_window(x, image, head, token, i * SPEC.BLOCK_D, SPEC)[0], DTYPE),)
    return parts


@triton.jit
def _mean(parts, SPEC: tl.constexpr):  # [M, 1]
    """Of rows that are zero beyond head_dim."""
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    return tl.sum(total, 1, keep_dims=True) * (1 / SPEC.D)


@triton.jit
def _normalise(z, EPS: tl.constexpr, SPEC: tl.constexpr):  # tuple of [M, D] -> tuple of [M, D], [M, 1]
    """LayerNorm without its affine part, and the reciprocal of the standard deviation."""
    mean, centred, squares, normal = _mean(z, SPEC), (), (), ()
    for i in tl.static_range(len(z)):
        part = z[i] - mean
        if SPEC.D % SPEC.BLOCK_D:
            part = tl.where((tl.arange(0, SPEC.BLOCK_D) + i * SPEC.BLOCK_D < SPEC.D)[None, :], part, 0.0)
        centred += (part,)
        squares += (part * part,)
    rstd = tl.rsqrt(_mean(squares, SPEC) + EPS)
    for i in tl.static_range(len(z)):
        normal += (centred[i] * rstd,)
    return normal, rstd


@triton.jit
def _store_normal(out, image, head, window, PLACE: tl.constexpr, z, norm, EPS: tl.constexpr, SPEC: tl.constexpr):
    """Write a token of every run through the norm, where there is one."""
    if norm[0] is not None:
        z, _ = _normalise(z, EPS, SPEC)
    for i in tl.static_range(len(z)):
        part = z[i]
        if norm[0] is not None:
            part = part * _vector(norm[0], i * SPEC.BLOCK_D, SPEC) + _vector(norm[1], i * SPEC.BLOCK_D, SPEC)
        _store_token(out, image, head, window, PLACE, 1, part, i * SPEC.BLOCK_D, SPEC)


@triton.jit
def _pool_tokens_forward(
    x, out, taps, norm, pooling, tiles, heads,
    EPS: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    head, tile, image = _place(tl.program_id(0), heads, tiles)
    runs = _runs(tile, tiles, M)
    pooled = ()
    for i in tl.static_range(PARTS):
        pooled += _pool(x, image, head, runs, taps, i * SPEC.BLOCK_D, pooling, tiles.RUN, SPEC)[0]
    window = _window(runs.t, runs.y, runs.x, runs.inside, pooling.pooled, tiles.RUN, 1, pooling.CLS)
    for j in tl.static_range(tiles.RUN):
        _store_normal(out, image, head, window, j, _some(pooled, j, tiles.RUN, PARTS), norm, EPS, SPEC)
    if pooling.CLS:
        if tile == 0:
            token = _class_token(M)
            z = _load_class_token(x, image, head, token, PARTS, pooled[0].dtype, SPEC)
            _store_normal(out, image, head, token, 0, z, norm, EPS, SPEC)


@triton.jit
def _norm_backward(
    dout, dpooled, image, head, window, PLACE: tl.constexpr, z, norm_weight, dweight, dbias,
    EPS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a token of every run before the norm; add to the gradients of the norm's weights."""
    normal, rstd = _normalise(z, EPS, SPEC)
    inside = (window.line & window.inside[PLACE])[:, None]
    token = Window(window.first + PLACE, window.line, (window.inside[PLACE],))
    dnormal, products, sums, more_sums = (), (), (), ()
    for i in tl.static_range(len(z)):
        b_do = tl.cast(_load_window(dout, image, head, token, i * SPEC.BLOCK_D, SPEC)[0], z[0].dtype)  # [M, D]
        more_sums += (dbias[i] + b_do,)
        sums += (tl.where(inside, dweight[i] + b_do * normal[i], dweight[i]),)
        part = b_do * _vector(norm_weight, i * SPEC.BLOCK_D, SPEC)
        dnormal += (part,)
        products += (part * normal[i],)
    mean, slope = _mean(dnormal, SPEC), _mean(products, SPEC)
    for i in tl.static_range(len(z)):
        part = (dnormal[i] - mean - normal[i] * slope) * rstd
        _store_token(dpooled, image, head, window, PLACE, 1, part, i * SPEC.BLOCK_D, SPEC)
    return sums, more_sums


@triton.jit
def _store_sum(p, part, value, m, SPEC: tl.constexpr):  # value [M, D]
    """Write the sum of rows, from element ``part`` on, where ``m`` holds."""
    o_d = tl.arange(0, SPEC.BLOCK_D) + part
    tl.store(p + o_d, tl.sum(value, 0), mask=(o_d < SPEC.D) & m)


@triton.jit
def _pool_tokens_backward_pooled(
    dout, x, dpooled, winner, taps, norm_weight, p_partial, pooling, tiles, heads, tasks,
    EPS: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the pooled tokens before the norm, and the taps that won; a sum per program of dnorm."""
    start = zeros(M, SPEC.BLOCK_D, x.pointer.dtype.element_ty)
    dweight, dbias = _copies(start, PARTS), _copies(start, PARTS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head, tile, image = _place(task, heads, tiles)
        runs = _runs(tile, tiles, M)
        pooled, winners = (), ()
        for i in tl.static_range(PARTS):
            part = _pool(x, image, head, runs, taps, i * SPEC.BLOCK_D, pooling, tiles.RUN, SPEC)
            pooled += part[0]
            winners += part[1]
        window = _window(runs.t, runs.y, runs.x, runs.inside, pooling.pooled, tiles.RUN, 1, pooling.CLS)
        for j in tl.static_range(tiles.RUN):
            if winner is not None:
                for i in tl.static_range(PARTS):
                    _store_token(winner, image, head, window, j, 1, winners[i * tiles.RUN + j], i * SPEC.BLOCK_D, SPEC)
            if norm_weight is not None:
                z = _some(pooled, j, tiles.RUN, PARTS)
                dweight, dbias = _norm_backward(
                    dout, dpooled, image, head, window, j, z, norm_weight, dweight, dbias, EPS, SPEC
                )
        if pooling.CLS and norm_weight is not None:
            if tile == 0:
                token = _class_token(M)
                z = _load_class_token(x, image, head, token, PARTS, start.dtype, SPEC)
                dweight, dbias = _norm_backward(
                    dout, dpooled, image, head, token, 0, z, norm_weight, dweight, dbias, EPS, SPEC
                )
    if norm_weight is not None:
        p_partial += tl.program_id(0) * 2 * SPEC.D
        for i in tl.static_range(PARTS):
            _store_sum(p_partial, i * SPEC.BLOCK_D, dweight[i], True, SPEC)
            _store_sum(p_partial + SPEC.D, i * SPEC.BLOCK_D, dbias[i], True, SPEC)


@triton.jit
def _pool_tokens_backward_taps(
    dpooled, x, p_partial, pooling, tiles, heads, tasks, groups,
    LINES: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """LINES lines of taps, one part of the rows, over many tiles: a sum per program of their gradients."""
    part, rest = tl.program_id(0) % PARTS * SPEC.BLOCK_D, tl.program_id(0) // PARTS
    group, worker, workers = rest % groups, rest // groups, tl.num_programs(0) // PARTS // groups
    sums = _copies(zeros(M, SPEC.BLOCK_D, x.pointer.dtype.element_ty), LINES * pooling.WIDTH)
    for task in range(worker, tasks, workers):
        head, tile, image = _place(task, heads, tiles)
        runs = _runs(tile, tiles, M)
        window = _window(runs.t, runs.y, runs.x, runs.inside, pooling.pooled, tiles.RUN, 1, pooling.CLS)
        gradients = _load_window(dpooled, image, head, window, part, SPEC)
        added = ()
        for L in tl.static_range(LINES):
            line = (group * LINES + L) // pooling.STEPS
            k_t, k_y, k_x = line // pooling.kernel[1], line % pooling.kernel[1], (group * LINES + L) % pooling.STEPS
            window = _seen(runs, k_t, k_y, k_x * pooling.WIDTH, pooling, tiles.RUN)
            values = _load_window(x, image, head, window, part, SPEC)
            for K in tl.static_range(pooling.WIDTH):
                total = sums[L * pooling.WIDTH + K]
                for J in tl.static_range(tiles.RUN):
                    value = tl.cast(values[J * pooling.STRIDE + K], total.dtype)
                    total += value * tl.cast(gradients[J], total.dtype)
                added += (total,)
        sums = added
    first, taps = group * LINES * pooling.WIDTH, pooling.kernel[0] * pooling.kernel[1] * pooling.kernel[2]
    for K in tl.static_range(LINES * pooling.WIDTH):
        p_tap = p_partial + (tl.cast(worker, tl.int64) * taps + first + K) * SPEC.D
        _store_sum(p_tap, part, sums[K], first + K < taps, SPEC)


@triton.jit
def _meeting(taps, rest, stride):
    """How many taps along an axis meet tokens whose place, padding included, leaves ``rest`` modulo the stride."""
    return tl.cdiv(tl.maximum(taps - rest, 0), stride)


@triton.jit
def _collect(sums, values, winners, tap, WIDTH: tl.constexpr):
    """Add to every token of the runs the gradients of the maxima that it won."""
    added = ()
    for J in tl.static_range(len(sums)):
        total = sums[J]
        for K in tl.static_range(WIDTH):
            value = tl.cast(values[J + K], total.dtype)
            total += tl.where(winners[J + K] == tap - K, value, 0.0)
        added += (total,)
    return added


@triton.jit
def _pool_tokens_backward_input(
    dpooled, winner, dx, taps, pooling, tiles, heads, M: tl.constexpr, PARTS: tl.constexpr, SPEC: tl.constexpr
):
    """One part of tokens of x whose places, padding included, leave the same rests modulo the strides.

    The same taps meet them: tap k leads from stride * b + rest to the pooled token at b - (k - rest) / stride.
    """
    kernel, stride, padding = pooling.kernel, pooling.stride, pooling.padding
    part, rests = tl.program_id(0) % PARTS * SPEC.BLOCK_D, tl.program_id(0) // PARTS
    head, rests = rests % heads, rests // heads
    rest_x, rests = rests % stride[2], rests // stride[2]
    rest_y, rests = rests % stride[1], rests // stride[1]
    rest_t, rests = rests % stride[0], rests // stride[0]
    tile, image = rests % tiles.count, rests // tiles.count
    runs = _runs(tile, tiles, M)
    b_t = runs.t + tl.cdiv(tl.maximum(padding[0] - rest_t, 0), stride[0])
    b_y = runs.y + tl.cdiv(tl.maximum(padding[1] - rest_y, 0), stride[1])
    b_x = runs.x + tl.cdiv(tl.maximum(padding[2] - rest_x, 0), stride[2])

    WIDTH: tl.constexpr = pooling.WIDTH if pooling.STRIDE == 1 else 1
    sums = _copies(zeros(M, SPEC.BLOCK_D, dx.pointer.dtype.element_ty), tiles.RUN)
    for n_t in range(_meeting(kernel[0], rest_t, stride[0])):
        for n_y in range(_meeting(kernel[1], rest_y, stride[1])):
            for step in range(pooling.STEPS if pooling.STRIDE == 1 else _meeting(kernel[2], rest_x, stride[2])):
                n_x = step * WIDTH + WIDTH - 1  # and those before it, WIDTH in all
                t, y, x = b_t - n_t, b_y - n_y, b_x - n_x
                window = _window(t, y, x, runs.inside, pooling.pooled, tiles.RUN + WIDTH - 1, 1, pooling.CLS)
                values = _load_window(dpooled, image, head, window, part, SPEC)
                tap = (rest_t + n_t * stride[0]) * kernel[1] + rest_y + n_y * stride[1]
                tap = tap * kernel[2] + rest_x + n_x * stride[2]
                if taps is None:
                    winners = _load_window(winner, image, head, window, part, SPEC)
                    sums = _collect(sums, values, winners, tap, WIDTH)
                else:
                    sums = _convolve(sums, values, taps + tap * SPEC.D, part, WIDTH, -1, 1, SPEC)
    t, y = b_t * stride[0] + rest_t - padding[0], b_y * stride[1] + rest_y - padding[1]
    x = b_x * stride[2] + rest_x - padding[2]
    window = _window(t, y, x, runs.inside, pooling.size, tiles.RUN, pooling.STRIDE, pooling.CLS)
    for j in tl.static_range(tiles.RUN):
        _store_token(dx, image, head, window, j, pooling.STRIDE, sums[j], part, SPEC)
    if pooling.CLS:
        if (tile == 0) & (rest_t + rest_y + rest_x == 0):
            token = _class_token(M)
            value = _load_window(dpooled, image, head, token, part, SPEC)[0]
            _store_token(dx, image, head, token, 0, 1, value, part, SPEC)


class Call(NamedTuple):
    """What the launches of a call share."""

    x: Tensor
    taps: Tensor | None  # [taps, head_dim]; None where the maximum is taken
    pooling: Pooling
    spec: Spec

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None, maximum: bool, pooling: Pooling, *others: Tensor) -> Call:
        """``others``: further [B, N, heads, head_dim] tensors of which rows are read or written."""
        taps = None if weight is None else weight.t().contiguous()
        if weight is None and not maximum:
            count = math.prod(pooling.kernel)
            taps = x.new_full((count, x.shape[-1]), 1 / count, dtype=accumulation_dtype(x))
        return cls(x, taps, pooling, Spec.of(*(y.unsqueeze(1) for y in (x, *others))))

    @property
    def heavy(self) -> bool:
        """Whether a token of a run takes many registers beside its sum."""
        return self.taps is None or self.x.element_size() > 2

    def rows(self, x: Tensor | None) -> Rows | None:
        return None if x is None else Rows.of(x.unsqueeze(1), self.spec)

    def longest(self, limit: int) -> int:
        """Tokens of a run: up to ``limit``, whose window of rows fits."""
        step, width = self.pooling.STRIDE.value, self.pooling.WIDTH.value
        return max([1, *(n for n in range(1, limit + 1) if (n - 1) * step + width <= WINDOW)])

    @property
    def part(self) -> int:
        """Elements of a head that a tile holds: all of them, or 32 where those have less padding."""
        whole = self.spec.BLOCK_D.value
        return 32 if ceil_div(self.x.shape[-1], 32) * 32 < whole else whole

    @property
    def whole(self) -> bool:
        """Whether a part is all of a head."""
        return self.part == self.spec.BLOCK_D.value

    def tiling(self, size: Sequence[int], run: int, part: int, warps: int) -> tuple[int, dict[str, object]]:
        """How many tiles all images and heads have, and the arguments of a kernel on tiles of ``part`` elements.

        A thread has 8 elements of a row, 16 bytes in half precision, in all layouts: nothing passes through shared
        memory. There are more threads than elements of a part, so that taps are loaded where they are needed. ``warps``
        are to fit a processor: a warp has 6 KB or more in flight, so that 8 would do, and more hide the arithmetic.
        """
        tiles, part = Tiles.of(size, run), min(part, self.spec.BLOCK_D.value)
        arguments = dict(pooling=self.pooling, tiles=tiles, heads=self.x.shape[2], M=RUNS)
        arguments |= dict(PARTS=ceil_div(self.x.shape[-1], part))
        arguments |= dict(SPEC=self.spec._replace(BLOCK_D=tl.constexpr(part)))
        if not INTERPRETED:
            arguments |= dict(num_warps=RUNS * part // 256, num_stages=1, maxnreg=2048 // warps // 8 * 8)
        return self.x.shape[0] * self.x.shape[2] * tiles.count, arguments

    def programs(self, tasks: int, warps: int, arguments: dict[str, object]) -> int:
        """So many as run at a time if a processor takes ``warps``."""
        return min(tasks, warps // arguments.get("num_warps", warps) * processors(self.x.device))


def pool_tokens_forward(
    x: Tensor,  # [B, N, heads, head_dim]
    weight: Tensor | None,  # [head_dim, taps] in the accumulation dtype; None averages
    norm_weight: Tensor | None,  # [head_dim] in the accumulation dtype
    norm_bias: Tensor | None,  # [head_dim] in the accumulation dtype
    thw: Sequence[int],  # tokens along time, height, width
    kernel: Sequence[int],  # tokens
    stride: Sequence[int],  # tokens
    padding: Sequence[int],  # tokens
    maximum: bool,
    has_cls: bool,
    eps: float,
) -> Tensor:  # [B, N', heads, head_dim]
    """One launch, and one that lays out the taps."""
    pooling = Pooling.of(thw, kernel, stride, padding, has_cls)
    out = x.new_empty(x.shape[0], pooling.tokens, *x.shape[2:])
    if out.numel() == 0:
        return out
    with on(x.device):
        call = Call.of(x, weight, maximum, pooling, out)
        run, warps = call.longest(2 if call.heavy else 4), 16 if call.whole else 12
        tasks, arguments = call.tiling(pooling.pooled, run, call.part, warps)
        norm = norm_weight, norm_bias
        inputs = call.rows(x), call.rows(out), call.taps, norm
        launch(_pool_tokens_forward, tasks, x.device, *inputs, EPS=eps, **arguments)
    return out


def _backward_pooled(call: Call, dout, x, dpooled, winner, norm_weight: Tensor | None, dnorm: Tensor, eps) -> None:
    """Sums of dnorm are held too: rows in parts, of which a thread has more elements, come in shorter runs.

    Fewer than twelve warps are eight: a quarter of a processor has registers for three of 168, or for two.
    """
    run, warps = (4, 16) if call.whole else (2, 12)
    run = call.longest(run // 2 if call.heavy else run)
    tasks, arguments = call.tiling(call.pooling.pooled, run, call.part, warps)
    programs = call.programs(tasks, warps, arguments)
    partial = dnorm.new_empty(programs, *dnorm.shape)
    inputs = dout, x, dpooled, winner, call.taps, norm_weight, partial
    launch(_pool_tokens_backward_pooled, programs, dnorm.device, *inputs, tasks=tasks, EPS=eps, **arguments)
    if norm_weight is not None:
        torch.sum(partial, 0, out=dnorm)


def _backward_taps(call: Call, dpooled, x, dweight: Tensor) -> None:
    """Nine taps of an element take 72 registers: twelve warps, and short runs. Parts are independent here."""
    tasks, arguments = call.tiling(call.pooling.pooled, 1 if call.heavy else 2, 32, 12)
    lines = max(1, WIDEST // call.pooling.WIDTH.value)
    groups = ceil_div(call.pooling.lines, lines)
    together = groups * arguments["PARTS"]
    workers = max(1, call.programs(tasks * together, 12, arguments) // together)
    partial = dweight.new_empty(workers, *dweight.shape[::-1])
    arguments.update(tasks=tasks, groups=groups, LINES=lines)
    launch(_pool_tokens_backward_taps, workers * together, dweight.device, dpooled, x, partial, **arguments)
    torch.sum(partial, 0, out=dweight.t())


def pool_tokens_backward(
    dout: Tensor,  # [B, N', heads, head_dim]
    x: Tensor,  # [B, N, heads, head_dim]
    weight: Tensor | None,  # [head_dim, taps] in the accumulation dtype; None averages
    norm_weight: Tensor | None,  # [head_dim] in the accumulation dtype
    norm_bias: Tensor | None,  # [head_dim] in the accumulation dtype
    thw: Sequence[int],  # tokens along time, height, width
    kernel: Sequence[int],  # tokens
    stride: Sequence[int],  # tokens
    padding: Sequence[int],  # tokens
    maximum: bool,
    has_cls: bool,
    eps: float,
    dx: Tensor,  # [B, N, heads, head_dim], written here
) -> tuple[Tensor, Tensor]:  # [head_dim, taps] or [0], [2, head_dim] or [0]
    """Gradients of x, of the taps and of the two weights of the norm, partial sums added in a fixed order."""
    wide, pooling = accumulation_dtype(x), Pooling.of(thw, kernel, stride, padding, has_cls)
    dweight = x.new_empty((0,) if weight is None else weight.shape, dtype=wide)
    dnorm = x.new_empty((0,) if norm_weight is None else (2, x.shape[-1]), dtype=wide)
    if x.numel() == 0:
        return dweight.zero_(), dnorm.zero_()
    dpooled, winner = dout if norm_weight is None else dout.new_empty(dout.shape), None
    if maximum:
        narrow = x.element_size() == 2 and math.prod(kernel) < 2**15
        winner = dout.new_empty(dout.shape, dtype=torch.int16 if narrow else torch.int32)
    with on(x.device):
        call = Call.of(x, weight, maximum, pooling, dout, dpooled, dx)
        rows = [call.rows(y) for y in (dout, x, dpooled, winner, dx)]
        if maximum or norm_weight is not None:
            _backward_pooled(call, *rows[:4], norm_weight, dnorm, eps)
        if weight is not None:
            _backward_taps(call, rows[2], rows[1], dweight)
        lattice = [ceil_div(n, s) for n, s in zip(thw, stride)]
        tasks, arguments = call.tiling(lattice, 2 if maximum else 4, call.part, 16)
        programs = tasks * math.prod(stride) * arguments["PARTS"]
        launch(_pool_tokens_backward_input, programs, x.device, *rows[2:], call.taps, **arguments)
    return dweight, dnorm
