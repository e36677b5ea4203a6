"""What a kind of operator brings to the benchmark: its cases, their inputs, its contenders, and when one is right.

One file per kind (partition_attention.py, cluster_attention.py, pooled_attention.py) has the three that run.py asks
for: a `Case`, a `Workload`, and ``BASELINES``, the operator as one writes it with PyTorch alone.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

MODES = ("fwd", "bwd", "full")  # full: forward and backward
OURS = "vitkernels-"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Contender = Any  # what a workload's `output` takes: as a rule a function of the inputs


@dataclass(frozen=True)
class Case(ABC):
    """What is measured, and by ``kind`` how; batch sizes are those of a usual run on a CPU and on a GPU."""

    name: str
    _: KW_ONLY
    cpu_batch: int = 8
    gpu_batch: int = 128

    def batch(self, device: str) -> int:
        return self.gpu_batch if device == "cuda" else self.cpu_batch

    @abstractmethod
    def describe(self) -> str:
        """It in words."""


@dataclass(frozen=True)
class Layer(Case):
    """One layer of a published model."""

    height: int  # tokens
    width: int  # tokens
    heads: int
    _: KW_ONLY
    head_dim: int = 32
    kind: ClassVar[type[Workload]]

    @property
    def dim(self) -> int:
        """Channels, C."""
        return self.heads * self.head_dim


def select(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Cases whose names match, in the order of the patterns."""
    matching = (case for pattern in patterns for case in cases if fnmatch.fnmatchcase(case.name, pattern))
    return list(dict.fromkeys(matching))


class Workload(ABC):
    """Inputs of one case, the same for every contender."""

    modes: ClassVar[tuple[str, ...]] = MODES  # passes of the operator
    gpu: ClassVar[str] = "triton"  # vitkernels' backend for CUDA tensors
    whole: ClassVar[bool] = False  # whether it is a model, which is rated in images per second and has no floor
    baselines: ClassVar[dict[str, Callable]]  # "eager", which the others are measured against, is one of them

    case: Case
    dout: Tensor | tuple[Tensor, ...]

    @classmethod
    @abstractmethod
    def random(cls, case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> Workload:
        """Seeded inputs."""

    @abstractmethod
    def double(self) -> Workload:
        """The same numbers in float64."""

    @abstractmethod
    def build(self, name: str) -> Contender:
        """A contender: a name of `baselines`, or a backend after ``OURS``."""

    @abstractmethod
    def output(self, contender: Contender) -> Tensor | tuple[Tensor, ...]:
        """What is timed; as many tensors as `dout`."""

    @abstractmethod
    def leaves(self) -> list[Tensor]:
        """The inputs that have a gradient."""

    def forward(self, contender: Contender) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return self.output(contender)

    def full(self, contender: Contender) -> tuple[Tensor, ...]:
        """Gradients of `leaves`."""
        return torch.autograd.grad(self.output(contender), self.leaves(), self.dout)

    def call(self, contender: Contender, mode: str) -> Callable[[], object]:
        """One pass, to be timed."""
        if mode != "bwd":
            return partial(self.forward if mode == "fwd" else self.full, contender)
        return partial(torch.autograd.grad, self.output(contender), self.leaves(), self.dout, retain_graph=True)

    def gradients(self, contender: Contender) -> dict[str, Tensor]:
        """Gradients by name, as the gate compares them."""
        return {"qkv gradient": self.full(contender)[0]}

    def tensors(self, contender: Contender, gradients: bool) -> dict[str, Tensor]:
        """What the gate compares."""
        return {"output": self.forward(contender), **(self.gradients(contender) if gradients else {})}

    def gate(self, gradients: bool) -> Callable[[Contender], str | None]:
        """A function that says why a contender must not be timed, or None."""
        return Contract(self, gradients).objection


class Contract:
    """Accepts a contender whose error is at most twice that of the reference in the same dtype, plus two roundings."""

    def __init__(self, workload: Workload, gradients: bool):
        self.workload, self.gradients = workload, gradients
        reference = workload.build(OURS + "reference")
        self.truth = workload.double().tensors(reference, gradients)
        low = workload.tensors(reference, gradients)
        rounding = 2 * torch.finfo(next(iter(low.values())).dtype).eps
        errors = {k: self._error(k, low[k]) for k in self.truth}
        # no measure where PyTorch leaves a gradient unwritten, as some of depthwise convolutions on CPUs with AMX
        errors = {k: error if math.isfinite(error) else 0.0 for k, error in errors.items()}
        self.bounds = {k: 2 * errors[k] + rounding * x.abs().max().item() for k, x in self.truth.items()}

    def _error(self, name: str, found: Tensor) -> float:
        return (found.double() - self.truth[name]).abs().max().item()

    def allowing(self, tensors: dict[str, Tensor]) -> Contract:
        """The same, but with at least twice the error of ``tensors`` allowed."""
        wider = copy.copy(self)
        wider.bounds = {k: max(bound, 2 * self._error(k, tensors[k])) for k, bound in self.bounds.items()}
        return wider

    def objection(self, contender: Contender) -> str | None:
        return self.judge(self.workload.tensors(contender, self.gradients))

    def judge(self, tensors: dict[str, Tensor]) -> str | None:
        """Why these are not right, each that is not, or None."""
        return "; ".join(filter(None, (self._wrong(*named) for named in tensors.items()))) or None

    def _wrong(self, name: str, found: Tensor) -> str | None:
        if found.shape != self.truth[name].shape:
            return f"{name} has shape {list(found.shape)}, expected {list(self.truth[name].shape)}"
        error = self._error(name, found)
        if not error <= self.bounds[name]:  # a NaN is refused too
            return f"{name} is off by {error:.2e}, allowed {self.bounds[name]:.2e}"
        return None


def compiled(function: Callable) -> Callable:
    """torch.compile of a baseline."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the pass "bwd" runs the backward of one graph many times
    return torch.compile(function, dynamic=False)
