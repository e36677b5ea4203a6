"""A program of test_pooled_triton.py: launches on tensors between inaccessible pages."""

import math
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from guarded import edge, empty_like, memory, new_empty

from vitkernels.pooled_attention import kernels

for edge[0], dtype, q_thw, k_thw, cls in (
    ("end", torch.float32, (1, 2, 3), (2, 2, 2), 1),
    ("start", torch.float32, (1, 2, 3), (2, 2, 2), 1),
    ("end", torch.bfloat16, (1, 3, 22), (1, 11, 3), 0),
    ("end", torch.float32, (1, 1, 1), (1, 1, 130), 0),
):
    queries, keys = math.prod(q_thw) + cls, math.prod(k_thw) + cls
    q, dout = (memory((1, queries, 1, 24), dtype).normal_() for _ in range(2))
    k, v = (memory((1, keys, 1, 24), dtype).normal_() for _ in range(2))
    tables = [memory((a + b, 24), torch.float32).normal_() if b > 1 else None for a, b in zip(q_thw, k_thw)]
    indices = [memory((a, b), torch.long).random_(a + b) if b > 1 else None for a, b in zip(q_thw, k_thw)]
    geometry = q_thw, k_thw, bool(cls), 2, 0.2
    with mock.patch.object(torch.Tensor, "new_empty", new_empty), mock.patch.object(torch, "empty_like", empty_like):
        _, statistic = kernels.pooled_attention_forward(q, k, v, *tables, *indices, *geometry)
        kernels.pooled_attention_backward(dout, q, k, v, *tables, *indices, statistic, *geometry)
