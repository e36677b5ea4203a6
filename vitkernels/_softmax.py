"""The softmax of all references."""

from __future__ import annotations

from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """Weights along the last dimension: a logit of -inf has weight 0, also where all of a row are -inf, as in PyTorch's
    attention. NaN stays NaN.
    """
    none = logits.amax(-1, keepdim=True) == float("-inf")
    return logits.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
