"""The numerical contract: at most twice the error of the reference in the dtype under test, measured against
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitkernels import use_backend
from vitkernels.tree import Tree


def outputs_and_gradients(function: Callable, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """function(*inputs) and the gradient of every input for an output gradient of ``cotangent``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def assert_contract(
    function: Callable,  # the implementation under test
    reference: Callable,  # the specification, of the same arguments
    inputs: Sequence[Tensor],  # float64; rounded to ``dtype`` here, tables to float32 at least
    cotangent: Tensor,
    dtype: torch.dtype,
    tables: Sequence[int] = (),  # places of the inputs that keep float32, as a bias table does
    together: Sequence[
        int
    ] = (),  # inputs too small for a fair maximum each (a handful of elements): the worst of all counts
    vanishing: Mapping[int, int] = MappingProxyType(
        {}
    ),  # inputs without a gradient in exact arithmetic: whose scale they take
    device: str = "cpu",
) -> None:
    """Output and every gradient of ``function``: err <= 2 err(reference in dtype) + 2 eps max|exact|, and all finite.

    In float64 the reference's own error is unknown and not zero: 64 eps max|exact| instead.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = [x.to(wide if i in tables else dtype) for i, x in enumerate(inputs)]
    cotangent = cotangent.to(dtype)
    exact = outputs_and_gradients(reference, [x.double() for x in rounded], cotangent)
    eager = outputs_and_gradients(reference, rounded, cotangent)
    ours = outputs_and_gradients(function, [x.to(device) for x in rounded], cotangent.to(device))
    assert_as_exact(ours, eager, exact, dtype, together, vanishing)


def assert_as_exact(
    ours: Sequence[Tensor],  # an output, and gradients of inputs
    eager: Sequence[Tensor],  # the same of the reference in ``dtype``
    exact: Sequence[Tensor],  # and in float64
    dtype: torch.dtype,
    together: Sequence[int] = (),
    vanishing: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """The contract of `assert_contract` for tensors that are there already."""
    scales = [_largest(exact[vanishing.get(i - 1, i - 1) + 1]) for i in range(len(exact))]
    errors = [_largest(b.double() - c) for b, c in zip(eager, exact)]
    # no measure where PyTorch leaves a gradient unwritten, as some of depthwise convolutions on CPUs with AMX
    errors = [error if math.isfinite(error) else 0.0 for error in errors]
    shared = max((errors[i + 1] / scales[i + 1] for i in together), default=0.0)
    names = ["output", *(f"gradient of input {i}" for i in range(len(exact) - 1))]
    for i, (name, a, b, c) in enumerate(zip(names, ours, eager, exact)):
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"{name}: {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}"
        )
        a = a.cpu().double()
        assert a.isfinite().all(), f"{name}: {(~a.isfinite()).sum().item()} elements are not finite"
        eager_error = shared * scales[i] if i - 1 in together else errors[i]
        allowed = 2 * eager_error + (64 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps * scales[i]
        assert _largest(a - c) <= allowed, f"{name}: error {_largest(a - c):.3e}, allowed {allowed:.3e}"


def assert_layer_contract(layer: nn.Module, dtype: torch.dtype, *inputs: object, autocast: bool = False) -> None:
    """The contract for a layer's output and the gradients of its input and of all its parameters, cast to ``dtype`` or,
    with ``autocast``, in its region. ``inputs``: what the layer is called with, the first a tensor; of several outputs
    the first counts.
    """
    names, parameters = zip(*layer.named_parameters())

    def run(x: Tensor, *values: Tensor, backend: str | None = None) -> Tensor:
        with use_backend(backend), torch.autocast("cpu", dtype, enabled=autocast):  # which leaves float64 as it is
            out = functional_call(layer, dict(zip(names, values)), (x, *inputs[1:]))
        return out[0] if isinstance(out, tuple) else out

    kept = torch.float32 if autocast else dtype
    rounded = [x.detach().to(kept) for x in (inputs[0], *parameters)]
    reference = partial(run, backend="reference")
    cotangent = torch.randn(reference(*rounded).shape).to(dtype)
    assert reference(*rounded).dtype == dtype
    exact = outputs_and_gradients(reference, [x.double() for x in rounded], cotangent)
    eager, ours = (outputs_and_gradients(function, rounded, cotangent) for function in (reference, run))
    # a fault of the layer itself, on every backend
    error, allowed = _largest(eager[0].double() - exact[0]), 4 * torch.finfo(dtype).eps * _largest(exact[0])
    assert error <= allowed, f"output of the reference: error {error:.3e}, allowed {allowed:.3e}"
    assert_as_exact(ours, eager, exact, dtype, together=range(1, len(rounded)))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def blind_inputs(*shape: int) -> list[torch.Tensor]:
    """q, k and v [.., heads, head_dim] whose first query has logits of -inf alone, and all others 0 alone."""
    q, k, v = torch.zeros(shape), torch.full(shape, 1e20), torch.rand(shape)
    q[:, 0] = -1e20
    return [q, k, v]


def assert_blind(out, dq, dk, dv) -> None:
    """The first query gives 0 and gets 0."""
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    assert not out[:, 0].any() and not dq[:, 0].any() and (out[:, 1:] > 0).all()


def leaf_of(order: Tensor, leaf_size: int) -> Tensor:
    """The leaf of every token: ``[B, heads, N]`` from an order."""
    tree = Tree.of(order.shape[2], leaf_size)
    leaf = torch.bucketize(torch.arange(tree.tokens), tree.bounds(tree.levels)[1:], right=True).expand(order.shape)
    return torch.empty_like(leaf).scatter_(2, order.cpu().long(), leaf)


def photograph_features(side: int, heads: int, dim: int) -> Tensor:  # [B, N, heads, D]
    """A random projection of the patches of two photographs of 224 x 224 pixels."""
    datasets = pytest.importorskip("sklearn.datasets")
    pytest.importorskip("PIL")
    images = [datasets.load_sample_image(name)[100:324, 200:424] for name in ("china.jpg", "flower.jpg")]
    pixels = torch.stack([torch.from_numpy(image.copy()) for image in images]).permute(0, 3, 1, 2).float() / 255
    patches = torch.nn.functional.unfold(pixels - pixels.mean((2, 3), keepdim=True), 224 // side, stride=224 // side)
    return (patches.mT @ torch.randn(patches.shape[1], heads * dim)).unflatten(-1, (heads, dim))
