"""Balanced clustering and attention inside its leaves in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

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
        centroids = _centroids(features, torch.stack((inside & ~second, second), -1).to(dtype))
        for _ in range(iterations):
            weights = (_similarities(units, centroids) / temperature).softmax(-1)
            centroids = _centroids(features, weights * inside[..., None])
        near = _similarities(units, centroids) + 1
        ratios = near[..., 0] / near[..., 1]
        nodes = _sorted(nodes.where(inside, tokens), ratios.where(inside, torch.nan))
        order = nodes.flatten(2)[..., tree.slots(level, x.device)]
    return order.to(torch.int32)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, heads, N, D]`` at ``index [B, heads, ...]``: ``[B, heads, ..., D]``."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(*index.shape, x.shape[-1])


def _similarities(units: Tensor, centroids: Tensor) -> Tensor:
    """``[..., n, D], [..., 2, D] -> [..., n, 2]``; no matrix product, which could be of less than full precision."""
    return torch.stack([(units * centroids[..., c : c + 1, :]).sum(-1) for c in range(2)], -1)


def _centroids(features: Tensor, weights: Tensor) -> Tensor:
    """Directions of the weighted means: ``[..., n, D], [..., n, 2] -> [..., 2, D]``."""
    means = torch.stack([(features * weights[..., c, None]).mean(-2) for c in range(2)], -2)
    return F.normalize(means, dim=-1)


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
    logits = logits.masked_fill((keys < 0)[:, None, :], torch.finfo(logits.dtype).min)
    out = (logits.softmax(-1) @ v[:, :, keys]).flatten(2, 3)  # [B, heads, leaves * n, head_dim]
    out = out[:, :, tree.slots(tree.levels, q.device)]  # [B, heads, N, head_dim]
    return rearrange(_rows(out, order.argsort(-1)), "b h n d -> b n h d")
