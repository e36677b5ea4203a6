"""Machine code of a GPU kernel, read: its hot loop, what that asks of every unit, how many bytes it has under way.

The hot loop is the innermost loop with most matrix instructions, of kernels without any that with most instructions;
where there is none it is the whole kernel.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

LANES = 32  # of a warp
BYTES = 16  # of an instruction
# what runs on the pipe of float32 multiply-adds, and what on none of the arithmetic pipes
MULTIPLY_ADD = ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2")
ELSEWHERE = tuple(
    "MUFU BRA BAR EXIT BSSY BSYNC NOP WARP DEPBAR LD ST RED ATOM S2 CS2R SYNCS UTC HMMA HGMMA SHFL U R2UR FENCE ERRBAR "
    "CCTL PLOP3".split()
)
MATRIX = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}


class Instruction(NamedTuple):
    name: str  # with its modifiers
    operands: str
    kind: str  # the name alone
    guard: str  # the predicate under which it runs, "" without one
    address: int

    @property
    def width(self) -> int:
        """Bytes that a lane moves."""
        if wide := re.search(r"\.(128|64)\b", self.name):
            return int(wide[1]) // 8
        if narrow := re.search(r"\.[US](8|16)\b", self.name):
            return int(narrow[1]) // 8
        return 4

    @property
    def multiply_adds(self) -> int:
        """Of a warp, by matrix instructions whose name says the shape."""
        if self.kind == "HGMMA":  # four warps share it
            m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", self.name).groups())
            return m * n * k // 4
        if self.kind == "HMMA":  # m is 16, n is 8
            return 16 * 8 * int(re.search(r"\.168(\d+)", self.name)[1])
        return 0

    @property
    def registers(self) -> frozenset[int]:
        return _registers(self.operands)


@cache
def _registers(operands: str) -> frozenset[int]:
    return frozenset(int(number) for number in re.findall(r"\bR(\d+)\b", operands))


def instructions(text: str) -> list[Instruction]:
    code = []
    for line in text.splitlines():
        if found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][\w.]*)([^;]*);", line):
            address, guard, name, operands = found.groups()
            code.append(Instruction(name, operands, name.split(".")[0], guard or "", int(address, 16)))
    return code


def _parse(text: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """The instructions, and every loop: its first and the place behind its last."""
    code, places, jumps, exits = instructions(text), {}, [], []
    for place, instruction in enumerate(code):
        if instruction.kind == "BRA" and (target := re.search(r"\b0x([0-9a-f]+)", instruction.operands)):
            jumps.append((place, int(target[1], 16)))
        elif instruction.kind == "EXIT":
            exits.append(place)
        places[instruction.address] = place
    targets = ((places[target], place) for place, target in jumps if target in places)
    loops = [(first, last + 1) for first, last in targets if first < last]
    # no loop: what waits for a barrier, in place or, so that it jumps back, after the end of the kernel
    return code, [(a, b) for a, b in loops if b - a > 8 and bisect_left(exits, a) == bisect_left(exits, b)]


class Needs(NamedTuple):
    """What a trip through the hot loop asks of a multiprocessor, for one block."""

    requested: int  # bytes that lanes ask of global memory, or write there
    multiply_adds: int  # by matrix instructions
    special: int  # lanes' exponentials, reciprocals and the like
    fma: int  # lanes' operations on the pipe of float32 multiply-adds
    alu: int  # lanes' other arithmetic
    issued: int  # instructions of warps


class Code:
    """Instructions of a kernel, from ``disassemble``."""

    def __init__(self, text: str, warps: int, tensor_memory: Sequence[int] = ()):
        """``tensor_memory``: multiply-adds of every tcgen05 product, whose instructions do not say their shape."""
        self.warps, self.tensor_memory = warps, tensor_memory
        self.code, self.loops = _parse(text)

    @cached_property
    def hot(self) -> list[Instruction]:
        counts = [0, *itertools.accumulate(x.kind in MATRIX for x in self.code)]

        def matrix(loop: tuple[int, int]) -> int:
            return counts[loop[1]] - counts[loop[0]]

        def inside(a: tuple[int, int], b: tuple[int, int]) -> bool:
            return a != b and b[0] <= a[0] and a[1] <= b[1]

        products = counts[-1] > 0
        loops = [loop for loop in self.loops if matrix(loop) or not products]
        loops = [loop for loop in loops if not any(inside(other, loop) for other in loops)]
        return self.code[slice(*max(loops, key=lambda loop: (matrix(loop), loop[1] - loop[0])))] if loops else self.code

    def _some(self, *kinds: str) -> Iterator[Instruction]:
        return (x for x in self.hot if x.kind in kinds)

    @property
    def matrix(self) -> str:
        """Kinds of matrix instructions of the kernel, and of its hot loop how many a warp issues."""
        kinds = Counter(MATRIX[x.kind] for x in self.hot if x.kind in MATRIX)
        kinds.update({MATRIX[x.kind]: 0 for x in self.code if x.kind in MATRIX})
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"

    @property
    def loads(self) -> str:
        """Global loads of the hot loop by width, those of 16 bytes first."""
        widths = Counter(x.width for x in self._some("LDG", "LDGSTS"))
        return ", ".join(f"{count} x {width}" for width, count in sorted(widths.items(), reverse=True)) or "none"

    @property
    def widest(self) -> int:
        """Bytes of a lane's widest global load in the whole kernel."""
        return max((x.width for x in self.code if x.kind in ("LDG", "LDGSTS")), default=0)

    @cached_property
    def needs(self) -> Needs:
        lanes = self.warps * LANES
        products = sum(x.multiply_adds for x in self.hot) * self.warps
        if self.tensor_memory:
            share = sum(1 for _ in self._some("UTCHMMA")) / sum(x.kind == "UTCHMMA" for x in self.code)
            products += round(sum(self.tensor_memory) * share)
        arithmetic = [x.kind for x in self.hot if not x.kind.startswith(ELSEWHERE)]
        fma = sum(kind.startswith(MULTIPLY_ADD) for kind in arithmetic)
        return Needs(
            requested=lanes * sum(x.width for x in self._some("LDG", "LDGSTS", "STG")),
            multiply_adds=products,
            special=lanes * sum(1 for _ in self._some("MUFU")),
            fma=lanes * fma,
            alu=lanes * (len(arithmetic) - fma),
            issued=self.warps * len(self.hot),
        )

    @cached_property
    def under_way(self) -> tuple[int, int]:
        """Bytes of a block that are asked for and not yet waited for: at most, and on average while it computes.

        A load into registers is waited for where one of them is named next, a copy to shared memory where its group
        is. The loop is gone through three times, and the last counts: then rows for later trips are on their way.
        """
        most, behind, loads, groups = 0, [], [], [0]  # (registers, bytes); bytes of groups of copies, the open one last
        for _ in range(3 if self.hot is not self.code else 1):
            behind.clear()
            for x in self.hot:
                loads = [load for load in loads if not load[0] & x.registers]
                if x.kind == "LDG":
                    target = int(re.search(r"\bR(\d+)\b", x.operands)[1]) if "R" in x.operands else -1
                    loads.append((set(range(target, target + -(-x.width // 4))), x.width))
                elif x.kind == "LDGSTS":
                    groups[-1] += x.width
                elif x.kind == "LDGDEPBAR":
                    groups.append(0)
                elif x.kind == "DEPBAR" and (left := re.search(r"SB0, (0x[0-9a-f]+)", x.operands)):
                    groups = [0] * (len(groups) - 1 - int(left[1], 16)) + groups[-1 - int(left[1], 16) :]
                now = sum(size for _, size in loads) + sum(groups)
                most = max(most, now)
                if x.kind in MATRIX or x.kind in ("MUFU", "FFMA"):
                    behind.append(now)
        lanes = self.warps * LANES
        return most * lanes, round(sum(behind) / max(1, len(behind))) * lanes


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """The code of every kernel of an ELF file, by name."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _kind, _flags, _address, offset, length in headers:
        start = headers[names][4] + name
        title = cubin[start : cubin.index(0, start)].decode()
        if title.startswith(".text."):
            found[title.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def disassemble(tools: Path, capability: int, codes: Iterable[bytes]) -> dict[bytes, str]:
    """The text of every kernel, by its code.

    All go through the disassembler at once, because it takes longer to start than to read them. Addresses count from
    the first kernel's start.
    """
    unique = list(dict.fromkeys(codes))
    if not unique:
        return {}
    chip = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(b"".join(unique))
        command = [tools / "nvdisasm", "--no-dataflow", "--binary", chip, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends, lines = [*itertools.accumulate(map(len, unique))], [[] for _ in (*unique, "behind them")]
    for line in text.splitlines():
        if address := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
            lines[bisect_right(ends, int(address[1], 16))].append(line)
    if [len(own) * BYTES for own in lines] != [*map(len, unique), 0]:
        raise RuntimeError(f"{command[0]} wrote {sum(map(len, lines))} instructions of {ends[-1] / BYTES:g}")
    return {code: "\n".join(own) for code, own in zip(unique, lines)}


def resources(tools: Path, cubin: Path) -> list[tuple[str, dict[str, int]]]:
    """(name, REG, STACK and SHARED) of every kernel."""
    command = [tools / "cuobjdump", "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s*(.*)", text)
    return [(name, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}) for name, line in kernels]
