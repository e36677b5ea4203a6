"""python -m vitkernels info | selftest"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import (
    Partition,
    _dispatch,
    balanced_clusters,
    cluster_attention,
    info,
    partition_attention,
    pool_tokens,
    pooled_attention,
)


def _gradients(attend: Callable, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output and the gradient of every leaf, on the CPU."""
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves)
    return [x.cpu() for x in (out, *torch.autograd.grad(out, leaves, cotangent))]


def _partition(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """A dilated partition with a bias table, groups outside the map among them."""
    *inputs, cotangent = (x.to(device, dtype) for x in torch.randn(4, 2, 15, 9, 2, 32))
    bias = torch.randn(2, 13, 13).to(device, dtype)
    partition = Partition.long(7, 2)
    attend = lambda q, k, v, bias: partition_attention(q, k, v, partition, bias, backend=backend)  # noqa: E731
    return _gradients(attend, [*inputs, bias], cotangent)


def _cluster(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """Leaves of 49 and 50 tokens in a random order."""
    *inputs, cotangent = (x.to(device, dtype) for x in torch.randn(4, 2, 199, 2, 32))
    order = torch.rand(2, 2, 199).argsort(-1).to(device)
    return _gradients(lambda q, k, v: cluster_attention(q, k, v, order, backend=backend), inputs, cotangent)


def _order(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """The tokens of every leaf."""
    order = balanced_clusters(torch.randn(2, 196, 2, 32).to(device), backend=backend)
    return [order.cpu().unflatten(2, (4, 49)).sort(-1).values.double()]


def _pool(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """A convolution of a video with a class token whose map the stride does not divide, and its norm."""
    x, cotangent = (torch.randn(2, n + 1, 2, 32).to(device, dtype) for n in (2 * 9 * 7, 2 * 5 * 4))
    weight, norm = torch.randn(32, 1, 3, 3, 3).to(device, dtype), torch.randn(2, 32).to(device, dtype)
    options = {"thw": (2, 9, 7), "stride": (1, 2, 2), "has_cls": True, "backend": backend}
    pool = lambda x, weight, norm: pool_tokens(x, weight, *norm, **options)[0]  # noqa: E731
    return _gradients(pool, [x, weight, norm], cotangent)


def _pooled(dtype: torch.dtype, device: str, backend: str, lengths: tuple[int, ...] = (3, 15, 11)) -> list[Tensor]:
    """Queries on a video of 2 x 8 x 6 tokens, keys on one of 2 x 4 x 3, class tokens; tables of those lengths."""
    q, cotangent, k, v = (torch.randn(2, n + 1, 2, 32).to(device, dtype) for n in (96, 96, 24, 24))
    tables = [torch.randn(rows, 32).to(device, dtype) for rows in lengths]
    options = {"q_thw": (2, 8, 6), "k_thw": (2, 4, 3), "has_cls": True, "residual": "all_but_cls", "backend": backend}
    attend = lambda q, k, v, *tables: pooled_attention(q, k, v, rel_pos=tables or None, **options)  # noqa: E731
    return _gradients(attend, [q, k, v, *tables], cotangent)


CHECKS = {
    "partition_attention": (_partition, ("triton", "cpu")),
    "cluster_attention": (_cluster, ("triton", "cpu")),
    "balanced_clusters": (_order, ("cuda", "cpu")),
    "pool_tokens": (_pool, ("triton", "cpu")),
    "pooled_attention": (_pooled, ("triton", "cpu")),
    "pooled_no_rel_pos": (partial(_pooled, lengths=()), ("triton", "cpu", "sdpa")),
}


def _error(check: Callable, device: str, backend: str) -> float:
    """Of all tensors the largest, relative to the reference in float64."""
    results = []
    for arguments in ((torch.float64, "cpu", "reference"), (torch.float32, device, backend)):
        torch.manual_seed(0)
        results.append(check(*arguments))
    return max(((b - a).abs().max() / a.abs().max()).item() for a, b in zip(*results))


def selftest() -> int:
    """Run every backend that is here, forward and backward, against the reference in float64; the number that
    failed.
    """
    # TF32 matrix products, where they are allowed, keep 10 bits
    allowed = 1e-5 if torch.get_float32_matmul_precision() == "highest" else 1e-2
    failures = 0
    for backend in _dispatch.BACKENDS[:-1]:
        why = _dispatch.absent(backend)
        if why:
            print(f"{backend:6}  absent: {why}")
            continue
        device = "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"
        for name, (check, backends) in CHECKS.items():
            if backend not in backends:
                continue
            error = _error(check, device, backend)
            passed = error < allowed
            failures += not passed
            verdict = "passed" if passed else "FAILED"
            print(f"{backend:6}  {name:19}  {verdict} on {device}: largest relative error {error:.1e}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vitkernels", description="What is here, and whether it works.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, backends; for a backend that is absent, why")
    commands.add_parser("selftest", help="run every backend that is here against the reference")
    asked = parser.parse_args().command
    try:
        failures = selftest() if asked == "selftest" else print(info())
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        return int(asked == "selftest")  # which has not finished
    return failures or 0


if __name__ == "__main__":
    raise SystemExit(main())
