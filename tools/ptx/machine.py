"""Runs the threads of a block up to its barriers, in one of three orders."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from . import effects, matrix, registers  # noqa: F401 (their rules)
from .faults import Faults
from .memory import LANES, POISON, SHARED_WINDOW, Block, Memory
from .program import TYPES, Program, Unknown, size_of
from .rules import bind

SHARED_BASE = 1024  # address of a block's shared memory


class Machine:
    """One multiprocessor, which runs one block after another. The order of threads is "lockstep", all together, or
    "ascending" or "descending", one warp after another up to the next barrier.
    """

    def __init__(self, program: Program, threads: int, shared_bytes: int, faults: Faults, order="lockstep") -> None:
        self.program, self.threads, self.order = program, threads, order
        self.block = Block(program.name, threads // LANES, faults)
        self.granule = granule_of(program)
        self.shared_bytes = -(-max(shared_bytes, program.shared_bytes) // 16) * 16
        self.parameters = np.zeros(program.parameter_bytes + 16, np.uint8)
        self.product_registers = matrix.product_registers(program)
        names: dict[int, list[str]] = {}
        for name, kind in program.registers.items():
            names.setdefault(size_of(kind) if kind != "pred" else 0, []).append(name)
        self.banks = {
            size: np.zeros((len(bank), threads), f"u{size}" if size else bool) for size, bank in names.items()
        }
        self.rows = {name: (size, row) for size, bank in names.items() for row, name in enumerate(bank)}
        self.spaces: dict[str, Memory] = {}
        self.grid = np.zeros((2, threads), np.uint32)  # the block's number, and how many there are
        together = threads if order == "lockstep" else matrix.WARPGROUP if self.product_registers else LANES
        self.groups = [Threads(self, first, together) for first in range(0, threads, together)]

    def memory(self, space: str | None, addresses: np.ndarray) -> tuple[Memory, np.ndarray]:
        """The space, and addresses in it, that addresses mean; without a space they are generic."""
        if space is None:
            shared = addresses >> 44 == SHARED_WINDOW >> 44
            if shared.any() and not shared.all():
                raise Unknown("lanes of one instruction in two spaces")
            space, addresses = ("shared", addresses - SHARED_WINDOW) if shared.all() else ("global", addresses)
        return self.spaces[space.split(":")[0]], addresses

    def run_block(self, index: int, blocks: int) -> None:
        self.grid[:] = np.array([index, blocks])[:, None]
        for size, bank in self.banks.items():
            bank.view("u2" if size else bool)[:] = POISON if size else False
        self.block.start(index)
        self.spaces["shared"] = Memory("shared", self.block, self.granule, self.shared_bytes, SHARED_BASE)
        for group in self.groups:
            group.start()
        while any(group.alive.any() for group in self.groups):
            for group in self.groups[::-1] if self.order == "descending" else self.groups:
                group.run()
            if not self._release():
                return

    def _release(self) -> bool:
        """Let those go on whose barrier has all its threads. Whether any did, or all have ended."""
        number, expected, alive, pc = (
            np.concatenate([getattr(group, name) for group in self.groups])
            for name in ("barrier", "expected", "alive", "pc")
        )
        released = np.zeros(self.threads, bool)
        for barrier in np.unique(number[alive]):
            at = alive & (number == barrier)
            if at.sum() >= expected[at].max():
                self.block.join(np.unique(np.flatnonzero(at) // LANES))
                released |= at
        if alive.any() and not released.any():
            instruction = self.program.code[int(pc[alive][0]) - 1]
            self.block.fault("barrier that not all threads reach", instruction, alive, np.arange(self.threads))
            return False
        for group in self.groups:
            group.barrier[released[group.ids]] = -1
        return True


def granule_of(program: Program) -> int:
    """The least bytes that an instruction accesses."""
    widths = [16]
    for instruction in program.code:
        if access := re.match(r"(?:ld|st|atom|red)\b(?!.*\bparam\b).*\.\w(\d+)$", instruction.opcode):
            vector = re.search(r"\.v(\d)\.", instruction.opcode)
            widths.append(int(access[1]) // 8 * int(vector[1] if vector else 1))
        elif instruction.opcode.startswith("cp.async.c"):
            widths.append(4)
    return min(widths)


class Step(NamedTuple):
    run: object
    ends: bool  # whether the threads' course depends on it


class Threads:
    """Threads that go together: where some part from the others, those furthest behind go first."""

    def __init__(self, machine: Machine, first: int, count: int) -> None:
        self.machine, self.count, self.ids = machine, count, np.arange(first, first + count)
        self.every, self.warps = np.arange(count), np.arange(first // LANES, (first + count) // LANES)
        self.pc, self.expected = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.alive, self.barrier = np.zeros(count, bool), np.zeros(count, np.int64)  # which it waits at, or -1
        self.committed = np.zeros(count, np.int64)
        self.products, self.copies = matrix.Products(), []
        self.steps = [self._step(instruction) for instruction in machine.program.code]

    def _step(self, instruction) -> Step:
        run, ends = bind(self, instruction)
        if self.machine.product_registers:
            run = matrix.guard_registers(self, instruction, run)
        return Step(run, ends)

    def start(self) -> None:
        self.pc[:], self.alive[:], self.barrier[:], self.committed[:] = 0, True, -1, 0
        self.products.__init__()
        self.copies = []

    def run(self) -> None:
        """Until every thread has ended or waits."""
        while (ready := self.alive & (self.barrier < 0)).any():
            at = int(self.pc[ready].min())
            mask = ready & (self.pc == at)
            others = self.pc[ready & ~mask]
            stop = int(others.min()) if len(others) else len(self.steps)
            everyone = True if mask.all() else mask
            ends = False
            while at < stop and not ends:
                run, ends = self.steps[at]
                self.machine.block.step += 1
                at += 1
                if ends:
                    self.pc[mask] = at
                run(everyone)
            if not ends:
                self.pc[mask] = at

    # operands

    def register(self, name: str, kind: str) -> np.ndarray:
        """A view of a register of these threads: of the type, or of the register's own width where that is greater."""
        if name == "_":  # nobody reads it
            return np.empty(self.count, TYPES[kind])
        size, row = self.machine.rows[name]
        values = self.machine.banks[size][row, self.ids[0] : self.ids[-1] + 1]
        if kind == "pred":
            return values
        if size_of(kind) > size:
            raise Unknown(f"{name} as {kind}")
        return values.view(TYPES[kind] if size_of(kind) == size else f"{TYPES[kind].kind.replace('f', 'u')}{size}")

    def operand(self, name: str, kind: str) -> np.ndarray:
        """What an operand stands for, [threads] or [1]: a view of a register, or constants."""
        machine, dtype = self.machine, np.dtype(TYPES[kind])
        if kind == "pred" and name.startswith("!"):
            raise Unknown("a negated operand")
        if name in machine.rows:
            size = machine.rows[name][0]
            wide = self.register(name, kind)
            return wide if kind == "pred" or size == dtype.itemsize else wide.view(dtype)[:: size // dtype.itemsize]
        if name in machine.program.shared:
            return np.array([SHARED_BASE + machine.program.shared[name]]).astype(dtype)
        if name.startswith("%"):
            return self._special(name).astype(dtype, copy=False)  # a view of what differs between blocks
        if exact := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", name):
            return np.array([int(exact[2], 16)], f"u{len(exact[2]) // 2}").view(dtype)
        value = int(name.rstrip("U"), 0)
        if kind == "pred":
            return np.array([value != 0])
        return np.array([value % (1 << 8 * dtype.itemsize)], f"u{dtype.itemsize}").view(dtype)

    def _special(self, name: str) -> np.ndarray:
        grid = self.machine.grid[:, self.ids[0] : self.ids[-1] + 1]
        special = {
            "%tid.x": self.ids, "%laneid": self.ids % LANES, "%warpid": self.ids // LANES,
            "%ntid.x": np.full(1, self.machine.threads), "%ctaid.x": grid[0], "%nctaid.x": grid[1],
            "%lanemask_lt": (1 << self.ids % LANES) - 1,
        }  # fmt: skip
        if name not in special:
            raise Unknown(f"register {name}")
        return special[name]

    def address(self, operand: str):
        """The function from lanes to the addresses in ``[register+offset]``."""
        base, offset = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        offset = int(offset or 0)
        if base in self.machine.program.shared:
            start = SHARED_BASE + self.machine.program.shared[base] + offset
            return lambda lanes: np.full(len(lanes), start)
        values = self.register(base, "u64") if self.machine.rows[base][0] == 8 else self.register(base, "u32")
        return lambda lanes: values[lanes].astype(np.int64) + offset

    def lanes(self, mask) -> np.ndarray:
        return self.every if mask is True else np.flatnonzero(mask)

    def whole_warps(self, instruction, mask) -> np.ndarray:
        """The warps, numbered in the block, that execute what a whole warp must execute together."""
        if mask is True:
            return self.warps
        active = mask.reshape(-1, LANES)
        some = active.any(1)
        if (partial := some & ~active.all(1)).any():
            kind = "executed by a part of a warp"
            self.machine.block.fault(kind, instruction, np.repeat(partial, LANES), self.ids, 0)
        return self.warps[some]
