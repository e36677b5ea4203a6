"""What the Triton kernels share: the index map, rows of a token map, the one matrix product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)


class Geometry(NamedTuple):
    """A concrete partition on its map. ``starts``: groups along an axis that have a token inside the map."""

    height: int  # tokens
    width: int
    group_h: int  # tokens
    group_w: int
    interval_h: int  # tokens
    interval_w: int
    shift_h: int  # tokens
    shift_w: int
    starts_y: int  # groups
    starts_x: int
    ragged: tl.constexpr  # whether some group lies partly outside the map

    @classmethod
    def of(cls, height: int, width: int, group_h, group_w, interval_h, interval_w, shift_h, shift_w) -> Geometry:
        starts = (_starts(height, group_h, interval_h), _starts(width, group_w, interval_w))
        ragged = tl.constexpr(height % (group_h * interval_h) + width % (group_w * interval_w) > 0)
        return cls(height, width, group_h, group_w, interval_h, interval_w, shift_h, shift_w, *starts, ragged)


def _starts(length: int, group: int, interval: int) -> int:
    """First tokens of groups along an axis: every residue of every region that begins inside the map."""
    regions, rest = divmod(length, group * interval)
    return regions * interval + min(rest, interval)


class Tokens(NamedTuple):
    """Tokens of a group, one per lane."""

    y: tl.tensor
    x: tl.tensor
    inside: tl.tensor  # of the map
    wrapped: tl.tensor  # which borders the shift carried the token over: 2 lower + 1 right


class Rows(NamedTuple):
    """A ``[B, H, W, heads, head_dim]`` tensor. Strides count UNIT elements, so that rows are known to be aligned."""

    pointer: Tensor
    batch: int
    y: int
    x: int
    head: int

    @classmethod
    def of(cls, x: Tensor, spec: Spec) -> Rows:
        return cls(x, *(stride // spec.UNIT.value if size > 1 else 0 for size, stride in zip(x.shape, x.stride()[:4])))


class Spec(NamedTuple):
    """What a kernel on rows is compiled for, from the tensors whose rows it reads and writes."""

    UNIT: int  # elements by which every row is aligned: 16 bytes' worth, or 1
    WIDE: bool  # whether offsets inside one image need 64 bits
    D: int  # head_dim
    BLOCK_D: int  # head_dim, padded
    PRECISION: str  # of float32 products: "ieee" or "tf32"

    @classmethod
    def of(cls, *tensors: Tensor) -> Spec:
        head_dim, unit = tensors[0].shape[-1], 16 // tensors[0].element_size()
        strides = (stride for x in tensors for size, stride in zip(x.shape[:4], x.stride()) if size > 1)
        aligned = all(n % unit == 0 for n in strides) and all(x.data_ptr() % 16 == 0 for x in tensors)
        wide = any(sum((n - 1) * s for n, s in zip(x.shape[1:3], x.stride()[1:3])) + head_dim >= 2**31 for x in tensors)
        block = max(16, triton.next_power_of_2(head_dim))
        return cls(*map(tl.constexpr, (unit if aligned else 1, wide, head_dim, block, input_precision())))


def input_precision() -> str:
    """Of float32 matrix products, as torch is set: its "highest" is IEEE, everything below may use TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc``; the only caller of ``tl.dot``. The interpreter cannot multiply bfloat16."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):  # [M, N]
    """An accumulator for inputs of DTYPE: float32, or float64 for float64 (under the interpreter)."""
    return tl.zeros((M, N), tl.float64 if DTYPE == tl.float64 else tl.float32)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):  # [M, K], [K, N] -> [M, N]
    """``a @ b`` in the accumulator's dtype."""
    return dot(a, b, zeros(a.shape[0], b.shape[1], a.dtype), PRECISION)


@triton.jit
def group_start(group, geometry):
    """The first token of a group, before the shift: row and column. Groups wholly outside the map have no number."""
    start_y, start_x = group // geometry.starts_x, group % geometry.starts_x
    region_y, region_x = start_y // geometry.interval_h, start_x // geometry.interval_w
    y = start_y + region_y * (geometry.group_h - 1) * geometry.interval_h
    x = start_x + region_x * (geometry.group_w - 1) * geometry.interval_w
    return y, x


@triton.jit
def group_tokens(token, start, geometry):
    """The index map: where tokens (numbers in raster order, [N]) of the group that begins at ``start`` lie.

    ``inside`` and ``wrapped`` compare the number and the column with limits of the group: that needs few registers.
    """
    row, column = token // geometry.group_w, token % geometry.group_w
    y = start[0] + row * geometry.interval_h + geometry.shift_h
    x = start[1] + column * geometry.interval_w + geometry.shift_w
    inside_y = token < _before(geometry.height, start[0], geometry.interval_h, geometry.group_h) * geometry.group_w
    inside_x = column < _before(geometry.width, start[1], geometry.interval_w, geometry.group_w)
    lower = (
        token
        >= _before(geometry.height - geometry.shift_h, start[0], geometry.interval_h, geometry.group_h)
        * geometry.group_w
    )
    right = column >= _before(geometry.width - geometry.shift_w, start[1], geometry.interval_w, geometry.group_w)
    return Tokens(
        tl.where(lower, y - geometry.height, y),
        tl.where(right, x - geometry.width, x),
        inside_y & inside_x if geometry.ragged else token < geometry.group_h * geometry.group_w,
        tl.cast(lower, tl.int32) * 2 + tl.cast(right, tl.int32),
    )


@triton.jit
def _before(border, start, interval, group):
    """Tokens of a group along an axis that lie before a border."""
    return tl.minimum(tl.cdiv(tl.maximum(border - start, 0), interval), group)


@triton.jit
def row_pointers(rows, image, head, tokens, SPEC: tl.constexpr, part=0):  # [N, D]
    """Addresses ``part`` elements after the tokens' rows: a 64-bit base, and offsets of 32 bits unless WIDE."""
    y, x = tokens.y, tokens.x
    if SPEC.WIDE:
        y, x = tl.cast(y, tl.int64), tl.cast(x, tl.int64)
    base = (
        rows.pointer + (tl.cast(image, tl.int64) * rows.batch + tl.cast(head, tl.int64) * rows.head) * SPEC.UNIT + part
    )
    return base + ((y * rows.y + x * rows.x) * SPEC.UNIT)[:, None] + tl.arange(0, SPEC.BLOCK_D)[None, :]


@triton.jit
def row_mask(tokens, SPEC: tl.constexpr):  # [N, D]
    """Elements of rows inside the map."""
    return tokens.inside[:, None] & (tl.arange(0, SPEC.BLOCK_D) < SPEC.D)[None, :]


@triton.jit
def load_rows(rows, image, head, tokens, SPEC: tl.constexpr):  # [N, D]
    """Rows of the tokens; zero outside the map."""
    return tl.load(row_pointers(rows, image, head, tokens, SPEC), mask=row_mask(tokens, SPEC), other=0.0)


@triton.jit
def store_rows(rows, image, head, tokens, value, SPEC: tl.constexpr, part=0):  # value [N, D]
    """Write the rows of the tokens that lie inside the map, ``part`` elements further on."""
    pointers = row_pointers(rows, image, head, tokens, SPEC, part)
    tl.store(pointers, tl.cast(value, pointers.dtype.element_ty), mask=row_mask(tokens, SPEC))
