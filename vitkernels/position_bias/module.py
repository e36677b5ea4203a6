"""The dynamic position bias as a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_ints, no_autocast, shape_of
from .._dispatch import asked
from .._layer import as_made, readable
from ..partition import Size, as_pair
from .op import evaluate

_EPS = 1e-5  # of the norms, as the operators have it
_HALVES = (torch.float16, torch.bfloat16)


class _Table(NamedTuple):
    """A table that was kept, what it was made from, and in which state both were."""

    table: Tensor
    parameters: tuple[Tensor, ...]  # aliases: while they live, their memory is not given to other weights
    stamp: tuple


def _stamp(tensors: tuple[Tensor, ...]) -> tuple | None:
    """Mark that changes with every change of ``tensors`` that autograd or the allocator sees; None if there is none."""
    try:
        return tuple((x.data_ptr(), x._version, x.dtype, x.device) for x in tensors)
    except RuntimeError:
        return None


def parameters_of(mlp: nn.Module) -> tuple[Tensor, ...]:
    """The 14 parameters of a position MLP, in the order that the operators take."""
    blocks = ((norm, linear) for norm, _, linear in (mlp.pos1, mlp.pos2, mlp.pos3))
    layers = (mlp.pos_proj, *(layer for block in blocks for layer in block))
    return tuple(x for layer in layers for x in (layer.weight, layer.bias))


def readable_mlp(mlp: nn.Module) -> bool:
    """Whether a kernel may read the parameters of a position MLP, whose parts are `readable` and as published."""
    proj, *blocks = (mlp._modules[name] for name in ("pos_proj", "pos1", "pos2", "pos3"))
    if not readable(proj, *blocks) or type(proj) is not nn.Linear or proj._parameters.get("bias") is None:
        return False
    hidden = proj._parameters["weight"].shape[0]
    for block in blocks:
        layers = tuple(block._modules.values())
        if tuple(map(type, layers)) != (nn.LayerNorm, nn.ReLU, nn.Linear) or layers[0].eps != _EPS:
            return False
        norm, linear = layers[0]._parameters, layers[2]._parameters
        if norm.get("bias") is None or linear.get("bias") is None:
            return False
        out = hidden if block is not blocks[2] else linear["weight"].shape[0]  # pos3 gives the heads
        if norm["weight"].shape != (hidden,) or linear["weight"].shape != (out, hidden):
            return False
    return True


class DynamicPositionBias(nn.Module):
    """CrossFormer's dynamic position bias: a small MLP from the offset between two tokens to a bias for every head.

    "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (Wang et al., ICLR 2022), section
    3.3. Parameters are named as in the official code: ``pos_proj``, ``pos1``, ``pos2``, ``pos3``. One set of weights
    serves groups of every size. The MLP runs in float32 (float64 for float64 parameters), under autocast and with
    half-precision parameters too.

    The kernels read the parameters of ``pos_proj`` ... ``pos3``. Where one of these parts is pruned, parametrised,
    quantised, wrapped, hooked or replaced, the parts are called instead, by PyTorch, in the dtype of their parameters
    and whatever the backend; nothing is kept then.

    In eval mode, where no gradient is wanted, the table is computed once and kept until a parameter changes. A change
    that autograd does not see, in place through ``parameter.data``, needs `clear_cache`, `eval` or `train` after it.

    Args:
        dim: channels C of the attention layer; the hidden width is ``dim // 16``, as in the official weights.
        heads: attention heads.
        residual: residual connections around ``pos1`` and ``pos2``.

    Shape:
        group size, an int or (height, width) in tokens, to the table ``[heads, 2Gh-1, 2Gw-1]``.
    """

    _KEPT = 16  # tables at most; groups derived from maps of many sizes would otherwise add up

    def __init__(self, dim: int, heads: int, residual: bool = False):
        super().__init__()
        check_ints(dim=dim, heads=heads)
        if dim < 16 or heads < 1:
            raise ValueError(f"dim must be at least 16 and heads at least 1, got dim {dim} and {heads} heads")
        self.hidden, self.heads, self.residual = dim // 16, heads, residual
        self.pos_proj = nn.Linear(2, self.hidden)
        self.pos1 = self._block(self.hidden)
        self.pos2 = self._block(self.hidden)
        self.pos3 = self._block(heads)
        self._tables: dict[tuple, _Table] = {}

    def _block(self, out: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(self.hidden), nn.ReLU(), nn.Linear(self.hidden, out))

    def weights(self) -> tuple[Tensor, ...]:
        """The 14 parameters in the order that the operators take, float16 and bfloat16 converted to float32."""
        return tuple(x.float() if x.dtype in _HALVES else x for x in parameters_of(self))

    def readable(self) -> bool:
        """Whether a kernel may read `weights` where it would otherwise call this module."""
        return type(self) is DynamicPositionBias and as_made(self) and readable_mlp(self)

    def _call_parts(self, group_size: tuple[int, int]) -> Tensor:
        like = next((x for x in (*self.parameters(), *self.buffers()) if x.is_floating_point()), torch.empty(0))
        axes = [torch.arange(1 - size, size, dtype=like.dtype, device=like.device) for size in group_size]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # [2Gh-1, 2Gw-1, 2]
        with no_autocast(like.device):
            z = self.pos_proj(offsets)
            z = self.pos1(z) + (z if self.residual else 0)
            z = self.pos2(z) + (z if self.residual else 0)
            table = self.pos3(z).movedim(-1, 0).contiguous()
        return table.float() if table.dtype in _HALVES else table

    def constant(self) -> bool:
        """Whether the table of parts that are read may be kept: eval mode, no gradient wanted, no graph capture."""
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if self.pos_proj.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # the table would be in the graph's memory, or the graph would outlive the table
        return not (torch.is_grad_enabled() and any(x.requires_grad for x in parameters_of(self)))

    def forward(self, group_size: Size, *, backend: str | None = None) -> Tensor:  # [heads, 2Gh-1, 2Gw-1]
        """The table for groups of ``group_size`` tokens.

        Args, result and errors as of `dynamic_position_bias`.
        """
        backend = asked(backend)
        if isinstance(group_size, Tensor):
            raise TypeError(
                "DynamicPositionBias takes the size of a group in tokens, an int or (height, width), and gives its "
                f"bias; got a Tensor {shape_of(group_size)}. LongShortDistanceAttention takes maps"
            )
        if not readable_mlp(self):
            return self._call_parts(as_pair(group_size, "group_size", 1))
        stored = parameters_of(self) if self.constant() else ()
        stamp = _stamp(stored) if stored else None
        if stamp is None:
            return evaluate(self.weights(), group_size, self.residual, backend)
        # work of one CUDA stream is not ordered before that of another
        stream = torch.cuda.current_stream(stored[0].device) if stored[0].is_cuda else None
        key = (as_pair(group_size, "group_size", 1), backend, stream)
        kept = self._tables.get(key)
        if kept is None or kept.stamp != (*stamp, kept.table._version):
            kept = self._tables[key] = self._keep(stored, stamp, group_size, backend)
        return kept.table

    def _keep(self, stored: tuple[Tensor, ...], stamp: tuple, group_size: Size, backend: str | None) -> _Table:
        if len(self._tables) >= self._KEPT:
            self._tables.clear()
        with torch.inference_mode(False), torch.no_grad():  # a table that may be used outside inference mode too
            table = evaluate(self.weights(), group_size, self.residual, backend)
            return _Table(table, tuple(x.detach() for x in stored), (*stamp, table._version))

    def clear_cache(self) -> None:
        """Forget the tables that were kept."""
        self._tables.clear()

    def train(self, mode: bool = True) -> DynamicPositionBias:
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> DynamicPositionBias:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}}

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, heads={self.heads}, residual={self.residual}"
