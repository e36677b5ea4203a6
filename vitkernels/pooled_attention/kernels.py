"""The launchers of pooled attention's Triton kernels (`streamed.py`, `positions.py`).

Whatever is summed over programs is summed in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._sizes import ceil_div
from .._triton import (
    INTERPRETED,
    Rows,
    Spec,
    accumulation_dtype,
    capability,
    launch,
    misassembled,
    on,
    processors,
    refusal,
)
from . import positions, streamed
from .positions import Layout

__all__ = ["pooled_attention_backward", "pooled_attention_forward", "refusal"]


def _settings(x: Tensor, layout: Layout | None, crowded: bool = False) -> dict[str, int]:
    """Tiles, warps and pipeline stages, chosen by what the compiler makes of the kernels for each chip.

    docs/kernels.md has it. Three stages fetch the rows of the next step while this one is computed; two only ask for
    them without registers: where three cost a block, spill, or do not fit the shared memory. Float32 products that
    tensor cores cannot take fill the registers at half the tile, and where operands stand in registers a ``crowded``
    kernel has room for half a step. Where the assembler gets descriptors wrong, tiles are too low for products of a
    warp group, which alone have descriptors; heads of 64 and 32 columns of positions came out right.
    """
    if INTERPRETED:
        return {"BLOCK": 64, "STEP": 32}
    if x.dtype == torch.float32:
        return {"BLOCK": 32, "STEP": 16, "num_warps": 8, "num_stages": 1}
    warps, arch = 8 if x.shape[-1] > 64 else 4, capability(x.device)
    if layout is not None and (layout.width > 32 or x.shape[-1] > 64) and misassembled(arch):
        return {"BLOCK": 32, "STEP": 32, "num_warps": 8, "num_stages": 1}
    if crowded:
        return {"BLOCK": 64, "STEP": 16, "num_warps": warps, "num_stages": 1}
    stages = 3 if arch == 90 else 2
    return {"BLOCK": 64, "STEP": 32, "num_warps": warps, "num_stages": stages}


def _terms(tables: Sequence[Tensor | None], indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """For every axis the rows that its pairs meet, [queries, keys, head_dim]."""
    return [None if table is None else F.embedding(index, table) for table, index in zip(tables, indices)]


def _of_table(dterms: Tensor, index: Tensor, table: Tensor) -> Tensor:  # [queries, keys, D] -> [length, D]
    """The gradient of a table from that of its terms; in a fixed order, unlike index_add."""
    return torch.ops.aten.embedding_dense_backward(dterms, index, len(table), -1, False)


class Call(NamedTuple):
    """What the launches of a call share."""

    rows: list[Rows]
    sizes: streamed.Sizes
    layout: Layout | None
    arguments: dict[str, object]  # of every kernel

    @classmethod
    def of(cls, q, k, terms, layout: Layout | None, has_cls: bool, scale: float, *tensors: Tensor) -> Call:
        """``tensors`` [.., N, heads, head_dim], in the order in which the kernels take them."""
        batch, queries, heads, _ = q.shape
        sizes, maps = streamed.Sizes(batch, heads, queries, k.shape[1], int(has_cls)), [x.unsqueeze(1) for x in tensors]
        spec, relative = Spec.of(*maps), None
        columns = spec
        if layout is not None:
            products = positions.forward(q, terms, layout).unsqueeze(1)
            columns = Spec.of(products)
            relative = streamed.Relative(Rows.of(products, columns), layout.columns)
        parts = layout.parts if layout else 0
        arguments = dict(relative=relative, sizes=sizes, scale=scale, PARTS=parts, SPEC=spec, COLUMNS=columns)
        return cls([Rows.of(x, spec) for x in maps], sizes, layout, arguments)

    @property
    def crowded(self) -> bool:
        """Whether operands and the gradient of many columns share the registers."""
        spec, columns = self.arguments["SPEC"], self.arguments["COLUMNS"]
        return self.layout is not None and columns.BLOCK_D.value > 32 and not spec.SWAPS.value

    def launch(self, kernel, planes: int, tokens: int, *rows, crowded: bool = False, **arguments) -> None:
        """A program for every head and every tile of ``tokens`` of a plane."""
        x = self.rows[0].pointer
        settings = _settings(x, self.layout, crowded)
        programs = planes * ceil_div(tokens, settings["BLOCK"]) * self.sizes.heads
        launch(kernel, programs, x.device, *rows, **arguments, **self.arguments, **settings)


def pooled_attention_forward(
    q: Tensor,  # [B, Nq, heads, head_dim]
    k: Tensor,  # [B, Nk, heads, head_dim]
    v: Tensor,  # [B, Nk, heads, head_dim]
    table_t: Tensor | None,  # [length, head_dim] of the axis
    table_h: Tensor | None,
    table_w: Tensor | None,
    index_t: Tensor | None,  # [queries, keys] along the axis: rows of its table
    index_h: Tensor | None,
    index_w: Tensor | None,
    q_thw: Sequence[int],  # tokens
    k_thw: Sequence[int],
    has_cls: bool,
    residual: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, Nq, heads, head_dim], [B, Nq, heads]
    """The attention, and the statistic of every query."""
    out, statistic = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
    if out.numel() == 0:
        return out, statistic
    with on(q.device):
        terms = _terms((table_t, table_h, table_w), (index_t, index_h, index_w))
        layout = Layout.of(terms, q_thw, k_thw, has_cls, q.shape[2])
        call = Call.of(q, k, terms, layout, has_cls, scale, q, k, v, out)
        arguments = dict(p_lse=statistic, RESIDUAL=residual)
        call.launch(streamed.attention_forward, *q.shape[:2], *call.rows, **arguments)
    return out, statistic


def _share(q: Tensor, k: Tensor, layout: Layout | None) -> int:
    """Queries that a program of the key kernel takes: all, or fewer where tiles of keys would leave processors idle."""
    settings = _settings(k, layout)
    tiles = k.shape[0] * k.shape[2] * ceil_div(k.shape[1], settings["BLOCK"])
    steps = ceil_div(q.shape[1], settings["STEP"])
    return settings["STEP"] * ceil_div(steps, max(1, 2 * processors(q.device) // tiles))


def pooled_attention_backward(
    dout: Tensor,  # [B, Nq, heads, head_dim]
    q: Tensor,  # [B, Nq, heads, head_dim]
    k: Tensor,  # [B, Nk, heads, head_dim]
    v: Tensor,  # [B, Nk, heads, head_dim]
    table_t: Tensor | None,  # [length, head_dim] of the axis
    table_h: Tensor | None,
    table_w: Tensor | None,
    index_t: Tensor | None,  # [queries, keys] along the axis: rows of its table
    index_h: Tensor | None,
    index_w: Tensor | None,
    statistic: Tensor,  # [B, Nq, heads]
    q_thw: Sequence[int],  # tokens
    k_thw: Sequence[int],
    has_cls: bool,
    residual: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the tables; [0] for a table that is None."""
    tables, indices, wide = (table_t, table_h, table_w), (index_t, index_h, index_w), accumulation_dtype(q)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if dq.numel() == 0:
        return dq, dk, dv, *(q.new_zeros((0,) if x is None else x.shape, dtype=wide) for x in tables)
    batch, queries, heads, _ = q.shape
    with on(q.device):
        terms = _terms(tables, indices)
        layout = Layout.of(terms, q_thw, k_thw, has_cls, heads)
        share = _share(q, k, layout)
        parts = ceil_div(queries, share)
        sums = (dk, dv) if parts == 1 else q.new_empty(2, parts * batch, *k.shape[1:], dtype=wide).unbind()
        call = Call.of(q, k, terms, layout, has_cls, scale, dout, q, k, v, dq, *sums)
        *inputs, rows_dq, rows_dk, rows_dv = call.rows
        delta, total = (torch.empty_like(statistic) for _ in range(2))
        statistics = streamed.Statistics(statistic, delta, total if q.dtype == wide else None)
        dproducts = relative = call.arguments["relative"]
        if relative is not None:
            dproducts = relative.products._replace(pointer=torch.empty_like(relative.products.pointer))
        arguments = dict(statistics=statistics, dproducts=dproducts, RESIDUAL=residual, crowded=call.crowded)
        planes = batch * max(1, call.arguments["PARTS"])
        call.launch(streamed.attention_backward_query, planes, queries, *inputs, rows_dq, **arguments)
        arguments = dict(statistics=statistics, share=share)
        planes = batch * parts
        call.launch(streamed.attention_backward_key, planes, k.shape[1], *inputs, rows_dk, rows_dv, **arguments)
        if parts > 1:
            dk, dv = (x.unflatten(0, (parts, batch)).sum(0).to(q.dtype) for x in sums)
        if relative is None:
            return dq, dk, dv, *(q.new_empty(0, dtype=wide) for _ in tables)
        dterms = positions.backward(q, dq, dproducts.pointer.squeeze(1), terms, call.layout)
        return dq, dk, dv, *(x if i is None else _of_table(x, i, t) for x, i, t in zip(dterms, indices, tables))
