"""Compiled kernels, run without a GPU by the emulator of tools/ptx: the numerical contract, and no fault.

With VITKERNELS_EMULATE set (``make emulate``) every case runs in all orders of warps.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TRITON_REFUSAL
from contract import leaf_of
from emulated_cases import CASES, ORDERS
from emulated_mutations import KERNELS

from vitkernels.cluster_attention.reference import balanced_clusters
from vitkernels.tree import Tree

if TRITON_REFUSAL is not None:
    pytest.skip(TRITON_REFUSAL, allow_module_level=True)

triton = pytest.importorskip("triton")
EVERYTHING = bool(os.environ.get("VITKERNELS_EMULATE"))
ROOT = Path(__file__).parents[1]
HARMLESS = {  # what may be left out of these kernels: the instruction, its file, and why
    "copies, sm_80": [
        ("bar.sync", "_triton.py", "copies follow, to the second stage's place, which nobody has used before")
    ],
    "products of warp groups, sm_90": [
        ("fence.proxy", "_triton.py", "nothing was written to shared memory since the fence before"),
    ],
    "partial sums, sm_80": [
        ("bar.sync", "kernels.py", "another follows before anything that it orders; it is for a table of the MLP"),
    ],
}


@pytest.fixture
def results(once):
    """``results(script, *arguments)``: what a script found, from one process for all tests."""

    def write(command: list[str], path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        path.write_text(done.stdout)

    def read(script: str, *arguments: str) -> dict:
        command = [str(ROOT / "tests" / script), *arguments]
        name = re.sub(r"\W+", "_", "_".join([script, *arguments]))
        return json.loads(once(f"{name}.json", functools.partial(write, command)).read_text())

    return read


@pytest.mark.parametrize("order", ORDERS if EVERYTHING else ["own"])
@pytest.mark.parametrize("chip, name", [(chip, name) for chip, cases in CASES.items() for name in cases])
def test_compiled_kernels(results, chip, name, order):
    found = results("emulated_cases.py", str(chip), order)[name]
    assert not found["faults"], "\n".join(found["faults"])
    assert not found["error"], found["error"]
    assert found["launches"]


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="the harmless ones are those of Triton 3.6")
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_left_out_is_seen(results, name):
    """Every barrier, wait and fence of a kernel but those that are harmless."""
    found = results("emulated_mutations.py", name)[name]
    unseen = [x["left_out"] for x in found if not x["shows"]]
    harmless = [(opcode, file) for opcode, file, _ in HARMLESS[name]]
    assert [text for text in unseen if not any(f"`{o}" in text and f"at {f}:" in text for o, f in harmless)] == []
    assert len(unseen) == len(harmless) and len(found) >= 15


@pytest.fixture
def emulator(monkeypatch):
    """The module, for PTX that does not come from Triton."""
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("ptx.launch")


@pytest.fixture
def cuda_ptx(once) -> str:
    """What nvcc makes of the kernels of csrc/cuda for sm_80."""
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc")
    source = ROOT / "csrc" / "cuda" / "balanced_clusters.kernel.cu"
    command = [nvcc, "-ptx", "-arch=sm_80", "-std=c++17", "-lineinfo", f"-I{ROOT / 'csrc'}", source, "-o"]
    return once("balanced_clusters.ptx", lambda path: subprocess.run([*command, path], check=True)).read_text()


@pytest.mark.parametrize(
    "tokens, features, dtype, order, limit",
    [
        (200, 16, "float32", "ascending", 163),
        (99, 32, "bfloat16", "lockstep", 163),
        (140, 16, "float16", "descending", 4),
    ],
)
def test_cuda_clusters(emulator, cuda_ptx, built, tokens, features, dtype, order, limit):
    """The order is that of the reference; what a block has in shared memory depends on the limit (KiB)."""
    torch.manual_seed(0)
    x, leaf_size, iterations = torch.randn(1, tokens, 2, features).to(getattr(torch, dtype)), 49, 2
    warps, resident, workspace, shared = built("cuda_bindings").plan(tokens, features, dtype, limit * 1024)
    tree, out = Tree.of(tokens, leaf_size), torch.full((1, 2, tokens), -1, dtype=torch.int32)
    words = torch.empty(2, tokens + (tokens + 1) // 2, dtype=torch.int32) if workspace else None
    numbers = 2, 2, tree.tokens, tree.levels, features, iterations, 1.4426950408889634 / 0.1
    problem = emulator.Struct("<Q3qQQ2q2q2if4x", [x, *x.stride()[:3], out, words, *numbers])
    element = {"float32": "If", "float16": "I6__half", "bfloat16": "I13__nv_bfloat16"}[dtype]
    (name,) = re.findall(rf"\.entry\s+(\w+{element}Lb{int(resident)}E\w+)", cuda_ptx)
    log = emulator.Log(order)
    emulator.run(emulator.Program.parse(cuda_ptx, name), 2, 32 * warps, shared, [problem], log)
    assert not log.faults, "\n".join(map(str, log.faults))
    assert torch.equal(out.sort(-1).values, torch.arange(tokens, dtype=torch.int32).expand_as(out))
    exact = balanced_clusters(x, leaf_size, iterations, 0.1, dtype=torch.float64)
    assert (leaf_of(out, leaf_size) == leaf_of(exact, leaf_size)).float().mean() >= 0.99


PTX = """
.extern .shared .align 16 .b8 room[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0)
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<4>;
	.loc	1 7 3
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	shl.b32 	%r3, %r1, 2;
	mov.b32 	%r4, room;
	add.s32 	%r5, %r4, %r3;
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
	setp.lt.u32 	%p1, %r1, 8;
	BODY
	ret;
}
"""
OWN = "st.shared.b32 [%r5], %r1; "
FAULTS = {  # what a block of 64 threads, of two, does: with 64 words of the tensor and of shared memory
    "": None,
    OWN + "bar.sync 0; ld.shared.b32 %r6, [room]; bar.sync 0; st.shared.b32 [%r5], %r6;": None,
    "ld.global.b32 %r6, [%rd2+4];": "global access out of bounds, 2 times",
    "st.shared.b32 [%r5+1024], %r1;": "shared access out of bounds",
    "@%p1 ld.global.b32 %r6, [%rd2+2];": "misaligned global access, 16 times",
    "ld.shared.b32 %r6, [%r5];": "shared read of what was never written",
    OWN + "ld.shared.b32 %r6, [%r5]; bar.warp.sync -1; ld.shared.b32 %r6, [room+128];": "by another warp",
    OWN + "ld.shared.b32 %r6, [room];": "write by a lane of the same warp",
    OWN + "bar.sync 0; ld.shared.b32 %r6, [room]; st.shared.b32 [%r5], %r6;": "by another warp",
    "st.global.b32 [%rd1], %r1;": "race: lanes write different values to one place in global memory",
    "st.global.b32 [%rd1], 7;": None,
    "st.global.b32 [%rd2], %r2;": "race: global write after a write by another block",
    "@%p1 bra $L; bar.sync 0; $L: ": "executed by a part of a warp",
    "setp.lt.u32 %p2, %r1, 32; @%p2 bra $L; bar.sync 0; $L: ": "barrier that not all threads reach",
    "cp.async.ca.shared.global [%r5], [%rd2], 4; ld.shared.b32 %r6, [%r5];": "an asynchronous copy in flight",
    "cp.async.ca.shared.global [%r5], [%rd2], 4; cp.async.wait_all; ld.shared.b32 %r6, [%r5];": None,
    "tensormap.replace %r6;": "`tensormap.replace %r6` at 1:7: instruction tensormap.replace",
}


@pytest.mark.parametrize("body", FAULTS)
@pytest.mark.parametrize("order", ORDERS)
def test_faults(emulator, order, body):
    """Every kind of fault, and what comes near it and is none; an instruction that is not known is no fault."""
    log, expected = emulator.Log(order), FAULTS[body]
    try:
        words = torch.zeros(64, dtype=torch.int32)
        emulator.run(emulator.Program.parse(PTX.replace("BODY", body), "kernel"), 2, 64, 256, [words], log)
        found = "\n".join(map(str, log.faults))
    except emulator.Unknown as error:
        found = str(error)
    assert (expected in found) if expected else not found, found


OPERANDS = "st.shared.v4.b32 [%r6], {%r8, %r8, %r8, %r8}; st.shared.v4.b32 [%r6+2048], {%r8, %r8, %r8, %r8}; "
FENCE, BARRIER = "fence.proxy.async.shared::cta; ", "bar.sync 0; "
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %rd3, %rd3, %p1, 1, 1, 0, 0; "
PRODUCT += "wgmma.commit_group.sync.aligned; "
ZERO, COPY, WAIT = "mov.f32 %f1, 0f00000000; ", "mov.f32 %f1, %f8; ", "wgmma.wait_group.sync.aligned 0; "
START, READ = "wgmma.fence.sync.aligned; ", "add.f32 %f8, %f1, %f1; "
MADE = "add.f32 %f8, 0f00000000, 0f00000000; "
USED = "add.f32 %f1, %f1, %f1; "
PRODUCTS = {  # what four warps do
    OPERANDS + FENCE + BARRIER + ZERO + START + PRODUCT + WAIT + READ + BARRIER + OPERANDS: None,
    OPERANDS + FENCE + BARRIER + START + PRODUCT + WAIT + OPERANDS: "write after a read by a product of warp groups",
    OPERANDS + BARRIER + ZERO + START + PRODUCT + WAIT: "shared operand of a product without fence.proxy.async",
    OPERANDS + FENCE + ZERO + START + PRODUCT + WAIT: "race: shared read after a write by another warp",
    OPERANDS + FENCE + BARRIER + ZERO + PRODUCT + WAIT: "operand registers without wgmma.fence",
    OPERANDS + FENCE + BARRIER + PRODUCT + WAIT: "operand registers without wgmma.fence",
    OPERANDS + FENCE + BARRIER + START + ZERO + PRODUCT + WAIT: "operand registers without wgmma.fence",
    OPERANDS + FENCE + BARRIER + MADE + START + COPY + PRODUCT + WAIT: None,
    OPERANDS + FENCE + BARRIER + START + MADE + COPY + PRODUCT + WAIT: "operand registers without wgmma.fence",
    OPERANDS + FENCE + BARRIER + START + PRODUCT + PRODUCT + WAIT + READ + START + PRODUCT + WAIT: None,
    OPERANDS + FENCE + BARRIER + START + PRODUCT + WAIT + READ + PRODUCT + WAIT: "registers without wgmma.fence",
    OPERANDS + FENCE + BARRIER + START + MADE + "mov.f32 %f7, %f8; mov.f32 %f1, %f7; " + PRODUCT: "wgmma.fence",
    OPERANDS + FENCE + BARRIER + START + USED + "@%p2 " + COPY + PRODUCT + WAIT: "without wgmma.fence",
    OPERANDS + FENCE + BARRIER + START + USED + COPY + PRODUCT + WAIT: "without wgmma.fence",
    OPERANDS + FENCE + BARRIER + START + PRODUCT + READ + WAIT: "register of a product in flight touched",
    OPERANDS + FENCE + BARRIER + START + PRODUCT + OPERANDS + WAIT: "write after a read by a product of warp groups",
}


@pytest.mark.parametrize("body", PRODUCTS)
@pytest.mark.parametrize("order", ORDERS)
def test_faults_of_products(emulator, order, body):
    """Products of a group of four warps: fences before them, and what is theirs until they are waited for."""
    log, expected = emulator.Log(order), PRODUCTS[body]
    setup = ".reg .f32 %f<9>; shl.b32 %r7, %r1, 4; add.s32 %r6, %r4, %r7; mov.b32 %r8, 0; "
    descriptor = (1 << 46) + (8 << 32) + (64 << 16) + (1024 >> 4)  # rows of 128 bytes, from the first byte on
    body = setup + f"mov.b64 %rd3, {descriptor}; mov.pred %p1, 1; " + body
    words = torch.zeros(64, dtype=torch.int32)
    emulator.run(emulator.Program.parse(PTX.replace("BODY", body), "kernel"), 1, 128, 4096, [words], log)
    found = "\n".join(map(str, log.faults))
    assert (expected in found) if expected else not found, found
