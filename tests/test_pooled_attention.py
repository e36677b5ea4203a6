"""Pooled attention: the reference pair by pair, the index of a distance, every backend against the reference."""

from __future__ import annotations

import functools
import subprocess
import sys
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_graph_replays, sparse
from contract import assert_as_exact, assert_blind, assert_contract, blind_inputs, outputs_and_gradients

import vitkernels
from vitkernels import pooled_attention

cpu = pytest.param(
    "cpu", marks=pytest.mark.skipif(not vitkernels._native.cpu.available, reason=str(vitkernels._native.cpu.reason))
)
gpu = pytest.param(
    "triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
compiled = pytest.mark.parametrize("backend", [cpu, gpu])
DEVICE = {"cpu": "cpu", "triton": "cuda", "reference": "cpu", "sdpa": "cpu"}


class Case(NamedTuple):
    """Two maps, and which axes have a table (of another length than its distances: "interpolated")."""

    q_thw: tuple[int, ...]
    k_thw: tuple[int, ...]
    heads: int = 2
    head_dim: int = 32
    has_cls: bool = False
    residual: str = "none"
    tables: str = "thw"
    index: str = "exact"
    interpolated: bool = False

    @property
    def options(self) -> dict:
        names = ("q_thw", "k_thw", "has_cls", "residual", "index")
        return {name: getattr(self, name) for name in names}


CASES = {
    "as stage 3 of an image": Case((14, 14), (14, 14), 2, 96, residual="all"),
    "as stage 1 of an image": Case((56, 56), (14, 14), 1, 96, residual="all"),
    "queries pooled further than keys": Case((7, 7), (14, 14), 3, 64, residual="all_but_cls", has_cls=True),
    "a clip": Case((4, 14, 14), (4, 7, 7), 2, 48, True, "all_but_cls"),
    "a clip, pooled in time": Case((2, 6, 5), (4, 3, 5), 1, 72, True, "all"),
    "no positions": Case((8, 9), (5, 6), 2, 96, True, tables=""),
    "no positions, a clip": Case((3, 8, 9), (3, 2, 3), 2, 40, False, "all", tables=""),
    "positions in time alone": Case((5, 4, 3), (2, 3, 2), tables="t", has_cls=True),
    "positions in space alone": Case((3, 6, 7), (3, 3, 4), tables="hw", residual="all"),
    "positions along the height alone": Case((9, 4), (3, 2), tables="h"),
    "positions along the width alone": Case((4, 9), (2, 3), tables="w", has_cls=True),
    "ratios that are no integers": Case((16, 11), (6, 4), tables="hw"),
    "more keys than queries": Case((3, 5), (8, 7), 2, 24, True, "all_but_cls", tables="hw"),
    "SlowFast's rounding": Case((8, 14), (6, 13), tables="hw", index="slowfast"),
    "torchvision's rounding": Case((16, 11), (6, 10), tables="hw", index="torchvision"),
    "tables of other lengths": Case((2, 9, 8), (2, 3, 4), tables="thw", interpolated=True, has_cls=True),
    "wide maps": Case((2, 70), (2, 33), 1, 8, tables="hw"),
    "one query": Case((1, 1), (5, 6), tables="hw"),
    "one key": Case((5, 6), (1, 1), tables="hw", residual="all"),
    "one of each, and class tokens": Case((1, 1), (1, 1), 1, 16, True, "all", tables="hw"),
    "65 keys": Case((5, 5), (5, 13), 1, 64, tables="hw"),
    "many keys": Case((3, 4), (30, 41), 1, 80, True, tables="hw"),
    "a head of 128": Case((7, 7), (4, 4), 1, 128, tables="hw"),
    "a head of 5": Case((7, 7), (4, 4), 3, 5, tables="hw", residual="all"),
}
LARGE = ("as stage 1 of an image", "a clip", "many keys")


def tokens(case: Case, which: str) -> int:
    return torch.Size(getattr(case, which)).numel() + case.has_cls


def make(case: Case, batch: int = 2):
    """q, k, v and the tables there are; an output gradient; float64."""
    torch.manual_seed(0)
    shape = (case.heads, case.head_dim)
    queries, keys = tokens(case, "q_thw"), tokens(case, "k_thw")
    q, cotangent = torch.randn(2, batch, queries, *shape, dtype=torch.float64)
    k, v = torch.randn(2, batch, keys, *shape, dtype=torch.float64)
    lengths = [2 * max(pair) - 1 + 4 * case.interpolated for pair in zip(case.q_thw, case.k_thw)]
    axes = "thw"[-len(lengths) :]
    tables = [torch.randn(n, case.head_dim, dtype=torch.float64) / 4 for a, n in zip(axes, lengths) if a in case.tables]
    return [q, k, v, *tables], cotangent


def run(case: Case, backend: str, q, k, v, *tables):
    tables, axes = iter(tables), "thw"[-len(case.q_thw) :]
    rel_pos = [next(tables) if axis in case.tables else None for axis in axes]
    return pooled_attention(q, k, v, rel_pos=rel_pos, backend=backend, **case.options)


# the specification


@pytest.mark.parametrize("queries", range(1, 20))
def test_exact_index_is_the_rational_one(queries):
    """trunc(i * a - j * b + (K - 1) * b) in fractions; the libraries' roundings agree where the lengths divide."""
    from vitkernels.pooled_attention.reference import relative_index

    for keys in range(1, 20):
        a, b = max(Fraction(keys, queries), Fraction(1)), max(Fraction(queries, keys), Fraction(1))
        expected = [[int(i * a - j * b + (keys - 1) * b) for j in range(keys)] for i in range(queries)]
        assert relative_index(queries, keys).tolist() == expected
        if queries % keys == 0 or keys % queries == 0:
            for index in ("slowfast", "torchvision"):
                assert relative_index(queries, keys, index).tolist() == expected


def test_the_libraries_round_otherwise_where_lengths_do_not_divide():
    """How many of the 6084 pairs of lengths get another index; SlowFast and torchvision differ in 454."""
    from vitkernels.pooled_attention.reference import relative_index

    differ = {("exact", "slowfast"): 0, ("exact", "torchvision"): 0, ("slowfast", "torchvision"): 0}
    for queries in range(2, 80):
        for keys in range(2, 80):
            rows = {index: relative_index(queries, keys, index) for index in ("exact", "slowfast", "torchvision")}
            for a, b in differ:
                differ[a, b] += not torch.equal(rows[a], rows[b])
    assert tuple(differ.values()) == (451, 40, 454)


def test_interpolation_is_that_of_torch():
    from vitkernels.pooled_attention.reference import resized

    table = torch.randn(31, 8, dtype=torch.float64)
    for queries, keys in ((11, 4), (16, 16), (30, 7), (1, 1)):
        rows = 2 * max(queries, keys) - 1
        expected = F.interpolate(table.T[None], size=rows, mode="linear")[0].T
        torch.testing.assert_close(resized(table, queries, keys), expected)


def pair_by_pair(case: Case, q, k, v, *tables):
    """Attention of one query of one head at a time; the distance of every pair from its coordinates."""
    axes = "thw"[-len(case.q_thw) :]
    tables = dict(zip([axis for axis in axes if axis in case.tables], tables))
    places = [torch.cartesian_prod(*map(torch.arange, thw)).view(-1, len(thw)) for thw in (case.q_thw, case.k_thw)]
    out, cls = torch.zeros_like(q), int(case.has_cls)
    for b, i, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        logits = k[b, :, h] @ q[b, i, h] * case.head_dim**-0.5
        for j in range(cls, len(logits) if i >= cls else 0):
            for axis, place, other, n, m in zip(axes, places[0][i - cls], places[1][j - cls], case.q_thw, case.k_thw):
                if axis in tables:
                    row = int(place) * max(n, m) // n + (m - 1 - int(other)) * max(n, m) // m
                    logits[j] += tables[axis][row] @ q[b, i, h]
        out[b, i, h] = logits.softmax(-1) @ v[b, :, h]
        if case.residual == "all" or (case.residual == "all_but_cls" and i >= cls):
            out[b, i, h] += q[b, i, h]
    return out


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3, 4), (2, 2, 2), 2, 8, True, "all_but_cls"),
        Case((4, 3), (2, 5), 1, 8, True, "all"),
        Case((3, 5), (5, 2), 1, 8, False, "all_but_cls", tables="w"),
        Case((2, 4, 3), (1, 2, 2), 1, 8, tables="t"),
    ],
)
def test_reference_equals_pair_by_pair(case):
    inputs, _ = make(case)
    torch.testing.assert_close(run(case, "reference", *inputs), pair_by_pair(case, *inputs))


# the numerical contract


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_contract(name, dtype, backend):
    case = CASES[name]
    if backend == "triton" and (dtype == torch.float64 or case.head_dim % 8):
        pytest.skip("compiled Triton has no float64 products, and heads of a multiple of 8")
    if name in LARGE and dtype == torch.float16:
        pytest.skip("large, and as bfloat16")
    inputs, cotangent = make(case, 1 if name in LARGE else 2)
    ours, reference = (functools.partial(run, case, b) for b in (backend, "reference"))
    tables = range(3, len(inputs))
    vanishing = dict.fromkeys((1, *tables), 2) if tokens(case, "k_thw") == 1 else {}  # the weight is always 1
    assert_contract(
        ours, reference, inputs, cotangent, dtype, tables=tables, vanishing=vanishing, device=DEVICE[backend]
    )


@pytest.mark.parametrize("residual", ["none", "all", "all_but_cls"])
@pytest.mark.parametrize("has_cls", [False, True])
def test_sdpa_contract(has_cls, residual):
    case = Case((6, 7), (3, 4), has_cls=has_cls, residual=residual, tables="")
    inputs, cotangent = make(case)
    ours, reference = (functools.partial(run, case, b) for b in ("sdpa", "reference"))
    assert_contract(ours, reference, inputs, cotangent, torch.float32)


@compiled
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_contract_with_scale(scale, backend):
    """The scale does not reach the relative term."""
    case = Case((6, 7), (3, 4), tables="hw", residual="all")
    inputs, cotangent = make(case)

    def ours(q, k, v, h, w, b=backend):
        return pooled_attention(q, k, v, rel_pos=(h, w), scale=scale, backend=b, **case.options)

    reference = functools.partial(ours, b="reference")
    assert_contract(ours, reference, inputs, cotangent, torch.float32, tables=(3, 4), device=DEVICE[backend])


@compiled
def test_strides(backend):
    """Parts of a packed projection, head-major, broadcast keys, a last dimension that is not contiguous."""
    device, case = DEVICE[backend], Case((5, 6), (5, 6), 3, 16, tables="hw", residual="all")
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 30, 3, 3, 16, device=device).unbind(2)
    tables = [torch.randn(n, 16, device=device) for n in (9, 11)]
    head_major = torch.randn(2, 3, 30, 16, device=device).transpose(1, 2)
    twisted = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    for triple in ((q, k, v), (head_major, k, twisted), (q, k[:, :1].expand_as(q), v), (twisted, head_major, q)):
        expected = run(case, "reference", *triple, *tables)
        torch.testing.assert_close(run(case, backend, *triple, *tables), expected)


@pytest.mark.parametrize("backend", [cpu, gpu, "reference", "sdpa"])
def test_a_blind_query(backend):
    inputs = [x.to(DEVICE[backend]) for x in blind_inputs(1, 36, 2, 8)]
    attend = functools.partial(pooled_attention, q_thw=(6, 6), k_thw=(6, 6), backend=backend)
    assert_blind(*outputs_and_gradients(attend, inputs, inputs[2]))


@compiled
def test_one_hot_softmax_gathers_exactly(backend):
    """A key that only its own query meets makes attention the identity: bit-equal."""
    device, case = DEVICE[backend], Case((8, 8), (8, 8), 2, 64, tables="")
    torch.manual_seed(0)
    q = 1e4 * torch.eye(64, device=device)[None, :, None].expand(1, 64, 2, 64).contiguous()
    v = torch.randn(1, 64, 2, 64, device=device)
    assert torch.equal(run(case, backend, q, q, v), v)


@compiled
@pytest.mark.parametrize("distance", [(0, 0), (2, -1), (-3, 2)])
def test_tables_alone_gather_exactly(distance, backend):
    """A table that is large at one distance along each axis shifts the map by it: bit-equal where that stays inside."""
    device, case = DEVICE[backend], Case((6, 7), (6, 7), 1, 16, has_cls=True, tables="hw")
    torch.manual_seed(0)
    q = F.one_hot(torch.zeros(43, dtype=torch.long, device=device), 16).float()[None, :, None]
    v = torch.randn(1, 43, 1, 16, device=device)
    tables = [torch.zeros(2 * n - 1, 16, device=device) for n in (6, 7)]
    for table, d, n in zip(tables, distance, (6, 7)):
        table[n - 1 - d, 0] = 1e4  # the row of a key d further on
    out = run(case, backend, q, torch.zeros_like(v), v, *tables)[0, 1:, 0].view(6, 7, 16)
    inside = [slice(max(0, -d), n - max(0, d)) for d, n in zip(distance, (6, 7))]
    target = [slice(max(0, d), n - max(0, -d)) for d, n in zip(distance, (6, 7))]
    assert torch.equal(out[tuple(inside)], v[0, 1:, 0].view(6, 7, 16)[tuple(target)])


@compiled
def test_nan_stays_in_its_image_and_head(backend):
    case = Case((9, 8), (4, 5), 2, 24, True, "all", tables="hw")
    inputs, cotangent = make(case)
    inputs, cotangent = [x.float().to(DEVICE[backend]) for x in inputs], cotangent.to(DEVICE[backend])
    attend = functools.partial(run, case, backend)
    clean = outputs_and_gradients(attend, inputs, cotangent)
    for which in range(3):
        spoiled = [x.clone() for x in inputs]
        spoiled[which][0, 5, 1, 3] = float("nan")
        got = outputs_and_gradients(attend, spoiled, cotangent)
        for a, b in zip(got[:4], clean[:4]):  # the tables are everyone's
            assert torch.equal(a[1], b[1]) and torch.equal(a[0, :, 0], b[0, :, 0])
        assert got[0][0, :, 1].isnan().any()
        if which == 0:  # a query is its own affair
            others = torch.arange(73) != 5
            assert torch.equal(got[0][:, others], clean[0][:, others])


@compiled
@pytest.mark.parametrize("batch, heads", [(0, 2), (2, 0)])
@pytest.mark.parametrize("chosen", [None, "reference"])
def test_empty_inputs(batch, heads, chosen, backend):
    case = Case((5, 6), (3, 2), heads, tables="hw")
    inputs, _ = make(case, batch)
    leaves = [x.float().to(DEVICE[backend]).requires_grad_() for x in inputs]
    out = run(case, chosen, *leaves)
    out.sum().backward()
    assert out.shape == leaves[0].shape and all(x.grad.shape == x.shape for x in leaves)
    assert all((x.grad == 0).all() for x in leaves[3:])


@compiled
@pytest.mark.parametrize("name", ["as stage 3 of an image", "a clip", "no positions"])
def test_same_bits_every_time(name, backend):
    case = CASES[name]
    inputs, cotangent = make(case, 3)
    inputs, cotangent = [x.float().to(DEVICE[backend]) for x in inputs], cotangent.to(DEVICE[backend])
    attend = functools.partial(run, case, backend)
    first = outputs_and_gradients(attend, inputs, cotangent)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs_and_gradients(attend, inputs, cotangent)))


@pytest.mark.parametrize("backend", [cpu])
def test_same_bits_for_any_number_of_threads(backend):
    inputs, cotangent = make(CASES["a clip"], 1)
    inputs, before, results = [x.float() for x in inputs], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(functools.partial(run, CASES["a clip"], backend), inputs, cotangent))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", [cpu])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3, 4), (2, 2, 3), 2, 4, True, "all_but_cls", interpolated=True),
        Case((5, 3), (2, 4), 1, 8, False, "all", tables="hw"),
        Case((4, 70), (3, 2), 1, 3, True, tables="h"),
        Case((3, 4), (2, 2), 2, 4, tables=""),
    ],
)
def test_gradcheck(case, backend):
    inputs, _ = make(case, 1)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(functools.partial(run, case, backend), leaves, fast_mode=True)


def test_the_reference_differentiates_twice():
    case = Case((3, 2), (2, 2), 1, 4, True, "all", tables="hw")
    inputs, _ = make(case, 1)
    attend = functools.partial(run, case, "reference")
    assert torch.autograd.gradgradcheck(attend, [x.requires_grad_() for x in inputs], fast_mode=True)


@compiled
@pytest.mark.parametrize("strides", [(2**31 + 8, 32, 16), (512, 2**29, 16), (512, 32, 2**31)])
def test_addresses_past_2_31_elements(strides, backend):
    case = Case((2, 3), (2, 3), 2, 8, tables="hw", residual="all")
    near = torch.randn(3, 2, 6, 2, 8).half()
    far = []
    for x in near:
        storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1))), DEVICE[backend])
        far.append(storage.as_strided(x.shape, (*strides, 1)).copy_(x))
    tables = [torch.randn(n, 8, device=DEVICE[backend]) for n in (3, 5)]
    results = []
    for qkv in (near.to(DEVICE[backend]).unbind(0), far):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = run(case, backend, *leaves, *tables)
        results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# memory

MEMORY = """
import sys, torch
from vitkernels import pooled_attention

q_thw, k_thw, head_dim, positions = (8, 56, 56), (8, 7, 7), 96, True
if sys.argv[1] == "long":
    q_thw, k_thw, head_dim = (20, 78, 78), (20, 10, 10), 72
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def tensors(queries, keys):
    make = lambda n: torch.randn(1, n + 1, 1, head_dim, requires_grad=True)
    q, k, v = make(torch.Size(queries).numel()), make(torch.Size(keys).numel()), make(torch.Size(keys).numel())
    return q, k, v, [torch.randn(2 * max(n, m) - 1, head_dim, requires_grad=True) for n, m in zip(queries, keys)]

def step(q, k, v, tables, queries, keys):
    options = dict(q_thw=queries, k_thw=keys, has_cls=True, residual="all_but_cls", backend="cpu")
    out = pooled_attention(q, k, v, rel_pos=tables, **options)
    dout = torch.randn_like(out)
    return out, dout, torch.autograd.grad(out, [q, k, v, *tables], dout)

small = tensors((2, 8, 8), (2, 4, 4))
step(*small, (2, 8, 8), (2, 4, 4))  # whatever a first call allocates
before = status("VmRSS")
q, k, v, tables = tensors(q_thw, k_thw)
out, dout, gradients = step(q, k, v, tables, q_thw, k_thw)
needed = sum(x.numel() * 4 / 2**20 for x in (q, k, v, *tables, out, dout, *gradients))
peak = status("VmHWM") - before
assert all(x.isfinite().all() for x in (out, *gradients))
for i in torch.randint(1, q.shape[1], (5,)).tolist():
    t, y, x = (i - 1) // (q_thw[1] * q_thw[2]), (i - 1) // q_thw[2] % q_thw[1], (i - 1) % q_thw[2]
    query, logits = q[0, i, 0].double(), torch.zeros(k_thw, dtype=torch.float64)
    for axis, place in enumerate((t, y, x)):
        n, m = q_thw[axis], k_thw[axis]
        rows = [place * max(n, m) // n + (m - 1 - j) * max(n, m) // m for j in range(m)]
        shape = [1, 1, 1]
        shape[axis] = m
        logits = logits + (tables[axis].double()[rows] @ query).view(shape)
    logits = torch.cat((torch.zeros(1), logits.flatten())) + k[0, :, 0].double() @ query * head_dim**-0.5
    expected = logits.softmax(0) @ v[0, :, 0].double() + query
    assert (out[0, i, 0] - expected).abs().max() < 1e-5 * expected.abs().max()
print(f"peak {peak:.0f} MiB, inputs, outputs and gradients {needed:.0f} MiB")
assert peak < 1.5 * needed
"""


@pytest.mark.skipif(not vitkernels._native.cpu.available, reason=str(vitkernels._native.cpu.reason))
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("length", ["25089 x 393", pytest.param("long", id="121681 x 2001")])
def test_bounded_memory(length):
    """Forward and backward of a whole clip, of which the scores alone would take 39 MB and 974 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, length], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# the choice of the backend


def test_sdpa_refuses_positions():
    inputs, _ = make(CASES["one query"])
    with pytest.raises(RuntimeError, match="sdpa cannot run pooled_attention: .* no relative positions"):
        run(CASES["one query"], "sdpa", *inputs)


@pytest.mark.skipif(not vitkernels._native.cpu.available, reason=str(vitkernels._native.cpu.reason))
@pytest.mark.parametrize("side, backend", [(32, "cpu"), (33, "sdpa")])
def test_default_without_positions(side, backend):
    """Bit-equal to what a CPU runs: PyTorch's attention for more than 1,024 queries and keys."""
    case = Case((side, side), (side, side), 1, 8, tables="")
    inputs = [x.float() for x in make(case, 1)[0]]
    assert torch.equal(run(case, None, *inputs), run(case, backend, *inputs))
    other = {"cpu": "sdpa", "sdpa": "cpu"}[backend]
    assert not torch.equal(run(case, None, *inputs), run(case, other, *inputs))


def test_other_operators_have_no_sdpa():
    x = torch.randn(1, 7, 7, 1, 8)
    with pytest.raises(RuntimeError, match="sdpa cannot run partition_attention: it has no kernels for that"):
        vitkernels.partition_attention(x, x, x, vitkernels.Partition.window(7), backend="sdpa")


# torch.library, compile, export, functional transforms, autocast

SMALL = Case((4, 5), (2, 3), 2, 16, True, "all_but_cls", tables="hw")


@compiled
def test_opcheck(backend):
    device = DEVICE[backend]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (41, 13, 13))
    lengths = (2, 2), (4, 2), (5, 3)
    tables = [torch.randn(9, 16, device=device) for _ in lengths]
    indices = [torch.randint(9, n, device=device) for n in lengths]
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.vitkernels
    geometry = ([2, 4, 5], [2, 2, 3], True, 2, 0.25)
    for first in (0, 1, 3):
        chosen = [None if i < first else x for xs in (tables, indices) for i, x in enumerate(xs)]
        arguments = (q, k, v, *chosen, *geometry)
        torch.library.opcheck(ops.pooled_attention_forward.default, arguments, test_utils=utilities)
        statistic = ops.pooled_attention_forward(*arguments)[1]
        arguments = (q.clone(), q, k, v, *chosen, statistic, *geometry)
        torch.library.opcheck(ops.pooled_attention_backward.default, arguments, test_utils=utilities)


RUNS = {  # rows of a table of 40 that 5 queries and 4 keys of an axis meet
    "in turn": torch.arange(5)[:, None] * 3 + torch.arange(4),
    "every third": torch.arange(5)[:, None] + torch.arange(4) * 3,
    "every seventh, backwards": 39 - torch.arange(5)[:, None] - torch.arange(4) * 7,
    "one row": torch.arange(5)[:, None].expand(5, 4).contiguous(),
    "steps that differ": torch.arange(5)[:, None] * torch.arange(4),
    "any": torch.randint(40, (5, 4), generator=torch.Generator().manual_seed(0)),
}


@compiled
@pytest.mark.parametrize("name", RUNS)
def test_any_rows(name, backend):
    """The operators take any choice of rows, of which maps use a few kinds."""
    from vitkernels.pooled_attention.reference import pooled_attention as reference

    torch.manual_seed(0)
    index = RUNS[name]
    dtype, device = (torch.float64, "cpu") if backend == "cpu" else (torch.float32, DEVICE[backend])
    q, k, v, table, dout = (
        torch.randn(shape, dtype=dtype) for shape in (*[(2, n, 2, 16) for n in (15, 8, 8)], (40, 16), (2, 15, 2, 16))
    )
    geometry = [1, 3, 5], [1, 2, 4], False, 1, 0.25

    def plain(q, k, v, table):
        return reference(q, k, v, [None, None, table], [None, None, index], *geometry[:3], "all", 0.25)

    exact = outputs_and_gradients(plain, [x.double() for x in (q, k, v, table)], dout)
    eager = outputs_and_gradients(plain, (q, k, v, table), dout)
    q, k, v, table, dout, index = (x.to(device) for x in (q, k, v, table, dout, index))
    inputs = (q, k, v, None, None, table, None, None, index)
    out, statistic = torch.ops.vitkernels.pooled_attention_forward(*inputs, *geometry)
    dq, dk, dv, *_, dtable = torch.ops.vitkernels.pooled_attention_backward(dout, *inputs, statistic, *geometry)
    vanishing = {3: 0} if name == "one row" else {}  # it adds the same to every logit
    assert_as_exact((out, dq, dk, dv, dtable), eager, exact, dtype, vanishing=vanishing)


@pytest.mark.parametrize("backend", [cpu])
def test_the_raw_operator_refuses_what_does_not_fit(backend):
    q, k, table = torch.randn(1, 15, 2, 16), torch.randn(1, 8, 2, 16), torch.randn(40, 16)
    index = RUNS["in turn"]
    rows = "an index must choose rows of its table"
    places, tables = "an index must be contiguous .*, int64", "tables must be contiguous .*, float32"
    for bad_table, bad_index, message in (
        (table, index + 30, rows),
        (table, index - 1, rows),
        (table, None, "a table needs an index"),
        (table, index.int(), places),
        (table, index.T.contiguous(), places),
        (table.double(), index, tables),
        (table[:, :8].contiguous(), index, tables),
        (table.T.contiguous().T, index, tables),
    ):
        inputs = (q, k, k, None, None, bad_table, None, None, bad_index)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vitkernels.pooled_attention_forward(*inputs, [1, 3, 5], [1, 2, 4], False, 1, 0.25)


@compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend):
    device = DEVICE[backend]
    torch.compiler.reset()

    def layer(*inputs):
        return run(SMALL, None, *inputs).relu()

    compiled_layer = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        inputs, cotangent = make(SMALL, batch)
        inputs, cotangent = [x.float().to(device) for x in inputs], cotangent.to(device)
        expected = outputs_and_gradients(layer, inputs, cotangent)
        for a, b in zip(outputs_and_gradients(compiled_layer, inputs, cotangent), expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", cpu, gpu])
@pytest.mark.parametrize("interpolated", [False, True])
def test_export(interpolated, backend, tmp_path):
    case = SMALL._replace(interpolated=interpolated)

    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return run(case, backend, *inputs)

    inputs = tuple(x.float().to(DEVICE[backend]) for x in make(case)[0])
    torch.export.save(torch.export.export(Layer(), inputs), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(loaded(*inputs), Layer()(*inputs))


@compiled
def test_func_grad(backend):
    inputs = [x.float().to(DEVICE[backend]) for x in make(SMALL)[0]]

    def loss(*inputs):
        return run(SMALL, backend, *inputs).square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    everything = tuple(range(len(inputs)))
    got, expected = torch.func.grad(loss, everything)(*inputs), torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [cpu, gpu])
def test_an_index_made_in_inference_mode_serves_training(backend):
    case = Case((11, 13), (3, 5), tables="hw")
    inputs = [x.float().to(DEVICE[backend]) for x in make(case)[0]]
    with torch.inference_mode():
        run(case, backend, *inputs)
    leaves = [x.requires_grad_() for x in inputs]
    run(case, backend, *leaves).sum().backward()
    assert leaves[3].grad.isfinite().all() and leaves[3].grad.any()


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    device = DEVICE[backend]
    inputs = [x.float().to(device).requires_grad_() for x in make(SMALL)[0]]
    with torch.autocast(device, dtype):
        out = run(SMALL, backend, *inputs)
    assert out.dtype == dtype
    assert torch.equal(out, run(SMALL, backend, *(x.to(dtype) for x in inputs[:3]), *inputs[3:]))
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph():
    leaves = [x.half().cuda().requires_grad_() for x in make(SMALL)[0]]

    def step():
        out = run(SMALL, "triton", *leaves)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    assert_graph_replays(step, leaves[0])


# bad input

Q, K = torch.randn(2, 20, 3, 32), torch.randn(2, 6, 3, 32)
TABLES = (torch.randn(7, 32), torch.randn(9, 32))


def call(q=Q, k=K, v=K, q_thw=(4, 5), k_thw=(2, 3), **options):
    return lambda: pooled_attention(q, k, v, q_thw=q_thw, k_thw=k_thw, **options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (call(q=[1]), TypeError, r"q must be a torch.Tensor \[B, N, heads, head_dim\], got list"),
        (call(q=Q[0]), ValueError, "q must be .* got 3 dimensions"),
        (call(k=K[:1]), ValueError, "q, k and v must agree in batch, heads and head_dim, got q .* and k"),
        (call(v=K[..., :16]), ValueError, "agree in batch, heads and head_dim, got q .* and v"),
        (call(v=K[:, :5]), ValueError, "k and v must have one length, got k .* and v"),
        (call(v=K.double()), TypeError, "one dtype"),
        (call(q=Q.int()), TypeError, "convert it first"),
        (call(k=K.to("meta")), ValueError, "q and k must be on one device, got cpu and meta"),
        (call(q_thw=(4, 4)), ValueError, r"q_thw \(4, 4\) stands for 4 \* 4 = 16 tokens, q has 20"),
        (call(k_thw=(3, 3)), ValueError, r"k_thw \(3, 3\) stands for 3 \* 3 = 9 tokens, k has 6"),
        (call(has_cls=True), ValueError, r"4 \* 5 \+ 1 class token = 21 tokens, q has 20"),
        (call(q=Q[:, :0], has_cls=True), ValueError, "has_cls=True takes the first token of q .* q has no token"),
        (call(q_thw=(20,)), ValueError, r"q_thw must be \(H, W\) or \(T, H, W\), in tokens, got \(20,\)"),
        (call(q_thw=20), ValueError, r"q_thw must be \(H, W\) or \(T, H, W\), in tokens, got 20"),
        (call(q_thw=(4.0, 5)), TypeError, "q_thw must be a tuple of ints"),
        (call(q_thw=(0, 5)), ValueError, "q_thw must be at least 1 along every axis"),
        (call(q_thw=(1, 4, 5)), ValueError, r"q_thw and k_thw must have the same axes, got \(1, 4, 5\) and \(2, 3\)"),
        (call(rel_pos=TABLES[0]), ValueError, r"rel_pos must be \(rel_pos_h, rel_pos_w\), .* got Tensor"),
        (call(rel_pos=TABLES[:1]), ValueError, r"rel_pos must be \(rel_pos_h, rel_pos_w\), .* got 1 entries"),
        (
            call(rel_pos=(TABLES[0], TABLES[1][:, :31])),
            ValueError,
            r"rel_pos_w must be \[length, head_dim\] = \[any, 32\], got \[9, 31\]",
        ),
        (call(rel_pos=(TABLES[0][:0], TABLES[1])), ValueError, r"rel_pos_h must be .* got \[0, 32\]"),
        (call(rel_pos=(TABLES[0].int(), TABLES[1])), TypeError, "rel_pos_h must be one of float32"),
        (call(rel_pos=(TABLES[0].to("meta"), None)), ValueError, "q and rel_pos_h must be on one device"),
        (call(residual="some"), ValueError, "residual must be one of none, all, all_but_cls, got 'some'"),
        (call(index="timm"), ValueError, "index must be one of exact, slowfast, torchvision, got 'timm'"),
        (call(scale="1"), TypeError, "scale must be a number"),
        (call(backend="cuda"), RuntimeError, "it has no kernels for that"),
        (call(backend="gpu"), ValueError, "backend must be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
