"""Whether machine code hands a warp group's matrix products (HGMMA, sm_90) what they ask for.

A descriptor says where an operand lies in shared memory. It is made of constants, of the shared memory's base and of
numbers of threads; what comes from an argument, from memory or from nowhere is a fault of the assembler. The registers
of a product that is under way belong to it until it is waited for.

python benchmarks/wgmma.py KERNEL.cubin [...]
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sass

# what makes whole numbers of those in registers; all else is a source of its own
CARRIES = set(
    "MOV IADD3 VIADD IMAD LEA LOP3 SHF SGXT SEL PRMT SHFL R2UR VIMNMX VIADDMNMX IABS "
    "UMOV UIADD3 UIMAD ULEA ULOP3 USHF USGXT USEL UPRMT".split()
)
THREADS = ("SR_TID.X", "SR_LANEID", "SRZ")  # special registers that say no more than which thread it is
# what writes no register
QUIET = "ST RED BAR BRA DEPBAR WARP LDGSTS LDGDEPBAR R2P MEMBAR FENCE EXIT NOP CALL RET BSSY BSYNC ERRBAR".split()
BASE = "SR_CgaCtaId"  # of which the address of shared memory is made
REGISTER = re.compile(r"\bU?R\d+\b")


class Step(NamedTuple):
    """An instruction, and the registers that it reads and writes."""

    instruction: sass.Instruction
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    source: str  # of what it writes, where that is not made of what it reads
    next: tuple[int, ...]  # places


def _run(register: str, first: int, count: int) -> tuple[str, ...]:
    """Registers from the ``first`` behind a register on."""
    file, number = re.match(r"(U?R)(\d+)", register).groups()
    return tuple(f"{file}{int(number) + i}" for i in range(first, first + count))


@cache
def _results(name: str) -> int:
    """Registers that an instruction writes."""
    if shape := re.match(r"HGMMA\.64x(\d+)x\d+\.F(32|16)", name):
        return int(shape[1]) * int(shape[2]) // 64
    if wide := re.search(r"\.(128|64)\b|\.MT?88\.([24])", name):
        return int(wide[2] or int(wide[1]) // 32)
    return 4 if name.startswith("HMMA") else 2 if "WIDE" in name or name == "CS2R" else 1


@cache
def _registers(name: str, operands: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """What an instruction writes, what it reads, and the source of what it writes."""
    kind, given, writes, reads = name.split(".")[0], [part.strip() for part in operands.split(",")], (), []
    if kind in ("LDL", "STL") and (slot := re.search(r"\[R1(?:\+0x([0-9a-f]+))?\]", operands)):  # registers in memory
        stored = tuple(f"[{int(slot[1] or '0', 16) + 4 * i}]" for i in range(_results(name)))
        held = _run(given[kind == "STL"], 0, _results(name)) if "RZ" not in operands else ()
        return (held, stored, "") if kind == "LDL" else (stored, held, "")
    while re.match(r"U?P(\d|T)\b", given[0]) and len(given) > 1:
        given.pop(0)
    if kind not in QUIET and not kind.startswith("ST") and "SETP" not in kind and REGISTER.match(given[0]):
        writes = _run(given.pop(0), 0, _results(name))
    for part in given:
        for register in REGISTER.findall(part):
            wide = ".64" in name or ".64" in part or ("WIDE" in name and part is given[-1])
            if "gdesc" in part:  # operand A's, where that is not in registers, and B's
                first = 0 if part is given[0] else 2
                reads += _run(register, first, 4 - first)
            else:
                reads += _run(register, 0, 4 if kind == "HGMMA" and part is given[0] else 2 if wide else 1)
    carried = (kind in CARRIES and "c[" not in operands) or (kind == "HFMA2" and not reads)  # a constant
    source = "" if carried or given[-1] in THREADS else BASE if given[-1] == BASE else kind
    return writes, tuple(reads), source


def steps(text: str) -> list[Step]:
    """The instructions of a kernel, from ``sass.disassemble``."""
    code = sass.instructions(text)
    places = {instruction.address: place for place, instruction in enumerate(code)}
    behind_calls = tuple(place + 1 for place, x in enumerate(code) if x.kind == "CALL")

    def following(place: int, x: sass.Instruction) -> Iterator[int]:
        conditional = x.guard or re.search(r"\bU?P\d|\.DIV", x.operands + x.name)
        if x.kind in ("BRA", "CALL"):
            yield places[int(re.search(r"\b0x([0-9a-f]+)", x.operands)[1], 16)]
        elif x.kind == "RET":
            yield from behind_calls
        elif x.kind in ("BRX", "JMP", "JMX"):
            raise ValueError(f"{x.name} at {x.address:#x} jumps to a computed address")
        if place + 1 < len(code) and (conditional or x.kind not in ("BRA", "CALL", "RET", "EXIT")):
            yield place + 1

    return [
        Step(x, *_registers(x.name, x.operands), tuple(following(place, x))) for place, x in enumerate(code)
    ]


class Product(NamedTuple):
    """An HGMMA: its registers by what they are for."""

    place: int
    descriptors: tuple[str, ...]
    operand: frozenset[str]
    accumulators: frozenset[str]


def products(code: list[Step]) -> Iterator[Product]:
    for place, step in enumerate(code):
        if step.instruction.kind == "HGMMA":
            descriptors = tuple(register for register in step.reads if register.startswith("U"))
            operand = frozenset(step.reads) - {*step.writes, *descriptors} if len(descriptors) == 2 else frozenset()
            yield Product(place, descriptors, operand, frozenset(step.writes))


def _said(step: Step) -> str:
    x = step.instruction
    return f"{x.address:#x} {x.name}{x.operands}".rstrip()


def foreign(code: list[Step]) -> Iterator[str]:
    """What descriptors are wrongly made of, followed back along every path."""
    before = defaultdict(list)
    for place, step in enumerate(code):
        for behind in step.next:
            before[behind].append(place)

    @cache
    def writers(place: int, register: str) -> frozenset[int]:
        """Places of the instructions that may have written what a register holds at a place; -1 for none."""
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
            todo, seen, sources = [(product.place, descriptor)], set(), set()
            while todo:
                place, register = todo.pop()
                for writer in writers(place, register):
                    step = code[writer]
                    source = "undefined" if writer < 0 else step.source and f"{register} of {_said(step)}"
                    sources |= {BASE if step.source == BASE else source} - {""}
                    if not source and writer not in seen:
                        seen.add(writer)
                        todo += [(writer, read) for read in step.reads]
            if number % 2 == 0 and not sources:
                yield f"{_said(code[product.place])}: {descriptor} is not made of the shared memory's base"
            for source in sorted(sources - {BASE}):
                yield f"{_said(code[product.place])}: {descriptor} is made of {source}"


def disturbed(code: list[Step]) -> Iterator[str]:
    """Registers of products that something else touches on a path to where they are waited for."""
    for product in products(code):
        todo, seen = [(product.place, 0)], set()  # groups of products closed since, its own among them
        while todo:
            place, closed = todo.pop()
            step = code[place]
            x = step.instruction
            if x.kind == "HGMMA":
                closed += "gsb0" in x.operands
            elif x.name.startswith("WARPGROUP.DEPBAR") and closed > int(x.operands.split(",")[-1], 16):
                continue
            for after in step.next:
                if (after, closed) not in seen:
                    seen.add((after, closed))
                    todo.append((after, closed))
            if place == product.place or x.kind == "WARPGROUP":
                continue
            touched = product.operand & set(step.writes)
            if x.kind != "HGMMA":
                touched |= product.accumulators & {*step.writes, *step.reads}
            if touched:
                yield f"{_said(code[product.place])}: {min(touched)} is not its own at {_said(step)}"


def faults(text: str) -> list[str]:
    """What is wrong with the products of a kernel, from ``sass.disassemble``."""
    code = steps(text)
    return [*dict.fromkeys((*foreign(code), *disturbed(code)))]


def main() -> None:
    import kernel_report

    parser = argparse.ArgumentParser(prog="python benchmarks/wgmma.py", description=__doc__.partition("\n")[0])
    parser.add_argument("cubins", nargs="+", type=Path)
    codes = {
        (path, name): code
        for path in parser.parse_args().cubins
        for name, code in sass.machine_code(path.read_bytes()).items()
    }
    texts = sass.disassemble(kernel_report.tools(), 90, codes.values())
    for (path, name), code in codes.items():
        found = faults(texts[code])
        print("\n  ".join([f"{path} {name}: {len(found)}", *found]))


if __name__ == "__main__":
    main()
