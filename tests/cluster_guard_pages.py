"""A program of test_cluster_triton.py: orders that lead nowhere, on tensors beside inaccessible pages."""

import ctypes
import mmap
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from vitkernels.cluster_attention import kernels

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


for edge[0] in ("end", "start"):
    for tokens, leaf_size in ((11, 5), (66, 66)):
        q, k, v, dout = (guarded((1, tokens, 1, 24), torch.float32).normal_() for _ in range(4))
        order = guarded((1, 1, tokens), torch.int32).copy_(torch.randperm(tokens))
        for place, value in enumerate((-1, tokens, 2**31 - 1, -(2**31), 2 * tokens)):
            order[0, 0, place + tokens // 2 - 2] = value
        with mock.patch.object(torch.Tensor, "new_empty", new_empty):
            out, statistic = kernels.cluster_attention_forward(q, k, v, order, leaf_size, 3, 0.2, False)
            kernels.cluster_attention_backward(dout, q, k, v, order, statistic, leaf_size, 3, 0.2)
