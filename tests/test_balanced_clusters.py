"""Balanced clustering: the tree map, the reference step by step, every backend against float64, bad input."""

from __future__ import annotations

import pytest
import torch
from contract import leaf_of, photograph_features
from levels import LEVELS, run_at, supported

import vitkernels
from vitkernels import FeatureSpaceAttention, balanced_clusters
from vitkernels.cluster_attention.clusters import _refusal
from vitkernels.cluster_attention.reference import balanced_clusters as reference
from vitkernels.tree import Tree

cpu = pytest.param(
    "cpu", marks=pytest.mark.skipif(not vitkernels._native.cpu.available, reason=str(vitkernels._native.cpu.reason))
)
gpu = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(bool(vitkernels._dispatch.absent("cuda")), reason=str(vitkernels._dispatch.absent("cuda"))),
    ],
)
backends = pytest.mark.parametrize("backend", ["reference", cpu, gpu])
SIZES = [1, 2, 3, 6, 7, 13, 14, 15, 48, 49, 97, 98, 99, 100, 195, 196, 197, 391, 392, 784, 1000]


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def smooth_features(batch: int, side: int, heads: int, dim: int) -> torch.Tensor:  # [B, N, heads, D]
    """Random waves over a map of side x side tokens, and some noise: neighbours look alike, as in a network."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, side)] * 2, indexing="ij")
    frequency, phase = torch.randn(2, batch, heads, dim, 1, 1) * 6, torch.rand(batch, heads, dim, 1, 1) * 6.28
    waves = torch.sin(frequency[0] * y + frequency[1] * x + phase)
    return (waves + 0.1 * torch.randn_like(waves)).flatten(3).permute(0, 3, 1, 2).contiguous()


# the tree map


@pytest.mark.parametrize("leaf_size", [1, 2, 7, 49])
@pytest.mark.parametrize("tokens", SIZES)
def test_tree(tokens, leaf_size):
    """Nested nodes that cover every place; nodes of a level differ by at most a token; leaves as small as allowed."""
    tree = Tree.of(tokens, leaf_size)
    parents = [0, tokens]
    for level in range(tree.levels + 1):
        bounds = [j * tokens // 2**level for j in range(2**level + 1)]
        assert tree.bounds(level).tolist() == bounds and set(parents) <= set(bounds)
        sizes = [b - a for a, b in zip(bounds, bounds[1:])]
        assert max(sizes) - min(sizes) <= 1 and (level == 0 or min(sizes) >= leaf_size)
        nodes = [[place for place in node if place >= 0] for node in tree.nodes(level).tolist()]
        assert nodes == [list(range(a, b)) for a, b in zip(bounds, bounds[1:])]
        assert tree.nodes(level).flatten()[tree.slots(level)].tolist() == list(range(tokens))
        parents = bounds
    assert (min(sizes), max(sizes)) == (tree.smallest, tree.largest)
    assert tokens >> (tree.levels + 1) < leaf_size, "one more level would have leaves that are too small"


def test_the_published_trees():
    """49 * 2**K tokens have K levels, and leaves of 49."""
    for levels in range(7):
        tree = Tree.of(49 << levels, 49)
        assert (tree.levels, tree.smallest, tree.largest) == (levels, 49, 49)


def test_keys_of_a_leaf_reach_over_the_split():
    assert Tree.of(7, 3).keys(2).tolist() == [[0, 1, 2, 3, 4, -1], [1, 2, 3, 4, 5, 6]]
    assert Tree.of(5, 3).keys(2).tolist() == [[0, 1, 2, 3, 4]]


# the algorithm


def node_by_node(x: torch.Tensor, leaf_size: int, iterations: int, temperature: float) -> list[int]:  # x [N, D]
    """The order, by recursion over one node at a time."""
    unit = torch.nn.functional.normalize(x, dim=-1)

    def direction(mean):
        return mean / mean.norm().clamp(min=1e-12)

    def visit(tokens, first, level, node):
        if level == Tree.of(len(x), leaf_size).levels:
            return tokens
        middle = (2 * node + 1) * len(x) // 2 ** (level + 1) - first
        centroids = [direction(x[part].mean(0)) for part in (tokens[:middle], tokens[middle:])]
        for _ in range(iterations):
            logits = torch.stack([unit[tokens] @ c for c in centroids], -1) / temperature
            centroids = [direction((w[:, None] * x[tokens]).mean(0)) for w in logits.softmax(-1).unbind(-1)]
        s0, s1 = (unit[tokens] @ c for c in centroids)
        ratio = dict(zip(tokens, ((s0 + 1) / (s1 + 1)).tolist()))
        tokens = sorted(tokens, key=lambda t: (ratio[t], t))
        left = visit(tokens[:middle], first, level + 1, 2 * node)
        return left + visit(tokens[middle:], first + middle, level + 1, 2 * node + 1)

    return visit(list(range(len(x))), 0, 0, 0)


@pytest.mark.parametrize(
    "tokens, leaf_size, iterations, temperature", [(30, 3, 2, 0.01), (57, 7, 1, 0.1), (8, 1, 0, 1)]
)
def test_reference_equals_node_by_node(tokens, leaf_size, iterations, temperature):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 2, 5, dtype=torch.float64)
    order = reference(x, leaf_size, iterations, temperature, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            assert order[b, h].tolist() == node_by_node(x[b, :, h], leaf_size, iterations, temperature)


@pytest.mark.parametrize("name", ["boat_fsla_n196", "boat_fsla_n784"])
@backends
def test_golden_orders(golden, name, backend):
    """The official leaves, and the tokens that they lend, as sets (their order inside a leaf may rest on rounding)."""
    _, t = golden(name)
    batch, tokens, dim = t["x"].shape
    qkv = torch.nn.functional.linear(t["x"], t["sd.qkv.weight"], t["sd.qkv.bias"])
    q = qkv.view(batch, tokens, 3, 2, dim // 2)[:, :, 0].to(device_of(backend))
    order = balanced_clusters(q, backend=backend).cpu().unflatten(2, (-1, 49))
    expected = t["perm"].unflatten(2, (-1, 49))
    assert torch.equal(order.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(order[:, :, 0::2, 29:].sort(-1).values, expected[:, :, 0::2, 29:].sort(-1).values)
    assert torch.equal(order[:, :, 1::2, :20].sort(-1).values, expected[:, :, 1::2, :20].sort(-1).values)


@backends
@pytest.mark.parametrize("features", ["random", "smooth", "photograph"])
@pytest.mark.parametrize("side, heads", [(14, 12), (28, 6), (56, 3)])
def test_membership_agrees_with_float64(side, heads, features, backend):
    torch.manual_seed(0)
    x = {
        "random": lambda: torch.randn(2, side * side, heads, 32),
        "smooth": lambda: smooth_features(2, side, heads, 32),
        "photograph": lambda: photograph_features(side, heads, 32),
    }[features]()
    exact = leaf_of(reference(x, dtype=torch.float64), 49)
    order = balanced_clusters(x.to(device_of(backend)), backend=backend)
    assert (leaf_of(order, 49) == exact).float().mean() >= 0.995


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_size_and_dtype(dtype, backend):
    """A permutation, and membership as of the same numbers in float64; features that do not fill a vector too."""
    torch.manual_seed(0)
    for i, tokens in enumerate(SIZES):
        dim, leaf_size = (32, 7, 72)[i % 3], (7, 49, 1)[(i + i // 3) % 3]
        x = torch.randn(2, tokens, 2, dim).to(device_of(backend), dtype)
        order = balanced_clusters(x, leaf_size=leaf_size, backend=backend)
        assert order.dtype == torch.int32 and order.shape == (2, 2, tokens)
        assert torch.equal(order.sort(-1).values.cpu(), torch.arange(tokens).int().expand(2, 2, -1))
        exact = leaf_of(reference(x.cpu().double(), leaf_size, dtype=torch.float64), leaf_size)
        assert (leaf_of(order, leaf_size) == exact).float().mean() >= 0.995, (tokens, dim, leaf_size)


@backends
@pytest.mark.parametrize("iterations, temperature", [(0, 0.01), (1, 0.01), (3, 0.5), (2, 1e-30), (2, 1e30)])
def test_iterations_and_temperature(iterations, temperature, backend):
    torch.manual_seed(0)
    x = torch.randn(2, 392, 3, 24)
    options = dict(leaf_size=24, iterations=iterations, temperature=temperature)
    exact = leaf_of(reference(x, dtype=torch.float64, **options), 24)
    order = balanced_clusters(x.to(device_of(backend)), backend=backend, **options)
    assert (leaf_of(order, 24) == exact).float().mean() >= 0.995


@backends
def test_ties_are_ordered_by_index(backend):
    """Equal tokens keep their order; of few distinct ones, each run of equal ratios is ascending."""
    device = device_of(backend)
    for x in (torch.ones(1, 200, 1, 8), torch.zeros(1, 200, 1, 8), torch.full((1, 200, 1, 8), float("nan"))):
        order = balanced_clusters(x.to(device), leaf_size=10, backend=backend)
        assert torch.equal(order[0, 0].cpu(), torch.arange(200).int())
    torch.manual_seed(0)
    kinds = torch.randint(4, (392,))
    order = balanced_clusters(torch.eye(8)[kinds][None, :, None].to(device), leaf_size=49, backend=backend)[0, 0].cpu()
    for leaf in order.view(8, 49):
        for kind in range(4):
            tokens = leaf[kinds[leaf] == kind]
            assert torch.equal(tokens, tokens.sort().values)


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-30, 1e38])
def test_features_out_of_the_ordinary(value, backend):
    """Still a permutation, the same every time."""
    torch.manual_seed(0)
    x = torch.randn(2, 500, 2, 16)
    x[:, torch.randperm(500)[:60]] = value
    x = x.to(device_of(backend))
    first = balanced_clusters(x, leaf_size=7, backend=backend)
    assert torch.equal(first.sort(-1).values.cpu(), torch.arange(500).int().expand(2, 2, -1))
    assert all(torch.equal(balanced_clusters(x, leaf_size=7, backend=backend), first) for _ in range(5))


@backends
def test_strides(backend):
    """A slice of a packed projection, head-major packing, a last dimension that is not contiguous."""
    torch.manual_seed(0)
    for x in (
        torch.randn(2, 100, 3, 2, 16)[:, :, 0],
        torch.randn(2, 100, 2, 3, 16)[:, :, :, 1],
        torch.randn(2, 16, 2, 100).permute(0, 3, 2, 1),
        torch.randn(100, 1, 16)[None].expand(2, -1, 2, -1),
    ):
        x = x.to(device_of(backend))
        plain = balanced_clusters(x.contiguous(), leaf_size=12, backend=backend)
        assert torch.equal(balanced_clusters(x, leaf_size=12, backend=backend), plain)


@backends
def test_large_maps_and_empty_batches(backend):
    torch.manual_seed(0)
    x = torch.randn(1, 16384, 1, 32, device=device_of(backend))
    order = balanced_clusters(x, backend=backend)
    assert torch.equal(order[0, 0].sort().values.cpu(), torch.arange(16384).int())
    assert balanced_clusters(x[:0], backend=backend).shape == (0, 1, 16384)


def test_every_vector_level_gives_the_same_leaves():
    """Of the C++ kernels, each in a process of its own."""
    if not vitkernels._native.cpu.available:
        pytest.skip(vitkernels._native.cpu.reason)
    code = "import torch, vitkernels; torch.manual_seed(0); x = torch.randn(2, 196, 3, 20)\n"
    code += "print(vitkernels.balanced_clusters(x).view(2, 3, 4, 49).sort(-1).values.flatten().tolist())"
    assert len({run_at(level, code) for level in filter(supported, LEVELS)}) == 1


@backends
def test_it_has_no_gradient_and_ignores_autocast(backend):
    torch.manual_seed(0)
    x = torch.randn(2, 196, 2, 32, device=device_of(backend), requires_grad=True)
    order = balanced_clusters(x, backend=backend)
    assert not order.requires_grad
    with torch.autocast(x.device.type, torch.bfloat16):
        assert torch.equal(balanced_clusters(x, backend=backend), order)


@pytest.mark.parametrize("backend", [cpu, gpu])
def test_opcheck_and_compile(backend):
    torch.manual_seed(0)
    x = torch.randn(2, 100, 2, 16, device=device_of(backend))
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.vitkernels.balanced_clusters.default, (x, 12, 2, 0.01), test_utils=utilities)
    torch.compiler.reset()
    run = torch.compile(lambda x: balanced_clusters(x * 2, leaf_size=12, backend=backend), fullgraph=True)
    assert torch.equal(run(x), balanced_clusters(x * 2, leaf_size=12, backend=backend))


def test_cuda_tensors_without_the_cuda_library_take_the_slow_way(monkeypatch):
    """... which `info` names; with the library they take it."""
    device, native = torch.device("cuda"), vitkernels._native
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "cuda", native.Library(None, "it was not built"))
    assert vitkernels._dispatch.select("balanced_clusters", device, None, gpu="cuda") == "reference"
    said = vitkernels.info()["backend cuda"]
    assert said.startswith("absent: it was not built; balanced_clusters runs on CUDA tensors") and "slow" in said
    with pytest.raises(RuntimeError, match="cuda cannot run balanced_clusters: it was not built"):
        vitkernels._dispatch.select("balanced_clusters", device, "cuda", gpu="cuda")
    monkeypatch.setattr(native, "cuda", native.Library(object(), ""))
    assert vitkernels._dispatch.select("balanced_clusters", device, None, gpu="cuda") == "cuda"
    assert vitkernels._dispatch.select("cluster_attention", device, None) == "triton"
    for shape, why in (((1, 32769, 1, 8), "32769 tokens > 32768"), ((1, 8, 1, 513), "513 features > 512")):
        assert _refusal("cuda", torch.empty(shape)) == why


# bad input

X = torch.randn(2, 100, 2, 16)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: balanced_clusters([1]), TypeError, r"x must be a torch.Tensor \[B, N, heads, D\], got list"),
        (lambda: balanced_clusters(X[0]), ValueError, r"x must be \[B, N, heads, D\], got 3 dimensions"),
        (lambda: balanced_clusters(X.int()), TypeError, "x must be one of float32, .* got int32; convert it first"),
        (
            lambda: balanced_clusters(X[:, :0]),
            ValueError,
            r"at least one token and one feature, got .* \[2, 0, 2, 16\]",
        ),
        (lambda: balanced_clusters(X[..., :0]), ValueError, r"at least one token and one feature"),
        (lambda: balanced_clusters(X, leaf_size=0), ValueError, "leaf_size must be at least 1 token, got 0"),
        (lambda: balanced_clusters(X, leaf_size=4.0), TypeError, "leaf_size must be an int, got 4.0"),
        (lambda: balanced_clusters(X, iterations=-1), ValueError, "iterations must be at least 0, got -1"),
        (lambda: balanced_clusters(X, iterations=True), TypeError, "iterations must be an int, got True"),
        (lambda: balanced_clusters(X, temperature=0), ValueError, "temperature must be finite and above 0, got 0"),
        (lambda: balanced_clusters(X, temperature=float("nan")), ValueError, "temperature must be finite"),
        (lambda: balanced_clusters(X, temperature=1e-50), ValueError, "got 1e-50; the least in float32 is 1.17"),
        (
            lambda: FeatureSpaceAttention(16, 2, temperature=0),
            ValueError,
            "temperature must be finite and above 0, got 0",
        ),
        (lambda: FeatureSpaceAttention(16, 2, iterations=-1), ValueError, "iterations must be at least 0, got -1"),
        (lambda: balanced_clusters(X, temperature="hot"), TypeError, "temperature must be a number, got 'hot'"),
        (lambda: balanced_clusters(X, backend="fast"), ValueError, "backend must be one of"),
        (
            lambda: balanced_clusters(X, backend="triton"),
            RuntimeError,
            "triton cannot run balanced_clusters: it has no kernels for that; backend='cuda' is what runs on CUDA",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
