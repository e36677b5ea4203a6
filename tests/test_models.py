"""The model families: published sizes, other libraries' models with the same weights, golden vectors, any image."""

from __future__ import annotations

import copy
import hashlib
import importlib
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import restored
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitkernels import MaxSA, _dispatch, use_backend
from vitkernels.models import create_model, list_models, load_checkpoint
from vitkernels.models._blocks import DropPath

# parameters in millions: published, or counted in the published code; multiply-adds in billions of one image or video
PUBLISHED = {
    "crossformer_tiny": (27.78, 2.86),
    "crossformer_small": (30.66, 4.91),
    "crossformer_base": (51.97, None),
    "crossformer_large": (91.97, None),
    "crossformer_pp_small": (23.33, 4.39),
    "crossformer_pp_base": (51.99, None),
    "crossformer_pp_large": (92.00, None),
    "crossformer_pp_huge": (95.96, None),
    "boat_swin_tiny": (30.27, 5.20),
    "boat_swin_small": (55.16, None),
    "boat_swin_base": (97.61, None),
    "boat_cswin_tiny": (26.39, 5.20),
    "boat_cswin_small": (40.11, None),
    "boat_cswin_base": (89.63, None),
    "maxvit_tiny": (30.92, 5.56),
    "maxvit_small": (69, None),
    "maxvit_base": (119.5, None),
    "maxvit_large": (212, None),
    "maxvit_xlarge": (475, None),
    "mvit_v1_base_16x4": (36.61, 70.6),
    "mvit_v1_base_32x3": (36.61, None),
    "mvit_v2_tiny": (24.17, 4.7),
    "mvit_v2_small": (34.87, 7.0),
    "mvit_v2_base": (51.47, None),
    "mvit_v2_large": (217.99, None),
    "mvit_v2_small_16x4": (34.5, 64.2),
    "mvit_v2_base_32x3": (51.2, None),
    "mvit_v2_large_40x3": (217.6, None),
}
# Published with its width doubled in the MLPs, as the image model is; the configuration of its weights doubles it in
# the attention, which has fewer parameters.
COUNTED_OTHERWISE = {"mvit_v2_large_40x3": {"expand_in": "mlp"}}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name):
    millions, billions = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name, backend="reference", **COUNTED_OTHERWISE.get(name, {})).eval()
        assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.006)
        if billions is None:
            return
        images = torch.empty(1, 3, *((16,) if "16x4" in name else ()), 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.01)


def test_all_models_have_a_published_size():
    assert list_models() == sorted(PUBLISHED)
    assert list_models("*cswin*") == ["boat_cswin_base", "boat_cswin_small", "boat_cswin_tiny"]


def randomise(model: nn.Module) -> None:
    """Norms, tables and running statistics that are not those of a fresh model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(word in name for word in ("table", "rel_pos", "pos_", "class_token", "cls_token")):
                p.normal_(std=0.3)
            elif p.dim() == 1:
                p.uniform_(0.5, 1.5) if name.endswith("weight") else p.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradients(model: nn.Module, images: torch.Tensor, cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The output, the gradient of the images, and those of the parameters."""
    images = images.clone().requires_grad_()
    out = model(images)
    return [out.detach(), *torch.autograd.grad(out, [images, *model.parameters()], cotangent.expand_as(out))]


TWINS = {
    "timm maxvit_tiny_tf_224": ("maxvit_tiny", {}),
    "timm maxvit_tiny_rw_224": ("maxvit_tiny", {"style": "rw", "stem_width": (32, 64)}),
    "timm mvitv2_tiny": ("mvit_v2_tiny", {}),
    "torchvision maxvit_t": ("maxvit_tiny", {"style": "torchvision"}),
    "torchvision mvit_v1_b": ("mvit_v1_base_16x4", {}),
    "torchvision mvit_v2_s": ("mvit_v2_small_16x4", {}),
}


def twin_of(twin: str, torchvision) -> nn.Module:
    library, name = twin.split()
    torch.manual_seed(0)  # of the weights that `randomise` leaves
    if library == "timm":  # imports torchvision
        return pytest.importorskip("timm").create_model(name)
    models = torchvision.models
    return models.maxvit_t(input_size=(224, 224)) if name == "maxvit_t" else getattr(models.video, name)()


def load(theirs: nn.Module, twin: str, path, **options) -> nn.Module:
    """Our model with the weights that a library's model has, randomised."""
    randomise(theirs)
    torch.save(theirs.eval().state_dict(), path)
    name, own = TWINS[twin]
    ours = create_model(name, **own, **options).eval()
    load_checkpoint(ours, path)
    assert parameters(ours) == parameters(theirs)
    return ours


def assert_alike(ours: nn.Module, theirs: nn.Module, size: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    """One forward and one backward: the output, the images' gradient and, the parameters having other names, the
    lengths of their gradients in ascending order.
    """
    torch.manual_seed(0)
    images, cotangent = torch.randn(size, dtype=dtype), torch.randn(1, ours.num_classes, dtype=dtype)
    found, expected = (gradients(model.to(dtype), images, cotangent) for model in (ours, theirs))
    lengths = [torch.stack([x.norm() for x in each[2:]]).sort().values for each in (found, expected)]
    for pair in (*zip(found[:2], expected[:2]), lengths):
        assert relative(*pair) < bound


@pytest.mark.parametrize("twin", [name for name in TWINS if "maxvit" in name])
def test_equals_other_libraries(twin, torchvision, tmp_path):
    theirs = twin_of(twin, torchvision)
    ours = load(theirs, twin, tmp_path / "weights.pth")
    assert_alike(ours, theirs, (1, 3, 224, 224), torch.float32, 1e-4)


@pytest.mark.parametrize("twin", [name for name in TWINS if "mvit" in name])
def test_equals_other_libraries_but_for_ties(twin, torchvision, tmp_path, monkeypatch):
    """MViT's skip path takes maxima: of two values that are equal but for rounding a library may take either, which
    moves the gradient. So float32 for the output alone, and float64 for the gradients; those of videos, for time's
    sake, at 96 x 96, which torchvision does not offer.
    """
    theirs = twin_of(twin, torchvision)
    ours = load(theirs, twin, tmp_path / "weights.pth")
    size = (1, 3, 16, 224, 224) if "torchvision" in twin else (1, 3, 224, 224)
    images = torch.randn(size)
    with torch.no_grad():
        assert relative(ours(images), theirs(images)) < 1e-4
    if "torchvision" in twin:
        module, size = importlib.import_module("torchvision.models.video.mvit"), (1, 3, 16, 96, 96)
        build = module._mvit
        monkeypatch.setattr(module, "_mvit", lambda *args, **kw: build(*args, **{**kw, "spatial_size": size[3:]}))
        theirs = twin_of(twin, torchvision)
        ours = load(theirs, twin, tmp_path / "weights.pth", image_size=96)
    assert_alike(ours, theirs, size, torch.float64, 1e-9)


def timm_of_two_stages(torchvision, monkeypatch) -> tuple[nn.Module, dict]:
    """It interpolates no tables: with more stages no image that it takes has strides that do not divide."""
    module = pytest.importorskip("timm.models.mvitv2")
    config = module.MultiScaleVitCfg(depths=(1, 2), embed_dim=24, num_heads=1)
    return module.MultiScaleVit(config, img_size=312, num_classes=5), {"embed_dim": 24, "depths": (1, 2)}


def torchvision_of_312(torchvision, monkeypatch) -> tuple[nn.Module, dict]:
    module, sizes = torchvision.models.video.mvit, {"spatial_size": (312, 312), "temporal_size": 4}
    made = module._mvit
    monkeypatch.setattr(module, "_mvit", lambda **options: made(**{**options, **sizes}))
    return module.mvit_v2_s(num_classes=5), {"frames": 4}


@pytest.mark.parametrize(
    "twin, make, index, other",
    [
        ("timm mvitv2_tiny", timm_of_two_stages, "slowfast", "exact"),
        ("torchvision mvit_v2_s", torchvision_of_312, "torchvision", "slowfast"),
    ],
    ids=["timm", "torchvision"],
)
def test_a_size_whose_strides_do_not_divide(twin, make, index, other, torchvision, tmp_path, monkeypatch):
    """312 x 312 has 78, 39, 20 and 10 tokens along a side: the author's rounding of distances gives his numbers."""
    theirs, options = make(torchvision, monkeypatch)
    ours = load(theirs, twin, tmp_path / "weights.pth", image_size=312, num_classes=5, **options)
    assert ours.index == index
    images = torch.randn(1, 3, *((4,) if "frames" in options else ()), 312, 312)
    with torch.no_grad():
        expected = theirs(images)
        assert relative(ours(images), expected) < 3e-6
        ours.index = other
        assert relative(ours(images), expected) > 3e-5


def test_the_rule_of_relative_distances_is_an_argument_and_an_attribute():
    assert {create_model(name).index for name in ("mvit_v2_tiny", "mvit_v2_small_16x4")} == {"slowfast"}
    model = create_model("mvit_v2_tiny", index="torchvision", depths=(1, 1, 1, 1))
    assert {block.attn.index for block in model.blocks} == {"torchvision"}
    model.index = "exact"
    assert {model.index, *(block.attn.index for block in model.blocks)} == {"exact"}
    with pytest.raises(ValueError, match="index must be one of exact, slowfast, torchvision, got 'timm'"):
        model.index = "timm"
    with pytest.raises(ValueError, match="index must be one of"):
        create_model("mvit_v2_tiny", index="timm")


def uniform(count: int, stream: int) -> np.ndarray:
    """The golden vectors' generated weights, in [-1, 1): SplitMix64 of a counter."""
    z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)
    with np.errstate(over="ignore"):
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0


def recipe(meta: dict) -> dict[str, torch.Tensor]:
    state, digest = {}, hashlib.sha256()
    for key, shape, offset, scale, stream in meta["recipe"]:
        values = (offset + scale * uniform(int(np.prod(shape)), stream)).astype("<f4").reshape(shape)
        digest.update(values.tobytes())
        state[key] = torch.from_numpy(values)
    assert digest.hexdigest() == meta["recipe_sha256"]
    return state


@pytest.mark.parametrize(
    "name",
    ["crossformer_tiny_model", "crossformer_model_recipe", "crossformerpp_tiny_model", "crossformerpp_model_recipe"],
)
def test_golden_crossformer(name, golden, backend, tmp_path):
    meta, data = golden(name)
    config = meta["config"]
    model = create_model(
        "crossformer_tiny",
        config["num_classes"],
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        heads=config["num_heads"],
        group_size=config["group_size"],
        interval=config["crs_interval"],
        patch_size=config["patch_size"],
        merge_size=config["merge_size"],
        mlp_ratio=config["mlp_ratio"],
        cooling=config.get("use_acl", False),
    ).eval()
    stored = {key.removeprefix("sd."): value for key, value in data.items() if key.startswith("sd.")}
    torch.save({"model": stored or recipe(meta)}, tmp_path / "weights.pth")
    load_checkpoint(model, tmp_path / "weights.pth")
    with torch.no_grad():
        out = model(data["x"])
    torch.testing.assert_close(out, data["out"], rtol=0, atol=meta["recommended_tol"]["out_atol"]["out"])


# every part of a family, as small as it can be
SMALL: dict[str, tuple[str, dict]] = {
    "crossformer": ("crossformer_tiny", dict(embed_dim=16, depths=(2, 2, 2, 1), heads=(1, 2, 2, 4), group_size=3)),
    "crossformer grid": (
        "crossformer_tiny",
        dict(embed_dim=16, depths=(2, 2, 2, 1), heads=(1, 2, 2, 4), group_size=3, long_distance="grid"),
    ),
    "crossformer interval": (
        "crossformer_tiny",
        dict(embed_dim=16, depths=(2, 2, 2, 1), heads=(1, 2, 2, 4), long_distance="interval"),
    ),
    "crossformer++": ("crossformer_pp_small", dict(embed_dim=16, depths=(1, 4, 1, 1), heads=(1, 2, 2, 4))),
    "boat_swin": ("boat_swin_tiny", dict(embed_dim=16, depths=(2, 2, 1, 1), heads=(1, 2, 2, 4), window_size=4)),
    "boat_cswin": (
        "boat_cswin_tiny",
        dict(embed_dim=16, depths=(1, 2, 1, 1), heads=(2, 2, 2, 4), stripe_width=(1, 2, 3, 3)),
    ),
    "maxvit": ("maxvit_tiny", dict(embed_dim=(32, 32, 64, 64), depths=(2, 1, 1, 1), stem_width=16, window_size=3)),
    "maxvit rw": (
        "maxvit_tiny",
        dict(embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1), stem_width=(8, 16), window_size=3, style="rw"),
    ),
    "mvit_v2": ("mvit_v2_tiny", dict(embed_dim=16, depths=(1, 2, 1, 1), image_size=64)),
    "mvit_v2 in the MLP": ("mvit_v2_large", dict(embed_dim=16, depths=(1, 2, 1, 1), image_size=64)),
    "mvit_v1 video": ("mvit_v1_base_16x4", dict(embed_dim=16, depths=(1, 1, 2, 1), image_size=64, frames=4)),
    "mvit_v2 video": ("mvit_v2_small_16x4", dict(embed_dim=16, depths=(1, 1, 1, 1), image_size=64, frames=4)),
}
small = pytest.mark.parametrize("family", SMALL)


def build(family: str, **options) -> nn.Module:
    name, config = SMALL[family]
    exact = {"drop_path": 0.0, **({"dropout": 0.0} if "mvit" in family else {})}
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 5, **exact, **config, **options})


def images_for(family: str, height: int, width: int, batch: int = 2, frames: int = 4, **options) -> torch.Tensor:
    return torch.randn(batch, 3, *((frames,) if "video" in family else ()), height, width, **options)


@small
@pytest.mark.parametrize("size", [(64, 64), (37, 90)])
def test_fused_equals_unfused(family, size):
    """In float64 with the same weights: the output, and the gradients of the images and of every parameter."""
    model = build(family).double().eval()
    randomise(model)
    images = images_for(family, *size, frames=5, dtype=torch.float64)
    cotangent = torch.randn(1, 5, dtype=torch.float64)
    found = gradients(model, images, cotangent)
    with use_backend("reference"):
        expected = gradients(model, images, cotangent)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@small
def test_an_image_of_any_size(family):
    model = build(family).eval()
    with torch.no_grad():
        before = model(images_for(family, 64, 64, frames=4).fill_(0.5))
        for size in ((4, 4), (5, 9), (33, 64), (97, 61)):
            assert model(images_for(family, *size, frames=3)).isfinite().all()
        assert torch.equal(model(images_for(family, 64, 64, frames=4).fill_(0.5)), before), "a size leaves no trace"


@pytest.mark.parametrize("family", ["crossformer", "boat_swin"])
def test_patches_that_do_not_divide_are_filled_with_zeros(family):
    model, images = build(family).eval(), torch.randn(1, 3, 30, 37)
    whole = nn.functional.pad(images, (0, 3, 0, 2))
    with torch.no_grad():
        assert torch.equal(model(images), model(whole))


@small
def test_features(family):
    model = build(family).eval()
    backbone = build(family, features_only=True).eval()
    backbone.load_state_dict({k: v for k, v in model.state_dict().items() if k in backbone.state_dict()})
    images = images_for(family, 64, 96)
    with torch.no_grad():
        maps = backbone(images)
    time = (2,) if "video" in family else ()
    expected = [(2, channels, *time, 16 >> s, 24 >> s) for s, channels in enumerate(backbone.channels)]
    assert [tuple(x.shape) for x in maps] == expected
    assert not any(name.startswith(("norm.", "head.")) for name in backbone.state_dict())
    seen = []
    blocks = model.blocks if "mvit" in family else model._parts()[1][-1].blocks
    blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(images)
    if "mvit" in family:
        tokens, thw = seen[0]
        last = tokens[:, int(model.has_cls) :].unflatten(1, thw)
    else:
        last = seen[0]
    assert torch.equal(maps[-1], last.movedim(-1, 1))


@small
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("features_only", [False, True], ids=["classes", "features"])
def test_an_empty_batch(family, features_only, training, backend):
    """Empty results of the right sizes, gradients of zero, and buffers as they were but for the number of batches."""
    model = build(family, features_only=features_only, drop_path=0.2).train(training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    out = model(images_for(family, 64, 96, batch=0))
    if features_only:
        time = (2,) if "video" in family else ()
        assert [x.shape for x in out] == [(0, c, *time, 16 >> s, 24 >> s) for s, c in enumerate(model.channels)]
    else:
        assert out.shape == (0, 5)
    sum(x.sum() for x in (out if features_only else [out])).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert all(buffers[name].isfinite().all() for name in before)


@pytest.mark.parametrize("family", ["crossformer", "boat_cswin", "maxvit", "maxvit rw", "mvit_v2"])
def test_without_a_classifier(family):
    model = build(family, num_classes=0).eval()
    assert model(images_for(family, 64, 64)).shape == (2, model.channels[-1])


@small
def test_trains(family):
    """A few steps lower the loss, with stochastic depth, and every parameter has a gradient."""
    model = build(family, drop_path=0.2)
    images, labels = images_for(family, 64, 64, batch=4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@small
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("last_images", [False, True], ids=["contiguous images", "channels-last images"])
def test_gradients_are_strided_as_their_parameters(family, last_images, channels_last, backend):
    """On images of one channel, with a classifier of one class. DistributedDataParallel warns of other strides."""
    model = build(family, in_channels=1, num_classes=1)
    if channels_last:
        model.to(memory_format=torch.channels_last_3d if "video" in family else torch.channels_last)
    images = images_for(family, 32, 32)[:, :1]
    if last_images:  # of one channel: the strides alone say so
        images = images.movedim(1, -1).contiguous().movedim(-1, 1)
    model(images).square().sum().backward()
    strides = {name: (p.stride(), p.grad.stride()) for name, p in model.named_parameters()}
    assert {name: pair for name, pair in strides.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("family", ["crossformer++", "boat_swin", "boat_cswin", "maxvit", "mvit_v2", "mvit_v1 video"])
def test_compiles_and_exports(family):
    torch.compiler.reset()
    model = build(family).eval()
    images = images_for(family, 64, 64)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), expected)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)


@small
def test_copies(family):
    model = build(family).eval()
    images = images_for(family, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(restored(model)(images), expected)


@small
def test_autocast(family):
    model = build(family)
    images = images_for(family, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert all(re.search(r"\.pos\.|rel_pos|pool_q|norm_k\.bias$", name) for name in still)  # what softmax may ignore


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, str]]:
    """(operator, backend) of every call, as they come."""
    calls, select = [], _dispatch.select

    def recorded(name: str, *args, **kwargs):
        calls.append((name, select(name, *args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(_dispatch, "select", recorded)
    return calls


needs_native = pytest.mark.skipif(_dispatch.absent("cpu") is not None, reason=str(_dispatch.absent("cpu")))


@needs_native
@small
def test_backends(family, ran):
    """The device's by default; the model's, if it has one; what `use_backend` asks for, if it has none."""
    model, images = build(family).eval(), images_for(family, 32, 32)

    def backends() -> set[str]:
        ran.clear()
        with torch.no_grad():
            model(images)
        return {backend for _, backend in ran}

    default = {"cpu"}
    assert backends() <= default | {"sdpa"}
    with use_backend("reference"):
        assert backends() == {"reference"}
        with use_backend("cpu"):
            assert backends() == {"cpu"}
        model.backend = "cpu"
        assert backends() == {"cpu"}
        model.backend = None
        assert backends() == {"reference"}
        with use_backend(None):
            assert backends() <= default | {"sdpa"}
    assert backends() <= default | {"sdpa"}
    assert build(family, backend="reference").backend == "reference"
    model.backend = "reference"
    assert backends() == {"reference"}


def test_use_backend_ends_with_its_block_and_refuses_what_single_operators_have():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _dispatch.asked(None) is None
    with pytest.raises(ValueError, match="backend must be one of triton, cpu, reference or None, got 'gpu'$"):
        with use_backend("gpu"):
            pass
    with pytest.raises(ValueError, match=r"got 'sdpa' \(an operator takes it as its argument\)"):
        create_model("mvit_v2_tiny", backend="sdpa")


@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_blocks_leave_nothing_behind(first_out):
    """Blocks of two threads that overlap: the one entered last holds, in whatever order they are left."""
    blocks = use_backend("reference"), use_backend("cpu")
    for block, backend in zip(blocks, ("reference", "cpu")):
        block.__enter__()
        assert _dispatch.asked(None) == backend
    blocks[first_out].__exit__(None, None, None)
    assert _dispatch.asked(None) == ("cpu", "reference")[first_out]
    blocks[1 - first_out].__exit__(None, None, None)
    assert _dispatch.asked(None) is None


def test_use_backend_without_a_block_says_that_it_did_nothing():
    with pytest.warns(RuntimeWarning, match=r"had no effect: write `with use_backend\('reference'\):`"):
        use_backend("reference")
    assert _dispatch.asked(None) is None


def test_use_backend_above_a_function():
    @use_backend("reference")
    def asked() -> str | None:
        return _dispatch.asked(None)

    assert [asked(), asked(), _dispatch.asked(None)] == ["reference", "reference", None]


@needs_native
def test_use_backend_inside_a_compiled_function(ran):
    torch.compiler.reset()
    layer, x = MaxSA(32, 1, "grid", 4), torch.randn(1, 8, 8, 32)

    @torch.compile(fullgraph=True, backend="eager")
    def both(x):
        with use_backend("reference"):
            unfused = layer(x)
        return unfused, layer(x)

    ran.clear()
    both(x)
    assert [backend for _, backend in ran] == ["reference", "cpu"]
    assert _dispatch.asked(None) is None


@needs_native
def test_use_backend_above_a_compiled_function(ran):
    torch.compiler.reset()
    layer, x = MaxSA(32, 1, "grid", 4), torch.randn(1, 8, 8, 32)
    compiled = torch.compile(use_backend("reference")(lambda x: layer(x)), fullgraph=True, backend="eager")
    ran.clear()
    compiled(x)
    assert [backend for _, backend in ran] == ["reference"]
    assert _dispatch.asked(None) is None


@needs_native
def test_a_compiled_layer_follows_use_backend(ran):
    torch.compiler.reset()
    layer, x = MaxSA(32, 1, "grid", 4), torch.randn(1, 8, 8, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        with use_backend("reference"):
            assert torch.equal(compiled(x), layer(x))
    assert {backend for _, backend in ran} == {"cpu", "reference"}


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 3, 2))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert (out == out[:, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(out), out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tools_that_go_by_the_class_of_a_layer_know_the_convolutions():
    torch.manual_seed(0)
    model, images = build("maxvit").eval(), torch.randn(1, 3, 32, 32)
    randomise(model)
    pairs = [
        [f"{name}.conv1_1x1", f"{name}.norm1"] for name, module in model.named_modules() if hasattr(module, "conv1_1x1")
    ]
    fused = torch.ao.quantization.fuse_modules(model, pairs)
    assert isinstance(fused.get_submodule(pairs[0][1]), nn.Identity)
    torch.testing.assert_close(fused(images), model(images))


def test_slowfast_without_a_kernel_takes_one_more_than_the_stride():
    """Its table of the 32 x 3 configuration: depth 24, stages from blocks 2, 5 and 21."""
    with torch.device("meta"):
        model = create_model("mvit_v1_base_32x3", depths=(2, 3, 16, 3), kernel=None)
    shapes = [
        tuple(None if pool is None else tuple(pool.weight.shape[2:]) for pool in (block.attn.pool_q, block.attn.pool_k))
        for block in model.blocks
    ]
    first, second, third, last = (None, (1, 9, 9)), (None, (1, 5, 5)), (None, (1, 3, 3)), (None, None)
    enters = ((1, 3, 3), (1, 5, 5)), ((1, 3, 3), (1, 3, 3)), ((1, 3, 3), None)
    assert shapes == [first] * 2 + [enters[0]] + [second] * 2 + [enters[1]] + [third] * 15 + [enters[2]] + [last] * 2
    widths = [(block.attn.dim, block.attn.dim_out, block.mlp.fc2.out_features) for block in model.blocks]
    assert widths[:3] + widths[20:22] == [
        (96, 96, 96),
        (96, 96, 192),
        (192, 192, 192),
        (384, 384, 768),
        (768, 768, 768),
    ]


def test_stochastic_depth_rises_from_block_to_block():
    rates = [m.rate for m in create_model("crossformer_small").modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])


REFUSED: dict[str, tuple[Callable, type[Exception], str]] = {
    "a name that is nearly one": (
        lambda: create_model("crosformer_smal"),
        ValueError,
        "no model is named 'crosformer_smal'; did you mean crossformer_small",
    ),
    "a name that is none": (
        lambda: create_model("resnet50"),
        ValueError,
        r"no model is named 'resnet50'; list_models\(\) has them all",
    ),
    "an argument of another family": (
        lambda: create_model("maxvit_tiny", interval=4),
        TypeError,
        "maxvit_tiny has no argument interval; it has embed_dim, depths, stem_width",
    ),
    "classes": (lambda: create_model("maxvit_tiny", -1), ValueError, "num_classes must be at least 0"),
    "a style": (lambda: create_model("maxvit_tiny", style="jax"), ValueError, "one of tf, rw, torchvision, got 'jax'"),
    "stochastic depth": (lambda: build("boat_swin", drop_path=1.0), ValueError, "drop_path must be .* below 1"),
    "merging by an odd kernel": (
        lambda: build("crossformer", merge_size=((2, 3), (2, 4), (2, 4))),
        ValueError,
        r"kernels with stride 2 must be a sequence of 2, 4, 6 ... pixels, got \(2, 3\)",
    ),
    "no patches": (lambda: build("crossformer", patch_size=()), ValueError, "kernels with stride 4 must be a sequence"),
    "patches without channels": (
        lambda: build("crossformer", patch_size=(4,) * 6),
        ValueError,
        "16 channels are too few for 6 kernels",
    ),
    "two widths of three": (lambda: build("maxvit", stem_width=(1, 2, 3)), ValueError, "stem_width must be one int or"),
    "a width that is no multiple of a head's": (
        lambda: build("maxvit", embed_dim=48),
        ValueError,
        "embed_dim must be multiples of 32, the channels of a head, got 48",
    ),
    "hidden channels": (lambda: build("boat_swin", mlp_ratio=0), ValueError, "mlp_ratio must give .* got 0"),
    "a rate in words": (lambda: build("mvit_v2", drop_path="much"), TypeError, "drop_path must be a number, got 'mu"),
    "hidden channels in words": (
        lambda: build("mvit_v2", mlp_ratio="4"),
        TypeError,
        "mlp_ratio must be a number, got '4'",
    ),
    "hidden channels without a number": (
        lambda: build("crossformer", mlp_ratio=(4, 4, 4, float("nan"))),
        ValueError,
        "mlp_ratio must be a finite number, got nan",
    ),
    "dropout in words": (
        lambda: build("mvit_v2", dropout="much"),
        TypeError,
        "dropout must be a number, got 'much'",
    ),
    "one patch size": (
        lambda: build("crossformer", patch_size=4),
        ValueError,
        r"kernels with stride 4 must be a sequence of .* got 4 \(patch_size or merge_size\)",
    ),
    "one frame": (lambda: build("mvit_v2 video", frames=1), ValueError, "frames at least 2, .* got 64 and 1"),
    "an image of two pixels": (lambda: build("mvit_v2", image_size=2), ValueError, "image_size must be at least 4"),
    "pretrained": (
        lambda: create_model("mvit_v2_tiny", pretrained=True),
        TypeError,
        r"no argument pretrained; .*Nothing is downloaded: load_checkpoint\(model, path\) brings published weights",
    ),
    "weights": (lambda: create_model("maxvit_tiny", weights="DEFAULT"), TypeError, "load_checkpoint"),
    "stages": (lambda: build("crossformer", group_size=(7, 7)), ValueError, "group_size must be one value or one for"),
    "heads": (lambda: build("boat_cswin", heads=(2, 4)), ValueError, "heads must be one value or one for each"),
    "widths": (lambda: build("maxvit", embed_dim=(32, 64)), ValueError, "embed_dim must be one value or one for each"),
    "merging": (lambda: build("crossformer", merge_size=((2, 4),)), ValueError, "merge_size must have kernels for"),
    "no tensor": (lambda: build("maxvit")([[1.0]]), TypeError, r"images must be a torch.Tensor \[B, channels, H, W\]"),
    "bytes": (
        lambda: build("maxvit")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
        TypeError,
        "images must be one of float32, .* got uint8",
    ),
    "a single image": (
        lambda: build("maxvit")(torch.zeros(3, 32, 32)),
        ValueError,
        r"images must be \[B, channels, H, W\], got 3 dimensions: \[3, 32, 32\]",
    ),
    "an image for a video model": (
        lambda: build("mvit_v2 video")(torch.zeros(1, 3, 32, 32)),
        ValueError,
        r"images must be \[B, channels, T, H, W\], got 4 dimensions",
    ),
    "channels": (
        lambda: build("boat_cswin")(torch.zeros(1, 1, 32, 32)),
        ValueError,
        r"with 3 channels, got \[1, 1, 32, 32\]; create_model\(..., in_channels=1\)",
    ),
    "channels last": (
        lambda: build("boat_swin")(torch.zeros(1, 32, 32, 3)),
        ValueError,
        r"with 3 channels, got \[1, 32, 32, 3\]; channels come before height and width",
    ),
    "pixels": (
        lambda: build("crossformer")(torch.zeros(1, 3, 3, 32)),
        ValueError,
        r"at least 4 x 4 pixels, the stride of the stem, got \[1, 3, 3, 32\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["crossformer", "boat_swin", "boat_cswin", "maxvit", "mvit_v2"])
@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("depths", (1, 1, 1, -1), ValueError, r"depths must be at least 1 in every stage, got \(1, 1, 1, -1\)"),
        ("depths", (1, 0, 1, 1), ValueError, "depths must be at least 1 in every stage"),
        ("depths", (1, 1, 2.0, 1), TypeError, "depths must be ints, one for each stage, got"),
        ("depths", (1, True, 2, 1), TypeError, "depths must be ints, one for each stage, got"),
        ("depths", 2, TypeError, "depths must be a sequence of ints, one for each stage, got 2"),
        ("depths", (), TypeError, r"depths must be a sequence of ints, one for each stage, got \(\)"),
        ("embed_dim", 0, ValueError, "embed_dim must be at least 1"),
        ("embed_dim", -32, ValueError, "embed_dim must be at least 1"),
        ("embed_dim", 32.0, TypeError, "embed_dim must be (an int|ints)"),
        ("embed_dim", "32", TypeError, "embed_dim must be (an int|ints)"),
        ("heads", 0, ValueError, "heads must be at least 1"),
        ("heads", 2.0, TypeError, "heads must be (an int|ints)"),
    ],
)
def test_refused_sizes(family, name, value, error, message):
    if name == "heads" and family == "maxvit":
        name, message = "stem_width", message.replace("heads", "stem_width")
    with pytest.raises(error, match=message):
        build(family, **{name: value})


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()
