"""What is measured: attention layers of published models, as (map, heads, partition, position bias)."""

from __future__ import annotations

from dataclasses import dataclass

from vitkernels import Partition


@dataclass(frozen=True)
class Case:
    """One attention layer; batch sizes are those of a usual run on a CPU and on a GPU."""

    name: str
    height: int  # tokens
    width: int  # tokens
    heads: int
    partition: Partition  # concrete
    bias: str  # "dpb": a DynamicPositionBias, evaluated in every call; "table": a learned table
    cpu_batch: int = 8
    gpu_batch: int = 128
    head_dim: int = 32

    @property
    def dim(self) -> int:
        """Channels, C."""
        return self.heads * self.head_dim

    def batch(self, device: str) -> int:
        return self.gpu_batch if device == "cuda" else self.cpu_batch

    def describe(self) -> str:
        (gh, gw), (iy, ix), (sy, sx) = self.partition.group, self.partition.interval, self.partition.shift
        words = [f"map {self.height}x{self.width}", f"{self.heads} heads x {self.head_dim}", f"groups {gh}x{gw}"]
        words += [f"interval {iy}x{ix}"] if iy * ix > 1 else []
        words += [f"shift {sy},{sx}"] if sy or sx else []
        return ", ".join([*words, {"dpb": "dynamic position bias", "table": "bias table"}[self.bias]])


def _case(name: str, height: int, width: int, heads: int, partition: Partition, bias: str, **batches: int) -> Case:
    return Case(name, height, width, heads, partition.on(height, width), bias, **batches)


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


SEVENS, INTERVALS = (7, 7, 7, 7), (8, 4, 2, 1)

CASES: tuple[Case, ...] = (
    *_crossformer("crossformer-s-224", 56, 56, 3, SEVENS, INTERVALS),
    *_crossformer("crossformer-s-1344x800", 200, 336, 3, SEVENS, INTERVALS, cpu_batch=1, gpu_batch=2),
    *_maxvit(),
    *_swin(),
    # unfavourable: groups of 16 tokens fill a quarter of a tile, 196 tokens do more arithmetic than memory traffic
    *_crossformer("crossformer++-s-224", 56, 56, 2, (4, 4, 14), (4, 2, 1)),
)

QUICK = ("crossformer-s-224-stage1-sda", "crossformer-s-224-stage1-lda")
