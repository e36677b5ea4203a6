"""A program of test_pool_triton.py: pooling of tensors beside inaccessible pages."""

import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from guarded import edge, memory, new_empty

from vitkernels.pooled_attention import pool_kernels

for edge[0] in ("end", "start"):
    for maximum, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        geometry = [2, 3, 5], [2, 3, 3], [1, 2, 1], [1, 1, 1], maximum, True, 1e-6
        x, dout, dx = (memory((1, n, 1, 24), dtype) for n in (31, 31, 31))
        taps, norm = memory((24, 18), torch.float32).normal_(), memory((2, 24), torch.float32).normal_()
        x, dout = x.copy_(torch.randn(31, 1, 24)), dout.copy_(torch.randn(31, 1, 24))
        inputs = x, None if maximum else taps, *norm
        with (
            mock.patch.object(torch.Tensor, "new_empty", new_empty),
            mock.patch.object(torch.Tensor, "contiguous", lambda x: x.new_empty(x.shape).copy_(x)),
        ):
            out = pool_kernels.pool_tokens_forward(*inputs, *geometry)
            assert out.shape == dout.shape
            pool_kernels.pool_tokens_backward(dout, *inputs, *geometry, dx)
