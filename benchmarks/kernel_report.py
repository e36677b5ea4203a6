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
import functools
import gc
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import sass
import wgmma

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
        """Blocks that a multiprocessor holds.

        Registers come by 8 for a thread, from 16,384 of each quarter; tensor memory has 512 columns.
        """
        by_registers = 4 * (16384 // (sass.LANES * -(-registers // 8) * 8))  # warps
        limits = [self.blocks, self.warps // warps, by_registers // warps]
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
    widest: int  # bytes that a lane loads at once, anywhere
    unfenced: bool
    faults: list[str]  # of products in machine code

    @property
    def limit(self) -> str:
        return max(self.clocks, key=self.clocks.get)


def kernel(
    case: str, name: str, chip: Chip, code: sass.Code, padding: float, faults: Iterable[str] = (), **launch: int
) -> Kernel:
    """A row. ``padding``: the share of a tile's lanes that are not masked."""
    tensor_memory, missing = launch.pop("tensor_memory", 0), launch.pop("unfenced", False)
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
        code.widest, missing, [*faults],
    )  # fmt: skip


def unfenced(ptx: str) -> bool:
    """Whether tensor cores that read shared memory by themselves may do so before they see asynchronous copies."""
    landed = False
    for what in re.findall(r"\b(cp\.async\.wait|fence\.proxy\.async|wgmma\.mma_async|tcgen05\.mma)", ptx):
        if landed and "mma" in what:
            return True
        landed = what == "cp.async.wait" or (landed and what != "fence.proxy.async")
    return False


def tools() -> Path:
    """Where Triton keeps its disassembler."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def triton_kernels(capability: int, names: Iterable[str]) -> list[Kernel]:
    """Rows of the cases so named; a kernel that several launches of a case share is one, the most demanding."""
    import ahead_of_time

    found: dict[tuple[str, str], Kernel] = {}
    cases = ahead_of_time.cases(capability)
    made = [(case, one) for case in names for one in ahead_of_time.compile_launches(cases[case].launch, capability)]
    codes = [sass.machine_code(compiled.asm["cubin"])[compiled.metadata.name] for _, compiled in made]
    texts, code_of = sass.disassemble(tools(), capability, codes), functools.cache(sass.Code)
    faults_of = functools.cache(wgmma.faults if capability == 90 else lambda text: [])
    for (case, compiled), code in zip(made, codes):
        metadata, taken = compiled.metadata, _resources(compiled.asm["cubin"])
        launch = dict(registers=taken["REG"], spilled=taken["STACK"], shared=metadata.shared)
        launch |= dict(tensor_memory=getattr(metadata, "tmem_size", 0), unfenced=unfenced(compiled.asm["ptx"]))
        read = code_of(texts[code], metadata.num_warps, _products(compiled.asm["ttgir"]))
        padding, faults = cases[case].padding, faults_of(texts[code])
        row = kernel(case, metadata.name.strip("_"), CHIPS[capability], read, padding, faults, **launch)
        before = found.get((case, row.name), row)
        worst = max(before, row, key=lambda x: (x.spilled, x.registers))
        found[case, row.name] = worst._replace(faults=before.faults or row.faults)
    return list(found.values())


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(cubin)
        return sass.resources(tools(), Path(file.name))[0][1]


def _products(ttgir: str) -> tuple[int, ...]:
    """Multiply-adds of every tcgen05 product."""
    shapes = re.findall(r"tc_gen5_mma .*? : !ttg\.memdesc<(\d+)x(\d+)x\w+,.*?!ttg\.memdesc<(\d+)x(\d+)x", ttgir)
    return tuple(int(m) * int(k) * int(n) for m, k, _, n in shapes)


DTYPES = {"fp32": ("If", 4), "fp16": ("I6__half", 2), "bf16": ("I13__nv_bfloat16", 2)}  # in a kernel's name, bytes
SIZES = {"784 tokens, 32": (784, 32), "3136 tokens, 32": (3136, 32), "9216 tokens, 32": (9216, 32)}  # with features
PLAN = """#include <cstdio>
#include "cuda/balanced_clusters.h"
int main(int, char** a) {
  auto launch = vitkernels::plan(atol(a[1]), atoi(a[2]), atol(a[3]), atol(a[4]));
  printf("%d %d %zu", launch.warps, int(launch.resident), launch.shared);
}"""


def _cuda_library() -> Path | None:
    found = importlib.util.find_spec("vitkernels._CUDA")
    return None if found is None else Path(found.origin)


def _compiler_of(library: Path) -> str:
    """The release of nvcc that made a library."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", library.read_bytes())
    return found[1].decode() if found else "unknown"


def cuda_kernels(library: Path) -> dict[int, list[Kernel]]:
    """Rows of the clustering, by chip, each as its launch is planned on a chip."""
    rows: dict[int, list[Kernel]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, plan = Path(folder) / "plan.cpp", Path(folder) / "plan"
        source.write_text("#include <cstdlib>\n" + PLAN)
        subprocess.run([os.environ.get("CXX", "c++"), f"-I{ROOT / 'csrc'}", source, "-o", plan], check=True)
        extract = [tools() / "cuobjdump", "--extract-elf", "all", library.resolve()]
        subprocess.run(extract, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for cubin in Path(folder).glob("*.cubin"):
            capability = int(re.search(r"sm_(\d+)", cubin.name)[1])
            taken = dict(sass.resources(tools(), cubin))
            if taken and capability in CHIPS:
                codes = sass.machine_code(cubin.read_bytes())
                texts = sass.disassemble(tools(), capability, codes.values())
                kernels = {name: texts[code] for name, code in codes.items()}
                rows[capability] = list(_clustering(plan, CHIPS[capability], taken, kernels))
    return dict(sorted(rows.items()))


def _clustering(plan: Path, chip: Chip, taken: dict[str, dict[str, int]], kernels: dict[str, str]) -> Iterator[Kernel]:
    for (case, (tokens, features)), (dtype, (mangled, size)) in itertools.product(SIZES.items(), DTYPES.items()):
        command = [plan, *map(str, (tokens, features, size, (chip.shared - 1) * 1024))]
        planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        warps, resident, shared = map(int, planned)
        name = next(name for name in taken if f"{mangled}Lb{resident}E" in name)
        launch = dict(registers=taken[name]["REG"], spilled=taken[name]["STACK"], shared=shared)
        yield kernel(f"{case}, {dtype}", "balanced_clusters", chip, sass.Code(kernels[name], warps), 1.0, **launch)


COLUMNS = (
    *("kernel", "case", "warps", "registers", "spilled", "shared", "blocks", "in flight", "behind", "matrix", "loads"),
    *("memory", "matrix", "exp2", "ALU", "limit"),
)


def cells(row: Kernel) -> list[str]:
    kib = [f"{size / 1024:.0f}" for size in (row.shared, row.in_flight, row.behind)]
    numbers = [str(n) for n in (row.warps, row.registers, row.spilled)]
    clocks = [str(n) for n in row.clocks.values()]
    return [row.name, row.case, *numbers, kib[0], str(row.blocks), *kib[1:], row.matrix, row.loads, *clocks, row.limit]


def table(rows: list[Kernel]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * 7 + "---|---|" + "---:|" * 4 + "---|"]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows])


INTRODUCTION = """# Kernels

What the compiler makes of every GPU kernel, with the settings that it is launched with: compiled ahead of time, no GPU
needed, nothing here is a measured time. Written by `make kernels` (benchmarks/kernel_report.py); a test fails when it
has drifted.

- **registers** of a thread, bytes **spilled** by a thread, KiB of **shared** memory of a block, **blocks** that one
  multiprocessor holds by these and by its limits of warps.
- **in flight**: KiB that a multiprocessor's blocks have asked for and do not yet wait for, at most; **behind**: of
  these while they compute, on average over the products and exponentials of the code. What is not behind computation
  is waited for; then other blocks must fill in. By arithmetic an H200 needs 23 KiB under way on every
  multiprocessor: 4.3 TB/s for 700 ns.
- **matrix** instructions that a warp issues, and global **loads** (count x bytes of a lane), of the hot loop: the
  innermost loop with most matrix instructions, without any that with most instructions, else the whole kernel.
- **memory**, **matrix**, **exp2**, **ALU**: clocks that a trip through the hot loop of one block takes a multiprocessor
  in each of these units alone. memory: all bytes that lanes ask for or write, at the board's bandwidth, so that what a
  cache serves counts too (rows read twice; the bias gradient's tile, which backward kernels of groups add to where
  head_dim is above 32); lanes beyond the group or the head do not. matrix: at the rate of the chip's best
  instructions, which on sm_90 mma.sync does not reach. ALU: the longest of the pipe of float32 multiply-adds, of all
  other arithmetic, and of issuing. **limit**: the longest; the closer the next, the better the two must overlap.

Boards, by their data sheets: {boards}.

## What has been checked of the compiled code, and what has not

Checked without a GPU, by tests:

- PTX of sm_80 and sm_90, as Triton 3.6 and nvcc make it, runs thread by thread in an emulator (tools/ptx). Kernels of
  every family keep the numerical contract there, with their gradients, and no access is out of bounds, misaligned, of
  memory that nobody wrote, or racing with another lane, warp, block or copy.
- Every barrier, wait and fence of three kernels is left out in turn. The emulator sees what is missing, but for three
  that nothing needs; tests/test_emulated.py names them and says why.
- Machine code of sm_90: descriptors of products of warp groups come from the address of shared memory and constants
  alone, and nothing touches registers of a product under way (benchmarks/wgmma.py).
- Registers, spills, shared memory, fences and wide loads of the kernels below, for every chip.
- The front end compiles every form of every kernel for every chip; with `make variants` it does so with Triton 3.6,
  3.7.1 and 3.8.

Not checked: what the assembler makes otherwise of the PTX, tcgen05 of sm_100, the order of atomics, approximate units
bit by bit, sizes beyond a few blocks, and time.
"""


def document(triton_rows: dict[int, list[Kernel]], cuda_rows: dict[int, list[Kernel]], compiler: str) -> dict[str, str]:
    """The introduction, and what Triton and nvcc made."""
    boards = "; ".join(f"sm_{chip} {about.board}, {about.gbps:.0f} GB/s" for chip, about in CHIPS.items())
    parts = {"": INTRODUCTION.format(boards=boards)}
    import triton

    for title, found in ((f"Triton {triton.__version__}", triton_rows), (f"CUDA C++, nvcc {compiler}", cuda_rows)):
        chips = (f"### sm_{chip}\n\n{table(rows)}\n" for chip, rows in found.items())
        parts[title] = f"## {title}\n\n" + "\n".join(chips)
    return parts


def drifted(parts: dict[str, str], committed: str) -> list[str]:
    """Titles of parts that the committed document has otherwise; a part of another compiler is not compared."""
    titles = re.findall(r"^## (.*)$", committed, re.M)
    return [title for title, text in parts.items() if (not title or title in titles) and text.strip() not in committed]


def rows_of(capability: int, pattern: str = "*") -> list[Kernel]:
    """Triton's rows, compiled in a process of their own: Triton either interprets or compiles."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--chip", str(capability), "--case", pattern, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sm_{capability}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return [Kernel(**row) for row in json.loads(done.stdout)]


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python benchmarks/kernel_report.py", description=__doc__, formatter_class=form
    )
    parser.add_argument("--chip", nargs="+", type=int, choices=CHIPS, default=list(CHIPS), help="compute capabilities")
    parser.add_argument("--case", default="*", metavar="GLOB", help="names of cases, with wildcards")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write docs/kernels.md")
    what.add_argument("--check", action="store_true", help="fail where docs/kernels.md has drifted")
    what.add_argument("--json", action="store_true", help="rows of one chip's Triton kernels as JSON")
    args = parser.parse_args(argv)
    try:
        import ahead_of_time
    except ImportError as error:
        parser.error(f"{error}: the kernels cannot be compiled without Triton")
    if args.json:
        gc.disable()  # this process ends before garbage fills the memory
        names = fnmatch.filter(ahead_of_time.cases(args.chip[0]), args.case)
        print(json.dumps([row._asdict() for row in triton_kernels(args.chip[0], names)]))
        return 0
    known = {
        *(f"{size}, {dtype}" for size in SIZES for dtype in DTYPES),
        *(name for chip in args.chip for name in ahead_of_time.cases(chip)),
    }
    if not any(fnmatch.fnmatchcase(name, args.case) for name in known):
        parser.error(f"no case matches {args.case}; there are {', '.join(sorted(known))}")
    library = _cuda_library()
    if library is None and args.write:
        parser.error(
            "the CUDA library was not built (no nvcc, or VITKERNELS_CUDA=0): the document needs its kernels too"
        )
    if library is None:
        print("the CUDA library was not built: its kernels are left out", file=sys.stderr)

    def rows(chip: int) -> list[Kernel]:
        kernels = rows_of(chip, args.case)
        print(f"sm_{chip}: {len(kernels)} Triton kernels compiled", file=sys.stderr)
        return kernels

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(args.chip, pool.map(rows, args.chip)))
    clustering = cuda_kernels(library) if library else {}
    clustering = {
        chip: [row for row in kernels if fnmatch.fnmatchcase(row.case, args.case)]
        for chip, kernels in clustering.items()
    }
    parts = document(
        found, {chip: clustering.get(chip, []) for chip in args.chip}, _compiler_of(library) if library else ""
    )
    if args.check:
        changed = drifted(parts, DOCUMENT.read_text())
        print(
            "\n".join(
                f"docs/kernels.md has drifted: {title or 'introduction'}; `make kernels` writes it" for title in changed
            )
        )
        return int(bool(changed))
    text = "\n".join(part.strip() + "\n" for part in parts.values())
    if args.write:
        DOCUMENT.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
