"""The C++ library: its headers through bindings of their own, every vector level, memory accesses, determinism."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from levels import LEVELS, run_at, supported

from vitkernels import (
    DynamicPositionBias,
    Partition,
    _native,
    feature_space_attention,
    partition_attention,
    pool_tokens,
    pooled_attention,
)
from vitkernels.partition_attention.reference import partition_attention as reference
from vitkernels.partition_attention.reference import relative_position_index
from vitkernels.tree import Tree

MARCH = {"avx512": ["-march=x86-64-v4"], "avx2": ["-march=x86-64-v3"], "default": []}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

needs_native = pytest.mark.skipif(not _native.cpu.available, reason=str(_native.cpu.reason))


@pytest.fixture(scope="module", params=LEVELS)
def bindings(request, built):
    """csrc's headers as a Python module, compiled for one vector level."""
    if not supported(request.param):
        pytest.skip(f"this machine has no {request.param}")
    flags = ["-ffp-contract=fast", "-Wno-psabi", *MARCH[request.param], f"-DVITKERNELS_LEVEL=tested_{request.param}"]
    return built("bindings", *flags, variant=f"-{request.param}")


OLDEST = os.environ.get("VITKERNELS_OLDEST_TORCH")
CSRC = Path(__file__).parents[1] / "csrc"


@pytest.mark.skipif(not OLDEST, reason="VITKERNELS_OLDEST_TORCH names no folder of torch 2.10")
@pytest.mark.parametrize("source", sorted(str(path.relative_to(CSRC)) for path in CSRC.glob("*/*.cpp")))
def test_the_oldest_torch_has_what_the_sources_use(source):
    """Macros of its headers: TORCH_TARGET_VERSION hides newer functions, but no newer macros."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or pytest.skip("no C++ compiler")
    flags = "-std=c++17 -fsyntax-only -w -DVITKERNELS_LEVEL=baseline -DVITKERNELS_HAS_BASELINE=1 -DUSE_CUDA=1".split()
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{CSRC}", f"-I{OLDEST}/include"]
    done = subprocess.run([compiler, *flags, str(CSRC / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def geometries(count: int, seed: int = 0):
    """Random (height, width, concrete partition): shifts, derived sizes, maps that do not divide."""
    rng = random.Random(seed)
    for _sample in range(count):
        height, width = rng.randint(1, 30), rng.randint(1, 30)
        axes = []
        for _ in (height, width):
            group, interval = rng.randint(1, 8), rng.randint(1, 5)
            kind = rng.choice(("fixed", "grid", "whole"))
            axes.append((None if kind == "whole" else group, None if kind == "grid" else interval))
        partition = Partition(*zip(*axes)).on(height, width)
        if rng.random() < 0.4:  # make the map a multiple, and shift it
            regions = partition.regions(height, width)
            height, width = (r * g * i for r, g, i in zip(regions, partition.group, partition.interval))
            shift = tuple(rng.randint(0, g * i - 1) for g, i in zip(partition.group, partition.interval))
            partition = Partition(partition.group, partition.interval, shift).on(height, width)
        yield height, width, partition


def test_index_map_is_that_of_partition(bindings):
    for height, width, partition in geometries(300):
        index, wrapped = bindings.index((height, width), partition.group, partition.interval, partition.shift)
        inside = partition.index(height, width) >= 0
        assert torch.equal(torch.from_numpy(index), partition.index(height, width)), (height, width, partition)
        expected = partition.wrapped(height, width) & inside[..., None]
        assert torch.equal(torch.from_numpy(wrapped), expected), (height, width, partition)


def test_tree_is_that_of_python(bindings):
    for tokens in (1, 2, 5, 48, 49, 97, 98, 99, 196, 1000, 3136, 9216, 2**31 - 1):
        for leaf_size in (1, 2, 7, 49, 10**6) if tokens < 10**4 else (10**6,):
            tree = Tree.of(tokens, leaf_size)
            expected = [tree.bounds(level).tolist() for level in range(tree.levels + 1)]
            assert bindings.tree(tokens, leaf_size) == expected, (tokens, leaf_size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_row_sums(bindings, dtype):
    """Small integers, so that the result is exact."""
    lanes = bindings.bytes // (4 if dtype == "float32" else 8)
    a = torch.randint(-9, 10, (lanes, 3 * lanes)).to(getattr(torch, dtype))
    sums = getattr(bindings, f"row_sums_{dtype}")(a.numpy())
    assert torch.equal(torch.from_numpy(sums), a.sum(1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products(bindings, dtype):
    """Around every tile size; small integers, so that the result is exact."""
    product, transposition = (getattr(bindings, f"{name}_{dtype}") for name in ("product", "transposition"))
    torch.manual_seed(0)
    for rows in (1, 2, 5, 6, 7, 8, 9, 17, 49):
        for depth in (1, 31, 257):
            for columns in (1, 8, 17, 49, 64, 65, 100):
                a = torch.randint(-3, 4, (rows, depth)).to(getattr(torch, dtype))
                b = torch.randint(-3, 4, (depth, columns)).to(a.dtype)
                assert torch.equal(torch.from_numpy(product(a.numpy(), b.numpy(), False)), a @ b)
                assert torch.equal(torch.from_numpy(product(a.T.contiguous().numpy(), b.numpy(), True)), a @ b)
                assert torch.equal(torch.from_numpy(transposition(b.numpy())), b.T)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp(bindings, dtype):
    dtype = getattr(torch, dtype)
    lowest = -87 if dtype == torch.float32 else -708
    exp = getattr(bindings, f"exp_{str(dtype)[6:]}")
    x = torch.linspace(lowest, 0, 100_003, dtype=dtype)
    exact = x.double().exp() if dtype == torch.float32 else x.exp()
    error = (torch.from_numpy(exp(x.numpy())).double() / exact - 1).abs().max()
    assert error < 2 * torch.finfo(dtype).eps
    special = torch.tensor([0, -1e4, -1e30, -torch.inf, torch.nan], dtype=dtype)
    assert torch.from_numpy(exp(special.numpy())).nan_to_num(7).tolist() == [1, 0, 0, 0, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_in_16_bits(bindings, dtype):
    """Every pattern is read as torch reads it, and floats round as torch rounds them."""
    name = str(dtype)[6:]
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wide = torch.from_numpy(getattr(bindings, f"widen_{name}")(patterns.numpy().view("uint16")))
    assert torch.equal(wide.nan_to_num(7.5), patterns.view(dtype).float().nan_to_num(7.5))
    torch.manual_seed(0)
    finite = patterns.view(dtype).float()
    halves = (finite[1:] + finite[:-1]) / 2  # ties
    scattered = torch.randn(100_000) * 10 ** torch.empty(100_000).uniform_(-10, 6)
    special = torch.tensor([65519.9, 65520.0, 1e30, torch.inf, -torch.inf, torch.nan, -0.0])
    for x in (finite, halves, scattered, special):
        narrow = torch.from_numpy(getattr(bindings, f"narrow_{name}")(x.numpy()).view("int16")).view(dtype)
        assert torch.equal(narrow.nan_to_num(7.5), x.to(dtype).nan_to_num(7.5))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("group", [(1, 1), (7, 7), (3, 11), (4, 16), (17, 2)])
def test_weights_of_one_group(bindings, dtype, group):
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    tokens = group[0] * group[1]
    q, k = torch.randn(2, tokens, 19, dtype=dtype)
    bias = torch.randn(2 * group[0] - 1, 2 * group[1] - 1, dtype=dtype)
    weights = getattr(bindings, f"weights_{str(dtype)[6:]}")
    weights = torch.from_numpy(weights(q.numpy(), k.numpy(), bias.flip(0, 1).contiguous().numpy(), group))
    exact = (q.double() @ k.double().T + bias.double().flatten()[relative_position_index(group)]).softmax(-1)
    assert (weights - exact).abs().max() < 20 * torch.finfo(dtype).eps


def test_an_unknown_capability_is_refused():
    environment = os.environ | {"VITKERNELS_CPU_CAPABILITY": "nonsense"}
    done = subprocess.run([sys.executable, "-c", "import vitkernels"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "VITKERNELS_CPU_CAPABILITY must be one of default, avx2, avx512, got 'nonsense'" in done.stderr


CONTRACT = """
import torch, vitkernels
from vitkernels import Partition, cluster_attention, partition_attention, pooled_attention
from vitkernels.partition_attention.reference import partition_attention as reference
from contract import assert_contract
torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
torch.manual_seed(0)
for height, width, heads, head_dim, partition in [
    (14, 14, 5, 32, Partition.window(7)),
    (15, 9, 2, 24, Partition.long(7, 2)),
    (14, 21, 1, 64, Partition.window(7, 3)),
    (20, 20, 2, 5, Partition.long((3, 7), (4, 1))),
    (12, 8, 1, 72, Partition.window(4)),
    (14, 14, 1, 96, Partition.window(14)),
    (15, 18, 2, 16, Partition.interval_only(1)),
]:
    table = [2 * g - 1 for g in partition.on(height, width).group]
    *inputs, cotangent = torch.randn(4, 2, height, width, heads, head_dim).double()
    inputs.append(torch.randn(heads, *table).double())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_contract(
            lambda q, k, v, bias: partition_attention(q, k, v, partition, bias, backend="cpu"),
            lambda q, k, v, bias: reference(q, k, v, partition, bias),
            inputs, cotangent, dtype, tables=(3,),
        )
for tokens, heads, head_dim, leaf_size, overlap in [(199, 2, 32, 49, 20), (288, 1, 24, 49, 20), (50, 2, 72, 12, 7)]:
    *inputs, cotangent = torch.randn(4, 2, tokens, heads, head_dim).double()
    order = torch.rand(2, heads, tokens).argsort(-1).int()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours, reference = (
            lambda q, k, v, b=b: cluster_attention(q, k, v, order, leaf_size=leaf_size, overlap=overlap, backend=b)
            for b in ("cpu", "reference")
        )
        assert_contract(ours, reference, inputs, cotangent, dtype)
for q_thw, k_thw, head_dim in [((14, 14), (14, 14), 96), ((4, 9, 5), (2, 3, 5), 24), ((3, 20), (7, 33), 72)]:
    queries, keys = (torch.Size(thw).numel() for thw in (q_thw, k_thw))
    q, cotangent = torch.randn(2, 2, queries + 1, 2, head_dim).double()
    tables = [torch.randn(2 * max(n, m) - 1, head_dim).double() / 4 for n, m in zip(q_thw, k_thw)]
    inputs = [q, *torch.randn(2, 2, keys + 1, 2, head_dim).double(), *tables]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours, reference = (
            lambda q, k, v, *tables, b=b: pooled_attention(
                q, k, v, q_thw=q_thw, k_thw=k_thw, rel_pos=tables, has_cls=True, residual="all_but_cls", backend=b)
            for b in ("cpu", "reference")
        )
        assert_contract(ours, reference, inputs, cotangent, dtype, tables=range(3, len(inputs)))
"""


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_holds_the_contract(level):
    if not supported(level):
        pytest.skip(f"this machine has no {level}")
    run_at(level, CONTRACT)


@needs_native
def test_float64_is_exact_to_rounding():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 15, 9, 2, 24, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(2, 13, 13, dtype=torch.float64, requires_grad=True))
    for partition in (Partition.long(7, 2), Partition.window(7)):
        results = []
        for function in (lambda *x: partition_attention(*x, backend="cpu"), reference):
            out = function(*inputs[:3], partition, inputs[3])
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for ours, exact in zip(*results):
            assert (ours - exact).abs().max() <= 1e-14 * exact.abs().max()


GUARDED = """
import itertools, torch
from guarded import guarded
from vitkernels import Partition

torch.manual_seed(0)
run = torch.ops.vitkernels
for height, width, heads, head_dim, partition in [
    (7, 7, 1, 32, Partition.window(7)), (5, 9, 2, 24, Partition.long((3, 2), 2)), (4, 4, 1, 1, Partition.window(4)),
    (6, 6, 3, 19, Partition.window(3, 1)), (20, 15, 1, 72, Partition.interval_only(1)),
]:
    partition = partition.on(height, width)
    geometry = (*partition.group, *partition.interval, *partition.shift)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v, dout = torch.randn(4, 2, height, width, heads, head_dim).to(dtype)
        bias = torch.randn(heads, *(2 * g - 1 for g in partition.group)).to(wide)
        for at in ("start", "end"):
            x = [guarded(t, at) for t in (q, k, v, bias)]
            dx = guarded(dout, at)
            out, statistic = run.partition_attention_forward(*x, [], False, geometry, 0.2)
            dqkv, dbias = run.partition_attention_backward(dx, *x, [], False, statistic, geometry, 0.2)
            assert all(t.isfinite().all() for t in (out, dqkv, dbias))
for tokens, heads, head_dim, leaf_size, overlap in [
    (101, 2, 24, 12, 5), (98, 1, 32, 49, 20), (7, 3, 1, 7, 9), (9, 1, 19, 2, 2),
]:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        q, k, v, dout = torch.randn(4, 2, tokens, heads, head_dim).to(dtype)
        for order in (torch.rand(2, heads, tokens).argsort(-1), torch.randint(-(2**31), 2**31, (2, heads, tokens))):
            for at in ("start", "end"):
                x = [guarded(t, at) for t in (q, k, v, order.int())]
                out, statistic = run.cluster_attention_forward(*x, leaf_size, overlap, 0.2, False)
                run.cluster_attention_backward(guarded(dout, at), *x, statistic, leaf_size, overlap, 0.2)
                if dtype != torch.float64:
                    run.balanced_clusters(x[0], leaf_size, 2, 0.01)
for q_thw, k_thw, heads, head_dim, has_cls in [
    ((1, 7, 9), (1, 3, 4), 2, 24, True), ((2, 5, 6), (2, 2, 3), 1, 32, False), ((1, 1, 1), (1, 2, 17), 3, 19, False),
]:
    queries, keys = (torch.Size(thw).numel() + has_cls for thw in (q_thw, k_thw))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        q, dout = torch.randn(2, 2, queries, heads, head_dim).to(dtype)
        k, v = torch.randn(2, 2, keys, heads, head_dim).to(dtype)
        tables = [torch.randn(n + m, head_dim).to(wide) for n, m in zip(q_thw, k_thw)]
        any_rows = [torch.randint(n + m, (n, m)) for n, m in zip(q_thw, k_thw)]
        in_turn = [torch.arange(n)[:, None] + torch.arange(m) for n, m in zip(q_thw, k_thw)]
        for indices, at in itertools.product((any_rows, in_turn), ("start", "end")):
            x = [guarded(t, at) for t in (q, k, v, *tables, *indices)]
            geometry = (list(q_thw), list(k_thw), has_cls, 2, 0.2)
            out, statistic = run.pooled_attention_forward(*x, *geometry)
            gradients = run.pooled_attention_backward(guarded(dout, at), *x, statistic, *geometry)
            assert all(t.isfinite().all() for t in (out, *gradients))
print("untouched")
"""


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_no_access_outside_the_tensors(level):
    if not supported(level):
        pytest.skip(f"this machine has no {level}")
    assert run_at(level, GUARDED) == "untouched"


@needs_native
@pytest.mark.parametrize("batch", [1, 3])
def test_same_bits_for_any_number_of_threads(batch):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    qkv = [torch.randn(batch, 30, 30, 5, 32, requires_grad=True) for _ in range(3)]
    bias = torch.randn(5, 13, 13, requires_grad=True)
    results = []
    try:
        for count in (1, 2, 5, 1):
            torch.set_num_threads(count)
            out = partition_attention(*qkv, Partition.long(7, 2), bias, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), [*qkv, bias])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@needs_native
@pytest.mark.parametrize("tokens", [1, 196, 500])
def test_clusters_have_the_same_bits_for_any_number_of_threads(tokens):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    qkv = torch.randn(3, tokens, 3, 5, 32, requires_grad=True)
    results = []
    try:
        for count in (1, 2, 5, 1):
            torch.set_num_threads(count)
            out = feature_space_attention(qkv, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


# in a process of its own, whose peak no other test has raised
PEAK = """
import resource, torch
from vitkernels import Partition, partition_attention
q, k, v = torch.randn(3, 1, 64, 64, 1, 8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend = lambda side: partition_attention(*(x[:, :side, :side] for x in (q, k, v)), Partition.grid(side), backend="cpu")
attend(8)
before = peak()
assert attend(64).isfinite().all()
print(peak() - before)
"""


@needs_native
def test_large_groups_need_little_memory():
    """One group of 4,096 tokens: its scores alone would take 65,536 KiB."""
    assert int(run_at("", PEAK)) < 32 * 1024


@needs_native
def test_refusals():
    q = torch.randn(1, 7, 7, 1, 8)
    run = torch.ops.vitkernels.partition_attention_forward
    with pytest.raises(RuntimeError, match="as a table"):
        run(q, q, q, None, [torch.zeros(1)], False, (7, 7, 1, 1, 0, 0), 1.0)
    with pytest.raises(RuntimeError, match="float32, float64, float16 or bfloat16"):
        run(q.int(), q.int(), q.int(), None, [], False, (7, 7, 1, 1, 0, 0), 1.0)
    with pytest.raises(RuntimeError, match="bias must be"):
        run(q, q, q, torch.zeros(1, 3, 3), [], False, (7, 7, 1, 1, 0, 0), 1.0)


def test_absence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_native, "_find", lambda name: None)
    library = _native._load("_C", "C++", "reinstall")
    assert not library.available and library.reason == "the C++ library was not built; reinstall"
    assert "pip install --no-build-isolation" in _native.HOW_TO_BUILD


TWICE = {
    "partition_attention": lambda x: partition_attention(*[x.view(2, 7, 7, 2, 32)] * 3, Partition(3)),
    "cluster_attention": lambda x: feature_space_attention(torch.stack((x, x, x), 2), leaf_size=7, overlap=2),
    "pool_tokens": lambda x: pool_tokens(x, x[0, 0, 0].view(32, 1, 1, 1), thw=(7, 7))[0],
    "pooled_attention": lambda x: pooled_attention(x, x, x, q_thw=(7, 7), k_thw=(7, 7), rel_pos=(x[0, :13, 0],) * 2),
    "dynamic_position_bias": lambda x: torch.func.functional_call(
        DynamicPositionBias(32, 2), {"pos_proj.weight": x[0, :2, 0, :2]}, (3,)
    ),
}


@needs_native
@pytest.mark.parametrize("operator", TWICE)
def test_second_derivatives_are_refused_on_every_path(operator):
    x = torch.randn(2, 49, 2, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(TWICE[operator](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="kernels have first derivatives only"):
        torch.autograd.grad(gradient.square().sum(), x)
