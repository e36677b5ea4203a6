"""The four model families, whole: CrossFormer, BOAT, MaxViT, MViT, built by name.

>>> from vitkernels.models import create_model, list_models, load_checkpoint
>>> model = create_model("crossformer_small", num_classes=10)
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect

from . import boat, crossformer, maxvit, mvit
from ._blocks import Model
from .boat import BoatCSWin, BoatSwin
from .checkpoints import load_checkpoint
from .crossformer import CrossFormer
from .maxvit import MaxViT
from .mvit import MViT

__all__ = ["BoatCSWin", "BoatSwin", "CrossFormer", "MViT", "MaxViT", "create_model", "list_models", "load_checkpoint"]

_FAMILIES: dict[type[Model], dict[str, dict]] = {
    CrossFormer: crossformer.CONFIGS,
    BoatSwin: boat.SWIN_CONFIGS,
    BoatCSWin: boat.CSWIN_CONFIGS,
    MaxViT: maxvit.CONFIGS,
    MViT: mvit.CONFIGS,
}
_PUBLISHED = {"pretrained", "weights", "checkpoint", "checkpoint_path"}  # how other libraries ask for weights
_MODELS = {name: (family, config) for family, configs in _FAMILIES.items() for name, config in configs.items()}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes and that match a pattern with wildcards, in alphabetical order."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(name: str, num_classes: int | None = None, *, backend: str | None = None, **overrides) -> Model:
    """A model with random weights; `load_checkpoint` brings published ones.

    Args:
        name: one of `list_models`.
        num_classes: of the classifier; None is the published number, 1000, or 400 for video; 0 leaves the classifier
            out, and the model returns the features that it would see.
        backend: "triton", "cpu" or "reference" for all attention layers; None chooses by device. The attribute
            ``backend`` of the model changes it later, and `vitkernels.use_backend` for a while.
        overrides: other arguments of the model's class in place of the published ones; all families take
            ``in_channels``, ``drop_path`` (stochastic depth at the last block) and ``features_only``, with which the
            model returns the maps of its four stages, ``[B, C, H, W]`` each, and has no classifier.

    Returns:
        The model, in training mode, float32, on the default device.

    Raises:
        ValueError: no such name, or a value that the model refuses.
        TypeError: an override that the model's class does not have.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "list_models() has them all"
        raise ValueError(f"no model is named {name!r}; {hint}")
    family, config = _MODELS[name]
    known = list(inspect.signature(family).parameters)
    if unknown := sorted(set(overrides) - set(known)):
        hint = ". Nothing is downloaded: load_checkpoint(model, path) brings published weights from a file"
        asked = not _PUBLISHED.isdisjoint(unknown)
        message = f"{name} has no argument {', '.join(unknown)}; it has {', '.join(known)}"
        raise TypeError(message + (hint if asked else ""))
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    model = family(**{**config, **overrides})
    model.backend = backend
    return model
