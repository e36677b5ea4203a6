"""Instructions that do something to memory, to other lanes or to the course of the threads."""

from __future__ import annotations

import re

import numpy as np

from .memory import LANES
from .program import TYPES, bits, size_of
from .rules import effect, flat

# other lanes


@effect(r"(vote\.sync\.ballot|match\.any\.sync|redux\.sync\.(?:min|max|add)|activemask)\.(\w+)")
def _(threads, instruction, name, kind):
    """What lanes make together and all of them get."""
    operand = "pred" if name.startswith("vote") else kind
    value = threads.operand(instruction.operands[1], operand) if len(instruction.operands) > 1 else np.ones(1, bool)
    result = threads.register(instruction.operands[0], kind)
    places = np.uint64(1) << np.arange(LANES, dtype=np.uint64)

    def run(mask):
        active = np.broadcast_to(mask, threads.count).reshape(-1, LANES)
        grid = np.broadcast_to(value, threads.count).reshape(-1, LANES)
        if name.startswith("match"):
            found = ((grid[:, :, None] == grid[:, None, :]) & active[:, None, :]) @ places
        elif name.startswith("redux"):
            reduced = [
                getattr(np, name.split(".")[-1].replace("add", "sum"))(g[a]) if a.any() else 0
                for g, a in zip(grid, active)
            ]
            found = np.repeat(np.array(reduced), LANES)
        else:
            found = np.repeat((grid & active) @ places, LANES)
        np.copyto(result, found.ravel(), where=mask, casting="unsafe")

    return run


# memory


@effect(r"ld\.param(?:\.v\d)?\.(\w+)")
def _(threads, instruction, kind):
    symbol, offset = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", instruction.operands[1]).groups()
    first = threads.machine.program.parameters[symbol][0] + int(offset or 0)
    results = [threads.register(name, kind) for name in flat(instruction.operands[:1])]
    given = threads.machine.parameters[first : first + len(results) * size_of(kind)].view(TYPES[kind])

    def run(mask):
        for result, value in zip(results, given):
            np.copyto(result, value, where=mask, casting="unsafe")

    return run


@effect(r"ld(?:\.(global|shared(?:::cta)?))?(?:\.nc|\.L1::\w+|\.L2::\w+)*(?:\.v\d)?\.(\w+)")
def _(threads, instruction, space, kind):
    names = flat(instruction.operands[:1])
    results = [threads.register(name, kind) for name in names]
    address, width = threads.address(instruction.operands[1]), size_of(kind) * len(names)

    def run(mask):
        lanes = threads.lanes(mask)
        if len(lanes):
            memory, addresses = threads.machine.memory(space, address(lanes))
            found, allowed = memory.read(instruction, threads.ids[lanes], addresses, width)
            for result, column in zip(results, bits(found, kind).T):
                result[lanes[allowed]] = column

    return run


@effect(r"st(?:\.(global|shared(?:::cta)?))?(?:\.L1::\w+|\.L2::\w+)*(?:\.v\d)?\.(\w+)")
def _(threads, instruction, space, kind):
    operands = [threads.operand(name, kind) for name in flat(instruction.operands[1:])]
    address = threads.address(instruction.operands[0])

    def run(mask):
        lanes = threads.lanes(mask)
        if len(lanes):
            memory, addresses = threads.machine.memory(space, address(lanes))
            columns = [np.broadcast_to(x, threads.count)[lanes] for x in operands]
            memory.write(instruction, threads.ids[lanes], addresses, bits(np.stack(columns, 1), "u8"))

    return run


@effect(r"(atom|red)\.(shared|global)\.(add|min|max|or|and|exch)\.(\w+)")
def _(threads, instruction, form, space, name, kind):
    result = threads.register(instruction.operands[0], kind) if form == "atom" else None
    target, value = instruction.operands[-2:]
    address, operand = threads.address(target), threads.operand(value, kind)
    combine = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or, "and": np.bitwise_and}.get(
        name
    )

    def run(mask):
        """Lanes take turns."""
        memory = threads.machine.memory(space, np.zeros(0))[0]
        for lane in threads.lanes(mask):
            which, at = threads.ids[lane : lane + 1], address(np.array([lane]))
            old, allowed = memory.granules(instruction, which, at, size_of(kind))
            old = memory.values(old.ravel()).reshape(-1).view(TYPES[kind])
            if len(allowed):
                given = np.broadcast_to(operand, threads.count)[lane : lane + 1]
                new = combine(old, given) if combine else given
                memory.write(instruction, which, at, bits(new, "u8")[None], atomic=True)
                if result is not None:
                    result[lane] = old[0]

    return run


@effect(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)*")
def _(threads, instruction):
    """Bytes beyond those given are zero."""
    to, source = (threads.address(operand) for operand in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    given = threads.operand(instruction.operands[3] if len(instruction.operands) > 3 else str(size), "u32")

    def run(mask):
        lanes = threads.lanes(mask)
        if not len(lanes):
            return
        count = np.broadcast_to(given, threads.count)[lanes]
        values = np.zeros((len(lanes), size), np.uint8)
        for width in map(int, set(count) - {0}):
            some = np.flatnonzero(count == width)
            memory = threads.machine.spaces["global"]
            found, allowed = memory.read(instruction, threads.ids[lanes[some]], source(lanes[some]), width)
            values[some[allowed], :width] = found
        granules, allowed = threads.machine.spaces["shared"].start_copy(
            instruction, threads.ids[lanes], to(lanes), size
        )
        threads.copies.append((lanes[allowed], threads.committed[lanes[allowed]], granules, values[allowed]))

    return run


@effect(r"cp\.async\.commit_group")
def _(threads, instruction):
    def run(mask):
        threads.committed[threads.lanes(mask)] += 1

    return run


@effect(r"cp\.async\.wait_(group|all)")
def _(threads, instruction, which):
    """Copies land when their own thread waits for them."""
    pending = int(instruction.operands[0]) if which == "group" else -1

    def run(mask):
        waiting, kept = np.broadcast_to(mask, threads.count), []
        for lanes, group, granules, values in threads.copies:
            done = waiting[lanes] & (group < threads.committed[lanes] - pending)
            threads.machine.spaces["shared"].land_copy(granules[done], threads.ids[lanes[done]], values[done])
            if not done.all():
                kept.append((lanes[~done], group[~done], granules[~done], values[~done]))
        threads.copies = kept

    return run


@effect(r"(?:nothing|prefetch|discard|membar|fence(?!\.proxy)|createpolicy|griddepcontrol|nanosleep).*")
def _(threads, instruction):
    return lambda mask: None


@effect(r"fence\.proxy\.async.*")
def _(threads, instruction):
    block = threads.machine.block

    def run(mask):
        block.fenced[threads.ids[threads.lanes(mask)]] = block.step

    return run


# the course of the threads


@effect(r"bra(?:\.uni)?", ends=True)
def _(threads, instruction):
    target = threads.machine.program.labels[instruction.operands[0]]

    def run(mask):
        threads.pc[threads.lanes(mask)] = target

    return run


@effect(r"(?:ret|exit)", ends=True)
def _(threads, instruction):
    def run(mask):
        threads.alive[threads.lanes(mask)] = False

    return run


@effect(r"bar\.warp\.sync")
def _(threads, instruction):
    def run(mask):
        threads.machine.block.sync(threads.whole_warps(instruction, mask))

    return run


@effect(r"(?:bar|barrier)\.sync(?:\.aligned)?", ends=True)
def _(threads, instruction):
    number, *count = [threads.operand(operand, "s32") for operand in instruction.operands]

    def run(mask):
        threads.whole_warps(instruction, mask)
        lanes = threads.lanes(mask)
        threads.barrier[lanes] = np.broadcast_to(number, threads.count)[lanes]
        expected = count[0] if count else np.array([threads.machine.threads])
        threads.expected[lanes] = np.broadcast_to(expected, threads.count)[lanes]

    return run
