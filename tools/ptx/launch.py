"""Launches that run in the emulator: those of Triton on CPU tensors, and kernels of a PTX module.

with emulated(90) as log:
    launcher(...)
assert not log.faults
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import triton
from ahead_of_time import chip  # of benchmarks
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from .faults import Faults
from .machine import Machine
from .memory import GlobalMemory, Storage
from .program import Program, Unknown, bits

__all__ = ["Log", "Program", "Struct", "Unknown", "emulated", "run"]

POISONED = ("empty", "empty_like", "empty_strided")
SMALL = 1 << 24  # bytes: larger storages hold no NaN where nobody wrote; a kernel that reads there is at fault anyway


@dataclass
class Struct:
    """A parameter that is a structure: its layout as the module ``struct`` writes it, and its fields."""

    layout: str
    values: Sequence


@dataclass
class Log:
    """What ran, and what was found."""

    order: str
    faults: Faults = field(default_factory=Faults)
    launches: list[str] = field(default_factory=list)  # kernels
    fresh: dict[int, Storage] = field(default_factory=dict)  # storages made by torch.empty, by address
    kept: list[Tensor] = field(default_factory=list)  # so that no other tensor gets the address of one of these


def run(
    program: Program,
    grid: int,
    threads: int,
    shared_bytes: int,
    arguments: Sequence,
    log: Log,
    blocks: Iterable[int] = (),
) -> None:
    """A kernel on tensors, numbers, None (a null pointer) and structures, which are `Struct`; all blocks of the grid or
    those that are given.
    """
    machine = Machine(program, threads, shared_bytes, log.faults, log.order)
    values = [x for argument in arguments for x in (argument.values if isinstance(argument, Struct) else [argument])]
    tensors = [x for x in values if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x for x in tensors if x.untyped_storage().nbytes()}
    memory = GlobalMemory(machine.block, machine.granule, [_storage(x, log) for x in storages.values()])
    machine.spaces["global"] = memory
    for (first, size), argument in zip(program.parameters.values(), arguments):
        machine.parameters[first : first + size] = _bytes(argument, size, memory)
    with np.errstate(all="ignore"):
        for block in blocks or range(grid):
            machine.run_block(block, grid)
    memory.write_back()
    log.launches.append(program.name)


def _bytes(argument, size: int, memory: GlobalMemory) -> np.ndarray:
    """What stands in the place of a parameter."""
    if isinstance(argument, Struct):
        fields = (memory.address(x.data_ptr()) if isinstance(x, Tensor) else x or 0 for x in argument.values)
        return np.frombuffer(struct.pack(argument.layout, *fields), np.uint8)
    if isinstance(argument, float):
        return bits(np.array([argument], np.float32 if size == 4 else np.float64), "u8")
    value = memory.address(argument.data_ptr()) if isinstance(argument, Tensor) else int(argument or 0)
    return bits(np.array([value % (1 << 64)], np.uint64), "u8")[:size]


def _storage(x: Tensor, log: Log) -> Storage:
    storage = x.untyped_storage()
    if storage.data_ptr() in log.fresh:
        return log.fresh[storage.data_ptr()]
    view = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return Storage(storage.data_ptr(), storage.nbytes(), view, fresh=False)


@contextmanager
def emulated(capability: int, order: str = "lockstep", ends: int = 0) -> Iterator[Log]:
    """Triton's launches on CPU tensors compile for the chip, without its assembler, and run here.

    With ``ends`` only so many of the first and of the last blocks of a launch run. What `torch.empty` makes is
    poisoned. Triton keeps what it compiles in another folder: it lacks machine code.
    """
    log, compile_and_run = Log(order), JITFunction.run
    programs: dict[str, Program] = {}

    def launch(kernel, *arguments, grid, warmup, **keywords):
        """Returns None, so that no caller keeps the kernel."""
        compiled = compile_and_run(kernel, *arguments, grid=grid, warmup=True, **keywords)
        if compiled.hash not in programs:
            programs[compiled.hash] = Program.parse(compiled.asm["ptx"], compiled.metadata.name)
        program, meta = programs[compiled.hash], compiled.metadata
        named = dict(zip(kernel.arg_names, arguments)) | keywords
        given = [x for name, kind in compiled.src.signature.items() for x in _flat(kind, named[name])]
        assert len(program.parameters) - len(given) in (0, 1, 2)  # and Triton's own workspaces, which are not used
        blocks = math.prod(grid)
        some = [i for i in range(blocks) if i < ends or i >= blocks - ends] if ends else ()
        run(program, blocks, meta.num_warps * 32, meta.shared, given, log, some)

    def poisoned(make):
        def empty(*arguments, **keywords):
            x = make(*arguments, **keywords)
            storage = x.untyped_storage()
            if storage.nbytes():
                view = torch.empty(0, dtype=torch.uint8).set_(storage)
                log.fresh[storage.data_ptr()] = Storage(storage.data_ptr(), storage.nbytes(), view.numpy(), fresh=True)
                log.kept.append(x)
                if storage.nbytes() < SMALL:
                    view.fill_(0xFF)
            return x

        return empty

    with ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir += "-emulated"
        stack.enter_context(chip(capability))
        patches = [(JITFunction, "run", launch), (CUDABackend, "make_cubin", lambda *_: b"")]
        patches += [(torch, name, poisoned(getattr(torch, name))) for name in POISONED]
        patches += [(Tensor, "new_empty", poisoned(Tensor.new_empty))]
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield log


def _flat(kind, value) -> list:
    """Arguments that a kernel takes at run time."""
    if isinstance(kind, tuple):
        return [x for k, v in zip(kind, value) for x in _flat(k, v)]
    return [] if kind == "constexpr" else [value]
