"""The Triton kernels of pool_tokens against the reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import TRITON_REFUSAL, assert_graph_replays, sparse
from contract import assert_contract
from guarded import assert_exits_well
from torch import Tensor

if TRITON_REFUSAL is not None:
    pytest.skip(TRITON_REFUSAL, allow_module_level=True)

import triton

from vitkernels.pooled_attention import pool_kernels as kernels
from vitkernels.pooled_attention.pool import pool_tokens, pooled_size
from vitkernels.pooled_attention.reference import pool_tokens as reference

INTERPRETED = bool(triton.knobs.runtime.interpret)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def random_inputs(thw, kernel, heads, head_dim, mode, has_cls, norm, batch=1) -> list[Tensor]:
    """x, the weights that there are, in float64."""
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [draw(batch, math.prod(thw) + has_cls, heads, head_dim)]
    if mode == "conv":
        inputs.append(draw(head_dim, 1, *kernel))
    return inputs + [draw(head_dim), draw(head_dim)] * norm


def pooling(backend, thw, kernel, stride, padding, mode, has_cls, norm):
    """pool_tokens as a function of `random_inputs`."""

    def pool(x, *weights):
        weight, weights = (weights[0], weights[1:]) if mode == "conv" else (None, weights)
        options = dict(thw=thw, kernel=kernel, stride=stride, padding=padding, mode=mode, has_cls=has_cls)
        return pool_tokens(x, weight, *(weights or (None, None)), **options, backend=backend)[0]

    return pool


def check(
    thw,
    kernel,
    stride,
    dtype,
    device,
    padding=None,
    mode="conv",
    has_cls=False,
    norm=True,
    heads=1,
    head_dim=8,
    batch=1,
):
    """The numerical contract for the output and every gradient."""
    inputs = random_inputs(thw, kernel, heads, head_dim, mode, has_cls, norm, batch)
    arguments = thw, kernel, stride, padding, mode, has_cls, norm
    expected = pooling("reference", *arguments)
    cotangent = torch.randn(expected(*inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tables = range(1, len(inputs))
    assert_contract(pooling("triton", *arguments), expected, inputs, cotangent, dtype, tables=tables, device=device)


SHAPES = {  # thw, kernel, stride, padding, has_cls; a tile has 16 runs of 4 tokens, and runs of a line of the map
    "one token": ((1, 1), (3, 3), 1, None, False),
    "one token and a class token": ((1, 1), (1, 1), 1, None, True),
    "one line below the tile": ((15, 4), (3, 3), 1, None, True),
    "the tile": ((16, 4), (3, 3), 1, None, False),
    "one line above the tile": ((17, 4), (3, 3), 1, None, True),
    "one token above a run": ((1, 5), (1, 3), 1, None, False),
    "three tokens, below a run": ((1, 3), (1, 3), 1, None, False),
    "stride 2, does not divide": ((4, 7), (3, 3), 2, None, True),
    "stride beyond the kernel": ((7, 5), (2, 2), 3, 0, True),
    "even kernel": ((4, 6), (2, 4), (1, 2), None, False),
    "no padding": ((4, 6), (3, 3), 1, 0, False),
    "one tap": ((3, 4), (1, 1), 1, None, False),
    "volume": ((2, 3, 4), (3, 3, 3), 1, None, True),
    "volume, strides": ((3, 2, 4), (3, 2, 3), (2, 1, 2), None, False),
    "nine taps at stride 8": ((1, 17), (1, 9), (1, 8), None, True),
    "ten taps": ((1, 5), (1, 10), 1, None, False),
    "ten taps at stride 2": ((1, 6), (1, 10), (1, 2), None, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, device):
    thw, kernel, stride, padding, has_cls = SHAPES[shape]
    check(thw, kernel, stride, torch.float32, device, padding, has_cls=has_cls)


@pytest.mark.parametrize("has_cls, norm", [(False, False), (True, True)])
@pytest.mark.parametrize("mode", ["conv", "max", "avg"])
def test_modes(mode, has_cls, norm, device):
    dtype = torch.bfloat16 if has_cls else torch.float32
    check((3, 5), (3, 3), (1, 2), dtype, device, mode=mode, has_cls=has_cls, norm=norm)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_modes_on_volumes(mode, device):
    check((2, 3, 4), (2, 3, 2), (1, 2, 1), torch.float16, device, mode=mode, has_cls=True, norm=mode == "avg")


@pytest.mark.parametrize("head_dim", [8, 24, 32, 72, 96])
def test_head_dims(head_dim, device):
    check((2, 5), (2, 3), 1, torch.bfloat16, device, has_cls=True, head_dim=head_dim)


def test_parts_of_a_head_in_float32_and_of_the_maximum(device):
    check((2, 5), (2, 3), 1, torch.float32, device, head_dim=72)
    check((2, 3), (2, 2), 1, torch.float16, device, mode="max", head_dim=96)


def test_images_and_heads(device):
    check((2, 3), (2, 2), (2, 1), torch.float16, device, has_cls=True, heads=3, head_dim=8, batch=2)


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no float64")
@pytest.mark.parametrize("mode", ["conv", "avg"])
def test_float64(mode, device):
    check((2, 3, 4), (2, 2, 3), (1, 2, 1), torch.float64, device, mode=mode, has_cls=True)


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no float64")
@pytest.mark.parametrize("mode", ["conv", "max"])
def test_gradcheck(mode):
    arguments = (2, 4), (2, 3), (1, 2), None, mode, True, True
    inputs = [x.requires_grad_() for x in random_inputs((2, 4), (2, 3), 1, 8, mode, True, True)]
    torch.autograd.gradcheck(pooling("triton", *arguments), inputs, fast_mode=True, check_undefined_grad=False)


GEOMETRY = [1, 3, 5], [1, 3, 2], [1, 1, 2], [0, 1, 1]


def run(x, weight, norm, dout, maximum=False, has_cls=True, geometry=GEOMETRY, dx=None, eps=1e-6) -> list[Tensor]:
    """The launchers: out, dx, dweight and dnorm."""
    arguments = x, weight, *norm, *geometry, maximum, has_cls, eps
    dx = torch.empty_like(x) if dx is None else dx
    out = kernels.pool_tokens_forward(*arguments)
    return [out, dx, *kernels.pool_tokens_backward(dout, *arguments, dx)]


def run_inputs(device, batch=1, heads=1, head_dim=8, geometry=GEOMETRY) -> tuple:
    """x, taps, norm and dout of `run` in float32."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    tokens = math.prod(geometry[0]) + 1, math.prod(pooled_size(*geometry)) + 1
    x, dout = (draw(batch, n, heads, head_dim).to(device) for n in tokens)
    return x, draw(head_dim, math.prod(geometry[1])).to(device), draw(2, head_dim).to(device), dout


@pytest.mark.parametrize("mode", ["conv", "max", "avg"])
def test_small_integers_are_exact(mode, device):
    """Of equal values, of NaNs and of infinities too, the maximum is PyTorch's."""
    x, weight, _, dout = (y.round() for y in run_inputs(device))
    if mode == "max":
        x[0, 3, 0, :2], x[0, 4, 0, :2], x[0, 9, 0, 1] = float("nan"), float("nan"), float("nan")
        x[:, :, :, 2], x[0, :8, 0, 3] = float("-inf"), float("-inf")
        x[0, 11, 0, 4] = float("inf")
    geometry = ([1, 3, 5], [1, 2, 2], [1, 1, 2], [0, 1, 1]) if mode == "avg" else GEOMETRY
    dout = dout[:, : math.prod(pooled_size(*geometry)) + 1] if mode != "avg" else torch.cat((dout, dout[:, :3]), 1)
    leaves = [x.cpu().requires_grad_(), weight.cpu().requires_grad_()]
    taps = leaves[1] if mode == "conv" else None
    expected = reference(leaves[0], taps, None, None, *geometry, mode == "max", True, 0.0)
    gradients = torch.autograd.grad(expected, leaves[: 1 + (mode == "conv")], dout.cpu())
    taps = weight if mode == "conv" else None
    out, dx, dweight, _ = run(x, taps, (None, None), dout, mode == "max", geometry=geometry)
    torch.testing.assert_close(out.cpu(), expected.detach(), rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip((dx, dweight), gradients))


def test_strides(device):
    """Rows that are not aligned, a third of a projection, gradients that heads share; nothing is copied."""
    geometry = [1, 2, 3], [1, 2, 2], [1, 1, 1], [0, 1, 0]
    x, weight, norm, dout = run_inputs(device, batch=2, heads=2, geometry=geometry)
    dout = dout[:, :, :1].expand(-1, -1, 2, -1)
    expected = run(x, weight, norm, dout.contiguous(), geometry=geometry)
    wide = x.new_zeros(2, x.shape[1], 2, 11)
    wide[..., 1:9] = x
    packed = torch.stack((x, x, x), 2).transpose(0, 1).contiguous().transpose(0, 1)
    for y in (wide[..., 1:9], packed[:, :, 1]):
        buffer = torch.full_like(packed, 7.0)
        for a, b in zip(run(y, weight, norm, dout, geometry=geometry, dx=buffer[:, :, 1]), expected):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert (buffer[:, :, ::2] == 7).all()


@pytest.mark.parametrize("maximum", [False, True])
def test_nan_stays_in_its_windows_and_head(maximum, device):
    """A NaN in column 2 of the last line, which the middle windows of lines 1 and 2 see."""
    x, weight, norm, dout = run_inputs(device, heads=2)
    weight = None if maximum else weight
    x[0, 1 + 2 * 5 + 2, 0, 3] = float("nan")
    out, dx, *_ = (y.cpu() for y in run(x, weight, norm, dout, maximum))
    clean = torch.ones(1, out.shape[1], 2, dtype=torch.bool)
    clean[:, [1 + 1 * 3 + 1, 1 + 2 * 3 + 1], 0] = False
    assert torch.equal(out.isfinite().all(-1), clean)
    leaf, *others = (None if y is None else y.cpu() for y in (x, weight, *norm))
    expected = reference(leaf.requires_grad_(), *others, *GEOMETRY, maximum, True, 1e-6)
    assert torch.equal(dx.isnan(), torch.autograd.grad(expected, leaf, dout.cpu())[0].isnan())


def test_same_bits_every_run(device):
    inputs = run_inputs(device)
    first, *others = (run(*inputs) for _ in range(2 if INTERPRETED else 20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_empty_batch(device):
    x, weight, norm, dout = run_inputs(device)
    out, dx, dweight, dnorm = run(x[:0], weight, norm, dout[:0])
    assert out.shape == dout[:0].shape and dx.shape == x[:0].shape
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dnorm, torch.zeros_like(norm))


@pytest.mark.parametrize("maximum", [False, True])
def test_opcheck(maximum, device):
    geometry = [1, 2, 3], [1, 1, 2], [1, 1, 1], [0, 0, 1]
    x, weight, norm, dout = run_inputs(device, geometry=geometry)
    arguments = x, None if maximum else weight, *norm, *geometry, maximum, True, 1e-6
    suffix, utilities = "_interpreted" if INTERPRETED else "", ("test_schema", "test_faketensor")
    forward, backward = (
        getattr(torch.ops.vitkernels, f"pool_tokens_{name}{suffix}").default for name in ("forward", "backward")
    )
    torch.library.opcheck(forward, arguments, test_utils=utilities)
    torch.library.opcheck(backward, (dout, *arguments, torch.empty_like(x)), test_utils=utilities)


@pytest.mark.parametrize("strides", [(2**30 + 8, 8, 8), (0, 2**28 + 8, 0), (0, 16, 2**31)])
@pytest.mark.parametrize("maximum", [False, True])
def test_addresses_past_2_31_elements(strides, maximum, device):
    geometry = [1, 3, 3], [1, 1, 2], [1, 1, 1], [0, 0, 1]
    shape = (3, 10, 1) if strides[0] else (1, 10, 2 if strides[2] else 1)
    x, weight, norm, dout = run_inputs(device, shape[0], shape[2], geometry=geometry)
    weight, far = None if maximum else weight, []
    x, dout = x.half(), dout.half()
    for y in (x, dout, x):
        steps = *strides, 1
        if strides[0]:  # a stride of 32 bits, a product of more
            steps = strides[0], 8, 8, 1
        storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(y.shape, steps)), device)
        far.append(storage.as_strided(y.shape, steps).copy_(y))
    expected = run(x, weight, norm, dout, maximum, geometry=geometry)
    results = run(far[0], weight, norm, far[1], maximum, geometry=geometry, dx=far[2])
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


@pytest.mark.skipif(not INTERPRETED, reason="page protection is the CPU's")
def test_reads_and_writes_stay_inside_the_tensors():
    """Tensors between inaccessible pages: a lane outside kills the process."""
    assert_exits_well("pool_guard_pages.py")


def test_refusals(device):
    x = torch.zeros(1, 4, 1, 300, device=device)
    for head_dim, why in ((300, "head_dim 300 > 128"), (12, "head_dim 12 is not a multiple of 8")):
        assert why in kernels.refusal(head_dim, torch.float32)
        with pytest.raises(RuntimeError, match=f"triton cannot run pool_tokens: {why}"):
            pool_tokens(x[..., :head_dim], mode="max", kernel=2, thw=(2, 2), backend="triton")
    assert (kernels.refusal(32, torch.float64) is None) == INTERPRETED


# what only a GPU can show

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LAYERS = {  # of published models: thw, kernel, stride, heads, head_dim
    "MViTv2-S, queries": ((56, 56), (3, 3), 1, 1, 96),
    "MViTv2-S, keys": ((56, 56), (3, 3), 4, 1, 96),
    "MViT-B 16x4, queries": ((8, 28, 28), (3, 3, 3), (1, 2, 2), 2, 96),
    "MViT-B 16x4, keys": ((8, 56, 56), (3, 3, 3), (1, 8, 8), 1, 96),
    "MViT-B 32x3, keys": ((4, 56, 56), (1, 9, 9), (1, 8, 8), 1, 96),
    "MViTv2-L 40x3, queries": ((4, 39, 39), (3, 3, 3), 1, 2, 72),
    "64 elements": ((8, 14, 14), (3, 3, 3), 1, 4, 64),
    "128 elements": ((14, 14), (5, 5), 2, 4, 128),
}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("mode, norm", [("conv", True), ("conv", False), ("max", False), ("avg", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_models(layer, dtype, mode, norm):
    thw, kernel, stride, heads, head_dim = LAYERS[layer]
    check(thw, kernel, stride, dtype, "cuda", None, mode, True, norm, heads, head_dim, batch=2)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("mode", ["conv", "max"])
def test_cuda_graph(mode):
    thw, kernel = (4, 14, 14), (3, 3, 3)
    inputs = [x.bfloat16().cuda() for x in random_inputs(thw, kernel, 2, 96, mode, True, True, batch=2)]
    pool = pooling("triton", thw, kernel, (1, 2, 2), None, mode, True, True)
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        out = pool(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    assert_graph_replays(step, leaves[0])


@pytest.mark.gpu
@gpu
def test_more_programs_than_a_wave():
    """Persistent programs take several tiles each; the same bits every run."""
    thw, kernel = (8, 28, 28), (3, 3, 3)
    inputs = [x.bfloat16().cuda().requires_grad_() for x in random_inputs(thw, kernel, 4, 96, "conv", True, True, 16)]
    pool = pooling("triton", thw, kernel, 1, None, "conv", True, True)
    runs = [torch.autograd.grad(pool(*inputs).float().square().sum(), inputs) for _ in range(20)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))
