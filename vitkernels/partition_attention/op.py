"""Partition attention: the registered operators, their autograd, and the public functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd import Function

from .. import _checks, _dispatch
from .._sizes import above
from ..partition import Derived, Partition, Size
from .reference import partition_attention as _reference

_LAYOUT = "[B, H, W, heads, head_dim]"
_PACKED_LAYOUT = "[B, H, W, 3, heads, head_dim]"
_LAUNCHER = "vitkernels.partition_attention.kernels"

_BIAS = "Tensor? bias, Tensor[] mlp, bool residual"
_GEOMETRY = "SymInt[] geometry"  # group, interval and shift, each along height and width
_SINGLE_TILE = 64  # tokens: the Triton kernels stream the keys of larger groups in tiles


def _forward_fake(q, k, v, bias, mlp, residual, geometry, scale, *, interpreted):
    # one log-sum-exp (of base 2) per query, kept only where Triton streams the keys in tiles
    kept = (0,)
    if interpreted or q.device.type == "cuda":
        kept = (q.shape[0] * above(geometry[0] * geometry[1], _SINGLE_TILE), *q.shape[1:4])
    return q.new_empty(q.shape), q.new_empty(kept, dtype=_checks.accumulation_dtype(q))


def _backward_fake(dout, q, k, v, bias, mlp, residual, statistic, geometry, scale, *, interpreted):
    batch, height, width, heads, head_dim = q.shape
    table = (0,) if bias is None and not mlp else (heads, 2 * geometry[0] - 1, 2 * geometry[1] - 1)
    dqkv = q.new_empty(batch, height, width, 3, heads, head_dim)
    return dqkv, q.new_empty(table, dtype=_checks.accumulation_dtype(q))


_dispatch.define(
    "partition_attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_BIAS}, {_GEOMETRY}, float scale) -> (Tensor, Tensor)",
    _forward_fake,
    _LAUNCHER,
)
_dispatch.define(
    "partition_attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, {_BIAS}, Tensor statistic, {_GEOMETRY}, float scale)"
    " -> (Tensor, Tensor)",
    _backward_fake,
    _LAUNCHER,
)


def _unpack(qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v from (q, k, v) or from (packed,)."""
    return qkv[0].unbind(3) if len(qkv) == 1 else qkv


class _PartitionAttention(Function):
    """(out, statistic) from q, k, v or one packed qkv; the bias as a table or as the 14 weights of its MLP."""

    @staticmethod
    @_dispatch.with_signature
    def forward(*inputs):
        backend, geometry, scale, residual, bias, packed, *tensors = inputs
        qkv, mlp = (tensors[:1], tensors[1:]) if packed else (tensors[:3], tensors[3:])
        q, k, v = _unpack(qkv)
        run = _dispatch.operator("partition_attention_forward", backend, q.device)
        return run(q, k, v, bias, mlp, residual, geometry, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.geometry, ctx.scale, ctx.residual, bias, ctx.packed, *tensors = inputs
        ctx.save_for_backward(bias, output[1], *tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @_dispatch.first_derivative
    def backward(ctx, dout, _):
        bias, statistic, *tensors = ctx.saved_tensors
        qkv, mlp = (tensors[:1], tensors[1:]) if ctx.packed else (tensors[:3], tensors[3:])
        q, k, v = _unpack(qkv)
        if dout.stride(-1) != 1:  # an expanded gradient, as of sum()
            dout = dout.contiguous()
        run = _dispatch.operator("partition_attention_backward", ctx.backend, q.device)
        dqkv, dbias = run(dout, q, k, v, bias, mlp, ctx.residual, statistic, ctx.geometry, ctx.scale)
        dmlp = ()
        if mlp:
            run = _dispatch.operator("dynamic_position_bias_backward", ctx.backend, q.device)
            dmlp = run(dbias, mlp, ctx.residual, *ctx.geometry[:2])
        dqkv = (dqkv,) if ctx.packed else dqkv.unbind(3)
        return None, None, None, None, None if bias is None else dbias, None, *dqkv, *dmlp


def _refusal(backend: str, qkv: tuple[Tensor, ...]) -> str | None:
    """Why ``backend`` cannot run this call, or None."""
    if backend == "triton":
        from .kernels import refusal

        return refusal(qkv[0].shape[-1], qkv[0].dtype)
    return None


class _Call(NamedTuple):
    """A call that was checked: its inputs, what runs it, and the partition of their map."""

    qkv: tuple[Tensor, ...]  # (q, k, v) or (packed,)
    partition: Partition  # as it was asked for
    within: Partition  # of the map
    scale: float
    backend: str

    @classmethod
    def of(cls, qkv: tuple[Tensor, ...], partition: Partition, scale: float | None, backend: str | None) -> _Call:
        if not isinstance(partition, Partition):
            raise TypeError(f"partition must be a vitkernels.Partition, got {type(partition).__name__}")
        size = qkv[0].shape[1:3]
        partition = partition.on(*size)
        scale = _checks.check_scale(scale, qkv[0].shape[-1])
        qkv = _checks.follow_autocast(*qkv)
        backend = _dispatch.select(
            "partition_attention", qkv[0].device, backend, lambda backend: _refusal(backend, qkv)
        )
        return cls(qkv, partition, partition.within(*size), scale, backend)

    def table(self, bias: Tensor) -> Tensor:
        """The part of ``bias`` that groups within the map use."""
        if self.within is self.partition:
            return bias
        rows, columns = (slice(g - s, g + s - 1) for g, s in zip(self.partition.group, self.within.group))
        return bias[:, rows, columns]


def _attend(
    qkv: tuple[Tensor, ...],  # (q, k, v) or (packed,)
    partition: Partition,
    bias: Tensor | None,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """Check, choose the backend, run."""
    call = _Call.of(qkv, partition, scale, backend)
    if bias is not None:
        _checks.check_table(bias, call.qkv[0], call.partition.group)
        bias = call.table(bias)
    return _run(call, bias)


def _run(call: _Call, bias: Tensor | None, mlp: tuple[Tensor, ...] = (), residual: bool = False) -> Tensor:
    """``call`` with the bias of groups within the map: a table, or the weights of the MLP that makes it."""
    qkv, _, partition, scale, backend = call
    if qkv[0].numel() == 0:  # nothing to attend to, and gradients of zero
        q = _unpack(qkv)[0]
        return q.new_empty(q.shape) + sum(x.sum() for x in (*qkv, *mlp, bias) if x is not None).to(q.dtype)
    if backend == "reference":
        return _reference(*_unpack(qkv), partition, bias, scale)
    packed, qkv = len(qkv) == 1, tuple(x if x.stride(-1) == 1 else x.contiguous() for x in qkv)
    if bias is not None:
        bias = bias.to(_checks.accumulation_dtype(qkv[0])).contiguous()
    geometry = (*partition.group, *partition.interval, *partition.shift)
    return _dispatch.run(_PartitionAttention, backend, geometry, scale, residual, bias, packed, *qkv, *mlp)[0]


def partition_attention(
    q: Tensor,  # [B, H, W, heads, head_dim]
    k: Tensor,  # [B, H, W, heads, head_dim]
    v: Tensor,  # [B, H, W, heads, head_dim]
    partition: Partition,
    bias: Tensor | None = None,  # [heads, 2Gh-1, 2Gw-1]
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, H, W, heads, head_dim]
    """Multi-head attention inside every group of a partition of the token map, as one fused operator.

    ``softmax(scale * q k^T + bias) v`` over the tokens of each group; nothing is copied into windows and back, and no
    score matrix is stored. Places of a group outside the map weigh exactly 0, whatever the bias. A bias of -inf gives
    weight 0; a query whose every key has a logit of -inf has output 0 and gradients of 0, as in PyTorch's
    ``scaled_dot_product_attention``. NaN stays NaN.

    Args:
        q, k, v: ``[B, H, W, heads, head_dim]``, float32, float64, float16 or bfloat16, any strides (views of a fused
            projection need no copy; a last dimension that is not contiguous is copied).
        partition: which tokens form a group.
        bias: relative position table ``[heads, 2Gh-1, 2Gw-1]`` for groups of Gh x Gw tokens, indexed by query minus
            key, counted in tokens of the group. Used in float32 (float64 with float64 inputs).
        scale: multiplies ``q k^T``; ``head_dim ** -0.5`` if None.
        backend: "triton", "cpu" or "reference"; None chooses by device. A backend that is asked for runs or refuses.

    Returns:
        ``[B, H, W, heads, head_dim]`` in q's dtype (autocast's dtype where autocast is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        RuntimeError: the backend cannot run here or cannot run this call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(name, x, _LAYOUT)
    _checks.check_alike(q, k, v)
    return _attend((q, k, v), partition, bias, scale, backend)


@_checks.takes_packed
def partition_attention_qkvpacked(
    qkv: Tensor,  # [B, H, W, 3, heads, head_dim]
    partition: Partition,
    bias: Tensor | None = None,  # [heads, 2Gh-1, 2Gw-1]
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, H, W, heads, head_dim]
    """`partition_attention` on the output of a fused projection, whose gradient is written in one buffer.

    Args:
        qkv: ``[B, H, W, 3, heads, head_dim]``: a ``Linear(dim, 3 * dim)`` viewed so.

    The other arguments, the result and the errors are those of `partition_attention`.
    """
    _checks.check_packed(qkv, _PACKED_LAYOUT)
    return _attend((qkv,), partition, bias, scale, backend)


def _check_module(module: nn.Module, qkv: Tensor) -> None:
    """``module`` is a DynamicPositionBias for qkv's heads."""
    if not hasattr(module, "weights"):
        raise TypeError(f"position_bias must be a DynamicPositionBias, a table or None, got {type(module).__name__}")
    if module.heads != qkv.shape[4]:
        raise ValueError(f"position_bias is for {module.heads} heads, qkv has {qkv.shape[4]}: {_checks.shape_of(qkv)}")


def _readable(module: nn.Module) -> bool:
    """Whether a kernel may read the weights of ``module``; a wrapper that hands attributes on must be called."""
    return hasattr(type(module), "readable") and module.readable()


# The hidden width up to which evaluating the MLP inside the attention kernel costs less than a launch of its own: its
# work grows with the square of the width and is repeated by every program. Arithmetic (docs/performance.md), not yet
# measured on a GPU.
_INLINE_WIDTH = 12


def _inline(module: nn.Module, form: str, backend: str, partition: Partition) -> bool:
    """Whether each program of the attention kernel evaluates the MLP, or a kernel of its own does."""
    if form not in ("auto", "table", "inline"):
        raise ValueError(f"form must be 'auto', 'table' or 'inline', got {form!r}")
    possible = backend == "triton" and partition.tokens <= _SINGLE_TILE
    if form == "inline" and not possible:
        raise RuntimeError(
            "form='inline' evaluates the position MLP inside the Triton kernel, for groups of at most 64 tokens; "
            f"got backend {backend!r} and {partition.tokens} tokens. Use form='table'"
        )
    if form == "auto":
        return possible and module.hidden <= _INLINE_WIDTH and _readable(module) and not module.constant()
    if form == "inline" and not _readable(module):
        raise RuntimeError(
            "form='inline' reads the parameters of the position MLP, but parts of this one are hooked, pruned, "
            "parametrised, quantised or wrapped, and must be called. Use form='table'"
        )
    return form == "inline"


@_checks.takes_packed
def lsda_attention(
    qkv: Tensor,  # [B, H, W, 3, heads, head_dim]
    position_bias: Tensor | nn.Module | None = None,
    *,
    group_size: Derived = 7,
    interval: Derived = 1,
    scale: float | None = None,
    backend: str | None = None,
    form: str = "auto",
) -> Tensor:  # [B, H, W, heads, head_dim]
    """CrossFormer's short-distance (``interval=1``) and long-distance (above 1) attention, from a fused projection.

    "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (Wang et al., ICLR 2022), section
    3.2; the dynamic position bias, section 3.3, is evaluated inside the operator, forward and backward.

    Args:
        qkv: ``[B, H, W, 3, heads, head_dim]``.
        position_bias: a `DynamicPositionBias`, or a table ``[heads, 2Gh-1, 2Gw-1]``, or None.
        group_size: tokens of a group along (height, width), an int or a pair; None derives it from the map and the
            interval.
        interval: distance between neighbouring tokens of a group; None spreads the group over the whole map.
        scale: multiplies ``q k^T``; ``head_dim ** -0.5`` if None.
        backend: "triton", "cpu" or "reference"; None chooses by device.
        form: where a `DynamicPositionBias` is evaluated: "table", once by a kernel of its own; "inline", by each
            program of the attention kernel for its own head, so that the operator is a single launch (Triton, groups
            of at most 64 tokens); "auto" chooses by width.

    Returns:
        ``[B, H, W, heads, head_dim]``.

    Raises:
        As `partition_attention`.
    """
    _checks.check_packed(qkv, _PACKED_LAYOUT)
    partition = Partition(group_size, interval)
    if not isinstance(position_bias, nn.Module):
        return _attend((qkv,), partition, position_bias, scale, backend)
    _check_module(position_bias, qkv)
    call = _Call.of((qkv,), partition, scale, backend)
    if not _inline(position_bias, form, call.backend, call.within):
        table = position_bias(call.within.group, backend=backend)
        _checks.check_device("qkv", qkv, "position_bias", table)
        _checks.check_table(table, qkv, call.within.group)
        return _run(call, table)
    mlp = tuple(weight.to(_checks.accumulation_dtype(qkv)).contiguous() for weight in position_bias.weights())
    _checks.check_device("qkv", qkv, "position_bias", mlp[0])
    return _run(call, None, mlp, position_bias.residual)


@_checks.takes_packed
def window_attention(
    qkv: Tensor,  # [B, H, W, 3, heads, head_dim]
    bias: Tensor | None = None,  # [heads, 2Gh-1, 2Gw-1]
    *,
    window_size: Size = 7,
    shift: Size = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, H, W, heads, head_dim]
    """Swin's (shifted) windows (Liu et al., ICCV 2021, section 3.2): `Partition.window`. See `partition_attention`."""
    return partition_attention_qkvpacked(qkv, Partition.window(window_size, shift), bias, scale=scale, backend=backend)


@_checks.takes_packed
def block_attention(
    qkv: Tensor,  # [B, H, W, 3, heads, head_dim]
    bias: Tensor | None = None,  # [heads, 2Gh-1, 2Gw-1]
    *,
    block_size: Size = 7,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, H, W, heads, head_dim]
    """MaxViT's block attention (Tu et al., ECCV 2022, section 3.2): `Partition.window`. See `partition_attention`."""
    return partition_attention_qkvpacked(qkv, Partition.window(block_size), bias, scale=scale, backend=backend)


@_checks.takes_packed
def grid_attention(
    qkv: Tensor,  # [B, H, W, 3, heads, head_dim]
    bias: Tensor | None = None,  # [heads, 2Gh-1, 2Gw-1]
    *,
    grid_size: Size = 7,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, H, W, heads, head_dim]
    """MaxViT's grid attention (Tu et al., ECCV 2022, section 3.2): `Partition.grid`. See `partition_attention`."""
    return partition_attention_qkvpacked(qkv, Partition.grid(grid_size), bias, scale=scale, backend=backend)
