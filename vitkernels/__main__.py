"""python -m vitkernels info | selftest"""

from __future__ import annotations

import argparse

import torch

from . import Partition, info, partition_attention


def selftest() -> int:
    """Forward and backward of every backend that is here, against the reference in float64."""
    from ._dispatch import BACKENDS, interpreted

    failures = 0
    for backend in BACKENDS[:-1]:
        device = "cpu" if backend == "cpu" or interpreted() else "cuda"
        torch.manual_seed(0)
        inputs = [torch.randn(2, 15, 9, 2, 32) for _ in range(3)] + [torch.randn(2, 13, 13)]
        cotangent = torch.randn(2, 15, 9, 2, 32)

        def run(dtype, device, backend, inputs=inputs, cotangent=cotangent):
            leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
            out = partition_attention(*leaves[:3], Partition.long(7, 2), leaves[3], backend=backend)
            return [out, *torch.autograd.grad(out, leaves, cotangent.to(device, dtype))]

        try:
            results = run(torch.float32, device, backend)
        except (RuntimeError, AssertionError) as error:
            print(f"{backend:10} absent   {str(error).splitlines()[0]}")
            continue
        expected = run(torch.float64, "cpu", "reference")
        error = max(((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(results, expected))
        # TF32 matrix products, if they are allowed, keep 10 bits
        passed = error < (1e-5 if torch.get_float32_matmul_precision() == "highest" else 1e-2)
        failures += not passed
        print(f"{backend:10} {'passed' if passed else 'FAILED'}   largest relative error {error:.1e}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vitkernels", description="What is here, and whether it works.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, backends; for a backend that is absent, why")
    commands.add_parser("selftest", help="run every backend that is here against the reference")
    command = parser.parse_args().command
    if command == "info":
        print(info())
        return 0
    return selftest()


if __name__ == "__main__":
    raise SystemExit(main())
