"""What attention layers on token maps share: the fused projection, the output projection, LePE; when a part is read."""

from __future__ import annotations

from torch import Tensor, nn

from . import _checks

_READABLE = {nn.Sequential, nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.ReLU}


def readable(*parts: nn.Module) -> bool:
    """Whether a kernel may read the parameters of ``parts`` where it would otherwise call them.

    It may while they, and all in them, are PyTorch's own layers, without hooks and with their own forward. Pruned,
    parametrised, quantised and wrapped layers, and adapters around a layer, act only when they are called.
    """
    return all(
        type(part) in _READABLE and silent(part) and (not part._modules or readable(*part._modules.values()))
        for part in parts
    )


def silent(*parts: nn.Module | None) -> bool:
    """Whether nobody listens to ``parts`` when they are called: they have no hooks and the forward of their class."""
    return not any(part is not None and _watched(part) for part in parts)


def _watched(part: nn.Module) -> bool:
    forwards = part._forward_pre_hooks or part._forward_hooks or "forward" in part.__dict__
    return bool(forwards or part._backward_pre_hooks or part._backward_hooks)


def bias_from_table(table: Tensor, group: tuple[int, int]) -> Tensor:  # [(2Gh-1)(2Gw-1), heads]
    """Swin's table as the operators take it, ``[heads, 2Gh-1, 2Gw-1]``.

    A table of one row or one column is viewed, not transposed: the transpose of its gradient would have strides that
    are not the table's, which DistributedDataParallel copies with a warning.
    """
    sizes = tuple(2 * g - 1 for g in group)
    return table.view(-1, *sizes) if 1 in table.shape else table.t().unflatten(1, sizes)


class AttentionLayer(nn.Module):
    """A layer ``[B, H, W, C]`` to ``[B, H, W, C]``: its two projections, and the checks of its sizes and its input.

    ``backend``, an attribute, is that of its operators; None, which it is at first, chooses by device.
    """

    backend: str | None = None

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool, scale: float | None, proj_drop: float):
        super().__init__()
        _checks.check_ints(dim=dim, heads=heads)
        for name, value in (("dim", dim), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and {heads} heads")
        self.dim, self.heads, self.scale = dim, heads, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _check(self, x: Tensor) -> None:
        _checks.check_tensor("x", x, "[B, H, W, C]")
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"x must be [B, H, W, C] with C = {self.dim}, got {_checks.shape_of(x)}; NCHW maps need a permute"
            )

    def _project(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to packed ``[B, H, W, 3, heads, head_dim]``."""
        return self.qkv(x).unflatten(-1, (3, self.heads, self.dim // self.heads))

    def _merge(self, out: Tensor) -> Tensor:
        """``[B, H, W, heads, head_dim]`` to ``[B, H, W, C]``."""
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class LocalPosition(nn.Conv2d):
    """CSWin's locally-enhanced positional encoding (LePE): a depthwise 3 x 3 convolution of v, zeros around the map."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, v: Tensor) -> Tensor:  # [B, H, W, heads, head_dim], and so is the result
        out = super().forward(v.flatten(3).permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1).unflatten(3, v.shape[3:])
