"""The benchmark: its baselines are right, its gate refuses wrong kernels, its report prints only measured numbers."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitkernels import (
    DynamicPositionBias,
    Partition,
    balanced_clusters,
    feature_space_attention,
    lsda_attention,
    partition_attention_qkvpacked,
)

PARTITIONS = {
    "window": (14, 21, Partition.window(7)),
    "window on a map that does not divide": (9, 10, Partition.window(4)),
    "shifted window": (8, 12, Partition.window(4, (2, 1))),
    "shifted on one axis": (8, 9, Partition((4, 3), (2, 1), (3, 0))),
    "long": (12, 12, Partition.long(3, 2)),
    "long with a group wholly outside": (13, 11, Partition.long(3, 4)),
    "grid on a map that does not divide": (10, 9, Partition.grid(4)),
    "stripes": (6, 5, Partition.stripes(2)),
}

MVIT = ("v1-b-16x4-block0", "v1-b-16x4-block3", "v2-s-224-stage1", "v2-s-224-stage3-first", "v2-s-224-stage4")
KINDS = ("pool", "attend", "both")
PLAIN = ("eager", "eager-unbind", "sdpa")  # what needs no GPU, no other library and no compiler


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, which run as scripts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    kinds = ("partition_attention", "cluster_attention", "pooled_attention", "models")
    names = ("workload", "libraries", *kinds, "cases", "measure", "roofline", "report", "performance", "run")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def tiny(bench, monkeypatch):
    """The benchmark with a single small case, for float32 on a CPU."""
    partition = Partition.window(4).on(6, 7)
    case = bench.partition_attention.Case("tiny", 6, 7, 2, partition, "dpb", cpu_batch=2, head_dim=8)
    return with_cases(bench, monkeypatch, case)


@pytest.fixture
def boat(bench, monkeypatch):
    """The benchmark with the clusters of every case, but small ones."""
    cases = [case for case in bench.cases.CASES if case.name.startswith("boat")]
    # as many levels and heads
    small = {"width": 3, "leaf_size": 3, "overlap": 2, "cpu_batch": 1, "head_dim": 8}
    return with_cases(bench, monkeypatch, *(replace(case, height=1 << case.levels, **small) for case in cases))


@pytest.fixture
def mvit(bench, monkeypatch):
    """The benchmark with layers of every kind of MViT, but small ones."""
    cases = [case for case in bench.cases.CASES if case.name.removeprefix("mvit").rpartition("-")[0] in MVIT]
    return with_cases(bench, monkeypatch, *(small_mvit(case) for case in cases))


def small_mvit(case):
    """With two frames, and a seventh of each side."""
    sides = {"height": case.height // 7, "width": case.width // 7}
    return replace(case, **sides, frames=case.frames and 2, head_dim=8, cpu_batch=1)


def with_cases(bench, monkeypatch, *cases):
    monkeypatch.setattr(bench.run, "CASES", cases)
    monkeypatch.setattr(bench.run, "QUICK", ("*",))
    monkeypatch.setattr(bench.measure, "copy_bandwidth", lambda device, size: 1e9)
    monkeypatch.setattr(bench.measure, "matmul_rate", lambda device, dtype, size: 1e30)  # all floors are memory's
    return bench


def start(bench, folder: Path, *arguments: str) -> tuple[int, dict]:
    """Exit status and results of a brief run."""
    path = folder / "results.json"
    status = bench.run.main(["--quick", "--seconds", "0", "--device", "cpu", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("height, width, partition", PARTITIONS.values(), ids=PARTITIONS)
def test_baseline_equals_reference(bench, name, height, width, partition):
    partition = partition.on(height, width)
    torch.manual_seed(0)
    qkv = torch.randn(2, height, width, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, *(2 * g - 1 for g in partition.group), dtype=torch.float64, requires_grad=True)
    expected = partition_attention_qkvpacked(qkv, partition, table, backend="reference")
    grouping = bench.partition_attention.Grouping(partition, height, width, qkv.device, qkv.dtype)
    found = bench.partition_attention.BASELINES[name](grouping)(qkv, table)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, (qkv, table), dout) for out in (found, expected)))
    without = partition_attention_qkvpacked(qkv, partition, None, backend="reference")
    torch.testing.assert_close(bench.partition_attention.BASELINES[name](grouping)(qkv, None), without)


@pytest.mark.parametrize("height, width, partition", PARTITIONS.values(), ids=PARTITIONS)
def test_flex_baseline_equals_reference(bench, height, width, partition):
    """Forward only: on a CPU FlexAttention has no backward."""
    qkv = torch.randn(2, height, width, 3, 2, 8, dtype=torch.float64)
    table = torch.randn(2, *(2 * g - 1 for g in partition.on(height, width).group), dtype=torch.float64)
    grouping = bench.partition_attention.Grouping(partition, height, width, qkv.device, qkv.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs without compilation
        found = bench.partition_attention.flex(grouping, compiled=False)(qkv, table)
    torch.testing.assert_close(found, partition_attention_qkvpacked(qkv, partition, table, backend="reference"))


@pytest.mark.parametrize("name", ["eager", "eager-unbind", "sdpa"])
def test_baseline_evaluates_the_position_mlp(bench, name):
    torch.manual_seed(0)
    qkv = torch.randn(2, 8, 8, 3, 2, 16, dtype=torch.float64)
    module = DynamicPositionBias(32, 2).double()
    expected = lsda_attention(qkv, module, group_size=4, interval=2, backend="reference")
    grouping = bench.partition_attention.Grouping(Partition.long(4, 2), 8, 8, qkv.device, qkv.dtype)
    found = bench.partition_attention.BASELINES[name](grouping)(qkv, module)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(out.square().sum(), list(module.parameters())) for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_cases_are_layers_of_the_models(bench):
    cases = {case.name: case for case in bench.cases.CASES}
    assert len(cases) == len(bench.cases.CASES)
    assert set(bench.cases.QUICK) <= cases.keys()
    for case in cases.values():
        assert case.head_dim == (96 if case.name.startswith("mvit") else 32)
        assert all(str(size) in case.describe() for size in (case.height, case.width, case.heads))
    partitions = {k: c for k, c in cases.items() if isinstance(c, bench.partition_attention.Case)}
    for case in partitions.values():
        index = case.partition.index(case.height, case.width)
        tokens = index[index >= 0].sort().values
        assert torch.equal(tokens, torch.arange(case.height * case.width)), case.name
        kind = case.name.split("-")[0]
        assert case.bias == {"crossformer": "dpb", "crossformer++": "dpb", "plain": "none"}.get(kind, "table")
    lda = cases["crossformer-s-224-stage1-lda"]
    assert (lda.height, lda.width, lda.dim) == (56, 56, 96)
    assert (lda.partition.group, lda.partition.interval) == ((7, 7), (8, 8))
    assert "crossformer-s-224-stage4-lda" not in cases
    detection = cases["crossformer-s-1344x800-stage4-sda"]
    assert (detection.height, detection.width) == (25, 42)
    assert {case.partition.tokens for case in partitions.values()} == {16, 49, 196}
    assert cases["maxvit-t-224-stage4-block"].heads == 16
    assert cases["swin-t-224-stage2-shifted"].partition.shift == (3, 3)


@pytest.mark.parametrize(
    "layer, size, heads, levels, leaf, gpu_batch",
    [
        ("224-stage1", 56, 3, 6, 49, 128),
        ("224-stage2", 28, 6, 4, 49, 128),
        ("224-stage3", 14, 12, 2, 49, 128),
        ("384-stage1", 96, 3, 7, 72, 32),
    ],
)
def test_cases_of_boat(bench, layer, size, heads, levels, leaf, gpu_batch):
    cases = {case.name: case for case in bench.cases.CASES}
    for step in ("cluster", "attend", "both"):
        case = cases[f"boat-swin-t-{layer}-{step}"]
        assert (case.height, case.width, case.heads, case.overlap) == (size, size, heads, 20)
        assert (case.levels, case.leaf, case.batch("cpu"), case.batch("cuda")) == (levels, leaf, 2, gpu_batch)
        assert case.kind.modes == (("fwd",) if step == "cluster" else ("fwd", "bwd", "full"))
    with pytest.raises(ValueError, match="not several leaves of one size"):
        replace(case, height=14, width=15)


@pytest.mark.parametrize(
    "layer, heads, queries, keys, pools",
    [
        ("v1-b-16x4-block0", 1, 25089, 393, 2),
        ("v1-b-16x4-block1", 2, 6273, 1569, 3),
        ("v1-b-16x4-block3", 4, 1569, 1569, 3),
        ("v1-b-16x4-block4", 4, 1569, 393, 2),
        ("v1-b-16x4-block14", 8, 393, 1569, 3),
        ("v2-s-224-stage1", 1, 3136, 196, 3),
        ("v2-s-224-stage2-first", 2, 784, 784, 3),
        ("v2-s-224-stage2", 2, 784, 196, 3),
        ("v2-s-224-stage3-first", 4, 196, 784, 3),
        ("v2-s-224-stage3", 4, 196, 196, 3),
        ("v2-s-224-stage4-first", 8, 49, 196, 3),
        ("v2-s-224-stage4", 8, 49, 49, 3),
    ],
)
def test_cases_of_mvit(bench, layer, heads, queries, keys, pools):
    cases = {case.name: case for case in bench.cases.CASES}
    for step in KINDS:
        case = cases[f"mvit{layer}-{step}"]
        assert (case.heads, case.queries, case.keys, 2 + case.pools_queries) == (heads, queries, keys, pools)
        assert (case.batch("cpu"), case.batch("cuda")) == ((1, 8) if layer.startswith("v1") else (4, 128))
    assert len([name for name in cases if name.startswith("mvit")]) == 3 * 12


def test_quick_run_writes_json_and_csv(tiny, tmp_path, capsys):
    table = tmp_path / "tables" / "results.csv"
    status, results = start(tiny, tmp_path, "--backend", "sdpa", "eager-unbind", "reference", "--csv", str(table))
    assert status == 0 and results["complete"]
    rows = results["rows"]
    names = ["eager", "sdpa", "eager-unbind", "vitkernels-reference"]
    assert [(row["mode"], row["contender"]) for row in rows] == [(mode, n) for mode in ("fwd", "full") for n in names]
    for row in rows:
        assert row["status"] == "ok" and row["rounds"] >= tiny.measure.AT_LEAST
        assert 0 < row["p20"] <= row["ms"] <= row["p80"] and row["memory"] > 0
        tensors = {"fwd": 4, "full": 11}[row["mode"]]
        assert row["gbps"] == pytest.approx(tensors * 2 * 6 * 7 * 2 * 8 * 4 / row["ms"] / 1e6)
        assert row["floor"] == pytest.approx(row["gbps"])  # the copy bandwidth here is 1 GB/s
        assert row["bound"] == "memory" and row["floor_ms"] == pytest.approx(row["floor"] * row["ms"])
    assert rows[0]["speedup"] == 1
    assert {"cpu", "threads", "torch", "commit", "date"} <= results["machine"].keys()
    with table.open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["ms"]) for row in read] == [row["ms"] for row in rows]
    printed = capsys.readouterr().out
    assert "tiny: batch 2" in printed and all(name in printed for name in names)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


WRONG = {
    "output": lambda out: out * 1.001,
    "qkv gradient": _WrongGradient.apply,
    "nan": lambda out: torch.where(torch.arange(out.shape[1])[:, None, None, None] == 3, torch.nan, out),
    "shape": lambda out: out[:, 1:],
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_gate_refuses_a_wrong_kernel(tiny, tmp_path, monkeypatch, capsys, spoil):
    right = tiny.partition_attention.vitkernels_on

    def wrong(backend, case):
        attend = right("reference", case)
        return attend if backend == "reference" else lambda qkv, bias: spoil(attend(qkv, bias))

    monkeypatch.setattr(tiny.partition_attention, "vitkernels_on", wrong)
    status, results = start(tiny, tmp_path, "--backend", "cpu")
    assert status == 1
    ours = [row for row in results["rows"] if row["contender"] == "vitkernels-cpu"]
    assert [row["status"] for row in ours] == ["FAILED", "FAILED"] and all("ms" not in row for row in ours)
    assert all(row["status"] == "ok" for row in results["rows"] if row["contender"] == "eager")
    assert "FAILED: " in capsys.readouterr().out


def test_gate_accepts_every_float32_baseline(tiny):
    case = tiny.run.CASES[0]
    workload = case.kind.random(case, 2, torch.device("cpu"), torch.float32)
    objection_to = workload.gate(gradients=True)
    for name in ("eager", "eager-unbind", "sdpa"):
        assert objection_to(workload.build(name)) is None


def cluster_workload(bench, kind: str, dtype: torch.dtype = torch.float32):
    """192 tokens in 16 leaves of 12."""
    case = next(case for case in bench.cases.CASES if case.name == f"boat-swin-t-224-stage1-{kind}")
    case = replace(case, height=12, width=16, leaf_size=12, overlap=5, head_dim=8)
    return case.kind.random(case, 2, torch.device("cpu"), dtype)


@pytest.mark.parametrize("name", ["eager", "eager-unbind", "sdpa"])
def test_cluster_baseline_equals_reference(bench, name):
    workload = cluster_workload(bench, "attend", torch.float64)
    baseline, q = workload.build(name), workload.qkv[:, :, 0].detach()
    options = {"leaf_size": 12, "backend": "reference"}
    order = balanced_clusters(q, **options)
    assert torch.equal(workload.order, order) and torch.equal(baseline.clusters(q.float()).int(), order)
    order = torch.rand(order.shape).argsort(-1).int()
    expected = feature_space_attention(workload.qkv, order=order, overlap=5, **options)
    found = baseline.attend(workload.qkv, order)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, workload.qkv, workload.dout)[0] for out in (found, expected)))
    torch.testing.assert_close(baseline.both(workload.qkv), baseline.attend(workload.qkv, workload.order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cluster", "attend", "both"])
def test_gate_accepts_every_cluster_baseline(bench, kind, dtype):
    workload = cluster_workload(bench, kind, dtype)
    objection_to = workload.gate(gradients=True)
    for name in workload.baselines.keys() & set(PLAIN):
        assert objection_to(workload.build(name)) is None, name


def has_cpu_kernels(*names: str) -> bool:
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"vitkernels::{name}", "CPU") for name in names)


BOAT_OPERATORS = ("balanced_clusters", "cluster_attention_forward", "cluster_attention_backward")
CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(not has_cpu_kernels(*BOAT_OPERATORS), reason="the C++ library was not built")
)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_every_cluster_case_runs(boat, tmp_path, backend):
    status, results = start(boat, tmp_path, "--backend", "sdpa", "eager-unbind", backend, "--threads", "1")
    assert status == 0 and results["complete"]
    cases = {case.name: case for case in boat.run.CASES}
    assert {row["case"] for row in results["rows"]} == cases.keys() and len(cases) == 12
    tensors = {"cluster": {"fwd": 1}, "attend": {"fwd": 4, "full": 11}, "both": {"fwd": 4, "full": 11}}
    orders = {"cluster": {"fwd": 1}, "attend": {"fwd": 1, "full": 2}, "both": {"fwd": 1, "full": 2}}
    for row in results["rows"]:
        case, kind, mode = cases[row["case"]], row["case"].split("-")[-1], row["mode"]
        if (kind, row["contender"]) == ("cluster", "sdpa"):
            assert (row["status"], row["reason"]) == ("skipped", "no baseline of this operator")
            continue
        places = case.height * case.width * case.heads
        size = places * 8 * 4 * tensors[kind][mode] + places * 4 * orders[kind][mode]
        assert row["status"] == "ok" and row["gbps"] == pytest.approx(size / row["ms"] / 1e6)
    assert len(results["rows"]) == 4 * 4 * (1 + 2 + 2)


def _one_place_on(order):
    return order.roll(1, -1)


def _twice_the_first(order):
    return torch.cat((order[..., :1], order[..., :-1]), -1)


WRONG_CLUSTERS = {
    "an order that is none": ("clusters", _twice_the_first, "not a permutation", ("cluster", "both")),
    "an order of other clusters": ("clusters", _one_place_on, "are in the leaf", ("cluster", "both")),
    "output": ("attend", lambda out: out * 1.001, "output is off", ("attend",)),
    "gradient": ("attend", _WrongGradient.apply, "qkv gradient is off", ("attend",)),
    "output of both": ("both", lambda out: out * 1.001, "output is off", ("both",)),
    "gradient of both": ("both", _WrongGradient.apply, "qkv gradient is off", ("both",)),
}


@pytest.mark.parametrize("method, spoil, reason, kinds", WRONG_CLUSTERS.values(), ids=WRONG_CLUSTERS)
def test_gate_refuses_wrong_clusters_and_wrong_attention(bench, method, spoil, reason, kinds):
    for kind in kinds:
        workload = cluster_workload(bench, kind)
        objection_to, contender = workload.gate(gradients=True), workload.build("vitkernels-reference")
        assert objection_to(contender) is None
        right = getattr(contender, method)
        setattr(contender, method, lambda *inputs, right=right: spoil(right(*inputs)))
        assert reason in objection_to(contender)


def mvit_workload(bench, layer: str, kind: str, dtype: torch.dtype = torch.float32):
    case = small_mvit(next(case for case in bench.cases.CASES if case.name == f"mvit{layer}-{kind}"))
    return case.kind.random(case, 2, torch.device("cpu"), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", MVIT)
def test_mvit_baseline_equals_reference(bench, layer, kind):
    workload = mvit_workload(bench, layer, kind, torch.float64).double()
    expected = workload.tensors(workload.build("vitkernels-reference"), gradients=True)
    assert len(expected) == {"pool": 6, "attend": 4, "both": 4}[kind] + (layer.startswith("v2") and kind != "pool")
    for name in workload.baselines.keys() & set(PLAIN):
        torch.testing.assert_close(workload.tensors(workload.build(name), gradients=True), expected)


@cache
def convolves_volumes(dtype: torch.dtype) -> bool:
    """Whether PyTorch has the weight's gradient right, of a depthwise convolution of channels-last volumes.

    In bfloat16, on CPUs with AMX, it leaves a part of it unwritten.
    """
    torch.manual_seed(0)
    x, weight = torch.randn(2, 2, 4, 4, 32, dtype=dtype).movedim(-1, 1), torch.randn(32, 1, 3, 3, 3, dtype=dtype)

    def gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight.requires_grad_()
        out = torch.nn.functional.conv3d(x, weight, padding=1, groups=32)
        return torch.autograd.grad(out.square().sum(), weight)[0]

    exact = gradient(x.double(), weight.double())
    return bool((gradient(x, weight) - exact).abs().max() < 0.1 * exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", MVIT)
def test_gate_accepts_every_mvit_baseline(bench, layer, kind, dtype):
    workload = mvit_workload(bench, layer, kind, dtype)
    objection_to = workload.gate(gradients=True)
    for name in workload.baselines.keys() & set(PLAIN):
        objection = objection_to(workload.build(name))
        unwritten = layer.startswith("v1") and not convolves_volumes(dtype)
        only = re.fullmatch("convolution gradient is off by [^;]*", objection or "")
        assert objection is None or (unwritten and only), (name, objection)


def test_a_reference_that_is_not_finite_is_no_measure(bench):
    """Two roundings are allowed then, and a NaN of a contender is refused as ever."""
    exact = torch.randn(8, dtype=torch.float64)
    found = {"reference": exact * float("nan"), "right": exact, "wrong": 1.1 * exact, "nan": exact * float("nan")}

    class Stand:
        def __init__(self, dtype=torch.bfloat16):
            self.dtype = dtype

        def double(self):
            return Stand(torch.float64)

        def build(self, name):
            return name.removeprefix("vitkernels-")

        def tensors(self, name, gradients):
            return {"out": exact if self.dtype == torch.float64 else found[name].to(self.dtype)}

    contract = bench.workload.Contract(Stand(), True)
    assert contract.objection("right") is None
    assert "out is off by nan, allowed" in contract.objection("nan")
    assert re.fullmatch(r"out is off by \d\S*, allowed \d\S*", contract.objection("wrong"))


MVIT_OPERATORS = [f"{name}_{way}" for name in ("pool_tokens", "pooled_attention") for way in ("forward", "backward")]
MVIT_CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(not has_cpu_kernels(*MVIT_OPERATORS), reason="the C++ library was not built")
)


@pytest.mark.parametrize("backend", ["reference", MVIT_CPU])
def test_every_mvit_case_runs(mvit, tmp_path, backend):
    status, results = start(mvit, tmp_path, "--backend", "sdpa", "eager-unbind", backend, "--threads", "1")
    assert status == 0 and results["complete"]
    cases = {case.name: case for case in mvit.run.CASES}
    assert {row["case"] for row in results["rows"]} == cases.keys()
    for row in results["rows"]:
        case, kind = cases[row["case"]], row["case"].split("-")[-1]
        if (kind, row["contender"]) in (("pool", "sdpa"), ("attend", "eager-unbind")):
            assert (row["status"], row["reason"]) == ("skipped", "no baseline of this operator")
            continue
        assert row["status"] == "ok" and row["gbps"] == pytest.approx(moved(case, kind, row["mode"]) / row["ms"] / 1e6)
    assert len(results["rows"]) == 4 * 15 * 2


def moved(case, kind: str, mode: str) -> int:
    """Bytes of float32 numbers that a layer of one image reads and writes."""
    queries, keys, packed = (n * case.dim for n in (case.queries, case.keys, 3 * case.tokens))
    axes = 2 if case.frames is None else 3
    weights = (2 + case.pools_queries) * (3**axes + 2) * 8  # of convolutions and norms
    tables = sum(2 * max(axis) - 1 for axis in zip(case.q_thw, case.k_thw)) * 8 if case.frames is None else 0
    read = {"pool": packed + weights, "attend": queries + 2 * keys + tables, "both": packed + weights + tables}[kind]
    written = queries + 2 * keys if kind == "pool" else queries
    untouched = queries if kind == "pool" and not case.pools_queries else 0
    forward, backward = read + written - 2 * untouched, 2 * read + written - untouched
    return 4 * (forward if mode == "fwd" else forward + backward)


class _WrongGradientOfOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        return x.clone(), *(y.clone() for y in others)

    @staticmethod
    def backward(ctx, grad, *others):
        return grad * 1.001, *others


WRONG_MVIT = {
    "queries": ("pool", lambda xs: (xs[0] * 1.001, *xs[1:]), "queries is off"),
    "values": ("pool", lambda xs: (*xs[:2], xs[2] * 1.001), "values is off"),
    "gradient": ("pool", lambda xs: _WrongGradientOfOne.apply(*xs), "qkv gradient is off"),
    "output": ("attend", lambda out: out * 1.001, "output is off"),
    "gradient of q": ("attend", _WrongGradient.apply, "q gradient is off"),
    "output of both": ("both", lambda out: out * 1.001, "output is off"),
    "gradient of both": ("both", _WrongGradient.apply, "qkv gradient is off"),
}


@pytest.mark.parametrize("kind, spoil, reason", WRONG_MVIT.values(), ids=WRONG_MVIT)
@pytest.mark.parametrize("layer", ["v1-b-16x4-block0", "v2-s-224-stage1"])
def test_gate_refuses_wrong_pooling_and_wrong_pooled_attention(bench, layer, kind, spoil, reason):
    workload = mvit_workload(bench, layer, kind)
    objection_to = workload.gate(gradients=True)
    for name in ("vitkernels-reference", *(workload.baselines.keys() & set(PLAIN))):
        contender = workload.build(name)
        assert objection_to(contender) is None
        right = getattr(contender, kind)
        setattr(contender, kind, lambda *inputs, right=right: spoil(right(*inputs)))
        assert reason in objection_to(contender), name


def test_baselines_may_round_as_eager_does_but_vitkernels_may_not(bench, monkeypatch):
    def rounded(right):
        """``right`` with results as coarse as float16's, of float32 alone."""
        coarse = lambda x: x + (x.half().float() - x).detach() if x.dtype == torch.float32 else x  # noqa: E731
        return lambda *inputs: tuple(map(coarse, right(*inputs)))

    for baseline in (bench.pooled_attention.Eager, bench.pooled_attention.EagerUnbind):
        monkeypatch.setattr(baseline, "pool", rounded(baseline.pool))
    workload = mvit_workload(bench, "v2-s-224-stage1", "pool")
    objection_to, ours = workload.gate(gradients=True), workload.build("vitkernels-reference")
    for contender in (ours, *map(workload.build, ("eager", "eager-unbind"))):
        assert objection_to(contender) is None
    ours.pool = rounded(ours.pool)
    assert "queries is off" in objection_to(ours)


def test_a_wrong_eager_is_refused(bench, monkeypatch):
    eager = bench.pooled_attention.Eager
    right = eager._norm
    monkeypatch.setattr(eager, "_norm", lambda self, x, pool: right(self, x, pool) * 1.001)
    for kind in ("pool", "both"):
        workload = mvit_workload(bench, "v2-s-224-stage1", kind)
        objection_to = workload.gate(gradients=True)
        assert "is off" in objection_to(workload.build("eager"))
        assert objection_to(workload.build("vitkernels-reference")) is None


def test_gate_lets_few_tokens_change_their_leaf(bench):
    """Near ties may; but clusters of features rounded to 16 bits differ too much."""
    case = next(case for case in bench.cases.CASES if case.name == "boat-swin-t-224-stage2-cluster")
    workload = case.kind.random(case, 1, torch.device("cpu"), torch.float32)
    order = workload.order.clone()
    order[:, 0, 48:50] = order[:, 0, 48:50].flip(-1)
    assert bench.cluster_attention.objection_to_order(order, workload.order, case.levels) is None
    contender = workload.build("vitkernels-reference")
    workload.qkv = workload.qkv.detach().bfloat16()
    assert "are in the leaf" in workload.gate(gradients=False)(contender)


def test_a_case_has_the_contenders_and_passes_of_its_operator(bench, capsys):
    args = bench.run.parse(["--device", "cpu"])
    args.device, args.compile = "cuda", True
    names = {case.name: bench.run.contenders(case, args) for case in bench.cases.CASES}
    libraries = ["sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "xformers", "flash-attn"]
    baselines = ["eager", "eager-unbind", *libraries, "compile"]
    assert names["swin-t-224-stage1-shifted"] == [*baselines, "flex", "natten", "vitkernels-triton"]
    assert names["boat-swin-t-224-stage1-cluster"] == ["eager", "eager-unbind", "compile", "vitkernels-cuda"]
    for kind in ("attend", "both"):
        assert names[f"boat-swin-t-224-stage1-{kind}"] == [*baselines, "vitkernels-triton"]
    assert names["mvitv2-s-224-stage1-pool"] == ["eager", "eager-unbind", "compile", "vitkernels-triton"]
    assert names["mvitv2-s-224-stage1-attend"] == ["eager", *libraries, "compile", "vitkernels-triton"]
    assert names["mvitv1-b-16x4-block0-both"] == [*baselines, "vitkernels-triton"]
    args.compile = False
    found = bench.run.contenders(next(case for case in bench.cases.CASES if case.name.startswith("swin")), args)
    assert found == [*baselines[:-1], "natten", "vitkernels-triton"]
    args.device = "cpu"
    assert bench.run.contenders(bench.cases.CASES[0], args) == [*PLAIN, "vitkernels-cpu"]
    assert bench.run.main(["--case", "boat-*-cluster", "--mode", "bwd"]) == 2
    assert "bwd" in capsys.readouterr().err


def test_a_baseline_that_cannot_run_is_skipped_with_its_reason(tiny, tmp_path, monkeypatch, capsys):
    def absent(grouping):
        raise NotImplementedError("not on this machine")

    monkeypatch.setitem(tiny.partition_attention.BASELINES, "sdpa", absent)
    status, results = start(tiny, tmp_path, "--backend", "sdpa", "--mode", "fwd")
    assert status == 0 and results["rows"][1]["status"] == "skipped"
    assert "skipped: NotImplementedError: not on this machine" in capsys.readouterr().out


def test_a_baseline_that_misses_the_contract_is_no_failure(tiny, tmp_path, monkeypatch):
    eager = tiny.partition_attention.eager
    wrong = lambda grouping: lambda qkv, bias: eager(grouping)(qkv, bias) * 1.001  # noqa: E731
    monkeypatch.setitem(tiny.partition_attention.BASELINES, "sdpa", wrong)
    status, results = start(tiny, tmp_path, "--backend", "sdpa", "--mode", "fwd")
    assert status == 0 and results["rows"][1]["status"] == "FAILED" and "ms" not in results["rows"][1]


def test_too_little_memory_is_a_row(tiny, tmp_path, monkeypatch):
    """For inputs and reference, and for a contender."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    workload = tiny.partition_attention.Workload
    with monkeypatch.context() as patch:
        patch.setattr(workload, "random", full)
        status, results = start(tiny, tmp_path, "--backend", "sdpa")
    rows = results["rows"]
    assert status == 0 and results["complete"] and len(rows) == 4 and {row["status"] for row in rows} == {"skipped"}
    assert rows[0]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"
    monkeypatch.setattr(tiny.partition_attention, "vitkernels_on", lambda backend, case: full)
    monkeypatch.setattr(workload, "gate", lambda self, gradients: lambda contender: None)
    status, results = start(tiny, tmp_path, "--backend", "cpu")
    assert status == 0 and [row["status"] for row in results["rows"]] == ["ok", "skipped"] * 2


def test_a_lost_device_ends_the_run(tiny, tmp_path, monkeypatch, capsys):
    cases = (tiny.run.CASES[0], replace(tiny.run.CASES[0], name="second"))
    with_cases(tiny, monkeypatch, *cases)
    monkeypatch.setattr(tiny.run, "alive", lambda device: False)
    status, results = start(tiny, tmp_path, "--backend", "eager")
    assert status == tiny.run.LOST and not results["complete"]
    assert {row["case"] for row in results["rows"]} == {"tiny"}
    assert "stopped answering at tiny" in capsys.readouterr().err


def test_a_fault_while_timing_is_a_row(tiny, tmp_path, monkeypatch):
    def fault(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tiny.measure, "interleave", fault)
    status, results = start(tiny, tmp_path, "--backend", "reference")
    assert status == 1 and len(results["rows"]) == 4
    assert {row["contender"]: row["status"] for row in results["rows"]}["vitkernels-reference"] == "FAILED"
    assert all("illegal memory access" in row["reason"] and "ms" not in row for row in results["rows"])


def test_cases_come_in_the_order_asked_for(bench, capsys):
    patterns = ["plain-56x56-dilated", "mvitv2-s-224-stage4-pool", "plain-*"]
    assert bench.run.main(["--list", "--case", *patterns]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["plain-56x56-dilated", "mvitv2-s-224-stage4-pool", "plain-56x56-window"]


class _Windows:
    """Stands for NATTEN where windows are as far apart as they are wide, or one window is all of a dilated group."""

    @staticmethod
    def na2d(q, k, v, kernel_size, stride, dilation):
        assert stride == kernel_size
        qkv = torch.stack((q, k, v), 3)
        return partition_attention_qkvpacked(qkv, Partition(kernel_size, dilation), backend="reference")


def _attention_of_tokens(q, k, v, attn_bias=None):
    """Stands for xformers and flash-attn: ``[B, N, heads, head_dim]``."""
    if attn_bias is not None:
        assert attn_bias.shape == (*q.shape[:1], q.shape[2], q.shape[1], k.shape[1]) and attn_bias.stride(-2) % 8 == 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias).transpose(1, 2)


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for libraries that need a GPU."""
    ops = SimpleNamespace(memory_efficient_attention=_attention_of_tokens)
    flash = SimpleNamespace(flash_attn_func=_attention_of_tokens)
    modules = {"xformers": SimpleNamespace(ops=ops), "xformers.ops": ops, "flash_attn": flash}
    for name, module in {**modules, "natten": SimpleNamespace(), "natten.functional": _Windows}.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["xformers", "flash-attn", "natten"])
def test_other_libraries_get_what_they_expect(bench, installed, name):
    qkv = torch.randn(2, 16, 12, 3, 2, 8, dtype=torch.float64)
    table = torch.randn(2, 7, 7, dtype=torch.float64)
    for partition in (Partition.window(4), Partition.long(4, 2), Partition.window(4, 2), Partition.window(5)):
        grouping = bench.partition_attention.Grouping(partition, 16, 12, qkv.device, qkv.dtype)
        for bias in (None, table if partition.group == (4, 4) else None):
            refuses = grouping.mask is not None or bias is not None
            if name != "xformers" and refuses:
                with pytest.raises(NotImplementedError, match="NATTEN has neither|(NATTEN|flash-attn) takes no bias"):
                    bench.partition_attention.BASELINES[name](grouping)(qkv, bias)
                continue
            found = bench.partition_attention.BASELINES[name](grouping)(qkv, bias)
            expected = partition_attention_qkvpacked(qkv, partition, bias, backend="reference")
            torch.testing.assert_close(found, expected)
    if name != "natten":
        attend = cluster_workload(bench, "attend", torch.float64)
        expected = attend.output(attend.build("vitkernels-reference"))
        torch.testing.assert_close(attend.output(attend.build(name)), expected)
        video = mvit_workload(bench, "v1-b-16x4-block0", "attend", torch.float64).double()
        expected = video.output(video.build("vitkernels-reference"))
        torch.testing.assert_close(video.output(video.build(name)), expected)


def test_a_library_that_is_not_installed_is_a_row(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    status, results = start(tiny, tmp_path, "--backend", "xformers", "--mode", "fwd")
    assert status == 0 and results["rows"][1]["status"] == "skipped" and "xformers" in results["rows"][1]["reason"]


def test_interrupt_keeps_what_was_measured(tiny, tmp_path, monkeypatch, capsys):
    measure_calls, calls = tiny.run.measure_calls, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_calls(*args)

    monkeypatch.setattr(tiny.run, "measure_calls", interrupted)
    status, results = start(tiny, tmp_path, "--backend", "eager")
    assert status == 130 and not results["complete"]
    assert [row["mode"] for row in results["rows"]] == ["fwd"]
    printed = capsys.readouterr().out
    assert "not finished" in printed and "1.00x" in printed


def test_no_such_case(bench, capsys):
    assert bench.run.main(["--case", "resnet-*"]) == 2
    assert "--list" in capsys.readouterr().err


def test_list_prints_every_case(bench, capsys):
    assert bench.run.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(bench.cases.CASES)


def test_peak_memory_counts_what_is_alive_together(bench):
    def call():
        first = torch.ones(1 << 18)  # 1 MiB
        del first
        second = torch.ones(1 << 18)
        return second + 1

    most = bench.measure.peak_memory(call, torch.device("cpu"))
    assert 2 << 20 <= most < 2.1 * (1 << 20)


def results_of(*rows: dict) -> dict:
    default = {"case": "c", "layer": "l", "batch": 1, "dtype": "float32", "mode": "fwd", "status": "ok", "reason": ""}
    return {"machine": {"cpu": "x"}, "bandwidth": 1e9, "complete": True, "rows": [default | row for row in rows]}


def test_report_prints_only_what_was_measured(bench):
    report = bench.report
    empty = results_of() | {"bandwidth": None}
    assert report.markdown(empty) == report.NOT_MEASURED
    assert report.text(empty).count(report.NOT_MEASURED) == 2
    rows = (
        {"contender": "eager", "ms": 2.5, "speedup": float("nan")},
        {"contender": "vitkernels-triton", "status": "FAILED", "reason": "bad"},
    )
    results = results_of(*rows)
    line = next(line for line in report.text(results).splitlines() if "2.50" in line)
    assert line.count(report.NOT_MEASURED) == 6 and "FAILED: bad" in report.text(results)
    cells = [cell.strip() for cell in report.markdown(results).splitlines()[2].strip("|").split("|")]
    assert cells[4] == "2.50" and set(cells[5:]) == {report.NOT_MEASURED}
    assert list(csv.DictReader(report.csv_text(results).splitlines()))[1]["ms"] == ""
    results["rows"].append(results["rows"][0] | {"case": "another", "contender": "eager"})
    cells = [cell.strip() for cell in report.markdown(results).splitlines()[3].strip("|").split("|")]
    assert cells[5] == report.NO_CONTENDER  # vitkernels-triton has no row there


def test_compare_judges_by_the_share_of_the_floor(bench):
    def run(floor: float) -> dict:
        return results_of({"contender": "eager", "ms": 1.0, "floor": floor})

    compare = bench.report.compare
    assert "SLOWER" in compare(run(0.5), run(0.6)) and "faster" in compare(run(0.6), run(0.5))
    assert "SLOWER" not in compare(run(0.5), run(0.5)) and "faster" not in compare(run(0.5), run(0.5))
    assert compare(run(0.5), results_of()) == "No row is in both runs."


def test_report_reads_back_what_run_wrote(bench, tmp_path, capsys):
    path = tmp_path / "results.json"
    bench.report.save(results_of({"contender": "eager", "ms": 2.5}), path)
    assert bench.report.main([str(path), "--markdown"]) == 0
    assert "| 2.50 |" in capsys.readouterr().out
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected the keys"):
        bench.report.load(path)


def test_summary_shows_steps_and_the_best_of_both_sides(bench):
    rows = (
        {"contender": "eager", "ms": 4.0, "speedup": 1.0},
        {"contender": "sdpa", "ms": 2.0},
        {"contender": "sdpa-flash", "status": "skipped", "reason": "takes no bias"},
        {"contender": "vitkernels-triton", "ms": 1.0, "speedup": 4.0, "floor": 0.5},
    )
    step = {"part": "sanitize", "step": "memcheck: a", "status": "FAILED", "reason": "what", "seconds": 2.0}
    printed = bench.report.summary(results_of(*rows) | {"steps": [step]})
    assert "sanitize  memcheck: a  FAILED  2        what" in printed
    words = printed.splitlines()[-1].split()
    assert words == ["c", "fwd", "1", "float32", "4.00", "2.00", "sdpa", "1.00", "4.00x", "2.00x", "50", "%"]


def closing_rows(case: str, batch: int = 1, mode: str = "full", **ours) -> list[dict]:
    about = {"case": case, "batch": batch, "mode": mode}
    rows = [{"contender": "eager", "ms": 4.0, "memory": 8 << 20}, {"contender": "sdpa", "ms": 2.0}]
    return [about | row for row in (*rows, {"contender": "vitkernels-cpu"} | ours)]


def test_the_closing_summary_says_what_counts(bench):
    right = {"ms": 1.0, "speedup": 4.0, "floor": 0.5, "memory": 1 << 20}
    rows = closing_rows("c", mode="fwd", **right | {"speedup": 3.0}) + closing_rows("c", **right)
    model = {"ms": 1.0, "speedup": 2.0, "rate": 5.0, "memory": 3 << 20}
    rows += closing_rows("wrong", status="FAILED", reason="output is off") + closing_rows("model", **model)
    titles, layer, wrong, whole, last = bench.report.closing(results_of(*rows)).splitlines()
    assert titles.split("  ")[0] == "forward, forward + backward"
    assert " ".join(layer.split()) == (
        "c, batch 1, float32 3.00x, 4.00x 2.00x, 2.00x sdpa 50 %, 50 % 1.0 MiB, 1.0 MiB 8.0 MiB, 8.0 MiB"
    )
    assert wrong.split("  ")[-1] == "vitkernels-cpu FAILED: output is off"
    assert whole.split() == "model, batch 1, float32 2.00x 2.00x sdpa - 3.0 MiB 8.0 MiB".split()
    assert last.startswith("Next: ") and all(option in last for option in ("--full", "--models", "--case", "--help"))


def test_the_closing_summary_has_ten_lines_at_most(bench):
    rows = [row for i in range(30) for row in closing_rows("c", batch=i + 1, ms=1.0)]
    printed = bench.report.closing(results_of(*rows) | {"complete": False}).splitlines()
    assert len(printed) == 10 and printed[-1].startswith("Not finished. Next: 22 more in the file")
    nothing = bench.report.closing(results_of()).splitlines()
    assert len(nothing) == 2 and nothing[0] == bench.report.NOT_MEASURED


def test_a_run_without_options_measures_a_layer_of_every_kind_and_a_model(bench):
    *layers, model = bench.cases.HEADLINE
    every = {(case.kind.__module__, case.name.split("-")[0]) for case in layers}
    assert every == {
        *(("partition_attention", family) for family in ("crossformer", "swin", "maxvit")),
        *(("cluster_attention", "boat"), ("pooled_attention", "mvitv2")),
    }
    assert {(case.partition.interval != (1, 1), any(case.partition.shift)) for case in layers[:4]} == {
        *((False, False), (True, False), (False, True))
    }
    assert model.kind.whole and model.batch("cpu") <= 2 and len(bench.cases.HEADLINE) < bench.report.LINES


def test_a_run_without_options_ends_with_its_summary(tiny, whole, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tiny.run, "HEADLINE", (*tiny.run.CASES, *tiny.run.MODELS))
    monkeypatch.setattr(tiny.run.Rates, "measured", classmethod(lambda cls, *args: cls(1e9, {"float32": 1e30}, 1e30)))
    path = tmp_path / "results.json"
    options = ["--seconds", "0", "--device", "cpu", "--backend", "eager", "--json", str(path)]
    assert tiny.run.main(options) == 0
    printed, progress = capsys.readouterr()
    lines = printed.splitlines()
    assert [line.split(",")[0] for line in lines[1:-1]] == ["whole"] and lines[-1].startswith("Next: ")
    assert progress.splitlines()[:2] == ["[1/2] the machine", "[2/2] whole float32"]
    assert {row["case"] for row in json.loads(path.read_text())["rows"]} == {"whole"}
    assert tiny.report.main([str(path)]) == 0
    assert "images/s" in capsys.readouterr().out


def test_layers_and_models_stand_in_one_table(bench):
    layer, model = closing_rows("layer", ms=1.0, floor=0.5), closing_rows("model", ms=1.0, rate=5.0)
    printed = bench.report.text(results_of(*layer, *model))
    assert bench.report.EXPLANATION in printed and bench.report.EXPLANATION_OF_MODELS in printed
    head, models = printed.split("model: batch")
    assert "of floor" in head.split("layer: batch")[1] and "images/s" in models and "of floor" not in models


@pytest.mark.parametrize("arguments", [["--quick"], ["--case", "swin-*"]])
def test_options_that_contradict_each_other_are_refused(bench, arguments, capsys):
    with pytest.raises(SystemExit):
        bench.run.parse(["--full", *arguments])
    message = f"--full measures every layer and {arguments[0]} some of them: leave one out"
    assert message in capsys.readouterr().err


def test_what_is_measured_follows_from_the_options(bench):
    options = {"": True, "--seconds 1 --mode fwd": True, "--full": False, "--quick": False, "--models": False}
    for arguments, headline in (options | {"--case swin-*": False, "--list": False}).items():
        assert bench.run.parse(arguments.split()).headline == headline, arguments
    assert bench.run.parse(["--full"]).patterns == ["*"]


def test_documents_have_not_drifted(bench):
    for path in bench.performance.DOCUMENTS:
        text = path.read_text()
        assert bench.performance.BLOCK.search(text), f"{path.name} has no block"
        assert bench.performance.filled(text) == text, f"{path.name}: `make performance` writes it again"


@pytest.fixture
def committed(bench, monkeypatch, tmp_path):
    """A folder of results, of a CPU."""
    monkeypatch.setattr(bench.performance, "RESULTS", tmp_path)
    machine = {"device": "CPU", "cpu": "x", "threads": "2", "torch": "2", "commit": "abc", "date": "today"}
    rows = [{"contender": name, "ms": ms} for name, ms in (("eager", 2.0), ("sdpa", 3.0), ("vitkernels-cpu", 1.0))]
    results = results_of(*rows) | {"machine": machine, "rates": {"float32": 1e9}}
    bench.report.save(results, tmp_path / "cpu" / "a.json")
    return results


def test_blocks_are_written_from_results(bench, committed):
    layers = "<!-- layers cpu/a.json\nc = Name\nd = Other\n-->\n<!-- end -->"
    text = f"before\n<!-- results cpu/a.json c* -->\nold\n<!-- end -->\nafter {layers}"
    found = bench.performance.filled(text)
    assert found == bench.performance.filled(found) and "old" not in found and found.startswith("before\n<!-- results")
    assert "`benchmarks/results/cpu/a.json`: x, 2 threads, torch 2, commit abc, today" in found
    row = next(line for line in found.splitlines() if line.startswith("| Name"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:8] == ["Name", "1", "forward", "2.00", "2.00", "1.00", bench.report.NOT_MEASURED, "2.00x"]
    other = next(line for line in found.splitlines() if line.startswith("| Other"))
    assert other.count(bench.report.NOT_MEASURED) == 8


def test_gpus_are_not_yet_measured_until_they_are(bench, committed, tmp_path):
    text = "<!-- gpu -->\n<!-- end -->"
    found = bench.performance.filled(text)
    lines = [line for line in found.splitlines() if line.startswith("| ") and "layer" not in line]
    assert len(lines) == sum(2 if "full" in case.kind.modes else 1 for case in bench.cases.CASES)
    assert all(line.count(bench.report.NOT_MEASURED) == 3 for line in lines)
    machine = committed["machine"] | {"device": "H", "driver": "1", "triton": "3"}
    for day, ms in (("1", 5.0), ("2", 7.0)):
        rows = [row | {"ms": ms} for row in committed["rows"]]
        bench.report.save(committed | {"machine": machine, "rows": rows}, tmp_path / "h" / f"{day}.json")
    found = bench.performance.filled(text)
    assert "h/2.json" in found and "7.00" in found and "5.00" not in found and "driver 1" in found


@pytest.fixture
def whole(bench, monkeypatch):
    """The benchmark with one model, on small images."""
    case = bench.models.Case("whole", "mvit_v2_tiny", size=(32, 32), cpu_batch=2)
    monkeypatch.setattr(bench.run, "MODELS", (case,))
    return with_cases(bench, monkeypatch)


def test_models(whole, tmp_path, capsys):
    status, results = start(whole, tmp_path, "--models")
    assert status == 0 and results["complete"]
    rows = {(row["contender"], row["mode"]): row for row in results["rows"]}
    assert rows.keys() == {
        (name, mode)
        for name in ("eager", "timm", "torchvision", "no attention", "vitkernels-cpu")
        for mode in ("fwd", "full")
    }
    for (name, _), row in rows.items():
        assert row["status"] == ("skipped" if name in ("timm", "torchvision") else "ok"), row
        if row["status"] == "ok":
            assert row["rate"] == pytest.approx(2 / row["ms"] * 1e3) and row["speedup"] and "floor" not in row
    out = capsys.readouterr().out
    assert "images/s" in out and "of floor" not in out
    _, best, ours = whole.report.sides([row for row in results["rows"] if row["mode"] == "fwd"])
    assert not best and ours["contender"] == "vitkernels-cpu", "no attention is no contender"


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_with_other_results_is_refused(whole, gradients):
    (case,) = whole.run.MODELS
    workload = case.kind.random(case, 2, torch.device("cpu"), torch.float32)
    objection_to = workload.gate(gradients)
    ours = workload.build("vitkernels-cpu")
    assert objection_to(ours) is None
    assert objection_to(workload.build("no attention")) is None, "it is not meant to agree"
    with torch.no_grad():
        ours.head.bias[0] += 1
    assert "logits off by" in objection_to(ours)


def test_models_of_libraries_have_the_same_weights(bench, torchvision):
    pytest.importorskip("timm")
    case = next(case for case in bench.cases.MODELS if case.twin == "timm mvitv2_tiny")
    workload = case.kind.random(case, 2, torch.device("cpu"), torch.float32)
    assert workload.gate(False)(workload.build("timm")) is None
    with pytest.raises(ModuleNotFoundError, match="no torchvision model"):
        workload.build("torchvision")


def test_models_of_libraries_before_and_after_accelerate(bench, monkeypatch, tmp_path, torchvision):
    pytest.importorskip("timm")
    case = bench.models.AcceleratedCase("accelerate-small", "timm test_maxvit", (160, 160), cpu_batch=2)
    monkeypatch.setattr(bench.run, "MODELS", (case,))
    status, results = start(with_cases(bench, monkeypatch), tmp_path, "--models")
    assert status == 0
    rows = {(row["contender"], row["mode"]): row for row in results["rows"]}
    assert rows.keys() == {(name, mode) for name in ("eager", "vitkernels-cpu") for mode in ("fwd", "full")}
    assert all(row["status"] == "ok" for row in rows.values())
    monkeypatch.setattr(bench.performance, "RESULTS", tmp_path)
    bench.report.save(results, tmp_path / "run.json")
    line = bench.performance.filled("<!-- accelerated run.json -->\n<!-- end -->").splitlines()[4]
    shown = [f"{rows[name, 'fwd']['rate']:.3g}" for name in ("eager", "vitkernels-cpu")]
    assert line.startswith(f"| timm test_maxvit, 160 x 160 | 2 | inference | {' | '.join(shown)} | ")
    workload = case.kind.random(case, 2, torch.device("cpu"), torch.float32)
    ours = workload.build("vitkernels-cpu")
    assert workload.gate(True)(ours) is None
    with torch.no_grad():
        next(p for name, p in ours.named_parameters() if name.endswith("bias_table")).normal_(std=5)
    assert "off by" in workload.gate(False)(ours)
