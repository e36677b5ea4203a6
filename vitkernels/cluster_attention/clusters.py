"""Balanced clustering: the registered operator and its public function. It has no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .reference import balanced_clusters as _reference


def _fake(x, leaf_size, iterations, temperature, *, interpreted):
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dtype=torch.int32)


_dispatch.define(
    "balanced_clusters", "(Tensor x, int leaf_size, int iterations, float temperature) -> Tensor", _fake, None
)


_MOST_TOKENS, _MOST_FEATURES = 32768, 512  # of the CUDA kernel
_LEAST_TEMPERATURE = 2.0**-126  # what float32 divides by without loss


def _refusal(backend: str, x: Tensor) -> str | None:
    """Why ``backend`` cannot run this call, or None."""
    if backend == "cuda" and x.shape[1] > _MOST_TOKENS:
        return f"{x.shape[1]} tokens > {_MOST_TOKENS}"
    if backend == "cuda" and x.shape[3] > _MOST_FEATURES:
        return f"{x.shape[3]} features > {_MOST_FEATURES}"
    return None


def balanced_clusters(
    x: Tensor,  # [B, N, heads, D]
    *,
    leaf_size: int = 49,
    iterations: int = 2,
    temperature: float = 0.01,
    backend: str | None = None,
) -> Tensor:  # [B, heads, N] int32
    """BOAT's balanced hierarchical clustering: an order of the tokens in which those that look alike are neighbours.

    "BOAT: Bilateral Local Attention Vision Transformer" (Yu et al., BMVC 2022), for every image and head
    on its own. All tokens are one node; a node is halved as long as both halves keep ``leaf_size`` tokens: two
    centroids, the directions of the means of the node's first and second half, are moved ``iterations`` times to the
    means of all its tokens under the softmax of their cosine similarities over ``temperature``; then the tokens are
    sorted by (s0 + 1) / (s1 + 1), s their similarities to the first and second centroid, and the sorted node is
    halved. Node j of level l covers the places ``[j * N // 2**l, (j + 1) * N // 2**l)`` of the order, for any N;
    where N is ``leaf_size * 2**K`` this is the published rule.

    Arithmetic is float32 or more precise whatever the dtype, since membership is chaotic in less. Equal ratios are
    ordered by token index, and NaN comes last, so that any input gives one permutation, always the same on one device.
    Backends round differently: tokens whose ratios nearly tie may change places between them.

    Args:
        x: ``[B, N, heads, D]`` features, float32, float64, float16 or bfloat16, any strides; BOAT takes the queries.
            A single head may serve all heads of the attention.
        leaf_size: tokens that a leaf has at least (at most twice as many; N where N is less).
        iterations: of the centroids, at every level.
        temperature: of the softmax, above 0.
        backend: "cuda" (the CUDA library; at most 32,768 tokens and 512 features), "cpu" or "reference"; None chooses
            by device. A backend that is asked for runs or refuses; CUDA tensors run "reference", slowly, where the
            CUDA library is not built.

    Returns:
        ``[B, heads, N]`` int32: the index of the token at each place. No gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
        RuntimeError: the backend cannot run here or cannot run this call.
    """
    _checks.check_tensor("x", x, "[B, N, heads, D]")
    check_clustering(leaf_size, iterations, temperature)
    if x.shape[1] < 1 or x.shape[3] < 1:
        raise ValueError(
            f"x must have at least one token and one feature, got [B, N, heads, D] = {_checks.shape_of(x)}"
        )
    backend = _dispatch.select("balanced_clusters", x.device, backend, lambda b: _refusal(b, x), gpu="cuda")
    x = x.detach()
    if backend == "reference":
        with _checks.no_autocast(x.device):
            return _reference(x, leaf_size, iterations, temperature)
    if x.dtype == torch.float64:
        x = x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    run = _dispatch.operator("balanced_clusters", backend, x.device)
    return run(x, leaf_size, iterations, float(temperature))


def check_leaf_size(leaf_size: object) -> None:
    _checks.check_ints(leaf_size=leaf_size)
    if leaf_size < 1:
        raise ValueError(f"leaf_size must be at least 1 token, got {leaf_size}")


def check_clustering(leaf_size: object, iterations: object, temperature: object) -> None:
    """The arguments of a clustering beside its features."""
    check_leaf_size(leaf_size)
    _checks.check_ints(iterations=iterations)
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {temperature!r}")
    if not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and above 0, got {temperature}; the least in float32 is {_LEAST_TEMPERATURE}"
        )
