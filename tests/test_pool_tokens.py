"""Pooling of tokens: the reference against torch's own layers, the C++ kernels against the reference."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import sparse
from contract import assert_contract, outputs_and_gradients
from levels import LEVELS, run_at, supported
from torch import nn

from vitkernels import _native
from vitkernels.pooled_attention import Pool, pool_qkv, pool_tokens

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MODES = ("conv", "max", "avg")

cpu = pytest.param("cpu", marks=pytest.mark.skipif(not _native.cpu.available, reason=str(_native.cpu.reason)))
needs_native = pytest.mark.skipif(not _native.cpu.available, reason=str(_native.cpu.reason))
both = pytest.mark.parametrize("backend", ["reference", cpu])

# thw, kernel, stride, padding (None: half the kernel), heads, head_dim, class token: every size by its role
CASES = {
    "MViTv2: 3 x 3": ((7, 9), (3, 3), 1, None, 2, 96, False),
    "3 x 3, stride 2": ((14, 13), (3, 3), 2, None, 2, 96, False),
    "3 x 3, stride 4": ((16, 13), (3, 3), 4, None, 1, 64, True),
    "MViTv1: 3 x 3 x 3, strides 1, 8, 8": ((3, 17, 16), (3, 3, 3), (1, 8, 8), None, 1, 96, True),
    "3 x 3 x 3, strides 1, 2, 2": ((4, 6, 7), (3, 3, 3), (1, 2, 2), None, 2, 64, True),
    "3 x 3 x 3, strides 2, 3, 1": ((5, 7, 6), (3, 3, 3), (2, 3, 1), None, 1, 24, False),
    "an even kernel": ((6, 9), (2, 4), 1, None, 3, 24, False),
    "an even kernel without padding": ((8, 9), (2, 4), (2, 4), 0, 2, 72, True),
    "3 x 3 without padding": ((6, 5), (3, 3), 1, 0, 1, 64, False),
    "paddings of 0 and 2": ((6, 5), (3, 5), (1, 3), (0, 2), 1, 48, True),
    "7 x 5 over a map that is smaller": ((5, 3), (7, 5), 1, None, 2, 8, False),
    "a kernel as large as the padded map": ((5, 4), (5, 4), 3, 0, 1, 12, True),
    "1 x 1": ((5, 4), (1, 1), 1, None, 2, 24, True),
    "1 x 1, strides 3 and 2": ((7, 9), (1, 1), (3, 2), None, 2, 8, False),
    "1 x 3 x 1": ((3, 5, 4), (1, 3, 1), (2, 1, 3), None, 2, 12, False),
    "2 x 1 x 3": ((3, 5, 4), (2, 1, 3), (1, 1, 2), None, 2, 40, True),
    "one token": ((1, 1), (3, 3), 2, None, 1, 24, True),
    "one line, longer than a block": ((1, 61), (3, 3), 1, None, 1, 24, False),
    "one column": ((61, 1), (3, 3), (2, 1), None, 1, 32, False),
    "7 tokens to a tile and 80 channels": ((2, 7), (3, 3), 1, None, 2, 80, False),
}


def windows_of(thw, kernel, stride, padding):
    axes = len(thw)
    stride = (stride,) * axes if isinstance(stride, int) else stride
    padding = tuple(k // 2 for k in kernel) if padding is None else padding
    padding = (padding,) * axes if isinstance(padding, int) else padding
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(thw, kernel, stride, padding))


def make(case, mode, norm, batch=2, draw=torch.randn):
    """[x, then weight and the norm's, those that there are], an output gradient; float64."""
    thw, kernel, stride, padding, heads, head_dim, cls = case
    torch.manual_seed(0)
    draw = functools.partial(draw, dtype=torch.float64)
    inputs = [draw(batch, math.prod(thw) + cls, heads, head_dim)]
    if mode == "conv":
        inputs.append(draw(head_dim, 1, *kernel))
    if norm:
        inputs += [draw(head_dim), draw(head_dim)]
    return inputs, draw(batch, math.prod(windows_of(thw, kernel, stride, padding)) + cls, heads, head_dim)


def run(case, mode, backend, x, *parameters):
    """pool_tokens of what make() made."""
    thw, kernel, stride, padding, _, _, cls = case
    weight, *norm = parameters if mode == "conv" else (None, *parameters)
    options = dict(thw=thw, stride=stride, padding=padding, mode=mode, has_cls=cls, backend=backend)
    out, size = pool_tokens(x, weight, *norm, kernel=None if mode == "conv" else kernel, **options)
    assert size == windows_of(thw, kernel, stride, padding)
    return out


@needs_native
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, dtype, mode, norm):
    inputs, cotangent = make(CASES[name], mode, norm)
    ours, reference = (functools.partial(run, CASES[name], mode, backend) for backend in ("cpu", "reference"))
    assert_contract(ours, reference, inputs, cotangent, dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contract_with_parameters_in_float32(dtype):
    case = CASES["3 x 3, stride 2"]
    inputs, cotangent = make(case, "conv", True)
    ours, reference = (functools.partial(run, case, "conv", backend) for backend in ("cpu", "reference"))
    assert_contract(ours, reference, inputs, cotangent, dtype, tables=(1, 2, 3))


def exact(name, mode):
    """Whether small integers give exact results: an average of a power of 2 of them, a sum, a maximum."""
    taps = math.prod(CASES[name][1])
    return mode != "avg" or taps & (taps - 1) == 0


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, mode", [(name, mode) for name in CASES for mode in MODES if exact(name, mode)])
def test_small_integers_are_exact(name, mode, dtype, backend):
    """Also where the largest are several: the gradient goes to the first."""

    def draw(*shape, dtype):
        return torch.randint(-2, 3, shape).to(dtype)

    inputs, cotangent = make(CASES[name], mode, False, draw=draw)
    exact = outputs_and_gradients(functools.partial(run, CASES[name], mode, "reference"), inputs, cotangent)
    inputs, cotangent = [x.to(dtype) for x in inputs], cotangent.to(dtype)
    got = outputs_and_gradients(functools.partial(run, CASES[name], mode, backend), inputs, cotangent)
    if backend == "reference":  # sums in 16 bits
        exact, got = exact[:1], got[:1]
    for a, b in zip(got, exact):
        assert torch.equal(a, b.to(dtype))


def layer_of(mode, kernel, stride, padding, channels):
    """torch's own layer, over maps of channels."""
    axes = len(kernel)
    padding = tuple(k // 2 for k in kernel) if padding is None else padding
    if mode == "max":
        return (nn.MaxPool2d if axes == 2 else nn.MaxPool3d)(kernel, stride, padding)
    if mode == "avg":
        return (nn.AvgPool2d if axes == 2 else nn.AvgPool3d)(kernel, stride, padding)
    convolution = nn.Conv2d if axes == 2 else nn.Conv3d
    return convolution(channels, channels, kernel, stride, padding, groups=channels, bias=False)


@both
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equals_torchs_own_layers(name, mode, backend):
    """... as SlowFast and timm put them together."""
    thw, kernel, stride, padding, heads, head_dim, cls = CASES[name]
    torch.manual_seed(0)
    layer = layer_of(mode, kernel, stride, padding, head_dim).double()
    norm = nn.LayerNorm(head_dim, eps=1e-6).double()
    norm.weight.data.normal_(), norm.bias.data.normal_()
    (x,), cotangent = make(CASES[name], mode, False)[0][:1], make(CASES[name], mode, False)[1]

    def theirs(x):
        maps = x[:, cls:].permute(0, 2, 3, 1).reshape(-1, head_dim, *thw)
        pooled = layer(maps).flatten(2).unflatten(0, (-1, heads)).permute(0, 3, 1, 2)
        return norm(torch.cat((x[:, :cls], pooled), 1))

    parameters = [*layer.parameters(), *norm.parameters()]
    results = []
    for function in (theirs, functools.partial(run, CASES[name], mode, backend)):
        leaf = x.clone().requires_grad_()
        out = function(leaf) if function is theirs else function(leaf, *parameters)
        results.append([out, *torch.autograd.grad(out, [leaf, *parameters], cotangent)])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a)


@both
def test_the_class_token_takes_the_norm_alone(backend):
    case = CASES["3 x 3 x 3, strides 1, 2, 2"]
    inputs, _ = make(case, "conv", True)
    x, weight, *norm = inputs
    out = run(case, "conv", backend, *inputs)
    torch.testing.assert_close(out[:, 0], nn.functional.layer_norm(x[:, 0], x.shape[-1:], *norm, 1e-6))
    assert torch.equal(run(case, "conv", backend, x, weight)[:, 0], x[:, 0])
    changed = x.clone()
    changed[:, 0] += 1
    assert torch.equal(run(case, "conv", backend, changed, *inputs[1:])[:, 1:], out[:, 1:])


@both
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_eps(eps, backend):
    x = 0.1 * torch.randn(2, 20, 1, 24, dtype=torch.float64)
    weight, bias = torch.randn(2, 24, dtype=torch.float64)
    out, _ = pool_tokens(x, None, weight, bias, thw=(4, 5), kernel=1, mode="avg", eps=eps, backend=backend)
    torch.testing.assert_close(out, nn.functional.layer_norm(x, (24,), weight, bias, eps))


# strides, sizes, special values


def views(x):
    """``x [B, N, heads, D]`` with the same values and other strides."""
    batch, tokens, heads, head_dim = x.shape
    packed = x.new_zeros(batch, tokens, 3, heads, head_dim)
    packed[:, :, 1] = x
    yield packed[:, :, 1]
    odd = x.new_zeros(batch * tokens * heads * (head_dim + 3) + 1)[1:].view(batch, tokens, heads, head_dim + 3)
    odd[..., :head_dim] = x
    yield odd[..., :head_dim]
    yield x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)  # the last dimension is not contiguous


@pytest.mark.parametrize("mode", ["conv", "max"])
@pytest.mark.parametrize(
    "head_dim, dtype, backend",
    [
        (12, torch.float32, "reference"),
        *(pytest.param(d, t, "cpu", marks=needs_native) for d in (12, 72, 96) for t in (torch.float32, torch.bfloat16)),
    ],
)
def test_any_strides(head_dim, mode, dtype, backend):
    case = ((5, 6), (3, 3), (2, 1), None, 3, head_dim, True)
    (x, *parameters), cotangent = make(case, mode, True)
    x, cotangent, *parameters = (tensor.to(dtype) for tensor in (x, cotangent, *parameters))
    function = functools.partial(run, case, mode, backend)
    expected = outputs_and_gradients(function, [x, *parameters], cotangent)
    for view in views(x):
        for gradient in views(cotangent):
            got = outputs_and_gradients(function, [view, *parameters], gradient)
            for a, b in zip(got, expected):
                torch.testing.assert_close(a, b, rtol=0, atol=0) if backend == "cpu" else torch.testing.assert_close(
                    a, b
                )


@both
def test_an_expanded_input_and_gradient(backend):
    case = ((4, 5), (3, 3), 1, None, 2, 24, False)
    (x, *parameters), _ = make(case, "conv", True)
    expanded = x[:1, :, :1].expand_as(x)
    function = functools.partial(run, case, "conv", backend)
    one = torch.ones((), dtype=torch.float64).expand_as(x)
    got = outputs_and_gradients(function, [expanded, *parameters], one)
    expected = outputs_and_gradients(function, [expanded.contiguous(), *parameters], one.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@both
@pytest.mark.parametrize("shape", [(0, 20, 2, 24), (2, 20, 0, 24)])
@pytest.mark.parametrize("mode", MODES)
def test_empty_inputs(mode, shape, backend):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(24, 1, 3, 3, requires_grad=True) if mode == "conv" else None
    norm = torch.randn(2, 24, requires_grad=True)
    options = dict(thw=(4, 5), stride=2, mode=mode, kernel=None if mode == "conv" else 3, backend=backend)
    out, size = pool_tokens(x, weight, *norm, **options)
    out.sum().backward()
    assert out.shape == (shape[0], 6, *shape[2:]) and size == (2, 3) and x.grad.shape == shape
    assert not norm.grad.any() and (weight is None or not weight.grad.any())


@needs_native
@pytest.mark.parametrize("mode", ["conv", "max"])
def test_more_images_than_are_held_at_a_time(mode):
    """A thread holds the gradients of 512 KB of windows, 225 KB to an image here; with two threads 4 images of 9."""
    case = ((17, 17), (3, 3), 1, None, 2, 96, True)
    inputs, cotangent = make(case, mode, True, batch=9)
    inputs, cotangent = [x.float() for x in inputs], cotangent.float()
    function = functools.partial(run, case, mode, "cpu")
    out, dx, *gradients = outputs_and_gradients(function, inputs, cotangent)
    alone = [
        outputs_and_gradients(function, [inputs[0][i : i + 1], *inputs[1:]], cotangent[i : i + 1]) for i in range(9)
    ]
    for i, (one, done, *_) in enumerate(alone):
        assert torch.equal(out[i : i + 1], one) and torch.equal(dx[i : i + 1], done)
    for i, gradient in enumerate(gradients):
        total = sum(one[2 + i].double() for one in alone)
        assert (gradient.double() - total).abs().max() <= 1e-5 * total.abs().max()


@both
@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_windows_and_head(mode, backend):
    case = ((7, 8), (3, 3), 2, None, 2, 24, False)
    (x, *parameters), _ = make(case, mode, False)
    clean = run(case, mode, backend, x, *parameters)
    x = x.clone()
    x.view(2, 7, 8, 2, 24)[1, 3, 4, 1, 5] = float("nan")
    spoiled = run(case, mode, backend, x, *parameters)
    touched = torch.zeros(2, 4, 4, 2, 24, dtype=torch.bool)
    touched[1, 1:3, 2, 1, 5] = True  # rows 1 to 3 and 3 to 5, columns 3 to 5
    touched = touched.view_as(clean)
    assert spoiled[touched].isnan().all() and torch.equal(spoiled[~touched], clean[~touched])


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [12, 24])
def test_the_winners_of_special_values(head_dim, dtype, backend):
    """Ties, infinities, NaN: value and place are those of torch."""
    case = ((6, 7), (3, 3), 2, None, 2, head_dim, False)
    torch.manual_seed(0)
    values = torch.tensor([-math.inf, -1.0, 0.0, -0.0, 1.0, math.inf, math.nan])
    for chance in ((1, 0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1, 0), (6, 6, 6, 6, 6, 6, 1)):
        shape = (2, 42, 2, head_dim)
        x = values[torch.tensor(chance).float().multinomial(math.prod(shape), True)].view(shape).to(dtype)
        cotangent = torch.randint(1, 9, (2, 12, 2, head_dim)).to(dtype)
        got = outputs_and_gradients(functools.partial(run, case, "max", backend), [x], cotangent)
        expected = outputs_and_gradients(functools.partial(run, case, "max", "reference"), [x.double()], cotangent)
        for a, b in zip(got, expected):
            a, b = (x.double().nan_to_num(nan=-5.0, posinf=1e4, neginf=-1e4) for x in (a, b))
            assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("strides", [(2**31 + 8, 64, 16), (512, 2**30 + 8, 16), (512, 64, 2**31)])
def test_addresses_past_2_31_elements(strides):
    near = torch.randn(2, 5, 2, 8).half()
    storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(near.shape, (*strides, 1))), "cpu")
    far = storage.as_strided(near.shape, (*strides, 1)).copy_(near)
    cotangent, weight = torch.randn(2, 5, 2, 8).half(), torch.randn(8, 1, 3, 3)
    function = functools.partial(pool_tokens, thw=(2, 2), has_cls=True, backend="cpu")
    near, far = (outputs_and_gradients(lambda x: function(x, weight)[0], [x], cotangent) for x in (near, far))
    assert all(torch.equal(a, b) for a, b in zip(near, far))


# the same bits, derivatives


@needs_native
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["MViTv2: 3 x 3", "3 x 3 x 3, strides 1, 2, 2"])
def test_same_bits_every_time(name, mode):
    inputs, cotangent = make(CASES[name], mode, True, batch=3)
    inputs, cotangent = [x.float() for x in inputs], cotangent.float()
    function = functools.partial(run, CASES[name], mode, "cpu")
    first = outputs_and_gradients(function, inputs, cotangent)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs_and_gradients(function, inputs, cotangent)))


@needs_native
@pytest.mark.parametrize("mode", ["conv", "max"])
def test_same_bits_for_any_number_of_threads(mode):
    """... which hold different numbers of images at a time."""
    case = ((28, 28), (3, 3), 2, None, 2, 96, True)
    inputs, cotangent = make(case, mode, True, batch=7)
    inputs, cotangent = [x.float() for x in inputs], cotangent.float()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 1):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(functools.partial(run, case, mode, "cpu"), inputs, cotangent))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@both
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case", [((4, 5), (3, 3), 2, None, 2, 5, True), ((2, 3, 4), (2, 3, 2), (1, 2, 3), None, 1, 9, False)]
)
def test_gradcheck(case, mode, norm, backend):
    def draw(*shape, dtype):  # no two values so near that the largest could change
        return torch.randperm(math.prod(shape)).to(dtype).view(shape) / math.prod(shape)

    inputs, _ = make(case, mode, norm, batch=1, draw=draw)
    leaves = [x.requires_grad_() for x in inputs]
    fast = backend == "reference"  # whose gradients are PyTorch's
    assert torch.autograd.gradcheck(functools.partial(run, case, mode, backend), leaves, fast_mode=fast)


def test_the_reference_differentiates_twice():
    case = ((3, 4), (3, 3), 2, None, 1, 4, True)
    leaves = [x.requires_grad_() for x in make(case, "conv", True, batch=1)[0]]
    assert torch.autograd.gradgradcheck(functools.partial(run, case, "conv", "reference"), leaves, fast_mode=True)


@both
def test_only_the_gradients_that_are_asked_for(backend):
    case = CASES["3 x 3, stride 2"]
    inputs, cotangent = make(case, "conv", True)
    full = outputs_and_gradients(functools.partial(run, case, "conv", backend), inputs, cotangent)[1:]
    for i, expected in enumerate(full):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        run(case, "conv", backend, *leaves).backward(cotangent)
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(leaf.grad is None for j, leaf in enumerate(leaves) if j != i)


# pool_qkv


def pools(head_dim, kernel=(3, 3)):
    """Differing pools of queries, keys and values, and their parameters."""
    torch.manual_seed(1)
    weights = [torch.randn(head_dim, 1, *kernel, requires_grad=True) for _ in range(2)]
    norms = [torch.randn(head_dim, requires_grad=True) for _ in range(4)]
    q = Pool(weights[0], *norms[:2])
    k = Pool(weights[1], *norms[2:], stride=2)
    return (q, k, Pool(kernel=2, stride=2, mode="max")), [*weights, *norms]


@both
@pytest.mark.parametrize("absent", [(), (0,), (1, 2), (0, 1, 2)])
def test_pool_qkv_is_three_pools(absent, backend):
    chosen, parameters = pools(24)
    chosen = [None if i in absent else pool for i, pool in enumerate(chosen)]
    qkv = torch.randn(2, 31, 3, 2, 24, requires_grad=True)
    options = dict(thw=(5, 6), has_cls=True, eps=1e-3, backend=backend)
    got = pool_qkv(qkv, *chosen, **options)
    expected = []
    for x, pool in zip(qkv.unbind(2), chosen):
        if pool is None:
            expected.append((x, (5, 6)))
        else:
            weight, norm_weight, norm_bias, *geometry = pool
            names = ("stride", "kernel", "padding", "mode")
            expected.append(pool_tokens(x, weight, norm_weight, norm_bias, **dict(zip(names, geometry)), **options))
    cotangents = [torch.randn_like(out) for out, _ in expected]
    gradients = []
    for results in (got, expected):
        outs = [out for out, _ in results]
        gradients.append(torch.autograd.grad(outs, [qkv, *parameters], cotangents, allow_unused=True))
    for (a, size), (b, expected_size) in zip(got, expected):
        assert torch.equal(a, b) and size == expected_size
    for a, b in zip(*gradients):
        assert (a is None and b is None) or torch.equal(a, b)


# torch.library, compile, export, functional transforms, autocast


def raw(case, mode, dtype=torch.float32):
    """Arguments of the raw forward operator."""
    thw, kernel, stride, padding, *_, cls = case
    (x, *parameters), cotangent = make(case, mode, True)
    weight, *norm = parameters if mode == "conv" else (None, *parameters)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [weight if weight is None else weight.flatten(1).to(wide), *(w.to(wide) for w in norm)]
    axes = len(thw)
    stride = (stride,) * axes if isinstance(stride, int) else stride
    padding = tuple(k // 2 for k in kernel) if padding is None else padding
    fill = zip((thw, kernel, stride, padding), (1, 1, 1, 0))
    volume = [[one] * (3 - axes) + list(entries) for entries, one in fill]
    return [x.to(dtype), *parameters, *volume, mode == "max", cls, 1e-6], cotangent.to(dtype)


@needs_native
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    arguments, dout = raw(((4, 5), (3, 3), 2, None, 2, 24, True), mode)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.vitkernels
    torch.library.opcheck(ops.pool_tokens_forward.default, arguments, test_utils=utilities)
    dx = torch.zeros_like(arguments[0])
    torch.library.opcheck(ops.pool_tokens_backward.default, (dout, *arguments, dx), test_utils=utilities)


@needs_native
def test_the_raw_operators_refuse_what_does_not_fit():
    arguments, dout = raw(((4, 5), (3, 3), 2, None, 2, 24, True), "conv")
    forward, backward = torch.ops.vitkernels.pool_tokens_forward, torch.ops.vitkernels.pool_tokens_backward
    dx = torch.empty_like(arguments[0])
    spoiled = [
        (0, arguments[0].int(), "float32, float64, float16 or bfloat16"),
        (0, arguments[0][:, 1:], "the tokens of thw"),
        (0, arguments[0].transpose(2, 3).contiguous().transpose(2, 3), "unit stride"),
        (1, arguments[1].double(), "contiguous, float32"),
        (1, arguments[1][:, 1:].contiguous(), "contiguous, float32"),
        (2, None, "a weight and a bias"),
        (4, [4, 5], "an entry for time, height and width"),
        (5, [1, 7, 3], "the kernel at most the padded map"),
        (6, [1, 0, 1], "stride must be at least 1"),
        (7, [0, 2, 1], "padding at most half the kernel"),
        (8, True, "a maximum no weight"),
    ]
    for place, value, message in spoiled:
        wrong = [*arguments[:place], value, *arguments[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            forward(*wrong)
        with pytest.raises(RuntimeError, match=message):
            backward(dout, *wrong, dx)
    for wrong in ((dout[:, 1:], dx), (dout, dx[:1]), (dout, dx.half()), (dout.double(), dx)):
        with pytest.raises(RuntimeError, match="dx must be like x, dout like the output"):
            backward(wrong[0], *arguments, wrong[1])


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.compiler.reset()
    chosen, parameters = pools(16)

    def layer(qkv, *parameters):
        (q, _), (k, _), (v, _) = pool_qkv(qkv * 1.5, *chosen, thw=(5, 6))
        return torch.cat((q, k, v), 1).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        qkv = torch.randn(batch, 30, 3, 2, 16, requires_grad=True)
        results = []
        for function in (compiled, layer):
            out = function(qkv)
            results.append([out, *torch.autograd.grad(out.square().sum(), [qkv, *parameters])])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@both
def test_export(backend, tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.norm = nn.Conv3d(16, 16, 3, groups=16, bias=False), nn.LayerNorm(16)

        def forward(self, x):
            options = dict(thw=(2, 3, 4), stride=(1, 2, 2), has_cls=True, backend=backend)
            return pool_tokens(x, self.pool.weight, self.norm.weight, self.norm.bias, **options)[0]

    x, layer = torch.randn(2, 25, 2, 16), Layer()
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(loaded(x), layer(x))


@both
def test_func_grad(backend):
    case = CASES["3 x 3, stride 2"]
    inputs, _ = make(case, "conv", True)

    def loss(*inputs):
        return run(case, "conv", backend, *inputs).square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs), torch.autograd.grad(loss(*leaves), leaves)):
        torch.testing.assert_close(a, b)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    chosen, parameters = pools(24)
    qkv = torch.randn(2, 30, 3, 2, 24, requires_grad=True)
    x = qkv[:, :, 0]
    with torch.autocast("cpu", dtype):
        outs = [out for out, _ in pool_qkv(qkv, *chosen, thw=(5, 6), backend=backend)]
        alone, _ = pool_tokens(x, *chosen[0][:3], thw=(5, 6), backend=backend)
    expected = [out for out, _ in pool_qkv(qkv.to(dtype), *chosen, thw=(5, 6), backend=backend)]
    for a, b in zip([*outs, alone], [*expected, expected[0]]):
        assert a.dtype == dtype
        if backend == "cpu":
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b)
    gradients = torch.autograd.grad(sum(out.float().square().sum() for out in outs), [qkv, *parameters])
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    with torch.autocast("cpu", dtype):
        assert pool_tokens(x.double(), *chosen[0][:3], thw=(5, 6), backend=backend)[0].dtype == torch.float64


# vectors of every width, memory accesses

GUARDED = """
import torch
from guarded import guarded
from test_pool_tokens import raw
from vitkernels.pooled_attention.reference import pool_tokens as reference

run = torch.ops.vitkernels

def part_of(x, part, at):
    '''A third of a packed tensor, NaN around it.'''
    packed = x.new_full((*x.shape[:2], 3, *x.shape[2:]), float("nan"))
    packed[:, :, part] = x
    packed = guarded(packed, at)
    return packed, packed[:, :, part]

for thw, kernel, stride, head_dim, cls in [
    ((3, 4), (3, 3), 1, 1, False), ((4, 4), (3, 3), 2, 8, True), ((2, 9), (3, 3), 1, 12, False),
    ((5, 4), (2, 3), (3, 1), 19, True), ((2, 4, 5), (3, 3, 3), (1, 2, 2), 24, True), ((4, 7), (3, 3), 4, 72, False),
    ((3, 3), (1, 1), 2, 36, True), ((6, 8), (3, 3), 1, 96, False), ((3, 5), (5, 3), 1, 80, True),
]:
    for mode in ("conv", "max", "avg"):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            case = thw, kernel, stride, None, 2, head_dim, cls
            arguments, dout = raw(case, mode, dtype)
            leaves = [x.double().requires_grad_() for x in arguments[:4] if x is not None]
            given = leaves if mode == "conv" else [leaves[0], None, *leaves[1:]]
            out = reference(*given, *arguments[4:])
            exact = [out, *torch.autograd.grad(out, leaves, dout.double())]
            for at, part in (("start", 0), ("end", 2)):
                _, x = part_of(arguments[0], part, at)
                dqkv, dx = part_of(torch.zeros_like(arguments[0]), part, at)
                rest = [None if w is None else guarded(w, at) for w in arguments[1:4]]
                out = run.pool_tokens_forward(x, *rest, *arguments[4:])
                dweight, dnorm = run.pool_tokens_backward(guarded(dout, at), x, *rest, *arguments[4:], dx)
                got = [out, dx, *([dweight] if mode == "conv" else []), *dnorm]
                assert dqkv.isnan().sum() == dqkv.numel() // 3 * 2
                for a, b in zip(got, exact):
                    allowed = 200 * torch.finfo(a.dtype).eps * (1 + b.abs().max())
                    assert head_dim == 1 or (a.double() - b).abs().max() <= allowed, (case, mode, dtype)
print("untouched")
"""


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_every_vector_level_and_no_access_outside_the_tensors(level):
    if not supported(level):
        pytest.skip(f"this machine has no {level}")
    assert run_at(level, GUARDED) == "untouched"


# bad input

X = torch.randn(2, 20, 3, 24)
QKV = torch.randn(2, 20, 3, 3, 24)
W = torch.randn(24, 1, 3, 3)
B = torch.randn(24)
GRID = dict(thw=(4, 5))


@both
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda **o: pool_tokens([1], W, **GRID, **o),
            TypeError,
            r"x must be a torch.Tensor \[B, N, heads, head_dim\]",
        ),
        (lambda **o: pool_tokens(X[0], W, **GRID, **o), ValueError, r"got 3 dimensions: \[20, 3, 24\]"),
        (lambda **o: pool_tokens(X.int(), W, **GRID, **o), TypeError, "convert it first"),
        (lambda **o: pool_tokens(X.to_sparse(), W, **GRID, **o), TypeError, "x must be a dense tensor"),
        (lambda **o: pool_tokens(X[..., :0], W, **GRID, **o), ValueError, "head_dim must be at least 1, got 0"),
        (
            lambda **o: pool_tokens(X, W, thw=(4, 6), **o),
            ValueError,
            r"thw \(4, 6\) stands for 4 \* 6 = 24 tokens, x has 20",
        ),
        (
            lambda **o: pool_tokens(X, W, **GRID, has_cls=True, **o),
            ValueError,
            r"thw \(4, 5\) stands for 4 \* 5 \+ 1 class token = 21 tokens, x has 20",
        ),
        (
            lambda **o: pool_tokens(X[:, :0], W, **GRID, has_cls=True, **o),
            ValueError,
            "has_cls=True takes the first token of x as the class token, but x has no token",
        ),
        (lambda **o: pool_tokens(X, W, thw=20, **o), ValueError, r"thw must be \(H, W\) or \(T, H, W\), .* got 20"),
        (lambda **o: pool_tokens(X, W, thw=(1, 1, 4, 5), **o), ValueError, r"thw must be \(H, W\) or \(T, H, W\)"),
        (lambda **o: pool_tokens(X, W, thw=(4.0, 5), **o), TypeError, "thw must be a tuple of ints"),
        (lambda **o: pool_tokens(X, W, thw=(-4, -5), **o), ValueError, "thw must be at least 1 along every axis"),
        (lambda **o: pool_tokens(X, None, **GRID, **o), TypeError, "weight must be a torch.Tensor .* got NoneType"),
        (
            lambda **o: pool_tokens(X, W[:, :, :, None], **GRID, **o),
            ValueError,
            r"with 2 axes of the map, 4 dimensions, got \[24, 1, 3, 1, 3\]",
        ),
        (
            lambda **o: pool_tokens(X, W[:8], **GRID, **o),
            ValueError,
            r"weight must be \[24, 1, 3, 3\] for head_dim 24, got \[8, 1, 3, 3\]",
        ),
        (lambda **o: pool_tokens(X, W.expand(24, 24, 3, 3), **GRID, **o), ValueError, r"got \[24, 24, 3, 3\]"),
        (lambda **o: pool_tokens(X, W[..., :0], **GRID, **o), ValueError, "the kernel of weight must be at least 1"),
        (lambda **o: pool_tokens(X, W.int(), **GRID, **o), TypeError, "weight must be a floating-point tensor"),
        (lambda **o: pool_tokens(X, W.to("meta"), **GRID, **o), ValueError, "x and weight must be on one device"),
        (
            lambda **o: pool_tokens(X, W, kernel=5, **GRID, **o),
            ValueError,
            r"kernel 5 is not the size of weight, \(3, 3",
        ),
        (
            lambda **o: pool_tokens(X, torch.randn(24, 1, 7, 7), padding=1, **GRID, **o),
            ValueError,
            r"the kernel \(7, 7\) is larger than the padded map \(6, 7\) \(thw \(4, 5\), padding \(1, 1\)\)",
        ),
        (
            lambda **o: pool_tokens(X, W, stride=0, **GRID, **o),
            ValueError,
            "stride must be at least 1 along every axis",
        ),
        (lambda **o: pool_tokens(X, W, stride=(1, 2, 2), **GRID, **o), ValueError, "one entry for each of the 2 axes"),
        (lambda **o: pool_tokens(X, W, stride=1.5, **GRID, **o), TypeError, "stride must be an int or a tuple of ints"),
        (lambda **o: pool_tokens(X, W, stride=(True, 1), **GRID, **o), TypeError, "stride must be an int or a tuple"),
        (
            lambda **o: pool_tokens(X, W, padding=2, **GRID, **o),
            ValueError,
            r"padding must be at most half the kernel \(3, 3\) along every axis, got \(2, 2\)",
        ),
        (lambda **o: pool_tokens(X, W, padding=-1, **GRID, **o), ValueError, "padding must be at least 0"),
        (lambda **o: pool_tokens(X, W, B, **GRID, **o), ValueError, "give norm_weight and norm_bias, or neither"),
        (lambda **o: pool_tokens(X, W, None, B, **GRID, **o), ValueError, "give norm_weight and norm_bias, or neither"),
        (lambda **o: pool_tokens(X, W, B[:8], B, **GRID, **o), ValueError, r"norm_weight must be \[24\] .* got \[8\]"),
        (
            lambda **o: pool_tokens(X, W, B, 1.0, **GRID, **o),
            TypeError,
            "norm_bias must be a torch.Tensor .* got float",
        ),
        (
            lambda **o: pool_tokens(X, W, B, B.to("meta"), **GRID, **o),
            ValueError,
            "x and norm_bias must be on one device",
        ),
        (
            lambda **o: pool_tokens(X, W, mode="max", **GRID, **o),
            ValueError,
            "mode 'max' takes no weight; give the size of its window as kernel=",
        ),
        (lambda **o: pool_tokens(X, mode="avg", **GRID, **o), ValueError, "mode 'avg' needs the size of its window"),
        (lambda **o: pool_tokens(X, mode="max", kernel=0, **GRID, **o), ValueError, "kernel must be at least 1"),
        (
            lambda **o: pool_tokens(X, mode="min", **GRID, **o),
            ValueError,
            "mode must be one of conv, max, avg, got 'min'",
        ),
        (
            lambda **o: pool_qkv(X, None, None, None, **GRID, **o),
            ValueError,
            r"qkv must be \[B, N, 3, heads, head_dim\]",
        ),
        (
            lambda **o: pool_qkv(QKV[:, :, :2], None, None, None, **GRID, **o),
            ValueError,
            "got .* with 2 where 3 is expected",
        ),
        (
            lambda **o: pool_qkv(QKV, None, None, None, thw=(5, 5), **o),
            ValueError,
            r"thw \(5, 5\) stands for 5 \* 5 = 25 tokens, qkv has 20",
        ),
        (
            lambda **o: pool_qkv(QKV, None, Pool(kernel=3, mode="sum"), None, **GRID, **o),
            ValueError,
            "mode must be one of conv, max, avg, got 'sum'",
        ),
        (
            lambda **o: pool_qkv(QKV, None, W, None, **GRID, **o),
            TypeError,
            r"pool_k must be a vitkernels\.Pool, or None to hand tokens on, got Tensor",
        ),
    ],
)
def test_bad_input(call, error, message, backend):
    with pytest.raises(error, match=message):
        call(backend=backend)


def test_backends_are_refused_with_a_reason():
    with pytest.raises(RuntimeError, match="cuda cannot run pool_tokens: it has no kernels for that"):
        pool_tokens(X, W, **GRID, backend="cuda")
    with pytest.raises(RuntimeError, match="cpu cannot run pool_tokens: .*takes CPU tensors, got meta|was not built"):
        pool_tokens(X.to("meta"), W.to("meta"), **GRID, backend="cpu")
