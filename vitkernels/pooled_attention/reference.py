"""Pooling of tokens and attention with decomposed relative positions in plain PyTorch: the specification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from .._sizes import larger, surely
from .._softmax import softmax


def pool_tokens(
    x: Tensor,  # [B, N, heads, head_dim]
    weight: Tensor | None,  # [head_dim, taps] of a convolution; None averages
    norm_weight: Tensor | None,  # [head_dim]
    norm_bias: Tensor | None,  # [head_dim]
    thw: Sequence[int],  # tokens along time, height, width
    kernel: Sequence[int],  # tokens
    stride: Sequence[int],  # tokens
    padding: Sequence[int],  # tokens, on both sides
    maximum: bool,
    has_cls: bool,
    eps: float,
) -> Tensor:  # [B, N', heads, head_dim]
    """Every head's map through a depthwise convolution, an average or a maximum, then LayerNorm over head_dim."""
    heads, head_dim = x.shape[2:]
    cls, x = x[:, : int(has_cls)], x[:, int(has_cls) :]
    x = x.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, thw)  # [B heads, head_dim, T, H, W]
    if maximum:
        x = F.max_pool3d(x, kernel, stride, padding)
    elif weight is None:  # not avg_pool3d, which refuses maps smaller than the window, and 16 bits on a CPU
        ones = x.new_ones(head_dim, 1, *kernel)
        x = F.conv3d(x, ones, stride=stride, padding=padding, groups=head_dim) / math.prod(kernel)
    else:
        taps = weight.to(x.dtype).view(head_dim, 1, *kernel)
        x = F.conv3d(x, taps, stride=stride, padding=padding, groups=head_dim)
    out = torch.cat((cls, x.flatten(2).unflatten(0, (-1, heads)).permute(0, 3, 1, 2)), 1)
    if norm_weight is None:
        return out
    return F.layer_norm(out, (head_dim,), norm_weight.to(out.dtype), norm_bias.to(out.dtype), eps)


def relative_index(queries: int, keys: int, index: str = "exact", device: torch.device | None = None) -> Tensor:
    """The row of the table for each query and key along one axis, ``[queries, keys]``.

    "exact" is i * M // queries + (keys - 1 - j) * M // keys with M the longer of the two; the others round it in
    float32 as those libraries do.
    """
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    longest = larger(queries, keys)
    if index == "exact":
        return i * longest // queries + (keys - 1 - j) * longest // keys
    i, j, a, b = i.float(), j.float(), longest / queries, longest / keys
    offset = i * a - j * b + (keys - 1) * b if index == "slowfast" else i * a - (j + (1.0 - keys)) * b
    return offset.long()


_kept_index = lru_cache(maxsize=256)(torch.inference_mode(False)(relative_index))


def index_of(queries: int, keys: int, index: str, device: torch.device) -> Tensor:
    """`relative_index`, kept from call to call where what is made now can be used later."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    made = relative_index if captured or torch.compiler.is_compiling() or torch.jit.is_tracing() else _kept_index
    return made(queries, keys, index, device)


def resized(table: Tensor, queries: int, keys: int) -> Tensor:  # [length, D] -> [2 * max(queries, keys) - 1, D]
    """A row for every distance along an axis; a table of another length is interpolated."""
    length, rows = table.shape[0], 2 * larger(queries, keys) - 1
    if surely(length == rows):
        return table
    place = torch.arange(rows, dtype=table.dtype, device=table.device)
    place = ((place + 0.5) * (length / rows) - 0.5).clamp(0, length - 1)[:, None]
    lower = place.detach().long()[:, 0]
    upper = (lower + 1).clamp_max(length - 1)
    share = place - lower[:, None]
    return F.embedding(lower, table) * (1 - share) + F.embedding(upper, table) * share


def pooled_attention(
    q: Tensor,  # [B, Nq, heads, head_dim]
    k: Tensor,  # [B, Nk, heads, head_dim]
    v: Tensor,  # [B, Nk, heads, head_dim]
    tables: Sequence[Tensor | None],  # along time, height, width: [length, head_dim], or None
    indices: Sequence[Tensor | None],  # the row for each pair along an axis, [queries, keys]
    q_thw: Sequence[int],  # tokens along time, height, width
    k_thw: Sequence[int],  # tokens
    has_cls: bool = False,
    residual: str = "none",
    scale: float | None = None,
) -> Tensor:  # [B, Nq, heads, head_dim]
    """softmax(scale * q k^T + q . table[index]) v, and q on top."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cls = int(has_cls)
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    logits = (q * scale) @ k.transpose(-1, -2)  # [B, heads, Nq, Nk]
    if any(table is not None for table in tables):
        logits = logits + F.pad(_relative(q[:, :, cls:], tables, indices, q_thw, k_thw), (cls, 0, cls, 0))
    out = softmax(logits) @ v
    if residual == "all":
        out = out + q
    elif residual == "all_but_cls":
        out = out + F.pad(q[:, :, cls:], (0, 0, cls, 0))
    return rearrange(out, "b h n d -> b n h d")


def _relative(
    q: Tensor,
    tables: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    q_thw: Sequence[int],
    k_thw: Sequence[int],
) -> Tensor:
    """What relative positions add to the logits ``[B, heads, Nq, Nk]`` of the tokens of two maps."""
    q = q.unflatten(2, q_thw)  # [B, heads, T, H, W, head_dim]
    total = 0
    shapes = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    for axis, table, index, shape in zip("thw", tables, indices, shapes):
        if table is not None:
            terms = F.embedding(index, table).to(q.dtype)  # [queries, keys, head_dim]
            products = einsum(q, terms, f"b n t h w d, {axis} j d -> b n t h w j")
            total = total + products.reshape(*products.shape[:5], *shape)
    return total.expand(-1, -1, -1, -1, -1, *k_thw).flatten(5).flatten(2, 4)
