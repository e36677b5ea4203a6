"""The layers: golden vectors of the official CrossFormer, a restatement of Swin's, MaxViT's two halves, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import restored
from contract import assert_layer_contract
from golden import assert_golden
from torch import nn

from vitkernels import LongShortDistanceAttention, MaxSA, WindowAttention, window_attention
from vitkernels.models.crossformer import Block

GOLDEN = ["sda", "lda_i2", "lda_i3", "small_map", "v1_lda_i4", "acl"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_crossformer_block(name, golden):
    meta, data = golden(f"crossformer_block_{name}")
    config = meta["config"]
    dim, height, width = int(config["dim"]), int(config["H"]), int(config["W"])
    interval = int(config["interval"]) if config["type"] == "lda" else 1
    group = None if config["variant"].startswith("v1") and interval > 1 else int(config["group"])
    layer = LongShortDistanceAttention(dim, int(config["heads"]), group, interval)
    block = Block(layer, data["sd.mlp.fc1.bias"].numel() / dim, 0.0, "sd.ex_ln.bias" in data)
    assert_golden(block, (height, width), meta, data)


def test_a_layer_takes_maps_of_every_size_and_keeps_no_trace_of_them():
    layer = LongShortDistanceAttention(32, 2, 7, 4).eval()
    first = layer(torch.ones(1, 28, 28, 32))
    for height, width in ((5, 40), (3, 3), (29, 31), (1, 1)):
        assert layer(torch.randn(2, height, width, 32)).shape == (2, height, width, 32)
    assert torch.equal(layer(torch.ones(1, 28, 28, 32)), first)


def swin(layer: WindowAttention, x, shift):
    """Padded, rolled, cut into windows, attended with the nine-region mask, undone: one window at a time."""
    batch, height, width, dim = x.shape
    (gh, gw), heads = layer.group, layer.heads
    x = F.pad(x, (0, 0, 0, -width % gw, 0, -height % gh))
    padded_h, padded_w = x.shape[1:3]
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    region = torch.zeros(padded_h, padded_w)
    for i, rows in enumerate((slice(0, -gh), slice(-gh, -shift[0] or None), slice(-shift[0] or padded_h, None))):
        for j, columns in enumerate((slice(0, -gw), slice(-gw, -shift[1] or None), slice(-shift[1] or padded_w, None))):
            region[rows, columns] = 3 * i + j
    table = layer.relative_position_bias_table.view(2 * gh - 1, 2 * gw - 1, heads)
    out = torch.zeros_like(x)
    for top in range(0, padded_h, gh):
        for left in range(0, padded_w, gw):
            here = (slice(None), slice(top, top + gh), slice(left, left + gw))
            q, k, v = layer.qkv(x[here]).reshape(batch, gh * gw, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
            logits = q @ k.transpose(-1, -2) * (dim // heads) ** -0.5
            for a in range(gh * gw):
                for b in range(gh * gw):
                    logits[:, :, a, b] += table[a // gw - b // gw + gh - 1, a % gw - b % gw + gw - 1]
            ids = region[here[1:]].flatten()
            logits = logits - 100.0 * (ids[:, None] != ids)
            out[here] = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, gh, gw, dim)
    return layer.proj(out.roll(shift, (1, 2))[:, :height, :width])


@pytest.mark.parametrize("size", [(8, 12), (7, 10)])
@pytest.mark.parametrize("window, shift", [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((4, 3), (1, 2))])
def test_window_attention_is_swins(size, window, shift):
    torch.manual_seed(0)
    layer = WindowAttention(32, 2, window, shift).double()
    nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), swin(layer, x, shift))


def test_an_axis_of_one_window_is_not_shifted():
    layer = WindowAttention(32, 2, 7, 3)
    x = torch.randn(1, 5, 14, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), swin(layer, x, (0, 3)))


def test_maxsa_block_and_grid():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 8, 32)
    block, grid = MaxSA(32, 2, "block", 4), MaxSA(32, 2, "grid", 4)
    grid.load_state_dict(block.state_dict())
    nn.init.normal_(block.relative_position_bias_table)
    grid.relative_position_bias_table = block.relative_position_bias_table
    # a grid of 4 x 4 tokens over 12 x 8 is the block attention of the map with (grid, cell) axes exchanged
    exchange = x.unflatten(2, (4, 2)).unflatten(1, (4, 3)).transpose(1, 2).transpose(3, 4).flatten(3, 4).flatten(1, 2)
    back = (
        block(exchange)
        .unflatten(2, (2, 4))
        .unflatten(1, (3, 4))
        .transpose(1, 2)
        .transpose(3, 4)
        .flatten(3, 4)
        .flatten(1, 2)
    )
    torch.testing.assert_close(grid(x), back)


@pytest.mark.parametrize(
    "layer",
    [LongShortDistanceAttention(32, 2, 3, 2), WindowAttention(32, 2, 4, 2), MaxSA(32, 2, "grid", 4)],
    ids=lambda layer: type(layer).__name__,
)
class TestLayer:
    def test_every_parameter_learns(self, layer):
        layer = copy.deepcopy(layer)
        x = torch.randn(2, 9, 10, 32, requires_grad=True)
        layer(x).square().sum().backward()
        for name, tensor in [("x", x), *layer.named_parameters()]:
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().max() > 0, name

    def test_state_round_trip(self, layer):
        other = restored(layer)
        x = torch.randn(1, 8, 8, 32)
        assert torch.equal(layer(x), other(x))

    def test_autocast_and_half(self, layer):
        x = torch.randn(1, 8, 8, 32)
        for autocast in (True, False):
            assert_layer_contract(layer, torch.bfloat16, x, autocast=autocast)

    def test_compile(self, layer):
        torch.compiler.reset()
        x = torch.randn(1, 9, 10, 32)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))

    def test_export(self, layer):
        x = torch.randn(1, 9, 10, 32)
        program = torch.export.export(copy.deepcopy(layer).eval(), (x,))
        torch.testing.assert_close(program.module()(x), layer(x))

    def test_empty_batch(self, layer):
        assert layer(torch.randn(0, 9, 10, 32)).shape == (0, 9, 10, 32)

    def test_refusals(self, layer):
        with pytest.raises(ValueError, match=r"x must be \[B, H, W, C\], got 3 dimensions"):
            layer(torch.randn(2, 81, 32))
        with pytest.raises(ValueError, match=r"with C = 32, got \[2, 32, 9, 9\]; NCHW maps need a permute"):
            layer(torch.randn(2, 32, 9, 9))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: LongShortDistanceAttention(30, 4),
            ValueError,
            "dim must be a multiple of heads, got dim 30 and 4 heads",
        ),
        (lambda: LongShortDistanceAttention(32, 0), ValueError, "heads must be at least 1"),
        (lambda: LongShortDistanceAttention(32.0, 2), TypeError, "dim must be an int"),
        (lambda: LongShortDistanceAttention(32, 2, 0), ValueError, "group must be at least 1"),
        (lambda: WindowAttention(32, 2, 7, 7), ValueError, "shift must be smaller than the window"),
        (lambda: MaxSA(32, 2, "both"), ValueError, "mode must be 'block' or 'grid', got 'both'"),
    ],
)
def test_constructor_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_table_layers_use_the_functional_table_layout():
    layer = WindowAttention(32, 2, (3, 4))
    nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(1, 6, 8, 32)
    qkv = layer.qkv(x).view(1, 6, 8, 3, 2, 16)
    bias = layer.relative_position_bias_table.t().reshape(2, 5, 7)
    torch.testing.assert_close(layer(x), layer.proj(window_attention(qkv, bias, window_size=(3, 4)).flatten(-2)))
