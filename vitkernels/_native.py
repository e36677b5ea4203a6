"""The C++ and CUDA libraries: loaded here, once, when the package is imported."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from pathlib import Path
from typing import NamedTuple

import torch


class Library(NamedTuple):
    """A native library, or the reason why it is not there and what to do about it."""

    handle: ctypes.CDLL | None
    reason: str

    @property
    def available(self) -> bool:
        return self.handle is not None


def _find(name: str) -> Path | None:
    """The library beside this file, whatever suffix the build gave it."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    paths = (Path(__file__).with_name(f"{name}{suffix}") for suffix in suffixes)
    return next((path for path in paths if path.exists()), None)


HOW_TO_BUILD = "reinstall vitkernels with 'pip install --no-build-isolation' where torch{} installed"


def _load(name: str, kind: str, remedy: str) -> Library:
    path = _find(name)
    if path is None:
        return Library(None, f"the {kind} library was not built; {remedy}")
    try:
        return Library(ctypes.CDLL(str(path)), "")
    except OSError as error:
        return Library(
            None, f"{path.name} does not load: {error}; it needs torch 2.10 or later, this is {torch.__version__}"
        )


_CAPABILITIES = ("default", "avx2", "avx512")
_LIMIT = os.environ.get("VITKERNELS_CPU_CAPABILITY") or "avx512"
if _LIMIT not in _CAPABILITIES:
    raise ValueError(
        f"the environment variable VITKERNELS_CPU_CAPABILITY must be one of {', '.join(_CAPABILITIES)}, got {_LIMIT!r}"
    )

cpu = _load("_C", "C++", f"{HOW_TO_BUILD.format(' is')} (VITKERNELS_NATIVE=1 shows why a build fails)")
if torch.version.cuda:
    cuda = _load("_CUDA", "CUDA", f"{HOW_TO_BUILD.format(' and nvcc are')} (VITKERNELS_CUDA=1 shows why a build fails)")
else:
    cuda = Library(None, f"torch {torch.__version__} is built without CUDA")


def capability() -> str:
    """The vector instructions in use: "avx512", "avx2", or "default", what every processor of the kind has.

    These are the best that the processor has, or lower ones that VITKERNELS_CPU_CAPABILITY named before the import.
    """
    if cpu.handle is None:
        raise RuntimeError(cpu.reason)
    cpu.handle.vitkernels_cpu_capability.restype = ctypes.c_char_p
    return cpu.handle.vitkernels_cpu_capability().decode()
