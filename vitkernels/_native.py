"""The C++ library: loaded here, once, when the package is imported."""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path

import torch

available: bool  # whether the C++ kernels can run here
reason: str  # why not, and what to do about it; empty where they can


def _find() -> Path | None:
    """The library beside this file, whatever suffix the build gave it."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    paths = (Path(__file__).with_name(f"_C{suffix}") for suffix in suffixes)
    return next((path for path in paths if path.exists()), None)


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and the reason."""
    path = _find()
    if path is None:
        return None, (
            "the C++ library was not built; with torch installed, reinstall vitkernels with "
            "'pip install --no-build-isolation' (VITKERNELS_NATIVE=1 shows why a build fails)"
        )
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return None, f"{path.name} does not load: {error}; it needs torch 2.10 or later, this is {torch.__version__}"


_library, reason = _load()
available = _library is not None


def capability() -> str:
    """The vectors in use: "avx512", "avx2" or "default", what every processor of the kind has.

    The best that the processor has; VITKERNELS_CPU_CAPABILITY, set to one of them before the import, lowers it.
    """
    if _library is None:
        raise RuntimeError(reason)
    _library.vitkernels_cpu_capability.restype = ctypes.c_char_p
    return _library.vitkernels_cpu_capability().decode()
