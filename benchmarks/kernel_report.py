"""What the compiler makes of every GPU kernel, with the settings it is launched with: needs no GPU.

Registers, spills, shared memory, the blocks that a multiprocessor holds, bytes under way, matrix instructions, widths
of loads, and which unit limits a kernel. docs/kernels.md is its output.

python benchmarks/kernel_report.py                     a table for every chip
python benchmarks/kernel_report.py --chip 90 --case '49*'
python benchmarks/kernel_report.py --write             docs/kernels.md; --check says whether that has drifted
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import sass

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"
TRITON = "3.6."  # whose compiler the committed numbers come from


class Chip(NamedTuple):
    """A compute capability, and a board that has it, by its data sheet."""

    board: str
    processors: int
    ghz: float
    gbps: float  # of memory
    multiply_adds: int  # 16-bit, summed in float32, per clock and multiprocessor
    float_lanes: int  # float32 multiply-adds per clock and multiprocessor
    warps: int  # resident at most
    blocks: int  # resident at most
    shared: int  # KiB of a multiprocessor; a block may have all but one, and one more is the system's

    @property
    def bytes_per_clock(self) -> float:
        """Of memory, for each multiprocessor."""
        return self.gbps / self.ghz / self.processors

    def resident(self, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
        """Blocks that a multiprocessor holds. Registers come by 8 for a thread, tensor memory has 512 columns."""
        limits = [self.blocks, self.warps // warps, 65536 // (warps * sass.LANES * -(-registers // 8) * 8)]
        limits.append(self.shared * 1024 // (shared + 1024))
        return min(limits + ([512 // tensor_memory] if tensor_memory else []))


CHIPS = {
    80: Chip("A100 80 GB", 108, 1.41, 2039, 1024, 64, 64, 32, 164),
    86: Chip("RTX 3090", 82, 1.70, 936, 256, 128, 48, 16, 100),
    89: Chip("RTX 4090", 128, 2.52, 1008, 256, 128, 48, 24, 100),
    90: Chip("H200", 132, 1.98, 4800, 2048, 128, 64, 32, 228),
    100: Chip("B200", 148, 1.97, 8000, 4096, 128, 64, 32, 228),
    120: Chip("RTX 5090", 170, 2.41, 1792, 256, 128, 48, 24, 100),
}
SPECIAL_LANES, ALU_LANES, ISSUED = 16, 64, 4  # per clock and multiprocessor: exponentials, other arithmetic, warps


class Kernel(NamedTuple):
    """A row."""

    case: str
    name: str
    warps: int
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    blocks: int
    in_flight: int  # bytes of a multiprocessor, at most
    behind: int  # of these while it computes, on average
    matrix: str
    loads: str
    clocks: dict[str, int]  # a trip through the hot loop, by unit, of a multiprocessor that did nothing else

    @property
    def limit(self) -> str:
        first, second = sorted(self.clocks, key=self.clocks.get, reverse=True)[:2]
        return f"{first} {self.clocks[first]}, {second} {self.clocks[second]}" if self.clocks[first] else "none"


def kernel(case: str, name: str, chip: Chip, code: sass.Code, padding: float, **launch: int) -> Kernel:
    """A row. ``padding``: the share of a tile's lanes that are not masked."""
    tensor_memory = launch.pop("tensor_memory", 0)
    blocks = chip.resident(code.warps, launch["registers"], launch["shared"], tensor_memory)
    most, behind = code.under_way
    needs = code.needs
    clocks = {
        "memory": needs.requested * padding / chip.bytes_per_clock,
        "matrix": needs.multiply_adds / chip.multiply_adds,
        "exp2": needs.special / SPECIAL_LANES,
        "ALU": max(needs.fma / chip.float_lanes, needs.alu / ALU_LANES, needs.issued / ISSUED),
    }
    return Kernel(
        case, name, code.warps, launch["registers"], launch["spilled"], launch["shared"], blocks, blocks * most,
        blocks * behind, code.matrix, code.loads, {unit: round(n) for unit, n in clocks.items()},
    )  # fmt: skip


def tools() -> Path:
    """Where Triton keeps its disassembler."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def triton_kernels(capability: int, names: Iterable[str]) -> list[Kernel]:
    """Rows of the cases so named; a kernel that several launches of a case share is one, the most demanding."""
    import ahead_of_time

    found: dict[tuple[str, str], Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        for case in names:
            about = ahead_of_time.cases(capability)[case]
            for compiled in ahead_of_time.compile_launches(about.launch, capability):
                cubin.write_bytes(compiled.asm["cubin"])
                taken, metadata = sass.resources(tools(), cubin)[0][1], compiled.metadata
                code = sass.Code(sass.disassemble(tools(), cubin), metadata.num_warps, _products(compiled.asm["ttgir"]))
                launch = dict(registers=taken["REG"], spilled=taken["STACK"], shared=metadata.shared)
                launch["tensor_memory"] = getattr(metadata, "tmem_size", 0)
                row = kernel(case, metadata.name.strip("_"), CHIPS[capability], code, about.padding, **launch)
                before = found.get((case, row.name))
                if before is None or (row.spilled, row.registers) > (before.spilled, before.registers):
                    found[case, row.name] = row
    return list(found.values())


def _products(ttgir: str) -> list[int]:
    """Multiply-adds of every tcgen05 product."""
    shapes = re.findall(r"tc_gen5_mma .*? : !ttg\.memdesc<(\d+)x(\d+)x\w+,.*?!ttg\.memdesc<(\d+)x(\d+)x", ttgir)
    return [int(m) * int(k) * int(n) for m, k, _, n in shapes]


CLUSTERING = {"IfL": "fp32", "I6__half": "fp16", "I13__nv_bfloat16": "bf16"}  # in the names of the kernels
LARGEST = 3136, 32  # tokens and features of the largest published case


def cuda_library() -> Path | None:
    from vitkernels import _native

    found = _native._find("_CUDA")
    return None if found is None else Path(found)


def nvcc(library: Path) -> str:
    """The version of the compiler that made a library."""
    text = subprocess.run(["strings", "-a", library], capture_output=True, text=True).stdout
    found = re.search(r"Cuda compilation tools, release ([\d.]+), V([\d.]+)", text)
    return found[2] if found else "unknown"


def main(argv: list[str] | None = None) -> int:
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
