"""Triton kernels of relative positions along the axes of the maps, and their launches.

To the attention kernels relative positions are further columns of q, whose keys are one-hot: column j of an axis is the
product of the unscaled query with the row of the term that it meets at coordinate j, and a key takes one column of
every axis. Queries of one coordinate share their rows, so that the products, and their gradients, are matrix products.
"""

from __future__ import annotations

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
    accumulate,
    accumulation_dtype,
    dot,
    launch,
    load_both,
    load_columns,
    load_rows,
    matmul,
    processors,
    store_rows,
    zeros,
)

WIDEST = 128  # columns of a part


class Divisor(NamedTuple):
    """By which numbers from 0 to 2**30 - 1 are divided: one product and one shift."""

    by: int
    factor: int  # 2**shift / by, rounded up
    shift: int

    @classmethod
    def of(cls, by: int) -> Divisor:
        shift = 30 + (by - 1).bit_length()
        return cls(by, ceil_div(1 << shift, by), shift)


class Columns(NamedTuple):
    """Which column of every axis a key takes."""

    cls: int  # class tokens before the key's map: none or one
    height: Divisor  # of the key's map, tokens
    width: Divisor
    t: int | None  # column of the axis' first key; None without the axis
    y: int | None
    x: int | None


class Axis(NamedTuple):
    """Queries along an axis of their map, and a run of its keys whose columns lie side by side."""

    cls: int  # class tokens before the queries' map
    queries: int  # along the axis
    inner: int  # tokens from one to the next
    sharing: int  # queries of an image, of all heads, that share a coordinate
    heads: int
    keys: int  # along the axis
    first: int  # key of the run's first column


class Run(NamedTuple):
    """Where the columns of an axis, or as many as lie in one part, stand among all."""

    term: int  # which
    axis: Axis
    part: int
    start: int  # column of the part
    stop: int


class Layout(NamedTuple):
    """The columns of all axes in one or more parts, ``[parts * B, Nq, heads, width]``."""

    runs: list[Run]
    columns: Columns
    parts: int
    width: int

    @classmethod
    def of(cls, terms: Sequence[Tensor | None], q_thw, k_thw, has_cls: bool, heads: int) -> Layout | None:
        """Parts of a multiple of 16 columns. The last run goes on to the end, with zeros. None without terms."""
        if all(term is None for term in terms):
            return None
        wanted = sum(keys for term, keys in zip(terms, k_thw) if term is not None)
        parts = ceil_div(wanted, WIDEST)
        width = 16 * ceil_div(wanted, 16) if parts == 1 else WIDEST
        volume, before, column, starts, runs = q_thw[0] * q_thw[1] * q_thw[2], 1, 0, [], []
        for i, (term, queries, keys) in enumerate(zip(terms, q_thw, k_thw)):
            before *= queries
            starts.append(None if term is None else column)
            first = 0
            while term is not None and first < keys:
                part, start = divmod(column, width)
                stop = min(width, start + keys - first)
                axis = Axis(int(has_cls), queries, volume // before, volume // queries * heads, heads, keys, first)
                runs.append(Run(i, axis, part, start, stop))
                first, column = first + stop - start, column + stop - start
        runs[-1:] = [run._replace(stop=width) for run in runs[-1:]]
        return cls(runs, Columns(int(has_cls), *map(Divisor.of, k_thw[1:]), *starts), parts, width)


@triton.jit
def _divide(number, divisor):
    return tl.cast((tl.cast(number, tl.int64) * divisor.factor) >> divisor.shift, tl.int32)


@triton.jit
def one_hot(o_key, o_column, columns, DTYPE: tl.constexpr):
    """1 where the logit of a key takes a column, else 0; the class token's takes none. The numbers broadcast."""
    place = o_key - columns.cls
    row = _divide(place, columns.width)
    layer = _divide(row, columns.height)
    taken = o_column < 0
    if columns.t is not None:
        taken |= tl.where(place < 0, -1, columns.t + layer) == o_column
    if columns.y is not None:
        taken |= tl.where(place < 0, -1, columns.y + row - layer * columns.height.by) == o_column
    if columns.x is not None:
        taken |= tl.where(place < 0, -1, columns.x + place - row * columns.width.by) == o_column
    return tl.cast(tl.where(taken, 1.0, 0.0), DTYPE)


@triton.jit
def _sharing(axis, y, tile, BLOCK: tl.constexpr):
    """A tile of the queries at coordinate ``y`` of an axis. Their heads stand for rows of a map."""
    number = tile * BLOCK + tl.arange(0, BLOCK)
    place = number // axis.heads
    token = axis.cls + (place // axis.inner * axis.queries + y) * axis.inner + place % axis.inner
    return Tokens(number % axis.heads, token, number < axis.sharing, tl.zeros_like(token))


@triton.jit
def _met(axis, y, COLUMNS: tl.constexpr):
    """The rows of the term [queries, keys, D] that these queries meet."""
    key = axis.first + tl.arange(0, COLUMNS.BLOCK_D)
    inside = (key < axis.keys) & (key < axis.first + COLUMNS.D)
    zero = tl.zeros_like(key)
    return Tokens(zero + y, key, inside, zero)


@triton.jit
def _relative_products(q, term, products, axis, tiles, BLOCK: tl.constexpr, SPEC: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile of queries that share a coordinate."""
    tile, task = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    y, image = task % axis.queries, task // axis.queries
    query = _sharing(axis, y, tile, BLOCK)
    b_q = load_rows(q, image, 0, query, SPEC)  # [M, D]
    b_term = load_columns(term, 0, 0, _met(axis, y, COLUMNS), SPEC)  # [D, C]
    store_rows(products, image, 0, query, matmul(b_q, tl.cast(b_term, b_q.dtype), SPEC.PRECISION), COLUMNS)


@triton.jit
def _relative_gradients(
    q, dq, dproducts, term, partial, axis, tiles, tasks, BLOCK: tl.constexpr, SPEC: tl.constexpr, COLUMNS: tl.constexpr
):
    """A share of the queries at a coordinate: added to dq, which no other program touches, and summed for the term."""
    y, share = tl.program_id(0) % axis.queries, tl.program_id(0) // axis.queries
    shares = tl.num_programs(0) // axis.queries
    met = _met(axis, y, COLUMNS)
    b_term = tl.cast(load_rows(term, 0, 0, met, SPEC), q.pointer.dtype.element_ty)  # [C, D]
    b_dterm = zeros(COLUMNS.BLOCK_D, SPEC.BLOCK_D, b_term.dtype)
    for task in range(share, tasks, shares):
        image, query = task // tiles, _sharing(axis, y, task % tiles, BLOCK)
        b_dproducts, b_columns = load_both(dproducts, image, 0, query, COLUMNS)  # [M, C], [C, M]
        b_dq = tl.cast(load_rows(dq, image, 0, query, SPEC), b_dterm.dtype)  # [M, D]
        store_rows(dq, image, 0, query, dot(b_dproducts, b_term, b_dq, SPEC.PRECISION), SPEC)
        b_dterm = accumulate(b_columns, load_rows(q, image, 0, query, SPEC), b_dterm, SPEC.PRECISION)
    store_rows(partial, share, 0, met, b_dterm, SPEC)


def _settings(x: Tensor) -> dict[str, int]:
    """The tile of queries of all heads, and warps."""
    if INTERPRETED:
        return {"BLOCK": 64}
    if x.dtype == torch.float32:
        return {"BLOCK": 16, "num_warps": 8, "num_stages": 1}
    return {"BLOCK": 64, "num_warps": 8 if x.shape[-1] > 64 else 4, "num_stages": 1}


def _heads_as_rows(x: Tensor) -> Tensor:  # [B, N, heads, D] -> [B, heads, N, 1, D]
    return x.transpose(1, 2).unsqueeze(3)


def _terms_as_rows(x: Tensor) -> Tensor:  # [parts, queries, keys, D] -> [parts, queries, keys, 1, D]
    return x.unsqueeze(3)


def _run_columns(columns: Tensor, layout: Layout, run: Run) -> tuple[Rows, Spec]:  # [parts * B, Nq, heads, width]
    """Those of a run, as rows, and what a kernel on them is compiled for."""
    view = columns.unflatten(0, (layout.parts, -1))[run.part, ..., run.start : run.stop]
    spec = Spec.of(_heads_as_rows(view))
    return Rows.of(_heads_as_rows(view), spec), spec


def forward(q: Tensor, terms: Sequence[Tensor | None], layout: Layout) -> Tensor:  # [parts * B, Nq, heads, width]
    """The columns of ``q`` [B, Nq, heads, head_dim]; those of a class token are not written."""
    batch, tokens, heads, _ = q.shape
    settings = _settings(q)
    products = q.new_empty(layout.parts * batch, tokens, heads, layout.width)
    for run in layout.runs:
        maps = _heads_as_rows(q), _terms_as_rows(terms[run.term].contiguous()[None])
        spec, (rows, columns) = Spec.of(*maps), _run_columns(products, layout, run)
        tiles = ceil_div(run.axis.sharing, settings["BLOCK"])
        arguments = *(Rows.of(x, spec) for x in maps), rows, run.axis, tiles
        programs = batch * run.axis.queries * tiles
        launch(_relative_products, programs, q.device, *arguments, SPEC=spec, COLUMNS=columns, **settings)
    return products


def backward(
    q: Tensor,  # [B, Nq, heads, head_dim]
    dq: Tensor,  # [B, Nq, heads, head_dim]: added to
    dproducts: Tensor,  # [parts * B, Nq, heads, width]
    terms: Sequence[Tensor | None],
    layout: Layout,
) -> list[Tensor]:  # as terms; [0] where there is none
    """The gradients of the terms, in parts that are summed in a fixed order."""
    settings = _settings(q)
    if settings.get("num_warps") == 8 and q.element_size() == 2:
        settings["maxnreg"] = 128  # two blocks; without the limit one, at 132 to 142 registers (docs/kernels.md)
    partials = [term if term is None else term.new_empty(0) for term in terms]
    for run in layout.runs:
        term, axis = terms[run.term].contiguous(), run.axis
        tiles = ceil_div(axis.sharing, settings["BLOCK"])
        shares = min(q.shape[0] * tiles, ceil_div(4 * processors(q.device), axis.queries))
        if axis.first == 0:
            partials[run.term] = term.new_empty(shares, *term.shape)
        maps = *map(_heads_as_rows, (q, dq)), *map(_terms_as_rows, (term[None], partials[run.term]))
        spec, (rows, columns) = Spec.of(*maps), _run_columns(dproducts, layout, run)
        b_q, b_dq, b_term, b_partial = (Rows.of(x, spec) for x in maps)
        arguments = b_q, b_dq, rows, b_term, b_partial, axis, tiles, q.shape[0] * tiles
        programs = shares * axis.queries
        launch(_relative_gradients, programs, q.device, *arguments, SPEC=spec, COLUMNS=columns, **settings)
    return [q.new_empty(0, dtype=accumulation_dtype(q)) if x is None else x.sum(0) for x in partials]
