"""What is measured: layers of published models."""

from __future__ import annotations

from dataclasses import replace

import cluster_attention
import models
import partition_attention
import pooled_attention
from workload import Case, select

from vitkernels import Partition


def _case(name: str, height: int, width: int, heads: int, partition: Partition, bias: str, **batches: int) -> Case:
    return partition_attention.Case(name, height, width, heads, partition.on(height, width), bias, **batches)


def _crossformer(
    model: str, height: int, width: int, heads: int, groups: tuple, intervals: tuple, **batches
) -> list[Case]:
    """SDA and LDA of every stage; a stage that is one group (its map no longer than the group) has SDA only."""
    cases = []
    for stage, (group, interval) in enumerate(zip(groups, intervals)):
        name, size, width_of_stage = f"{model}-stage{stage + 1}", (height >> stage, width >> stage), heads << stage
        cases.append(_case(f"{name}-sda", *size, width_of_stage, Partition.window(group), "dpb", **batches))
        if interval > 1:
            cases.append(_case(f"{name}-lda", *size, width_of_stage, Partition.long(group, interval), "dpb", **batches))
    return cases


def _maxvit() -> list[Case]:
    """MaxViT-T at 224: widths 64..512, 7 x 7 blocks and grids (one and the same on the 7 x 7 map of stage 4)."""
    cases = []
    for stage in range(4):
        size, heads = 56 >> stage, 2 << stage
        for kind, partition in (("block", Partition.window(7)), ("grid", Partition.grid(7)))[: 2 if stage < 3 else 1]:
            cases.append(_case(f"maxvit-t-224-stage{stage + 1}-{kind}", size, size, heads, partition, "table"))
    return cases


def _swin() -> list[Case]:
    """Swin-T at 224: the shifted half of its layers (stage 4 is a single window and has none)."""
    sizes = [(stage + 1, 56 >> stage, 3 << stage) for stage in range(3)]
    return [_case(f"swin-t-224-stage{n}-shifted", s, s, h, Partition.window(7, 3), "table") for n, s, h in sizes]


def _boat(name: str, size: int, heads: int, **batches: int) -> list[Case]:
    """Clustering, attention inside the clusters, and both, of one layer."""
    kinds = {
        "cluster": cluster_attention.Clustering,
        "attend": cluster_attention.Attention,
        "both": cluster_attention.ClusteringAndAttention,
    }
    return [cluster_attention.Case(f"{name}-{k}", size, size, heads, kinds[k], cpu_batch=2, **batches) for k in kinds]


def _mvit(name: str, side: int, heads: int, stride_q: int, stride_kv: int, **options: int) -> list[Case]:
    """Pooling, attention of what is pooled, and both, of one layer."""
    kinds = {
        "pool": pooled_attention.Pooling,
        "attend": pooled_attention.Attention,
        "both": pooled_attention.PoolingAndAttention,
    }
    strides = {"stride_q": stride_q, "stride_kv": stride_kv}
    return [pooled_attention.Case(f"{name}-{k}", side, side, heads, kinds[k], **strides, **options) for k in kinds]


def _mvit_v1() -> list[Case]:
    """MViTv1-B on 16 x 4 frames of 224 x 224 pixels: of equal blocks the first."""
    blocks = ((0, 56, 1, 1, 8), (1, 56, 2, 2, 4), (3, 28, 4, 2, 2), (4, 14, 4, 1, 2), (14, 14, 8, 2, 1))
    options = {"frames": 8, "cpu_batch": 1, "gpu_batch": 8}
    return [case for block, *layer in blocks for case in _mvit(f"mvitv1-b-16x4-block{block}", *layer, **options)]


def _mvit_v2() -> list[Case]:
    """MViTv2-S on images of 224 x 224 pixels: the layers that enter a stage, and those inside."""
    cases = []
    for stage, stride_kv in enumerate((4, 2, 1, 1)):
        name, side, heads = f"mvitv2-s-224-stage{stage + 1}", 56 >> stage, 1 << stage
        cases += _mvit(f"{name}-first", 2 * side, heads, 2, stride_kv, cpu_batch=4) if stage else []
        cases += _mvit(name, side, heads, 1, stride_kv, cpu_batch=4)
    return cases


SEVENS, INTERVALS = (7, 7, 7, 7), (8, 4, 2, 1)

CASES: tuple[Case, ...] = (
    *_crossformer("crossformer-s-224", 56, 56, 3, SEVENS, INTERVALS),
    *_crossformer("crossformer-s-1344x800", 200, 336, 3, SEVENS, INTERVALS, cpu_batch=1, gpu_batch=2),
    *_maxvit(),
    *_swin(),
    # unfavourable: groups of 16 tokens fill a quarter of a tile, 196 tokens do more arithmetic than memory traffic
    *_crossformer("crossformer++-s-224", 56, 56, 2, (4, 4, 14), (4, 2, 1)),
    # no position bias, for libraries that take none
    _case("plain-56x56-window", 56, 56, 3, Partition.window(7), "none"),
    _case("plain-56x56-dilated", 56, 56, 3, Partition.long(7, 8), "none"),
    # BOAT: stage 4 is one leaf and has no such attention
    *(case for stage in range(3) for case in _boat(f"boat-swin-t-224-stage{stage + 1}", 56 >> stage, 3 << stage)),
    *_boat("boat-swin-t-384-stage1", 96, 3, gpu_batch=32),
    *_mvit_v1(),
    *_mvit_v2(),
)

MODELS = models.CASES

# one layer for every kernel, in every form that it takes
EVERY_KERNEL = (
    *("crossformer-s-224-stage1-sda", "crossformer-s-224-stage1-lda", "crossformer-s-224-stage4-sda"),
    *("maxvit-t-224-stage1-grid", "swin-t-224-stage2-shifted", "crossformer-s-1344x800-stage3-lda"),
    *("crossformer++-s-224-stage2-lda", "crossformer++-s-224-stage3-sda"),
    *("boat-swin-t-224-stage2-cluster", "boat-swin-t-224-stage2-attend", "boat-swin-t-384-stage1-attend"),
    *("mvitv2-s-224-stage3-both", "mvitv1-b-16x4-block4-both"),
)

QUICK = (
    *("crossformer-s-224-stage1-sda", "crossformer-s-224-stage1-lda"),
    *("boat-swin-t-224-stage3-both", "mvitv2-s-224-stage3-both"),
)

# what `make bench` measures: a layer of every kind of attention, and a model, on a CPU of one image
HEADLINE = (
    *select(
        CASES,
        (
            *("crossformer-s-224-stage1-sda", "crossformer-s-224-stage1-lda", "swin-t-224-stage1-shifted"),
            *("maxvit-t-224-stage1-grid", "boat-swin-t-224-stage1-both", "mvitv2-s-224-stage1-both"),
        ),
    ),
    *(replace(model, cpu_batch=1) for model in select(MODELS, ("mvitv2-t",))),
)
