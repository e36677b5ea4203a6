"""Instructions on matrices: which lane has which elements, and the products of warps and of groups of four warps."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .memory import LANES
from .program import Program, Unknown, bits
from .registers import bf16_to_f32
from .rules import Values, effect, flat, values

GROUP, THREAD = np.arange(LANES) // 4, np.arange(LANES) % 4  # of a lane in its warp
WARPGROUP = 4 * LANES


@lru_cache(None)
def layout(operand: str, registers: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column [registers, lanes, elements of a register] of what the lanes of a warp have.

    An operand "a" is [16, k], "b" is [n, k], of elements of ``size`` bytes; an accumulator "c" is [16, n].
    """
    i, element = np.arange(registers)[:, None, None], np.arange(1 if operand == "c" else 4 // size)
    group, thread = GROUP[:, None], THREAD[:, None]
    if operand == "a":
        return np.broadcast_arrays(group + i % 2 * 8, (thread + i // 2 * 4) * (4 // size) + element)
    if operand == "b":
        return np.broadcast_arrays(group, (thread + i * 4) * (4 // size) + element)
    return np.broadcast_arrays(group + i // 2 % 2 * 8, thread * 2 + i % 2 + i // 4 * 8 + element)


def numbers(words: np.ndarray, kind: str) -> np.ndarray:  # [..] of 4 bytes -> [.., elements]
    """Elements as float32; TF32 is float32 without its last 13 bits."""
    if kind == "tf32":
        return bits(words[..., None] & np.uint32(0xFFFFE000), "f32")
    halves = bits(words, "u16").reshape(*words.shape, 2)
    return bf16_to_f32(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def gather(registers: list, operand: str, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """The tiles [warps, *shape] whose fragments lie in registers."""
    rows, columns = layout(operand, len(registers), 4 if kind in ("tf32", "f32") else 2)
    words = np.stack(registers).reshape(len(registers), -1, LANES).swapaxes(0, 1)
    tiles = np.empty((len(words), *shape), np.float32)
    tiles[:, rows, columns] = words[..., None] if kind == "f32" else numbers(words, kind)
    return tiles


def scatter(tiles: np.ndarray, registers: int) -> np.ndarray:  # [warps, 16, n] -> [registers, threads]
    """An accumulator's fragments."""
    rows, columns = layout("c", registers, 4)
    return tiles[:, rows[..., 0], columns[..., 0]].swapaxes(0, 1).reshape(registers, -1).astype(np.float32)


@values(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32")
def _(instruction, k, kind):
    d, a, b, c = (len(operand) for operand in instruction.operands)

    def multiply(*registers):
        words = [np.broadcast_to(x, max(y.size for y in registers)) for x in registers]
        left = gather(words[:a], "a", kind, (16, int(k)))
        right = gather(words[a : a + b], "b", kind, (8, int(k)))
        sums = gather(words[a + b :], "c", "f32", (16, 8))
        return tuple(scatter(left.astype(np.float64) @ right.swapaxes(1, 2) + sums, d))

    return Values(("f32",) * d, ("u32",) * (a + b) + ("f32",) * c, multiply)


def _tile_lanes(threads, instruction, mask, tiles: int) -> np.ndarray:
    """The lanes of whole warps whose addresses say where the rows of so many tiles are."""
    warps = threads.whole_warps(instruction, mask) - threads.ids[0] // LANES
    return (warps[:, None] * LANES + np.arange(8 * tiles)).ravel()


@effect(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _(threads, instruction, way, tiles, transposed):
    """Lane i has elements 2 (i % 4) and the next of row i // 4 of every tile, or of its column."""
    names = instruction.operands[0 if way == "ld" else 1]
    registers = [threads.register(name, "u32") for name in flat([names])]
    address = threads.address(instruction.operands[1 if way == "ld" else 0])
    pair = 2 * THREAD[:, None] + np.arange(2)
    place = (..., pair, GROUP[:, None]) if transposed else (..., GROUP[:, None], pair)
    tiles = int(tiles)

    def load(mask):
        lanes = _tile_lanes(threads, instruction, mask, tiles)
        rows = np.full((len(lanes), 16), 0xFF, np.uint8)
        found, allowed = memory().read(instruction, threads.ids[lanes], address(lanes), 16)
        rows[allowed] = found
        words = bits(rows.view(np.uint16).reshape(-1, tiles, 8, 8)[place])[..., 0]  # [warps, tiles, lanes]
        for register, word in zip(registers, words.swapaxes(0, 1)):
            register.reshape(-1, LANES)[lanes[:: 8 * tiles] // LANES] = word

    def store(mask):
        lanes = _tile_lanes(threads, instruction, mask, tiles)
        words = np.stack(registers).reshape(tiles, -1, LANES)[:, lanes[:: 8 * tiles] // LANES]
        rows = np.empty((words.shape[1], tiles, 8, 8), np.uint16)
        rows[place] = bits(words, "u16").reshape(*words.shape, 2).swapaxes(0, 1)
        memory().write(instruction, threads.ids[lanes], address(lanes), rows.reshape(-1, 8).view(np.uint8))

    def memory():
        return threads.machine.spaces["shared"]

    return load if way == "ld" else store


# Hopper: products of four warps, which go on while the warps do


class Products:
    """Products in flight of a group of four warps, and the registers that belong to them."""

    def __init__(self) -> None:
        self.issued, self.committed = [], []  # products, and groups of them
        self.fenced, self.touched = False, set()  # whether there was a wgmma.fence, and registers used since the last

    def flying(self) -> list[Product]:
        return [product for group in (*self.committed, self.issued) for product in group]


class Product(NamedTuple):
    """A product in flight."""

    names: tuple[str, ...]  # of the accumulators
    registers: list[np.ndarray]  # the accumulators
    results: np.ndarray  # their values when it lands, [accumulators, threads]
    fragments: tuple[str, ...]  # the left operand, where it is in registers
    granules: np.ndarray  # what it reads of shared memory


def copied_register(instruction, program: Program) -> str | None:
    """The source of a copy from one register to another; None for other instructions."""
    if not instruction.opcode.startswith("mov."):
        return None
    to, source = instruction.operands
    return source if isinstance(to, str) and source in program.registers else None


def product_registers(program: Program) -> set[str]:
    """What asynchronous products take from registers and put there, and what is copied to these."""
    products = (x.operands for x in program.code if x.opcode.startswith("wgmma.mma"))
    found = {name for operands in products for vector in operands[:2] if isinstance(vector, tuple) for name in vector}
    copies = [(x.operands[0], source) for x in program.code if (source := copied_register(x, program))]
    while more := {source for to, source in copies if to in found} - found:
        found |= more
    return found


def guard_registers(threads, instruction, run):
    """Check that registers of a product in flight are not touched, and that what a product takes is fenced.

    A copy is as fenced as what it copies: the assembler gives both ends of it one register. Where it cannot, because
    the source lives on, no fault is reported.
    """
    taken = threads.machine.product_registers & set(instruction.registers())
    if not taken or instruction.opcode.startswith("wgmma"):
        return run
    written = set(flat(instruction.operands[:1])) if not instruction.opcode.startswith("st") else set()
    copied = copied_register(instruction, threads.machine.program)

    def checked(mask):
        products = threads.products
        if copied is None:
            products.touched |= taken
        elif copied in products.touched:
            products.touched |= written
        for product in products.flying():
            if taken & set(product.names) or written & set(product.fragments):
                block = threads.machine.block
                block.fault("register of a product in flight touched", instruction, [True], threads.ids[0])
        run(mask)

    return checked


@effect(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned")
def _(threads, instruction, what):
    products = threads.products

    def run(mask):
        warps = threads.whole_warps(instruction, mask)
        if what == "fence":
            products.fenced = True
            products.touched.clear()
        elif what == "commit_group":
            products.committed.append(products.issued)
            products.issued = []
        else:
            done = products.committed[: max(0, len(products.committed) - int(instruction.operands[0]))]
            del products.committed[: len(done)]
            for product in (product for group in done for product in group):
                _land(threads, product, warps)
            for product in products.flying():  # which may read the same granules
                threads.machine.spaces["shared"].hold(product.granules, warps, landed=False)

    return run


def _land(threads, product: Product, warps) -> None:
    """Write a product's results, unless another in flight goes on with the same accumulator."""
    threads.machine.spaces["shared"].hold(product.granules, warps, landed=True)
    if not any(other.names == product.names for other in threads.products.flying()):
        for register, value in zip(product.registers, product.results):
            register[:] = value


@effect(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(bf16|f16|tf32)\.\3")
def _(threads, instruction, n, k, kind):
    names, left, right, scale, *options = instruction.operands
    n, size, products = int(n), 32 // int(k), threads.products
    registers = [threads.register(name, "f32") for name in names]
    in_registers = isinstance(left, tuple)
    fragments = [threads.operand(name, "u32") for name in left] if in_registers else []
    descriptors = [threads.operand(right, "u64")] + ([] if in_registers else [threads.operand(left, "u64")])
    accumulates = threads.operand(scale, "pred")
    signs, transposes = options[:2], options[2:]
    if signs != ["1", "1"]:
        raise Unknown("negated operands")

    def run(mask):
        warps = threads.whole_warps(instruction, mask)
        if len(warps) * LANES != threads.count or threads.count % WARPGROUP:
            raise Unknown(f"{instruction}: not all groups of four warps")
        block, memory = threads.machine.block, threads.machine.spaces["shared"]
        block.step += 1
        before = [product for product in products.flying() if product.names == names]
        unfenced = not products.fenced or products.touched & {*names, *(left if in_registers else ())}
        block.fault("operand registers without wgmma.fence", instruction, [bool(unfenced)], threads.ids[0])
        sums = np.stack(before[-1].results if before else registers)
        sums = np.where(np.broadcast_to(accumulates, threads.count), sums, np.float32(0))
        results, granules = [], []
        for first in range(0, threads.count, WARPGROUP):
            part = slice(first, first + WARPGROUP)
            mine = warps[first // LANES : first // LANES + 4]
            reader = OperandReader(instruction, block, memory, mine, threads.count)
            b = reader.matrix(descriptors[0], part, n, kind, size, transposes[-1:] == ["1"])
            if in_registers:
                a = gather([x[part] for x in fragments], "a", kind, (16, int(k))).reshape(64, -1)
            else:
                a = reader.matrix(descriptors[1], part, 64, kind, size, transposes[:1] == ["1"])
            product = (a.astype(np.float64) @ b.T).reshape(4, 16, n)
            results.append(scatter(product, len(names)) + sums[:, part])
            memory.hold(reader.granules, mine, landed=False)
            granules.append(reader.granules)
        for register in registers:
            register.view(np.uint32)[:] = 0xFFFFFFFF
        results, granules = np.concatenate(results, 1).astype(np.float32), np.concatenate(granules)
        products.issued.append(Product(names, registers, results, left if in_registers else (), granules))

    return run


class OperandReader:
    """Reads operands from shared memory for one product of four warps."""

    def __init__(self, instruction, block, memory, warps, threads: int) -> None:
        self.instruction, self.block, self.memory, self.warps, self.threads = instruction, block, memory, warps, threads
        self.granules = np.zeros(0, np.int64)

    def matrix(self, descriptors, part, rows: int, kind: str, size: int, transposed: bool) -> np.ndarray:
        """The operand [rows, k] that a descriptor points at, in chunks of 16 bytes."""
        every = np.broadcast_to(descriptors, self.threads)[part]
        self.block.fault("descriptor differs between threads", self.instruction, every != every[0])
        addresses = chunk_addresses(int(every[0]), rows, transposed)
        memory, thread = self.memory, self.warps[0] * LANES
        granules, _ = memory.granules(self.instruction, np.full(addresses.size, thread), addresses.ravel(), 16)
        flat_granules = granules.ravel()
        for warp in self.warps:
            reader = np.full(flat_granules.size, self.block.first + warp * LANES)
            memory.check_read(self.instruction, flat_granules, reader)
        self._check_fences(flat_granules)
        self.granules = np.unique(np.concatenate([self.granules, flat_granules]))
        words = bits(memory.values(granules).reshape(*addresses.shape, 16))  # [.., 4]
        chunks = numbers(words, kind).reshape(*addresses.shape, 16 // size)
        return chunks.swapaxes(1, 2).reshape(rows, -1) if transposed else chunks.reshape(rows, -1)

    def _check_fences(self, granules) -> None:
        """What threads wrote is fenced, by them or by those who read it."""
        block, memory = self.block, self.memory
        mine = slice(self.warps[0] * LANES, (self.warps[-1] + 1) * LANES)
        writer, step = memory.writer[granules] - block.first, memory.write_step[granules]
        fenced = np.maximum(block.fenced[np.maximum(writer, 0)], block.fenced[mine].min())
        bare = (writer >= 0) & (fenced < step)
        kind = "shared operand of a product without fence.proxy.async"
        block.fault(kind, self.instruction, bare, self.warps[0] * LANES, memory.addresses(granules))


SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}  # bytes of a line, and which bits are mixed


def chunk_addresses(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Addresses of the chunks of 16 bytes of a product's operand: [rows, chunks of a row], or [chunks of 8 rows, k]."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    line, mixed = SWIZZLES[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise Unknown("a descriptor with a base offset")
    if not transposed:
        row, chunk = np.arange(rows)[:, None], np.arange(2)
        addresses = start + row % 8 * line + row // 8 * stride + chunk * (leading if line == 16 else 16)
    else:
        chunk, k = np.arange(rows // 8)[:, None], np.arange(16)
        if line == 16:
            addresses = start + chunk * stride + k % 8 * 16 + k // 8 * leading
        else:
            addresses = start + chunk * 16 % line + chunk * 16 // line * leading + k % 8 * line + k // 8 * stride
    return addresses ^ (addresses >> 7 & mixed) << 4
