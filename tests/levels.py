"""The C++ library's vector levels, and code in a process that uses one of them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

from vitkernels import _native

LEVELS = ("avx512", "avx2", "default")
ROOT = Path(__file__).parents[1]


def run_at(level: str, code: str, *arguments: str) -> str:
    """What Python prints for ``code``, in a process of its own, with the vectors of ``level`` ("": as they are)."""
    environment = os.environ | ({"VITKERNELS_CPU_CAPABILITY": level} if level else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def supported(level: str) -> bool:
    """Whether this machine runs code for ``level``."""
    if level == "default":
        return True
    if not _native.cpu.available or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return LEVELS.index(level) >= LEVELS.index(_native.capability())
