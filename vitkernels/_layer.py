"""What attention layers on token maps share: the fused projection, the output projection, LePE; when a part is read."""

from __future__ import annotations

from torch import Tensor, nn

from . import _checks

_READABLE = {nn.Sequential, nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.ReLU}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def readable(*parts: nn.Module) -> bool:
    """Whether a kernel may read the parameters of ``parts`` where it would otherwise call them.

    It may while they, and all in them, are PyTorch's own layers, without hooks and with their own forward. Pruned,
    parametrised, quantised and wrapped layers, and adapters around a layer, act only when they are called.
    """
    modules = (module for part in parts for module in part.modules())
    return all(
        type(module) in _READABLE and "forward" not in vars(module) and not any(getattr(module, x) for x in _HOOKS)
        for module in modules
    )


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
        # not unflatten, after which ONNX's older exporter takes the map's sizes for constants
        return self.qkv(x).view(*x.shape[:-1], 3, self.heads, self.dim // self.heads)

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
