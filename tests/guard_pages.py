"""A program of test_triton.py: launches on tensors that end on an inaccessible page."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from guarded import guarded

from vitkernels import Partition
from vitkernels.partition_attention import kernels

for partition, height, width in (
    (Partition.window(4), 6, 7),
    (Partition.long((3, 5), 2), 7, 11),
    (Partition.window((9, 8)), 10, 9),
):
    gh, gw = partition.group
    for dtype in (torch.float32, torch.bfloat16):
        qkv = guarded(torch.randn(1, height, width, 3, 1, 24).to(dtype))
        dout, bias = (
            guarded(torch.randn(1, height, width, 1, 24).to(dtype)),
            guarded(torch.randn(1, 2 * gh - 1, 2 * gw - 1)),
        )
        call = *qkv.unbind(3), bias, [], False
        geometry = *partition.group, *partition.interval, 0, 0
        out, statistic = kernels.partition_attention_forward(*call, geometry, 0.2)
        statistic = guarded(statistic) if statistic.numel() else statistic
        kernels.partition_attention_backward(dout, *call, statistic, geometry, 0.2)
