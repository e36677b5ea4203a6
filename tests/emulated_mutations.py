"""Whether the emulator sees what is missing: every barrier, wait and fence of a kernel is left out in turn.

python tests/emulated_mutations.py NAME..    prints the instructions left out and the kinds of faults, as JSON
"""

from __future__ import annotations

import json
import re
import sys
from unittest import mock

from emulated_cases import ROOT, compile_for_cpu_tensors

KERNELS = {  # chip, case, kernel
    "products of warp groups, sm_90": (90, "49 tokens, bf16", "_partition_attention_forward"),
    "copies, sm_80": (80, "65 tokens, streamed", "_streamed_attention_forward"),
    "partial sums, sm_80": (80, "49 tokens, bf16", "_partition_attention_backward"),
}
ORDERING = re.compile(r"bar(rier)?\.|fence|cp\.async\.wait|wgmma\.(fence|wait)")


def launches(chip: int, case: str) -> list[tuple]:
    """What every launch of a case runs: program, grid, threads, shared memory, arguments."""
    import emulated_cases
    from ptx import launch

    recorded, run = [], launch.run

    def record(*arguments):
        given = [x.detach() if hasattr(x, "detach") else x for x in arguments[4]]
        recorded.append((*arguments[:4], given, [x.clone() if hasattr(x, "clone") else x for x in given]))
        run(*arguments)

    with mock.patch.object(launch, "run", record):
        emulated_cases.run(chip, case, "lockstep")
    return recorded


def mutants(chip: int, case: str, kernel: str) -> list[dict]:
    """One entry per instruction: what it is, the kinds of faults of the first block without it, and whether that shows.

    Where it does not, the instruction stays out: of two that replace each other, the absence of the second shows.
    """
    import torch
    from ptx.launch import Log, run

    program, grid, threads, shared, tensors, contents = next(x for x in launches(chip, case) if x[0].name == kernel)
    pointers = [(x, y) for x, y in zip(tensors, contents) if hasattr(x, "copy_")]

    def outcome(changed):
        log = Log("lockstep")
        for x, y in pointers:
            x.copy_(y)
        run(changed, grid, threads, shared, tensors, log, blocks=[0])
        return {f.kind for f in log.faults}, [x.clone() for x, _ in pointers]

    whole, expected = outcome(program)
    assert not whole, whole
    found = []
    for instruction in program.code:
        if ORDERING.match(instruction.opcode):
            mutant = program.without(instruction.index)
            kinds, values = outcome(mutant)
            same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(values, expected))
            shows = bool(kinds) or not same
            program = program if shows else mutant
            found.append(dict(left_out=str(instruction), faults=sorted(kinds), shows=shows))
    return found


if __name__ == "__main__":
    compile_for_cpu_tensors()
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
    json.dump({name: mutants(*KERNELS[name]) for name in sys.argv[1:] or KERNELS}, sys.stdout, indent=1)
