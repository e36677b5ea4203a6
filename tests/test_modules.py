"""The layers: golden vectors of the official CrossFormer, a restatement of Swin's, MaxViT's two halves, refusals."""

from __future__ import annotations

import copy
import math

import published
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import restored
from contract import assert_layer_contract
from golden import assert_golden
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

from vitkernels import (
    CrossShapedWindowAttention,
    FeatureSpaceAttention,
    LongShortDistanceAttention,
    MaxSA,
    MultiScaleAttention,
    WindowAttention,
    lsda_attention,
    partition_attention_qkvpacked,
    pooled_attention,
    window_attention,
)
from vitkernels._layer import LocalPosition
from vitkernels.models import create_model
from vitkernels.models.crossformer import Block, CrossScaleEmbedding

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


def codes(group: int, interval: int) -> dict[str, tuple]:
    """A long-distance block of each official code, and the layer that computes it: without its map where it has one."""
    square = {"small_map": "shorter", "small_size": group}
    return {
        "first detection": (published.FirstDetection, (None, interval), square),
        "current detection": (published.PlusPlus, (group, interval), {}),
        "classification": (published.PlusPlus, (group, interval), square),
    }


@pytest.mark.parametrize("code", codes(7, 2))
@pytest.mark.parametrize("size", [(4, 7), (7, 11), (11, 7), (3, 30), (7, 7), (1, 1), (9, 8), (17, 22)])
def test_maps_smaller_than_a_group(code, size):
    """Against each code in plain PyTorch: the output and the gradients of the map and of the position MLP."""
    kind, sizes, options = codes(7, 2)[code]
    torch.manual_seed(0)
    theirs = kind.CrossFormerBlock(32, 2, 7, 1, interval=2).double()
    block = Block(LongShortDistanceAttention(32, 2, *sizes, **options), 2.0, 0.0, False).double()
    block.load_state_dict(theirs.state_dict())
    height, width = size
    x = torch.randn(2, height, width, 32, dtype=torch.float64, requires_grad=True)
    y = x.detach().flatten(1, 2).requires_grad_()
    if code == "classification" and min(size) <= 7:  # decided once, for the resolution of the images
        theirs.lsda_flag, theirs.group_size = 0, min(size)
        expected = theirs._run(y, height, width, (min(size),) * 2, (1, 1))
    else:
        expected = theirs(y, height, width)
    out = block(x)
    torch.testing.assert_close(out.flatten(1, 2), expected)
    for loss in (out.sin().sum(), expected.sin().sum()):
        loss.backward()
    torch.testing.assert_close(x.grad.flatten(1, 2), y.grad)
    parameters = dict(theirs.named_parameters())
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, parameters[name].grad)


@pytest.mark.parametrize("small_map", ["longer", "shorter"])
@pytest.mark.parametrize("size", [(15, 9), (4, 10), (14, 14)])
def test_padding_that_is_attended_to(small_map, size):
    """``no_mask``: the zeros that fill the map are projected, so that they weigh by the bias of the projection."""
    torch.manual_seed(0)
    theirs = published.PlusPlus.CrossFormerBlock(32, 2, 7, 1, interval=2).double()
    attn = theirs.attn
    attn.forward = lambda x, height, width, mask=None: type(attn).forward(attn, x, height, width)
    layer = LongShortDistanceAttention(32, 2, 7, 2, small_map=small_map, padding="attended").double()
    layer.load_state_dict(attn.state_dict())
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    small = (max(size) if small_map == "longer" else min(size),) * 2
    expected = theirs._attend(x, *((small, (1, 1)) if min(size) <= 7 else ((7, 7), (2, 2))))
    torch.testing.assert_close(layer(x), expected)
    masked = LongShortDistanceAttention(32, 2, 7, 2, small_map=small_map).double()
    masked.load_state_dict(layer.state_dict())
    assert torch.allclose(masked(x), expected) == (size == (14, 14))


def test_a_model_follows_the_code_that_it_names():
    def rules(**options) -> set:
        model = create_model("crossformer_tiny", embed_dim=16, depths=(2, 2, 2, 2), heads=1, **options)
        layers = [m for m in model.modules() if isinstance(m, LongShortDistanceAttention)]
        return {(layer.small_map, layer.small_size, layer.padding) for layer in layers}

    assert rules() == {("longer", (7, 7), "masked")}
    assert rules(long_distance="grid") == rules(long_distance="interval") == {("shorter", (7, 7), "masked")}
    assert rules(long_distance="interval", small_map="longer") == {("longer", (7, 7), "masked")}
    assert rules(padding="attended", small_map="shorter") == {("shorter", (7, 7), "attended")}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"small_map": "single"}, "small_map must be 'longer' or 'shorter', got 'single'"),
        ({"padding": "centred"}, "padding must be 'masked' or 'attended', below and to the right, got 'centred'"),
        ({"small_size": 0}, "small_size must be at least 1"),
    ],
)
def test_rules_that_are_not_offered(options, message):
    with pytest.raises(ValueError, match=message):
        LongShortDistanceAttention(32, 2, 7, 2, **options)
    if "small_size" not in options:
        with pytest.raises(ValueError, match=message):
            create_model("crossformer_tiny", **options)


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

    def test_compile_frozen(self, layer):
        """Nothing requires a gradient, and autograd is on."""
        torch.compiler.reset()
        layer, x = copy.deepcopy(layer).requires_grad_(False), torch.randn(1, 9, 10, 32)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))

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


def pooling(dim: int, heads: int, size: tuple[int, ...], kernel: int) -> MultiScaleAttention:
    pools = {"kernel_q": kernel, "kernel_kv": kernel, "stride_kv": (1, 2, 2)[-len(size) :]}
    time = len(size) == 3
    return MultiScaleAttention(dim, dim, heads, size, **pools, rel_pos_spatial=True, rel_pos_temporal=time)


STRIDED: dict[str, nn.Module] = {
    "lsda": LongShortDistanceAttention(32, 1, 3, 2),
    "lsda, hidden width 1": LongShortDistanceAttention(16, 16, 3),
    "window": WindowAttention(4, 1, 3, 1),
    "window of one token": WindowAttention(4, 2, 1),
    "one channel": WindowAttention(1, 1, 3),
    "grid": MaxSA(4, 1, "grid", 3),
    "stripes": CrossShapedWindowAttention(4, 2, 3),
    "stripes, one channel each": CrossShapedWindowAttention(2, 2, 3),
    "whole map": CrossShapedWindowAttention(4, 1, last_stage=True),
    "clusters": FeatureSpaceAttention(4, 1, 9, 4),
    "pooled": pooling(4, 1, (9, 9), 3),
    "pooled, one channel": pooling(1, 1, (9, 9), 3),
    "pooled video": pooling(4, 1, (2, 9, 9), 3),
    "pooled by strides alone": pooling(4, 2, (9, 9), 1),
    "pooled, tables of one row": pooling(4, 2, (1, 1), 3),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", STRIDED)
def test_gradients_are_strided_as_their_parameters(name, channels_last, backend):
    """DistributedDataParallel warns of other strides, of a dimension of size 1 too, and copies."""
    layer = copy.deepcopy(STRIDED[name])
    if isinstance(layer, MultiScaleAttention):
        thw = (2, 9, 9)[-len(layer.kernel_q) :]
        inputs = torch.randn(2, math.prod(thw), layer.dim), thw
    else:
        inputs = (torch.randn(2, 9, 9, layer.dim),)
    if channels_last:
        layer.to(memory_format=torch.channels_last_3d if "video" in name else torch.channels_last)
    out = layer(*inputs)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    strides = {name: (p.stride(), p.grad.stride()) for name, p in layer.named_parameters()}
    assert {name: pair for name, pair in strides.items() if pair[0] != pair[1]} == {}


# Parts that were changed act, wherever the kernels read their weights otherwise: what follows calls every part.


def called_lsda(layer, x):
    axes = [torch.arange(1 - g, g, dtype=x.dtype) for g in layer.partition.group]
    pos = layer.pos
    table = pos.pos3(pos.pos2(pos.pos1(pos.pos_proj(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)))))
    qkv = layer.qkv(x).unflatten(-1, (3, layer.heads, -1))
    out = partition_attention_qkvpacked(qkv, layer.partition, table.movedim(-1, 0), backend="reference")
    return layer.proj(out.flatten(3))


def called_pooling(layer, x):
    batch, heads, thw = len(x), layer.heads, (2, 6, 5)
    parts = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
    pooled, maps = [], []
    for name, part in zip("qkv", parts):
        volume = part[:, 1:].permute(0, 2, 3, 1).reshape(batch * heads, -1, *thw)
        volume = getattr(layer, f"pool_{name}")(volume)
        tokens = volume.reshape(batch, heads, volume.shape[1], -1).permute(0, 3, 1, 2)
        pooled.append(getattr(layer, f"norm_{name}")(torch.cat((part[:, :1], tokens), 1)))
        maps.append(tuple(volume.shape[2:]))
    tables = layer.rel_pos_t, layer.rel_pos_h, layer.rel_pos_w
    sizes = {"q_thw": maps[0], "k_thw": maps[1]}
    out = pooled_attention(*pooled, **sizes, rel_pos=tables, has_cls=True, backend="reference")
    return layer.proj(out.flatten(2))


def called_embedding(layer, images):
    return layer.norm(torch.cat([proj(images) for proj in layer.projs], 1).permute(0, 2, 3, 1))


class Adapted(nn.Module):
    """A low-rank adapter around a layer, which has neither its class nor its attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.factor = layer, nn.Parameter(torch.full((), 0.5, dtype=torch.float64))

    def forward(self, x):
        return self.layer(x) * (1 + self.factor)


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def own_forward(part: nn.Module) -> None:
    forward = part.forward
    part.forward = lambda x: 2 * forward(x)


CHANGES = {
    "pruned": lambda part: prune.l1_unstructured(part, "weight", 0.5) and None,
    "parametrised": lambda part: parametrize.register_parametrization(part, "weight", Tripled()) and None,
    "weight norm": lambda part: weight_norm(part) and None,
    "spectral norm": lambda part: spectral_norm(part) and None,
    "adapter": Adapted,
    "forward hook": lambda part: part.register_forward_hook(lambda module, args, out: 2 * out) and None,
    "forward pre-hook": lambda part: part.register_forward_pre_hook(lambda module, args: (2 * args[0],)) and None,
    "backward hook": lambda part: (
        part.register_full_backward_hook(lambda module, into, out: tuple(x if x is None else 2 * x for x in into))
        and None
    ),
    "own forward": own_forward,
}
NORMS = ("weight norm", "spectral norm")  # of matrices
READ: dict[str, tuple] = {
    "lsda": (
        lambda: LongShortDistanceAttention(32, 2, (4, 3), 2),
        called_lsda,
        (torch.randn(2, 8, 9, 32, dtype=torch.float64),),
        {"pos.pos_proj": (), "pos.pos1.2": (), "pos.pos2.0": NORMS, "pos.pos3.2": ()},
    ),
    "pooling": (
        lambda: MultiScaleAttention(
            16, 16, 2, (2, 6, 5), kernel_q=3, kernel_kv=3, stride_kv=(1, 2, 2), has_cls=True, rel_pos_spatial=True,
            rel_pos_temporal=True,
        ),
        called_pooling,
        (torch.randn(2, 61, 16, dtype=torch.float64), (2, 6, 5)),
        {"pool_q": (), "pool_k": (), "norm_v": NORMS},
    ),
    "embedding": (
        lambda: CrossScaleEmbedding(3, 16, (4, 8, 16)),
        called_embedding,
        (torch.randn(2, 3, 16, 24, dtype=torch.float64),),
        {"projs.1": ()},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize(
    "name, part, change",
    [
        (n, part, change)
        for n, (*_, parts) in READ.items()
        for part in parts
        for change in CHANGES
        if change not in parts[part]
    ],
)
def test_a_changed_part_acts(name, part, change):
    """Over two training steps: the output, and every parameter, which follows its gradient."""
    make, called, inputs, _ = READ[name]
    torch.manual_seed(0)
    found = make().double()
    expected = copy.deepcopy(found)
    unchanged = found(*inputs)
    for layer in (found, expected):
        torch.manual_seed(1)
        new = CHANGES[change](layer.get_submodule(part))
        if new is not None:
            layer.set_submodule(part, new)
    optimizers = [torch.optim.SGD(layer.parameters(), 0.05) for layer in (found, expected)]
    for _ in range(2):
        outs = found(*inputs), called(expected, inputs[0])
        for out, optimizer in zip(outs, optimizers):
            optimizer.zero_grad()
            (out[0] if isinstance(out, tuple) else out).sin().sum().backward()
            optimizer.step()
        torch.testing.assert_close(outs[0][0] if name == "pooling" else outs[0], outs[1])
        for p, q in zip(found.parameters(), expected.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
    if change != "backward hook":
        assert not torch.allclose(outs[1], unchanged[0] if name == "pooling" else unchanged)


MODELS = {
    "crossformer": lambda: create_model("crossformer_tiny", 5, embed_dim=16, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4)),
    "mvit": lambda: create_model("mvit_v2_tiny", 5, embed_dim=16, depths=(1, 2, 1, 1), image_size=64, drop_path=0.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_is_the_model_of_its_pruned_weights(name):
    torch.manual_seed(0)
    model, images = MODELS[name]().eval(), torch.randn(2, 3, 64, 64)
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
    pruned = model(images)
    for layer in layers:
        prune.remove(layer, "weight")
    torch.testing.assert_close(pruned, model(images))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_runs(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)(images)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_a_quantised_layer_is_its_parts_called():
    torch.manual_seed(0)
    layer = LongShortDistanceAttention(32, 2, (4, 3), 2).eval()
    layer = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)
    x = torch.randn(2, 8, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), called_lsda(layer, x))


def pool(padding: int | tuple = 1, stride: tuple = (1, 2, 2), groups: int = 8, **options) -> nn.Module:
    return nn.Conv3d(8, 8, 3, stride, padding, groups=groups, bias=False, **options)


# by what is other: the part of the layer in READ, and what it becomes
OTHER_POOLS = {
    "dilation": ("pool_k", lambda: pool(padding=2, dilation=2)),
    "padding": ("pool_q", lambda: pool(padding=(1, 0, 0), stride=(1, 1, 1))),
    "stride": ("pool_q", lambda: pool(stride=(2, 1, 1))),
    "values around the map": ("pool_k", lambda: pool(padding_mode="replicate")),
    "channels together": ("pool_v", lambda: pool(groups=1)),
    "two layers": ("pool_k", lambda: nn.Sequential(pool(), nn.ReLU())),
    "norm without a bias": ("norm_k", lambda: nn.LayerNorm(8, 1e-6, bias=False)),
    "norm without weights": ("norm_q", lambda: nn.LayerNorm(8, 1e-6, elementwise_affine=False)),
    "no norm": ("norm_v", nn.Identity),
}


def test_parts_of_another_make_are_called():
    """They have other forms, and kernels that read them would take them for the usual ones."""
    torch.manual_seed(0)
    layer = LongShortDistanceAttention(32, 2, (4, 3), 2)
    x = torch.randn(2, 8, 9, 32)
    for part, other in {
        "pos.pos_proj": nn.Linear(2, 2, bias=False),
        "pos.pos1": nn.Linear(2, 2),
        "pos.pos2": nn.Sequential(nn.LayerNorm(2, eps=0.1), nn.ReLU(), nn.Linear(2, 2)),
        "pos.pos3": nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2), nn.ReLU()),
    }.items():
        changed = copy.deepcopy(layer)
        changed.set_submodule(part, other)
        torch.testing.assert_close(changed(x), called_lsda(changed, x))


def test_a_bias_that_is_no_parameter():
    """A network that makes the weights of another sets them as plain tensors."""
    torch.manual_seed(0)
    layer, x = LongShortDistanceAttention(32, 2, (4, 3), 2), torch.randn(2, 8, 9, 32)
    for part in (layer.pos.pos_proj, layer.pos.pos1[0], layer.pos.pos2[2]):
        bias = 2 * part.bias.detach() + 1
        del part.bias
        part.bias = bias
    torch.testing.assert_close(layer(x), called_lsda(layer, x))


@pytest.mark.parametrize("part", OTHER_POOLS)
def test_pools_of_another_make_are_called(part):
    make, called, inputs, _ = READ["pooling"]
    torch.manual_seed(0)
    layer = make().double()
    name, other = OTHER_POOLS[part]
    layer.set_submodule(name, other().double())
    out, thw = layer(*inputs)
    torch.testing.assert_close(out, called(layer, inputs[0]))


def test_a_convolution_of_another_make_is_called():
    torch.manual_seed(0)
    layer, images = CrossScaleEmbedding(3, 16, (4, 8, 16)), torch.randn(2, 3, 16, 24)
    layer.projs[1] = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU())
    layer.projs[2] = nn.Conv2d(3, 4, 6, 4, 1)
    torch.testing.assert_close(layer(images), called_embedding(layer, images))


def test_an_inline_form_refuses_parts_that_must_be_called(device):
    layer = LongShortDistanceAttention(32, 2, 4, 2).to(device)
    prune.l1_unstructured(layer.pos.pos1[2], "weight", 0.5)
    qkv = torch.randn(1, 8, 8, 3, 2, 16, device=device)
    with pytest.raises(RuntimeError, match="form='inline' reads the parameters .* Use form='table'"):
        lsda_attention(qkv, layer.pos, group_size=4, interval=2, backend="triton", form="inline")


class Compressed(torch.Tensor):
    """A weight in another form, as torchao's quantised ones: its layer keeps its class, and `F.linear` its meaning."""

    def __tensor_flatten__(self):
        return [], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            args = [3 * x.as_subclass(torch.Tensor) if isinstance(x, Compressed) else x for x in args]
            return function(*args)
        return super().__torch_function__(function, types, args, kwargs)


def test_weights_of_another_kind_act():
    torch.manual_seed(0)
    layer = LongShortDistanceAttention(32, 2, (4, 3), 2).requires_grad_(False)
    expected, x = copy.deepcopy(layer), torch.randn(2, 8, 9, 32)
    layer.pos.pos3[2].weight = nn.Parameter(layer.pos.pos3[2].weight.as_subclass(Compressed), requires_grad=False)
    expected.pos.pos3[2].weight *= 3
    torch.testing.assert_close(layer(x), expected(x))


def test_a_table_of_called_parts_is_not_kept():
    layer = LongShortDistanceAttention(32, 2, 4).eval()
    with torch.no_grad():
        before = layer.pos(4)
        handle = layer.pos.pos3.register_forward_hook(lambda module, args, out: 2 * out)
        torch.testing.assert_close(layer.pos(4), 2 * before)
        handle.remove()
        assert torch.equal(layer.pos(4), before)


def test_changed_parts_compile():
    torch.compiler.reset()
    layer = LongShortDistanceAttention(32, 2, (4, 3), 2)
    parametrize.register_parametrization(layer.pos.pos1[2], "weight", Tripled())
    pooling = READ["pooling"][0]()
    parametrize.register_parametrization(pooling.pool_q, "weight", Tripled())
    x, (tokens, thw) = torch.randn(2, 8, 9, 32), READ["pooling"][2]
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    tokens = tokens.float()
    compiled = torch.compile(pooling, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, thw), pooling(tokens, thw))


def test_convolutions_are_traced_with_weights_that_learn(tmp_path):
    layer, v = LocalPosition(16), torch.randn(1, 5, 6, 2, 8)
    torch.jit.save(torch.jit.trace(layer, v), tmp_path / "layer.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(v), layer(v))


def test_layers_share_one_compiled_graph():
    """Asking each layer whether its parts may be read makes no graphs of their own for layers of one make."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    for _ in range(4):
        call(LongShortDistanceAttention(32, 2, 4, 2), torch.randn(1, 8, 8, 32))
    assert counter.frame_count == 1
