"""A block with golden weights against its golden output and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def assert_golden(block: nn.Module, size: tuple[int, ...], meta: dict, data: dict, rename: Callable = str) -> None:
    """``block`` computes the golden output and every golden gradient.

    Args:
        size: (height, width) of the map, if the block takes ``[B, H, W, C]`` and gives the same; (time, height, width),
            if it takes the tokens and this, and gives tokens and the size of their map. The data has tokens in raster
            order.
        rename: the block's name of an official parameter. All of them load, and nothing else is left.
    """
    block.load_state_dict({rename(key.removeprefix("sd.")): v for key, v in data.items() if key.startswith("sd.")})
    x = data["x"].requires_grad_()
    if len(size) == 2:
        out = block(x.unflatten(1, size)).flatten(1, 2)
    else:
        out, size = block(x, size)
        assert list(size) == meta["output_map"]
    tolerance = meta["recommended_tol"]
    torch.testing.assert_close(out, data["out"], rtol=0, atol=tolerance["out_atol"]["out"])
    out.backward(data["cot"])
    parameters = dict(block.named_parameters())
    stored = {key.removeprefix("grad."): expected for key, expected in data.items() if key.startswith("grad.")}
    for key, expected in stored.items():
        if key.startswith("x"):
            got = x.grad[:, data["rows"]] if key == "x.rows" else x.grad
        else:
            got = parameters.pop(rename(key.removeprefix("sd."))).grad
        if f"grad.{key}" in meta["zero_grads"]:
            assert got.abs().max() < meta["zero_grads_abs_bound"]
        else:
            assert (got - expected).abs().max() <= tolerance["grad_rel_to_max"] * expected.abs().max(), key
    assert not parameters and {"x", "x.rows"} & stored.keys(), "every weight's and the input's"
