"""Cluster attention: the registered operators, their autograd, and the public functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _checks, _dispatch
from .._sizes import above
from ..tree import Tree
from .clusters import balanced_clusters, check_leaf_size
from .reference import cluster_attention as _reference

_LAYOUT = "[B, N, heads, head_dim]"
_PACKED_LAYOUT = "[B, N, 3, heads, head_dim]"
_LAUNCHER = "vitkernels.cluster_attention.kernels"
_PERMUTATION = "a permutation"  # in the message about an order that is none
_SINGLE_TILE = 64  # tokens: the Triton kernels stream the keys of larger leaves in tiles


def _forward_fake(q, k, v, order, leaf_size, overlap, scale, check, *, interpreted):
    # one log-sum-exp (of base 2) per query, kept where leaves can be so large that Triton streams their keys in tiles
    kept = (0,)
    if interpreted or q.device.type == "cuda":
        kept = (q.shape[0] * above(2 * leaf_size, _SINGLE_TILE), *q.shape[1:3])
    return q.new_empty(q.shape), q.new_empty(kept, dtype=_checks.accumulation_dtype(q))


def _backward_fake(dout, q, k, v, order, statistic, leaf_size, overlap, scale, *, interpreted):
    batch, tokens, heads, head_dim = q.shape
    return q.new_empty(batch, tokens, 3, heads, head_dim)


_dispatch.define(
    "cluster_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor order, SymInt leaf_size, SymInt overlap, float scale, bool check)"
    " -> (Tensor, Tensor)",
    _forward_fake,
    _LAUNCHER,
)
_dispatch.define(
    "cluster_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor order, Tensor statistic, SymInt leaf_size,"
    " SymInt overlap, float scale) -> Tensor",
    _backward_fake,
    _LAUNCHER,
)


def _unpack(qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v from (q, k, v) or from (packed,)."""
    return qkv[0].unbind(2) if len(qkv) == 1 else qkv


class _ClusterAttention(Function):
    """(out, statistic) from q, k, v or one packed qkv."""

    @staticmethod
    @_dispatch.with_signature
    def forward(*inputs):
        backend, leaf_size, overlap, scale, check, order, *qkv = inputs
        q, k, v = _unpack(qkv)
        run = _dispatch.operator("cluster_attention_forward", backend, q.device)
        return run(q, k, v, order, leaf_size, overlap, scale, check)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.leaf_size, ctx.overlap, ctx.scale, _, order, *qkv = inputs
        ctx.save_for_backward(order, output[1], *qkv)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @_dispatch.first_derivative
    def backward(ctx, dout, _):
        order, statistic, *qkv = ctx.saved_tensors
        q, k, v = _unpack(qkv)
        if dout.stride(-1) != 1:  # an expanded gradient, as of sum()
            dout = dout.contiguous()
        run = _dispatch.operator("cluster_attention_backward", ctx.backend, q.device)
        dqkv = run(dout, q, k, v, order, statistic, ctx.leaf_size, ctx.overlap, ctx.scale)
        return None, None, None, None, None, None, *((dqkv,) if len(qkv) == 1 else dqkv.unbind(2))


def _refusal(backend: str, q: Tensor) -> str | None:
    """Why ``backend`` cannot run this call, or None."""
    if backend == "triton":
        from .kernels import refusal

        return refusal(q.shape[-1], q.dtype)
    return None


def _check_overlap(tokens: int, leaf_size: int, overlap: object) -> None:
    _checks.check_ints(overlap=overlap)
    if overlap < 0:
        raise ValueError(f"overlap must be at least 0, got {overlap}")
    if overlap <= leaf_size:  # and so at most any leaf, without a look at how deep the tree is
        return
    tree = Tree.of(tokens, leaf_size)
    if tree.levels and overlap > tree.smallest:
        raise ValueError(
            f"overlap must be at most the smallest leaf, {tree.smallest} of {tree.tokens} tokens, got {overlap}"
        )


def _check_order(order: object, q: Tensor) -> Tensor:
    """``order`` as int32 [B, heads, N] on q's device, whatever its strides; what it holds is not looked at."""
    batch, tokens, heads, _ = q.shape
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a torch.Tensor [B, heads, N], got {type(order).__name__}")
    if order.layout != torch.strided:
        raise TypeError(f"order must be a dense tensor, got {order.layout}; convert it with to_dense()")
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order must be int32 (or int64), as balanced_clusters returns it, got {order.dtype}")
    if order.dim() != 3 or order.shape[1] not in (1, heads) or (order.shape[0], order.shape[2]) != (batch, tokens):
        raise ValueError(
            f"order must be [B, heads, N] = {[batch, heads, tokens]} (or one order for all heads, "
            f"{[batch, 1, tokens]}), got {_checks.shape_of(order)}"
        )
    _checks.check_device("q", q, "order", order)
    if order.dtype == torch.int64:
        order = order.clamp(-1, tokens).to(torch.int32)  # no value becomes a valid one
    order = order.expand(batch, heads, tokens)
    return order if order.stride(2) == 1 or tokens == 1 else order.contiguous()


def _check_permutations(order: Tensor) -> None:
    places = torch.arange(order.shape[2], dtype=order.dtype, device=order.device)
    if not torch.equal(order.sort(-1).values, places.expand_as(order)):
        raise _no_permutation(order)


def _no_permutation(order: Tensor) -> ValueError:
    tokens = order.shape[2]
    return ValueError(
        f"every order must be {_PERMUTATION} of its {tokens} tokens, with each of 0..{tokens - 1} once, as "
        "balanced_clusters returns it"
    )


def _attend(
    qkv: tuple[Tensor, ...],  # (q, k, v) or (packed,)
    order: Tensor,
    leaf_size: int,
    overlap: int,
    scale: float | None,
    backend: str | None,
    check: bool | None,
) -> Tensor:
    """Check, choose the backend, run."""
    q = _unpack(qkv)[0]
    check_leaf_size(leaf_size)
    _check_overlap(q.shape[1], leaf_size, overlap)
    scale = _checks.check_scale(scale, q.shape[-1])
    order = _check_order(order, q)
    qkv = _checks.follow_autocast(*qkv)
    q = _unpack(qkv)[0]
    backend = _dispatch.select("cluster_attention", q.device, backend, lambda backend: _refusal(backend, q))
    check = q.device.type == "cpu" if check is None else bool(check)
    inside = check and backend == "cpu"  # the C++ kernel checks as it reads, and so does a compiled graph
    if check and not inside and not torch.compiler.is_compiling():
        _check_permutations(order)
    if q.numel() == 0:  # nothing to attend to, and gradients of zero
        return q.new_empty(q.shape) + sum(x.sum() for x in qkv)
    if backend == "reference":
        return _reference(*_unpack(qkv), order, leaf_size, overlap, scale)
    qkv = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in qkv)
    try:
        return _dispatch.run(_ClusterAttention, backend, leaf_size, overlap, scale, inside, order, *qkv)[0]
    except RuntimeError as error:
        if _PERMUTATION in str(error):  # C++ raises no ValueError
            raise _no_permutation(order) from None
        raise


def _check_tokens(x: Tensor, name: str) -> None:
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one token, got {_checks.shape_of(x)}")


def cluster_attention(
    q: Tensor,  # [B, N, heads, head_dim]
    k: Tensor,  # [B, N, heads, head_dim]
    v: Tensor,  # [B, N, heads, head_dim]
    order: Tensor,  # [B, heads, N] or [B, 1, N] int32
    *,
    leaf_size: int = 49,
    overlap: int = 20,
    scale: float | None = None,
    backend: str | None = None,
    check: bool | None = None,
) -> Tensor:  # [B, N, heads, head_dim]
    """Multi-head attention inside the leaves of a balanced tree over an order of the tokens, as one fused operator.

    "BOAT: Bilateral Local Attention Vision Transformer" (Yu et al., BMVC 2022). The leaves are those of
    `balanced_clusters`: runs of the order. A query attends to its own leaf and to the ``overlap`` tokens of the sibling
    leaf that are nearest to the split between them; the single leaf of a small N attends to itself. Gathering,
    softmax and scattering are one kernel: nothing is sorted in memory, and no score matrix is stored.

    Args:
        q, k, v: ``[B, N, heads, head_dim]``, float32, float64, float16 or bfloat16, any strides (views of a fused
            projection need no copy; a last dimension that is not contiguous is copied).
        order: ``[B, heads, N]``, or ``[B, 1, N]`` for all heads, int32 (int64 is converted): the token at each place.
        leaf_size: tokens that a leaf has at least, as in `balanced_clusters`.
        overlap: keys borrowed from the sibling, at most the smallest leaf.
        scale: multiplies ``q k^T``; ``head_dim ** -0.5`` if None.
        backend: "triton", "cpu" or "reference"; None chooses by device. A backend that is asked for runs or refuses.
        check: whether to refuse an order that is not a permutation. None: yes on a CPU, where it takes about one
            per cent of the time; no on a GPU, where it is a sort and waits for the device. Unchecked, such an order
            gives unspecified values, but no access outside the tensors.

    Returns:
        ``[B, N, heads, head_dim]`` in q's dtype (autocast's dtype where autocast is on).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend cannot run here or cannot run this call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(name, x, _LAYOUT)
    _checks.check_alike(q, k, v)
    _check_tokens(q, "q")
    return _attend((q, k, v), order, leaf_size, overlap, scale, backend, check)


@_checks.takes_packed
def feature_space_attention(
    qkv: Tensor,  # [B, N, 3, heads, head_dim]
    *,
    leaf_size: int = 49,
    overlap: int = 20,
    iterations: int = 2,
    temperature: float = 0.01,
    cluster_by: Tensor | None = None,  # [B, N, heads or 1, D]
    order: Tensor | None = None,  # [B, heads or 1, N]
    scale: float | None = None,
    backend: str | None = None,
    check: bool | None = None,
) -> Tensor:  # [B, N, heads, head_dim]
    """BOAT's feature-space local attention, from a fused projection: cluster the queries, attend inside the leaves.

    "BOAT: Bilateral Local Attention Vision Transformer" (Yu et al., BMVC 2022): `balanced_clusters`, then
    `cluster_attention`, whose gradient is written in one buffer. The order has no gradient.

    Args:
        qkv: ``[B, N, 3, heads, head_dim]``: a ``Linear(dim, 3 * dim)`` viewed so.
        leaf_size, overlap, scale: as in `cluster_attention`.
        iterations, temperature: as in `balanced_clusters`.
        cluster_by: features ``[B, N, heads, D]`` to cluster instead of the queries; ``[B, N, 1, D]`` gives all heads
            one order.
        order: an order to use instead of clustering, as `cluster_attention` takes it.
        backend: "triton", "cpu" or "reference", of the attention; the clustering runs on the same one, with "triton" on
            what serves its device ("cuda" where the CUDA library is built).
        check: of a given ``order``, as in `cluster_attention`.

    Returns:
        ``[B, N, heads, head_dim]``.

    Raises:
        As `balanced_clusters` and `cluster_attention`.
    """
    _checks.check_packed(qkv, _PACKED_LAYOUT)
    _check_tokens(qkv, "qkv")
    if order is not None:
        if cluster_by is not None:
            raise ValueError("give order or cluster_by, not both: a given order leaves nothing to cluster")
        return _attend((qkv,), order, leaf_size, overlap, scale, backend, check)
    features = qkv[:, :, 0] if cluster_by is None else _check_features(cluster_by, qkv)
    clustering = _dispatch.default(qkv.device, "cuda") if backend == "triton" else backend
    order = balanced_clusters(
        features, leaf_size=leaf_size, iterations=iterations, temperature=temperature, backend=clustering
    )
    return _attend((qkv,), order, leaf_size, overlap, scale, backend, check=False)


def _check_features(features: object, qkv: Tensor) -> Tensor:
    _checks.check_tensor("cluster_by", features, "[B, N, heads, D]")
    batch, tokens, _, heads, _ = qkv.shape
    if features.shape[:2] != qkv.shape[:2] or features.shape[2] not in (1, heads):
        raise ValueError(
            f"cluster_by must be [B, N, heads, D] = [{batch}, {tokens}, {heads} or 1, D], "
            f"got {_checks.shape_of(features)}"
        )
    _checks.check_device("qkv", qkv, "cluster_by", features)
    return features
