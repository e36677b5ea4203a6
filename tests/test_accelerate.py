"""`accelerate`: the same results from models of other libraries, what is left alone, what it does to a model."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import published
import pytest
import torch
import torch.distributed as dist
from conftest import assert_graph_replays, import_torchvision
from golden import assert_golden
from test_models import gradients, randomise, relative
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from vitkernels import _dispatch, accelerate, use_backend
from vitkernels.integrations import recipe

SMALL_SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)}


def timm_model(name: str, **options) -> nn.Module:
    import_torchvision()
    return pytest.importorskip("timm").create_model(name, num_classes=10, **options)


def swin(name: str = "swin_tiny_patch4_window7_224", **options) -> nn.Module:
    return timm_model(name, **{"img_size": 112, **SMALL_SWIN, **options})


def swin_v2(**options) -> nn.Module:
    return timm_model("swinv2_tiny_window8_256", **{"img_size": 128, **SMALL_SWIN, **options})


def maxvit(name: str, **options) -> nn.Module:
    return timm_model(name, **{"img_size": 96, "embed_dim": (32, 64), "depths": (1, 1), "stem_width": 32, **options})


def mvit(side: int = 64, **options) -> nn.Module:
    import_torchvision()
    mvitv2 = pytest.importorskip("timm.models.mvitv2")
    config = mvitv2.MultiScaleVitCfg(**{"depths": (1, 2), "embed_dim": 32, **options})
    return mvitv2.MultiScaleVit(config, (side, side), num_classes=10)


def torchvision_swin(models, v2: bool = False) -> nn.Module:
    block = {"block": models.swin_transformer.SwinTransformerBlockV2} if v2 else {}
    block |= {"downsample_layer": models.swin_transformer.PatchMergingV2} if v2 else {}
    side = [8, 8] if v2 else [7, 7]
    return models.SwinTransformer([4, 4], 32, [2, 2], [1, 2], side, num_classes=10, stochastic_depth_prob=0.0, **block)


def torchvision_maxvit(models) -> nn.Module:
    return models.MaxVit((112, 112), 32, 7, [32, 64], [1, 1], 32, stochastic_depth_prob=0.0, num_classes=10)


def torchvision_mvit(models, v2: bool) -> nn.Module:
    mvit = models.video.mvit
    blocks = [
        mvit.MSBlockConfig(1, 32, 64, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        mvit.MSBlockConfig(2, 64, 64, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        mvit.MSBlockConfig(2, 64, 64, [], [], [], []),
    ]
    options = {"residual_pool": v2, "residual_with_cls_embed": False, "rel_pos_embed": v2, "proj_after_attn": v2}
    return mvit.MViT((64, 64), 4, blocks, num_classes=10, stochastic_depth_prob=0.0, dropout=0.0, **options)


# by name: the model from torchvision's models, the size of its images, how many modules are replaced
MODELS: dict[str, tuple[Callable, tuple[int, ...], int]] = {
    "timm swin": (lambda _: swin(), (112, 112), 4),
    "timm swin, any size": (lambda _: swin(strict_img_size=False), (92, 132), 4),
    "timm swin, fixed size": (lambda _: swin(img_size=(100, 132)), (100, 132), 4),
    "timm swin, windows of 5 x 7": (lambda _: swin(window_size=(5, 7), img_size=(100, 132)), (100, 132), 4),
    "timm swin, heads of 24": (lambda _: swin(head_dim=24), (112, 112), 4),
    "timm swin_s3": (
        lambda _: timm_model("swin_s3_tiny_224", img_size=112, **SMALL_SWIN, window_size=7),
        (112, 112),
        4,
    ),
    "timm swin_v2": (lambda _: swin_v2(), (128, 128), 4),
    "timm swin_v2, any size": (lambda _: swin_v2(strict_img_size=False), (104, 140), 4),
    "timm maxvit tf": (lambda _: maxvit("maxvit_tiny_tf_224"), (96, 96), 4),
    "timm maxvit rw, heads first": (lambda _: maxvit("maxvit_tiny_rw_224"), (96, 96), 4),
    "timm maxvit rmlp": (lambda _: maxvit("maxvit_rmlp_tiny_rw_256"), (96, 96), 4),
    "timm maxvit, parallel": (lambda _: maxvit("maxvit_tiny_pm_256"), (96, 96), 2),
    "timm maxxvit": (lambda _: maxvit("maxxvit_rmlp_nano_rw_256"), (96, 96), 4),
    "timm maxvit, NCHW": (lambda _: maxvit("maxvit_tiny_rw_224", transformer_use_nchw_attn=True), (96, 96), 4),
    "timm maxvit, blocks and grid apart": (
        lambda _: maxvit("maxvit_tiny_tf_224", transformer_window_size=(3, 4), transformer_grid_size=(4, 3)),
        (96, 96),
        4,
    ),
    "torchvision swin": (torchvision_swin, (112, 112), 4),
    "torchvision swin, any size": (torchvision_swin, (92, 132), 4),
    "torchvision swin, one window": (torchvision_swin, (56, 28), 4),
    "torchvision swin_v2": (lambda models: torchvision_swin(models, v2=True), (128, 128), 4),
    "torchvision swin_v2, any size": (lambda models: torchvision_swin(models, v2=True), (104, 140), 4),
    "torchvision maxvit": (torchvision_maxvit, (112, 112), 4),
}
MVITS: dict[str, tuple[Callable, tuple[int, ...], int]] = {
    "timm mvit": (lambda _: mvit(), (64, 64), 3),
    "timm mvit, class token": (lambda _: mvit(56, use_cls_token=True), (56, 56), 3),
    "timm mvit, maxima": (lambda _: mvit(mode="max"), (64, 64), 3),
    "timm mvit, averages": (lambda _: mvit(mode="avg"), (64, 64), 3),
    "timm mvit, smaller image": (lambda _: mvit(96), (72, 88), 3),
    "torchvision mvit_v1": (lambda models: torchvision_mvit(models, v2=False), (4, 64, 64), 3),
    "torchvision mvit_v2": (lambda models: torchvision_mvit(models, v2=True), (4, 64, 64), 3),
}


class Operators(TorchDispatchMode):
    """A block that records the names of the operators of vitkernels that run in it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] * (func.namespace == "vitkernels")
        return func(*args, **(kwargs or {}))

    def attentions(self) -> int:
        """How often attention ran."""
        return sum(name.endswith("attention_forward") for name in self.names)


def fused(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """What a call returns, and whether it was fused."""
    with Operators() as operators:
        out = call()
    return out, operators.attentions() > 0


def assert_same(model: nn.Module, images: torch.Tensor, expected_modules: int, output: float, gradient: float) -> None:
    """The accelerated model's output and all its gradients, with logits of which the softmax is not flat."""
    randomise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name and p.dim() > 1:
                p.normal_(std=1.5 * p[0].numel() ** -0.5)
    torch.manual_seed(2)
    cotangent = torch.randn(10, dtype=images.dtype)
    expected = gradients(model, images, cotangent)
    report = accelerate(model)
    assert len(report.replaced) == expected_modules and not report.skipped, report
    with Operators() as operators:
        found = gradients(model, images, cotangent)
    assert operators.attentions() >= expected_modules
    names = ("output", "images", *(name for name, _ in model.named_parameters()))
    largest = max(g.abs().max() for g in expected[1:])
    for name, a, b in zip(names, expected, found, strict=True):
        error = (a - b).abs().max() / a.abs().max().clamp_min(1e-4 * largest)  # some gradients vanish
        assert error <= (output if name == "output" else gradient), name


@pytest.mark.parametrize("name", MODELS)
def test_results_stay(name, torchvision):
    make, size, modules = MODELS[name]
    torch.manual_seed(0)
    assert_same(make(torchvision.models).eval(), torch.randn(2, 3, *size), modules, 1e-4, 1e-3)


@pytest.mark.parametrize("name", MVITS)
def test_results_stay_mvit(name, torchvision):
    """In float64: the blocks' skip path takes maxima, where rounding decides between values that are close."""
    make, size, modules = MVITS[name]
    torch.manual_seed(0)
    model = make(torchvision.models).double().eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            norm.bias.normal_()
    assert_same(model, torch.randn(1, 3, *size, dtype=torch.float64), modules, 1e-9, 1e-8)


@pytest.mark.parametrize("name", [*MODELS, *MVITS])
def test_every_module_agrees_in_float32(name, torchvision):
    make, _, modules = (MODELS | MVITS)[name]
    report = accelerate(make(torchvision.models), verify=True)
    assert len(report.replaced) == modules and not report.skipped, report


def crossformer(code: type, height: int, width: int, **options) -> tuple[nn.Module, tuple]:
    block = code.CrossFormerBlock(32, 2, **options)
    if code is published.FirstClassification:
        block.input_resolution = (height, width)
        return block, (torch.randn(2, height * width, 32),)
    return block, (torch.randn(2, height * width, 32), height, width)


def microsoft(height: int, width: int, shift: int) -> tuple[nn.Module, tuple]:
    block = published.SwinTransformerBlock(32, (height, width), 2, shift_size=shift)
    return block, (torch.randn(2, height * width, 32),)


def detection(height: int, width: int, shift: int) -> tuple[nn.Module, tuple]:
    block = published.Detection.SwinTransformerBlock(32, 2, shift_size=shift)
    block.H, block.W = height, width
    mask = published.shift_mask(-(-height // 7) * 7, -(-width // 7) * 7, 7, shift)
    return block, (torch.randn(2, height * width, 32), mask)


def mmdetection(height: int, width: int, shift: int) -> tuple[nn.Module, tuple]:
    return published.ShiftWindowMSA(32, 2, shift_size=shift), (torch.randn(2, height * width, 32), (height, width))


LDA = {"lsda_flag": 1}
PUBLISHED = {
    "Microsoft's": lambda: microsoft(14, 21, 0),
    "Microsoft's, shifted": lambda: microsoft(14, 21, 3),
    "Microsoft's for detection": lambda: detection(16, 23, 0),
    "Microsoft's for detection, shifted": lambda: detection(16, 23, 3),
    "MMDetection's": lambda: mmdetection(16, 23, 0),
    "MMDetection's, shifted": lambda: mmdetection(5, 23, 3),
    "CrossFormer, first classification, SDA": lambda: crossformer(published.FirstClassification, 14, 21),
    "CrossFormer, first classification, LDA": lambda: crossformer(published.FirstClassification, 14, 21, **LDA),
    "CrossFormer, first detection, SDA": lambda: crossformer(published.FirstDetection, 10, 15, interval=4),
    "CrossFormer, first detection, LDA": lambda: crossformer(published.FirstDetection, 10, 15, interval=4, **LDA),
    "CrossFormer, first detection, small": lambda: crossformer(published.FirstDetection, 5, 15, interval=4, **LDA),
    "CrossFormer++, SDA": lambda: crossformer(published.PlusPlus, 10, 15, interval=2),
    "CrossFormer++, LDA": lambda: crossformer(published.PlusPlus, 15, 9, interval=2, **LDA),
    "CrossFormer++, small": lambda: crossformer(published.PlusPlus, 5, 9, interval=2, **LDA),
    "CrossFormer++, cooled": lambda: crossformer(published.PlusPlus, 15, 9, interval=2, use_extra_conv=True, **LDA),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_results_stay_of_published_files(name):
    torch.manual_seed(0)
    block, args = PUBLISHED[name]()
    randomise(block.eval())
    fresh = copy.deepcopy(block)
    cotangent = torch.randn(32)
    report = accelerate(block)
    assert len(report.replaced) == 1 and not report.skipped, report
    results = []
    for module in (fresh, block):
        x = args[0].clone().requires_grad_()
        out, ran = fused(lambda module=module, x=x: module(x, *args[1:]))
        assert ran == (module is block and not name.endswith("small"))
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], cotangent.expand_as(out))])
    largest = max(g.abs().max() for g in results[0][1:])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a - b).abs().max() <= (1e-3 if i else 1e-4) * a.abs().max().clamp_min(1e-4 * largest)
    assert vars(fresh).keys() == vars(block).keys() - {"forward"}, "no trace of what was computed"


class Tokens(nn.Module):
    """A block [B, H W, C] on maps [B, H, W, C]."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.flatten(1, 2), *x.shape[1:3]).unflatten(1, x.shape[1:3])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["acl", "lda_i2", "lda_i3", "sda", "small_map", "v1_lda_i4"])
def test_golden_crossformer_block(name, fused, golden):
    """The stand-ins compute what the official blocks do, and go on to when they are accelerated."""
    meta, data = golden(f"crossformer_block_{name}")
    config = meta["config"]
    code = published.FirstDetection if config["variant"].startswith("v1") else published.PlusPlus
    block = code.CrossFormerBlock(
        int(config["dim"]),
        int(config["heads"]),
        int(config["group"]),
        int(config["type"] == "lda"),
        float(config["mlp_ratio"]),
        interval=int(config["interval"]),
        **({"use_extra_conv": True} if "sd.ex_ln.bias" in data else {}),
    )
    if fused:
        assert len(accelerate(block).replaced) == 1
    assert_golden(Tokens(block), (int(config["H"]), int(config["W"])), meta, data, lambda key: f"block.{key}")


# What is left alone


class OwnBlock(nn.Module):
    """Of the name of Microsoft's block, and something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def test_nothing_to_accelerate_says_what_was_looked_for():
    report = accelerate(nn.Sequential(nn.Linear(3, 3)))
    assert not report.replaced and not report.skipped
    assert "nothing to accelerate in Sequential" in str(report)
    assert "timm.models.maxxvit.PartitionAttentionCl" in str(report) and "CrossFormerBlock" in str(report)
    report.undo()


@pytest.mark.parametrize("wrong", [None, "model", torch.zeros(3), nn.Linear])
def test_not_a_module(wrong):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got \w+"):
        accelerate(wrong)


def only_reason(model: nn.Module, **options) -> str:
    """Why the only module of a kind was left alone; nothing was changed."""
    before = [dict(vars(m)) for m in model.modules()]
    report = accelerate(model, **options)
    assert not report.replaced and len(report.skipped) == 1, report
    assert report.skipped[0].reason in str(report)
    assert [dict(vars(m)).keys() for m in model.modules()] == [v.keys() for v in before]
    return report.skipped[0].reason


def swin_block(**options) -> nn.Module:
    return swin(**options).layers[0].blocks[1]


def maxvit_block(name: str = "maxvit_tiny_tf_224", **options) -> nn.Module:
    return maxvit(name, **options).stages[0].blocks[0].attn_grid


def test_attention_dropout_while_training():
    block = swin_block(attn_drop_rate=0.5).train()
    assert "drops attention weights while it is trained (rate 0.5)" in only_reason(block)
    x = torch.randn(1, 28, 28, 32)
    torch.manual_seed(0)
    expected = block(x)
    report = accelerate(block.eval())
    assert report.replaced[0].now.endswith("as before while trained (attention dropout 0.5)")
    torch.manual_seed(0)
    assert torch.equal(block.train()(x), expected)
    assert (block.eval()(x) - expected).abs().max() > 1e-3


def test_whole_maps_are_left_alone():
    model = timm_model("test_coatnet")
    report = accelerate(model)
    assert not report.replaced and report.skipped
    assert all("whole map (CoAtNet)" in skipped.reason for skipped in report.skipped)


class Unknown(nn.Module):
    window_size = (3, 3)

    def forward(self, logits, shared_rel_pos=None):
        return logits


def test_unknown_bias():
    block = maxvit_block()
    block.attn.rel_pos = Unknown()
    assert "it has a Unknown where a RelPosBias or RelPosBiasTf or RelPosMlp is expected" in only_reason(block)


def spoil(block: nn.Module, name: str, value: object) -> nn.Module:
    part, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(part), attribute, value)
    return block


SPOILT = {
    "table": (swin_block, "attn.relative_position_bias_table", nn.Parameter(torch.zeros(168, 1)), "[168, 1]"),
    "qkv": (swin_block, "attn.qkv", nn.Linear(32, 95), "gives 95 channels, expected 3 x 1 heads x 32"),
    "no projection": (swin_block, "attn.qkv", nn.LayerNorm(32), "a LayerNorm where a linear layer is expected"),
    "heads": (swin_block, "attn.num_heads", 5, "32 channels are not a multiple of its 5 heads"),
    "window": (swin_block, "window_size", (8, 8), "windows of (7, 7)"),
    "window of three axes": (swin_block, "window_size", (2, 7, 7), "expected an int or two"),
    "shift": (swin_block, "shift_size", (7, 7), "not below its window"),
    "scale": (swin_block, "attn.scale", "large", "its scale is 'large'"),
    "scale that is ignored": (maxvit_block, "attn.scale", 0.5, "its scale is 0.5, which PyTorch's attention inside"),
    "attention": (swin_block, "attn", nn.Identity(), "a Identity where a WindowAttention is expected"),
    "index": (
        swin_block,
        "attn.relative_position_index",
        torch.zeros(3).long(),
        "its relative_position_index has other",
    ),
    "softmax": (swin_block, "attn.softmax", nn.Sigmoid(), "its softmax is a Sigmoid, which no kernel here computes"),
    "replaced": (swin_block, "_attn", print, "its _attn was replaced by something else before"),
    "inner replaced": (swin_block, "attn.forward", print, "its forward was replaced by something else before"),
    "MaxViT's table": (
        maxvit_block,
        "attn.rel_pos.relative_position_bias_table",
        nn.Parameter(torch.zeros(1, 4, 5)),
        "it has a table [1, 4, 5], expected [1, 5, 5]",
    ),
    "MaxViT's size": (maxvit_block, "partition_size", (4, 4), "its bias is for"),
    "MaxViT's projection": (maxvit_block, "attn.proj", nn.Linear(31, 32), "takes 31 channels"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_modules_made_otherwise_are_left_alone(what):
    make, name, value, reason = SPOILT[what]
    assert reason in only_reason(spoil(make(), name, value))


def test_of_that_name_and_something_else():
    kind = type("SwinTransformerBlock", (OwnBlock,), {})
    assert "it has weight, which the published class has not" in only_reason(kind())
    block = published.SwinTransformerBlock(32, (14, 14), 2)
    block.gamma = nn.Parameter(torch.ones(32))
    assert "it has gamma" in only_reason(block)


def test_of_that_name_with_another_forward():
    """What looks like Microsoft's block is compared with what would run: here norms come after, as in Swin V2."""

    class SwinTransformerBlock(published.SwinTransformerBlock):
        def _run(self, x, height, width, mask):
            maps = x.unflatten(1, (height, width))
            out = published.in_shifted_windows(self.attn, maps, 7, self.shift_size, mask)
            x = x + self.norm1(out.flatten(1, 2))
            return x + self.norm2(self.mlp(x))

    SwinTransformerBlock.__module__ = published.__name__
    assert "its output would be off by" in only_reason(SwinTransformerBlock(32, (14, 14), 2))


def test_derived_classes():
    """One that changes a method keeps it; one that adds others is compared."""
    block = swin_block()
    kind = type(block)
    block.__class__ = type("Mine", (kind,), {"_attn": lambda self, x: 2 * x, "__module__": "mine"})
    assert "Mine has a _attn of its own" in only_reason(block)
    block.__class__ = type("Mine", (kind,), {"forward": lambda self, x: x + self._attn(x), "__module__": "mine"})
    assert accelerate(block).replaced
    x = torch.randn(1, 28, 28, 32)
    found = block(x)
    accelerate(block).undo()
    assert relative(found, block(x)) < 1e-4


def test_verify_leaves_alone_what_differs(monkeypatch):
    block = maxvit_block()
    monkeypatch.setattr(type(block.attn.rel_pos), "get_bias", lambda self: torch.zeros(1, 1, 9, 9))
    assert accelerate(block).replaced, "names and shapes are right"
    accelerate(block).undo()
    state = torch.get_rng_state()
    assert "relative_position_bias_table's gradient would come or go" in only_reason(block, verify=True)
    assert torch.equal(torch.get_rng_state(), state)


class Doubled(nn.Module):
    """Makes classes that are as published, but for what they return."""

    def __new__(cls, change: Callable) -> nn.Module:
        class SwinTransformerBlock(published.SwinTransformerBlock):
            def forward(self, x):
                return change(self, super().forward(x))

        SwinTransformerBlock.__module__ = published.__name__
        return SwinTransformerBlock(32, (14, 14), 2)


def test_of_that_name_that_returns_something_else():
    assert "what would run returns" in only_reason(Doubled(lambda block, out: (out, out)))
    assert "what would run returns" in only_reason(Doubled(lambda block, out: out[:, :1]))
    assert "would be off by" in only_reason(Doubled(lambda block, out: 0 * out))
    block = Doubled(lambda block, out: out + 0 * block.norm1.weight.sum() * block.attn.unused)
    block.attn.unused = nn.Parameter(torch.ones(1))
    assert "attn.unused's gradient would come or go" in only_reason(block)


def test_of_that_name_that_shifts_otherwise():
    """MMPretrain's does not shift a map of a single window."""

    class ShiftWindowMSA(published.ShiftWindowMSA):
        def forward(self, query, hw_shape):
            shift, self.shift_size = self.shift_size, self.shift_size * (min(hw_shape) > self.window_size)
            out = super().forward(query, hw_shape)
            self.shift_size = shift
            return out

    ShiftWindowMSA.__module__ = published.__name__
    assert "its output would be off by" in only_reason(ShiftWindowMSA(32, 2, shift_size=3))


def test_parts_of_other_classes_are_compared():
    block = swin_block()
    kind = type(block.attn)
    changed = {"_get_rel_pos_bias": lambda self: 2 * kind._get_rel_pos_bias(self), "__module__": "mine"}
    block.attn.__class__ = type("Mine", (kind,), changed)
    assert "would be off by" in only_reason(block)
    block.attn.__class__ = type("Mine", (kind,), {"__module__": "mine"})
    assert accelerate(block).replaced


def test_pools_that_are_made_otherwise():
    attn = mvit().stages[0].blocks[0].attn
    for options in ({"padding": "same"}, {"padding": 1, "bias": True}, {"padding": 1, "padding_mode": "reflect"}):
        attn.pool_k = nn.Conv2d(32, 32, 3, groups=32, **{"bias": False, **options})
        assert "it pools otherwise than the published models" in only_reason(attn)
    attn = mvit(mode="avg").stages[0].blocks[0].attn
    attn.pool_k = nn.AvgPool2d(3, 4, 1, divisor_override=2)
    assert "it pools otherwise than the published models" in only_reason(attn)


def test_dropout_that_stays_on():
    """Monte Carlo dropout: dropout modules alone are trained."""
    block = swin_block(attn_drop_rate=0.5).eval()
    accelerate(block)
    block.attn.attn_drop.train()
    x = torch.randn(1, 28, 28, 32)
    assert not torch.equal(block(x), block(x))


@pytest.mark.parametrize("dtype, device", [(torch.float64, "cpu"), (torch.float32, "meta")])
def test_defaults_do_not_matter(dtype, device):
    model = swin()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert len(accelerate(model, verify=True).replaced) == 4
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_kernels_on_the_device(monkeypatch):
    monkeypatch.setattr(_dispatch._native, "cpu", SimpleNamespace(available=False, reason="not built"))
    assert "no kernels for cpu here (not built): what would run is not faster" in only_reason(swin_block())
    assert accelerate(swin_block(), force=True).replaced


def test_what_no_kernel_takes(monkeypatch):
    with use_backend("triton"):  # the interpreter, or a GPU
        if _dispatch.absent("triton"):
            pytest.skip(_dispatch.absent("triton"))
        assert "head_dim 36 is not a multiple of 8" in only_reason(swin_block(head_dim=36))


# What it honours: masks, parts, buffers


MASKS = {
    "usual": (lambda mask: mask, True),
    "float16": (lambda mask: mask.half(), True),
    "none": (lambda mask: None, False),
    "zeros": (torch.zeros_like, False),
    "-inf": (lambda mask: mask.masked_fill(mask < 0, -torch.inf), False),
    "one pair": (lambda mask: mask + torch.zeros_like(mask).index_fill_(0, torch.tensor(0), -1.0), False),
    "learned": (lambda mask: mask.clone().requires_grad_(), False),
}


@pytest.mark.parametrize("shift", [3, 0])
@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_of_the_caller_decides(mask, shift):
    change, usual = MASKS[mask]
    torch.manual_seed(0)
    block, (x, given) = detection(16, 23, shift)
    randomise(block.eval())
    given = change(given)
    expected = block(x, given)
    report = accelerate(block)
    assert len(report.replaced) == 1, report
    out, ran = fused(lambda: block(x, given))
    assert relative(out, expected) < 1e-4
    assert ran == (usual or not shift)
    assert relative(block(x, mask_matrix=given), expected) < 1e-4
    assert ("as before with other masks" in report.replaced[0].now) == (shift > 0)


def test_a_mask_is_compared_once(monkeypatch):
    """For all blocks of a stage; again after it has changed, and at every call in inference mode, where changes leave
    no trace.
    """
    block, (x, mask) = detection(16, 23, 3)
    accelerate(block)
    made = []
    shift_mask = recipe.shift_mask
    monkeypatch.setattr(recipe, "shift_mask", lambda *args: made.append(args) or shift_mask(*args))
    other = copy.deepcopy(block)
    for b in (block, other, block):
        assert fused(lambda b=b: b(x, mask))[1]
    assert len(made) == 1
    mask[0, 0, 1] = -7
    assert not fused(lambda: block(x, mask))[1] and len(made) == 2
    mask.data = shift_mask(*made[0])
    assert fused(lambda: block(x, mask))[1] and len(made) == 3
    with torch.inference_mode():
        mask.zero_()
        assert not fused(lambda: block(x, mask))[1] and len(made) == 4
        mask = published.shift_mask(21, 28, 7, 3)
        assert fused(lambda: block(x, mask))[1] and len(made) == 5
        mask.zero_()
        assert not fused(lambda: block(x, mask))[1] and len(made) == 6


@pytest.mark.parametrize("mask", ["usual", "zeros"])
def test_a_mask_in_a_graph(mask):
    """Its values are not known while a graph is made: the graph serves every mask."""
    block, (x, usual) = detection(16, 23, 3)
    randomise(block.eval())
    masks = [MASKS[name][0](usual) for name in (mask, "usual", "zeros")]
    expected = [block(x, mask) for mask in masks]
    accelerate(block)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        exported = torch.export.export(block, (x, masks[0])).module()
        for masked, out in zip(masks, expected):
            assert relative(compiled(x, masked), out) < 1e-4 and relative(exported(x, masked), out) < 1e-4


def test_a_mask_that_is_stored_for_another_map():
    """timm's block takes one of as many windows, and so it does accelerated."""
    block = swin_block().eval()
    randomise(block)
    x = torch.randn(1, 14, 56, 32)
    expected = block(x)
    accelerate(block)
    assert relative(block(x), expected) < 1e-5


@pytest.mark.parametrize("part", ["softmax", "attn_drop"])
def test_hooks_of_what_the_kernel_stands_for(part):
    """A block runs as before if a hook looks at the attention weights."""
    block = swin_block()
    accelerate(block)
    shapes = []
    getattr(block.attn, part).register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    block(torch.randn(1, 28, 28, 32))
    assert shapes == [(16, 1, 49, 49)]


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapter(nn.Module):
    """Something beside a layer, as in LoRA."""

    def __init__(self, layer: nn.Module, dim: int):
        super().__init__()
        self.layer, self.side = layer, nn.Linear(dim, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.side(x)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def parametrised(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Negative())


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def quantised(layer: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)[0]


def biased(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(32, 32, conv.kernel_size, conv.stride, conv.padding, groups=32)


def torchvision_attention(name: str = "ShiftedWindowAttention") -> nn.Module:
    swin = import_torchvision()[0].models.swin_transformer
    return getattr(swin, name)(16, [7, 7], [3, 3], 2)


def torchvision_attention_v2() -> nn.Module:
    return torchvision_attention("ShiftedWindowAttentionV2")


def mvit_attention(**options) -> nn.Module:
    return mvit(**options).stages[1].blocks[0].attn


def torchvision_mvit_attention() -> nn.Module:
    return torchvision_mvit(import_torchvision()[0].models, v2=True).blocks[1].attn


def first_detection() -> nn.Module:
    return crossformer(published.FirstDetection, 10, 15, interval=4, **LDA)[0]


def first_classification() -> nn.Module:
    return crossformer(published.FirstClassification, 14, 21)[0]


# by name: the module, the arguments of its forward, what in it is changed and how
CHANGED = {
    "torchvision's projection, another": (torchvision_attention, (1, 10, 23, 16), "proj", lambda _: Twice(16, 16)),
    "torchvision's qkv, another": (torchvision_attention, (1, 10, 23, 16), "qkv", lambda _: Twice(16, 48)),
    "torchvision V2's qkv, another": (torchvision_attention_v2, (1, 10, 23, 16), "qkv", lambda _: Twice(16, 48)),
    "torchvision's qkv, parametrised": (torchvision_attention, (1, 10, 23, 16), "qkv", parametrised),
    "torchvision's projection, hooked": (torchvision_attention, (1, 10, 23, 16), "proj", hooked),
    "torchvision V2's position MLP": (torchvision_attention_v2, (1, 10, 23, 16), "cpb_mlp.0", hooked),
    "timm's projection, another": (lambda: swin_block(), (1, 28, 28, 32), "attn.proj", lambda _: Twice(32, 32)),
    "timm's qkv, pruned": (lambda: swin_block(), (1, 28, 28, 32), "attn.qkv", pruned),
    "timm's qkv, quantised": (lambda: swin_block(), (1, 28, 28, 32), "attn.qkv", quantised),
    "timm MViT's pool, pruned": (mvit_attention, (1, 256, 32), "pool_k", pruned),
    "timm MViT's pool, parametrised": (mvit_attention, (1, 256, 32), "pool_q", parametrised),
    "timm MViT's pool, hooked": (lambda: mvit_attention(mode="max"), (1, 256, 32), "pool_v", hooked),
    "timm MViT's norm, parametrised": (mvit_attention, (1, 256, 32), "norm_v", parametrised),
    "timm MViT's norm, hooked": (mvit_attention, (1, 256, 32), "norm_q", hooked),
    "timm MViT's pool, another": (mvit_attention, (1, 256, 32), "pool_k", biased),
    "timm MViT's norm, another": (mvit_attention, (1, 256, 32), "norm_k", lambda _: nn.LayerNorm(32, eps=0.1)),
    "torchvision MViT's pool, wrapped": (torchvision_mvit_attention, (1, 513, 64), "pool_q", lambda pool: Logged(pool)),
    "torchvision MViT's pool": (torchvision_mvit_attention, (1, 513, 64), "pool_k.pool", pruned),
    "torchvision MViT's norm": (torchvision_mvit_attention, (1, 513, 64), "pool_k.norm_act.0", hooked),
    "CrossFormer's position MLP, pruned": (first_detection, (1, 150, 32), "attn.pos.pos1.2", pruned),
    "CrossFormer's position MLP, parametrised": (first_detection, (1, 150, 32), "attn.pos.pos3.2", parametrised),
    "CrossFormer's position MLP, adapted": (
        first_detection,
        (1, 150, 32),
        "attn.pos.pos2.2",
        lambda layer: Adapter(layer, 2),
    ),
    "CrossFormer's position MLP, quantised": (first_detection, (1, 150, 32), "attn.pos.pos_proj", quantised),
    "CrossFormer's position MLP, another norm": (
        first_detection,
        (1, 150, 32),
        "attn.pos.pos2.0",
        lambda _: nn.LayerNorm(2, eps=0.5),
    ),
    "CrossFormer's position MLP, another layer": (
        first_detection,
        (1, 150, 32),
        "attn.pos.pos1",
        lambda _: nn.Linear(2, 2),
    ),
    "CrossFormer's position MLP, hooked": (
        first_classification,
        (1, 294, 32),
        "attn.pos",
        lambda pos: pos.register_forward_hook(lambda module, args, out: 2 * out) and pos,
    ),
}


def others(module: nn.Module, x: torch.Tensor) -> tuple:
    """What its forward takes beside the tokens."""
    if "feat_size" in inspect.signature(type(module).forward).parameters:
        return ([16, 16],)
    if "thw" in inspect.signature(type(module).forward).parameters:
        return ((2, 16, 16),)
    return (10, 15) if "H" in inspect.signature(type(module).forward).parameters else ()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGED)
def test_parts_act_as_they_did(name, when):
    """Two steps of training: the outputs, and the gradients of what is changed and around it."""
    make, shape, part, change = CHANGED[name]
    torch.manual_seed(0)
    module = make().eval()
    randomise(module)
    x = torch.randn(shape)
    results = []
    for fast in (False, True):
        torch.manual_seed(3)
        one = copy.deepcopy(module)
        if fast and when == "after":
            assert accelerate(one).replaced
        spoil(one, part, change(one.get_submodule(part)))
        if fast and when == "before":
            accelerate(one)
        steps = []
        for _ in range(2):
            out = one(x, *others(one, x))
            out = out[0] if isinstance(out, tuple) else out
            steps.append(out)
            parameters = [p for p in one.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(out.cos().sum(), parameters, allow_unused=True)
            steps += [torch.zeros(()) if g is None else g for g in gradients]
        results.append(steps)
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() <= 2e-3 * expected.abs().max().clamp_min(0.05)


def part_of(model: nn.Module, name: str) -> Callable[[], nn.Module]:
    return lambda: model().get_submodule(name)


def torchvision_layer() -> nn.Module:
    return torchvision_maxvit(import_torchvision()[0].models).blocks[0].layers[0].layers.grid_attention


BUFFERS = {
    "timm's mask": (swin_block, "attn_mask"),
    "timm's index": (swin_block, "attn.relative_position_index"),
    "timm V2's mask": (lambda: swin_v2().layers[0].blocks[1], "attn_mask"),
    "timm V2's index": (lambda: swin_v2().layers[0].blocks[0], "attn.relative_position_index"),
    "torchvision's index": (torchvision_attention, "relative_position_index"),
    "torchvision V2's index": (torchvision_attention_v2, "relative_position_index"),
    "timm MaxViT's index": (lambda: maxvit_block("maxvit_tiny_rw_224"), "attn.rel_pos.relative_position_index"),
    "timm MaxViT's index, MLP": (
        lambda: maxvit_block("maxvit_rmlp_tiny_rw_256"),
        "attn.rel_pos.relative_position_index",
    ),
    "timm MaxViT's lookup": (maxvit_block, "attn.rel_pos.height_lookup"),
    "torchvision MaxViT's index": (torchvision_layer, "attn_layer.1.relative_position_index"),
    "Microsoft's mask": (lambda: microsoft(14, 21, 3)[0], "attn_mask"),
    "Microsoft's index": (lambda: microsoft(14, 21, 3)[0], "attn.relative_position_index"),
    "MMDetection's index": (lambda: mmdetection(16, 23, 0)[0], "w_msa.relative_position_index"),
    "CrossFormer's index": (first_classification, "attn.relative_position_index"),
    "CrossFormer's offsets": (first_classification, "attn.biases"),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_were_changed(name):
    """Compared with their formula: the module is left alone, and given back where it was served before."""
    make, buffer = BUFFERS[name]
    module = make()
    assert accelerate(module).replaced
    module.get_buffer(buffer)[-1] = 0
    before = f"its {buffer.rpartition('.')[2]} has other values than"
    report = accelerate(module)
    assert not report.replaced and before in report.skipped[0].reason
    assert before in only_reason(module)


def test_a_mask_where_no_shift_is():
    block = swin().layers[0].blocks[0]
    block.attn_mask = torch.zeros(16, 49, 49)
    assert "its attn_mask is set" in only_reason(block)
    block = swin_block()
    block.attn_mask = None
    assert "its attn_mask is missing" in only_reason(block)


@pytest.mark.parametrize("name", ["timm", "torchvision", "timm MaxViT"])
def test_buffers_that_are_read_may_be_changed(name):
    make, shape, buffer = {
        "timm": (lambda: swin_v2().layers[0].blocks[1], (1, 32, 32, 32), "attn.relative_coords_table"),
        "torchvision": (torchvision_attention_v2, (1, 10, 23, 16), "relative_coords_table"),
        "timm MaxViT": (
            lambda: maxvit_block("maxvit_rmlp_tiny_rw_256"),
            (1, 24, 24, 32),
            "attn.rel_pos.rel_coords_log",
        ),
    }[name]
    module = make().eval()
    randomise(module)
    module.get_buffer(buffer).normal_()
    x = torch.randn(shape)
    expected = module(x)
    assert accelerate(module).replaced
    assert relative(module(x), expected) < 1e-4


def test_buffers_without_values():
    report = accelerate(swin().to("meta"), force=True)
    assert len(report.replaced) == 4
    assert all("on the meta device, are taken to be as published" in replaced.now for replaced in report.replaced)


def test_methods_that_were_replaced():
    block = swin_block()
    block.forward = partial(type(block).forward, block)
    assert accelerate(block).replaced, "its forward still calls what is replaced"
    block.attn._get_rel_pos_bias = lambda: torch.zeros(1, 1, 49, 49)
    report = accelerate(block)
    assert "its _get_rel_pos_bias was replaced by something else before" in report.skipped[0].reason
    assert "_get_rel_pos_bias was replaced" in only_reason(block)
    block = maxvit_block()
    block.attn.rel_pos.get_bias = lambda: torch.zeros(1, 1, 9, 9)
    assert "its get_bias was replaced" in only_reason(block)


BLOCKS = {
    "timm": (swin_block, (1, 28, 28, 32), "attn"),
    "timm V2": (lambda: swin_v2().layers[0].blocks[1], (1, 32, 32, 32), "attn"),
    "timm MaxViT": (maxvit_block, (1, 24, 24, 32), "attn"),
    "timm MaxViT, parallel": (
        lambda: maxvit("maxvit_tiny_pm_256").stages[0].blocks[0].attn,
        (1, 24, 24, 32),
        "attn_grid",
    ),
    "torchvision MaxViT": (torchvision_layer, (1, 32, 28, 28), "attn_layer.1"),
    "Microsoft's": (lambda: microsoft(14, 21, 3)[0], (1, 294, 32), "attn"),
    "CrossFormer's": (first_detection, (1, 150, 32), "attn"),
}


class Logged(nn.Module):
    """A wrapper that accelerate does not know."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


WRAPPERS = {
    "undone": (None, False),
    "another": (copy.deepcopy, False),
    "unknown": (Logged, False),
    "checkpointed": (checkpoint_wrapper, True),
    "compiled": (lambda attn: torch.compile(attn, backend="eager"), True),
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_attention_that_is_no_longer_the_one_that_was_accelerated(name, how):
    """The block runs its own method, unless the attention module still takes whole maps."""
    make, shape, part = BLOCKS[name]
    block = make().eval()
    randomise(block)
    x = torch.randn(shape)
    rest = others(block, x)
    expected = block(x, *rest)
    attn = block.get_submodule(part)
    fresh = copy.deepcopy(attn)
    report = accelerate(block)
    assert fused(lambda: block(x, *rest))[1]
    wrap, serves = WRAPPERS[how]
    if how == "undone":
        del attn.forward
    elif part == "attn_layer.1":
        block.attn_layer[1] = wrap(fresh if how == "another" else attn)
    else:
        setattr(block, part, wrap(fresh if how == "another" else attn))
    out, ran = fused(lambda: block(x, *rest))
    assert relative(out, expected) < 1e-4
    assert ran == serves or name.endswith("parallel")
    report.undo()
    assert relative(block(x, *rest), expected) < 1e-4


def test_attention_that_two_blocks_share():
    model = swin()
    a, b = model.layers[0].blocks
    x = torch.randn(1, 28, 28, 32)
    b.attn = a.attn
    expected = a(x)
    accelerate(a)
    report = accelerate(b)
    assert relative(b(x), copy.deepcopy(b)(x)) < 1e-4
    report.undo()
    assert relative(a(x), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_cosines_of_padded_maps_in_half_precision(library, autocast, dtype):
    """Keys of padded tokens are zero, and the epsilon of their norm is zero in float16."""
    torch.manual_seed(0)
    if library == "timm":
        module, x = swin_v2(strict_img_size=False).layers[0].blocks[1], torch.randn(1, 9, 21, 32)
    else:
        module, x = torchvision_attention_v2(), torch.randn(1, 9, 21, 16)
    randomise(module.eval())
    expected = module(x).detach()
    accelerate(module)
    if not autocast:
        module, x = module.to(dtype), x.to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = module(x)
    out.float().cos().sum().backward()
    assert relative(out.float(), expected) < 8 * torch.finfo(dtype).eps
    assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def other_strides(module: nn.Module, *args) -> set[str]:
    """Parameters of which the gradient has other strides."""
    module(*args).sum().backward()
    grads = {name: (p, p.grad) for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {name for name, (p, grad) in grads.items() if grad.stride() != p.stride()}


@pytest.mark.parametrize("name", [*MODELS, *MVITS, *PUBLISHED])
def test_gradients_have_the_strides_of_their_parameters(name, torchvision):
    """As DistributedDataParallel wants them, except where they have not as shipped: outside of the attention."""
    if name in PUBLISHED:
        model, args = PUBLISHED[name]()
    else:
        make, size, _ = (MODELS | MVITS)[name]
        model, args = make(torchvision.models), (torch.randn(1, 3, *size),)
    before = other_strides(model, *args)
    accelerate(model)
    after = other_strides(model, *args)
    assert after <= before and not any("attn" in name for name in after)


@pytest.mark.parametrize("family", ["timm mvit", "torchvision mvit"])
def test_gradients_of_pools_have_the_strides_of_channels_last(family):
    make, size = FAMILIES[family]
    model = make().to(memory_format=torch.channels_last if len(size) == 3 else torch.channels_last_3d)
    accelerate(model)
    assert not any("pool" in name for name in other_strides(model, torch.randn(1, *size)))


SIGNATURES = {
    "timm": (swin_block, "attn.forward"),
    "torchvision": (torchvision_attention, "forward"),
    "timm MViT": (mvit_attention, "forward"),
    "torchvision MaxViT": (torchvision_layer, "forward"),
    "CrossFormer": (first_detection, "forward"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name):
    make, path = SIGNATURES[name]
    module, (part, _, method) = make(), path.rpartition(".")
    own = getattr(module.get_submodule(part), method)
    expected = inspect.signature(own), own.__doc__
    accelerate(module)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        now = getattr(one.get_submodule(part), method)
        assert now != own and (inspect.signature(now), now.__doc__) == expected


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_dynamic_shapes_by_name(strict):
    module, x = torchvision_attention().eval(), torch.randn(2, 14, 21, 16)
    accelerate(module)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    more = torch.randn(5, 14, 21, 16)
    assert relative(program.module()(more), module(more)) < 1e-4


def test_windows_of_three_axes():
    """MONAI's Swin blocks have the names and parts of Microsoft's."""
    block = published.SwinTransformerBlock(32, (14, 14), 2)
    block.window_size = block.shift_size = (7, 7, 7)
    reason = only_reason(block)
    assert reason.startswith("its window_size is (7, 7, 7) where the published class has an int") and "3 axes" in reason
    block.window_size = (7, 7)
    assert only_reason(block) == "its window_size is (7, 7) where the published class has an int"
    block.window_size = 7
    assert "its shift_size is (7, 7, 7)" in only_reason(block)


# What it does to a model


def traces(model: nn.Module) -> list[dict]:
    return [dict(vars(m)) for m in model.modules()]


def test_undo_restores_everything():
    model = swin()
    before = traces(model)
    keys = list(model.state_dict())
    accelerate(model)
    assert traces(model) != before and list(model.state_dict()) == keys
    again = accelerate(model)
    assert len(again.replaced) == 4 and not again.skipped, "twice is harmless"
    again.undo()
    again.undo()
    assert traces(model) == before


def test_a_report_prints_as_a_table():
    lines = str(accelerate(swin())).splitlines()
    assert lines[0] == "vitkernels: 4 modules run fused attention, 0 left alone"
    assert lines[2].split() == ["module", "was", "runs", "now"]
    expected = "layers.0.blocks.1  timm SwinTransformerBlock  partition_attention, windows 7 x 7 shifted by 3 x 3"
    assert lines[4] == expected


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way):
    model = swin().eval()
    accelerate(model)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    images = torch.randn(1, 3, 112, 112)
    assert torch.equal(other(images), model(images))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.equal(other(images), model(images)), "a copy reads its own parameters"
    accelerate(other).undo()
    assert "forward" not in vars(other.layers[0].blocks[0].attn) and "forward" in vars(model.layers[0].blocks[0].attn)


def test_a_file_of_torch_save():
    model = swin().eval()
    accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    images = torch.randn(1, 3, 112, 112)
    assert torch.equal(torch.load(buffer, weights_only=False)(images), model(images))


def test_hooks_of_the_attention_run():
    model = swin()
    accelerate(model)
    shapes = []
    model.layers[0].blocks[0].attn.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    model(torch.randn(1, 3, 112, 112))
    assert shapes == [(1, 28, 28, 32)]


def test_attention_modules_still_take_windows():
    """As they did before: what calls them by itself goes on to work."""
    block = swin_block()
    windows = torch.randn(4, 49, 32)
    mask = torch.randn(2, 49, 49)
    expected = block.attn(windows), block.attn(windows, mask)
    accelerate(block)
    assert torch.equal(block.attn(windows), expected[0])
    assert torch.equal(block.attn(windows, mask), expected[1]) and torch.equal(
        block.attn(windows, mask=mask), expected[1]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("before", [True, False])
def test_other_dtypes(dtype, before):
    model = maxvit("maxvit_tiny_tf_224").eval()
    randomise(model)
    images = torch.randn(1, 3, 96, 96)
    expected, shipped = (copy.deepcopy(model).to(t)(images.to(t)).double() for t in (torch.float64, dtype))
    if before:
        accelerate(model)
    model.to(dtype)
    report = accelerate(model)
    assert len(report.replaced) == 4
    out = model(images.to(dtype))
    allowed = 2 * relative(shipped, expected) + (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    assert out.dtype == dtype and relative(out.double(), expected) <= allowed


def test_sizes_that_a_model_refuses_are_refused():
    model = maxvit("maxvit_tiny_tf_224")
    images = torch.randn(1, 3, 112, 96)
    with pytest.raises(Exception) as expected:  # noqa: B017
        model(images)
    accelerate(model)
    with pytest.raises(type(expected.value)) as found:
        model(images)
    assert str(found.value) == str(expected.value)


# PyTorch around it

FAMILIES = {
    "timm swin": (swin, (3, 112, 112)),
    "timm swin_v2": (swin_v2, (3, 128, 128)),
    "timm maxvit": (lambda: maxvit("maxvit_tiny_tf_224"), (3, 96, 96)),
    "timm mvit": (mvit, (3, 64, 64)),
    "torchvision swin": (lambda: torchvision_swin(import_torchvision()[0].models), (3, 112, 112)),
    "torchvision maxvit": (lambda: torchvision_maxvit(import_torchvision()[0].models), (3, 112, 112)),
    "torchvision mvit": (lambda: torchvision_mvit(import_torchvision()[0].models, v2=True), (3, 4, 64, 64)),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def example(family: str, device: str = "cpu") -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model accelerated on its device, images, and the logits that it had before."""
    make, size = FAMILIES[family]
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(2, *size)
    randomise(model)
    model, images = model.to(device), images.to(device)
    with torch.no_grad():
        expected = model(images)
    assert accelerate(model).replaced
    return model, images, expected


@pytest.mark.parametrize("family", ["timm swin", "timm maxvit", "timm mvit", "torchvision swin"])
def test_compiles_as_one_graph_and_exports(family, tmp_path):
    model, images, expected = example(family)
    torch.compiler.reset()
    with torch.no_grad():
        assert relative(torch.compile(model, fullgraph=True, backend="eager")(images), expected) < 1e-4
        program = torch.export.export(model, (images,))
        torch.export.save(program, tmp_path / "model.pt2")
        assert relative(torch.export.load(tmp_path / "model.pt2").module()(images), expected) < 1e-4
    assert any("vitkernels" in str(node.target) for node in program.graph.nodes)


def test_compiled_training():
    model, images, _ = example("timm swin")
    cotangent = torch.randn(10)
    expected = gradients(model, images, cotangent)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(expected, gradients(compiled, images, cotangent), strict=True):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max().clamp_min(1e-3)


def test_a_model_that_is_compiled_already():
    """It is traced again, with what runs now; undone, its first graph serves again."""
    ran = []
    model = swin().eval()
    randomise(model)
    images = torch.randn(1, 3, 112, 112)
    torch.compiler.reset()

    def backend(graph, inputs):
        ran.append(any("vitkernels" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = compiled(images)
        report = accelerate(compiled)
        assert len(report.replaced) == 4
        assert compiled.get_submodule(report.replaced[0].name) is model.layers[0].blocks[0]
        assert relative(compiled(images), expected) < 1e-4
        report.undo()
        assert torch.equal(compiled(images), expected)
    assert ran == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_family
def test_mixed_precision(family, dtype):
    """No further from float32 than the model was before."""
    model, images, expected = example(family)
    with torch.autocast("cpu", dtype):
        out = model(images)
        out.sum().backward()
        accelerate(model).undo()
        before = model(images)
    assert relative(out.float(), expected) <= 2 * relative(before.float(), expected) + 4 * torch.finfo(dtype).eps
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients) > 0.9 * len(gradients)  # the others: of a group of one token, say


@each_family
def test_activation_checkpointing(family):
    model, images, _ = example(family)
    cotangent = torch.randn(10)
    expected = gradients(model, images, cotangent)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    checkpointed.parameters = model.parameters
    for a, b in zip(expected, gradients(checkpointed, images, cotangent), strict=True):
        assert torch.equal(a, b)


def test_checkpointing_of_timm_and_of_wrapped_attention():
    model, images, _ = example("timm swin")
    cotangent = torch.randn(10)
    expected = gradients(model, images, cotangent)
    model.set_grad_checkpointing()
    block = model.layers[0].blocks[0]
    block.attn = checkpoint_wrapper(block.attn)
    for a, b in zip(expected, gradients(model, images, cotangent), strict=True):
        assert torch.equal(a, b)


@each_family
def test_channels_last(family):
    model, images, expected = example(family)
    layout = torch.channels_last if images.dim() == 4 else torch.channels_last_3d
    out = model.to(memory_format=layout)(images.to(memory_format=layout))
    assert relative(out, expected) < 1e-4


@each_family
def test_functional_gradients(family):
    """torch.func takes parameters from outside: they are those that are used."""
    model, images, _ = example(family)
    cotangent = torch.randn(10)
    _, _, *expected = gradients(model, images, cotangent)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()

    def loss(parameters):
        return (torch.func.functional_call(model, parameters, images) * cotangent).sum()

    found = torch.func.grad(loss)(parameters)
    largest = max(g.abs().max() for g in expected)
    for a, b in zip(expected, found.values(), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max().clamp_min(1e-4 * largest)


@pytest.mark.parametrize("family", ["torchvision swin", "torchvision maxvit"])
def test_features_by_fx(family):
    """torch.fx sees the methods as they were."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model, images, expected = example(family)
    node = {"torchvision swin": "head", "torchvision maxvit": "classifier"}[family]
    assert relative(create_feature_extractor(model, {node: "logits"})(images)["logits"], expected) < 1e-4


class ByKeyword(Logged):
    def forward(self, x):
        return self.inner(x=x)


def test_fx_sees_methods_that_are_called_by_keyword():
    module = ByKeyword(torchvision_attention())
    accelerate(module)
    x = torch.randn(1, 14, 21, 16)
    assert relative(torch.fx.symbolic_trace(module)(x), module(x)) < 1e-4


@pytest.mark.parametrize("family", ["timm swin", "timm maxvit", "torchvision mvit"])
def test_onnx(family, tmp_path):
    """Through the reference backend; what runs elsewhere computes the same."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, images, expected = example(family)
    path = tmp_path / "model.onnx"
    with use_backend("reference"):
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert relative(torch.from_numpy(found), expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_family
def test_cuda_graphs(family):
    model, images, _ = example(family, "cuda")

    def step():
        with torch.no_grad():
            return (model(images),)

    assert_graph_replays(step, images)


# A step of two processes

STEP = """
import sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[1])
from test_accelerate import swin
from test_models import randomise
from vitkernels import accelerate


def wrap(model, kind):
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in (block for stage in model.layers for block in stage.blocks):
        fully_shard(block.attn, mesh=mesh)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(order, images, labels):
    torch.manual_seed(0)
    model = swin().eval()
    randomise(model)
    wrapped = model
    for what in order:
        if what == "accelerate":
            report = accelerate(wrapped)
        else:
            wrapped = wrap(model, what)
    assert len(report.replaced) == 4 and not report.skipped, report
    assert report.replaced[0].name.endswith("layers.0.blocks.0"), report
    F.cross_entropy(wrapped(images), labels).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}


torch.set_num_threads(1)
torch.manual_seed(1)
images, labels = torch.randn(4, 3, 112, 112), torch.arange(4)
expected = step(["accelerate"], images, labels)
dist.init_process_group("gloo")
own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
for kind in ("ddp", "fsdp"):
    for order in (["accelerate", kind], [kind, "accelerate"]):
        found = step(order, images[own], labels[own])
        for name, p in expected.items():
            assert (found[name] - p).abs().max() <= 1e-5 * p.abs().max().clamp_min(1e-3), (order, name)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo here")
def test_two_processes_step_as_one(tmp_path):
    """DistributedDataParallel and FSDP2, also of the attention modules, before and after."""
    import_torchvision()
    pytest.importorskip("timm")
    script = tmp_path / "step.py"
    script.write_text(STEP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*launch, str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
