"""What the Triton kernels share: the index map, rows of a token map, the one matrix product, the softmax."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LARGEST_HEAD = 128  # elements
REMEMBERED = 4096  # kinds of calls for which what only their layout decides is kept
SHIFT_PENALTY = tl.constexpr(-100.0)  # added to the logit of a pair that only the shift brought together


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
    shifted: tl.constexpr

    @classmethod
    @lru_cache(REMEMBERED)
    def of(cls, height: int, width: int, group_h, group_w, interval_h, interval_w, shift_h, shift_w) -> Geometry:
        starts = (_starts(height, group_h, interval_h), _starts(width, group_w, interval_w))
        ragged = tl.constexpr(height % (group_h * interval_h) + width % (group_w * interval_w) > 0)
        shifted = tl.constexpr(shift_h + shift_w > 0)
        return cls(height, width, group_h, group_w, interval_h, interval_w, shift_h, shift_w, *starts, ragged, shifted)


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


class Order(NamedTuple):
    """The order of the tokens of every image and head, ``[B, heads, N]`` int32, and how a tree cuts it."""

    pointer: Tensor
    batch: int  # stride
    head: int  # stride
    tokens: int  # N
    levels: int
    overlap: int  # places that a leaf borrows of its sibling

    @classmethod
    def of(cls, order: Tensor, levels: int, overlap: int) -> Order:
        strides = (stride if size > 1 else 0 for size, stride in zip(order.shape[:2], order.stride()))
        return cls(order, *strides, order.shape[2], levels, overlap if levels else 0)


class Rows(NamedTuple):
    """A ``[B, H, W, heads, head_dim]`` tensor. Strides count UNIT elements, so that rows are known to be aligned."""

    pointer: Tensor
    batch: int
    y: int
    x: int
    head: int

    @classmethod
    def of(cls, x: Tensor, spec: Spec) -> Rows:
        return cls(x, *_in_units(x.shape, x.stride(), spec.UNIT.value))


@lru_cache(REMEMBERED)
def _in_units(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """Strides but the last, of axes along which there is a step."""
    return tuple(stride // unit if size > 1 else 0 for size, stride in zip(shape[:-1], strides))


class Spec(NamedTuple):
    """What a kernel on rows is compiled for, from the tensors whose rows it reads and writes."""

    UNIT: int  # elements by which every row is aligned: 16 bytes' worth, or 1
    WIDE: bool  # whether offsets inside one image need 64 bits
    D: int  # head_dim
    BLOCK_D: int  # head_dim, padded
    PRECISION: str  # of float32 products: "ieee" or "tf32"
    SWAPS: bool  # whether tensor cores take transposed tiles from shared memory

    @classmethod
    def of(cls, *tensors: Tensor) -> Spec:
        layouts = tuple((x.shape, x.stride(), x.data_ptr() % 16) for x in tensors)
        swaps = not INTERPRETED and 90 <= capability(tensors[0].device) < 120
        return cls._of(layouts, tensors[0].element_size(), input_precision(), swaps)

    @classmethod
    @lru_cache(REMEMBERED)
    def _of(cls, layouts: tuple, element_size: int, precision: str, swaps: bool) -> Spec:
        """``layouts``: shape, strides and what the address is off a multiple of 16 bytes."""
        head_dim, unit = layouts[0][0][-1], 16 // element_size
        strides = (stride for shape, steps, _ in layouts for size, stride in zip(shape[:4], steps) if size > 1)
        aligned = all(n % unit == 0 for n in strides) and not any(off for *_, off in layouts)
        wide = any(
            sum((n - 1) * s for n, s in zip(shape[1:3], steps[1:3])) + head_dim >= 2**31 for shape, steps, _ in layouts
        )
        constants = unit if aligned else 1, wide, head_dim, max(16, power_of_2(head_dim)), precision, swaps
        return cls(*map(tl.constexpr, constants))


class Call(NamedTuple):
    """What the launches of a call share."""

    rows: list[Rows]
    tokens: int  # of a group
    tasks: int  # groups of all images
    arguments: dict[str, object]  # of every kernel

    @classmethod
    def of(cls, geometry: Geometry, scale: float, *tensors: Tensor) -> Call:
        """``tensors`` [B, H, W, heads, head_dim], in the order in which the kernels take them."""
        spec, x = Spec.of(*tensors), tensors[0]
        tasks = x.shape[0] * geometry.starts_y * geometry.starts_x
        arguments = dict(geometry=geometry, heads=x.shape[3], scale=scale, SPEC=spec)
        return cls([Rows.of(x, spec) for x in tensors], geometry.group_h * geometry.group_w, tasks, arguments)

    @property
    def example(self) -> Tensor:
        return self.rows[0].pointer

    @property
    def heads(self) -> int:
        return self.example.shape[3]


def power_of_2(n: int) -> int:
    """The lowest power of 2 that is not below ``n``. (Triton's own takes microseconds outside a kernel.)"""
    return 1 << (n - 1).bit_length()


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
def accumulate(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc``, for sums over as many tokens as there are. In IEEE float32 the product is summed by itself: one
    chain of additions over thousands of tokens rounds off more than the contract allows. tl.fma keeps it apart.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return tl.fma(matmul(a, b, PRECISION), 1.0, acc)
    else:
        return dot(a, b, acc, PRECISION)


@triton.jit
def place(task, geometry):
    """The image of a task (tasks number the groups of all images), and the first token of its group, before the shift.

    Groups wholly outside the map have no number.
    """
    groups = geometry.starts_y * geometry.starts_x
    return task // groups, group_start(task % groups, geometry)


@triton.jit
def group_start(group, geometry):
    """Row and column."""
    start_y, start_x = group // geometry.starts_x, group % geometry.starts_x
    region_y, region_x = start_y // geometry.interval_h, start_x // geometry.interval_w
    y = start_y + region_y * (geometry.group_h - 1) * geometry.interval_h
    x = start_x + region_x * (geometry.group_w - 1) * geometry.interval_w
    return y, x


@triton.jit
def group_tokens(token, start, geometry):
    """The index map: where tokens (numbers in raster order, [N]) of the group that begins at ``start`` lie.

    Places are compared with borders as the number and the column of a token: that needs few registers.
    """
    row, column = token // geometry.group_w, token % geometry.group_w
    y = start[0] + row * geometry.interval_h + geometry.shift_h
    x = start[1] + column * geometry.interval_w + geometry.shift_w
    inside, wrapped = token < geometry.group_h * geometry.group_w, tl.zeros_like(token)
    if geometry.ragged:
        rows = _before(geometry.height, start[0], geometry.interval_h, geometry.group_h)
        columns = _before(geometry.width, start[1], geometry.interval_w, geometry.group_w)
        inside = (token < rows * geometry.group_w) & (column < columns)
    if geometry.shifted:
        rows = _before(geometry.height - geometry.shift_h, start[0], geometry.interval_h, geometry.group_h)
        columns = _before(geometry.width - geometry.shift_w, start[1], geometry.interval_w, geometry.group_w)
        lower, right = token >= rows * geometry.group_w, column >= columns
        y, x = tl.where(lower, y - geometry.height, y), tl.where(right, x - geometry.width, x)
        wrapped = tl.cast(lower, tl.int32) * 2 + tl.cast(right, tl.int32)
    return Tokens(y, x, inside, wrapped)


@triton.jit
def _before(border, start, interval, group):
    """Tokens of a group along an axis that lie before a border."""
    return tl.minimum(tl.cdiv(tl.maximum(border - start, 0), interval), group)


@triton.jit
def node_start(node, order):
    """The tree map: the first place of a leaf; N beyond the last, so that a single leaf has an empty sibling."""
    place = tl.cast(node, tl.int64) * order.tokens >> order.levels
    return tl.cast(tl.minimum(place, order.tokens), tl.int32)


@triton.jit
def tokens_at(order, image, head, first, last, BLOCK: tl.constexpr):
    """The tokens at places ``first`` to ``last`` - 1 of an order. A value that is no token is not inside."""
    lane = tl.arange(0, BLOCK)
    base = order.pointer + tl.cast(image, tl.int64) * order.batch + tl.cast(head, tl.int64) * order.head
    token = tl.load(base + first + lane, mask=lane < last - first, other=-1)
    return Tokens(tl.zeros_like(token), token, (token >= 0) & (token < order.tokens), tl.zeros_like(token))


@triton.jit
def _row_starts(rows, image, head, tokens, SPEC: tl.constexpr, part):  # scalar, [N]
    """A 64-bit base ``part`` elements into the tokens' rows, and their offsets, of 32 bits unless WIDE."""
    y, x = tokens.y, tokens.x
    if SPEC.WIDE:
        y, x = tl.cast(y, tl.int64), tl.cast(x, tl.int64)
    before = tl.cast(image, tl.int64) * rows.batch + tl.cast(head, tl.int64) * rows.head
    return rows.pointer + before * SPEC.UNIT + part, (y * rows.y + x * rows.x) * SPEC.UNIT


@triton.jit
def load_rows(rows, image, head, tokens, SPEC: tl.constexpr):  # [N, D]
    """Rows of the tokens; zero outside the map."""
    base, starts = _row_starts(rows, image, head, tokens, SPEC, 0)
    o_d = tl.arange(0, SPEC.BLOCK_D)
    mask = tokens.inside[:, None] & (o_d < SPEC.D)[None, :]
    return tl.load(base + starts[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(rows, image, head, tokens, SPEC: tl.constexpr):  # [D, N]
    """`load_rows`, transposed: by the order of the loads where tensor cores cannot do it."""
    if SPEC.SWAPS:
        return tl.trans(load_rows(rows, image, head, tokens, SPEC))
    else:
        base, starts = _row_starts(rows, image, head, tokens, SPEC, 0)
        o_d = tl.arange(0, SPEC.BLOCK_D)
        mask = tokens.inside[None, :] & (o_d < SPEC.D)[:, None]
        return tl.load(base + starts[None, :] + o_d[:, None], mask=mask, other=0.0)


@triton.jit
def load_both(rows, image, head, tokens, SPEC: tl.constexpr):  # [N, D], [D, N]
    """`load_rows` and `load_columns`; the second load hits the cache."""
    b_rows = load_rows(rows, image, head, tokens, SPEC)
    return b_rows, tl.trans(b_rows) if SPEC.SWAPS else load_columns(rows, image, head, tokens, SPEC)


@triton.jit
def store_rows(rows, image, head, tokens, value, SPEC: tl.constexpr, part=0):  # value [N, D]
    """Write the rows of the tokens that lie inside the map, ``part`` elements further on."""
    base, starts = _row_starts(rows, image, head, tokens, SPEC, part)
    o_d = tl.arange(0, SPEC.BLOCK_D)
    mask = tokens.inside[:, None] & (o_d < SPEC.D)[None, :]
    tl.store(base + starts[:, None] + o_d[None, :], tl.cast(value, rows.pointer.dtype.element_ty), mask=mask)


@triton.jit
def pair_bias(p_table, o_query, o_key, geometry):
    """Bias of pairs, times log2(e), from the table of a head: the offset is query minus key. Zero beyond the group.

    The numbers of queries and of keys broadcast: queries are the rows or the columns of the tile.
    """
    side, tokens = 2 * geometry.group_w - 1, geometry.group_h * geometry.group_w
    query = o_query // geometry.group_w * side + o_query % geometry.group_w
    key = o_key // geometry.group_w * side + o_key % geometry.group_w
    centre = (geometry.group_h - 1) * side + geometry.group_w - 1
    bias = tl.load(p_table + (centre + query - key), mask=(o_query < tokens) & (o_key < tokens), other=0.0)
    return tl.where((bias >= LOWEST) & (bias * LOG2E < LOWEST), LOWEST, bias * LOG2E)  # what is finite stays finite


@triton.jit
def pair_logits(products, bias, rows, columns, scale, geometry):  # [M, N]
    """Logits from q k^T, times log2(e): weights are powers of 2, and what is taken from a logit is exact."""
    logits = products * (scale * LOG2E) + bias
    if geometry.shifted:
        apart = rows.wrapped[:, None] != columns.wrapped[None, :]
        logits += tl.cast(apart, logits.dtype) * (SHIFT_PENALTY * LOG2E)
    return logits


@triton.jit
def hide(logits, keys):  # [M, N]
    """-inf for keys (columns) outside the map."""
    return tl.where(keys.inside[None, :], logits, float("-inf"))


@triton.jit
def base_of(highest):  # [N]
    """What is taken from the logits of a row: the highest; 0 where all are -inf, which weigh nothing then."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def start_sums(b_zeros, N: tl.constexpr, DTYPE: tl.constexpr):  # [M, D] -> [M], or [M, N] in float32
    """What sums over the rows of many tiles [M, N] begin with, for inputs of DTYPE. In float32 every column has its own
    until the end: thousands of additions to one number round off more than the contract allows.
    """
    if DTYPE == tl.float32:
        return zeros(b_zeros.shape[0], N, DTYPE)
    else:
        return tl.sum(b_zeros, 1)


@triton.jit
def add_rows(sums, tile):  # tile [M, N]
    """The sums of rows so far, with those of another tile added."""
    if len(sums.shape) == 2:
        return sums + tile
    else:
        return sums + tl.sum(tile, 1)


@triton.jit
def end_sums(sums):  # [M]
    """The sums of rows."""
    if len(sums.shape) == 2:
        return tl.sum(sums, 1)
    else:
        return sums


@triton.jit
def softmax_step(logits, highest, total):  # [M, N], [M], sums of rows
    """A tile's weights, the factor [M] of all before it, and the highest logit and the sums of weights so far."""
    higher = tl.maximum(highest, tl.max(logits, 1))
    base = base_of(higher)
    shrink, weights = tl.exp2(highest - base), tl.exp2(logits - base[:, None])
    if len(total.shape) == 2:
        total *= shrink[:, None]
    else:
        total *= shrink
    return weights, shrink, higher, add_rows(total, weights)


@triton.jit
def divisor(total):  # [N]
    """What the weights of a row are divided by: their sum; 1 where there are none."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def log_sum(highest, total):  # [N]
    """log2 of a sum of powers of 2; inf where there are none, which weigh nothing in the backward either."""
    return tl.where(total == 0.0, float("inf"), highest + tl.log2(total))


@triton.jit
def rounded(logits, factor):  # [M, N]
    """Logits by ``factor``, such as log2(e). Adding 0 keeps the product out of a multiply-add with what is taken from
    it: a logit minus itself is 0, and all kernels agree on the rest.
    """
    return logits * factor + 0.0


def refusal(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the attention kernels cannot run on heads of this size and dtype, or None."""
    if head_dim > LARGEST_HEAD:
        return f"head_dim {head_dim} > {LARGEST_HEAD}"
    if head_dim % 8:
        return f"head_dim {head_dim} is not a multiple of 8"
    if dtype == torch.float64 and not INTERPRETED:
        return "float64 runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    return None


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter programs run one after another, so that two are plenty."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def capability(device: torch.device) -> int:
    """Of the current device, which is ``device``: 90 for compute capability 9.0."""
    return triton.runtime.driver.active.get_current_target().arch


def unfenced(capability: int) -> bool:
    """Whether tensor cores could read rows that are fetched ahead before they are there: those of sm_90 to sm_119 read
    shared memory past the order of a thread's copies, unless the compiler fences them, as Triton does from 3.7.1 on.
    """
    return 90 <= capability < 120 and _release(triton.__version__) < (3, 7, 1)


def misassembled(capability: int) -> bool:
    """True where the assembler may get descriptors of a warp group's operands wrong.

    ptxas 12.8, which Triton brings up to 3.7.1, does so on sm_90 where operands of two swizzles use one place of shared
    memory. They do so only without prefetch; with it no wrong one was found.
    """
    return capability == 90 and unfenced(capability)


@lru_cache
def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


_compiled: dict[tuple, tuple[object, list[str], object]] = {}  # for `launch`


def launch(kernel, programs: int, device: torch.device, *arguments, **keywords) -> None:
    """Start so many programs, with settings that are safe on the device. All kernels start here.

    Triton finds its compiled kernel by a look at every argument. That takes longer than many kernels run. So the
    compiled kernel is kept, and started directly when everything comes again that it depends on. Triton's hooks before
    a run, and its knobs for debugging, act only when a kernel is compiled.
    """
    with on(device):
        if not INTERPRETED and unfenced(capability(device)):
            keywords["num_stages"] = 1
        key = [id(kernel), device, *keywords]
        _add_key(arguments, key)
        _add_key(keywords.values(), key)
        key = tuple(key)
        if found := _compiled.get(key):
            compiled, names, _ = found
            compiled[programs, 1, 1](*arguments, *map(keywords.__getitem__, names))
        elif (compiled := kernel[(programs,)](*arguments, **keywords)) is not None:  # not interpreted
            if len(_compiled) >= REMEMBERED:
                _compiled.clear()
            # with the kernel, so that no other one gets its id
            _compiled[key] = compiled, kernel.arg_names[len(arguments) :], kernel


def _add_key(values: Iterable, key: list) -> None:
    """Append everything a compiled kernel may depend on: numbers with their types, of tensors dtype and alignment."""
    for x in values:
        kind = type(x)
        if kind is int or x is None:
            key.append(x)
        elif kind is tl.constexpr:
            key.append(x.value)
        elif isinstance(x, tuple):
            key.append(len(x))
            _add_key(x, key)
        elif isinstance(x, Tensor):
            key += x.dtype, x.data_ptr() % 16
        else:  # a float may be a constant of a kernel, and True is equal to 1
            key += kind, x


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make that the tensors'."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
