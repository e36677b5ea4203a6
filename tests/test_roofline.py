"""The floor of the benchmark's cases against cases counted by hand."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from vitkernels import Partition


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("roofline")


def groups(roofline, height: int, width: int, partition: Partition):
    """Two heads of 8 elements."""
    kind = roofline.partition_attention
    return kind.Case("", height, width, 2, partition.on(height, width), "table", head_dim=8)


# tokens of every group, squared and summed
PAIRS = {
    "four windows of 16": (8, 8, Partition.window(4), 4 * 16**2),
    "windows that the map cuts off": (6, 7, Partition.window(4), 16**2 + 12**2 + 8**2 + 6**2),
    "shifted": (8, 8, Partition.window(4, 2), 4 * 16**2),
    # columns of 2, 1, 1 and 1 tokens, lines of 1, 1, 1 and none
    "dilated, groups wholly outside": (5, 3, Partition.long(2, 4), (2**2 + 1 + 1 + 1) * 3),
    "one group": (3, 5, Partition.grid((3, 5)), 15**2),
}


@pytest.mark.parametrize("height, width, partition, pairs", PAIRS.values(), ids=PAIRS)
def test_groups(roofline, height, width, partition, pairs):
    case, batch = groups(roofline, height, width, partition), 3
    tensor = batch * height * width * 2 * 8 * 2  # bytes of bfloat16
    product = 2 * batch * 2 * 8 * pairs
    assert roofline.work(case, batch, "bfloat16", "fwd") == (4 * tensor, 2 * product, 0)
    assert roofline.work(case, batch, "bfloat16", "bwd") == (7 * tensor, 5 * product, 0)
    assert roofline.work(case, batch, "bfloat16", "full") == (11 * tensor, 7 * product, 0)
    assert roofline.work(case, batch, "float32", "fwd").bytes == 8 * tensor


def test_clusters(roofline):
    """192 tokens, 4 levels, 16 leaves of 12 tokens, each with 5 of its sibling's; 2 heads of 8 elements."""
    kind = roofline.cluster_attention
    case = kind.Case("", 12, 16, 2, kind.Attention, head_dim=8, leaf_size=12, overlap=5)
    tensor, order, product = 3 * 192 * 16 * 2, 3 * 2 * 192 * 4, 2 * 3 * 16 * 192 * 17
    assert roofline.work(case, 3, "float16", "fwd") == (4 * tensor + order, 2 * product, 0)
    assert roofline.work(case, 3, "float16", "bwd") == (7 * tensor + order, 5 * product, 0)
    # a level: a sum; twice two similarities and two weighted sums; two similarities: of 1, 2 x 8 and 4 FLOPs an element
    scored = 4 * (1 + 16 + 4) * 3 * 192 * 16
    clusters = replace(case, kind=kind.Clustering)
    assert roofline.work(clusters, 3, "float16", "fwd") == (tensor + order, 0, scored)
    both = replace(case, kind=kind.ClusteringAndAttention)
    assert roofline.work(both, 3, "float16", "full") == (11 * tensor + 2 * order, 7 * product, scored)


def test_images_pooled(roofline):
    """A map of 4 x 4, queries as they are in number, keys 2 x 2; 2 heads of 8 elements; tables of 7 rows."""
    kind = roofline.pooled_attention
    case = kind.Case("", 4, 4, 2, kind.Pooling, 1, 2, head_dim=8)
    # an axis: windows of 2, 3, 3, 2 tokens inside the map, or with stride 2 of 2 and 3
    taps = 10**2 + 2 * 5**2
    row, weights = 3 * 16 * 2, 3 * 8 * (9 + 2) * 4
    read, written = 3 * 16 * row + weights, (16 + 2 * 4) * row
    convolutions = 2 * 3 * 16 * taps
    assert roofline.work(case, 3, "bfloat16", "fwd") == (read + written, 0, convolutions)
    assert roofline.work(case, 3, "bfloat16", "bwd") == (2 * read + written, 0, 2 * convolutions)
    attend, tables = replace(case, kind=kind.Attention), 2 * 7 * 8 * 4
    read, written = (16 + 2 * 4) * row + tables, 16 * row
    per_query = 2 * 3 * 16 * 16
    assert roofline.work(attend, 3, "bfloat16", "fwd") == (read + written, per_query * (2 * 4 + 4), 0)
    assert roofline.work(attend, 3, "bfloat16", "bwd") == (2 * read + written, per_query * (5 * 4 + 3 * 4), 0)
    both = replace(case, kind=kind.PoolingAndAttention)
    read = 3 * 16 * row + weights + tables
    assert roofline.work(both, 3, "bfloat16", "fwd") == (read + written, per_query * 12, convolutions)
    assert roofline.work(both, 3, "bfloat16", "bwd") == (2 * read + written, per_query * 32, 2 * convolutions)


def test_videos_pooled(roofline):
    """Two frames of 4 x 4 and a class token; queries are handed on, keys are 2 x 2 x 2 and the class token."""
    kind = roofline.pooled_attention
    case = kind.Case("", 4, 4, 2, kind.Pooling, 1, 2, frames=2, head_dim=8)
    row, weights = 16 * 4, 2 * 8 * (27 + 2) * 4
    read, written = 3 * 33 * row + weights, (33 + 2 * 9) * row
    convolutions = 2 * 16 * 2 * (2 + 2) * 5**2  # of keys and values; windows of 2 and 2 frames
    assert roofline.work(case, 1, "float32", "fwd") == (read + written - 2 * 33 * row, 0, convolutions)
    assert roofline.work(case, 1, "float32", "bwd") == (2 * read + written - 33 * row, 0, 2 * convolutions)
    attend = replace(case, kind=kind.Attention)
    read, written = (33 + 2 * 9) * row, 33 * row
    assert roofline.work(attend, 1, "float32", "fwd") == (read + written, 2 * 16 * 33 * 2 * 9, 0)


def test_the_floor_is_the_slowest_unit(roofline):
    case, kind = groups(roofline, 8, 8, Partition.window(4)), roofline.pooled_attention
    least = roofline.work(case, 1, "bfloat16", "fwd")

    def rates(bandwidth: float, products: float, vector: float = 1e30):
        return roofline.Rates(bandwidth, {"bfloat16": products, "float32": products}, vector)

    assert rates(1e9, 1e30).floor(case, 1, "bfloat16", "fwd") == (least.bytes / 1e9, "memory")
    assert rates(1e30, 1e9).floor(case, 1, "bfloat16", "fwd") == (least.products / 1e9, "products")
    pool = kind.Case("", 4, 4, 2, kind.PoolingAndAttention, 1, 2, head_dim=8)
    least = roofline.work(pool, 1, "bfloat16", "fwd")
    assert rates(1e30, 1e30, 1e9).floor(pool, 1, "bfloat16", "fwd") == (least.vector / 1e9, "vector")
    seconds, bound = rates(1e30, 1e9, 1e9).floor(pool, 1, "float32", "fwd")  # one unit
    assert bound == "products" and seconds == pytest.approx((least.products + least.vector) / 1e9)


def test_both_passes_take_the_sum(roofline):
    """Also where another unit limits each."""
    case = groups(roofline, 8, 8, Partition.window(4))
    forward, backward = (roofline.work(case, 1, "bfloat16", mode) for mode in ("fwd", "bwd"))
    ratio = (forward.products / forward.bytes + backward.products / backward.bytes) / 2
    rates = roofline.Rates(1.0, {"bfloat16": ratio}, 1.0)
    assert rates.floor(case, 1, "bfloat16", "fwd")[1] == "memory"
    assert rates.floor(case, 1, "bfloat16", "bwd")[1] == "products"
    seconds, bound = rates.floor(case, 1, "bfloat16", "full")
    assert seconds == pytest.approx(forward.bytes + backward.products / ratio) and bound == "products"


def test_published_shape(roofline):
    """CrossFormer-S stage 1, batch 128: 128 x 3136 x 96 numbers of 2 bytes are 77.07 MB a tensor."""
    from cases import CASES

    case = next(case for case in CASES if case.name == "crossformer-s-224-stage1-lda")
    rates = roofline.Rates(4.3e12, {"bfloat16": 790e12}, 60e12)
    for mode, microseconds in (("fwd", 71.7), ("bwd", 125.5)):
        seconds, bound = rates.floor(case, 128, "bfloat16", mode)
        assert bound == "memory" and seconds * 1e6 == pytest.approx(microseconds, abs=0.1)


def test_every_case_has_a_floor(roofline, capsys):
    from cases import CASES

    rates = roofline.Rates(1e9, {"float32": 1e9}, 1e9)
    for case in CASES:
        for mode in case.kind.modes:
            assert rates.floor(case, case.batch("cpu"), "float32", mode)[0] > 0
    assert roofline.main(["--case", "plain-*", "--device", "cpu", "--batch", "2"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("plain-")]) == 6


@pytest.mark.parametrize("options, message", [(["--case", "x"], "no case matches x"), (["--batch", "0"], "at least 1")])
def test_bad_options_are_refused(roofline, capsys, options, message):
    with pytest.raises(SystemExit):
        roofline.main(["--device", "cpu", *options])
    assert message in capsys.readouterr().err
