"""Parts that attention layers share: projections, LePE, and the rule for when a kernel reads a part's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import _checks

_READABLE = {nn.Sequential, nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.ReLU}


def as_made(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling the forward of its class: it has no hooks and no forward of its own."""
    own = module.__dict__
    return not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    )


def readable(*parts: nn.Module) -> bool:
    """Whether a kernel may read the parameters of ``parts`` where it would otherwise call them.

    It may while they, and all in them, are PyTorch's own layers, without hooks, with their own forward and with plain
    tensors. Pruned, parametrised, quantised and wrapped layers, and adapters around a layer, act only when they are
    called.
    """
    for part in parts:
        if type(part) not in _READABLE or not as_made(part):
            return False
        for x in part._parameters.values():
            if type(x) is not nn.Parameter and hasattr(type(x), "__tensor_flatten__"):
                return False
        if part._modules and not readable(*part._modules.values()):
            return False
    return True


def readable_convolution(
    conv: nn.Module, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], groups: int = 1
) -> bool:
    """Whether ``conv`` is `readable` and a convolution of these sizes, without dilation, with zeros around the map."""
    return (
        readable(conv)
        and isinstance(conv, (nn.Conv2d, nn.Conv3d))
        and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == (kernel, stride, padding, groups)
        and max(conv.dilation) == 1
        and conv.padding_mode == "zeros"
    )


def bias_from_table(table: Tensor, group: tuple[int, int]) -> Tensor:  # [(2Gh-1)(2Gw-1), heads]
    """Swin's table as the operators take it, ``[heads, 2Gh-1, 2Gw-1]``."""
    sizes = tuple(2 * g - 1 for g in group)
    # The gradient of a transposed row or column has its strides exchanged: see `_SameStrides`.
    return table.view(-1, *sizes) if 1 in table.shape else table.t().unflatten(1, sizes)


class _SameStrides(Function):
    """Identity whose gradient has the strides of its input.

    autograd itself takes any stride along a dimension of size 1. DistributedDataParallel does not: it warns, and copies
    the gradient at every step.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.strides = inputs[0].stride()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.strides:
            return grad
        return grad.new_empty_strided(grad.shape, ctx.strides).copy_(grad)


def same_strides(weight: Tensor) -> Tensor:
    """``weight``, with a gradient of its strides whatever the layout of the map that it is applied to."""
    learns = torch.is_grad_enabled() and weight.requires_grad and not torch.jit.is_tracing()
    return _SameStrides.apply(weight) if learns and 1 in weight.shape else weight


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)``, where `readable` with a gradient of the weight that has its strides whatever the layout of ``x``.

    The layers stay of PyTorch's own class, by which its tools for quantisation and fusion know them.
    """
    if not readable(conv) or not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
        return conv(x)
    return conv._conv_forward(x, same_strides(conv.weight), conv.bias)


class AttentionLayer(nn.Module):
    """A layer ``[B, H, W, C]`` to ``[B, H, W, C]``: its two projections, and the checks of its sizes and its input.

    ``backend``, an attribute, is that of its operators; None, which it is at first, chooses by device.
    """

    backend: str | None = None

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool, scale: float | None, proj_drop: float):
        super().__init__()
        _checks.check_sizes(dim=dim, heads=heads)
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
        out = self._conv_forward(v.flatten(3).permute(0, 3, 1, 2), same_strides(self.weight), self.bias)
        return out.permute(0, 2, 3, 1).unflatten(3, v.shape[3:])
