"""Whether machine code hands the matrix products of a warp group (HGMMA of sm_90) what they need.

A descriptor says where an operand lies in shared memory. Its low word is made of shared memory's own address, and
otherwise it consists of constants and numbers of threads: whatever comes from an argument, from memory or from nowhere
is a fault of the assembler, which no look at its input shows. Registers of a product that is under way are its own
until it is waited for.

python benchmarks/wgmma.py KERNEL.cubin ...
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sass

BASE = "SR_CgaCtaId"  # of which the address of shared memory is made
THREADS = ("SR_TID.X", "SR_LANEID", "SRZ")  # special registers that only say which thread it is
CARRIES = set(  # instructions that make whole numbers of those in registers; the others are sources
    "MOV IADD3 VIADD IMAD LEA LOP3 SHF SGXT SEL PRMT SHFL R2UR VIMNMX VIADDMNMX IABS "
    "UMOV UIADD3 UIMAD ULEA ULOP3 USHF USGXT USEL UPRMT".split()
)
QUIET = set(  # instructions that write no register
    "ST STG STS STSM RED BAR BRA DEPBAR WARPSYNC WARPGROUP LDGSTS LDGDEPBAR R2P MEMBAR FENCE EXIT NOP CALL RET BSSY "
    "BSYNC ERRBAR ISETP UISETP FSETP PLOP3 UPLOP3".split()
)
MOST = 8  # more groups than an instruction leaves under way
REGISTER = re.compile(r"\bU?R\d+\b")


class Step(NamedTuple):
    """An instruction, and the registers that it writes and reads."""

    instruction: sass.Instruction
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    source: str  # of what it writes, "" where that is made of what it reads
    next: tuple[int, ...]  # places

    def __str__(self) -> str:
        x = self.instruction
        return f"{x.address:#x} {x.name}{x.operands}".rstrip()


class Product(NamedTuple):
    """The registers of an HGMMA."""

    place: int
    descriptors: tuple[str, ...]  # low and high word, of both operands or of the second
    operand: frozenset[str]  # the first, where it is in registers
    accumulators: frozenset[str]


def _run(register: str, first: int, count: int) -> tuple[str, ...]:
    """So many registers, from the ``first`` after ``register`` on."""
    file, number = re.match(r"(U?R)(\d+)", register).groups()
    return tuple(f"{file}{int(number) + i}" for i in range(first, first + count))


def _width(name: str) -> int:
    """Registers that an instruction writes."""
    if shape := re.match(r"HGMMA\.64x(\d+)x\d+\.F(32|16)", name):
        return int(shape[1]) * int(shape[2]) // 64
    if wide := re.search(r"\.(128|64)\b|\.MT?88\.([24])", name):
        return int(wide[2] or int(wide[1]) // 32)
    return 4 if name.startswith("HMMA") else 2 if "WIDE" in name or name == "CS2R" else 1


@cache
def _registers(name: str, operands: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """What an instruction writes and reads, and the source of what it writes."""
    kind, given = name.split(".")[0], [part.strip() for part in operands.split(",")]
    if kind in ("LDL", "STL") and (slot := re.search(r"\[R1(?:\+0x([0-9a-f]+))?\]", operands)):
        memory = tuple(f"[{int(slot[1] or '0', 16) + 4 * i}]" for i in range(_width(name)))  # registers spilled
        held = _run(given[kind == "STL"], 0, _width(name)) if REGISTER.match(given[kind == "STL"]) else ()
        return (held, memory, "") if kind == "LDL" else (memory, held, "")
    while len(given) > 1 and re.match(r"U?P(\d|T)\b", given[0]):
        given.pop(0)
    writes = _run(given.pop(0), 0, _width(name)) if kind not in QUIET and REGISTER.match(given[0]) else ()
    reads = []
    for place, part in enumerate(given):
        for register in REGISTER.findall(part):
            if "gdesc" in part:  # the first operand's, unless that is in registers, and the second's
                reads += _run(register, 2 * place, 4 - 2 * place)
            elif kind == "HGMMA":
                reads += _run(register, 0, 4 if place == 0 else 1)
            else:
                wide = ".64" in name or ".64" in part or ("WIDE" in name and part is given[-1])
                reads += _run(register, 0, 2 if wide else 1)
    last = given[-1] if given else ""
    constant = kind == "HFMA2" and not reads
    made = constant or last in THREADS or (kind in CARRIES and "c[" not in operands)
    return writes, tuple(reads), "" if made else BASE if last == BASE else kind


def steps(text: str) -> list[Step]:
    """The instructions of a kernel, from ``sass.disassemble``."""
    code = sass.instructions(text)
    places = {x.address: place for place, x in enumerate(code)}
    returns = tuple(place + 1 for place, x in enumerate(code) if x.kind == "CALL")

    def following(place: int, x: sass.Instruction) -> Iterator[int]:
        if x.kind in ("BRX", "JMP", "JMX"):
            raise ValueError(f"{x.name} at {x.address:#x} goes where it does not say")
        if x.kind in ("BRA", "CALL"):
            yield places[int(re.search(r"\b0x([0-9a-f]+)", x.operands)[1], 16)]
        if x.kind == "RET":
            yield from returns
        may_pass = x.guard or (x.kind == "BRA" and re.search(r"\bU?P\d|\.DIV", x.name + x.operands))
        if place + 1 < len(code) and (may_pass or x.kind not in ("BRA", "CALL", "RET", "EXIT")):
            yield place + 1

    return [Step(x, *_registers(x.name, x.operands), tuple(following(place, x))) for place, x in enumerate(code)]


def products(code: list[Step]) -> Iterator[Product]:
    for place, step in enumerate(code):
        if step.instruction.kind == "HGMMA":
            descriptors = tuple(register for register in step.reads if register.startswith("U"))
            operand = frozenset(step.reads[:4] if len(descriptors) == 2 else ())
            yield Product(place, descriptors, operand, frozenset(step.writes))


def foreign(code: list[Step]) -> Iterator[str]:
    """What descriptors are wrongly made of, followed back along every path."""
    before = defaultdict(list)
    for place, step in enumerate(code):
        for behind in step.next:
            before[behind].append(place)

    @cache
    def writers(place: int, register: str) -> frozenset[int]:
        """Places of the instructions that may have written what a register holds at a place, -1 for none."""
        todo, seen, found = [place], set(), set()
        while todo:
            place = todo.pop()
            if place == 0:
                found.add(-1)
            for earlier in before[place]:
                if earlier not in seen:
                    seen.add(earlier)
                    written = register in code[earlier].writes
                    if written:
                        found.add(earlier)
                    if not written or code[earlier].instruction.guard:
                        todo.append(earlier)
        return frozenset(found)

    for product in products(code):
        for number, descriptor in enumerate(product.descriptors):
            todo, seen, based, said = [(product.place, descriptor)], set(), number % 2 == 1, f"{code[product.place]}: "
            while todo:
                for writer in writers(*(wanted := todo.pop())) - seen:
                    seen.add(writer)
                    based |= code[writer].source == BASE
                    if writer < 0:
                        yield f"{said}{descriptor} comes from {wanted[1]}, which nothing wrote"
                    elif code[writer].source not in ("", BASE):
                        yield f"{said}{descriptor} comes from {code[writer]}"
                    else:
                        todo += [(writer, register) for register in code[writer].reads]
            if not based:
                yield f"{said}{descriptor} is not made of the address of shared memory"


def disturbed(code: list[Step]) -> Iterator[str]:
    """Registers of products that something else touches on a path to where they are waited for."""
    for product in products(code):
        todo, seen = [(product.place, 0)], set()  # groups of products closed since, its own among them
        while todo:
            place, closed = todo.pop()
            step, x = code[place], code[place].instruction
            closed = min(closed + (x.kind == "HGMMA" and "gsb0" in x.operands), MOST)
            if x.name.startswith("WARPGROUP.DEPBAR") and closed > int(x.operands.split(",")[-1], 16):
                continue
            new = {(behind, closed) for behind in step.next} - seen
            seen |= new
            todo += new
            if place != product.place:
                used = {*step.reads[:4]} if x.kind == "HGMMA" else {*step.reads, *step.writes}  # others may add as well
                touched = (product.operand & {*step.writes}) | (product.accumulators & used)
                if touched:
                    yield f"{code[product.place]}: {min(touched)} is not its own at {step}"


def faults(text: str) -> list[str]:
    """What is wrong with the products of a kernel, from ``sass.disassemble``."""
    code = steps(text)
    return [*dict.fromkeys((*foreign(code), *disturbed(code)))]


def main() -> None:
    from kernel_report import tools

    codes = {
        f"{path} {name}": code
        for path in sys.argv[1:]
        for name, code in sass.machine_code(Path(path).read_bytes()).items()
    }
    texts = sass.disassemble(tools(), 90, codes.values())
    for name, code in codes.items():
        found = faults(texts[code])
        print(f"{name}: {len(found)} faults", *found, sep="\n  ")


if __name__ == "__main__":
    main()
