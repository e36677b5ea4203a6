"""What a run found, by kind and instruction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .program import Instruction


@dataclass
class Fault:
    """A fault of an instruction: how often, and the first thread and address."""

    kind: str
    kernel: str
    instruction: Instruction
    block: int
    thread: int
    address: int
    count: int = 0

    def __str__(self) -> str:
        where = f"block {self.block}, thread {self.thread}, address {self.address:#x}"
        return f"{self.kernel}: {self.kind}, {self.count} times, {self.instruction}; first: {where}"


class Faults(list):
    """Faults in the order in which they were first seen."""

    def add(self, kind, kernel, instruction, block, threads, addresses, mask) -> None:
        """One of ``kind`` for every element of the mask that is set; the arrays broadcast."""
        which = np.flatnonzero(mask)
        if not len(which):
            return
        fault = next((f for f in self if (f.kind, f.kernel, f.instruction) == (kind, kernel, instruction)), None)
        if fault is None:
            threads, addresses = (np.broadcast_to(x, mask.shape).ravel() for x in (threads, addresses))
            fault = Fault(kind, kernel, instruction, block, int(threads[which[0]]), int(addresses[which[0]]))
            self.append(fault)
        fault.count += len(which)
