"""The dynamic position bias: the registered operators, their autograd, and the public function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.autograd import Function

from .. import _checks, _dispatch
from ..partition import Size, as_pair
from .reference import dynamic_position_bias as _reference

_LAUNCHER = "vitkernels.position_bias.kernels"
_REST = "Tensor[] mlp, bool residual, SymInt group_h, SymInt group_w"
_PARAMETERS = (
    *("pos_proj.weight", "pos_proj.bias"),
    *(f"{layer}.{name}" for layer in ("pos1", "pos2", "pos3") for name in ("0.weight", "0.bias", "2.weight", "2.bias")),
)


def _forward_fake(mlp, residual, group_h, group_w, *, interpreted):
    return mlp[0].new_empty(mlp[13].shape[0], 2 * group_h - 1, 2 * group_w - 1)


def _backward_fake(dtable, mlp, residual, group_h, group_w, *, interpreted):
    return [parameter.new_empty(parameter.shape) for parameter in mlp]


_dispatch.define("dynamic_position_bias_forward", f"({_REST}) -> Tensor", _forward_fake, _LAUNCHER)
_dispatch.define("dynamic_position_bias_backward", f"(Tensor dtable, {_REST}) -> Tensor[]", _backward_fake, _LAUNCHER)


class _DynamicPositionBias(Function):
    """The table from the 14 parameters."""

    @staticmethod
    @_dispatch.with_signature
    def forward(*inputs):
        backend, residual, group, *mlp = inputs
        run = _dispatch.operator("dynamic_position_bias_forward", backend, mlp[0].device)
        return run(mlp, residual, *group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.residual, ctx.group, *mlp = inputs
        ctx.save_for_backward(*mlp)

    @staticmethod
    @_dispatch.first_derivative
    def backward(ctx, dtable):
        run = _dispatch.operator("dynamic_position_bias_backward", ctx.backend, dtable.device)
        return None, None, None, *run(dtable, ctx.saved_tensors, ctx.residual, *ctx.group)


def _check_weights(mlp: object) -> tuple[Tensor, ...]:
    """The 14 parameters: one dtype, one device, and shapes that fit each other."""
    if not isinstance(mlp, (list, tuple)):
        raise TypeError(f"expected a DynamicPositionBias or its {len(_PARAMETERS)} weights, got {type(mlp).__name__}")
    if len(mlp) != len(_PARAMETERS):
        raise ValueError(f"expected {len(_PARAMETERS)} weights ({', '.join(_PARAMETERS)}), got {len(mlp)}")
    for name, x, layout in zip(_PARAMETERS, mlp, _layouts()):
        _checks.check_tensor(name, x, layout)
        if x.dtype != mlp[0].dtype:
            raise TypeError(
                f"the weights must have one dtype, got {_PARAMETERS[0]} {mlp[0].dtype} and {name} {x.dtype}"
            )
        _checks.check_device(_PARAMETERS[0], mlp[0], name, x)
    sizes = {"p": mlp[0].shape[0], "heads": mlp[13].shape[0], "2": 2}
    for name, x, layout in zip(_PARAMETERS, mlp, _layouts()):
        expected = [sizes[axis] for axis in layout.strip("[]").split(", ")]
        if list(x.shape) != expected:
            raise ValueError(
                f"{name} must be {layout} = {expected} for hidden width p = {sizes['p']} (rows of {_PARAMETERS[0]}) "
                f"and {sizes['heads']} heads (rows of {_PARAMETERS[13]}), got {_checks.shape_of(x)}"
            )
    return tuple(mlp)


def _layouts() -> list[str]:
    middle = ["[p]", "[p]", "[p, p]", "[p]"]
    return ["[p, 2]", "[p]", *middle, *middle, "[p]", "[p]", "[heads, p]", "[heads]"]


def _refusal(backend: str, mlp: Sequence[Tensor]) -> str | None:
    """Why ``backend`` cannot run this call, or None."""
    if backend == "triton":
        from .kernels import refusal

        return refusal(mlp)
    return None


def evaluate(mlp: tuple[Tensor, ...], group_size: Size, residual: bool, backend: str | None) -> Tensor:
    """`dynamic_position_bias` of weights that are known to fit, float32 or float64."""
    group = as_pair(group_size, "group_size", 1)
    device = mlp[0].device
    backend = _dispatch.select("dynamic_position_bias", device, backend, lambda backend: _refusal(backend, mlp))
    if backend == "reference":
        with _checks.no_autocast(device):
            return _reference(mlp, group, residual)
    return _dispatch.run(_DynamicPositionBias, backend, residual, group, *mlp)


def dynamic_position_bias(
    module_or_weights: nn.Module | Sequence[Tensor],
    group_size: Size,
    *,
    residual: bool | None = None,
    backend: str | None = None,
) -> Tensor:  # [heads, 2Gh-1, 2Gw-1]
    """CrossFormer's dynamic position bias: the bias of every offset inside a group, by a small MLP on the offset.

    "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (Wang et al., ICLR 2022), section
    3.3: the raw offset (dy, dx) between query and key through a Linear to p values, then LayerNorm, ReLU and Linear
    three times, the last one to the heads. All offsets in one launch, all gradients in two.

    Args:
        module_or_weights: a `DynamicPositionBias`, or 14 parameters in the order of its ``weights()``: ``pos_proj``
            weight ``[p, 2]`` and bias ``[p]``; ``pos1`` and ``pos2``, each LayerNorm weight and bias ``[p]``, Linear
            weight ``[p, p]`` and bias ``[p]``; ``pos3``, LayerNorm weight and bias ``[p]``, Linear weight
            ``[heads, p]`` and bias ``[heads]``. float32 or float64; float16 and bfloat16 are converted to float32, and
            autocast leaves that as it is.
        group_size: tokens of a group along (height, width), an int or a pair.
        residual: whether ``pos1`` and ``pos2`` add their input to their output. None is False for weights. A module
            knows its own, and refuses another.
        backend: "triton", "cpu" or "reference"; None chooses by device. A backend that is asked for runs or refuses.

    Returns:
        The table ``[heads, 2Gh-1, 2Gw-1]`` that `partition_attention` takes as bias, float32 or float64: the entry of
        offset (dy, dx), query minus key, stands at ``[:, dy + Gh - 1, dx + Gw - 1]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, count, shape, dtype or device.
        RuntimeError: the backend cannot run here or cannot run this call.
    """
    if isinstance(module_or_weights, nn.Module):
        own = getattr(module_or_weights, "residual", None)
        if residual not in (None, own):
            raise ValueError(
                f"residual={residual} was asked of a {type(module_or_weights).__name__} with residual={own}: leave it "
                f"out, or make the module with DynamicPositionBias(dim, heads, residual={residual})"
            )
        return module_or_weights(group_size, backend=backend)
    mlp = _check_weights(module_or_weights)
    mlp = tuple(x.to(_checks.accumulation_dtype(x)) for x in mlp)
    return evaluate(mlp, group_size, bool(residual), backend)
