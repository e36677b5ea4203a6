"""python -m vitkernels info | selftest"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from . import Partition, _dispatch, info, partition_attention


def _run(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """Output and gradients of a dilated partition with a bias table, groups outside the map among them."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 15, 9, 2, 32) for _ in range(3)] + [torch.randn(2, 13, 13)]
    cotangent = torch.randn(2, 15, 9, 2, 32).to(device, dtype)
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    out = partition_attention(*leaves[:3], Partition.long(7, 2), leaves[3], backend=backend)
    return [x.cpu() for x in (out, *torch.autograd.grad(out, leaves, cotangent))]


def selftest() -> int:
    """Run every backend that is here, forward and backward, against the reference in float64; the number that
    failed.
    """
    expected = _run(torch.float64, "cpu", "reference")
    # TF32 matrix products, where they are allowed, keep 10 bits
    allowed = 1e-5 if torch.get_float32_matmul_precision() == "highest" else 1e-2
    failures = 0
    for backend in _dispatch.BACKENDS[:-1]:
        why = _dispatch.absent(backend)
        if why:
            print(f"{backend:8} absent: {why}")
            continue
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        error = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(_run(torch.float32, device, backend), expected)
        )
        failures += not error < allowed
        print(
            f"{backend:8} {'passed' if error < allowed else 'FAILED'} on {device}: largest relative error {error:.1e}"
        )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vitkernels", description="What is here, and whether it works.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, backends; for a backend that is absent, why")
    commands.add_parser("selftest", help="run every backend that is here against the reference")
    if parser.parse_args().command == "selftest":
        return selftest()
    print(info())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
