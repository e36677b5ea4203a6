"""Instructions that make registers of registers: types of operands, and NumPy functions over [threads]."""

from __future__ import annotations

import re

import numpy as np

from .memory import LANES, SHARED_WINDOW
from .program import TYPES, Unknown, bits
from .rules import Values, flat, values

INTEGER, ANY = "[us](?:16|32|64)", "[busf](?:16|32|64)|pred"
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


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
