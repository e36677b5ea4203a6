"""Which backend runs an operator, and how operators are registered with torch.library.

Every operator is one schema in the namespace ``vitkernels``. Its CUDA implementation is a Triton launcher, imported
at the first call, or registered by the CUDA library when that loads; its CPU implementation is registered by the C++
library. With ``TRITON_INTERPRET=1`` a twin named ``<operator>_interpreted`` runs the Triton launcher on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import platform
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import partial, wraps

import torch
from torch import Tensor
from torch.autograd import Function

from . import _native

BACKENDS = ("triton", "cuda", "cpu", "sdpa", "reference")
LIBRARY = torch.library.Library("vitkernels", "DEF")
_TRITON = importlib.util.find_spec("triton") is not None  # a graph that is traced cannot ask in torch 2.11


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def define(name: str, schema: str, fake: Callable, launcher: str | None) -> None:
    """Register operator ``name``.

    Args:
        fake: makes outputs of the right shape from the operator's arguments; ``interpreted=``: whether for the twin.
        launcher: the module whose function ``name`` launches the Triton kernels; None where the CUDA library has them.
    """

    def launch(*args):
        return getattr(importlib.import_module(launcher), name)(*args)

    def register(name: str, key: str, interpreted: bool) -> None:
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"vitkernels::{name}", partial(fake, interpreted=interpreted), lib=LIBRARY)
        if launcher is not None:
            LIBRARY.impl(name, launch, key)

    register(name, "CUDA", False)
    if launcher is not None and interpreted():
        register(f"{name}_interpreted", "CPU", True)


class _Positional(inspect.Signature):
    """Of a function of ``*inputs``: there is nothing to bind them to, and no time spent on it."""

    def bind(self, *inputs):
        return _Bound(self, OrderedDict(inputs=inputs))


class _Bound(inspect.BoundArguments):
    args = property(lambda self: self.arguments["inputs"])

    def apply_defaults(self) -> None:
        pass


def with_signature(forward: Callable) -> Callable:
    """``forward(*inputs)`` of an autograd.Function, whose signature autograd looks up and binds at every call, with one
    at hand that takes no time.
    """
    forward.__signature__ = _Positional(inspect.signature(forward).parameters.values())
    return forward


class _First(Function):
    """Gradients as they are, with all that they depend on behind them: a path that asks for more ends here."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "vitkernels' kernels have first derivatives only, and a second one was asked for (create_graph=True); "
            "backend='reference', or use_backend('reference'), has all"
        )


def first_derivative(backward: Callable) -> Callable:
    """``backward`` of an autograd.Function, whose gradients cannot be differentiated: that is an error on every path.
    (PyTorch's `once_differentiable` leaves the path from them to the saved tensors out, which then seems to have a
    derivative of zero.)
    """

    @wraps(backward)
    def once(ctx, *douts):
        with torch.no_grad():
            gradients = backward(ctx, *douts)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients
        causes = [x for x in (*douts, *ctx.saved_tensors) if x is not None and x.requires_grad]
        wanted = [x for x in gradients if x is not None]
        if not causes or not wanted:
            return gradients
        guarded = iter(_First.apply(len(wanted), *wanted, *causes))
        return tuple(x if x is None else next(guarded) for x in gradients)

    return once


def recorded(*inputs: object) -> bool:
    """Whether a call on ``inputs`` is recorded for autograd.

    In a graph that is traced it is recorded only if an input requires a gradient. Otherwise dynamo would call the
    forward of the autograd.Function itself, with a context that it does not take.
    """
    if not torch.is_grad_enabled():
        return False
    traced = torch.compiler.is_compiling()
    return not traced or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def run(function: type[Function], *inputs: object) -> object:
    """What ``function`` makes of ``inputs``, recorded for autograd where that is needed."""
    return function.apply(*inputs) if recorded(*inputs) else function.forward(*inputs)


def operator(name: str, backend: str, device: torch.device) -> Callable:
    """The registered operator ``name`` as ``backend`` runs it on ``device``."""
    suffix = "_interpreted" if backend == "triton" and device.type == "cpu" else ""
    return getattr(torch.ops.vitkernels, name + suffix).default


def _triton_absent() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if torch.version.hip and not interpreted():
        return f"the kernels are compiled for NVIDIA GPUs only, and torch {torch.__version__} is built for AMD's (ROCm)"
    if not _TRITON:
        return "triton is not installed (it comes with CUDA builds of torch on Linux; otherwise: pip install triton)"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device; set TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, on CPU tensors"
    return None


def _cuda_absent() -> str | None:
    """Why the CUDA library's kernels cannot run here, or None."""
    if not _native.cuda.available:
        return _native.cuda.reason
    return None if torch.cuda.is_available() else "no CUDA device"


def _cpu_absent() -> str | None:
    """Why the C++ kernels cannot run here, or None."""
    return None if _native.cpu.available else _native.cpu.reason


_ABSENT: dict[str, Callable[[], str | None]] = {
    "triton": _triton_absent,
    "cuda": _cuda_absent,
    "cpu": _cpu_absent,
    "sdpa": lambda: None,
    "reference": lambda: None,
}


def absent(backend: str) -> str | None:
    """Why ``backend`` cannot run here, or None."""
    return _ABSENT[backend]()


_FAMILIES = ("triton", "cpu", "reference")  # that every operator has
_in_use: list[use_backend] = []  # blocks that are entered and not yet left, in the order in which they were entered


class use_backend(ContextDecorator):
    """A block in which operators that are called without a backend, as layers and models do, run on this one.

    ``with use_backend("reference"): model(images)`` runs a model unfused, from the same weights; ``@use_backend(...)``
    above a function does so whenever it runs. An operator that cannot run there refuses; the clustering, which has no
    Triton kernels, runs on what serves its device. A backend that is given to an operator, a layer or a model comes
    before this one.

    The block holds for all threads of the process: autograd's threads recompute activations where they ran before.
    Where blocks overlap, the one entered last holds, and whichever is left first takes only itself away. A graph that
    torch.compile made is compiled anew.

    Args:
        backend: "triton", "cpu" or "reference"; None chooses by device, as without it.

    Raises:
        ValueError: no such backend, or one that single operators have.
    """

    _unused = False

    def __init__(self, backend: str | None):
        if backend is not None:
            check_family(backend)
        self.backend, self._unused = backend, True

    def __enter__(self) -> None:
        self._unused = False
        _in_use.append(self)

    def __exit__(self, *_) -> None:
        _in_use.remove(self)

    def __call__(self, function: Callable) -> Callable:
        self._unused = False
        return super().__call__(function)

    def _recreate_cm(self) -> use_backend:
        """A block for one call of the function below the decorator; torch.compile enters only those it sees made."""
        return use_backend(self.backend)

    def __del__(self) -> None:
        if self._unused:
            warnings.warn(
                f"use_backend({self.backend!r}) had no effect: write `with use_backend({self.backend!r}):` before the "
                f"calls, or @use_backend({self.backend!r}) above a function; create_model(..., backend=...) and the "
                "attribute `backend` of layers and models last",
                RuntimeWarning,
                stacklevel=2,
            )


def check_family(backend: object) -> None:
    """``backend`` is one that every operator has."""
    if backend not in _FAMILIES:
        single = " (an operator takes it as its argument)" if backend in BACKENDS else ""
        raise ValueError(f"backend must be one of {', '.join(_FAMILIES)} or None, got {backend!r}{single}")


def asked(backend: str | None, gpu: str = "triton") -> str | None:
    """``backend``, or else the one that `use_backend` asks for; None where the device decides."""
    if backend is None:
        backend = next((block.backend for block in _in_use[-1:]), None)  # never fails if another thread leaves a block
        if backend == "triton" != gpu:
            return None
    return backend


def default(device: torch.device, gpu: str) -> str:
    """CUDA tensors: ``gpu``; the reference without the CUDA library, which is an option when vitkernels is built, and
    on AMD GPUs. CPU tensors: C++ if it is built, else the reference. Other devices: the reference.
    """
    if device.type == "cuda":
        return "reference" if (gpu == "cuda" or torch.version.hip) and absent(gpu) else gpu
    return "cpu" if device.type == "cpu" and _native.cpu.available else "reference"


def _wrong_device(backend: str, device: torch.device) -> str | None:
    if backend == "cpu" and device.type != "cpu":
        return f"it takes CPU tensors, got {device}"
    if backend == "cuda" and device.type != "cuda":
        return f"it takes CUDA tensors, got {device}"
    if backend == "triton" and device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it takes CUDA tensors, got {device} (TRITON_INTERPRET=1 would interpret the kernels on CPU tensors)"
    return None


def _without_kernels(backend: str, gpu: str, others: tuple[str, ...]) -> str | None:
    if backend not in (gpu, "cpu", *others):
        return f"it has no kernels for that; backend={gpu!r} is what runs on CUDA tensors"
    return None


def select(
    name: str,
    device: torch.device,
    backend: str | None,
    refusal: Callable[[str], str | None] = lambda backend: None,
    gpu: str = "triton",
    others: tuple[str, ...] = (),
) -> str:
    """The backend that runs operator ``name``: ``backend`` if it is given, else what `use_backend` asks for, else the
    device's own. Never another one.

    Args:
        refusal: says why a backend cannot run this call, or None.
        gpu: where the operator's kernels for CUDA tensors are: "triton" or "cuda".
        others: backends that this operator has beside that, "cpu" and "reference".

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run here or cannot run this call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    chosen = asked(backend, gpu) or default(device, gpu)
    if chosen == "reference":
        return chosen
    why = _without_kernels(chosen, gpu, others) or absent(chosen) or _wrong_device(chosen, device) or refusal(chosen)
    if why:
        raise RuntimeError(f"{chosen} cannot run {name}: {why}. backend='reference' runs anywhere")
    return chosen


class Info(dict):
    """What `info` found; prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in self.items())

    __repr__ = __str__


def _version(package: str) -> str:
    try:
        return importlib.import_module("importlib.metadata").version(package)
    except Exception:
        return "not installed"


def info() -> Info:
    """Versions, devices and backends; for a backend that is absent, why.

    Returns:
        A dict of strings that prints as a table.
    """
    found = Info()
    found["vitkernels"] = _version("vitkernels")
    found["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    platforms = (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
    found["torch"] = ", ".join([torch.__version__, *(f"{name} {version}" for name, version in platforms if version)])
    found["triton"] = _version("triton") + _prefetch()
    found["threads"] = str(torch.get_num_threads())
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["CUDA devices"] = ", ".join(devices) or "none"
    for backend in BACKENDS:
        why = absent(backend)
        found[f"backend {backend}"] = f"absent: {why}{_consequence(backend)}" if why else _describe(backend)
    return found


def _prefetch() -> str:
    """What the installed Triton costs on the GPUs that are here."""
    if absent("triton") or not torch.cuda.is_available():
        return ""
    from ._triton import unfenced

    devices = range(torch.cuda.device_count())
    slow = [i for i in devices if unfenced(10 * (found := torch.cuda.get_device_capability(i))[0] + found[1])]
    where = " and ".join(torch.cuda.get_device_name(i) for i in slow)
    return f": prefetch is off on {where}; 3.7.1 or later has it" if slow else ""


def _consequence(backend: str) -> str:
    """What runs instead of an absent backend where its absence costs time."""
    if backend == "triton" and torch.version.hip:
        return "; operators run on these GPUs as PyTorch operations, the reference, the slow way"
    if backend == "cuda" and torch.cuda.is_available():
        return "; balanced_clusters runs on CUDA tensors as batched PyTorch operations, the slow way"
    return ""


def _describe(backend: str) -> str:
    if backend == "triton":
        return "available, interpreted on CPU tensors" if interpreted() else "available, the default for CUDA tensors"
    if backend == "cuda":
        return "available, the default of balanced_clusters for CUDA tensors"
    if backend == "sdpa":
        return "available, the default of pooled_attention on GPUs (and large maps on CPUs) without relative positions"
    if backend == "cpu":
        return f"available, the default for CPU tensors; vectors: {_native.capability()}"
    defaults = [] if _native.cpu.available else ["CPU tensors while the C++ library is absent"]
    if torch.version.hip:
        defaults.append("CUDA tensors, which here are on AMD GPUs")
    return "available" + (f", the default for {' and for '.join(defaults)}" if defaults else "")
