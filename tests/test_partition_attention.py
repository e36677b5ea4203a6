"""Partition attention: the reference against a token-by-token restatement, every backend against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_graph_replays, sparse
from contract import assert_contract, outputs_and_gradients

import vitkernels
from vitkernels import Partition, partition_attention, partition_attention_qkvpacked

cpu = pytest.param(
    "cpu", marks=pytest.mark.skipif(not vitkernels._native.cpu.available, reason=str(vitkernels._native.cpu.reason))
)
gpu = pytest.param(
    "triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
compiled = pytest.mark.parametrize("backend", [cpu, gpu])
DEVICE = {"cpu": "cpu", "triton": "cuda"}

# partition, height, width, heads, head_dim: every size by its role
CASES = {
    "window 7x7, two by two": (Partition.window(7), 14, 14, 2, 32),
    "one group": (Partition.window(7), 7, 7, 3, 32),
    "one token in a group": (Partition.window(1), 3, 2, 1, 8),
    "15 tokens": (Partition.window((3, 5)), 7, 11, 2, 16),
    "16 tokens, CrossFormer++": (Partition.long(4, 4), 20, 18, 2, 32),
    "17 tokens": (Partition.window((17, 1)), 17, 3, 2, 24),
    "63 tokens": (Partition.window((7, 9)), 14, 10, 1, 32),
    "64 tokens": (Partition.grid(8), 16, 16, 2, 32),
    "65 tokens": (Partition.window((5, 13)), 10, 13, 1, 32),
    "100 tokens": (Partition.window(10), 20, 12, 2, 64),
    "144 tokens, one head of 96": (Partition.window(12), 12, 24, 1, 96),
    "196 tokens, head_dim 72": (Partition.window(14), 14, 14, 2, 72),
    "256 tokens": (Partition.window(16), 16, 16, 1, 128),
    "long distance": (Partition.long(7, 2), 28, 14, 2, 32),
    "long distance, groups wholly outside": (Partition.long(7, 3), 22, 8, 2, 32),
    "grid that does not divide": (Partition.grid(7), 17, 23, 2, 32),
    "interval only": (Partition.interval_only(4), 13, 30, 2, 32),
    "stripes": (Partition.stripes(3, vertical=True), 14, 10, 2, 24),
    "shifted": (Partition.window(7, 3), 21, 14, 3, 32),
    "shifted on one axis, rectangular": (Partition.window((4, 6), (0, 5)), 8, 12, 2, 40),
    "shifted with an interval": (Partition(3, 2, (1, 4)), 12, 6, 2, 32),
    "map smaller than the group": (Partition.window(7), 3, 2, 2, 32),
}


def make(partition, height, width, heads, head_dim, batch=2, seed=0):
    """q, k, v, table and an output gradient, float64."""
    torch.manual_seed(seed)
    gh, gw = partition.on(height, width).group
    q, k, v, cotangent = torch.randn(4, batch, height, width, heads, head_dim, dtype=torch.float64)
    return [q, k, v, torch.randn(heads, 2 * gh - 1, 2 * gw - 1, dtype=torch.float64)], cotangent


def run(partition, backend, q, k, v, bias):
    return partition_attention(q, k, v, partition, bias, backend=backend)


def token_by_token(partition, q, k, v, bias):
    """Attention of one token at a time over the tokens that share its group, from the partition's index alone."""
    batch, height, width, heads, head_dim = q.shape
    partition = partition.on(height, width)
    index, gw = partition.index(height, width), partition.group[1]
    over = partition.wrapped(height, width)
    flat_q, flat_k, flat_v = (x.reshape(batch, height * width, heads, head_dim) for x in (q, k, v))
    out = torch.zeros_like(flat_q)
    for group, wrapped in zip(index.tolist(), over.tolist()):
        inside = [t for t, raster in enumerate(group) if raster >= 0]
        for t in inside:
            logits = []
            for s in inside:
                dy, dx = t // gw - s // gw, t % gw - s % gw
                logit = (flat_q[:, group[t]] * flat_k[:, group[s]]).sum(-1) * head_dim**-0.5
                logit = logit + bias[:, dy + partition.group[0] - 1, dx + gw - 1]
                logits.append(logit - 100.0 * (wrapped[t] != wrapped[s]))
            weights = torch.stack(logits, -1).softmax(-1)  # [B, heads, keys]
            values = flat_v[:, [group[s] for s in inside]]  # [B, keys, heads, head_dim]
            out[:, group[t]] = torch.einsum("bhk,bkhd->bhd", weights, values)
    return out.view_as(q)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c[1] * c[2] <= 200])
def test_reference_equals_token_by_token(name):
    inputs, _ = make(*CASES[name])
    torch.testing.assert_close(run(CASES[name][0], "reference", *inputs), token_by_token(CASES[name][0], *inputs))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_contract(name, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("compiled Triton has no float64 products")
    partition = CASES[name][0]
    inputs, cotangent = make(*CASES[name])
    ours, reference = (functools.partial(run, partition, b) for b in (backend, "reference"))
    assert_contract(ours, reference, inputs, cotangent, dtype, tables=(3,), device=DEVICE[backend])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract_packed(dtype, backend):
    inputs, cotangent = make(Partition.long(7, 2), 15, 30, 3, 32)
    packed = [torch.stack(inputs[:3], 3), inputs[3]]
    ours, reference = (
        lambda qkv, bias, b=b: partition_attention_qkvpacked(qkv, Partition.long(7, 2), bias, backend=b)
        for b in (backend, "reference")
    )
    assert_contract(ours, reference, packed, cotangent, dtype, tables=(1,), device=DEVICE[backend])


@compiled
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5, None])
def test_contract_without_bias_and_with_scale(scale, backend):
    partition = Partition.window(7, 2)
    inputs, cotangent = make(partition, 14, 7, 2, 32)
    ours, reference = (
        lambda q, k, v, b=b: partition_attention(q, k, v, partition, scale=scale, backend=b)
        for b in (backend, "reference")
    )
    assert_contract(ours, reference, inputs[:3], cotangent, torch.float32, device=DEVICE[backend])


@compiled
def test_strides(backend):
    """Head-major packing, a transposed map, a broadcast key, a last dimension that is not contiguous."""
    partition, device = Partition.window((3, 4)), DEVICE[backend]
    torch.manual_seed(0)
    packed = torch.randn(2, 9, 8, 2, 3, 16, device=device)  # [B, H, W, heads, 3, head_dim]
    q, k, v = packed.unbind(4)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    for triple in ((q, k, v), (q, k[:, :1, :1].expand_as(q), v)):
        expected = partition_attention(*triple, partition, backend="reference")
        torch.testing.assert_close(partition_attention(*triple, partition, backend=backend), expected)


@compiled
def test_one_hot_softmax_gathers_exactly(backend):
    """A table that leaves one offset per query makes attention a gather: bit-equal."""
    partition, device = Partition.window(7), DEVICE[backend]
    for offset in ((0, 0), (3, -2)):
        bias = torch.full((2, 13, 13), -1e30, device=device)
        bias[:, offset[0] + 6, offset[1] + 6] = 0
        q = torch.zeros(1, 7, 7, 2, 32, device=device)
        v = torch.randn(1, 7, 7, 2, 32, device=device)
        out = partition_attention(q, q, v, partition, bias, backend=backend)
        y, x = torch.arange(7) - offset[0], torch.arange(7) - offset[1]
        keep_y, keep_x = (0 <= y) & (y < 7), (0 <= x) & (x < 7)
        assert torch.equal(out[:, keep_y][:, :, keep_x], v[:, y[keep_y]][:, :, x[keep_x]])


@compiled
def test_small_integers_are_exact(backend):
    """Equal logits over 4 or 16 keys: every weight is a power of two, so sums of small integers are exact."""
    device = DEVICE[backend]
    v = torch.randint(-8, 9, (2, 8, 12, 2, 16), device=device).float()
    q = torch.randint(-4, 5, v.shape, device=device).float()
    k = torch.zeros_like(v)
    for group in (2, 4):
        out = partition_attention(q, k, v, Partition.window(group), backend=backend)
        assert torch.equal(out, partition_attention(q, k, v, Partition.window(group), backend="reference"))


@compiled
@pytest.mark.parametrize("partition", [Partition.window(7), Partition.window(10), Partition.long(4, 2)])
def test_nan_stays_in_its_group(partition, backend):
    inputs, cotangent = make(partition, 20, 20, 2, 32, batch=1)
    inputs = [x.float().to(DEVICE[backend]) for x in inputs]
    clean = outputs_and_gradients(functools.partial(run, partition, backend), inputs[:4], cotangent.to(DEVICE[backend]))
    for which in range(3):
        spoiled = [x.clone() for x in inputs]
        spoiled[which][0, 5, 6, 1, 3] = float("nan")
        got = outputs_and_gradients(functools.partial(run, partition, backend), spoiled, cotangent.to(DEVICE[backend]))
        index = partition.on(20, 20).index(20, 20)
        group = index[(index == 5 * 20 + 6).any(1)][0]
        touched = torch.zeros(400, dtype=torch.bool)
        touched[group[group >= 0]] = True
        touched = touched.view(1, 20, 20).to(DEVICE[backend])
        for a, b in zip(got[:4], clean[:4]):
            assert torch.equal(a[~touched], b[~touched])
            assert torch.equal(a[..., 0, :], b[..., 0, :]), "and in its head"
        assert got[0][touched][:, 1].isnan().any()


BLIND = {  # partition, height, width; the last: groups wholly outside the map
    "one tile": (Partition.window(4), 6, 7),
    "streamed": (Partition.window((9, 8)), 10, 9),
    "shifted": (Partition.window(4, 2), 8, 8),
    "dilated": (Partition.long(3, (2, 4)), 7, 13),
}


def attend_blindly(partition, height, width, dtype, filling, attend):
    """Output and gradients with a bias of one value but for offset (0, 0) of the second head, whose bias is 0."""
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, height, width, 3, 2, 8, generator=draw).to(dtype)
    gh, gw = partition.group
    bias = torch.full((2, 2 * gh - 1, 2 * gw - 1), filling)
    bias[1, gh - 1, gw - 1] = 0
    return outputs_and_gradients(
        lambda qkv, bias: attend(*qkv.unbind(3), partition, bias), [qkv, bias], qkv[..., 0, :, :]
    ), qkv


def assert_blind(results, qkv, filling):
    """A head that sees nothing gives 0; one that sees the query's own place gives its value."""
    out, dqkv, dbias = results
    assert torch.equal(out[..., 1, :].cpu(), qkv[..., 2, 1, :]), "only the query's own place has weight"
    assert out.isfinite().all() and dqkv.isfinite().all() and dbias.isfinite().all()
    if filling == -torch.inf:
        assert not out[..., 0, :].any() and not dqkv[..., 0, :].any() and not dbias[0].any()


@pytest.mark.parametrize("filling", [-torch.inf, torch.finfo(torch.float32).min], ids=["-inf", "lowest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BLIND)
@pytest.mark.parametrize("backend", [cpu, gpu, "reference"])
def test_blind_queries(case, dtype, filling, backend):
    def attend(q, k, v, partition, bias):
        q, k, v, bias = (x.to(DEVICE.get(backend, "cpu")) for x in (q, k, v, bias))
        return partition_attention(q, k, v, partition, bias, backend=backend)

    results, qkv = attend_blindly(*BLIND[case], dtype, filling, attend)
    assert_blind(results, qkv, filling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [cpu, gpu, "reference"])
def test_the_lowest_bias_gives_no_weight_to_places_outside(backend, dtype):
    qkv = torch.ones(1, 8, 8, 3, 1, 8, dtype=dtype, device=DEVICE.get(backend, "cpu"))
    for partition in (Partition.window(7), Partition.window((9, 10))):
        gh, gw = partition.group
        bias = torch.full((1, 2 * gh - 1, 2 * gw - 1), torch.finfo(torch.float32).min, device=qkv.device)
        out = partition_attention_qkvpacked(qkv, partition, bias, backend=backend)
        torch.testing.assert_close(out, torch.ones_like(out))


@compiled
@pytest.mark.parametrize("shape", [(0, 7, 7, 2, 32), (2, 0, 7, 2, 32), (2, 7, 0, 2, 32), (2, 7, 7, 0, 32)])
@pytest.mark.parametrize("chosen", [None, "reference"])
@pytest.mark.parametrize("shift", [0, 3])
def test_empty_inputs(shape, shift, chosen, backend):
    device = DEVICE[backend]
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(shape[3], 13, 13, device=device, requires_grad=True)
    out = partition_attention(q, k, v, Partition.window(7, shift), bias, backend=chosen)
    out.sum().backward()
    assert out.shape == shape and q.grad.shape == shape and bias.grad.eq(0).all()


@compiled
@pytest.mark.parametrize("partition", [Partition.window(7, 3), Partition.long(10, 2), Partition.long(4, 3)])
def test_same_bits_every_time(partition, backend):
    device = DEVICE[backend]
    size = 14 if partition.shift != (0, 0) else 33
    inputs, cotangent = make(partition, size, size, 2, 32, batch=3)
    inputs, cotangent = [x.float().to(device) for x in inputs], cotangent.float().to(device)
    first = outputs_and_gradients(functools.partial(run, partition, backend), inputs, cotangent)
    for _ in range(20):
        again = outputs_and_gradients(functools.partial(run, partition, backend), inputs, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("backend", [cpu])
@pytest.mark.parametrize(
    "partition, height, width",
    [(Partition.long(3, 2), 7, 8), (Partition.window(4, 1), 8, 4), (Partition.window((3, 22)), 3, 22)],
)
def test_gradcheck(partition, height, width, backend):
    inputs, _ = make(partition, height, width, 2, 8, batch=1)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(functools.partial(run, partition, backend), leaves, fast_mode=True)


def test_the_reference_differentiates_twice():
    inputs, _ = make(Partition.window(2), 3, 4, 1, 4, batch=1)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(
        functools.partial(run, Partition.window(2), "reference"), leaves, fast_mode=True
    )


@compiled
@pytest.mark.parametrize("ask", [lambda g, x: g.sum().backward(), lambda g, x: torch.autograd.grad(g.sum(), x)])
def test_a_second_derivative_is_refused(backend, ask):
    x = torch.randn(1, 7, 7, 3, 2, 32, device=DEVICE[backend], requires_grad=True)
    out = partition_attention_qkvpacked(x, Partition.window(7), backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="kernels have first derivatives only"):
        ask(gradient, x)


@compiled
def test_more_than_65535_groups(backend):
    device = DEVICE[backend]
    q, k, v = torch.randn(3, 17, 128, 62, 1, 8, device=device)
    partition = Partition.window((1, 2))
    assert 17 * len(partition.index(128, 62)) > 65535
    out = partition_attention(q, k, v, partition, backend=backend)
    torch.testing.assert_close(out, partition_attention(q, k, v, partition, backend="reference"))


@compiled
def test_no_score_matrix_in_memory(backend):
    """No single allocation of forward and backward comes near groups x N x N."""
    device = DEVICE[backend]
    partition, heads = Partition.window(8), 4
    qkv = torch.randn(4, 64, 64, 3, heads, 8, device=device, requires_grad=True)
    bias = torch.randn(heads, 15, 15, device=device, requires_grad=True)
    scores = 4 * 64 * heads * 64 * 64 * 4  # bytes
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        partition_attention_qkvpacked(qkv, partition, bias, backend=backend).sum().backward()
    kind = "self_device_memory_usage" if device == "cuda" else "self_cpu_memory_usage"
    largest = max(getattr(event, kind) for event in profile.events())
    assert qkv.numel() * 4 <= largest < scores / 2


@compiled
def test_a_group_larger_than_the_map_costs_no_more_than_the_map(backend):
    device = DEVICE[backend]
    q, k, v = torch.randn(3, 2, 5, 6, 2, 16, device=device)
    expected = partition_attention(q, k, v, Partition.window((5, 6)), backend="reference")
    for partition in (Partition.window(10**9), Partition.long((5, 10**9), (1, 1))):
        torch.testing.assert_close(partition_attention(q, k, v, partition, backend=backend), expected)
    torch.testing.assert_close(partition_attention(q, k, v, Partition.long(7, 10**9), backend=backend), v)


# torch.library, compile, export, functional transforms, autocast


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend):
    device = DEVICE[backend]
    q, k, v = (torch.randn(1, 8, 7, 2, 16, device=device, dtype=dtype) for _ in range(3))
    bias = torch.randn(2, 7, 7, device=device)
    geometry = (4, 4, 2, 1, 0, 0)
    ops = torch.ops.vitkernels
    arguments = (q, k, v, bias, [], False, geometry, 0.25)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.partition_attention_forward.default, arguments, test_utils=utilities)
    statistic = ops.partition_attention_forward(*arguments)[1]
    arguments = (q, q, k, v, bias, [], False, statistic, geometry, 0.25)
    torch.library.opcheck(ops.partition_attention_backward.default, arguments, test_utils=utilities)


@compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend):
    device = DEVICE[backend]
    torch.compiler.reset()

    def layer(qkv, bias):
        return vitkernels.window_attention(qkv * 1.5, bias, window_size=4, shift=1).relu()

    compiled_layer = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        qkv, bias = torch.randn(batch, 8, 12, 3, 2, 16, device=device), torch.randn(2, 7, 7, device=device)
        cotangent = torch.randn(batch, 8, 12, 2, 16, device=device)
        expected = outputs_and_gradients(layer, (qkv, bias), cotangent)
        for a, b in zip(outputs_and_gradients(compiled_layer, (qkv, bias), cotangent), expected):
            torch.testing.assert_close(a, b)


@compiled
def test_export(backend, tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, qkv, bias):
            return vitkernels.lsda_attention(qkv, bias, group_size=3, interval=2)

    device = DEVICE[backend]
    inputs = torch.randn(2, 7, 8, 3, 2, 16, device=device), torch.randn(2, 5, 5, device=device)
    program = torch.export.export(Layer(), inputs)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(loaded(*inputs), Layer()(*inputs))


@compiled
def test_func_grad(backend):
    device = DEVICE[backend]
    qkv, bias = torch.randn(1, 7, 7, 3, 2, 16, device=device), torch.randn(2, 13, 13, device=device)

    def loss(qkv, bias):
        return partition_attention_qkvpacked(qkv, Partition.window(7), bias, backend=backend).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(qkv, bias)
    leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves)):
        torch.testing.assert_close(a, b)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """q, k and v follow autocast, the table keeps float32 and gets a float32 gradient."""
    device = DEVICE[backend]
    qkv = torch.randn(2, 7, 7, 3, 2, 32, device=device, requires_grad=True)
    bias = torch.randn(2, 13, 13, device=device, requires_grad=True)
    with torch.autocast(device, dtype):
        out = partition_attention_qkvpacked(qkv, Partition.window(7), bias, backend=backend)
    assert out.dtype == dtype
    low = partition_attention_qkvpacked(qkv.to(dtype), Partition.window(7), bias, backend=backend)
    assert torch.equal(out, low)
    out.float().sum().backward()
    assert qkv.grad.dtype == torch.float32 and bias.grad.dtype == torch.float32


@compiled
@pytest.mark.parametrize(
    "strides", [(2**31 + 8, 128, 32, 16), (512, 2**30, 32, 16), (512, 128, 2**30 + 8, 16), (512, 128, 32, 2**31)]
)
def test_addresses_past_2_31_elements(strides, backend):
    near = torch.randn(3, 2, 3, 3, 2, 8).half()
    far = []
    for x in near:
        storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1))), DEVICE[backend])
        far.append(storage.as_strided(x.shape, (*strides, 1)).copy_(x))
    results = []
    for qkv in (near.to(DEVICE[backend]).unbind(0), far):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = partition_attention(*leaves, Partition.long(2, 2), backend=backend)
        results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group", [7, 14])
def test_cuda_graph(group):
    qkv = torch.randn(2, 14, 14, 3, 2, 32, device="cuda", requires_grad=True)
    bias = torch.randn(2, 2 * group - 1, 2 * group - 1, device="cuda", requires_grad=True)

    def step():
        out = vitkernels.window_attention(qkv, bias, window_size=group)
        return out, *torch.autograd.grad(out.square().sum(), (qkv, bias))

    assert_graph_replays(step, qkv)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tf32_is_used_where_it_is_allowed_and_only_there():
    inputs, _ = make(Partition.window(7), 14, 14, 2, 32)
    exact = run(Partition.window(7), "reference", *inputs)
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        out = run(Partition.window(7), "triton", *(x.float().cuda() for x in inputs))
        errors[precision] = (out.cpu().double() - exact).abs().max() / exact.abs().max()
    torch.set_float32_matmul_precision("highest")
    assert errors["highest"] < 2e-6 < errors["high"] < 5e-3


# bad input

Q = torch.randn(2, 14, 14, 3, 32)
QKV = torch.randn(2, 14, 14, 3, 3, 32)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: partition_attention([1], Q, Q, Partition(7)),
            TypeError,
            r"q must be a torch.Tensor \[B, H, W, heads, head_dim\], got list",
        ),
        (
            lambda: partition_attention(Q[0], Q, Q, Partition(7)),
            ValueError,
            r"q must be \[B, H, W, heads, head_dim\], got 4 dimensions: \[14, 14, 3, 32\]",
        ),
        (
            lambda: partition_attention(Q, Q[:1], Q, Partition(7)),
            ValueError,
            r"one shape, got q \[2, 14, 14, 3, 32\] and k \[1, 14",
        ),
        (
            lambda: partition_attention(Q, Q, Q.double(), Partition(7)),
            TypeError,
            "one dtype, got q torch.float32 and v torch.float64",
        ),
        (lambda: partition_attention(Q, Q.to("meta"), Q, Partition(7)), ValueError, "one device, got cpu and meta"),
        (
            lambda: partition_attention(Q.int(), Q, Q, Partition(7)),
            TypeError,
            "q must be one of float32, float64, float16, bfloat16, got int32; convert",
        ),
        (lambda: partition_attention(Q, Q, Q, 7), TypeError, "partition must be a vitkernels.Partition, got int"),
        (
            lambda: partition_attention(Q, Q, Q, Partition(7), torch.randn(3, 7, 13)),
            ValueError,
            r"= \[3, 13, 13\] for 3 heads and groups of 7 x 7 tokens, got \[3, 7, 13\]",
        ),
        (
            lambda: partition_attention(Q, Q, Q, Partition(7), torch.randn(3, 169)),
            ValueError,
            r"bias must be \[heads, 2 .* = \[3, 13, 13\] .* got \[3, 169\]: bias.unflatten\(1, \(13, 13\)\)$",
        ),
        (
            lambda: partition_attention(Q, Q, Q, Partition(7), torch.randn(169, 3)),
            ValueError,
            r"got \[169, 3\], which is how Swin stores it: bias.t\(\).unflatten\(1, \(13, 13\)\)$",
        ),
        (
            lambda: partition_attention(Q, Q, Q, Partition(7), torch.randn(3, 49, 49)),
            ValueError,
            r"got \[3, 49, 49\]; that is a bias for each pair of tokens, expected one for each offset",
        ),
        (
            lambda: vitkernels.window_attention(Q, Q, Q, 7),
            TypeError,
            r"window_attention takes qkv, bias by position .* got 4 .* torch.stack\(\(q, k, v\), -3\); sizes are given",
        ),
        (
            lambda: partition_attention_qkvpacked(Q, Q, Q, Partition(7)),
            TypeError,
            "partition_attention_qkvpacked takes qkv, partition, bias by position",
        ),
        (
            lambda: vitkernels.feature_space_attention(*[Q.flatten(1, 2)] * 3),
            TypeError,
            "feature_space_attention takes qkv by position",
        ),
        (
            lambda: vitkernels.window_attention(QKV, 7),
            TypeError,
            r"bias must be a torch.Tensor \[heads, .*\] or None, got 7; sizes are given by name",
        ),
        (
            lambda: partition_attention(Q, Q, Q, Partition(7), torch.zeros(3, 13, 13, device="meta")),
            ValueError,
            "q and bias must be on one device",
        ),
        (
            lambda: partition_attention(Q.to_sparse(), Q, Q, Partition(7)),
            TypeError,
            "q must be a dense tensor, got torch.sparse_coo",
        ),
        (lambda: partition_attention(*[Q[..., :0]] * 3, Partition(7)), ValueError, "head_dim must be at least 1"),
        (lambda: partition_attention(Q, Q, Q, Partition(7), scale="big"), TypeError, "scale must be a number or None"),
        (lambda: partition_attention(Q, Q, Q, Partition(7), scale=float("nan")), ValueError, "scale must be finite"),
        (
            lambda: partition_attention(Q, Q, Q, Partition(7), backend="fast"),
            ValueError,
            "backend must be one of triton, cuda, cpu, sdpa, reference or None, got 'fast'",
        ),
        (
            lambda: partition_attention_qkvpacked(Q, Partition(7)),
            ValueError,
            r"qkv must be \[B, H, W, 3, heads, head_dim\], got 5 dimensions",
        ),
        (
            lambda: partition_attention_qkvpacked(QKV[:, :, :, :2], Partition(7)),
            ValueError,
            "with 2 where 3 is expected; view the projection's output as",
        ),
        (lambda: vitkernels.lsda_attention(QKV, group_size=0), ValueError, "group must be at least 1"),
        (lambda: vitkernels.lsda_attention(QKV, interval=-2), ValueError, "interval must be at least 1"),
        (
            lambda: vitkernels.window_attention(QKV, window_size=4, shift=2),
            ValueError,
            r"multiple of group \* interval: got a 14 x 14 map",
        ),
        (lambda: vitkernels.block_attention(QKV, block_size=7.5), TypeError, "group must be an int"),
        (lambda: vitkernels.grid_attention(QKV, torch.zeros(13, 13)), ValueError, "bias must be"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_forced_backend_refuses_and_says_why(monkeypatch):
    library = vitkernels._native.Library
    monkeypatch.setattr(vitkernels._native, "cpu", library(object(), ""))
    with pytest.raises(
        RuntimeError, match="cpu cannot run partition_attention: .*meta.*backend='reference' runs anywhere"
    ):
        x = Q.to("meta")
        partition_attention(x, x, x, Partition(7), backend="cpu")
    monkeypatch.setattr(vitkernels._native, "cpu", library(None, "it was not built"))
    with pytest.raises(RuntimeError, match="cpu cannot run partition_attention: it was not built"):
        partition_attention(Q, Q, Q, Partition(7), backend="cpu")
    expected = partition_attention(Q, Q, Q, Partition(7), backend="reference")
    assert torch.equal(partition_attention(Q, Q, Q, Partition(7)), expected), (
        "a CPU without the library runs the reference"
    )


@pytest.fixture
def rocm(monkeypatch):
    """A build of torch for AMD GPUs, which stand as CUDA devices there."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_amd_gpus_run_the_reference_visibly(rocm):
    device = torch.device("cuda", 0)
    for gpu in ("triton", "cuda"):
        assert vitkernels._dispatch.select("an operator", device, None, gpu=gpu) == "reference"
    with pytest.raises(RuntimeError, match="triton cannot run an operator: .*NVIDIA.*ROCm.*backend='reference'"):
        vitkernels._dispatch.select("an operator", device, "triton")
    with vitkernels.use_backend("triton"), pytest.raises(RuntimeError, match="ROCm"):
        vitkernels._dispatch.select("an operator", device, None)
    found = vitkernels.info()
    assert "ROCm 7.0" in found["torch"] and "absent: " in found["backend triton"] and "ROCm" in found["backend triton"]
    assert "AMD" in found["backend reference"]


def test_info_names_every_backend_and_why_one_is_absent():
    found = vitkernels.info()
    assert {"vitkernels", "torch", "backend triton", "backend cpu", "backend reference"} <= set(found)
    assert all(value.startswith(("available", "absent: ")) for key, value in found.items() if key.startswith("backend"))
    assert str(found).count("\n") == len(found) - 1
