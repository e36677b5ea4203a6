"""A program of test_pooled_triton.py: launches on tensors between inaccessible pages."""

import ctypes
import math
import mmap
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from vitkernels.pooled_attention import kernels

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
    """What the launchers write to is guarded too; other empty tensors are Triton's own."""
    shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
    return guarded(shape, dtype or x.dtype) if shape.numel() else torch.empty(shape, dtype=dtype or x.dtype, **options)


def empty_like(x):
    return guarded(x.shape, x.dtype)


for edge[0], dtype, q_thw, k_thw, cls in (
    ("end", torch.float32, (1, 2, 3), (2, 2, 2), 1),
    ("start", torch.float32, (1, 2, 3), (2, 2, 2), 1),
    ("end", torch.bfloat16, (1, 3, 22), (1, 11, 3), 0),
    ("end", torch.float32, (1, 1, 1), (1, 1, 130), 0),
):
    queries, keys = math.prod(q_thw) + cls, math.prod(k_thw) + cls
    q, dout = (guarded((1, queries, 1, 24), dtype).normal_() for _ in range(2))
    k, v = (guarded((1, keys, 1, 24), dtype).normal_() for _ in range(2))
    tables = [guarded((a + b, 24), torch.float32).normal_() if b > 1 else None for a, b in zip(q_thw, k_thw)]
    indices = [guarded((a, b), torch.long).random_(a + b) if b > 1 else None for a, b in zip(q_thw, k_thw)]
    geometry = q_thw, k_thw, bool(cls), 2, 0.2
    with mock.patch.object(torch.Tensor, "new_empty", new_empty), mock.patch.object(torch, "empty_like", empty_like):
        _, statistic = kernels.pooled_attention_forward(q, k, v, *tables, *indices, *geometry)
        kernels.pooled_attention_backward(dout, q, k, v, *tables, *indices, statistic, *geometry)
