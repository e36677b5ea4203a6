"""Cluster attention: the reference leaf by leaf, every backend against the reference, feature_space_attention."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_graph_replays, sparse
from contract import assert_blind, assert_contract, blind_inputs, outputs_and_gradients

import vitkernels
from vitkernels import balanced_clusters, cluster_attention, feature_space_attention
from vitkernels.tree import Tree

cpu = pytest.param(
    "cpu", marks=pytest.mark.skipif(not vitkernels._native.cpu.available, reason=str(vitkernels._native.cpu.reason))
)
gpu = pytest.param(
    "triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
compiled = pytest.mark.parametrize("backend", [cpu, gpu])
DEVICE = {"cpu": "cpu", "triton": "cuda", "reference": "cpu"}

# tokens, heads, head_dim, leaf_size, overlap: every size by its role
CASES = {
    "four leaves of 49": (196, 2, 32, 49, 20),
    "leaves of 49 and 50": (199, 2, 32, 49, 20),
    "16 leaves of 49": (784, 1, 32, 49, 20),
    "one leaf": (49, 3, 32, 49, 20),
    "one leaf of 97, nothing to borrow from": (97, 2, 16, 49, 60),
    "one token": (1, 1, 8, 49, 20),
    "leaves of one token": (8, 2, 24, 1, 1),
    "leaves of one and two tokens, no overlap": (13, 2, 16, 1, 0),
    "15 and 16 tokens": (123, 2, 40, 15, 15),
    "64 tokens": (128, 1, 64, 64, 64),
    "65 tokens": (130, 1, 32, 65, 1),
    "72 tokens": (288, 2, 72, 49, 20),
    "a head of 96": (98, 1, 96, 49, 49),
    "a head of 128": (100, 1, 128, 25, 7),
    "a long leaf": (411, 1, 16, 400, 20),
}


def make(tokens, heads, head_dim, leaf_size, overlap, batch=2):
    """q, k, v, a random order, an output gradient, float64."""
    torch.manual_seed(0)
    q, k, v, cotangent = torch.randn(4, batch, tokens, heads, head_dim, dtype=torch.float64)
    return [q, k, v], torch.rand(batch, heads, tokens).argsort(-1).int(), cotangent


def run(order, leaf_size, overlap, backend, q, k, v):
    order = order.to(q.device)
    return cluster_attention(q, k, v, order, leaf_size=leaf_size, overlap=overlap, backend=backend)


def leaf_by_leaf(q, k, v, order, leaf_size, overlap):
    """Attention of one leaf of one head at a time, keys by the places of the order."""
    batch, tokens, heads, head_dim = q.shape
    tree = Tree.of(tokens, leaf_size)
    bounds, out = tree.bounds(tree.levels).tolist(), torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for leaf, (first, last) in enumerate(zip(bounds, bounds[1:])):
                start, stop = (first, last + overlap) if leaf % 2 == 0 else (first - overlap, last)
                if tree.levels == 0:
                    start, stop = first, last
                queries, keys = order[b, h, first:last].long(), order[b, h, start:stop].long()
                logits = q[b, queries, h] @ k[b, keys, h].T * head_dim**-0.5
                out[b, queries, h] = logits.softmax(-1) @ v[b, keys, h]
    return out


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_leaf_by_leaf(name):
    inputs, order, _ = make(*CASES[name])
    expected = leaf_by_leaf(*inputs, order, *CASES[name][3:])
    torch.testing.assert_close(run(order, *CASES[name][3:], "reference", *inputs), expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_contract(name, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("compiled Triton has no float64 products")
    inputs, order, cotangent = make(*CASES[name])
    ours, reference = (functools.partial(run, order, *CASES[name][3:], b) for b in (backend, "reference"))
    assert_contract(ours, reference, inputs, cotangent, dtype, device=DEVICE[backend])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract_packed(dtype, backend):
    inputs, order, cotangent = make(199, 3, 32, 49, 20)
    ours, reference = (
        lambda qkv, b=b: feature_space_attention(qkv, order=order.to(qkv.device), backend=b)
        for b in (backend, "reference")
    )
    assert_contract(ours, reference, [torch.stack(inputs, 2)], cotangent, dtype, device=DEVICE[backend])


@compiled
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, None])
def test_contract_with_scale(scale, backend):
    inputs, order, cotangent = make(101, 2, 32, 12, 5)

    def ours(q, k, v, b=backend):
        return cluster_attention(q, k, v, order.to(q.device), leaf_size=12, overlap=5, scale=scale, backend=b)

    reference = functools.partial(ours, b="reference")
    assert_contract(ours, reference, inputs, cotangent, torch.float32, device=DEVICE[backend])


@compiled
def test_strides_and_orders(backend):
    """Head-major packing, a broadcast key, a last dimension that is not contiguous; shared and strided orders."""
    device = DEVICE[backend]
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 100, 2, 3, 16, device=device).unbind(3)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    shared = torch.rand(2, 1, 100, device=device).argsort(-1)
    strided = torch.rand(2, 100, 2, device=device).argsort(1).transpose(1, 2).int()
    for triple in ((q, k, v), (q, k[:, :1].expand_as(q), v)):
        for order in (shared, shared.int(), strided):
            expected = cluster_attention(*triple, order, leaf_size=12, overlap=5, backend="reference")
            got = cluster_attention(*triple, order, leaf_size=12, overlap=5, backend=backend)
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("leaf_size", [8, 100])
@pytest.mark.parametrize("backend", [cpu, gpu, "reference"])
def test_a_blind_query(leaf_size, backend):
    inputs = [x.to(DEVICE[backend]) for x in blind_inputs(1, 100, 2, 8)]
    order = torch.arange(100, dtype=torch.int32, device=DEVICE[backend]).expand(1, 2, -1)
    arguments = dict(leaf_size=leaf_size, overlap=3, backend=backend)
    attend = functools.partial(cluster_attention, order=order, **arguments)
    assert_blind(*outputs_and_gradients(attend, inputs, inputs[2]))


@compiled
def test_one_hot_softmax_gathers_exactly(backend):
    """A key that only its own query meets makes attention the identity: bit-equal."""
    device = DEVICE[backend]
    torch.manual_seed(0)
    order = torch.rand(1, 2, 64).argsort(-1).int().to(device)
    q = 1e4 * torch.eye(64, device=device)[None, :, None].expand(1, 64, 2, 64).contiguous()
    v = torch.randn(1, 64, 2, 64, device=device)
    assert torch.equal(cluster_attention(q, q, v, order, leaf_size=13, overlap=7, backend=backend), v)


@compiled
@pytest.mark.parametrize("tokens, leaf_size", [(196, 49), (288, 72)])
def test_nan_stays_in_its_pair_and_head(tokens, leaf_size, backend):
    inputs, order, cotangent = make(tokens, 2, 32, leaf_size, 20, batch=1)
    inputs, cotangent = [x.float().to(DEVICE[backend]) for x in inputs], cotangent.to(DEVICE[backend])
    attend = functools.partial(run, order, leaf_size, 20, backend)
    clean = outputs_and_gradients(attend, inputs, cotangent)
    place = order[0, 1].tolist().index(5)
    pair = order[0, 1].view(-1, 2 * leaf_size)[place // (2 * leaf_size)].long()
    touched = torch.zeros(tokens, dtype=torch.bool)
    touched[pair] = True
    for which in range(3):
        spoiled = [x.clone() for x in inputs]
        spoiled[which][0, 5, 1, 3] = float("nan")
        got = outputs_and_gradients(attend, spoiled, cotangent)
        for a, b in zip(got, clean):
            assert torch.equal(a[0, ~touched], b[0, ~touched])
            assert torch.equal(a[..., 0, :], b[..., 0, :])
        assert got[0][0, touched, 1].isnan().any()


@compiled
@pytest.mark.parametrize("shape", [(0, 196, 2, 32), (2, 196, 0, 32)])
@pytest.mark.parametrize("chosen", [None, "reference"])
def test_empty_inputs(shape, chosen, backend):
    device = DEVICE[backend]
    qkv = torch.randn(*shape[:2], 3, *shape[2:], device=device, requires_grad=True)
    out = feature_space_attention(qkv, backend=chosen)
    out.sum().backward()
    assert out.shape == shape and qkv.grad.shape == qkv.shape


@compiled
@pytest.mark.parametrize("tokens, leaf_size", [(199, 49), (290, 72)])
def test_same_bits_every_time(tokens, leaf_size, backend):
    device = DEVICE[backend]
    inputs, order, cotangent = make(tokens, 2, 32, leaf_size, 20, batch=3)
    inputs, cotangent = [x.float().to(device) for x in inputs], cotangent.to(device)
    attend = functools.partial(run, order, leaf_size, 20, backend)
    first = outputs_and_gradients(attend, inputs, cotangent)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs_and_gradients(attend, inputs, cotangent)))


@pytest.mark.parametrize("backend", [cpu])
@pytest.mark.parametrize("tokens, leaf_size, overlap", [(13, 3, 2), (9, 5, 0), (150, 70, 20)])
def test_gradcheck(tokens, leaf_size, overlap, backend):
    inputs, order, _ = make(tokens, 2, 8, leaf_size, overlap, batch=1)
    leaves = [x.requires_grad_() for x in inputs]
    attend = functools.partial(run, order, leaf_size, overlap, backend)
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_the_reference_differentiates_twice():
    inputs, order, _ = make(9, 1, 4, 2, 1, batch=1)
    attend = functools.partial(run, order, 2, 1, "reference")
    assert torch.autograd.gradgradcheck(attend, [x.requires_grad_() for x in inputs], fast_mode=True)


@compiled
@pytest.mark.parametrize("strides", [(2**31 + 8, 64, 16), (512, 2**30 + 8, 16), (512, 64, 2**31)])
def test_addresses_past_2_31_elements(strides, backend):
    near = torch.randn(3, 2, 5, 2, 8).half()
    far = []
    for x in near:
        storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1))), DEVICE[backend])
        far.append(storage.as_strided(x.shape, (*strides, 1)).copy_(x))
    order = torch.tensor([3, 1, 4, 0, 2], dtype=torch.int32).expand(2, 2, 5)
    results = []
    for qkv in (near.to(DEVICE[backend]).unbind(0), far):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = run(order, 2, 1, backend, *leaves)
        results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# feature_space_attention


@pytest.mark.parametrize("backend", ["reference", cpu, gpu])
def test_feature_space_attention_clusters_the_queries(backend):
    """... unless features or an order are given; features of one head serve all heads."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 196, 3, 2, 32, device=DEVICE[backend])
    q, k, v = qkv.unbind(2)
    features = torch.randn(2, 196, 1, 5, device=DEVICE[backend])
    clustering = None if backend == "triton" else backend
    for given, x in ((None, q), (k, k), (features, features)):
        options = dict(leaf_size=24, iterations=1, temperature=0.1)
        order = balanced_clusters(x, **options, backend=clustering)
        expected = cluster_attention(q, k, v, order, leaf_size=24, overlap=9, scale=0.3, backend=backend)
        got = feature_space_attention(qkv, **options, overlap=9, scale=0.3, cluster_by=given, backend=backend)
        assert torch.equal(got, expected)
        again = feature_space_attention(qkv, leaf_size=24, overlap=9, scale=0.3, order=order, backend=backend)
        assert torch.equal(again, expected)


@compiled
def test_the_order_has_no_gradient(backend):
    torch.manual_seed(0)
    qkv = torch.randn(2, 196, 3, 2, 32, device=DEVICE[backend], requires_grad=True)
    features = torch.randn(2, 196, 2, 8, device=DEVICE[backend], requires_grad=True)
    feature_space_attention(qkv, cluster_by=features).sum().backward()
    assert features.grad is None and qkv.grad.isfinite().all() and qkv.grad.any()


# the order is checked


def spoiled_orders(tokens: int):
    order = torch.arange(tokens, dtype=torch.int32).repeat(2, 2, 1)
    for value in (-1, tokens, 1, 2**31 - 1, -(2**31)):  # 1: twice
        wrong = order.clone()
        wrong[1, 0, 3] = value
        yield wrong
    wrong = order.long()
    wrong[1] += 2**32  # no value becomes a valid one by conversion
    yield wrong


@pytest.mark.parametrize("backend", ["reference", cpu])
def test_an_order_that_is_no_permutation_is_refused(backend):
    q = torch.randn(2, 20, 2, 8)
    for order in spoiled_orders(20):
        with pytest.raises(ValueError, match="every order must be a permutation of its 20 tokens, .* 0..19 once"):
            cluster_attention(q, q, q, order, leaf_size=5, overlap=2, backend=backend)


@compiled
def test_unchecked_orders_stay_inside_the_tensors(backend):
    """Images beside one with a wrong order keep every bit, and NaN around the tensors is not read."""
    device = DEVICE[backend]
    around = torch.full((5, 60, 3, 2, 8), float("nan"), device=device)
    qkv = around[1:4, 20:40]
    qkv.normal_()

    def run(order):
        leaves = qkv.detach().requires_grad_()
        out = feature_space_attention(leaves, order=order, leaf_size=5, overlap=2, backend=backend, check=False)
        return out.detach(), *torch.autograd.grad(out.nan_to_num().square().sum(), leaves)

    right = torch.arange(20, device=device).repeat(3, 2, 1)
    expected = run(right)
    for spoiled in spoiled_orders(20):
        spoiled = spoiled.to(device)
        order = torch.cat((right[:1].to(spoiled), spoiled.flip(0)))  # wrong in the second of three images
        named = order[1].clamp(0, 19).long()  # tokens of the image whose rows are written
        for found, whole in zip(run(order), expected):
            assert torch.equal(found[::2], whole[::2])
            assert all(found[1, tokens, ..., head, :].isfinite().all() for head, tokens in enumerate(named))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_check_on_a_gpu_where_it_is_asked_for():
    q = torch.randn(2, 20, 2, 8, device="cuda")
    for order in spoiled_orders(20):
        with pytest.raises(ValueError, match="permutation"):
            cluster_attention(q, q, q, order.cuda(), leaf_size=5, overlap=2, check=True)


# torch.library, compile, export, functional transforms, autocast


@compiled
def test_opcheck(backend):
    q = torch.randn(2, 20, 2, 16, device=DEVICE[backend])
    order = torch.rand(2, 2, 20, device=q.device).argsort(-1).int()
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.vitkernels
    arguments = (q, q.clone(), q.clone(), order, 5, 2, 0.25)
    torch.library.opcheck(ops.cluster_attention_forward.default, (*arguments, True), test_utils=utilities)
    statistic = ops.cluster_attention_forward(*arguments, True)[1]
    arguments = (q, q.clone(), q.clone(), q.clone(), order, statistic, 5, 2, 0.25)
    torch.library.opcheck(ops.cluster_attention_backward.default, arguments, test_utils=utilities)


@compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend):
    device = DEVICE[backend]
    torch.compiler.reset()
    torch.manual_seed(0)

    def layer(qkv):
        return feature_space_attention(qkv * 1.5, leaf_size=12, overlap=5).relu()

    compiled_layer = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        qkv, cotangent = torch.randn(batch, 50, 3, 2, 16, device=device), torch.randn(batch, 50, 2, 16, device=device)
        expected = outputs_and_gradients(layer, (qkv,), cotangent)
        for a, b in zip(outputs_and_gradients(compiled_layer, (qkv,), cotangent), expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", cpu, gpu])
def test_export(backend, tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, qkv):
            return feature_space_attention(qkv, leaf_size=12, overlap=5, backend=backend)

    qkv = torch.randn(2, 50, 3, 2, 16, device=DEVICE[backend])
    torch.export.save(torch.export.export(Layer(), (qkv,)), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(loaded(qkv), Layer()(qkv))


@compiled
def test_func_grad(backend):
    qkv = torch.randn(1, 50, 3, 2, 16, device=DEVICE[backend])

    def loss(qkv):
        return feature_space_attention(qkv, leaf_size=12, overlap=5, backend=backend).square().sum()

    leaf = qkv.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(qkv), torch.autograd.grad(loss(leaf), leaf)[0])


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    device = DEVICE[backend]
    qkv = torch.randn(2, 98, 3, 2, 32, device=device, requires_grad=True)
    order = balanced_clusters(qkv[:, :, 0])
    with torch.autocast(device, dtype):
        out = feature_space_attention(qkv, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, feature_space_attention(qkv.to(dtype), order=order, backend=backend))
    out.float().sum().backward()
    assert qkv.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("side", [14, 24])
def test_cuda_graph(side):
    if vitkernels._dispatch.absent("cuda"):
        pytest.skip("without the CUDA library the clustering is many launches")
    qkv = torch.randn(2, side * side, 3, 2, 32, device="cuda", requires_grad=True)

    def step():
        out = feature_space_attention(qkv)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    assert_graph_replays(step, qkv)


# bad input

Q = torch.randn(2, 100, 3, 32)
QKV = torch.randn(2, 100, 3, 3, 32)
ORDER = torch.arange(100, dtype=torch.int32).expand(2, 3, 100)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: cluster_attention([1], Q, Q, ORDER), TypeError, r"q must be a torch.Tensor \[B, N, heads, head_dim\]"),
        (lambda: cluster_attention(Q[0], Q, Q, ORDER), ValueError, "got 3 dimensions"),
        (lambda: cluster_attention(Q, Q[:1], Q, ORDER), ValueError, "one shape, got q"),
        (lambda: cluster_attention(Q, Q, Q.double(), ORDER), TypeError, "one dtype"),
        (lambda: cluster_attention(Q.int(), Q, Q, ORDER), TypeError, "convert it first"),
        (lambda: cluster_attention(Q[:, :0], Q[:, :0], Q[:, :0], ORDER), ValueError, "at least one token"),
        (lambda: cluster_attention(Q, Q, Q, ORDER, scale="1"), TypeError, "scale must be a number"),
        (
            lambda: cluster_attention(Q, Q, Q, ORDER, leaf_size=0),
            ValueError,
            "leaf_size must be at least 1 token, got 0",
        ),
        (lambda: cluster_attention(Q, Q, Q, ORDER, overlap=-1), ValueError, "overlap must be at least 0, got -1"),
        (lambda: cluster_attention(Q, Q, Q, ORDER, overlap=2.0), TypeError, "overlap must be an int, got 2.0"),
        (
            lambda: cluster_attention(Q, Q, Q, ORDER, leaf_size=25, overlap=26),
            ValueError,
            "overlap must be at most the smallest leaf, 25 of 100 tokens, got 26",
        ),
        (lambda: cluster_attention(Q, Q, Q, ORDER.tolist()), TypeError, r"order must be a torch.Tensor .* got list"),
        (lambda: cluster_attention(Q, Q, Q, ORDER.to_sparse()), TypeError, "order must be a dense tensor, got"),
        (lambda: cluster_attention(Q, Q, Q, ORDER.float()), TypeError, "order must be int32 .* got torch.float32"),
        (
            lambda: cluster_attention(Q, Q, Q, ORDER[:, :2]),
            ValueError,
            r"order must be \[B, heads, N\] = \[2, 3, 100\] .* got \[2, 2, 100\]",
        ),
        (lambda: cluster_attention(Q, Q, Q, ORDER[..., :99]), ValueError, r"got \[2, 3, 99\]"),
        (lambda: cluster_attention(Q, Q, Q, ORDER.to("meta")), ValueError, "q and order must be on one device"),
        (lambda: cluster_attention(Q, Q, Q, ORDER, backend="cuda"), RuntimeError, "it has no kernels for that"),
        (lambda: feature_space_attention(QKV[:, :, :2]), ValueError, "with 2 where 3 is expected"),
        (lambda: feature_space_attention(Q), ValueError, r"qkv must be \[B, N, 3, heads, head_dim\]"),
        (lambda: feature_space_attention(QKV, order=ORDER, cluster_by=Q), ValueError, "order or cluster_by, not both"),
        (
            lambda: feature_space_attention(QKV, cluster_by=Q[:, :, :2]),
            ValueError,
            r"cluster_by must be .* \[2, 100, 3 or 1, D\], got \[2, 100, 2, 32\]",
        ),
        (lambda: feature_space_attention(QKV, cluster_by=Q.int()), TypeError, "cluster_by must be one of float32"),
        (lambda: feature_space_attention(QKV, cluster_by=Q.to("meta")), ValueError, "must be on one device"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
