"""Whether machine code hands the matrix products of a warp group (HGMMA of sm_90) what they need.

A descriptor says where an operand lies in shared memory. Its low word is made of shared memory's own address, of
constants and of numbers of threads, its high word of constants alone. Whatever comes from an argument, from memory or
from nowhere is a fault of the assembler, which no look at its input shows. Registers of a product that is under way are
its own until it is waited for; only products with exactly the same accumulators may add to them meanwhile.

Not checked:
- how a descriptor is computed: its constants, and that the address is shifted right by 4;
- whether the operands in shared memory are overwritten before the product is waited for;
- whether a WARPGROUP.ARRIVE comes before the product.

python benchmarks/wgmma.py KERNEL.cubin ...
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

BASE = "SR_CgaCtaId"  # of which the address of shared memory is made
THREADS = ("SR_TID.X", "SR_LANEID")  # special registers that only say which thread it is
CARRIES = set(  # instructions that make whole numbers of those in registers; the others are sources
    "MOV IADD3 VIADD IMAD LEA LOP3 SHF SGXT SEL PRMT SHFL R2UR VIMNMX VIADDMNMX IABS "
    "UMOV UIADD3 UIMAD ULEA ULOP3 USHF USGXT USEL UPRMT".split()
)
QUIET = set(  # instructions that write no register
    "ST STG STS STSM RED BAR BRA DEPBAR WARPSYNC WARPGROUP LDGSTS LDGDEPBAR R2P MEMBAR FENCE EXIT NOP CALL RET BSSY "
    "BSYNC ERRBAR CCTL FCHK DSETP HSETP2 ISETP UISETP FSETP PLOP3 UPLOP3".split()
)
MOST = 8  # more groups than an instruction leaves under way
REGISTER = re.compile(r"\bU?R\d+\b")


class Step(NamedTuple):
    """An instruction, and the registers that it writes and reads."""

    instruction: sass.Instruction
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    source: str  # of what it writes, "" where that is constant or made of what it reads
    next: tuple[int, ...]  # places

    def origins(self, register: str) -> tuple[str, ...]:
        """Registers that one of those written is made of: of several words, each is made of its like."""
        words = len(self.writes)
        return self.reads if "WIDE" in self.instruction.name else self.reads[self.writes.index(register) :: words]

    @property
    def cancels(self) -> bool:
        """Whether it is an exclusive or of registers, or of one and a constant: three of them swap two registers."""
        _, operands, kind, guard, _ = self.instruction
        return kind in ("LOP3", "ULOP3") and "RZ, 0x3c," in operands and not (guard or self.source)

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
    """Number of registers that an instruction writes, or stores."""
    if shape := re.match(r"HGMMA\.64x(\d+)x\d+\.F(32|16)", name):
        return int(shape[1]) * int(shape[2]) // 64
    if wide := re.search(r"\.F?(128|64)\b|\.MT?88\.([24])", name):
        return int(wide[2] or int(wide[1]) // 32)
    if name.startswith("HMMA"):
        return 4 if ".F32" in name else 2
    return 2 if "WIDE" in name or re.match(r"CS2R$|D(ADD|MUL|FMA|SETP)\b", name) else 1


def _reads(name: str, part: str, place: int, last: bool) -> int:
    """Number of registers that an instruction reads from the one that an operand names."""
    if "[" in part:  # an address
        return 2 if ".64" in part else 1
    if name.startswith("HGMMA"):
        return 4 if place == 0 else 1  # its accumulators are those that it writes
    if name.startswith("HMMA"):
        return (4, 2, _width(name))[place]
    return 1 if "WIDE" in name and not last else _width(name)


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
            else:
                reads += _run(register, 0, _reads(name, part, place, place == len(given) - 1))
    last = given[-1] if given else ""
    constant = kind == "HFMA2" and not reads
    made = constant or last == "SRZ" or (kind in CARRIES and "c[" not in operands)
    return writes, tuple(reads), "" if made else last if last in (BASE, *THREADS) else kind


def steps(text: str) -> list[Step]:
    """The instructions of a kernel, from ``sass.disassemble``."""
    code = sass.instructions(text)
    places = {x.address: place for place, x in enumerate(code)}
    returns = tuple(place + 1 for place, x in enumerate(code) if x.kind == "CALL")

    def following(place: int, x: sass.Instruction) -> Iterator[int]:
        said = re.search(r"-?\b0x[0-9a-f]+", x.operands)
        if x.kind in ("BRX", "JMP", "JMX") or (x.kind in ("BRA", "CALL") and not said):
            raise ValueError(f"{x.name} at {x.address:#x} goes where it does not say")
        if x.kind in ("BRA", "CALL"):
            target = int(said[0], 16)
            if target not in places:
                raise ValueError(
                    f"{x.name} at {x.address:#x} goes to {target:#x}, where no instruction is; is this code for sm_90?"
                )
            yield places[target]
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

    @cache
    def parts(place: int, register: str) -> dict[tuple[int, str], tuple[int, str]]:
        """Registers that the value of another is made of, and where they are read, by the place that wrote them last.

        What is twice in an exclusive or is left out.
        """
        step, found = code[place], {}
        for origin in step.origins(register):
            last = writers(place, origin)
            (last,) = last if len(last) == 1 else (~place,)  # several: the value is known to be the same only here
            inner = step.cancels and last >= 0 and code[last].cancels
            more = parts(last, origin) if inner else {(last, origin): (place, origin)}
            both = found.keys() & more.keys() if step.cancels else ()
            found = {key: part for key, part in (found | more).items() if key not in both}
        return found

    for product in products(code):
        for number, descriptor in enumerate(product.descriptors):
            high, said = number % 2 == 1, f"{code[product.place]}: "
            allowed = ("",) if high else ("", BASE, *THREADS)
            todo, seen, based = [(product.place, descriptor)], set(), False
            while todo:
                place, register = todo.pop()
                found = {(writer, register) for writer in writers(place, register)} - seen
                seen |= found
                for writer, _ in found:
                    based |= code[writer].source == BASE
                    if writer < 0:
                        yield f"{said}{descriptor} comes from {register}, which nothing wrote"
                    elif code[writer].source not in allowed:
                        yield f"{said}{descriptor} comes from {code[writer]}"
                    else:
                        todo += parts(writer, register).values()
            if not (based or high):
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
                adds = x.kind == "HGMMA" and product.accumulators == {*step.writes}
                used = {*step.reads[:4]} if adds else {*step.reads, *step.writes}
                touched = (product.operand & {*step.writes}) | (product.accumulators & used)
                if touched:
                    yield f"{code[product.place]}: {min(touched)} is not its own at {step}"


def faults(text: str) -> list[str]:
    """What is wrong with the products of a kernel, from ``sass.disassemble``."""
    code = steps(text)
    return [*dict.fromkeys((*foreign(code), *disturbed(code)))]


def main() -> None:
    from kernel_report import tools

    parser = argparse.ArgumentParser(prog="python benchmarks/wgmma.py", description=__doc__.partition("\n")[0])
    parser.add_argument("cubin", type=Path, nargs="+", help="compiled for sm_90")
    paths = parser.parse_args().cubin
    if absent := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"no such file: {', '.join(absent)}")
    codes = {f"{path} {name}": code for path in paths for name, code in sass.machine_code(path.read_bytes()).items()}
    texts = sass.disassemble(tools(), 90, codes.values())
    for name, code in codes.items():
        try:
            found = faults(texts[code])
        except ValueError as error:
            parser.error(f"{name}: {error}")
        print(f"{name}: {len(found)} faults", *found, sep="\n  ")


if __name__ == "__main__":
    main()
