"""Memory beside pages that cannot be read or written: an access outside a tensor kills the process."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

edge = ["end"]  # of the tensors that new_empty() and empty_like() make: which one touches such a page


def memory(shape, dtype: torch.dtype, at: str | None = None) -> Tensor:
    """A tensor between two such pages, of which one touches its start or its end: ``at``, or ``edge``."""
    size = torch.Size(shape).numel() * dtype.itemsize
    room, page = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE
    buffer = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for closed in (address, address + page + room):
        if libc.mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (room - size if (at or edge[0]) == "end" else 0)
    return torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize, offset=offset).view(shape)


def guarded(x: Tensor, at: str | None = None) -> Tensor:
    """A copy of ``x`` there."""
    return memory(x.shape, x.dtype, at).copy_(x)


def new_empty(x: Tensor, *shape, dtype: torch.dtype | None = None, **options) -> Tensor:
    """In place of Tensor.new_empty: what launchers write to is guarded too."""
    shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
    return memory(shape, dtype or x.dtype) if shape.numel() else torch.empty(shape, dtype=dtype or x.dtype, **options)


def empty_like(x: Tensor) -> Tensor:
    """In place of torch.empty_like."""
    return memory(x.shape, x.dtype)


def assert_exits_well(program: str) -> None:
    """A program of this folder, in a process that an access outside may kill."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name(program))], capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}"
