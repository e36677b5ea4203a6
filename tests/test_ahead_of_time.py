"""What the GPU kernels take of every chip, compiled without a GPU: registers, spills, shared memory, wide loads."""

from __future__ import annotations

import functools
import importlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import CORES, WORKERS

triton = pytest.importorskip("triton")

if not triton.__version__.startswith("3.6."):
    pytest.skip(f"the budgets hold for triton 3.6, found {triton.__version__}", allow_module_level=True)

CHIPS = (80, 86, 89, 90, 100, 120)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a block may have
WIDE_HEADS = (  # eight warps, limited to 128 registers
    *("3136 queries, 196 keys, bf16, 96", "1569 queries, 393 keys, bf16, 96", "1569 queries, 1569 keys, bf16, 96"),
    *("8001 queries, 2001 keys, bf16, 72", "784 queries, 196 keys, bf16, 128"),
)
SPILLED = {  # bytes of a thread; 0 where nothing stands
    **{(chip, "196 tokens, bf16, 96", "streamed_attention_backward_query"): 16 for chip in (86, 89, 120)},
    **{(chip, "196 tokens, bf16, 96", "streamed_attention_backward_key"): 8 for chip in (80, 86, 89)},
    (120, "196 tokens, bf16, 96", "streamed_attention_backward_key"): 16,
    **{(90, case, "relative_gradients"): 8 for case in WIDE_HEADS},
    (100, "1569 queries, 393 keys, bf16, 96", "relative_gradients"): 8,
    # where products of a warp group would be assembled wrongly
    **{(90, case, "attention_backward_key"): 8 for case in WIDE_HEADS[1:4]},
    (80, "1569 queries, 1569 keys, bf16, 32", "attention_backward_query"): 16,  # for a third block
    (80, "196 queries, 196 keys, fp32, 96", "attention_forward"): 256,  # products without tensor cores
    (80, "196 queries, 196 keys, fp32, 96", "attention_backward_query"): 312,
    (90, "196 queries, 196 keys, fp32, 96", "attention_forward"): 264,
    (90, "196 queries, 196 keys, fp32, 96", "attention_backward_query"): 344,
    (80, "pool of 3x3x3, stride 2, bf16, 96", "pool_tokens_backward_pooled"): 8,
    (90, "MLP of 48, 24 heads, 49 tokens", "dynamic_position_bias_backward"): 8,  # a kernel of 22 programs
}
# kernel[(programs,)](..), kernel[grid](..), launch(kernel, ..)
STARTED = re.compile(r"\b(_\w+)\[(?:\(|grid\])|launch\((?:streamed\.)?(_?[a-z]\w+),")


@pytest.fixture
def report(monkeypatch, once):
    """The module, which compiles the kernels of a chip once for all tests."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = importlib.import_module("kernel_report")
    rows_of = module.rows_of

    def write(chip: int, path: Path) -> None:
        path.write_text(json.dumps([row._asdict() for row in rows_of(chip)]))

    def read(chip: int) -> list:
        path = once(f"sm_{chip}.json", functools.partial(write, chip))
        return [module.Kernel(**row) for row in json.loads(path.read_text())]

    monkeypatch.setattr(module, "rows_of", read)
    return module


def compiled(report, chip: int) -> list:
    """Rows of a chip. A process that has the cores to itself compiles for all chips at once."""
    chips = CHIPS if WORKERS == 1 else (chip,)
    with ThreadPoolExecutor(CORES) as pool:
        return dict(zip(chips, pool.map(report.rows_of, chips)))[chip]


@pytest.mark.parametrize("chip", CHIPS)
def test_budgets(report, chip):
    rows = compiled(report, chip)
    spilled = {(chip, row.case, row.name): row.spilled for row in rows if row.spilled}
    assert {key: size for key, size in spilled.items() if size > SPILLED.get(key, 0)} == {}
    for row in rows:
        assert row.blocks > 0 and row.shared <= SHARED[chip] * 1024 and not row.unfenced, row
        assert row.faults == [], row
        if "attention" in row.name or "pool" in row.name:
            assert row.widest == 16, row
        if "pool" in row.name:  # rows stay with their threads; twelve or sixteen warps fit a processor
            assert row.shared <= 1024, row
            assert row.registers <= (168 if row.warps == 2 else 128), row


def test_the_main_path_on_hopper(report):
    rows = {(row.case, row.name): row for row in compiled(report, 90)}
    forward, backward = (rows["49 tokens, bf16, 32", f"partition_attention_{way}"] for way in ("forward", "backward"))
    # Bytes that keep the memory busy. They are not behind computation: this compiler sets no fence for rows that come
    # to shared memory meanwhile, so that none do.
    assert forward.blocks == 4 and forward.in_flight >= 23 * 1024
    assert backward.blocks == 2 and backward.in_flight >= 16 * 1024
    forward, backward = (rows["leaves of 49, bf16, 32", f"cluster_attention_{way}"] for way in ("forward", "backward"))
    assert forward.warps == 4 and forward.registers <= 96
    assert backward.warps == 4 and backward.registers <= 168


@pytest.mark.parametrize("chip", CHIPS)
def test_the_document_has_not_drifted(report, chip):
    assert report.table(compiled(report, chip)) in report.DOCUMENT.read_text(), "`make kernels` writes it again"


def test_the_document_has_every_kernel(report):
    """Every function that a launcher of the package starts."""
    started = set()
    for path in (report.ROOT / "vitkernels").rglob("*.py"):
        started |= set({name for found in STARTED.findall(path.read_text()) for name in found if name})
    names = {name.lstrip("_") for name in started} - {"kernel", "self"}  # launchers' parameters
    assert len(names) > 15
    assert names <= {row.name for row in compiled(report, 90)}
