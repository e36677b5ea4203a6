"""Triton kernels of the dynamic position bias, and their launchers.

R offsets by P hidden values by HEADS heads; P and HEADS are padded to powers of two, with zeros throughout. All
arithmetic is in the dtype of the weights, float32 or float64. ``mlp`` is a tuple of pointers to the 14 parameters, in
the order that ``reference.py`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sizes import ceil_div
from .._triton import dot, launch, power_of_2

EPS = tl.constexpr(1e-5)
LARGEST = 128  # hidden width, and heads
OFFSETS = 16  # of a tile
PROGRAMS = 64  # of the backward, at most: each holds one partial sum of every gradient


@triton.jit
def _vector(p, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # [SIZE]
    """A parameter of one dimension."""
    o = tl.arange(0, BLOCK)
    return tl.load(p + o, mask=o < SIZE, other=0.0)


@triton.jit
def _halves(x):  # [R, K] -> [R, K / 2], [R, K / 2]
    """The left and the right lanes."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _multiply(
    x,  # [R, K], or the lanes of it from FIRST on
    p,  # [K, N], of strides STEP_K and STEP_N
    acc,  # [R, N]
    K: tl.constexpr,
    STEP_K: tl.constexpr,
    N: tl.constexpr,
    STEP_N: tl.constexpr,
    FIRST: tl.constexpr = 0,
):
    """The product added to acc; 16 lanes at a time where K is large, or registers spill."""
    if FIRST >= K:
        return acc
    elif K > 32 and x.shape[1] > 16:
        left, right = _halves(x)
        acc = _multiply(left, p, acc, K, STEP_K, N, STEP_N, FIRST)
        return _multiply(right, p, acc, K, STEP_K, N, STEP_N, FIRST + x.shape[1] // 2)
    else:
        o_k, o_n = FIRST + tl.arange(0, x.shape[1])[:, None], tl.arange(0, acc.shape[1])[None, :]
        b = tl.load(p + o_k * STEP_K + o_n * STEP_N, mask=(o_k < K) & (o_n < N), other=0.0)
        return dot(x, b, acc, "ieee")


@triton.jit
def _linear(x, p_weight, p_bias, P: tl.constexpr, OUT: tl.constexpr, BLOCK_OUT: tl.constexpr):  # [R, P] -> [R, OUT]
    """x W^T + b"""
    bias = tl.broadcast_to(_vector(p_bias, OUT, BLOCK_OUT)[None, :], (x.shape[0], BLOCK_OUT))
    return _multiply(x, p_weight, bias, P, 1, OUT, P)


@triton.jit
def _sum_products(a, b, AXIS: tl.constexpr, keep_dims: tl.constexpr = False):
    """The sum of a * b along an axis, of rounded products.

    Two lanes that add their products would each take its own exactly, and hold different sums. Adding 0, as `rounded`
    does, is not enough: the compiler knows that squares are not -0.
    """
    return tl.sum(tl.fma(a, b, 0.0), AXIS, keep_dims=keep_dims)


@triton.jit
def _mean(z, P: tl.constexpr):  # [R, P] -> [R, 1]
    return tl.sum(z, 1, keep_dims=True) / P


@triton.jit
def _normalise(z, P: tl.constexpr, BLOCK_P: tl.constexpr):  # [R, P] -> [R, P], [R, 1]
    """LayerNorm without its affine part, and the reciprocal of the standard deviation."""
    centred = tl.where(tl.arange(0, BLOCK_P)[None, :] < P, z - _mean(z, P), 0.0)
    rstd = tl.rsqrt(_sum_products(centred, centred, 1, True) / P + EPS)
    return centred * rstd, rstd


@triton.jit
def _activate(normal, p_weight, p_bias, P: tl.constexpr, BLOCK_P: tl.constexpr):  # [R, P] -> [R, P]
    """The affine part of LayerNorm, then ReLU."""
    weight, bias = _vector(p_weight, P, BLOCK_P), _vector(p_bias, P, BLOCK_P)
    return tl.maximum(normal * weight[None, :] + bias[None, :], 0.0)


@triton.jit
def _mlp_first(mlp, offsets_y, offsets_x, P: tl.constexpr, BLOCK_P: tl.constexpr):  # [R], [R] -> [R, P]
    """The projection of the offsets."""
    o, m = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_P) < P
    weight_y = tl.load(mlp[0] + 2 * o, mask=m, other=0.0)
    weight_x = tl.load(mlp[0] + 2 * o + 1, mask=m, other=0.0)
    bias = _vector(mlp[1], P, BLOCK_P)
    return offsets_y[:, None] * weight_y[None, :] + offsets_x[:, None] * weight_x[None, :] + bias[None, :]


@triton.jit
def _mlp_middle(z, mlp, LAYER: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr):
    """[R, P] -> [R, P] by the layer whose parameters begin at LAYER."""
    normal, _ = _normalise(z, P, BLOCK_P)
    hidden = _activate(normal, mlp[LAYER], mlp[LAYER + 1], P, BLOCK_P)
    out = _linear(hidden, mlp[LAYER + 2], mlp[LAYER + 3], P, P, BLOCK_P)
    if RESIDUAL:
        out += z
    return out


@triton.jit
def _mlp_trunk(mlp, offsets_y, offsets_x, P: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr):
    """[R], [R] -> [R, P]: the input of the last Linear, which all heads share; zero in the padding."""
    z = _mlp_first(mlp, offsets_y, offsets_x, P, BLOCK_P)
    z = _mlp_middle(z, mlp, 2, P, BLOCK_P, RESIDUAL)
    z = _mlp_middle(z, mlp, 6, P, BLOCK_P, RESIDUAL)
    normal, _ = _normalise(z, P, BLOCK_P)
    return _activate(normal, mlp[10], mlp[11], P, BLOCK_P)


@triton.jit
def _mlp_head(hidden, mlp, head, P: tl.constexpr, BLOCK_P: tl.constexpr):  # [R, P] -> [R]
    """The last Linear, for one head."""
    weight = _vector(mlp[12] + head * P, P, BLOCK_P)
    return _sum_products(hidden, weight[None, :], 1) + tl.load(mlp[13] + head)


@triton.jit
def _mlp_rows(mlp, head, offsets_y, offsets_x, P: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr):
    """[R], [R] -> [R]: the bias of one head at offsets (query minus key), floats. BLOCK_P as of `block`."""
    return _mlp_head(_mlp_trunk(mlp, offsets_y, offsets_x, P, BLOCK_P, RESIDUAL), mlp, head, P, BLOCK_P)


@triton.jit
def _offsets(row, group_h, group_w):  # [R] -> [R], [R]
    """The offset (y, x) of a row of the table."""
    width = 2 * group_w - 1
    return tl.cast(row // width - group_h + 1, tl.float32), tl.cast(row % width - group_w + 1, tl.float32)


@triton.jit
def _dynamic_position_bias_forward(
    p_table,  # [HEADS, 2Gh-1, 2Gw-1]
    mlp,
    group_h,
    group_w,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    rows = (2 * group_h - 1) * (2 * group_w - 1)
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    o_head = tl.arange(0, BLOCK_HEADS)
    offsets_y, offsets_x = _offsets(o_row, group_h, group_w)
    hidden = _mlp_trunk(mlp, offsets_y, offsets_x, P, BLOCK_P, RESIDUAL)
    bias = _linear(hidden, mlp[12], mlp[13], P, HEADS, BLOCK_HEADS)  # [R, HEADS]
    o_table = tl.cast(o_head, tl.int64)[None, :] * rows + o_row[:, None]
    tl.store(p_table + o_table, bias, mask=(o_row < rows)[:, None] & (o_head < HEADS)[None, :])


@triton.jit
def _add_vector(p, value, SIZE: tl.constexpr, m_old):  # [SIZE]
    """Add to what is stored, or store for the first time."""
    o = tl.arange(0, value.shape[0])
    old = tl.load(p + o, mask=(o < SIZE) & m_old, other=0.0)
    if m_old:
        tl.debug_barrier()  # all warps have read what one of them writes
    tl.store(p + o, old + value, mask=o < SIZE)


@triton.jit
def _add_columns(p, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, m_old):  # [ROWS, K]
    """`_add_vector` for columns FIRST.. of a matrix."""
    o_row, o_column = tl.arange(0, value.shape[0])[:, None], FIRST + tl.arange(0, value.shape[1])[None, :]
    o, m = o_row * COLUMNS + o_column, (o_row < ROWS) & (o_column < COLUMNS)
    old = tl.load(p + o, mask=m & m_old, other=0.0)
    if m_old:
        tl.debug_barrier()
    tl.store(p + o, old + value, mask=m)


@triton.jit
def _add_products(p, dout, x, OUT: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, m_old):  # [R, OUT], [R, K]
    """Add dout^T x, columns FIRST.. of a weight's gradient; wide ones 16 columns at a time, as in `_multiply`."""
    if FIRST < P:
        if x.shape[1] > 16 and P > 32:
            left, right = _halves(x)
            _add_products(p, dout, left, OUT, P, FIRST, m_old)
            _add_products(p, dout, right, OUT, P, FIRST + x.shape[1] // 2, m_old)
        else:
            zeros = tl.zeros((dout.shape[1], x.shape[1]), x.dtype)
            _add_columns(p, dot(tl.trans(dout), x, zeros, "ieee"), OUT, P, FIRST, m_old)


@triton.jit
def _layer_backward(
    dout,  # [R, OUT]
    z,  # [R, P]
    mlp,
    LAYER: tl.constexpr,  # its first parameter
    p_gradient,  # of its four parameters
    m_old,  # whether there are sums to add to
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OUT: tl.constexpr,
):  # [R, P]
    """dz of LayerNorm, ReLU and Linear."""
    normal, rstd = _normalise(z, P, BLOCK_P)
    hidden = _activate(normal, mlp[LAYER], mlp[LAYER + 1], P, BLOCK_P)
    _add_products(p_gradient + 2 * P, dout, hidden, OUT, P, 0, m_old)
    _add_vector(p_gradient + 2 * P + OUT * P, tl.sum(dout, 0), OUT, m_old)

    dhidden = _multiply(dout, mlp[LAYER + 2], tl.zeros_like(z), OUT, P, P, 1)
    daffine = tl.where(hidden > 0, dhidden, 0.0)
    _add_vector(p_gradient, _sum_products(daffine, normal, 0), P, m_old)
    _add_vector(p_gradient + P, tl.sum(daffine, 0), P, m_old)

    # Selected, so that the product is rounded before its mean is taken from it: fused into the difference, it would
    # leave its rounding where all values are alike, and rstd is large there.
    inside = tl.arange(0, BLOCK_P)[None, :] < P
    dnormal = tl.where(inside, daffine * _vector(mlp[LAYER], P, BLOCK_P)[None, :], 0.0)
    dz = dnormal - _mean(dnormal, P) - normal * (_sum_products(dnormal, normal, 1, True) / P)
    return tl.where(inside, dz * rstd, 0.0)


@triton.jit
def _dynamic_position_bias_backward(
    p_dtable,  # [HEADS, 2Gh-1, 2Gw-1]
    p_partial,  # [programs, parameters]: the 14 gradients flattened one after the other
    mlp,
    group_h,
    group_w,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    rows = (2 * group_h - 1) * (2 * group_w - 1)
    o_head = tl.arange(0, BLOCK_HEADS)
    first = 3 * P  # of the partial sums of the first middle layer
    second = first + 3 * P + P * P
    last = second + 3 * P + P * P
    p_partial += tl.program_id(0) * (last + 2 * P + HEADS * P + HEADS)
    for block in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        m_old = block != tl.program_id(0)
        o_row = block * R + tl.arange(0, R)
        m_table = (o_row < rows)[:, None] & (o_head < HEADS)[None, :]
        offsets_y, offsets_x = _offsets(o_row, group_h, group_w)
        dtable = tl.load(p_dtable + tl.cast(o_head, tl.int64)[None, :] * rows + o_row[:, None], mask=m_table, other=0.0)

        z0 = _mlp_first(mlp, offsets_y, offsets_x, P, BLOCK_P)
        z1 = _mlp_middle(z0, mlp, 2, P, BLOCK_P, RESIDUAL)
        z2 = _mlp_middle(z1, mlp, 6, P, BLOCK_P, RESIDUAL)
        dz2 = _layer_backward(dtable, z2, mlp, 10, p_partial + last, m_old, P, BLOCK_P, HEADS)
        dz1 = _layer_backward(dz2, z1, mlp, 6, p_partial + second, m_old, P, BLOCK_P, P)
        if RESIDUAL:
            dz1 += dz2
        dz0 = _layer_backward(dz1, z0, mlp, 2, p_partial + first, m_old, P, BLOCK_P, P)
        if RESIDUAL:
            dz0 += dz1
        dweight_y, dweight_x = _sum_products(dz0, offsets_y[:, None], 0), _sum_products(dz0, offsets_x[:, None], 0)
        _add_columns(p_partial, tl.join(dweight_y, dweight_x), P, 2, 0, m_old)
        _add_vector(p_partial + 2 * P, tl.sum(dz0, 0), P, m_old)
        tl.debug_barrier()  # the next block adds to what other threads have stored


@triton.jit
def _sum_partials(
    p_partial,  # [programs, total]
    outputs,  # tuple of pointers
    sizes,  # tuple: elements of each output, in the order of a partial sum
    programs,
    total,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_program, o = tl.arange(0, BLOCK_PROGRAMS)[:, None], tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_partial = (o_program < programs) & (o < total)[None, :]
    partial = tl.load(p_partial + o_program * total + o[None, :], mask=m_partial, other=0.0)
    value = tl.sum(partial, 0)  # in an order that the shape alone decides
    for i in tl.static_range(len(sizes)):
        tl.store(outputs[i] + o, value, mask=(o >= 0) & (o < sizes[i]))
        o -= sizes[i]


def refusal(mlp: Sequence[Tensor]) -> str | None:
    """Why these kernels cannot run the MLP, or None."""
    hidden, heads = mlp[0].shape[0], mlp[13].shape[0]
    if hidden > LARGEST:
        return f"hidden width {hidden} > {LARGEST}"
    return f"{heads} heads > {LARGEST}" if heads > LARGEST else None


def block(size: int) -> int:
    """Lanes of a tile that hold ``size`` values: a power of two, at least the 16 that a matrix product takes."""
    return max(16, power_of_2(size))


def _constants(mlp: Sequence[Tensor], residual: bool) -> dict[str, int | bool]:
    hidden, heads = mlp[0].shape[0], mlp[13].shape[0]
    blocks = dict(R=OFFSETS, BLOCK_P=block(hidden), BLOCK_HEADS=block(heads))
    return dict(P=hidden, HEADS=heads, RESIDUAL=residual, **blocks)


def dynamic_position_bias_forward(mlp: Sequence[Tensor], residual: bool, group_h: int, group_w: int) -> Tensor:
    """The table ``[heads, 2Gh-1, 2Gw-1]``, in one launch."""
    mlp = tuple(parameter.contiguous() for parameter in mlp)
    table = mlp[0].new_empty(mlp[13].shape[0], 2 * group_h - 1, 2 * group_w - 1)
    programs, arguments = ceil_div(table[0].numel(), OFFSETS), (table, mlp, group_h, group_w)
    launch(_dynamic_position_bias_forward, programs, table.device, *arguments, **_constants(mlp, residual))
    return table


def dynamic_position_bias_backward(
    dtable: Tensor, mlp: Sequence[Tensor], residual: bool, group_h: int, group_w: int
) -> list[Tensor]:
    """The gradients of the 14 parameters, in two launches: partial sums, then their sum in a fixed order."""
    mlp = tuple(parameter.contiguous() for parameter in mlp)
    sizes = tuple(parameter.numel() for parameter in mlp)
    programs = min(ceil_div(dtable[0].numel(), OFFSETS), PROGRAMS)
    partial = mlp[0].new_empty(programs, sum(sizes))
    settings = _constants(mlp, residual) | dict(num_warps=4 if mlp[0].shape[0] <= 32 else 8)
    arguments = dtable.contiguous(), partial, mlp, group_h, group_w
    launch(_dynamic_position_bias_backward, programs, partial.device, *arguments, **settings)
    gradients = tuple(torch.empty_like(parameter) for parameter in mlp)
    lanes, arguments = 32, (partial, gradients, sizes, programs, sum(sizes))
    settings = dict(BLOCK_PROGRAMS=power_of_2(programs), BLOCK=lanes)
    launch(_sum_partials, ceil_div(sum(sizes), lanes), partial.device, *arguments, **settings)
    return list(gradients)
