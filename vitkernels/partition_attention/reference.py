"""Partition attention in plain PyTorch: the specification. Any floating dtype and device, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor

from .._sizes import divided, surely
from .._softmax import softmax
from ..partition import Partition

# added to the logit of a pair of tokens that only the cyclic shift brought together, as every published Swin does
SHIFT_PENALTY = -100.0


def relative_position_index(group: tuple[int, int], device=None) -> Tensor:
    """Place in a flattened ``[2Gh-1, 2Gw-1]`` table of every offset, query minus key: ``[N, N]`` int64."""
    gh, gw = group
    y, x = divided(torch.arange(gh * gw, device=device), gw)
    return (y[:, None] - y + gh - 1) * (2 * gw - 1) + (x[:, None] - x + gw - 1)


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``; what is finite stays finite."""
    narrow = bias.to(dtype)
    return narrow.masked_fill((narrow == float("-inf")) & (bias > float("-inf")), torch.finfo(dtype).min)


def partition_attention(
    q: Tensor,  # [B, H, W, heads, head_dim]
    k: Tensor,  # [B, H, W, heads, head_dim]
    v: Tensor,  # [B, H, W, heads, head_dim]
    partition: Partition,
    bias: Tensor | None = None,  # [heads, 2Gh-1, 2Gw-1]
    scale: float | None = None,
) -> Tensor:  # [B, H, W, heads, head_dim]
    """softmax(scale * q k^T + bias) v inside every group of ``partition``."""
    _, height, width, _, head_dim = q.shape
    partition = partition.on(height, width)
    scale = head_dim**-0.5 if scale is None else scale

    q, k, v = (partition.split(x).transpose(2, 3) for x in (q, k, v))  # [B, groups, heads, N, head_dim]
    logits = (q * scale) @ k.transpose(-1, -2)  # [B, groups, heads, N, N]
    if bias is not None:
        index = relative_position_index(partition.group, bias.device)
        logits = logits + _narrowed(bias, logits.dtype).flatten(1)[:, index]
    if not all(surely(shift == 0) for shift in partition.shift):
        over = partition.wrapped(height, width, q.device)
        apart = (over[:, :, None] != over[:, None, :]).any(-1)  # [groups, N, N]
        logits = logits + SHIFT_PENALTY * apart[:, None].to(logits.dtype)
    outside = partition.index(height, width, q.device) < 0  # [groups, N]
    out = softmax(logits.masked_fill(outside[:, None, None, :], float("-inf"))) @ v
    return partition.merge(out.transpose(2, 3), height, width)
