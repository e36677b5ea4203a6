"""Published checkpoints: reading a file, recognising whose weights it has, naming them as the models here do."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ._blocks import Model
from .boat import BoatCSWin, BoatSwin
from .crossformer import CrossFormer
from .maxvit import HEAD_DIM, MaxViT
from .mvit import MultiScaleAttention, MViT

State = dict[str, Tensor]
Rule = tuple[str, "str | Callable[[re.Match], str]"]  # a pattern in a name, and what stands there instead


class Loaded(NamedTuple):
    """What `load_checkpoint` found: whose weights, and which entries of the file it left out."""

    source: str
    left_out: list[str]


@dataclass(frozen=True)
class Layout:
    """How somebody names the parameters of a family."""

    source: str
    family: type[Model]
    marks: tuple[str, ...]  # patterns that each match a name in such a file
    rules: tuple[Rule, ...] = ()
    extra: str = r"(?!)"  # buffers that the models here do not have
    prepare: Callable[[State], State] = lambda state: state  # renames that need all names; the rules see one at a time
    convert: Callable[[str, Tensor], Tensor] = lambda name, value: value  # by the name here
    style: str | None = None  # of MaxViT
    index: str | None = None  # of MViT: how its author rounds relative distances; None leaves the model's own

    def fits(self, names: Iterable[str]) -> bool:
        text = "\n".join(names)
        return all(re.search(mark, text, re.MULTILINE) for mark in self.marks)


def _rename(name: str, rules: Iterable[Rule]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _flip(name: str, value: Tensor) -> Tensor:
    """TensorFlow's tables, ``[heads, 2P-1, 2P-1]`` by key minus query, as Swin's, ``[(2P-1)**2, heads]``."""
    return value.flip(1, 2).permute(1, 2, 0).flatten(0, 1) if name.endswith("bias_table") else value


def _three_major(name: str, value: Tensor) -> Tensor:
    """Rows of a fused projection by (q, k or v; head) instead of (head; q, k or v)."""
    if ".attn.qkv." not in name:
        return value
    return value.unflatten(0, (-1, 3, HEAD_DIM)).transpose(0, 1).flatten(0, 2)


def _flat(name: str, value: Tensor) -> Tensor:
    """Pools of SlowFast's image models, which are convolutions of volumes one frame deep, as those of images."""
    pool = re.search(r"\.attn\.pool_[qkv]\.weight$", name) and value.dim() == 5 and value.shape[2] == 1
    return value.squeeze(2) if pool else value


def _with_batch(name: str, value: Tensor) -> Tensor:
    """Embeddings with a first dimension of one."""
    missing = 3 - value.dim() if name.startswith(("cls_token", "pos_embed")) else 0
    return value[(None,) * missing]


def _numbered(state: State) -> State:
    """timm's stages of blocks as one sequence of blocks."""
    pattern = r"^stages\.(\d+)\.blocks\.(\d+)\."
    found = (re.match(pattern, name) for name in state)
    index = {place: i for i, place in enumerate(sorted({(int(m[1]), int(m[2])) for m in found if m}))}
    rules = ((pattern, lambda m: f"blocks.{index[int(m[1]), int(m[2])]}."),)
    return {_rename(name, rules): value for name, value in state.items()}


_TIMM_MAXVIT: tuple[Rule, ...] = ((r"\.rel_pos\.", "."),)
_TORCHVISION_MAXVIT: tuple[Rule, ...] = (
    (r"^stem\.0\.0\.", "stem.conv1."),
    (r"^stem\.0\.1\.", "stem.norm1."),
    (r"^stem\.1\.0\.", "stem.conv2."),
    (r"^blocks\.(\d+)\.layers\.(\d+)\.layers\.", r"stages.\1.blocks.\2."),
    (r"\.MBconv\.proj\.1\.", ".conv.shortcut.expand."),
    (r"\.MBconv\.layers\.", ".conv."),
    (r"\.conv_a\.0\.", ".conv1_1x1."),
    (r"\.conv_a\.1\.", ".norm1."),
    (r"\.conv_b\.0\.", ".conv2_kxk."),
    (r"\.conv_b\.1\.", ".norm2."),
    (r"\.conv_c\.", ".conv3_1x1."),
    (r"\.squeeze_excitation\.", ".se."),
    (r"\.window_attention\.", ".attn_block."),
    (r"\.grid_attention\.", ".attn_grid."),
    (r"\.attn_layer\.0\.", ".norm1."),
    (r"\.attn_layer\.1\.to_qkv\.", ".attn.qkv."),
    (r"\.attn_layer\.1\.merge\.", ".attn.proj."),
    (r"\.attn_layer\.1\.", ".attn."),
    (r"\.mlp_layer\.0\.", ".norm2."),
    (r"\.mlp_layer\.1\.", ".mlp.fc1."),
    (r"\.mlp_layer\.3\.", ".mlp.fc2."),
    (r"^classifier\.2\.", "head.norm."),
    (r"^classifier\.3\.", "head.pre_logits.fc."),
    (r"^classifier\.5\.", "head.fc."),
)
_TIMM_MVIT: tuple[Rule, ...] = ((r"\.shortcut_proj_(attn|mlp)\.", ".proj."), (r"^head\.fc\.", "head."))
_TORCHVISION_MVIT: tuple[Rule, ...] = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^pos_encoding\.class_token$", "cls_token"),
    (r"^pos_encoding\.(spatial|temporal|class)_pos$", r"pos_embed_\1"),
    (r"(?<=\.attn\.).*", lambda m: MultiScaleAttention.rename(m[0])),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"\.project\.", ".proj."),
    (r"^head\.1\.", "head."),
)
_BOAT_CSWIN: tuple[Rule, ...] = (
    (r"^stage1_conv_embed\.0\.", "patch_embed.conv."),
    (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
    (r"^stage(\d)\.(\d+)\.", lambda m: f"layers.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"^merge(\d)\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
    (r"(\.blocks\.\d+)\.(qkv|proj|attns)\.", r"\1.attn.\2."),
)

# the first that fits
LAYOUTS = (
    Layout(
        "CrossFormer", CrossFormer, (r"\.attn\.pos\.pos_proj\.",), extra=r"\.attn\.(biases|relative_position_index)$"
    ),
    Layout("BOAT-Swin", BoatSwin, (r"\.attnC\.",), extra=r"\.(relative_position_index|attn_mask)$"),
    Layout("BOAT-CSWin", BoatCSWin, (r"^stage1_conv_embed\.", r"\.content_attn\."), _BOAT_CSWIN),
    Layout("BOAT-CSWin of vitkernels", BoatCSWin, (r"\.attn\.attns\.", r"\.content_attn\.")),
    Layout(
        "timm's MaxViT (tf)",
        MaxViT,
        (r"^stem\.conv1\.bias$", r"\.rel_pos\.relative_position_bias_table$"),
        _TIMM_MAXVIT,
        convert=_flip,
        style="tf",
    ),
    Layout(
        "timm's MaxViT (rw)",
        MaxViT,
        (r"^stem\.conv1\.", r"\.rel_pos\.relative_position_bias_table$"),
        _TIMM_MAXVIT,
        convert=_three_major,
        style="rw",
    ),
    Layout(
        "torchvision's MaxViT",
        MaxViT,
        (r"\.MBconv\.",),
        _TORCHVISION_MAXVIT,
        extra=r"\.relative_position_index$",
        style="torchvision",
    ),
    Layout("MaxViT of vitkernels", MaxViT, (r"\.attn_grid\.attn\.relative_position_bias_table$",)),
    Layout(
        "torchvision's MViT",
        MViT,
        (r"^conv_proj\.", r"\.pool_k\.pool\."),
        _TORCHVISION_MVIT,
        convert=_with_batch,
        index="torchvision",
    ),
    Layout("timm's MViTv2", MViT, (r"^stages\.", r"\.attn\.pool_k\."), _TIMM_MVIT, prepare=_numbered, index="slowfast"),
    Layout(
        "SlowFast's MViT",
        MViT,
        (r"^blocks\.", r"\.attn\.pool_k\.", r"^head\.projection\."),
        ((r"^head\.projection\.", "head."),),
        convert=_flat,
        index="slowfast",
    ),
    # of vitkernels, or SlowFast's without a classifier: nothing tells them apart
    Layout("MViT", MViT, (r"^blocks\.", r"\.attn\.pool_k\."), convert=_flat),
)


class _Settings:
    """Stands for yacs' CfgNode, which some checkpoints carry: a plain mapping, so that none of its code runs."""

    def __new__(cls) -> OrderedDict:  # of the mappings, the one that torch.load fills and gives attributes
        return OrderedDict()


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(f"{path} needs safetensors: pip install safetensors") from None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    try:
        with torch.serialization.safe_globals([(_Settings, "yacs.config.CfgNode")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what comes of half a file, or of another kind of file, is not foreseeable
        what = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if what:
            why = f"it holds objects of {what[1]}, and only tensors and plain data are read"
        else:
            why = f"it is no whole file of torch.save ({type(error).__name__})"
        raise ValueError(f"{path} cannot be read: {why}") from error


_ENTRIES = ("model", "state_dict", "model_state", "module")  # of a training checkpoint, where the weights are
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")


def _weights(file: object, path: Path, entry: str | None) -> State:
    """The tensors of a checkpoint by name, without what wrapped the model."""
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, expected parameters by name")
    entries = [entry] if entry is not None else [name for name in _ENTRIES if isinstance(file.get(name), dict)][:1]
    if entry is not None and not isinstance(file.get(entry), dict):
        raise ValueError(f"{path} has no parameters under {entry!r}; it has {', '.join(map(str, file)) or 'nothing'}")
    state = file[entries[0]] if entries else file
    state = {name: value for name, value in state.items() if isinstance(name, str)}
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} holds no parameters by name: {_some(strange)} are not tensors")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if any(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
                stripped = True
    return state


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def load_checkpoint(model: Model, path: str | PathLike, *, drop_head: bool = False, entry: str | None = None) -> Loaded:
    """Load weights into a model of `create_model`, the published ones under the names that their authors gave them.

    Recognised: official CrossFormer and CrossFormer++ (also backbones of detectors), BOAT-Swin and BOAT-CSWin; timm's
    MaxViT (tf and rw) and MViTv2; torchvision's maxvit_t, mvit_v1_b and mvit_v2_s; SlowFast's MViT and MViTv2; and what
    the models here save. Nothing is downloaded, nothing but tensors and plain data is read, and nothing is changed
    unless everything fits.

    An MViT also takes its author's rule for relative distances: its attribute ``index`` becomes "torchvision" for
    torchvision's weights and "slowfast" for timm's and SlowFast's. Files that the models here save do not name a rule
    and leave it alone. So do SlowFast's files without a classifier, which have the same names; "slowfast" is the rule
    that the named models begin with.

    Args:
        model: where they go; its arguments must be those that the weights were made with. A model with
            ``features_only`` takes no final norm and no classifier from the file.
        path: a ``.safetensors`` file, or one of `torch.save` (``.pth``, ``.pyth``, ``.pt`` ...).
        drop_head: leave out the last Linear of the classifier, for a model with classes of its own.
        entry: where in the file the weights are, ``"state_dict_ema"``, say; None looks under model, state_dict,
            model_state and module.

    Returns:
        Whose weights they are, and the entries of the file that were left out: buffers that these models do not have,
        and what ``drop_head`` and ``features_only`` leave out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, that is of another family, or whose parameters are not the model's: the
            message names them.
        ImportError: a safetensors file without safetensors.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must be one of vitkernels.models, got {type(model).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    own = model.state_dict()
    _check_model(own)
    state = _weights(_read(path), path, entry)
    layout = next((layout for layout in LAYOUTS if layout.fits(state)), None)
    if layout is None:
        known = ", ".join(layout.source for layout in LAYOUTS if "vitkernels" not in layout.source)
        raise ValueError(f"{path} has weights of none of {known}; its names begin with {_some(state) or 'nothing'}")
    if not isinstance(model, layout.family):
        raise ValueError(f"{path} has the weights of {layout.source}, the model is a {type(model).__name__}")
    if layout.style not in (None, getattr(model, "style", None)):
        raise ValueError(
            f"{path} has the weights of {layout.source}, the model computes in the style {model.style!r}; "
            f"create_model(..., style={layout.style!r}) makes one for them"
        )
    state = layout.prepare(state)
    found, left_out, refused = {}, [], []
    dropped = (("norm.", "head.") if model.features_only else ()) + (
        (f"{model.classifier}.",) if drop_head or not model.num_classes else ()
    )
    for name, value in state.items():
        new = _rename(name, layout.rules)
        if re.search(layout.extra, name) or new.startswith(dropped):
            left_out.append(name)
        elif new in found:
            refused.append(f"{name} stands for {new}, and so does another entry")
        elif new in own and (why := _refusal(value, own[new])):
            refused.append(f"{name} {why}")
            found[new] = own[new]
        else:
            found[new] = _converted(layout, new, value)
    kept = {n for n in own if n.endswith("num_batches_tracked") or (drop_head and n.startswith(dropped))} - found.keys()
    _compare(own.keys() - kept, own, found, refused, path, layout.source, model)
    # in the model's dtypes before the first parameter changes: from here on nothing is allocated
    found = {name: value.to(own[name].dtype) for name, value in found.items()}
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    if layout.index is not None:
        model.index = layout.index
    return Loaded(layout.source, left_out)


def _check_model(own: dict[str, object]) -> None:
    """Raise unless all tensors of the model can be written to."""
    faults = {
        "are not dense tensors: load the weights before the model is quantised or sharded": lambda x: not _dense(x),
        "are on the meta device; model.to_empty(device=...) gives it memory": lambda x: x.is_meta,
        "were made under inference_mode: make the model outside of it": (
            lambda x: x.is_inference() and not torch.is_inference_mode_enabled()
        ),
        "are expanded, several of their elements one in memory: clone them": (
            lambda x: any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride()))
        ),
    }
    for fault, has in faults.items():
        if names := [name for name, value in own.items() if has(value)]:
            raise ValueError(f"parameters or buffers of the model {fault}: {_some(names)}")


def _dense(x: object) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_nested and x.layout == torch.strided


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _refusal(value: Tensor, own: Tensor) -> str | None:
    """Why an entry is not copied to ``own``, the model's of its name, or None."""
    if not _dense(value):
        if type(value) is not Tensor:
            return f"is a {type(value).__name__}"
        return f"is a {'nested' if value.is_nested else value.layout} tensor"
    if value.is_meta:
        return "is on the meta device and has no values"
    known, expected = (_checks.DTYPES, "floating-point") if own.is_floating_point() else (_INTEGERS, "integers")
    return None if value.dtype in known else f"is {value.dtype}, expected {expected}"


def _converted(layout: Layout, name: str, value: Tensor) -> Tensor:
    try:
        return layout.convert(name, value)
    except (RuntimeError, IndexError):  # of a shape that the layout does not have: `_compare` names it
        return value


def _compare(
    expected: set[str], own: State, found: State, refused: list[str], path: Path, source: str, model: Model
) -> None:
    """Refuse parameters that are not the model's, with those that were refused already."""
    absent, unknown = sorted(expected - found.keys()), sorted(found.keys() - own.keys())
    wrong = [name for name in own if name in found and found[name].shape != own[name].shape]
    if not (absent or unknown or wrong or refused):
        return
    shapes = [f"{n} is {list(found[n].shape)} in the file, {list(own[n].shape)} in the model" for n in wrong]
    faults = (
        ("absent from the file", absent), ("unknown to the model", unknown), ("of another shape", shapes),
        ("of another kind", refused),
    )  # fmt: skip
    text = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in faults if names)
    if not (absent or unknown or wrong):
        hint = "the file must hold each parameter once, as a dense tensor of floating-point numbers"
    elif not absent and not unknown and all(name.startswith(f"{model.classifier}.") for name in wrong):
        hint = "drop_head=True keeps the model's own classifier"
    else:
        hint = "the arguments of create_model (depths, window_size, num_classes ...) must be those of the weights"
    raise ValueError(f"the weights of {source} in {path} do not fit this {type(model).__name__}: {text}. {hint}")
