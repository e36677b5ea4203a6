"""A program of test_cluster_triton.py: orders that lead nowhere, on tensors beside inaccessible pages."""

import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from guarded import edge, memory, new_empty

from vitkernels.cluster_attention import kernels

for edge[0] in ("end", "start"):
    for tokens, leaf_size in ((11, 5), (66, 66)):
        q, k, v, dout = (memory((1, tokens, 1, 24), torch.float32).normal_() for _ in range(4))
        order = memory((1, 1, tokens), torch.int32).copy_(torch.randperm(tokens))
        for place, value in enumerate((-1, tokens, 2**31 - 1, -(2**31), 2 * tokens)):
            order[0, 0, place + tokens // 2 - 2] = value
        with mock.patch.object(torch.Tensor, "new_empty", new_empty):
            out, statistic = kernels.cluster_attention_forward(q, k, v, order, leaf_size, 3, 0.2, False)
            kernels.cluster_attention_backward(dout, q, k, v, order, statistic, leaf_size, 3, 0.2)
