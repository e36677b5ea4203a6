"""The dynamic position bias in plain PyTorch: the specification. Any floating dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_position_bias(
    mlp: Sequence[Tensor],  # 14: Linear [p, 2]; twice LayerNorm [p], Linear [p, p]; LayerNorm [p], Linear [heads, p]
    group: tuple[int, int],
    residual: bool = False,
) -> Tensor:  # [heads, 2Gh-1, 2Gw-1]
    """The bias of every offset (query minus key, in tokens of the group) by a small MLP on the raw offset."""
    project, first, second, last = mlp[:2], mlp[2:6], mlp[6:10], mlp[10:]
    axes = [torch.arange(2 * size - 1, dtype=mlp[0].dtype, device=mlp[0].device) + (1 - size) for size in group]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # [2Gh-1, 2Gw-1, 2]
    z = F.linear(offsets, *project)
    z = _block(z, *first) + (z if residual else 0)
    z = _block(z, *second) + (z if residual else 0)
    return _block(z, *last).permute(2, 0, 1).contiguous()


def _block(z: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm, ReLU, Linear."""
    return F.linear(F.relu(F.layer_norm(z, [int(n) for n in norm_weight.shape], norm_weight, norm_bias)), weight, bias)
