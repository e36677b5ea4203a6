"""Rules that say what an instruction does: patterns of opcodes, and how they are bound to the registers of threads.

A rule is found by its opcode without the modifiers that change no more than a rounding. Those of values are functions
of registers alone (`registers.py`); those of effects do something to memory, to other lanes or to the course of the
threads (`effects.py`). Products of matrices are of both kinds (`matrix.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .program import Instruction, Unknown

PLAIN = {"rn", "approx", "full", "ftz", "volatile", "relaxed", "acq_rel", "gpu", "cta"}  # and scopes


class Values(NamedTuple):
    """Types of the results and of the operands, and the function between them."""

    results: tuple[str, ...]
    operands: tuple[str, ...]
    function: Callable


class Rule(NamedTuple):
    """What opcodes of a pattern do."""

    pattern: re.Pattern
    make: Callable
    of_values: bool  # a function of registers alone
    ends: bool  # whether the threads' course depends on it


_rules: list[Rule] = []


def values(pattern: str):
    """A rule for opcodes: from (instruction, *groups of the pattern) to `Values`."""
    return lambda make: _rules.append(Rule(re.compile(pattern), make, True, False)) or make


def effect(pattern: str, ends: bool = False):
    """A rule for opcodes: from (threads, instruction, *groups of the pattern) to a function of a mask."""
    return lambda make: _rules.append(Rule(re.compile(pattern), make, False, ends)) or make


@lru_cache(None)
def rule_of(opcode: str) -> tuple[Rule, tuple[str, ...]]:
    """The rule and the groups of its pattern."""
    plain = ".".join(part for part in opcode.split(".") if part not in PLAIN)
    for rule in _rules:
        if match := rule.pattern.fullmatch(plain):
            return rule, match.groups()
    raise Unknown(f"instruction {opcode}")


def flat(operands: list) -> list[str]:
    """Operands with vectors and pairs taken apart."""
    return [x for operand in operands for x in (operand if isinstance(operand, tuple) else operand.split("|"))]


def bind(threads, instruction: Instruction) -> tuple[Callable, bool]:
    """The instruction as a function of a mask of these threads; whether their course depends on it."""
    try:
        rule, groups = rule_of(instruction.opcode)
        if rule.of_values:
            run = _bind_values(threads, instruction, rule.make(instruction, *groups))
        else:
            run = rule.make(threads, instruction, *groups)
    except (Unknown, KeyError, ValueError, AttributeError) as error:
        raise Unknown(f"{instruction}: {error}") from error
    return _guarded(threads, instruction, run), rule.ends


def _bind_values(threads, instruction: Instruction, rule: Values) -> Callable:
    names = flat(instruction.operands)
    results = [threads.register(name, kind) for name, kind in zip(names, rule.results)]
    operands = [threads.operand(name, kind) for name, kind in zip(names[len(results) :], rule.operands)]
    function, checked = rule.function, ".sync." in instruction.opcode
    if len(operands) != len(rule.operands):
        raise Unknown("another number of operands")

    def run(mask):
        if checked:
            threads.whole_warps(instruction, mask)
        found = function(*operands)
        for result, value in zip(results, found if isinstance(found, tuple) else (found,)):
            np.copyto(result, value, where=mask, casting="unsafe")

    return run


def _guarded(threads, instruction: Instruction, run: Callable) -> Callable:
    if instruction.guard is None:
        return run
    guard, negated = threads.register(instruction.guard, "pred"), instruction.negated

    def run_where(mask):
        chosen = mask & (~guard if negated else guard)
        run(True if chosen.all() else chosen)

    return run_where
