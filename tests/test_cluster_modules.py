"""The layers of BOAT and CSWin: golden vectors of the official code, stripes restated, pairs across the batch."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import restored
from contract import assert_layer_contract
from golden import assert_golden

from vitkernels import (
    CrossShapedWindowAttention,
    FeatureSpaceAttention,
    WindowAttention,
    _dispatch,
    balanced_clusters,
    cluster_attention,
)
from vitkernels.models.boat import CSWinBlock, SwinBlock

needs_native = pytest.mark.skipif(
    _dispatch.absent("cpu") is not None,
    reason=f"the reference of the clustering is not captured: {_dispatch.absent('cpu')}",
)


def inside(layer: str):
    """Official names to the block's, for the parameters that CSWin keeps in the block and we in ``layer``."""
    return lambda key: f"{layer}.{key}" if key.startswith(("qkv.", "proj.", "attns.")) else key


@pytest.mark.parametrize("name", ["n196", "n784"])
def test_golden_feature_space_attention(name, golden, backend):
    meta, data = golden(f"boat_fsla_{name}")
    config = meta["config"]
    side = math.isqrt(config["N"])
    assert_golden(FeatureSpaceAttention(config["dim"], config["heads"]), (side, side), meta, data)


def mlp_ratio(config: dict, data: dict) -> float:
    return data["sd.mlp.fc1.bias"].numel() / config["dim"]


def test_golden_boat_swin_block(golden, backend):
    meta, data = golden("boat_swin_block")
    config = meta["config"]
    dim, heads = config["dim"], config["heads"]
    windows, clusters = WindowAttention(dim, heads, 7, config["shift"]), FeatureSpaceAttention(dim, heads)
    block = SwinBlock(windows, clusters, mlp_ratio(config, data), 0.0)
    assert_golden(block, (config["H"], config["W"]), meta, data)


def test_golden_boat_cswin_block(golden, backend):
    meta, data = golden("boat_cswin_block")
    config = meta["config"]
    dim, heads = config["dim"], config["heads"]
    stripes = CrossShapedWindowAttention(dim, heads, config["split"])
    clusters = FeatureSpaceAttention(dim, heads, scale=1.0, pair_across_batch=True)
    block = CSWinBlock(stripes, clusters, mlp_ratio(config, data), 0.0)
    assert_golden(block, (config["H"], config["W"]), meta, data, inside("attn"))


def test_golden_cswin_block(golden, backend):
    meta, data = golden("cswin_block")
    config = meta["config"]
    stripes = CrossShapedWindowAttention(config["dim"], config["heads"], config["split"])
    block = CSWinBlock(stripes, None, mlp_ratio(config, data), 0.0)
    assert_golden(block, (config["H"], config["W"]), meta, data, inside("attn"))


def attend(q, k, v):
    """[B, n, heads, head_dim] and [B, m, heads, head_dim], unscaled."""
    return torch.einsum("bhnm,bmhd->bnhd", torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1), v)


@pytest.mark.parametrize("size, leaf_size, overlap", [((7, 7), 49, 20), ((2, 3), 4, 4), ((1, 1), 49, 20)])
def test_a_single_leaf_is_paired_across_the_batch(size, leaf_size, overlap, backend):
    torch.manual_seed(0)
    layer = FeatureSpaceAttention(32, 2, leaf_size, overlap, scale=1.0, pair_across_batch=True).double()
    x = torch.randn(4, *size, 32, dtype=torch.float64)
    qkv = layer.qkv(x)
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, 2, 16)).unbind(2)  # [B, N, heads, head_dim]
    out = torch.empty_like(q)
    for i in (0, 2):
        first, second = slice(i, i + 1), slice(i + 1, i + 2)
        out[first] = attend(q[first], *(torch.cat((y[first], y[second, :overlap]), 1) for y in (k, v)))
        out[second] = attend(q[second], *(torch.cat((y[first, -overlap:], y[second]), 1) for y in (k, v)))
    image = F.conv2d(qkv[..., 64:].permute(0, 3, 1, 2), layer.get_v.weight, layer.get_v.bias, padding=1, groups=32)
    expected = layer.proj(out.flatten(2).unflatten(1, size) + image.permute(0, 2, 3, 1))
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match=rf"the batch must be even, got 3 images of {math.prod(size)} tokens; repeat"):
        layer(x[:3])


def test_maps_of_more_leaves_are_not_paired_and_a_single_leaf_alone_attends_to_itself(backend):
    torch.manual_seed(0)
    paired, alone = FeatureSpaceAttention(32, 2, 16, 8, pair_across_batch=True), FeatureSpaceAttention(32, 2, 16, 8)
    alone.load_state_dict(paired.state_dict())
    several, single = torch.randn(3, 4, 8, 32), torch.randn(2, 5, 5, 32)
    torch.testing.assert_close(paired(several), alone(several))
    assert not torch.allclose(paired(single), alone(single), atol=1e-4)
    torch.testing.assert_close(alone(single)[:1], alone(single[:1]))


def test_the_layer_is_the_operator_between_its_projections(backend):
    torch.manual_seed(0)
    layer = FeatureSpaceAttention(32, 2, 8, 4, iterations=1, temperature=0.1, scale=0.5)
    x = torch.randn(2, 5, 9, 32)
    qkv = layer.qkv(x).unflatten(-1, (3, 2, 16))
    q, k, v = qkv.flatten(1, 2).unbind(2)
    order = balanced_clusters(q, leaf_size=8, iterations=1, temperature=0.1)
    out = cluster_attention(q, k, v, order, leaf_size=8, overlap=4, scale=0.5).unflatten(1, (5, 9))
    torch.testing.assert_close(layer(x), layer.proj((out + layer.get_v(qkv[:, :, :, 2])).flatten(-2)))


def stripe_by_stripe(layer: CrossShapedWindowAttention, x: torch.Tensor, widths: list[int | None]) -> torch.Tensor:
    """CSWin one stripe after the other: of ``widths[0]`` columns, then of ``widths[1]`` rows; None: the whole map."""
    height, width = x.shape[1:3]
    branches = []
    for i, (across, qkv) in enumerate(
        zip(widths, layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).chunk(len(widths), 4))
    ):
        conv, out = layer.attns[i].get_v, torch.empty_like(qkv[:, :, :, 0])
        for start in range(0, (height if i else width) if across else 1, across or 1):
            along = slice(start, start + across) if across else slice(None)
            here = (slice(None), along) if i else (slice(None), slice(None), along)
            q, k, v = qkv[here].unbind(3)
            rows, columns = v.shape[1:3]
            local = F.conv2d(v.flatten(3).permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=conv.groups)
            attended = attend(q.flatten(1, 2) * layer.scale, k.flatten(1, 2), v.flatten(1, 2))
            out[here] = attended.unflatten(1, (rows, columns)) + local.permute(0, 2, 3, 1).unflatten(3, v.shape[3:])
        branches.append(out.flatten(3))
    return layer.proj(torch.cat(branches, -1))


@pytest.mark.parametrize("last_stage", [False, True], ids=["stripes", "last_stage"])
@pytest.mark.parametrize("size", [(6, 9), (5, 8), (3, 10), (2, 2), (1, 1)])
def test_stripes_on_maps_of_any_size(size, last_stage, backend):
    torch.manual_seed(0)
    layer = CrossShapedWindowAttention(32, 4, 3, last_stage=last_stage, scale=0.3).double()
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), stripe_by_stripe(layer, x, [None] if last_stage else [3, 3]))


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (28, 28), (30, 17)])
def test_feature_space_attention_on_maps_of_any_size(size, backend):
    torch.manual_seed(0)
    layer = FeatureSpaceAttention(32, 2)
    x = torch.randn(2, *size, 32)
    out = layer(x)
    assert out.shape == x.shape and out.isfinite().all()
    torch.testing.assert_close(out[1:], layer(x[1:]))  # images do not meet


@pytest.mark.parametrize(
    "layer, shapes",
    [
        (
            FeatureSpaceAttention(32, 2),
            {"get_v.weight": (32, 1, 3, 3), "get_v.bias": (32,)},
        ),
        (
            CrossShapedWindowAttention(32, 2, 7),
            {
                f"attns.{i}.get_v.{name}": shape
                for i in (0, 1)
                for name, shape in (("weight", (16, 1, 3, 3)), ("bias", (16,)))
            },
        ),
        (
            CrossShapedWindowAttention(32, 1, 7, last_stage=True),
            {"attns.0.get_v.weight": (32, 1, 3, 3), "attns.0.get_v.bias": (32,)},
        ),
    ],
    ids=["FeatureSpaceAttention", "CrossShapedWindowAttention", "last_stage"],
)
def test_state_has_the_official_names(layer, shapes):
    projections = {"qkv.weight": (96, 32), "qkv.bias": (96,), "proj.weight": (32, 32), "proj.bias": (32,)}
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == projections | shapes
    assert "qkv.bias" not in type(layer)(32, 2, qkv_bias=False).state_dict()


@pytest.mark.parametrize(
    "layer",
    [FeatureSpaceAttention(32, 2, 16, 8), CrossShapedWindowAttention(32, 2, 4)],
    ids=lambda layer: type(layer).__name__,
)
class TestLayer:
    def test_every_parameter_learns(self, layer, backend):
        layer = copy.deepcopy(layer)
        x = torch.randn(2, 9, 10, 32, requires_grad=True)
        layer(x).square().sum().backward()
        for tensor in (x, *layer.parameters()):
            assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0

    def test_copies_and_pickles(self, layer):
        x = torch.randn(1, 9, 10, 32)
        other = restored(layer)
        assert torch.equal(layer(x), other(x))
        assert torch.equal(layer(x), pickle.loads(pickle.dumps(layer))(x))

    def test_autocast_and_half(self, layer, backend):
        # leaves that both dtypes agree on: bfloat16 may move a token of a nearly tied ratio to another leaf
        layer = copy.deepcopy(layer)
        if isinstance(layer, FeatureSpaceAttention):
            layer.leaf_size = 90
        x = torch.randn(1, 9, 10, 32)
        for autocast in (True, False):
            assert_layer_contract(layer, torch.bfloat16, x, autocast=autocast)

    @needs_native
    def test_compile(self, layer):
        torch.compiler.reset()
        x = torch.randn(1, 9, 10, 32)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))

    @needs_native
    def test_export(self, layer):
        x = torch.randn(1, 9, 10, 32)
        program = torch.export.export(copy.deepcopy(layer).eval(), (x,))
        torch.testing.assert_close(program.module()(x), layer(x))

    def test_empty_batch(self, layer, backend):
        assert layer(torch.randn(0, 9, 10, 32)).shape == (0, 9, 10, 32)

    def test_refusals(self, layer):
        with pytest.raises(ValueError, match=r"x must be \[B, H, W, C\], got 3 dimensions"):
            layer(torch.randn(2, 81, 32))
        with pytest.raises(ValueError, match=r"with C = 32, got \[2, 32, 9, 9\]; NCHW maps need a permute"):
            layer(torch.randn(2, 32, 9, 9))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: FeatureSpaceAttention(30, 4), ValueError, "dim must be a multiple of heads, got dim 30 and 4 heads"),
        (lambda: FeatureSpaceAttention(32, 2, 0), ValueError, "leaf_size must be at least 1"),
        (lambda: FeatureSpaceAttention(32, 2, 7, 8), ValueError, "overlap must be between 0 and leaf_size, 7, got 8"),
        (lambda: FeatureSpaceAttention(32, 2, 7, 1.5), TypeError, "overlap must be an int"),
        (lambda: CrossShapedWindowAttention(30, 4), ValueError, "dim must be a multiple of heads"),
        (lambda: CrossShapedWindowAttention(33, 3), ValueError, "heads must be even, half for each direction .* got 3"),
        (lambda: CrossShapedWindowAttention(32, 2, 0), ValueError, "stripe_width must be at least 1, got 0"),
        (lambda: CrossShapedWindowAttention(32, 2, (7, 7)), TypeError, "stripe_width must be an int"),
    ],
)
def test_constructor_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
