"""What instructions compute: patterns of opcodes, each with types and a NumPy function over [threads].

A rule is found by its opcode without the modifiers that change no more than a rounding. `values` rules are functions of
registers alone; `effect` rules do something to memory, to other lanes or to the course of the threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .memory import LANES
from .program import TYPES, Instruction, Unknown, size_of

PLAIN = {"rn", "approx", "full", "ftz", "volatile", "relaxed", "acq_rel", "gpu", "cta"}  # and scopes
INTEGER, ANY = "[us](?:16|32|64)", "[busf](?:16|32|64)|pred"
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class Values(NamedTuple):
    """Types of the results and of the operands, and the function between them."""

    results: tuple[str, ...]
    operands: tuple[str, ...]
    function: Callable


_rules: list[tuple[re.Pattern, bool, Callable]] = []


def values(pattern: str):
    """A rule for opcodes: from (instruction, *groups of the pattern) to `Values`."""
    return lambda rule: _rules.append((re.compile(pattern), False, rule)) or rule


def effect(pattern: str):
    """A rule for opcodes: from (threads, instruction, *groups of the pattern) to a function of a mask."""
    return lambda rule: _rules.append((re.compile(pattern), True, rule)) or rule


@lru_cache(None)
def rule_of(opcode: str) -> tuple[bool, Callable, tuple]:
    """Whether the rule is an effect, the rule and the groups of its pattern."""
    plain = ".".join(part for part in opcode.split(".") if part not in PLAIN)
    for pattern, is_effect, rule in _rules:
        if match := pattern.fullmatch(plain):
            return is_effect, rule, match.groups()
    raise Unknown(f"instruction {opcode}")


def flat(operands: list) -> list[str]:
    """Operands with vectors and pairs taken apart."""
    return [x for operand in operands for x in (operand if isinstance(operand, tuple) else operand.split("|"))]


def bits(x: np.ndarray, kind: str = "u32") -> np.ndarray:
    """The same bits as another type."""
    return np.ascontiguousarray(x).view(TYPES[kind])


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    return bits(x.astype(np.uint32) << np.uint32(16), "f32")


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    word = bits(x.astype(np.float32))
    nearest = word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), nearest.astype(np.uint16))


# arithmetic

BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "max.NaN": np.maximum, "min.NaN": np.minimum, "max": np.fmax,
    "min": np.fmin, "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
}  # fmt: skip
UNARY = {
    "not": np.invert, "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a), "tanh": np.tanh,
    "brev": lambda a: bits(np.packbits(np.unpackbits(bits(a, "u8").reshape(-1, 4), axis=1)[:, ::-1], axis=1))[:, 0],
}  # fmt: skip


@values(rf"({'|'.join(map(re.escape, BINARY))})\.({ANY})")
def _(instruction, name, kind):
    return Values((kind,), (kind, kind), BINARY[name])


@values(rf"({'|'.join(UNARY)})\.({ANY})")
def _(instruction, name, kind):
    return Values((kind,), (kind,), UNARY[name])


@values(rf"(fma|mad\.lo)\.({ANY})")
def _(instruction, name, kind):
    """The product of float32 numbers is exact in float64."""
    wide = np.float64 if kind == "f32" else TYPES[kind]
    return Values((kind,), (kind,) * 3, lambda a, b, c: a.astype(wide) * b + c)


@values(rf"(mul|mad)\.wide\.({INTEGER})")
def _(instruction, name, kind):
    wide = TYPES[WIDER[kind]]
    if name == "mul":
        return Values((WIDER[kind],), (kind, kind), lambda a, b: a.astype(wide) * b.astype(wide))
    return Values((WIDER[kind],), (kind, kind, WIDER[kind]), lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


@values(r"mul\.hi\.([us]32)")
def _(instruction, kind):
    wide = TYPES[WIDER[kind]]
    return Values((kind,), (kind, kind), lambda a, b: a.astype(wide) * b.astype(wide) >> wide.type(32))


@values(rf"div\.({INTEGER}|f32|f64)")
def _(instruction, kind):
    def quotient(a, b):  # towards 0
        b = np.where(b == 0, b.dtype.type(1), b)
        return a // b + ((a % b != 0) & ((a < 0) != (b < 0)))

    return Values((kind,), (kind, kind), np.divide if kind[0] == "f" else quotient)


# bits


@values(r"sh(l|r)\.([bus])(16|32|64)")
def _(instruction, way, sign, size):
    kind, most = ("s" if sign == "s" else "u") + size, int(size) - 1

    def shift(a, n):
        part = np.minimum(n, most).astype(a.dtype)
        shifted = a << part if way == "l" else a >> part
        return shifted if sign == "s" else np.where(n > most, 0, shifted)

    return Values((kind,), (kind, "u32"), shift)


@values(r"shf\.(l|r)\.(wrap|clamp)\.b32")
def _(instruction, way, beyond):
    def shift(low, high, n):
        n = (n & 31 if beyond == "wrap" else np.minimum(n, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return (both << n) >> np.uint64(32) if way == "l" else both >> n

    return Values(("u32",), ("u32",) * 3, shift)


@values(r"prmt\.b32")
def _(instruction):
    def permute(a, b, selectors):
        both, result = b.astype(np.uint64) << np.uint64(32) | a, np.uint64(0)
        for i in range(4):
            selector = selectors.astype(np.uint64) >> np.uint64(4 * i)
            byte = both >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
            result = result | np.where(selector & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return result

    return Values(("u32",), ("u32",) * 3, permute)


@values(r"bfe\.([us])(32|64)")
def _(instruction, sign, size):
    def extract(a, first, count):
        """Shift up, so that the field's last bit is the highest, and down again."""
        first, count = (first & 255).astype(np.int64), (count & 255).astype(np.int64)
        up = np.maximum(int(size) - first - count, 0)
        down = np.minimum(first + up, int(size) - 1)
        return np.where(count == 0, 0, a << up.astype(a.dtype) >> down.astype(a.dtype))

    return Values((sign + size,), (sign + size, "u32", "u32"), extract)


@values(r"bfi\.b32")
def _(instruction):
    def insert(a, b, first, count):
        first, count = (np.minimum(x & 255, 32).astype(np.uint64) for x in (first, count))
        field = (np.uint64(1) << count) - np.uint64(1) << first
        return b & ~field | a.astype(np.uint64) << first & field

    return Values(("u32",), ("u32",) * 4, insert)


@values(r"lop3\.b32")
def _(instruction):
    table = int(instruction.operands[4], 0)

    def combine(a, b, c, _):
        minterms = (
            (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1
        )
        return np.bitwise_or.reduce(list(minterms)) if table else a ^ a

    return Values(("u32",), ("u32",) * 4, combine)


def _highest(a: np.ndarray) -> np.ndarray:
    """The place of the highest bit that is set; -1 where none is."""
    return np.frexp(a.astype(np.float64))[1] - 1


@values(r"(popc|clz|bfind|bfind\.shiftamt)\.[bu]32")
def _(instruction, name):
    places = {
        "popc": lambda a: np.unpackbits(bits(a, "u8").reshape(-1, 4), axis=1).sum(1),
        "clz": lambda a: 31 - _highest(a),
        "bfind": _highest,
        "bfind.shiftamt": lambda a: np.where(a == 0, -1, 31 - _highest(a)),
    }
    return Values(("u32",), ("u32",), places[name])


# choice and conversion

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@values(r"setp\.(\w+?)(?:\.(and|or|xor))?\.([busf])(16|32|64)")
def _(instruction, compare, combine, sign, size):
    kind = sign.replace("b", "u") + size
    unordered = sign == "f" and compare not in COMPARE and compare[-1] == "u"

    def holds(a, b):
        nan = np.isnan(a) | np.isnan(b) if sign == "f" else False
        if compare in ("num", "nan"):
            return nan if compare == "nan" else ~nan
        return COMPARE[compare.removesuffix("u")](a, b) & np.invert(nan) | (nan if unordered else False)

    def decide(a, b, *other):
        first = holds(a, b)
        pair = [first, ~first]
        return tuple(COMBINE[combine](x, other[0]) if combine else x for x in pair)[:results]

    results = len(flat(instruction.operands[:1]))
    function = decide if results > 1 else lambda *a: decide(*a)[0]
    return Values(("pred",) * results, (kind, kind, *["pred"] * bool(combine)), function)


@values(r"setp\.(num|nan)\.(b?f16)(x2)?")
def _(instruction, compare, kind, pair):
    """Numbers of 16 bits, or two in one word, the lower one first."""
    infinity = np.uint16(0x7F80 if kind == "bf16" else 0x7C00)

    def decide(a, b):
        halves = [bits(x, "u16").reshape(-1, 2 if pair else 1) & np.uint16(0x7FFF) for x in (a, b)]
        nan = (halves[0] > infinity) | (halves[1] > infinity)
        return tuple((nan if compare == "nan" else ~nan).T)

    results = len(flat(instruction.operands[:1]))
    return Values(("pred",) * results, ("u32" if pair else "u16",) * 2, lambda a, b: decide(a, b)[:results])


@values(r"selp\.([busf](?:16|32|64))")
def _(instruction, kind):
    return Values((kind,), (kind, kind, "pred"), lambda a, b, chosen: np.where(chosen, a, b))


@values(rf"mov\.({ANY})")
def _(instruction, kind):
    """Vectors are parts of a word."""
    whole, parts = (len(flat([operand])) for operand in instruction.operands)
    if whole == parts == 1:
        return Values((kind,), (kind,), lambda a: a)
    part = f"b{int(kind[1:]) // max(whole, parts)}"
    if parts > 1:  # into one word
        return Values((kind,), (part,) * parts, lambda *x: bits(np.stack(np.broadcast_arrays(*x), -1), kind)[..., 0])
    return Values((part,) * whole, (kind,), lambda a: tuple(np.moveaxis(bits(a, part).reshape(-1, whole), 1, 0)))


@values(r"cvta(\.to)?\.(global|shared)\.u64")
def _(instruction, back, space):
    window = np.uint64(SHARED_WINDOW if space == "shared" else 0)
    return Values(("u64",), ("u64",), (lambda a: a - window) if back else (lambda a: a + window))


SHARED_WINDOW = 1 << 44  # of shared memory, in generic addresses
TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@values(r"cvt(?:\.(rzi|rni|rmi|rpi))?\.(\w+)\.(\w+)")
def _(instruction, rounding, to, source):
    if to in ("bf16x2", "f16x2"):
        narrow = f32_to_bf16 if to == "bf16x2" else lambda x: bits(x.astype(np.float16), "u16")
        return Values(("u32",), ("f32", "f32"), lambda a, b: narrow(a).astype(np.uint32) << np.uint32(16) | narrow(b))
    if to == "bf16":
        return Values(("u16",), ("f32",), f32_to_bf16)
    if source == "bf16":
        return Values(("f32",), ("u16",), bf16_to_f32)
    if not {to, source} <= set(TYPES):
        raise Unknown(str(instruction))
    if source[0] == "f" and to[0] != "f":
        limits = np.iinfo(TYPES[to])
        return Values(
            (to,), (source,), lambda a: np.clip(TO_INTEGER[rounding](np.nan_to_num(a)), limits.min, limits.max)
        )
    return Values((to,), (source,), TO_INTEGER[rounding] if rounding else lambda a: a)


# other lanes


@values(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _(instruction, mode):
    def shuffle(a, distance, control, members):
        lane, distance, control = np.arange(LANES), distance.astype(np.int64) & 31, control.astype(np.int64)
        segment, clamp = control >> 8 & 31, control & 31
        last, first = lane & segment | clamp & ~segment, lane & segment
        source = {
            "up": lane - distance,
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": first | distance & ~segment,
        }
        inside = source[mode] >= last if mode == "up" else source[mode] <= last
        found = np.take_along_axis(a, np.where(inside, source[mode], lane), 1)
        return (found, inside)[:results] if results > 1 else found

    results = len(flat(instruction.operands[:1]))
    return _by_warps(Values(("u32", "pred")[:results], ("u32",) * 4, shuffle))


def _by_warps(rule: Values) -> Values:
    """A function over [warps, lanes] as one over [threads]."""

    def function(*operands):
        threads = max(x.size for x in operands)
        grids = [(x if x.size == threads else np.broadcast_to(x, threads)).reshape(-1, LANES) for x in operands]
        results = rule.function(*grids)
        return tuple(x.ravel() for x in results) if isinstance(results, tuple) else results.ravel()

    return Values(rule.results, rule.operands, function)


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


@effect(r"bra(?:\.uni)?")
def branch(threads, instruction):
    target = threads.machine.program.labels[instruction.operands[0]]

    def run(mask):
        threads.pc[threads.lanes(mask)] = target

    return run


@effect(r"(?:ret|exit)")
def leave(threads, instruction):
    def run(mask):
        threads.alive[threads.lanes(mask)] = False

    return run


@effect(r"bar\.warp\.sync")
def _(threads, instruction):
    def run(mask):
        threads.machine.block.sync(threads.whole_warps(instruction, mask))

    return run


@effect(r"(?:bar|barrier)\.sync(?:\.aligned)?")
def barrier(threads, instruction):
    number, *count = [threads.operand(operand, "s32") for operand in instruction.operands]

    def run(mask):
        threads.whole_warps(instruction, mask)
        lanes = threads.lanes(mask)
        threads.barrier[lanes] = np.broadcast_to(number, threads.count)[lanes]
        expected = count[0] if count else np.array([threads.machine.threads])
        threads.expected[lanes] = np.broadcast_to(expected, threads.count)[lanes]

    return run


COURSE = {branch, leave, barrier}


def bind(threads, instruction: Instruction) -> tuple[Callable, bool]:
    """The instruction as a function of a mask of these threads; whether their course depends on it."""
    try:
        is_effect, rule, groups = rule_of(instruction.opcode)
        if is_effect:
            run = rule(threads, instruction, *groups)
        else:
            run = _bind_values(threads, instruction, rule(instruction, *groups))
    except (Unknown, KeyError, ValueError, AttributeError) as error:
        raise Unknown(f"{instruction}: {error}") from error
    return _guarded(threads, instruction, run), rule in COURSE


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
