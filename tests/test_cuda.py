"""The CUDA library without a GPU: its kernel as C++ on the host, threads in any order, and what nvcc made of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from contract import leaf_of, photograph_features

from vitkernels import _dispatch, _native, balanced_clusters
from vitkernels.cluster_attention.reference import balanced_clusters as reference

SIZES = [1, 2, 48, 49, 97, 98, 99, 196, 197, 784, 1000]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KIB = 1024
CHIPS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a block may have
# where the kernel keeps features and order: (KiB of shared memory, whether they are in it)
PATHS = {"resident": (227, (True, True)), "cache": (24, (False, True)), "workspace": (4, (False, False))}


@pytest.fixture(scope="module")
def on_host(built):
    """The kernel as a Python module."""
    return built("cuda_bindings", "-fno-strict-aliasing", "-Wno-unknown-pragmas")


@pytest.fixture
def cluster(on_host):
    """balanced_clusters as the kernel computes it."""

    def run(x, leaf_size=49, iterations=2, temperature=0.01, path="resident", seed=1):
        dtype, (limit, expected) = str(x.dtype).removeprefix("torch."), PATHS[path]
        _, resident, workspace, _ = on_host.plan(x.shape[1], x.shape[3], dtype, limit * KIB)
        assert (resident, not workspace) == expected, "the case takes another path"
        arguments = (x.data_ptr(), x.shape, x.stride(), dtype, leaf_size, iterations, temperature, limit * KIB, seed)
        order = torch.from_numpy(on_host.balanced_clusters(*arguments))
        assert torch.equal(order.sort(-1).values, torch.arange(x.shape[1], dtype=torch.int32).expand_as(order))
        return order

    return run


def assert_agrees(order: torch.Tensor, x: torch.Tensor, leaf_size: int = 49, iterations: int = 2) -> None:
    exact = reference(x, leaf_size, iterations, dtype=torch.float64)
    assert (leaf_of(order, leaf_size) == leaf_of(exact, leaf_size)).float().mean() >= 0.995


def random(batch: int, tokens: int, heads: int, features: int, dtype=torch.float32) -> torch.Tensor:
    """The queries of a packed projection, [B, N, heads, features]."""
    torch.manual_seed(0)
    return torch.randn(batch, tokens, 3, heads, features).to(dtype)[:, :, 0]


# the kernel on the host


@pytest.mark.parametrize(
    "leaf_size, tokens", [(1, n) for n in SIZES[:7]] + [(7, n) for n in SIZES[:-1]] + [(49, n) for n in SIZES]
)
def test_membership(cluster, leaf_size, tokens):
    x = random(1, tokens, 2, 32, torch.bfloat16)
    assert_agrees(cluster(x, leaf_size), x, leaf_size)


@pytest.mark.parametrize(
    "features, dtype", [(d, dtype) for d in (8, 24, 32, 72) for dtype in DTYPES] + [(512, torch.bfloat16)]
)
def test_features(cluster, features, dtype):
    x = random(2, 99, 2, features, dtype)
    assert_agrees(cluster(x, 7), x, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_membership_of_photographs(cluster, dtype):
    """Whose flat parts have tokens that are nearly the same."""
    torch.manual_seed(0)
    x = photograph_features(28, 3, 32).to(dtype)
    assert_agrees(cluster(x), x)


@pytest.mark.parametrize("path, tokens, features", [("cache", 700, 32), ("workspace", 900, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_outside_shared_memory(cluster, path, tokens, features, dtype):
    x = random(1, tokens, 2, features, dtype)
    assert_agrees(cluster(x, path=path), x)


@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
def test_iterations(cluster, iterations):
    x = random(1, 300, 1, 32)
    assert_agrees(cluster(x, iterations=iterations), x, iterations=iterations)


def test_the_largest_published_case(cluster):
    x = random(1, 3136, 1, 32, torch.bfloat16)
    assert_agrees(cluster(x), x)


@pytest.mark.parametrize("leaf_size", [49, 150])
@pytest.mark.parametrize("path, tokens", [("resident", 800), ("workspace", 700)])
def test_threads_may_run_in_any_order(cluster, path, tokens, leaf_size):
    """The same bits from other orders of the threads between two waits: no race. Ties included."""
    x = random(1, tokens, 1, 8, torch.float16)
    x[:, ::3] = x[:, 1:2]
    first, *others = (cluster(x, leaf_size, path=path, seed=seed) for seed in range(4))
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("leaf_size", [7, 49])
def test_ties_are_ordered_by_index(cluster, leaf_size):
    x = random(1, 390, 1, 8)
    x[:, ::3] = x[:, 1:2]
    order = cluster(x, leaf_size)[0, 0]
    alike = order[(order % 3 == 0) | (order == 1)]
    assert torch.equal(alike, alike.sort().values)
    assert_agrees(order[None, None], x, leaf_size)


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
def test_equal_tokens_keep_their_places(cluster, value):
    order = cluster(torch.full((1, 390, 1, 8), value), 7)
    assert torch.equal(order[0, 0], torch.arange(390, dtype=torch.int32))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38, 0.0])
def test_odd_features(cluster, value):
    """A permutation whatever the features, as `cluster` asserts, and the reference's."""
    x = random(1, 390, 2, 8)
    x[:, 5:200:7] = value
    x[:, 1, 0, 3] = value
    assert torch.equal(leaf_of(cluster(x, 7), 7), leaf_of(reference(x, 7), 7))


@pytest.mark.parametrize("name", ["boat_fsla_n196", "boat_fsla_n784"])
def test_golden_orders(golden, cluster, name):
    _, t = golden(name)
    batch, tokens, dim = t["x"].shape
    qkv = torch.nn.functional.linear(t["x"], t["sd.qkv.weight"], t["sd.qkv.bias"])
    order = cluster(qkv.view(batch, tokens, 3, 2, dim // 2)[:, :, 0])
    assert torch.equal(leaf_of(order, 49), leaf_of(t["perm"], 49))


@pytest.mark.parametrize("chip", CHIPS)
def test_shared_memory_is_enough(on_host, chip):
    """Up to the largest call on every chip; BOAT's features are in it, those of its first stage where they fit."""
    limit = CHIPS[chip] * KIB
    for tokens in (1, 49, 196, 784, 3136, 16384, 1 << 15):
        for features in (8, 32, 512):
            for dtype in ("float32", "bfloat16"):
                warps, _, _, shared = on_host.plan(tokens, features, dtype, limit)
                assert shared <= limit and warps & (warps - 1) == 0 and warps <= 16
    for tokens in (196, 784):
        assert on_host.plan(tokens, 32, "bfloat16", limit)[1]
    assert on_host.plan(3136, 32, "bfloat16", limit)[:2] == (16, chip in (90, 100))


# the library

library = _native._find("_CUDA")
needs_library = pytest.mark.skipif(library is None, reason="the CUDA library was not built: no nvcc")


@needs_library
def test_no_kernel_spills():
    triton = pytest.importorskip("triton", reason="its cuobjdump reads the library")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", library], capture_output=True, text=True, check=True).stdout
    parts = [part for part in text.split("Fatbin elf code") if "REG:" in part]
    found = {re.search(r"sm_(\d+)", part)[1]: re.findall(r"REG:(\d+) STACK:(\d+)", part) for part in parts}
    assert found, text
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert set(found) == {str(chip) for chip in CHIPS}
    for chip, kernels in found.items():
        assert len(kernels) == 6, chip
        assert all(int(registers) <= 128 and stack == "0" for registers, stack in kernels), (chip, kernels)


@needs_library
def test_the_library_needs_little():
    """Of torch only the stable ABI, of CUDA only the driver, which the runtime inside looks up by itself."""
    if not (shutil.which("nm") and shutil.which("readelf")):
        pytest.skip("no binutils")

    def run(*command) -> str:
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout

    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", run("readelf", "-d", library)))
    assert {"libtorch_cpu", "libtorch_cuda"} <= needed
    assert not any(name.startswith(("libcud", "libpython", "libc10", "libtorch_python")) for name in needed)
    wanted = set(re.findall(r" U (\w+)$", run("nm", "-D", "--undefined-only", library), re.M))
    wanted = {name for name in wanted if "torch" in name or "c10" in name}
    torch_cpu = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    offered = set(re.findall(r" [TWVBDR] (\w+)$", run("nm", "-D", "--defined-only", torch_cpu), re.M))
    assert wanted - offered == {"aoti_torch_get_current_cuda_stream"}
    assert not [name for name in wanted if name.startswith("_Z")], "a C++ symbol ties the library to one torch"


def test_absence_says_why():
    if torch.version.cuda:
        pytest.skip("torch is built with CUDA")
    assert not _native.cuda.available and "without CUDA" in _native.cuda.reason


# on a GPU

needs_gpu = pytest.mark.skipif(bool(_dispatch.absent("cuda")), reason=str(_dispatch.absent("cuda")))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, features", [(98, 5), (784, 32), (1000, 512), (3136, 32), (9216, 36), (1 << 15, 8)])
def test_gpu_membership(tokens, features, dtype):
    """Rows of any length and alignment, in shared memory or not; the same bits again."""
    x = random(2, tokens, 2, features, dtype).cuda()
    order = balanced_clusters(x, backend="cuda")
    assert torch.equal(order.sort(-1).values, torch.arange(tokens, dtype=torch.int32, device="cuda").expand_as(order))
    assert_agrees(order, x)
    for _ in range(20):
        assert torch.equal(balanced_clusters(x, backend="cuda"), order)


@pytest.mark.gpu
@needs_gpu
def test_gpu_refuses_what_does_not_fit():
    for tokens, features in (((1 << 15) + 1, 8), (98, 513)):
        with pytest.raises(RuntimeError, match="at most 32768 tokens, 512 features"):
            balanced_clusters(torch.zeros(1, tokens, 1, features, device="cuda"), backend="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_gpu_of_the_tensor():
    x = random(1, 784, 1, 32).to("cuda:1")
    assert_agrees(balanced_clusters(x, backend="cuda"), x)
