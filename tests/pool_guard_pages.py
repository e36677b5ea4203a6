"""A program of test_pool_triton.py: pooling of tensors beside inaccessible pages."""

import ctypes
import mmap
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from vitkernels.pooled_attention import pool_kernels

edge = ["end"]  # of the tensors: where it touches a page that cannot be read or written


def guarded(shape, dtype) -> torch.Tensor:
    """Memory between two such pages."""
    size = torch.Size(shape).numel() * dtype.itemsize
    room, page = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for closed in (address, address + page + room):
        if libc.mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (room - size if edge[0] == "end" else 0)
    return torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=offset).view(shape)


def new_empty(x, *shape, dtype=None, **options):
    """What the launchers write to is guarded too."""
    shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
    return guarded(shape, dtype or x.dtype) if shape.numel() else torch.empty(shape, dtype=dtype or x.dtype, **options)


for edge[0] in ("end", "start"):
    for maximum, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        geometry = [2, 3, 5], [2, 3, 3], [1, 2, 1], [1, 1, 1], maximum, True, 1e-6
        x, dout, dx = (guarded((1, n, 1, 24), dtype) for n in (31, 31, 31))
        taps, norm = guarded((24, 18), torch.float32).normal_(), guarded((2, 24), torch.float32).normal_()
        x, dout = x.copy_(torch.randn(31, 1, 24)), dout.copy_(torch.randn(31, 1, 24))
        inputs = x, None if maximum else taps, *norm
        with (
            mock.patch.object(torch.Tensor, "new_empty", new_empty),
            mock.patch.object(torch.Tensor, "contiguous", lambda x: x.new_empty(x.shape).copy_(x)),
        ):
            out = pool_kernels.pool_tokens_forward(*inputs, *geometry)
            assert out.shape == dout.shape
            pool_kernels.pool_tokens_backward(dout, *inputs, *geometry, dx)
