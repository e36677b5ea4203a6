"""Balanced clustering and attention inside its leaves in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .._softmax import softmax
from ..tree import Tree


def balanced_clusters(
    x: Tensor,  # [B, N, heads, D]
    leaf_size: int = 49,
    iterations: int = 2,
    temperature: float = 0.01,
    dtype: torch.dtype = torch.float32,  # of the arithmetic
) -> Tensor:  # [B, heads, N] int32
    """The order in which the leaves of a balanced binary tree follow each other, level by level."""
    batch, tokens, heads, _ = x.shape
    tree = Tree.of(tokens, leaf_size)
    x = rearrange(x.detach().to(dtype), "b n h d -> b h n d")
    order = torch.arange(tokens, device=x.device).expand(batch, heads, tokens)
    for level in range(tree.levels):
        places = tree.nodes(level, x.device)  # [nodes, n]
        inside = places >= 0
        nodes = order[..., places]  # [B, heads, nodes, n]
        features = _rows(x, nodes) * inside[..., None]  # [B, heads, nodes, n, D]
        units = F.normalize(features, dim=-1)
        second = places >= tree.bounds(level + 1, x.device)[1::2, None]
        axis, base = _centroids(features, inside & ~second, second)
        for _ in range(iterations):
            logits = _similarity(units, axis) / temperature
            axis, base = _centroids(features, logits.sigmoid() * inside, (-logits).sigmoid() * inside)
        # (s0 + 1) / (s1 + 1) - 1, whose small values do not drown in the rounding of 1
        ratios = _similarity(units, axis) / (_similarity(units, base) + 1)
        nodes = _sorted(nodes.where(inside, tokens), ratios.where(inside, torch.nan))
        order = nodes.flatten(2)[..., tree.slots(level, x.device)]
    return order.to(torch.int32)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, heads, N, D]`` at ``index [B, heads, ...]``: ``[B, heads, ..., D]``."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(*index.shape, x.shape[-1])


def _similarity(units: Tensor, direction: Tensor) -> Tensor:
    """``[..., n, D], [..., D] -> [..., n]``; no matrix product, which could be of less than full precision."""
    return (units * direction[..., None, :]).sum(-1)


def _centroids(features: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of two weighted means, as the first minus the second ``[..., D]``, and the second.

    Where an image is flat they nearly coincide, and what tells its tokens apart is their difference: float64.
    """
    means = [(features.double() * w[..., None]).mean(-2) for w in weights]
    first, second = (F.normalize(mean, dim=-1) for mean in means)
    return (first - second).to(features.dtype), second.to(features.dtype)


def _sorted(nodes: Tensor, ratios: Tensor) -> Tensor:
    """The tokens of each node by ascending ratio, NaN last, ties by the token's index."""
    nodes, by_index = nodes.sort(-1)
    by_ratio = ratios.gather(-1, by_index).sort(dim=-1, stable=True).indices
    return nodes.gather(-1, by_ratio)


def cluster_attention(
    q: Tensor,  # [B, N, heads, head_dim]
    k: Tensor,  # [B, N, heads, head_dim]
    v: Tensor,  # [B, N, heads, head_dim]
    order: Tensor,  # [B, heads, N] integer
    leaf_size: int = 49,
    overlap: int = 20,
    scale: float | None = None,
) -> Tensor:  # [B, N, heads, head_dim]
    """softmax(scale * q k^T) v inside every leaf and the places it borrows of its sibling."""
    tokens, head_dim = q.shape[1], q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    order, tree = order.long(), Tree.of(tokens, leaf_size)
    queries, keys = tree.nodes(tree.levels, q.device), tree.keys(overlap, q.device)  # [leaves, n], [leaves, m]

    q, k, v = (_rows(rearrange(x, "b n h d -> b h n d"), order) for x in (q, k, v))  # [B, heads, N, head_dim], sorted
    logits = (q[:, :, queries] * scale) @ k[:, :, keys].transpose(-1, -2)  # [B, heads, leaves, n, m]
    weights = softmax(logits.masked_fill((keys < 0)[:, None, :], float("-inf")))
    out = (weights @ v[:, :, keys]).flatten(2, 3)  # [B, heads, leaves * n, head_dim]
    out = out[:, :, tree.slots(tree.levels, q.device)]  # [B, heads, N, head_dim]
    return rearrange(_rows(out, order.argsort(-1)), "b h n d -> b n h d")
