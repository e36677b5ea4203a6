"""Small problems for every kernel, compiled for a chip and run by the emulator of tools/ptx. One process per chip:

python tests/emulated_cases.py CHIP [ORDER] [--only PATTERN]    prints what was found, as JSON
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
ORDERS = "lockstep", "ascending", "descending"  # of warps
BF16, FP16, FP32 = "bfloat16", "float16", "float32"
# by name: the order of warps, the function below and its arguments
CASES = {
    80: {
        "49 tokens, bf16": ("lockstep", "partition", (7, 0), (7, 7), 32, BF16),
        "16 tokens, shifted": ("ascending", "partition", (4, 2), (8, 8), 16, FP16),
        "16 tokens, ragged, fp32": ("lockstep", "partition", (4, 0), (6, 4), 16, FP32),
        "16 tokens, no bias": ("descending", "partition", (4, 1), (8, 4), 16, BF16, False),
        "MLP of 6": ("lockstep", "inline", 4, 6, 16, BF16),
        "65 tokens, streamed": ("lockstep", "partition", ((1, 65), 0), (1, 65), 16, BF16),
        "81 tokens, streamed, no bias, ragged": ("descending", "partition", (9, 0), (9, 10), 8, FP16, False),
        "strides of 2**31, 9 tokens": ("lockstep", "far", (3, 3), (512, 128, 32, 2**31)),
        "70,000 groups of 16": ("lockstep", "many", 4, 16, BF16),
        "leaves of 49": ("lockstep", "clusters", 98, 49, 20, 1, 32, BF16),
        "leaves of 16 and 17": ("descending", "clusters", 33, 16, 4, 1, 16, FP32),
        "leaves of 72, streamed": ("ascending", "clusters", 144, 72, 20, 1, 16, BF16),
        "leaves of 72, streamed, fp32": ("lockstep", "clusters", 144, 72, 20, 1, 16, FP32),
        "pooled": ("lockstep", "pooled", (4, 5), (2, 3), 1, 1, 16, BF16),
        "pooled, no positions": ("ascending", "pooled", (4, 5), (4, 5), 0, 1, 16, FP16, (0, 0, 0)),
        "pooled, fp32": ("lockstep", "pooled", (1, 2), (2, 33), 0, 1, 16, FP32),
        "8 queries, 3,072 keys of mean 1, fp32": ("lockstep", "long", (1, 2, 4), (1, 48, 64), 16, 1.0, 1.0),
        "pool, norm, class token": ("lockstep", "pool", (3, 5), (3, 3), (1, 2), BF16, "conv", True, True),
        "maximum": ("descending", "pool", (3, 4), (2, 3), (1, 1), FP16, "max", False, False),
        "average": ("ascending", "pool", (2, 3, 4), (2, 3, 2), (1, 2, 1), FP32, "avg", True, True),
        "table of an MLP of 24, 12 heads": ("lockstep", "table", (3, 3), 24, 12, True),
        "table of an MLP of 6, one program": ("descending", "table", (3, 5), 6, 2, False, 1),
    },
    90: {
        "49 tokens, bf16": ("lockstep", "partition", (7, 3), (14, 7), 32, BF16),
        "64 tokens, fp16": ("ascending", "partition", (8, 0), (9, 8), 64, FP16),
        "16 tokens, fp32, no bias": ("descending", "partition", (4, 2), (4, 8), 16, FP32, False),
        "MLP of 12": ("ascending", "inline", 4, 12, 16, FP16),
        "81 tokens, streamed": ("lockstep", "partition", (9, 4), (9, 9), 32, FP16),
        "66 tokens, streamed, fp32": ("lockstep", "partition", ((1, 66), 0), (1, 66), 16, FP32),
        "81 tokens, streamed, no bias": ("lockstep", "partition", (9, 0), (9, 9), 16, BF16, False),
        "strides of 2**31, 72 tokens": ("lockstep", "far", (9, 8), (2**31 + 8, 128, 32, 16)),
        "70,000 groups of 81": ("lockstep", "many", 9, 16, FP16),
        "leaves of 49": ("ascending", "clusters", 98, 49, 20, 1, 32, FP16),
        "leaves of 72, streamed": ("lockstep", "clusters", 144, 72, 20, 1, 32, BF16),
        "pooled": ("descending", "pooled", (4, 5), (2, 3), 1, 1, 32, BF16),
        "pooled, no positions": ("lockstep", "pooled", (9, 8), (9, 8), 0, 1, 32, FP16, (0, 0, 0)),
        "8 queries, 3,072 keys, even weights, fp32": ("lockstep", "long", (1, 2, 4), (1, 48, 64), 16, 0.0, 0.1),
        "pool, norm": ("ascending", "pool", (3, 5), (3, 3), (1, 2), FP16, "conv", False, True),
        "maximum, class token": ("lockstep", "pool", (3, 4), (2, 3), (1, 1), BF16, "max", True, False),
        "table of an MLP of 24, 12 heads": ("lockstep", "table", (3, 3), 24, 12, False),
    },
}


def compile_for_cpu_tensors() -> None:
    """Triton compiles, while the package registers its operators for CPU tensors, as under the interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"


def partition(group, size, head_dim, dtype, biased=True) -> None:
    import test_triton
    import torch

    from vitkernels import Partition

    test_triton.check(Partition.window(*group), 1, *size, 1, head_dim, getattr(torch, dtype), "cpu", biased=biased)


def far(group, strides) -> None:
    import test_triton

    test_triton.test_addresses_past_2_31_elements(group, strides, "cpu")


def many(group, head_dim, dtype) -> None:
    """More groups than a grid's y and z take, an image each. Only programs of the first and of the last run."""
    import torch
    from conftest import sparse
    from contract import assert_as_exact

    from vitkernels import Partition
    from vitkernels.partition_attention import kernels
    from vitkernels.partition_attention.reference import partition_attention

    shape = 70_000, group, group, 3, 1, head_dim
    qkv = sparse(math.prod(shape), "cpu").view(getattr(torch, dtype)).view(shape)
    torch.manual_seed(0)
    qkv[0], qkv[-1] = torch.randn(2, *shape[1:])
    with mock.patch.object(kernels, "processors", lambda device: shape[0]):
        geometry = (group, group, 1, 1, 0, 0)
        out, _ = kernels.partition_attention_forward(*qkv.unbind(3), None, [], False, geometry, 0.25)
    ends = qkv[:: shape[0] - 1]
    part = Partition.window(group)
    exact, eager = (partition_attention(*x.unbind(3), part, None, 0.25) for x in (ends.double(), ends))
    assert_as_exact([out[:: shape[0] - 1]], [eager], [exact], qkv.dtype)


def inline(group, hidden, head_dim, dtype) -> None:
    """The MLP evaluated inside the kernel, against its table."""
    import torch
    from contract import assert_as_exact, outputs_and_gradients
    from test_position_bias import weights
    from test_triton import geometry_of, random_inputs

    from vitkernels import Partition
    from vitkernels.partition_attention import kernels
    from vitkernels.partition_attention.reference import partition_attention
    from vitkernels.position_bias.reference import dynamic_position_bias

    part, dtype = Partition.window(group), getattr(torch, dtype)
    qkv, _, dout = (x.to(dtype) for x in random_inputs(part, 1, group, group, 2, head_dim))
    mlp = weights(hidden, 2)

    def reference(qkv, table):
        return partition_attention(*qkv.unbind(3), part, table, 0.25)

    table = dynamic_position_bias(mlp, (group, group), True)
    exact = outputs_and_gradients(reference, [qkv.double(), table], dout)
    eager = outputs_and_gradients(reference, [qkv, table.float()], dout)
    call = *qkv.unbind(3), None, [x.float() for x in mlp], True
    geometry = geometry_of(part, group, group)
    out, statistic = kernels.partition_attention_forward(*call, geometry, 0.25)
    ours = [out, *kernels.partition_attention_backward(dout, *call, statistic, geometry, 0.25)]
    assert_as_exact(ours, eager, exact, dtype)


def clusters(tokens, leaf_size, overlap, heads, head_dim, dtype) -> None:
    import test_cluster_triton
    import torch

    test_cluster_triton.check(tokens, leaf_size, overlap, heads, head_dim, getattr(torch, dtype), "cpu")


def pooled(q_thw, k_thw, cls, heads, head_dim, dtype, wanted=(1, 1, 1)) -> None:
    import test_pooled_triton
    import torch

    test_pooled_triton.check(q_thw, k_thw, cls, heads, head_dim, getattr(torch, dtype), wanted=wanted)


def long(q_thw, k_thw, head_dim, mean, spread) -> None:
    """Sums over thousands of tokens in float32: of keys and values around a mean, with logits of a spread."""
    import torch
    from contract import assert_contract

    from vitkernels import pooled_attention

    torch.manual_seed(0)
    sizes = math.prod(q_thw), math.prod(k_thw)
    q, k, v, dout = (torch.randn(1, sizes[i], 1, head_dim).double() for i in (0, 1, 1, 0))
    q, k, v = q * spread, k + mean, v + mean

    def on(backend):
        return lambda *qkv: pooled_attention(*qkv, q_thw=q_thw, k_thw=k_thw, backend=backend)

    assert_contract(on("triton"), on("reference"), [q, k, v], dout, torch.float32)


def pool(thw, kernel, stride, dtype, mode, has_cls, norm) -> None:
    import test_pool_triton
    import torch

    options = dict(mode=mode, has_cls=has_cls, norm=norm)
    test_pool_triton.check(thw, kernel, stride, getattr(torch, dtype), "cpu", **options)


def table(group, hidden, heads, residual, programs=64) -> None:
    """Fewer programs have more blocks of offsets, and add to what they have stored."""
    import torch
    from contract import assert_contract
    from test_position_bias import table_of, weights

    from vitkernels.position_bias import kernels

    mlp = weights(hidden, heads)
    cotangent = torch.randn(heads, *(2 * n - 1 for n in group), dtype=torch.float64)
    ours, reference = (lambda *mlp, b=b: table_of(mlp, group, residual, b) for b in ("triton", "reference"))
    with mock.patch.object(kernels, "PROGRAMS", programs):
        assert_contract(ours, reference, mlp, cotangent, torch.float32, together=range(14))


def run(chip: int, name: str, order: str) -> dict:
    """Run a case. Returns the exception and the faults, if any."""
    from ptx.launch import emulated

    _, function, *arguments = CASES[chip][name]
    started, error = time.time(), ""
    with emulated(chip, order, ends=2 if function == "many" else 0) as log:
        try:
            globals()[function](*arguments)
        except AssertionError as wrong:
            error = f"{type(wrong).__name__}: {wrong}"
        except Exception:
            error = traceback.format_exc()
    seconds = round(time.time() - started, 1)
    return dict(error=error, faults=[*map(str, log.faults)], launches=log.launches, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", type=int, choices=CASES)
    parser.add_argument(
        "order", nargs="?", default="own", choices=["own", *ORDERS], help="of warps; 'own' is the case's"
    )
    parser.add_argument("--only", default="", help="cases whose names match this expression")
    arguments = parser.parse_args()
    compile_for_cpu_tensors()
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
    import torch

    torch.set_num_threads(1)
    found = {}
    for name, (own, *_) in CASES[arguments.chip].items():
        if re.search(arguments.only, name):
            order = own if arguments.order == "own" else arguments.order
            found[name] = run(arguments.chip, name, order)
            print(name, order, found[name]["seconds"], file=sys.stderr)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
