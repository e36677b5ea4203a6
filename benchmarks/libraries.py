"""Attention of other libraries behind one signature: ``(q, k, v, bias)`` to ``[B, heads, M, head_dim]``.

q ``[B, heads, M, head_dim]``, k and v ``[B, heads, N, head_dim]``, bias None or what broadcasts to ``[B, heads, M,
N]``. A library that is not installed, or takes no bias, raises when it is called; nothing is imported before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def _sdpa(kernel: SDPBackend | None = None) -> Run:
    """PyTorch's own: whichever of its kernels takes the inputs, or a certain one."""

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return run


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if bias is not None:  # lines of a multiple of eight elements
        keys = bias.shape[-1]
        bias = F.pad(bias, (0, -keys % 8)).expand(*q.shape[:3], -1)[..., :keys]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func

    if bias is not None:
        raise NotImplementedError("flash-attn takes no bias")
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


LIBRARIES: dict[str, Run] = {
    "sdpa": _sdpa(),
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "xformers": _xformers,
    "flash-attn": _flash_attn,
}


def neighborhood(q: Tensor, k: Tensor, v: Tensor, **geometry: tuple[int, int]) -> Tensor:
    """NATTEN's attention of maps ``[B, H, W, heads, head_dim]``, by kernel_size, stride and dilation."""
    from natten.functional import na2d

    return na2d(q, k, v, **geometry)
