"""MViT's layer: golden vectors of the official code, torchvision's and timm's layers with the same weights."""

from __future__ import annotations

import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import restored
from contract import assert_contract, assert_layer_contract
from golden import assert_golden
from torch import nn
from torch.func import functional_call

from vitkernels import MultiScaleAttention, Pool, pool_qkv, pooled_attention
from vitkernels.models.mvit import Block
from vitkernels.pooled_attention.reference import relative_index


def golden_layer(config: dict, index: str) -> MultiScaleAttention:
    return MultiScaleAttention(
        config["dim"],
        config["dim_out"],
        config["heads"],
        config["input_size"],
        **{name: config[name] for name in ("kernel_q", "kernel_kv", "stride_q", "stride_kv", "mode")},
        has_cls=config["cls"],
        rel_pos_spatial=config["rel_pos_spatial"],
        rel_pos_temporal=config["rel_pos_temporal"],
        residual="all_but_cls" if config["residual_pooling"] else "none",
        index=index,
    )


@pytest.mark.parametrize("name, index", [("v1", "exact"), ("v2", "exact"), ("v2", "slowfast"), ("nonint", "slowfast")])
def test_golden_attention(name, index, golden, backend):
    meta, data = golden(f"mvit_attention_{name}")
    config = meta["config"]
    assert_golden(golden_layer(config, index), config["thw"], meta, data)


def test_golden_block(golden, backend):
    meta, data = golden("mvit_block_v2")
    config = meta["config"]
    ratio = data["sd.mlp.fc1.bias"].numel() / config["dim_out"]
    block = Block(config["dim"], config["dim_out"], golden_layer(config, "exact"), ratio, 0.0)
    assert_golden(block, config["thw"], meta, data)


def test_golden_index(golden):
    _, data = golden("mvit_attention_nonint")
    for axis in "hw":
        expected = data[f"idx.{axis}"].long()
        assert torch.equal(relative_index(*expected.shape, "slowfast"), expected)
        differing = (relative_index(*expected.shape, "exact") != expected).sum()
        assert differing == {"h": 16, "w": 0}[axis]


def like_torchvision(theirs: nn.Module, input_size: tuple[int, int, int]) -> MultiScaleAttention:
    """The layer with the options of torchvision's."""
    geometry = {}
    for name, pool in (("q", theirs.pool_q), ("kv", theirs.pool_k)):
        if pool is not None:
            geometry |= {f"kernel_{name}": pool.pool.kernel_size, f"stride_{name}": pool.pool.stride}
    residual = "all" if theirs.residual_with_cls_embed else "all_but_cls"
    return MultiScaleAttention(
        theirs.embed_dim,
        theirs.output_dim,
        theirs.num_heads,
        input_size,
        **geometry,
        has_cls=True,
        rel_pos_spatial=theirs.rel_pos_h is not None,
        rel_pos_temporal=theirs.rel_pos_t is not None,
        residual=residual if theirs.residual_pool else "none",
        index="torchvision",
    )


def like_timm(theirs: nn.Module, input_size: tuple[int, int]) -> MultiScaleAttention:
    """The layer with the options of timm's."""
    geometry = {}
    for name, pool in (("q", theirs.pool_q), ("kv", theirs.pool_k)):
        if pool is not None:
            geometry |= {f"kernel_{name}": pool.kernel_size, f"stride_{name}": pool.stride}
    return MultiScaleAttention(
        theirs.qkv.in_features,
        theirs.dim_out,
        theirs.num_heads,
        input_size,
        **geometry,
        mode=theirs.mode,
        has_cls=theirs.has_cls_token,
        rel_pos_spatial=theirs.rel_pos_type == "spatial",
        residual="all" if theirs.residual_pooling else "none",
        index="slowfast",
        qkv_bias=theirs.qkv.bias is not None,
    )


def randomize(layer: nn.Module) -> None:
    """Norms, biases and tables that are not those of a fresh layer, which would hide errors."""
    for name, parameter in layer.named_parameters():
        if name.startswith("rel_pos") or parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)


def assert_parity(ours: MultiScaleAttention, theirs: nn.Module, thw: tuple[int, ...], dtype: torch.dtype, batch: int):
    """Output and every gradient of the layer, with the weights of ``theirs``, under the numerical contract."""
    torch.manual_seed(0)
    randomize(theirs)
    weights = theirs.state_dict()
    names = [ours.rename(key) for key in weights]
    ours.load_state_dict({ours.rename(key): value for key, value in weights.items()})
    x = torch.randn(batch, math.prod(thw) + ours.has_cls, ours.dim, dtype=torch.float64)
    out, size = ours(x.float(), thw)
    assert tuple(theirs(x.float(), thw)[1]) == size

    def run(layer, keys):
        return lambda x, *values: functional_call(layer, dict(zip(keys, values)), (x, thw))[0]

    inputs = [x, *(value.double() for value in weights.values())]
    places = {name: i for i, name in enumerate(names, 1)}
    # softmax ignores what all keys share
    vanishing = {places["norm_k.bias"]: places["norm_k.weight"]} if "norm_k.bias" in places else {}
    together = [i for name, i in places.items() if name.startswith(("pool", "norm"))]
    assert_contract(
        run(ours, names), run(theirs, weights), inputs, torch.randn_like(out, dtype=torch.float64), dtype,
        together=together, vanishing=vanishing,
    )  # fmt: skip


V1 = {"stride_q": (1, 2, 2), "stride_kv": (1, 4, 4)}
V2 = {**V1, "rel_pos_embed": True, "residual_pool": True}
TORCHVISION = {
    "v1": ((2, 8, 8), (2, 8, 8), V1),
    "v1 on a map that does not divide": ((3, 9, 9), (3, 9, 7), V1),
    "v2": ((2, 8, 8), (2, 8, 8), V2),
    "v2 with the class token's residual": ((2, 8, 8), (2, 8, 8), {**V2, "residual_with_cls_embed": True}),
    "v2 on another map that does not divide": ((3, 10, 10), (2, 11, 9), V2),
    "v2, 16 queries to 6 keys": ((2, 16, 16), (2, 16, 11), {**V2, "stride_q": (1, 1, 1), "stride_kv": (1, 3, 3)}),
    "v2, strides in time": ((4, 8, 8), (5, 8, 8), {**V2, "stride_q": (2, 2, 2), "stride_kv": (2, 4, 4)}),
    "queries not pooled": ((2, 8, 8), (2, 8, 8), {**V2, "kernel_q": (1, 1, 1), "stride_q": (1, 1, 1)}),
    "large windows": ((2, 8, 8), (2, 8, 8), {**V1, "kernel_q": (1, 3, 3), "kernel_kv": (1, 5, 5)}),
    "nothing pooled": ((2, 4, 4), (2, 4, 4), {**V2, **dict.fromkeys((*V1, "kernel_q", "kernel_kv"), (1, 1, 1))}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("input_size, thw, options", TORCHVISION.values(), ids=TORCHVISION)
def test_torchvision(input_size, thw, options, dtype, torchvision, backend):
    from torchvision.models.video.mvit import MultiscaleAttention

    defaults = {
        **{"kernel_q": (3, 3, 3), "kernel_kv": (3, 3, 3), "norm_layer": partial(nn.LayerNorm, eps=1e-6)},
        **{"residual_pool": False, "residual_with_cls_embed": False, "rel_pos_embed": False},
    }
    theirs = MultiscaleAttention(input_size, 24, 48, 2, **{**defaults, **options})
    assert_parity(like_torchvision(theirs, input_size), theirs, thw, dtype, batch=2)


@pytest.mark.parametrize("queries, keys", [(22, 26), (26, 22), (33, 39), (39, 33)])
def test_torchvision_index(queries, keys, torchvision, backend):
    """Of the maps under 40 tokens, those where torchvision's rounding is not the exact one. No pooling makes them."""
    from torchvision.models.video.mvit import _add_rel_pos

    assert not torch.equal(relative_index(queries, keys, "torchvision"), relative_index(queries, keys, "exact"))
    torch.manual_seed(0)
    q_thw, k_thw = (1, 2, queries), (1, 2, keys)
    q, k, v = (torch.randn(2, 2 * n + 1, 2, 8, dtype=torch.float64) for n in (queries, keys, keys))
    tables = [torch.randn(2 * n - 1, 8, dtype=torch.float64) for n in (1, 2, max(queries, keys))]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    logits = heads_first[0] @ heads_first[1].mT * 8**-0.5
    logits = _add_rel_pos(logits, heads_first[0], q_thw, k_thw, *tables[1:], tables[0])
    expected = (logits.softmax(-1) @ heads_first[2]).transpose(1, 2)
    options = {"q_thw": q_thw, "k_thw": k_thw, "rel_pos": tables, "has_cls": True}
    torch.testing.assert_close(pooled_attention(q, k, v, **options, index="torchvision"), expected)


@pytest.mark.parametrize("model, block, side", [("v1_b", 0, 56), ("v1_b", 14, 14), ("v2_s", 1, 56), ("v2_s", 15, 7)])
def test_torchvision_models(model, block, side, torchvision, backend):
    """Layers of the published models, on two frames, which the table along time is interpolated for."""
    theirs = getattr(torchvision.models.video, f"mvit_{model}")().eval().blocks[block].attn
    ours = like_torchvision(theirs, (8, side, side))
    assert_parity(ours, theirs, (2, side, side), torch.float32, batch=1)


STRIDED = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (2, 2), "stride_kv": (4, 4)}
PLAIN = {"rel_pos_type": "", "residual_pooling": False}
TIMM = {
    "conv": ((16, 16), STRIDED),
    "max": ((16, 16), {**STRIDED, "mode": "max"}),
    "avg": ((16, 16), {**STRIDED, "mode": "avg"}),
    "conv with a class token": ((8, 8), {**STRIDED, "has_cls_token": True}),
    "max with a class token": ((8, 8), {**STRIDED, "has_cls_token": True, "mode": "max"}),
    "conv on a map that does not divide": ((9, 7), {**STRIDED, **PLAIN, "qkv_bias": False}),
    "avg on a map that does not divide": ((9, 7), {**STRIDED, **PLAIN, "mode": "avg"}),
    "without residual": ((8, 8), {**STRIDED, "residual_pooling": False}),
    "16 queries to 6 keys": ((16, 16), {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_kv": (3, 3)}),
    "only keys and values pooled": ((8, 8), {"kernel_kv": (3, 3), "stride_kv": (2, 2)}),
    "nothing pooled": ((5, 5), {"has_cls_token": True}),
}


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm")  # which imports torchvision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("thw, options", TIMM.values(), ids=TIMM)
def test_timm(thw, options, dtype, timm, backend):
    """Maps that timm's tables are long enough for: it does not interpolate them."""
    defaults = {"has_cls_token": False, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    theirs = timm.models.mvitv2.MultiScaleAttention(24, 48, thw, 2, **{**defaults, **options})
    assert_parity(like_timm(theirs, thw), theirs, thw, dtype, batch=2)


@pytest.mark.parametrize("stage, block, side", [(0, 0, 56), (1, 0, 56), (2, 1, 14), (3, 1, 7)])
def test_timm_models(stage, block, side, timm, backend):
    theirs = timm.create_model("mvitv2_tiny").eval().stages[stage].blocks[block].attn
    assert_parity(like_timm(theirs, (side, side)), theirs, (side, side), torch.float32, batch=1)


VIDEO = {"stride_q": (1, 2, 2), "stride_kv": (1, 4, 4), "has_cls": True, "rel_pos_temporal": True}
LAYERS = {
    "video": ((2, 8, 8), {**VIDEO, "kernel_q": 3, "kernel_kv": 3, "rel_pos_spatial": True, "residual": "all_but_cls"}),
    "image": ((8, 8), {"kernel_q": 3, "kernel_kv": 3, "stride_kv": 2, "rel_pos_spatial": True, "residual": "all"}),
    "first version": ((2, 8, 8), {"kernel_kv": (1, 3, 3), "stride_kv": (1, 2, 2), "has_cls": True}),
    "max": ((8, 8), {"mode": "max", "kernel_q": 3, "kernel_kv": 3, "stride_q": 2, "stride_kv": 4}),
}


def make(size: tuple[int, ...], options: dict) -> MultiScaleAttention:
    torch.manual_seed(0)
    layer = MultiScaleAttention(24, 48, 2, size, **options)
    randomize(layer)
    return layer


def tokens(layer: MultiScaleAttention, size: tuple[int, ...], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, math.prod(size) + layer.has_cls, layer.dim)


PROJECTIONS = {"qkv.weight": (144, 24), "qkv.bias": (144,), "proj.weight": (48, 48), "proj.bias": (48,)}


def pools(names: str, *kernel: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name in names:
        shapes |= {f"pool_{name}.weight": (24, 1, *kernel)}
        shapes |= {f"norm_{name}.weight": (24,), f"norm_{name}.bias": (24,)}
    return shapes


STATES = {
    "video": pools("qkv", 3, 3, 3) | {"rel_pos_t": (3, 24), "rel_pos_h": (7, 24), "rel_pos_w": (7, 24)},
    "image": pools("qkv", 3, 3) | {"rel_pos_h": (15, 24), "rel_pos_w": (15, 24)},
    "first version": pools("kv", 1, 3, 3),
    "max": {},
}


@pytest.mark.parametrize("name", LAYERS)
def test_state_has_the_official_names(name):
    layer = make(*LAYERS[name])
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == PROJECTIONS | STATES[name]
    assert "qkv.bias" not in make(LAYERS[name][0], LAYERS[name][1] | {"qkv_bias": False}).state_dict()


@pytest.mark.parametrize("size, options", LAYERS.values(), ids=LAYERS)
class TestLayer:
    def test_the_layer_is_the_operators_between_its_projections(self, size, options, backend):
        layer = make(size, options)
        x = tokens(layer, size)
        kernels = {"q": layer.kernel_q, "k": layer.kernel_kv, "v": layer.kernel_kv}
        strides = {"q": layer.stride_q, "k": layer.stride_kv, "v": layer.stride_kv}
        chosen = []
        for name in "qkv":
            pool, norm = getattr(layer, f"pool_{name}"), getattr(layer, f"norm_{name}")
            if layer.mode != "conv":
                chosen.append(Pool(stride=strides[name], kernel=kernels[name], mode=layer.mode))
            elif pool is None:
                chosen.append(None)
            else:
                chosen.append(Pool(pool.weight, norm.weight, norm.bias, strides[name]))
        qkv = layer.qkv(x).unflatten(-1, (3, 2, 24))
        (q, q_thw), (k, k_thw), (v, _) = pool_qkv(qkv, *chosen, thw=size, has_cls=layer.has_cls)
        tables = [getattr(layer, f"rel_pos_{axis}") for axis in "thw"[-len(size) :]]
        out = pooled_attention(
            q, k, v, q_thw=q_thw, k_thw=k_thw, rel_pos=tables, has_cls=layer.has_cls, residual=layer.residual
        )
        expected = layer.proj(out.flatten(2))
        found, new = layer(x, size)
        assert new == q_thw
        torch.testing.assert_close(found, expected)

    def test_every_parameter_learns(self, size, options, backend):
        layer = make(size, options)
        x = tokens(layer, size).requires_grad_()
        layer(x, size)[0].square().sum().backward()
        for name, tensor in [("x", x), *layer.named_parameters()]:
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().max() > 0 or name == "norm_k.bias"  # which softmax ignores

    def test_copies_and_pickles(self, size, options):
        layer = make(size, options)
        x = tokens(layer, size)
        expected, _ = layer(x, size)
        other = restored(layer)
        assert torch.equal(other(x, size)[0], expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x, size)[0], expected)

    def test_autocast_and_half(self, size, options, backend):
        layer = make(size, options)
        x = tokens(layer, size)
        for autocast in (True, False):
            assert_layer_contract(layer, torch.bfloat16, x, size, autocast=autocast)

    def test_compile(self, size, options):
        torch.compiler.reset()
        layer = make(size, options)
        x = tokens(layer, size)
        found, new = torch.compile(layer, fullgraph=True)(x, size)
        expected, expected_new = layer(x, size)
        assert new == expected_new
        torch.testing.assert_close(found, expected)

    def test_export(self, size, options):
        layer = make(size, options).eval()
        x = tokens(layer, size)
        program = torch.export.export(layer, (x, size))
        torch.testing.assert_close(program.module()(x, size)[0], layer(x, size)[0])

    def test_empty_batch(self, size, options, backend):
        layer = make(size, options)
        x = tokens(layer, size, batch=0).requires_grad_()
        out, new = layer(x, size)
        assert out.shape == (0, math.prod(new) + layer.has_cls, 48)
        out.sum().backward()
        assert x.grad.shape == x.shape and all(p.grad.abs().max() == 0 for p in layer.parameters())

    def test_refusals(self, size, options):
        layer = make(size, options)
        x = tokens(layer, size)
        count = math.prod(size) + layer.has_cls
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor \[B, N, C\]"):
            layer(None, size)
        with pytest.raises(ValueError, match=r"x must be \[B, N, C\], got 4 dimensions"):
            layer(x.unsqueeze(0), size)
        with pytest.raises(ValueError, match=rf"x must be \[B, N, C\] with C = 24, got \[2, {count}, 23\]"):
            layer(x[..., 1:], size)
        with pytest.raises(ValueError, match=rf"= {count} tokens, x has {count - 1}"):
            layer(x[:, 1:], size)
        with pytest.raises(ValueError, match=rf"thw must have the {len(size)} axes of input_size, got"):
            layer(x, (1, *size) if len(size) == 2 else (2 * 8, 8))
        with pytest.raises(ValueError, match=r"thw must be \(H, W\) or \(T, H, W\), in tokens"):
            layer(x, 8)


@pytest.mark.parametrize("thw", [(1, 8, 8), (3, 5, 9), (2, 16, 12), (1, 1, 1)])
def test_tables_are_interpolated_on_other_maps(thw, backend):
    """As torch interpolates them; the tables learn through it."""
    size, options = LAYERS["video"]
    layer = make(size, options)
    x = tokens(layer, thw)
    lengths = [2 * max(-(-n // s) for s in strides) - 1 for n, *strides in zip(thw, layer.stride_q, layer.stride_kv)]
    tables = {}
    for axis, length in zip("thw", lengths):
        table = getattr(layer, f"rel_pos_{axis}")
        tables[f"rel_pos_{axis}"] = F.interpolate(table.T[None], length, mode="linear")[0].T
        if length != len(table):
            assert not torch.equal(table[:length], tables[f"rel_pos_{axis}"][: len(table)])
    found, _ = layer(x, thw)
    expected, _ = functional_call(layer, tables, (x, thw))
    torch.testing.assert_close(found, expected)
    leaves = [layer.rel_pos_t, layer.rel_pos_h, layer.rel_pos_w]
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, cotangent) for out in (found, expected)))


def test_a_layer_keeps_no_trace_of_a_map(backend):
    size, options = LAYERS["video"]
    layer = make(size, options)
    x = tokens(layer, size)
    first, _ = layer(x, size)
    layer(tokens(layer, (3, 5, 9)), (3, 5, 9))
    assert torch.equal(layer(x, size)[0], first)


def test_dropout_is_of_the_output_and_in_training_alone():
    size, options = LAYERS["image"]
    layer, plain = make(size, options | {"proj_drop": 1.0}), make(size, options)
    x = tokens(layer, size)
    assert layer(x, size)[0].abs().max() == 0
    assert torch.equal(layer.eval()(x, size)[0], plain(x, size)[0])


def test_repr_says_what_the_layer_does():
    text = repr(make(*LAYERS["video"]))
    for part in ("dim=24, dim_out=48, heads=2", "stride_q=(1, 2, 2)", "mode='conv'", "residual='all_but_cls'"):
        assert part in text


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim_out": 47}, ValueError, "dim_out must be a multiple of heads, got dim_out 47 and 2 heads"),
        ({"heads": 2.0}, TypeError, "heads must be an int"),
        ({"input_size": 8}, ValueError, r"input_size must be \(H, W\) or \(T, H, W\), in tokens, got 8"),
        ({"input_size": (8, 0)}, ValueError, r"input_size must be at least 1 along every axis, got \(8, 0\)"),
        ({"kernel_q": 0}, ValueError, r"kernel_q must be at least 1 along every axis"),
        ({"kernel_kv": (3, 3, 3)}, ValueError, r"kernel_kv must have one entry for each of the 2 axes of the map"),
        ({"stride_q": 1.5}, TypeError, "stride_q must be an int or a tuple of ints, got 1.5"),
        ({"stride_kv": (2,)}, ValueError, r"stride_kv must have one entry for each of the 2 axes of the map"),
        ({"mode": "conv_unshared"}, ValueError, "mode must be one of conv, max, avg, got 'conv_unshared'"),
        ({"residual": True}, ValueError, "residual must be one of none, all, all_but_cls, got True"),
        ({"index": "timm"}, ValueError, "index must be one of exact, slowfast, torchvision, got 'timm'"),
        ({"rel_pos_temporal": True}, ValueError, r"rel_pos_temporal needs a map with time: input_size \(T, H, W\)"),
    ],
)
def test_constructor_refusals(change, error, message):
    with pytest.raises(error, match=message):
        MultiScaleAttention(**{"dim": 24, "dim_out": 48, "heads": 2, "input_size": (8, 8), **change})
