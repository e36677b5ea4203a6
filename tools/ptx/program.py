"""A kernel's PTX as instructions with the source lines they came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

TYPES = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}


class Unknown(Exception):
    """PTX that the emulator does not know."""


def size_of(kind: str) -> int:
    """Bytes of a value of a type."""
    return np.dtype(TYPES[kind]).itemsize


def bits(x: np.ndarray, kind: str = "u32") -> np.ndarray:
    """The same bits as another type."""
    return np.ascontiguousarray(x).view(TYPES[kind])


@dataclass
class Instruction:
    """One statement. A vector operand is a tuple."""

    index: int
    text: str
    line: str  # of the source: "kernels.py:123"
    opcode: str
    operands: list
    guard: str | None = None  # the predicate register
    negated: bool = False

    def __str__(self) -> str:
        return f"`{self.text[:100]}` at {self.line}"

    def registers(self) -> Iterator[str]:
        """All registers that its operands name."""
        return (name for name in re.findall(r"%?\w+", self.text.split(None, 1)[-1]) if name.startswith("%"))


@dataclass
class Program:
    """An entry point of a module."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size, in bytes
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # types
    shared: dict[str, int] = field(default_factory=dict)  # offsets of arrays in shared memory
    shared_bytes: int = 0  # of the arrays whose size the module says
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, ptx: str, name: str) -> Program:
        """The entry ``name`` of a module."""
        files = {number: path.rsplit("/")[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
        ptx = re.sub(r"//.*", "", ptx)
        entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)[^{{]*{{(.*?)^}}", ptx, re.S | re.M)
        program = cls(name)
        program._declare_parameters(entry[1])
        program._declare_shared(ptx)
        # a line directive ends without a semicolon
        body = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+).*$", r".loc \1 \2;", entry[2], flags=re.M)
        line = "?"
        for statement in body.split(";"):
            statement = " ".join(statement.split()).lstrip("{} ")  # scopes: names in them are the block's
            while label := re.match(r"([$\w]+):\s*", statement):
                program.labels[label[1]] = len(program.code)
                statement = statement[label.end() :].lstrip("{} ")
            if statement.startswith(".loc"):
                _, file, number = statement.split()
                line = f"{files.get(file, file)}:{number}"
            elif statement.startswith(".reg"):
                program._declare_registers(statement)
            elif statement and not statement.startswith("."):
                program.code.append(_instruction(len(program.code), statement, line))
        return program

    def without(self, index: int) -> Program:
        """The program with an instruction left out: in its place stands one that does nothing."""
        nothing = replace(self.code[index], opcode="nothing", operands=[])
        return replace(self, code=[*self.code[:index], nothing, *self.code[index + 1 :]])

    def _declare_parameters(self, text: str) -> None:
        for parameter in filter(str.strip, text.split(",")):
            words = re.search(r"\.(?:align\s+(\d+)\s+)?\.?([busf]\d+)\b.*?(\w+)(?:\[(\d+)\])?\s*$", parameter, re.S)
            size = size_of(words[2])
            align = int(words[1] or size)
            offset = -(-self.parameter_bytes // align) * align
            self.parameters[words[3]] = offset, size * int(words[4] or 1)
            self.parameter_bytes = sum(self.parameters[words[3]])

    def _declare_shared(self, ptx: str) -> None:
        """Arrays of unknown size, of which a launch says it, all lie behind the others."""
        arrays = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([$\w]+)\[(\d*)\]", ptx)
        for align, kind, symbol, count in sorted(arrays, key=lambda array: not array[3]):
            self.shared_bytes = -(-self.shared_bytes // int(align)) * int(align)
            self.shared[symbol] = self.shared_bytes
            self.shared_bytes += size_of(kind) * int(count or 0)

    def _declare_registers(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
        for name in names.split(","):
            name, count = re.match(r"\s*([%\w]+)(?:<(\d+)>)?", name).groups()
            self.registers |= {f"{name}{i}": kind for i in range(int(count))} if count else {name: kind}


def _instruction(index: int, text: str, line: str) -> Instruction:
    parts = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", text)
    if not parts:
        raise Unknown(f"`{text}` at {line}")
    operands = []
    for vector, single in re.findall(r"\{([^}]*)\}|((?:\[[^\]]*\]|[^,\[\s])+)", parts[4]):
        operands.append(tuple(x.strip() for x in vector.split(",")) if vector else single)
    return Instruction(index, text, line, parts[3], operands, parts[2], bool(parts[1]))
