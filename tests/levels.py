"""The C++ library's vector levels, and code in a process that uses one of them."""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

from vitkernels import _native

LEVELS = ("avx512", "avx2", "default")  # the best first
ROOT = Path(__file__).parents[1]


def run_at(level: str, code: str) -> str:
    """What Python prints for ``code``, in a process of its own, with the vectors of ``level`` ("": as they are)."""
    if not level:
        return _run({}, code)
    check = f"from vitkernels import _native\nassert _native.capability() == {level!r}, _native.capability()\n"
    return _run({"VITKERNELS_CPU_CAPABILITY": level}, check + code)


def _run(variables: dict[str, str], code: str) -> str:
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@functools.cache
def _best() -> str:
    """The best level of this machine, whatever this process was asked to use."""
    code = "from vitkernels import _native; print(_native.capability())"
    return _run({"VITKERNELS_CPU_CAPABILITY": LEVELS[0]}, code)


def supported(level: str) -> bool:
    """Whether this machine runs code for ``level``."""
    if level == "default":
        return True
    if not _native.cpu.available or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return LEVELS.index(level) >= LEVELS.index(_best())
