"""`accelerate`: fused attention in a model of another library, and the report of what it did."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import _dispatch
from .._checks import no_autocast
from . import crossformer, maxvit, mvit, swin
from .recipe import Recipe, Unsuitable, check_methods, dropout_rate, drops, expect, unusual

RECIPES = (*swin.RECIPES, *maxvit.RECIPES, *mvit.RECIPES, *crossformer.RECIPES)
_LIBRARIES = {recipe.name.partition(".")[0] for recipe in RECIPES if recipe.by_name} | {"vitkernels"}
OUTPUT_OFF, GRADIENT_OFF = 1e-4, 1e-3  # of the largest magnitude, in float32, for both ways to count as equal


class Replaced(NamedTuple):
    """A module whose attention is fused."""

    name: str  # within the model
    was: str  # library and class
    now: str  # what runs


class Skipped(NamedTuple):
    """A module that was recognised and left alone."""

    name: str
    was: str
    reason: str


class Report:
    """What `accelerate` did with a model; prints as a table.

    Attributes:
        replaced: the modules whose attention is fused now, also those that were before the call: `Replaced` tuples.
        skipped: the modules that were recognised and left alone: `Skipped` tuples.
    """

    def __init__(self, model: str):
        self.replaced: list[Replaced] = []
        self.skipped: list[Skipped] = []
        self._model = model
        self._bound: list[tuple[nn.Module, str]] = []
        self._undone = False

    def undo(self) -> None:
        """Give every module in ``replaced`` its own methods back; the model is as it was, whoever accelerated it."""
        for module, method in self._bound:
            _unbind(module, method)
        self._undone = True

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            wanted = [(recipe.library, recipe.name) for recipe in RECIPES if recipe.methods]
            return f"vitkernels: nothing to accelerate in {self._model}. Looked for:\n{_table(wanted)}"
        now = "ran fused attention until that was undone" if self._undone else "run fused attention"
        parts = [f"vitkernels: {len(self.replaced)} modules {now}, {len(self.skipped)} left alone"]
        if self.replaced:
            parts.append(_table([("module", "was", "runs now"), *self.replaced]))
        if self.skipped:
            parts.append(_table([("left alone", "is", "because"), *self.skipped]))
        return "\n\n".join(parts)

    __repr__ = __str__


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


# What stands in the modules


def run(function: Callable, module: nn.Module, method: str, *args, **kwargs) -> object:
    """``function`` in place of a method; the method itself where ``function`` does not serve the call."""
    traced = any(isinstance(arg, Proxy) for arg in (*args, *kwargs.values()))  # torch.fx knows the libraries' methods
    out = None if traced else function(module, *args, **kwargs)
    return getattr(type(module), method)(module, *args, **kwargs) if out is None else out


class Method(partial):
    """`run` in place of a method of a module, with the signature and the docstring of the method."""

    @property
    def _method(self) -> Callable:
        _, module, method = self.args
        return getattr(type(module), method).__get__(module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)

    @property
    def __doc__(self) -> str | None:
        return self._method.__doc__


def _ours(value: object) -> bool:
    return isinstance(value, partial) and value.func is run


def _places(module: nn.Module, recipe: Recipe) -> Iterator[tuple[nn.Module, str, Callable]]:
    """The modules and methods that a recipe replaces."""
    for path, function in recipe.methods.items():
        part, _, method = path.rpartition(".")
        yield module.get_submodule(part), method, function


def _bind(module: nn.Module, recipe: Recipe) -> None:
    for part, method, function in list(_places(module, recipe)):
        setattr(part, method, Method(run, function, part, method))


def _unbind(part: nn.Module, method: str) -> None:
    if _ours(vars(part).get(method)):
        delattr(part, method)


def _give_back(module: nn.Module, recipe: Recipe) -> None:
    """Give a module its own methods back: it was accelerated before it was changed."""
    for path in recipe.methods:
        part, _, method = path.rpartition(".")
        with suppress(AttributeError):  # it has no such part
            _unbind(module.get_submodule(part), method)


# What is replaced


def _class(module: nn.Module) -> type:
    """The module's class as its author wrote it; FSDP2 substitutes a subclass."""
    kind = type(module)
    return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 0)]


def _altered(module: nn.Module, base: type) -> bool:
    """Whether the class of ``module``, or of a part of it, is neither its library's nor PyTorch's."""
    known = {base.__module__.partition(".")[0], "torch"}
    return any(_class(part).__module__.partition(".")[0] not in known for part in module.modules())


def _recipe(kind: type) -> tuple[Recipe, type] | tuple[None, None]:
    """The recipe for ``kind`` or its nearest base class that has one, and that base class."""
    for base in kind.__mro__:
        for recipe in RECIPES:
            if recipe.fits(base) and (recipe.by_name or base.__module__.partition(".")[0] not in _LIBRARIES):
                return recipe, base
    return None, None


def _check(module: nn.Module, recipe: Recipe, base: type) -> tuple[str, bool]:
    """What will run, and whether it does already; raises Unsuitable."""
    try:
        now = recipe.check(module)
        attentions = [module.get_submodule(name) for name in recipe.attention]
        places = list(_places(module, recipe))
        for attn in attentions:
            if name := unusual(attn):
                kind = type(attn.get_submodule(name)).__name__
                raise Unsuitable(f"its {name} is a {kind}, which no kernel here computes")
        for part, method, _ in places:
            author = next((kind for kind in type(part).__mro__ if method in vars(kind)), None)
            expect(author is not None, f"its {type(part).__name__} has no {method}: is the library another version?")
            expect(author.__module__ == base.__module__, f"{author.__name__} has a {method} of its own")
            own = vars(part).get(method)
            expect(own is None or _ours(own), f"its {method} was replaced by something else before")
            check_methods(part, besides=("forward", method))
    except Unsuitable:
        raise
    except Exception as error:  # whatever else a class of this name may have in these places
        raise Unsuitable(f"it is not made as the published class is: {type(error).__name__}: {error}") from error
    done = all(method in vars(part) for part, method, _ in places)
    if rate := max(map(dropout_rate, attentions)):
        why = f"it drops attention weights while it is trained (rate {rate:g}), which no kernel here does"
        expect(done or not any(map(drops, attentions)), why)
        now += f"; as before while trained (attention dropout {rate:g})"
    if any(buffer.is_meta for buffer in module.buffers()):
        now += "; its buffers, on the meta device, are taken to be as published"
    return now, done


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _expect_kernels(module: nn.Module) -> None:
    """Raise `Unsuitable` unless kernels would run; with them every measured module gained, or lost only noise."""
    device = _device(module)
    backend = {"cuda": "triton", "cpu": "cpu", "meta": "reference"}.get(device.type)
    absent = _dispatch.absent(backend) if backend else "vitkernels has none"
    expect(not absent, f"there are no kernels for {device.type} here ({absent}): what would run is not faster")


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float32 and in eval mode with random parameters, as some fresh ones are zero."""
    twin = copy.deepcopy(module).float().eval()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.requires_grad_()
            p.normal_(std=0.5 if p.dim() < 2 or "rel" in name else p[0].numel() ** -0.5)
            if p.dim() == 1 and name.endswith("weight"):
                p += 1
    return twin


@contextmanager
def _precisely(device: torch.device) -> Iterator[None]:
    """A block with random numbers of its own, with gradients, and with float32 products that are float32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), no_autocast(device):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _compare(module: nn.Module, recipe: Recipe) -> None:
    """Raise `Unsuitable` unless both ways give one output and the same gradients on random parameters and inputs."""
    device = _device(module)
    expect(device.type != "meta", "both ways cannot be compared on the meta device; give the model memory first")
    with _precisely(device):
        try:
            plain = _twin(module)
            fused = copy.deepcopy(plain)
            _bind(fused, recipe)
            for args, _ in zip(recipe.inputs(plain), recipe.inputs(fused)):
                _expect_same(_results(plain, args, device), _results(fused, args, device))
        except Unsuitable:
            raise
        except Exception as error:  # of a forward that takes something else, of parameters that cannot be copied ...
            raise Unsuitable(f"both ways could not be compared: {type(error).__name__}: {error}") from error


def _results(module: nn.Module, args: tuple, device: torch.device) -> tuple[object, dict[str, Tensor]]:
    """The form of what a module returns, and the output and all gradients by name."""
    x, *others = (arg.to(device, copy=True) if isinstance(arg, Tensor) else arg for arg in args)
    returned = module(x.requires_grad_(), *others)
    out, *sizes = returned if isinstance(returned, tuple) else (returned,)
    form = type(returned), out.shape, out.dtype, [tuple(size) for size in sizes]
    leaves = {"input's gradient": x, **{f"{name}'s gradient": p for name, p in module.named_parameters()}}
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view(out.shape).cos()
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    return form, {"output": out.detach(), **{name: g for name, g in zip(leaves, grads) if g is not None}}


def _expect_same(results: tuple[object, dict[str, Tensor]], others: tuple[object, dict[str, Tensor]]) -> None:
    (form, expected), (other_form, found) = results, others
    expect(form == other_form, f"what would run returns {other_form}, it returns {form}")
    expect(expected.keys() == found.keys(), f"{', '.join(expected.keys() ^ found.keys())} would come or go")
    largest = {name: x.abs().max().item() for name, x in expected.items()}
    noise = 0.01 * max(largest[name] for name in largest if name != "output")  # a key's bias has a gradient of zero
    for name, x in expected.items():
        allowed, unit = (OUTPUT_OFF, 0.0) if name == "output" else (GRADIENT_OFF, noise)
        error = (found[name] - x).abs().max().item() / max(largest[name], unit, 1e-30)
        expect(error <= allowed, f"its {name} would be off by {error:.1e} of the largest value")


def accelerate(model: nn.Module, *, verify: bool = False, force: bool = False) -> Report:
    """Swap the attention of a live model of another library for the operators here; weights and results stay.

    Recognised, by the names of classes and what they have: Swin, Swin V2, MaxViT and MViTv2 of timm; Swin, Swin V2,
    MaxViT, MViT and MViTv2 of torchvision; Microsoft's Swin (classification and detection) and MMDetection's; the
    official CrossFormer and CrossFormer++. Parameters, buffers and the state dict are untouched: methods of the modules
    are replaced, on the instances, and read the parameters at every call. What is recognised but cannot be served as it
    is, is left alone, with the reason in the report.

    Results stay those of the module as it is: a mask that the caller hands in, a part that is wrapped, pruned or hooked
    and an attention module that is replaced act as they did before, and where no kernel does that, the module's own
    method runs. A shifted block of Microsoft's detection code takes the kernel if its mask is that of the shift, which
    is looked up once for a mask, and so not in a graph of torch.compile or torch.export. A change of the mask that
    autograd does not see, in place through ``mask.data`` or NumPy, is not noticed. Buffers are compared with their
    formula when this is called: call it again after changing one.

    A model may be accelerated before or after it is moved, cast, compiled, or wrapped in DistributedDataParallel or
    FSDP2 (before, where it has to be compared). Twice does no more than once. An accelerated model can be copied and
    pickled, and the copy is accelerated. `torch.fx` traces the methods as they were. Not for nn.DataParallel,
    torch.jit.script, torch.func.vmap and jvp, and second derivatives.

    Args:
        model: any module; all in it are looked at.
        verify: compare both ways, output and gradients, on a copy of every module with random parameters and a random
            input of the size it was made for, and leave those alone that differ. Classes that are recognised by
            their names in any file (Microsoft's, MMDetection's, CrossFormer's), and modules with parts of other classes
            than their library's and PyTorch's, are always compared.
        force: also replace what is not faster on the device where the module is, which is everything where there are no
            kernels: on a CPU without the C++ library, on devices that are neither CPUs nor NVIDIA GPUs.

    Returns:
        A report that prints as a table: `Report.replaced`, `Report.skipped`, `Report.undo`.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report(type(model).__name__)
    for name, module in model.named_modules():
        kind = _class(module)
        recipe, base = _recipe(kind)
        if recipe is None:
            continue
        name, was = name or "(the model)", f"{recipe.library} {kind.__name__}"
        try:
            now, done = _check(module, recipe, base)
            if not done:
                if not force:
                    _expect_kernels(module)
                if verify or not recipe.by_name or _altered(module, base):
                    _compare(module, recipe)
                _bind(module, recipe)
        except Unsuitable as reason:
            _give_back(module, recipe)
            report.skipped.append(Skipped(name, was, str(reason)))
        else:
            report.replaced.append(Replaced(name, was, now))
            report._bound += [(part, method) for part, method, _ in _places(module, recipe)]
    return report
