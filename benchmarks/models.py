"""The benchmark of whole models: inference and training steps, images per second.

Eager is the same model on the reference backend, plain PyTorch. timm and torchvision have their own model with the same
weights, where they have one. "no attention" is the model with layers that only project: what would be left if attention
took no time, and so the most that a fused one can gain. Of the cases "accelerate-*" eager is a library's model as it is
shipped, and vitkernels' is the same after `accelerate`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
import workload
from report import NO_ATTENTION
from torch import Tensor, nn
from workload import OURS

from vitkernels import (
    FeatureSpaceAttention,
    LongShortDistanceAttention,
    MaxSA,
    MultiScaleAttention,
    WindowAttention,
    accelerate,
    use_backend,
)
from vitkernels.models import create_model, load_checkpoint

OFF = {torch.float32: 1e-3, torch.float64: 1e-9}  # of the largest logit; a twentieth in half precision


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def _only_project(layer: nn.Module) -> None:
    """Attention layer ``layer`` without its attention: values are the output."""

    def tokens(x: Tensor) -> Tensor:
        return layer.proj(layer.qkv(x)[..., : layer.dim])

    def pooled(x: Tensor, thw: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        size = tuple(-(-n // s) for n, s in zip(thw, layer.stride_q))
        kept = int(layer.has_cls) + torch.Size(size).numel()
        return layer.proj(layer.qkv(x)[:, :kept, : layer.dim_out]), size

    layer.forward = pooled if isinstance(layer, MultiScaleAttention) else tokens


def without_attention(model: nn.Module) -> nn.Module:
    kinds = (LongShortDistanceAttention, WindowAttention, MaxSA, FeatureSpaceAttention, MultiScaleAttention)
    for module in model.modules():
        if isinstance(module, kinds):
            _only_project(module)
    model.without_attention = True
    return model


def _torchvision() -> ModuleType:
    """Beside a CPU build of torch its wheel lacks its operators, whose names are all that its import needs."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        _LIBRARIES.append(library)
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision")


_LIBRARIES: list[torch.library.Library] = []  # which live as long as torchvision


def theirs(name: str) -> nn.Module:
    """A library's model without stochastic depth, "timm maxvit_tiny_tf_224", say."""
    library, name = name.split()
    models = _torchvision().models  # timm imports it too
    if library == "timm":
        return importlib.import_module("timm").create_model(name, drop_path_rate=0.0)
    make = partial(models.maxvit_t, input_size=(224, 224)) if name == "maxvit_t" else getattr(models, name, None)
    model = (make or getattr(models.video, name))()
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


@dataclass
class Model(workload.Workload):
    """Images and labels, and the contenders' models, all with the same weights."""

    modes: ClassVar = ("fwd", "full")  # inference; a training step without its optimiser
    whole: ClassVar = True
    baselines: ClassVar[dict[str, Callable | None]] = dict.fromkeys(("eager", "timm", "torchvision", NO_ATTENTION))

    case: Case
    model: nn.Module
    other: nn.Module | None
    images: Tensor  # [B, 3, H, W] or [B, 3, T, H, W]
    labels: Tensor  # [B]
    dtype: torch.dtype

    @classmethod
    def random(cls, case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> Model:
        torch.manual_seed(0)
        model = create_model(case.model, drop_path=0.0, **({"dropout": 0.0} if "mvit" in case.model else {}))
        other = None
        if case.twin and importlib.util.find_spec(case.twin.split()[0]):
            other = theirs(case.twin)
            with tempfile.TemporaryDirectory() as folder:
                torch.save(other.state_dict(), Path(folder) / "weights.pth")
                load_checkpoint(model, Path(folder) / "weights.pth")
            other = other.to(device)
        images = torch.randn(batch, 3, *case.size, device=device)
        labels = torch.randint(model.num_classes, (batch,), device=device)
        return cls(case, model.to(device), other, images, labels, dtype)

    def double(self) -> Model:
        raise NotImplementedError("models are compared with eager in the dtype that is measured")

    def build(self, name: str) -> nn.Module:
        if name in ("timm", "torchvision"):
            if self.other is None or name != self.case.twin.split()[0]:
                raise ModuleNotFoundError(f"no {name} model, or no {name} here")
            return self.other
        model = copy.deepcopy(self.model)
        model.backend = name.removeprefix(OURS) if name.startswith(OURS) else "reference"
        return without_attention(model) if name == NO_ATTENTION else model

    def _precision(self) -> AbstractContextManager:
        half = self.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.images.device.type, self.dtype) if half else nullcontext()

    def output(self, contender: nn.Module) -> Tensor:
        with self._precision():
            return contender(self.images)

    def leaves(self) -> list[Tensor]:
        raise NotImplementedError("a training step computes the gradients of the model's parameters")

    def forward(self, contender: nn.Module) -> Tensor:
        contender.eval()
        with torch.no_grad():
            return self.output(contender)

    def full(self, contender: nn.Module) -> None:
        contender.train()
        F.cross_entropy(self.output(contender).float(), self.labels).backward()
        contender.zero_grad(set_to_none=True)

    def tensors(self, contender: nn.Module, gradients: bool) -> dict[str, Tensor]:
        """Of two images."""
        few = replace(self, images=self.images[:2].clone().requires_grad_(gradients), labels=self.labels[:2])
        contender.eval()
        with torch.set_grad_enabled(gradients):
            logits = few.output(contender).float()
        found = {"logits": logits.detach()}
        if gradients:
            found["images' gradient"] = torch.autograd.grad(F.cross_entropy(logits, few.labels), few.images)[0]
        return found

    def expected(self, gradients: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the gate compares with, and how far off it a contender may be, of its norm."""
        tensors = self.tensors(self.build("eager"), gradients)
        return tensors, dict.fromkeys(tensors, OFF.get(self.dtype, 0.05))

    def gate(self, gradients: bool) -> Callable[[nn.Module], str | None]:
        expected, allowed = self.expected(gradients)

        def objection(contender: nn.Module) -> str | None:
            if getattr(contender, "without_attention", False):
                return None
            for name, found in self.tensors(contender, gradients).items():
                error = distance(found, expected[name])
                if not error <= allowed[name]:
                    return f"{name} off by {error:.2e}, allowed {allowed[name]:.1e}"
            return None

        return objection


@dataclass
class Accelerated(Model):
    """A library's model as it is shipped, and a copy of it after `accelerate`."""

    baselines: ClassVar = {"eager": None}

    @classmethod
    def random(cls, case: AcceleratedCase, batch: int, device: torch.device, dtype: torch.dtype) -> Accelerated:
        torch.manual_seed(0)
        model = theirs(case.model).to(device)
        for module in model.modules():  # Swin V2 begins with norms of zero, behind which any attention would be right
            if isinstance(module, nn.LayerNorm) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.2)
        images = torch.randn(batch, 3, *case.size, device=device)
        return cls(case, model, None, images, torch.randint(400, (batch,), device=device), dtype)

    def build(self, name: str) -> nn.Module:
        if not name.startswith(OURS):
            return self.model
        model = copy.deepcopy(self.model)
        if not accelerate(model).replaced:
            raise RuntimeError(f"vitkernels cannot run in {self.case.model} here: `print(accelerate(model))` says why")
        model.backend = name.removeprefix(OURS)
        return model

    def output(self, contender: nn.Module) -> Tensor:
        with use_backend(getattr(contender, "backend", None)):
            return super().output(contender)

    def expected(self, gradients: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        """As of a layer, twice the error that the model has as it is shipped: MViT's skip path takes maxima, where
        rounding decides, and float32 is off by more than a thousandth.
        """
        exact = replace(self, images=self.images.double(), dtype=torch.float64)
        truth = exact.tensors(copy.deepcopy(self.model).double(), gradients)
        shipped = self.tensors(self.model, gradients)
        least = OFF.get(self.dtype, 0.05)
        return truth, {name: max(least, 2 * distance(shipped[name], x)) for name, x in truth.items()}


@dataclass(frozen=True)
class Case(workload.Case):
    """A model of `vitkernels.models`, and whose model it also is."""

    model: str
    twin: str | None = None  # library and name
    size: tuple[int, ...] = (224, 224)  # pixels, after the frames of a video

    kind: ClassVar = Model

    def describe(self) -> str:
        return f"{self.model}, {' x '.join(map(str, self.size))}" + (f", {self.twin}" if self.twin else "")


@dataclass(frozen=True)
class AcceleratedCase(workload.Case):
    """A library's model."""

    model: str  # library and name
    size: tuple[int, ...] = (224, 224)  # pixels, after the frames of a video

    kind: ClassVar = Accelerated

    def describe(self) -> str:
        return f"{self.model}, {' x '.join(map(str, self.size))}"


CASES = (
    Case("crossformer-s", "crossformer_small"),
    Case("crossformer-s-800x1344", "crossformer_small", size=(800, 1344), cpu_batch=1, gpu_batch=8),
    Case("crossformer++-s", "crossformer_pp_small"),
    Case("boat-swin-t", "boat_swin_tiny"),
    Case("boat-cswin-t", "boat_cswin_tiny"),
    Case("maxvit-t", "maxvit_tiny", "timm maxvit_tiny_tf_224"),
    Case("mvitv2-t", "mvit_v2_tiny", "timm mvitv2_tiny"),
    Case("mvitv2-s-16x4", "mvit_v2_small_16x4", "torchvision mvit_v2_s", (16, 224, 224), cpu_batch=1, gpu_batch=8),
    AcceleratedCase("accelerate-timm-swin-t", "timm swin_tiny_patch4_window7_224"),
    AcceleratedCase("accelerate-timm-swin-v2-t", "timm swinv2_tiny_window8_256", (256, 256)),
    AcceleratedCase("accelerate-timm-maxvit-t", "timm maxvit_tiny_tf_224"),
    AcceleratedCase("accelerate-timm-maxvit-t-rw", "timm maxvit_tiny_rw_224"),
    AcceleratedCase("accelerate-timm-mvitv2-t", "timm mvitv2_tiny"),
    AcceleratedCase("accelerate-torchvision-swin-t", "torchvision swin_t"),
    AcceleratedCase("accelerate-torchvision-swin-v2-t", "torchvision swin_v2_t", (256, 256)),
    AcceleratedCase("accelerate-torchvision-maxvit-t", "torchvision maxvit_t"),
    AcceleratedCase(
        "accelerate-torchvision-mvit-v1-b", "torchvision mvit_v1_b", (16, 224, 224), cpu_batch=1, gpu_batch=8
    ),
    AcceleratedCase(
        "accelerate-torchvision-mvit-v2-s", "torchvision mvit_v2_s", (16, 224, 224), cpu_batch=1, gpu_batch=8
    ),
)
