"""Pooling of tokens: the registered operators, their autograd, and the public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _checks, _dispatch
from .._sizes import is_size
from .reference import pool_tokens as _reference

_LAYOUT = "[B, N, heads, head_dim]"
_PACKED_LAYOUT = "[B, N, 3, heads, head_dim]"
_LAUNCHER = "vitkernels.pooled_attention.pool_kernels"
MODES = ("conv", "max", "avg")

_PARAMETERS = "Tensor x, Tensor? weight, Tensor? norm_weight, Tensor? norm_bias"
_GEOMETRY = "SymInt[] thw, int[] kernel, int[] stride, int[] padding, bool maximum, bool has_cls, float eps"


def pooled_size(thw: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Tokens along each axis after pooling."""
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(thw, kernel, stride, padding)]


def _forward_fake(
    x, weight, norm_weight, norm_bias, thw, kernel, stride, padding, maximum, has_cls, eps, *, interpreted
):
    tokens = math.prod(pooled_size(thw, kernel, stride, padding)) + int(has_cls)
    return x.new_empty(x.shape[0], tokens, *x.shape[2:])


def _backward_fake(dout, x, weight, norm_weight, norm_bias, *_, interpreted):
    wide, head_dim = _checks.accumulation_dtype(x), x.shape[-1]
    dweight = x.new_empty((0,) if weight is None else weight.shape, dtype=wide)
    return dweight, x.new_empty((0,) if norm_weight is None else (2, head_dim), dtype=wide)


_dispatch.define("pool_tokens_forward", f"({_PARAMETERS}, {_GEOMETRY}) -> Tensor", _forward_fake, _LAUNCHER)
_dispatch.define(
    "pool_tokens_backward",
    f"(Tensor dout, {_PARAMETERS}, {_GEOMETRY}, Tensor(a!) dx) -> (Tensor, Tensor)",
    _backward_fake,
    _LAUNCHER,
)


def _pooled(backend: str, geometries: Sequence[tuple | None], x: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    """The parts of ``x`` [B, N, parts, heads, head_dim]; those that have no geometry as they are."""
    run = _dispatch.operator("pool_tokens_forward", backend, x.device)
    return [
        part if geometry is None else run(part, *parameters[3 * i : 3 * i + 3], *geometry)
        for i, (part, geometry) in enumerate(zip(x.unbind(2), geometries))
    ]


class _PoolTokens(Function):
    """Parts of one packed projection, each by its own pool: the gradient is written in one buffer.

    x [B, N, parts, heads, head_dim]; for each part a geometry, or None where it is handed on as it is, and taps
    [head_dim, taps] and the two weights of the norm, any of which may be None.
    """

    @staticmethod
    @_dispatch.with_signature
    def forward(*inputs):
        geometries = inputs[1]
        return tuple(out if geometry else out.clone() for out, geometry in zip(_pooled(*inputs), geometries))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.geometries, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @_dispatch.first_derivative
    def backward(ctx, *douts):
        x, *parameters = ctx.saved_tensors
        run = _dispatch.operator("pool_tokens_backward", ctx.backend, x.device)
        # Inductor drops the offset of a view that an operator writes to where it is symbolic
        apart = torch.compiler.is_compiling()
        dx = None if apart else x.new_empty(x.shape)
        dparts = [x.new_empty(part.shape) for part in x.unbind(2)] if apart else dx.unbind(2)
        gradients = []
        for i, (dout, part, dpart, geometry) in enumerate(zip(douts, x.unbind(2), dparts, ctx.geometries)):
            if geometry is None:
                dpart.copy_(dout)
                gradients += [None] * 3
                continue
            weight, *norm = parameters[3 * i : 3 * i + 3]
            if dout.stride(-1) != 1:  # an expanded gradient, as of sum()
                dout = dout.contiguous()
            dweight, dnorm = run(dout, part, weight, *norm, *geometry, dpart)
            gradients.append(None if weight is None else dweight)
            gradients += [None, None] if norm[0] is None else dnorm.unbind(0)
        return None, None, torch.stack(dparts, 2) if apart else dx, *gradients


def _refusal(backend: str, x: Tensor) -> str | None:
    """Why ``backend`` cannot run this call, or None."""
    if backend == "triton":
        from .pool_kernels import refusal

        return refusal(x.shape[-1], x.dtype)
    return None


def check_axes(name: str, value: object, axes: int, least: int, one_for_all: bool = True) -> tuple[int, ...]:
    """``value`` as an int for each of the ``axes`` of the map, all at least ``least``."""
    if one_for_all and isinstance(value, int):
        value = (value,) * axes
    if not isinstance(value, Sequence) or not all(map(is_size, value)):
        raise TypeError(f"{name} must be {'an int or ' if one_for_all else ''}a tuple of ints, got {value!r}")
    if len(value) != axes:
        raise ValueError(f"{name} must have one entry for each of the {axes} axes of the map, got {tuple(value)}")
    if any(n < least for n in value):
        raise ValueError(f"{name} must be at least {least} along every axis, got {tuple(value)}")
    return tuple(value)


def check_thw(
    name: str, thw: object, tokens: int | None = None, has_cls: bool = False, of: str = "x"
) -> tuple[int, ...]:
    """``thw`` as (T, H, W) or (H, W), and its product as the ``tokens`` that tensor ``of`` has."""
    if not isinstance(thw, Sequence) or len(thw) not in (2, 3):
        raise ValueError(f"{name} must be (H, W) or (T, H, W), in tokens, got {thw!r}")
    thw = check_axes(name, thw, len(thw), 1, one_for_all=False)
    if tokens is not None and has_cls and tokens < 1:
        raise ValueError(f"has_cls=True takes the first token of {of} as the class token, but {of} has no token")
    expected = math.prod(thw) + int(has_cls)  # a bool is no number to the symbols of torch 2.11
    if tokens is not None and tokens != expected:
        raise ValueError(
            f"{name} {thw} stands for {' * '.join(map(str, thw))}{' + 1 class token' if has_cls else ''} = {expected} "
            f"tokens, {of} has {tokens}"
        )
    return thw


def _check_head_dim(x: Tensor) -> None:
    if x.shape[-1] == 0:
        raise ValueError("head_dim must be at least 1, got 0")


def _check_parameter(name: str, x: Tensor, value: object, shape: Sequence[int]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {list(shape)}, got {type(value).__name__}")
    if value.dtype not in _checks.DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)} for head_dim {x.shape[-1]}, got {_checks.shape_of(value)}")
    _checks.check_device("x", x, name, value)


def _check_kernel(mode: str, x: Tensor, weight: object, kernel: object, axes: int) -> tuple[int, ...]:
    """The kernel's size: the weight's where there is one."""
    if mode != "conv":
        if weight is not None:
            raise ValueError(f"mode {mode!r} takes no weight; give the size of its window as kernel=")
        if kernel is None:
            raise ValueError(f"mode {mode!r} needs the size of its window: kernel=, an int or one for each axis")
        return check_axes("kernel", kernel, axes, 1)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a torch.Tensor [head_dim, 1, *kernel] in mode 'conv', got {type(weight).__name__}"
        )
    if weight.dim() != axes + 2:
        raise ValueError(
            f"weight must be [head_dim, 1, *kernel] with {axes} axes of the map, {axes + 2} dimensions, "
            f"got {_checks.shape_of(weight)}"
        )
    size = check_axes("the kernel of weight", tuple(weight.shape[2:]), axes, 1)
    _check_parameter("weight", x, weight, (x.shape[-1], 1, *size))
    if kernel is not None and check_axes("kernel", kernel, axes, 1) != size:
        raise ValueError(f"kernel {kernel} is not the size of weight, {size}; leave kernel out in mode 'conv'")
    return size


def _check_padding(padding: object, thw: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    axes = len(thw)
    padding = tuple(k // 2 for k in kernel) if padding is None else check_axes("padding", padding, axes, 0)
    if any(p > k // 2 for p, k in zip(padding, kernel)):
        raise ValueError(f"padding must be at most half the kernel {kernel} along every axis, got {padding}")
    padded = tuple(n + 2 * p for n, p in zip(thw, padding))
    if any(k > n for k, n in zip(kernel, padded)):
        raise ValueError(f"the kernel {kernel} is larger than the padded map {padded} (thw {thw}, padding {padding})")
    return padding


class Pool(NamedTuple):
    """How `pool_qkv` pools the queries, the keys or the values: arguments of `pool_tokens` by name."""

    weight: Tensor | None = None  # [head_dim, 1, *kernel]
    norm_weight: Tensor | None = None  # [head_dim]
    norm_bias: Tensor | None = None  # [head_dim]
    stride: int | Sequence[int] = 1
    kernel: int | Sequence[int] | None = None
    padding: int | Sequence[int] | None = None
    mode: str = "conv"


class _Plan(NamedTuple):
    """A pool that was checked."""

    geometry: tuple[object, ...]  # of the operators, whose maps are volumes
    parameters: tuple[Tensor | None, ...]  # taps, two of the norm
    size: tuple[int, ...]  # the new thw


def _plan(x: Tensor, pool: Pool, thw: tuple[int, ...], has_cls: bool, eps: float) -> _Plan:
    """Check a pool of tokens like ``x [B, N, heads, head_dim]``."""
    axes, head_dim = len(thw), x.shape[-1]
    if pool.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {pool.mode!r}")
    kernel = _check_kernel(pool.mode, x, pool.weight, pool.kernel, axes)
    stride = check_axes("stride", pool.stride, axes, 1)
    padding = _check_padding(pool.padding, thw, kernel)
    norm = (pool.norm_weight, pool.norm_bias)
    if (norm[0] is None) != (norm[1] is None):
        raise ValueError("give norm_weight and norm_bias, or neither")
    for name, value in zip(("norm_weight", "norm_bias"), norm):
        if value is not None:
            _check_parameter(name, x, value, (head_dim,))
    wide = _checks.accumulation_dtype(x)
    taps = None if pool.weight is None else pool.weight.flatten(1).to(wide).contiguous()
    norm = (None if w is None else w.to(wide).contiguous() for w in norm)
    volume = ([fill] * (3 - axes) + list(n) for n, fill in ((thw, 1), (kernel, 1), (stride, 1), (padding, 0)))
    geometry = (*volume, pool.mode == "max", bool(has_cls), float(eps))
    return _Plan(geometry, (taps, *norm), tuple(pooled_size(thw, kernel, stride, padding)))


def _run(x: Tensor, plans: Sequence[_Plan | None], backend: str | None) -> Sequence[Tensor]:
    """Choose the backend and run. ``x``: [B, N, parts, heads, head_dim], a plan for each part."""
    backend = _dispatch.select("pool_tokens", x.device, backend, lambda backend: _refusal(backend, x))
    parameters = [w for plan in plans for w in (plan.parameters if plan else (None,) * 3)]
    if x.numel() == 0:  # nothing to pool, and gradients of zero
        zero = sum(w.sum() for w in (x, *parameters) if w is not None).to(x.dtype)
        tokens = (math.prod(plan.size) + plan.geometry[5] if plan else x.shape[1] for plan in plans)
        return [x.new_empty(x.shape[0], n, *x.shape[3:]) + zero for n in tokens]
    if backend == "reference":
        parts = zip(x.unbind(2), plans)
        outs = (_reference(part, *plan.parameters, *plan.geometry) if plan else part for part, plan in parts)
        return [out.to(x.dtype) for out in outs]  # autocast has layer_norm return float32
    x = x if x.stride(-1) == 1 else x.contiguous()
    geometries = tuple(plan and plan.geometry for plan in plans)
    run = _PoolTokens.apply if _dispatch.recorded(x, *parameters) else _pooled
    return run(backend, geometries, x, *parameters)


def pool_tokens(
    x: Tensor,  # [B, N, heads, head_dim]
    weight: Tensor | None = None,  # [head_dim, 1, *kernel]
    norm_weight: Tensor | None = None,  # [head_dim]
    norm_bias: Tensor | None = None,  # [head_dim]
    *,
    thw: Sequence[int],
    stride: int | Sequence[int] = 1,
    kernel: int | Sequence[int] | None = None,
    padding: int | Sequence[int] | None = None,
    mode: str = "conv",
    has_cls: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, tuple[int, ...]]:  # [B, N', heads, head_dim]
    """MViT's pooling of queries, keys or values: a pass over every head's map and LayerNorm, as one fused operator.

    "Multiscale Vision Transformers" (Fan et al., ICCV 2021), section 3.1; the convolution, whose weights all heads
    share, is that of the official code. The tokens are read where they lie, a third of a fused projection without a
    copy, and the norm is taken before anything is written. Maps and strides need not divide.

    Args:
        x: ``[B, N, heads, head_dim]``, float32, float64, float16 or bfloat16, any strides (a last dimension that is
            not contiguous is copied).
        weight: of the depthwise convolution, ``[head_dim, 1, kh, kw]`` or ``[head_dim, 1, kt, kh, kw]``; mode "conv".
        norm_weight, norm_bias: of a LayerNorm over head_dim after the pooling; None for both is no norm. They and
            ``weight`` are used in float32 (float64 with float64 inputs).
        thw: the map, (H, W) or (T, H, W) in tokens; N is their product, and one more with a class token.
        stride: tokens from one window to the next, an int or one for each axis.
        kernel: tokens of a window, an int or one for each axis; modes "max" and "avg".
        padding: tokens around the map, an int or one for each axis, at most half the kernel, which None stands for.
            Zeros that count for "conv" and "avg", nothing for "max".
        mode: "conv", "max" or "avg".
        has_cls: whether the first token is a class token: it is not pooled, but takes the norm.
        eps: of the norm.
        backend: "triton", "cpu" or "reference"; None chooses by device. A backend that is asked for runs or refuses.

    Returns:
        The pooled tokens ``[B, N', heads, head_dim]`` in x's dtype (autocast's dtype where autocast is on), and the new
        thw, as many entries as the old one.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend cannot run here or cannot run this call.
    """
    _checks.check_tensor("x", x, _LAYOUT)
    _check_head_dim(x)
    thw = check_thw("thw", thw, x.shape[1], has_cls)
    (x,) = _checks.follow_autocast(x)
    plan = _plan(x, Pool(weight, norm_weight, norm_bias, stride, kernel, padding, mode), thw, has_cls, eps)
    return _run(x.unsqueeze(2), [plan], backend)[0], plan.size


def pool_qkv(
    qkv: Tensor,  # [B, N, 3, heads, head_dim]
    pool_q: Pool | None,
    pool_k: Pool | None,
    pool_v: Pool | None,
    *,
    thw: Sequence[int],
    has_cls: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[tuple[Tensor, tuple[int, ...]], ...]:  # [B, N', heads, head_dim] each
    """`pool_tokens` of queries, keys and values from a fused projection, whose gradient is written in one buffer.

    Args:
        qkv: ``[B, N, 3, heads, head_dim]``: a ``Linear(dim, 3 * dim)`` viewed so.
        pool_q, pool_k, pool_v: a `Pool` each; None hands the tokens on as they are, without a norm.

    The other arguments and the errors are those of `pool_tokens`.

    Returns:
        (pooled tokens, new thw) of the queries, of the keys and of the values.
    """
    _checks.check_packed(qkv, _PACKED_LAYOUT)
    _check_head_dim(qkv)
    thw = check_thw("thw", thw, qkv.shape[1], has_cls, "qkv")
    (qkv,) = _checks.follow_autocast(qkv)
    for name, pool in (("pool_q", pool_q), ("pool_k", pool_k), ("pool_v", pool_v)):
        if pool is not None and not isinstance(pool, Pool):
            raise TypeError(f"{name} must be a vitkernels.Pool, or None to hand tokens on, got {type(pool).__name__}")
    plans = [pool and _plan(qkv[:, :, i], pool, thw, has_cls, eps) for i, pool in enumerate((pool_q, pool_k, pool_v))]
    return tuple((out, plan.size if plan else thw) for out, plan in zip(_run(qkv, plans, backend), plans))
