"""Bytes of a memory space, and for every granule of them who wrote and read it last.

Order is known by vector clocks of warps. A warp's time advances at its barriers; ``seen[w, v]`` is the last time of
warp v whose accesses are done before what warp w does now. Two accesses of a granule race if one writes and the later
one's warp has not seen the earlier one's time, unless both are of one thread. What an asynchronous copy or product has
in flight carries the time NEVER, which nobody sees.
"""

from __future__ import annotations

import numpy as np

from .faults import Faults
from .program import Instruction

LANES = 32
NEVER = 2**31 - 1
HOST, MANY, COPY, PRODUCT, OTHERS = -1, -2, -3, -4, -5  # in the place of a thread; OTHERS are those of other blocks
POISON = 0xFFDE  # a NaN of every type of 16 bits, and twice of float32
PAGE = 4096  # bytes
SHARED_WINDOW = 1 << 44  # of shared memory, in generic addresses


class Block:
    """The running block: its number, the clocks of its warps, and where its faults go.

    Threads are numbered through all blocks of a launch, so that an older number is another block's.
    """

    def __init__(self, kernel: str, warps: int, faults: Faults) -> None:
        self.kernel, self.warps, self.faults = kernel, warps, faults
        self.index, self.step, self.time = -1, 0, np.zeros(warps, np.int32)

    def start(self, index: int) -> None:
        self.index, self.first = index, index * self.warps * LANES
        self.seen = np.full((self.warps, self.warps), self.time.max(), np.int32)
        self.time = np.full(self.warps, self.time.max() + 1, np.int32)
        self.fenced = np.zeros(self.warps * LANES, np.int64)  # step of a thread's last fence of the async proxy

    def join(self, warps: np.ndarray) -> None:
        """A barrier: all that these warps did is done before whatever any of them does next."""
        self.seen[warps] = self.seen[warps].max(0)
        self.seen[np.ix_(warps, warps)] = self.time[warps]
        self.time[warps] += 1

    def sync(self, warps: np.ndarray) -> None:
        """Barriers of single warps."""
        self.seen[warps, warps] = self.time[warps]
        self.time[warps] += 1

    def fault(self, kind: str, instruction: Instruction, mask, threads=0, addresses=0) -> None:
        self.faults.add(kind, self.kernel, instruction, self.index, threads, addresses, np.asarray(mask))


class Memory:
    """A space in which some ranges are allocated. ``granule`` bytes are the least that an instruction accesses."""

    def __init__(self, name: str, block: Block, granule: int, size: int, base: int = 0) -> None:
        self.name, self.block, self.granule = name, block, granule
        self.starts, self.ends = np.array([base]), np.array([base + size])
        self.data = np.zeros(0, np.uint8)
        self._grow(size)

    def _grow(self, size: int) -> None:
        """Add bytes that were never written."""
        n, warps = size // self.granule, self.block.warps
        more = {
            "data": np.full(size // 2, POISON, np.uint16).view(np.uint8),
            "written": np.zeros(n, bool),
            "writer": np.full(n, HOST, np.int32),
            "write_time": np.zeros(n, np.int32),
            "write_step": np.zeros(n, np.int64),  # for fences
            "atomic": np.zeros(n, bool),  # whether the last write was one
            "reader": np.full(n * warps, HOST, np.int32),  # the last of every warp, or MANY since its last barrier
            "read_time": np.zeros(n * warps, np.int32),
            "reading_block": np.full(n, HOST, np.int32),  # or MANY
        }
        for name, values in more.items():
            setattr(self, name, np.concatenate([getattr(self, name), values]) if hasattr(self, name) else values)

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        """Places of allocated bytes in ``data``."""
        return addresses - self.starts[0]

    def granules(self, instruction, threads, addresses, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The granules [m, width / granule] of accesses [n] of ``width`` bytes, and which m of these are allowed."""
        allocation = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (allocation < 0) | (addresses + width > self.ends[allocation])
        odd = addresses % width != 0
        if (bad := outside | odd).any():
            self.block.fault(f"{self.name} access out of bounds", instruction, outside, threads, addresses)
            self.block.fault(f"misaligned {self.name} access", instruction, odd, threads, addresses)
        allowed = np.flatnonzero(~bad)
        first = self.offsets(addresses[allowed]) // self.granule
        return first[:, None] + np.arange(max(1, width // self.granule)), allowed

    def values(self, granules: np.ndarray) -> np.ndarray:  # [..] -> [.., granule] bytes
        return self.data.reshape(-1, self.granule)[granules]

    def read(self, instruction, threads, addresses, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [m, width] that m allowed accesses read, and which these are."""
        granules, allowed = self.granules(instruction, threads, addresses, width)
        flat = granules.ravel()
        threads = np.repeat(threads[allowed] + self.block.first, granules.shape[1])
        self.check_read(instruction, flat, threads)
        self._note_read(flat, threads)
        return self.values(flat).reshape(-1, width), allowed

    def check_read(self, instruction, granules, threads) -> None:
        """Report granules that were never written, or not surely before. ``threads`` count through all blocks."""
        block = self.block
        unwritten = ~self.written[granules]
        if unwritten.any():
            kind = f"{self.name} read of what was never written"
            block.fault(kind, instruction, unwritten, threads - block.first, self.addresses(granules))
        race = self._unseen_write(granules, threads)
        if race.any():
            self._fault_of_race(instruction, "read", "write", self.writer[granules], race, threads, granules)

    def write(self, instruction, threads, addresses, values: np.ndarray, atomic=False) -> None:
        """Write bytes [n, width]. A race does no harm where the same value is there already."""
        granules, allowed = self.granules(instruction, threads, addresses, values.shape[1])
        flat, block = granules.ravel(), self.block
        threads = np.repeat(threads[allowed] + block.first, granules.shape[1])
        values = values[allowed].reshape(-1, self.granule)
        race = self._unseen_write(flat, threads)
        if atomic:
            race &= ~self.atomic[flat]
        if race.any():
            race &= (self.values(flat) != values).any(1) | (self.writer[flat] == COPY)
            self._fault_of_race(instruction, "write", "write", self.writer[flat], race, threads, flat)
        self._check_readers(instruction, flat, threads, atomic)
        self.data.reshape(-1, self.granule)[flat] = values
        lost = (self.values(flat) != values).any(1)
        if lost.any() and not atomic:
            kind = f"race: lanes write different values to one place in {self.name} memory"
            block.fault(kind, instruction, lost, threads - block.first, self.addresses(flat))
        self._note_write(flat, threads)
        self.atomic[flat] = atomic
        if atomic:
            self._note_read(flat, threads)

    def start_copy(self, instruction, threads, addresses, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Begin an asynchronous copy to here. Returns its granules [m, ..], which nobody may touch until it lands."""
        granules, allowed = self.granules(instruction, threads, addresses, width)
        flat = granules.ravel()
        owners = np.repeat(threads[allowed] + self.block.first, granules.shape[1])
        race = self._unseen_write(flat, owners)
        if race.any():
            self._fault_of_race(instruction, "copy", "write", self.writer[flat], race, owners, flat)
        self._check_readers(instruction, flat, owners)
        self.writer[flat], self.write_time[flat] = COPY, NEVER
        return granules, allowed

    def land_copy(self, granules: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        """Write what was copied to granules [m, k], as if their threads did it now."""
        flat = granules.ravel()
        self.data.reshape(-1, self.granule)[flat] = values.reshape(-1, self.granule)
        self._note_write(flat, np.repeat(threads + self.block.first, granules.shape[1]))
        self.atomic[flat] = False

    def hold(self, granules: np.ndarray, warps: np.ndarray, landed: bool) -> None:
        """Note that a product of these warps reads granules, until it has landed."""
        cells = (granules[:, None] * self.block.warps + warps).ravel()
        self.reader[cells] = PRODUCT
        self.read_time[cells] = np.tile(self.block.time[warps], len(granules)) if landed else NEVER

    def addresses(self, granules: np.ndarray) -> np.ndarray:
        """Addresses of granules."""
        return granules * self.granule + self.starts[0]

    def _unseen_write(self, granules, threads) -> np.ndarray:
        """Mask of granules whose last write is not known to be before."""
        block, writer = self.block, self.writer[granules]
        warps = (threads - block.first) // LANES
        other = np.maximum(writer - block.first, 0) // LANES
        unseen = self.write_time[granules] > block.seen[warps, other]
        return (unseen | ((writer >= 0) & (writer < block.first))) & (writer != threads)

    def _check_readers(self, instruction, granules, threads, atomic=False) -> None:
        """Report granules with a read that is not known to be before."""
        block = self.block
        warps = (threads - block.first) // LANES
        cells = granules[:, None] * block.warps + np.arange(block.warps)
        unseen = self.read_time[cells] > block.seen[warps]
        if unseen.any():
            unseen &= self.reader[cells] != threads[:, None]
            if atomic:
                unseen &= ~self.atomic[granules][:, None]
            some = block.first + np.arange(block.warps) * LANES  # of every warp
            readers = np.where(self.reader[cells] == MANY, some, self.reader[cells])
            readers = np.where(unseen, readers, OTHERS - 1)
            kind = "atomic" if atomic else "write"
            self._fault_of_race(instruction, kind, "read", readers.max(1), unseen.any(1), threads, granules)
        earlier = self.reading_block[granules]
        other = (earlier != HOST) & (earlier != block.index)
        if other.any() and not atomic:
            self._fault_of_race(instruction, "write", "read", np.full(len(other), OTHERS), other, threads, granules)

    def _note_read(self, granules, threads) -> None:
        block = self.block
        warps = (threads - block.first) // LANES
        cells = granules * block.warps + warps
        alone = (self.read_time[cells] != block.time[warps]) | (self.reader[cells] == threads)
        self.reader[cells] = np.where(alone, threads, MANY)
        self.reader[cells[self.reader[cells] != threads]] = MANY  # of one instruction
        self.read_time[cells] = np.maximum(self.read_time[cells], block.time[warps])  # NEVER stays, see `hold`
        earlier = self.reading_block[granules]
        self.reading_block[granules] = np.where((earlier == HOST) | (earlier == block.index), block.index, MANY)

    def _note_write(self, granules, threads) -> None:
        self.writer[granules] = threads
        self.write_time[granules] = self.block.time[(threads - self.block.first) // LANES]
        self.write_step[granules] = self.block.step
        self.written[granules] = True

    def _fault_of_race(self, instruction, what, before, others, race, threads, granules) -> None:
        """Report a race with ``others``, who did what was before, by what these are."""
        block = self.block
        warps, other_warps = (threads - block.first) // LANES, (others - block.first) // LANES
        whose = {
            "an asynchronous copy in flight": others == COPY,
            "a product of warp groups": others == PRODUCT,
            "another block": (others >= 0) & (others < block.first) | (others == OTHERS),
            "a lane of the same warp": (others >= block.first) & (warps == other_warps),
            "another warp": (others >= block.first) & (warps != other_warps),
        }
        for who, mask in whose.items():
            kind = f"race: {self.name} {what} after a {before} by {who}"
            block.fault(kind, instruction, race & mask, threads - block.first, self.addresses(granules))


class GlobalMemory(Memory):
    """The storages of tensors, each at an address of its own. Pages come in when they are first touched: strides of
    2**31 elements take no memory.
    """

    BASE, APART = 1 << 46, 1 << 38  # bytes

    def __init__(self, block: Block, granule: int, storages: list) -> None:
        super().__init__("global", block, granule, 0)
        self.storages = storages
        self.starts = np.array(
            [self.BASE + i * self.APART + s.address % PAGE for i, s in enumerate(storages)], np.int64
        )
        self.ends = self.starts + np.array([s.size for s in storages], np.int64)
        self.pages = np.zeros(0, np.int64)  # sorted, with where they lie in `data`
        self.places = np.zeros(0, np.int64)

    def address(self, pointer: int) -> int:
        """The address, in this space, of what lies at an address of the host."""
        for start, storage in zip(self.starts, self.storages):
            if storage.address <= pointer < storage.address + storage.size:
                return int(start) + pointer - storage.address
        return 0

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        pages = addresses // PAGE
        if len(pages) and (missing := np.setdiff1d(pages, self.pages)).size:
            for page in missing:
                self._bring(int(page))
        return self.places[np.searchsorted(self.pages, pages)] + addresses % PAGE

    def _bring(self, page: int) -> None:
        at, place = np.searchsorted(self.pages, page), len(self.data)
        self.pages, self.places = np.insert(self.pages, at, page), np.insert(self.places, at, place)
        self._grow(PAGE)
        here, there, storage = self._overlap(page, place)
        self.data[here] = storage.bytes(there)
        self.written[place // self.granule :] = storage.written(there.start, self.granule)

    def _overlap(self, page: int, place: int):
        """The part of a page that is a storage's: in ``data``, and in the storage."""
        i = np.searchsorted(self.starts, page * PAGE + PAGE - 1, "right") - 1
        first, last = max(page * PAGE, self.starts[i]), min((page + 1) * PAGE, self.ends[i])
        there = slice(int(first - self.starts[i]), int(last - self.starts[i]))
        return slice(int(place + first % PAGE), int(place + first % PAGE + last - first)), there, self.storages[i]

    def addresses(self, granules: np.ndarray) -> np.ndarray:
        order = np.argsort(self.places)
        page = self.pages[order][granules * self.granule // PAGE]
        return page * PAGE + granules * self.granule % PAGE

    def write_back(self) -> None:
        """Copy the pages into their storages."""
        for page, place in zip(self.pages, self.places):
            here, there, storage = self._overlap(page, place)
            storage.bytes(there)[:] = self.data[here]
            storage.note(
                there.start, self.written[place // self.granule : (place + PAGE) // self.granule], self.granule
            )


class Storage:
    """A tensor's memory. Of one that was made by `torch.empty`, no byte is written before a kernel does it."""

    def __init__(self, address: int, size: int, view, fresh: bool) -> None:
        self.address, self.size, self._view = address, size, view  # bytes
        self._written = {} if fresh else None  # by the first byte on a page

    def bytes(self, part: slice) -> np.ndarray:
        return self._view[part]

    def written(self, first: int, granule: int) -> np.ndarray | bool:
        if self._written is None:
            return True
        known = self._written.get(first)
        return False if known is None else known.reshape(-1, granule).all(1)

    def note(self, first: int, written: np.ndarray, granule: int) -> None:
        if self._written is not None:
            self._written[first] = np.repeat(written, granule)
