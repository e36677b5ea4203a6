"""What the Triton kernels take of every chip, compiled without a GPU: registers, spills, shared memory, wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

if not triton.__version__.startswith("3.6."):
    pytest.skip(f"the budgets hold for triton 3.6, found {triton.__version__}", allow_module_level=True)

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a block may have

EVERYWHERE = {  # as Case of aot.py: group side, head_dim, dtype, shift, whether the map is ragged, hidden width
    "49 tokens, bf16, 32": (7, 32, "bfloat16"),
    "49 tokens, bf16, 32, shifted": (7, 32, "bfloat16", 3),
    "64 tokens, fp16, 64": (8, 64, "float16"),
    "100 tokens, bf16, 32": (10, 32, "bfloat16"),
    "196 tokens, fp16, 64": (14, 64, "float16"),
    "196 tokens, bf16, 96": (14, 96, "bfloat16"),
    "leaves of 49, bf16, 32": (49, 20, 32, "bfloat16"),  # as Leaves of aot.py: tokens, overlap, head_dim, dtype
    "leaves of 49, fp16, 64": (49, 20, 64, "float16"),
    "leaves of 72, bf16, 32": (72, 20, 32, "bfloat16"),
    "leaves of 72, fp16, 64": (72, 20, 64, "float16"),
    # as Maps of aot.py: maps of queries and of keys, class token, head_dim, dtype
    "3136 queries, 196 keys, bf16, 96": ((1, 56, 56), (1, 14, 14), 0, 96, "bfloat16"),
    "1569 queries, 393 keys, bf16, 96": ((8, 14, 14), (8, 7, 7), 1, 96, "bfloat16"),
    # as Pool of aot.py: map, kernel, stride, class token, head_dim, dtype, whether the maximum is taken
    "pool of 3x3, stride 2, bf16, 96": ((1, 56, 56), (1, 3, 3), (1, 2, 2), 0, 96, "bfloat16"),
}
ON_TWO = {
    "16 tokens, bf16, 32": (4, 32, "bfloat16"),
    "49 tokens, bf16, 32, ragged": (7, 32, "bfloat16", 0, True),
    "49 tokens, bf16, 32, MLP of 6": (7, 32, "bfloat16", 0, False, 6),
    "49 tokens, bf16, 32, MLP of 12": (7, 32, "bfloat16", 0, False, 12),
    "64 tokens, fp16, 64, shifted": (8, 64, "float16", 4),
    "196 tokens, fp16, 64, ragged": (14, 64, "float16", 0, True),
    "49 tokens, bf16, 96": (7, 96, "bfloat16"),
    "49 tokens, bf16, 128": (7, 128, "bfloat16"),
    "49 tokens, fp32, 32": (7, 32, "float32"),
    "100 tokens, fp32, 32": (10, 32, "float32"),
    "leaves of 49, bf16, 96": (49, 20, 96, "bfloat16"),
    "leaves of 49, fp32, 32": (49, 20, 32, "float32"),
    "leaves of 64, bf16, 32": (64, 20, 32, "bfloat16"),
    "leaves of 72, bf16, 96": (72, 20, 96, "bfloat16"),
    "1569 queries, 1569 keys, bf16, 96": ((8, 14, 14), (8, 14, 14), 1, 96, "bfloat16"),
    "8001 queries, 2001 keys, bf16, 72": ((20, 20, 20), (20, 10, 10), 1, 72, "bfloat16"),
    "784 queries, 196 keys, fp16, 64": ((1, 28, 28), (1, 14, 14), 0, 64, "float16"),
    "784 queries, 196 keys, bf16, 128": ((1, 28, 28), (1, 14, 14), 0, 128, "bfloat16"),
    "196 queries, 196 keys, fp32, 96": ((1, 14, 14), (1, 14, 14), 0, 96, "float32"),
    "pool of 3x3, stride 1, fp16, 64": ((1, 56, 56), (1, 3, 3), (1, 1, 1), 0, 64, "float16"),
    "pool of 3x3, stride 4, fp32, 96": ((1, 56, 56), (1, 3, 3), (1, 4, 4), 0, 96, "float32"),
    "pool of 3x3x3, stride 2, bf16, 96": ((8, 56, 56), (3, 3, 3), (1, 2, 2), 1, 96, "bfloat16"),
    "pool of 3x3x3, stride 8, bf16, 96, maximum": ((8, 56, 56), (3, 3, 3), (1, 8, 8), 1, 96, "bfloat16", True),
}


SPILLED = {  # bytes of a thread; 0 where nothing stands
    (86, "196 tokens, bf16, 96", "streamed_attention_backward_query"): 16,
    (86, "196 tokens, bf16, 96", "streamed_attention_backward_key"): 8,
    (89, "196 tokens, bf16, 96", "streamed_attention_backward_query"): 16,
    (89, "196 tokens, bf16, 96", "streamed_attention_backward_key"): 8,
    (120, "196 tokens, bf16, 96", "streamed_attention_backward_key"): 8,
    (100, "1569 queries, 393 keys, bf16, 96", "relative_gradients"): 16,
    (80, "196 queries, 196 keys, fp32, 96", "attention_forward"): 248,  # products without tensor cores
    (80, "196 queries, 196 keys, fp32, 96", "attention_backward_query"): 352,
    (90, "196 queries, 196 keys, fp32, 96", "attention_forward"): 272,
    (90, "196 queries, 196 keys, fp32, 96", "attention_backward_query"): 376,
    (80, "pool of 3x3x3, stride 2, bf16, 96", "pool_tokens_backward_pooled"): 8,
}


@pytest.mark.parametrize("capability", SHARED)
def test_budgets(capability):
    cases = EVERYWHERE | (ON_TWO if capability in (80, 90) else {})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), str(capability), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    spilled = {(capability, case, name): r["spilled"] for case, kernels in found.items() for name, r in kernels.items()}
    assert {key: n for key, n in spilled.items() if n > SPILLED.get(key, 0)} == {}
    for case, kernels in found.items():
        for name, r in kernels.items():
            assert r["shared"] <= SHARED[capability], (case, name, r)
            assert ("attention" not in name and "pool" not in name) or r["wide"] > 0, (case, name, r)
            if "pool" in name:  # rows stay with their threads; twelve or sixteen warps fit a processor
                assert r["shared"] <= 1, (case, name, r)
                assert r["registers"] <= (168 if r["warps"] == 2 else 128), (case, name, r)
    if capability == 90:
        forward, backward, _ = found["49 tokens, bf16, 32"].values()
        assert forward["warps"] == 4 and forward["registers"] <= 128
        assert backward["warps"] == 4 and backward["registers"] <= 168
        assert backward["own"], "without a barrier, every element of the tile must stay with one thread"
        forward, backward = found["leaves of 49, bf16, 32"].values()
        assert forward["warps"] == 4 and forward["registers"] <= 96
        assert backward["warps"] == 4 and backward["registers"] <= 168
