"""Compiled kernels, run without a GPU by the emulator of tools/ptx: the numerical contract, and no fault."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRITON_REFUSAL
from emulated_cases import CASES

if TRITON_REFUSAL is not None:
    pytest.skip(TRITON_REFUSAL, allow_module_level=True)

SCRIPT = Path(__file__).with_name("emulated_cases.py")
LAST_BIT = (
    "a sum is held by several lanes, whose additions the compiler ordered or fused in different ways: it differs in its"
    " last bit, and which lane's is kept may differ between runs"
)
KNOWN = {  # case: the kernels whose lanes write different values to one place, and why that stays
    "table of an MLP of 24, 12 heads": {"_dynamic_position_bias_backward": LAST_BIT},
    "pooled, 129 columns, fp32": {"attention_backward_query": LAST_BIT},
}


@pytest.fixture
def results(once):
    """``results(chip)``: what was found of every case, from one process."""

    def write(chip: int, path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, SCRIPT, str(chip)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        path.write_text(done.stdout)

    return lambda chip: json.loads(once(f"emulated_{chip}.json", functools.partial(write, chip)).read_text())


@pytest.mark.parametrize("chip, name", [(chip, name) for chip, cases in CASES.items() for name in cases])
def test_compiled_kernels(results, chip, name):
    """A case whose faults are known has them: one that is gone leaves the list."""
    found = results(chip)[name]
    known = set(KNOWN.get(name, {}))
    others = [f["text"] for f in found["faults"] if not (f["kernel"] in known and "different values" in f["kind"])]
    assert not others, "\n".join(others)
    assert not found["error"], found["error"]
    assert {f["kernel"] for f in found["faults"]} == known and found["launches"]
