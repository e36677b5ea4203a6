"""The benchmark: its baselines are right, its gate refuses wrong kernels, its report prints only measured numbers."""

from __future__ import annotations

import csv
import importlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitkernels import DynamicPositionBias, Partition, lsda_attention, partition_attention_qkvpacked

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


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, which run as scripts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    names = ("baselines", "cases", "measure", "report", "run")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def tiny(bench, monkeypatch):
    """The benchmark with a single small case, for float32 on a CPU."""
    case = bench.cases.Case("tiny", 6, 7, 2, Partition.window(4).on(6, 7), "dpb", cpu_batch=2, gpu_batch=2, head_dim=8)
    monkeypatch.setattr(bench.run, "CASES", (case,))
    monkeypatch.setattr(bench.run, "QUICK", ("tiny",))
    monkeypatch.setattr(bench.measure, "copy_bandwidth", lambda device, size: 1e9)
    return bench


def start(bench, folder: Path, *arguments: str) -> tuple[int, dict]:
    """Exit status and results of a brief run."""
    path = folder / "results.json"
    status = bench.run.main(["--quick", "--seconds", "0", "--device", "cpu", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("name", ["eager", "eager-unbind", "sdpa"])
@pytest.mark.parametrize("height, width, partition", PARTITIONS.values(), ids=PARTITIONS)
def test_baseline_equals_reference(bench, name, height, width, partition):
    partition = partition.on(height, width)
    torch.manual_seed(0)
    qkv = torch.randn(2, height, width, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, *(2 * g - 1 for g in partition.group), dtype=torch.float64, requires_grad=True)
    expected = partition_attention_qkvpacked(qkv, partition, table, backend="reference")
    grouping = bench.baselines.Grouping(partition, height, width, qkv.device, qkv.dtype)
    found = bench.baselines.BASELINES[name](grouping)(qkv, table)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, (qkv, table), dout) for out in (found, expected)))


@pytest.mark.parametrize("height, width, partition", PARTITIONS.values(), ids=PARTITIONS)
def test_flex_baseline_equals_reference(bench, height, width, partition):
    """Forward only: on a CPU FlexAttention has no backward."""
    qkv = torch.randn(2, height, width, 3, 2, 8, dtype=torch.float64)
    table = torch.randn(2, *(2 * g - 1 for g in partition.on(height, width).group), dtype=torch.float64)
    grouping = bench.baselines.Grouping(partition, height, width, qkv.device, qkv.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs without compilation
        found = bench.baselines.flex(grouping, compiled=False)(qkv, table)
    torch.testing.assert_close(found, partition_attention_qkvpacked(qkv, partition, table, backend="reference"))


@pytest.mark.parametrize("name", ["eager", "eager-unbind", "sdpa"])
def test_baseline_evaluates_the_position_mlp(bench, name):
    torch.manual_seed(0)
    qkv = torch.randn(2, 8, 8, 3, 2, 16, dtype=torch.float64)
    module = DynamicPositionBias(32, 2).double()
    expected = lsda_attention(qkv, module, group_size=4, interval=2, backend="reference")
    grouping = bench.baselines.Grouping(Partition.long(4, 2), 8, 8, qkv.device, qkv.dtype)
    found = bench.baselines.BASELINES[name](grouping)(qkv, module)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(out.square().sum(), list(module.parameters())) for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_cases_are_layers_of_the_models(bench):
    cases = {case.name: case for case in bench.cases.CASES}
    assert len(cases) == len(bench.cases.CASES)
    assert set(bench.cases.QUICK) <= cases.keys()
    for case in cases.values():
        index = case.partition.index(case.height, case.width)
        tokens = index[index >= 0].sort().values
        assert torch.equal(tokens, torch.arange(case.height * case.width)), case.name
        assert case.head_dim == 32 and case.bias == ("dpb" if case.name.startswith("crossformer") else "table")
        assert all(str(size) in case.describe() for size in (case.height, case.width, case.heads))
    lda = cases["crossformer-s-224-stage1-lda"]
    assert (lda.height, lda.width, lda.dim) == (56, 56, 96)
    assert (lda.partition.group, lda.partition.interval) == ((7, 7), (8, 8))
    assert "crossformer-s-224-stage4-lda" not in cases
    detection = cases["crossformer-s-1344x800-stage4-sda"]
    assert (detection.height, detection.width) == (25, 42)
    assert {case.partition.tokens for case in cases.values()} == {16, 49, 196}
    assert cases["maxvit-t-224-stage4-block"].heads == 16
    assert cases["swin-t-224-stage2-shifted"].partition.shift == (3, 3)


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
    right = tiny.run.vitkernels_on

    def wrong(backend, case):
        attend = right("reference", case)
        return attend if backend == "reference" else lambda qkv, bias: spoil(attend(qkv, bias))

    monkeypatch.setattr(tiny.run, "vitkernels_on", wrong)
    status, results = start(tiny, tmp_path, "--backend", "cpu")
    assert status == 1
    ours = [row for row in results["rows"] if row["contender"] == "vitkernels-cpu"]
    assert [row["status"] for row in ours] == ["FAILED", "FAILED"] and all("ms" not in row for row in ours)
    assert all(row["status"] == "ok" for row in results["rows"] if row["contender"] == "eager")
    assert "FAILED: " in capsys.readouterr().out


def test_gate_accepts_every_float32_baseline(tiny):
    workload = tiny.run.Workload.random(tiny.run.CASES[0], 2, torch.device("cpu"), torch.float32)
    gate = tiny.run.Gate(workload, gradients=True)
    for name in ("eager", "eager-unbind", "sdpa"):
        assert gate.objection(tiny.run.build(name, workload)) is None


def test_a_baseline_that_cannot_run_is_skipped_with_its_reason(tiny, tmp_path, monkeypatch, capsys):
    def absent(grouping):
        raise NotImplementedError("not on this machine")

    monkeypatch.setitem(tiny.baselines.BASELINES, "sdpa", absent)
    status, results = start(tiny, tmp_path, "--backend", "sdpa", "--mode", "fwd")
    assert status == 0 and results["rows"][1]["status"] == "skipped"
    assert "skipped: NotImplementedError: not on this machine" in capsys.readouterr().out


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
