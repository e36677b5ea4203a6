"""load_checkpoint: files as their authors write them, and files that must be refused with nothing changed."""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitkernels.models import create_model, load_checkpoint

TINY: dict[str, dict] = {
    "crossformer_pp_small": dict(embed_dim=16, depths=(1, 4, 1, 1), heads=(1, 2, 2, 4)),
    "boat_swin_tiny": dict(embed_dim=16, depths=(2, 2, 1, 1), heads=(1, 2, 2, 4)),
    "boat_cswin_tiny": dict(embed_dim=16, depths=(1, 2, 1, 1), heads=(2, 2, 2, 4)),
    "maxvit_tiny": dict(embed_dim=(32, 64, 64, 64), depths=(2, 1, 1, 1), stem_width=16),
    "mvit_v2_tiny": dict(embed_dim=16, depths=(1, 2, 1, 1), image_size=64),
    "mvit_v1_base_16x4": dict(embed_dim=16, depths=(1, 2, 1, 1), image_size=64, frames=4),
}
FORMATS = {"maxvit_tiny": ("tf", "rw", "torchvision")}


def build(name: str, seed: int, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(name, **{"num_classes": 5, **TINY[name], **options})
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def substitute(state: dict[str, Tensor], *rules: tuple[str, str | Callable]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def official_crossformer(model: nn.Module) -> dict:
    """The first official code keeps buffers, and its trainer a configuration."""
    state = model.state_dict()
    for name in [n for n in state if n.endswith("attn.proj.bias")]:
        attn = name.removesuffix(".proj.bias")
        state |= {f"{attn}.biases": torch.zeros(169, 2), f"{attn}.relative_position_index": torch.zeros(49, 49)}
    return {"model": state, "optimizer": {"state": {}}, "epoch": 299, "config": argparse.Namespace()}


def detector(model: nn.Module) -> dict:
    """A detector that was trained in parallel: its backbone has no final norm and no classifier."""
    state = {n: v for n, v in model.state_dict().items() if not n.startswith(("norm.", "head."))}
    state = {f"module.backbone.{name}": value for name, value in state.items()}
    return {"state_dict": {**state, "module.neck.conv.weight": torch.zeros(3)}, "meta": {"epoch": 12}}


def official_boat_swin(model: nn.Module) -> dict:
    state = model.state_dict()
    for name in [n for n in state if n.endswith("relative_position_bias_table")]:
        attn = name.removesuffix(".relative_position_bias_table")
        state[f"{attn}.relative_position_index"] = torch.zeros(49, 49)
        state[f"{attn.removesuffix('.attn')}.attn_mask"] = torch.zeros(64, 49, 49)
    return {"model": state}


def official_boat_cswin(model: nn.Module) -> dict:
    def stage(m: re.Match) -> str:
        return f"stage{int(m[1]) + 1}.{m[2]}."

    return {
        "state_dict": substitute(
            model.state_dict(),
            (r"^patch_embed\.conv", "stage1_conv_embed.0"),
            (r"^patch_embed\.norm", "stage1_conv_embed.2"),
            (r"^layers\.(\d)\.blocks\.(\d+)\.", stage),
            (r"^layers\.(\d)\.downsample", lambda m: f"merge{int(m[1]) + 1}"),
            (r"^(stage\d\.\d+)\.attn\.", r"\1."),
        ),
        "epoch": 1,
    }


def timm_maxvit(model: nn.Module) -> dict:
    """Tables by key minus query; in timm's own models the projection's rows are by heads first."""
    found = {}
    for name, value in model.state_dict().items():
        if name.endswith("table"):
            name = name.replace(".relative", ".rel_pos.relative")
            if model.style == "tf":
                side = int(value.shape[0] ** 0.5)
                value = value.t().unflatten(1, (side, side)).flip(1, 2)
        if model.style == "rw" and ".qkv." in name:
            value = value.unflatten(0, (3, -1, 32)).transpose(0, 1).flatten(0, 2)
        found[name] = value
    return found


def torchvision_maxvit(model: nn.Module) -> dict:
    theirs = {
        "stem.conv1": "stem.0.0", "stem.norm1": "stem.0.1", "stem.conv2": "stem.1.0", "shortcut.expand": "proj.1",
        "conv1_1x1": "layers.conv_a.0", "conv2_kxk": "layers.conv_b.0", "conv3_1x1": "layers.conv_c",
        "conv.norm1": "conv.layers.conv_a.1", "conv.norm2": "conv.layers.conv_b.1",
        "conv.pre_norm": "conv.layers.pre_norm", "se": "layers.squeeze_excitation", "conv": "MBconv",
        "norm1": "attn_layer.0", "attn.qkv": "attn_layer.1.to_qkv", "attn.proj": "attn_layer.1.merge",
        "attn": "attn_layer.1", "norm2": "mlp_layer.0", "mlp.fc1": "mlp_layer.1", "mlp.fc2": "mlp_layer.3",
        "attn_block": "window_attention", "attn_grid": "grid_attention", "head.norm": "classifier.2",
        "head.pre_logits.fc": "classifier.3", "head.fc": "classifier.5",
    }  # fmt: skip
    rules = [(rf"(^|(?<=\.)){re.escape(ours)}(?=\.)", name) for ours, name in theirs.items()]
    state = substitute(model.state_dict(), *rules, (r"^stages\.(\d+)\.blocks\.(\d+)", r"blocks.\1.layers.\2.layers"))
    for name in [n for n in state if n.endswith("table")]:
        state[name.replace("bias_table", "index")] = torch.zeros(49, 49)
    return state


def slowfast(model: nn.Module) -> dict:
    return {"model_state": substitute(model.state_dict(), (r"^head\.", "head.projection.")), "cfg": "NUM_GPUS: 8\n"}


def torchvision_mvit(model: nn.Module) -> dict:
    state = substitute(
        model.state_dict(),
        (r"^patch_embed\.proj", "conv_proj"),
        (r"^cls_token", "pos_encoding.class_token"),
        (r"^pos_embed_(\w+)", r"pos_encoding.\1_pos"),
        (r"\.mlp\.fc1", ".mlp.0"),
        (r"\.mlp\.fc2", ".mlp.3"),
        (r"(blocks\.\d+)\.proj", r"\1.project"),
        (r"\.attn\.proj", ".attn.project.0"),
        (r"\.norm_([qkv])", r".pool_\1.norm_act.0"),
        (r"\.pool_([qkv])\.weight", r".pool_\1.pool.weight"),
        (r"^head", "head.1"),
    )
    return {name: v.flatten(0, v.dim() - 2).squeeze(0) if name.startswith("pos_") else v for name, v in state.items()}


def timm_mvit(model: nn.Module) -> dict:
    places = [f"stages.{s}.blocks.{b}" for s, depth in enumerate(model.depths) for b in range(depth)]
    return substitute(
        model.state_dict(),
        (r"(blocks\.\d+)\.proj", r"\1.shortcut_proj_attn"),
        (r"^blocks\.(\d+)", lambda m: places[int(m[1])]),
        (r"^head", "head.fc"),
    )


def same(model: nn.Module) -> dict:
    return {"model": model.state_dict(), "epoch": 3}


WRITTEN: dict[str, tuple[str, dict, Callable[[nn.Module], dict]]] = {
    "CrossFormer": ("crossformer_pp_small", {}, official_crossformer),
    "BOAT-Swin": ("boat_swin_tiny", {}, official_boat_swin),
    "BOAT-CSWin": ("boat_cswin_tiny", {}, official_boat_cswin),
    "timm's MaxViT (tf)": ("maxvit_tiny", {}, timm_maxvit),
    "timm's MaxViT (rw)": ("maxvit_tiny", {"style": "rw"}, timm_maxvit),
    "torchvision's MaxViT": ("maxvit_tiny", {"style": "torchvision"}, torchvision_maxvit),
    "SlowFast's MViT": ("mvit_v1_base_16x4", {}, slowfast),
    "torchvision's MViT": ("mvit_v1_base_16x4", {}, torchvision_mvit),
    "timm's MViTv2": ("mvit_v2_tiny", {}, timm_mvit),
    "MViT": ("mvit_v2_tiny", {}, same),
    "BOAT-CSWin of vitkernels": ("boat_cswin_tiny", {}, same),
    "MaxViT of vitkernels": ("maxvit_tiny", {}, same),
}


def assert_same(model: nn.Module, other: nn.Module, but: tuple[str, ...] = ()) -> None:
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]) != name.startswith(but or ("-",)), name


@pytest.mark.parametrize("source", WRITTEN)
def test_published_names(source, tmp_path):
    name, options, write = WRITTEN[source]
    theirs, ours = build(name, 1, **options), build(name, 2, **options)
    file = write(theirs)
    if source == "CrossFormer":
        file["config"] = {"EPOCHS": 300}
    torch.save(file, tmp_path / "weights.pth")
    found = load_checkpoint(ours, tmp_path / "weights.pth")
    assert found.source == source
    assert_same(ours, theirs)
    buffers = ("biases", "relative_position_index", "attn_mask")
    assert all(name.endswith(buffers) for name in found.left_out)
    assert bool(found.left_out) == (source in ("CrossFormer", "BOAT-Swin", "torchvision's MaxViT"))


def test_image_models_of_slowfast_pool_volumes_of_one_frame(tmp_path):
    theirs, ours = build("mvit_v2_tiny", 1), build("mvit_v2_tiny", 2)
    state = slowfast(theirs)["model_state"]
    volumes = {name: value.unsqueeze(2) if ".attn.pool_" in name else value for name, value in state.items()}
    assert volumes["blocks.0.attn.pool_q.weight"].shape == (16, 1, 1, 3, 3)
    for file in (volumes, {name: value for name, value in volumes.items() if not name.startswith("head.")}):
        torch.save({"model_state": file}, tmp_path / "weights.pyth")
        ours = build("mvit_v2_tiny", 2, num_classes=5 if file is volumes else 0)
        load_checkpoint(ours, tmp_path / "weights.pyth")
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "write, index",
    [(slowfast, "slowfast"), (timm_mvit, "slowfast"), (torchvision_mvit, "torchvision"), (same, None), (None, None)],
    ids=["slowfast", "timm", "torchvision", "vitkernels", "a file that is refused"],
)
@pytest.mark.parametrize("own", ["exact", "slowfast", "torchvision"])
def test_the_rule_of_relative_distances_comes_with_the_weights(write, index, own, tmp_path):
    theirs, ours = build("mvit_v2_tiny", 1), build("mvit_v2_tiny", 2, index=own)
    if write is None:
        torch.save({**torchvision_mvit(theirs), "head.1.bias": torch.zeros(6)}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match="do not fit"):
            load_checkpoint(ours, tmp_path / "weights.pth")
    else:
        torch.save(write(theirs), tmp_path / "weights.pth")
        load_checkpoint(ours, tmp_path / "weights.pth")
    assert {ours.index, *(block.attn.index for block in ours.blocks)} == {index or own}


def test_safetensors(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    theirs, ours = build("mvit_v2_tiny", 1), build("mvit_v2_tiny", 2)
    save({name: value.contiguous() for name, value in timm_mvit(theirs).items()}, tmp_path / "model.safetensors")
    assert load_checkpoint(ours, tmp_path / "model.safetensors").source == "timm's MViTv2"
    assert_same(ours, theirs)


def test_backbones(tmp_path):
    """A detector's goes into a backbone, a classifier's too; what the backbone does not have is left out."""
    theirs = build("crossformer_pp_small", 1)
    torch.save(detector(theirs), tmp_path / "detector.pth")
    torch.save(same(theirs), tmp_path / "classifier.pth")
    for file, left_out in (("detector.pth", 0), ("classifier.pth", 4)):
        ours = build("crossformer_pp_small", 2, features_only=True)
        assert len(load_checkpoint(ours, tmp_path / file).left_out) == left_out
        assert_same(ours, theirs)


@pytest.mark.parametrize("name, head", [("crossformer_pp_small", "head."), ("maxvit_tiny", "head.fc.")])
def test_own_classes(name, head, tmp_path):
    theirs, ours = build(name, 1), build(name, 2, num_classes=7)
    torch.save(same(theirs), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"{re.escape(head)}weight is \[5, \d+\] in the file, \[7, .* drop_head=True"):
        load_checkpoint(ours, tmp_path / "weights.pth")
    before = {n: v.clone() for n, v in ours.state_dict().items() if n.startswith(head)}
    load_checkpoint(ours, tmp_path / "weights.pth", drop_head=True)
    kept = {n: v for n, v in ours.state_dict().items() if n.startswith(head)}
    assert all(torch.equal(kept[n], v) for n, v in before.items())
    expected = theirs.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in ours.state_dict().items() if n not in kept)
    features = build(name, 3, num_classes=0)
    assert sorted(load_checkpoint(features, tmp_path / "weights.pth").left_out) == sorted(kept)


def test_an_entry_of_ones_choice(tmp_path):
    theirs, averaged, ours = (build("boat_swin_tiny", seed) for seed in range(3))
    file = {"state_dict": theirs.state_dict(), "state_dict_ema": averaged.state_dict()}
    torch.save(file, tmp_path / "weights.pth.tar")
    load_checkpoint(ours, tmp_path / "weights.pth.tar", entry="state_dict_ema")
    assert_same(ours, averaged)
    with pytest.raises(ValueError, match="no parameters under 'ema'; it has state_dict, state_dict_ema"):
        load_checkpoint(ours, tmp_path / "weights.pth.tar", entry="ema")


def test_a_configuration_of_yacs_is_read_as_plain_data(tmp_path, monkeypatch):
    """Official CrossFormer checkpoints carry one; yacs need not be installed, and none of its code runs."""

    class CfgNode(dict):
        def __setstate__(self, state):
            raise AssertionError("code of the file's class ran")

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = package.config = CfgNode
    theirs, ours = build("crossformer_pp_small", 1), build("crossformer_pp_small", 2)
    config = CfgNode(MODEL=CfgNode(NAME="cf"))
    config.frozen = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": theirs.state_dict(), "config": config}, tmp_path / "weights.pth")
    load_checkpoint(ours, tmp_path / "weights.pth")
    assert_same(ours, theirs)


def half_a_file(path, model):
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_a_safetensors_file(path, model):
    pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(*names: str) -> Callable:
    def write(path, model):
        torch.save({n: v for n, v in model.state_dict().items() if not n.startswith(names)}, path)

    return write


def holding(value: object) -> Callable:
    return lambda path, model: torch.save(value, path)


LAST = "layers.3.blocks.0.mlp.fc2.weight"  # a matrix near the end


def last_as(change: Callable[[Tensor], Tensor]) -> Callable:
    def write(path, model):
        state = build("boat_swin_tiny", 1).state_dict()
        torch.save({**state, LAST: change(state[LAST])}, path)

    return write


# into a boat_swin_tiny
REFUSED: dict[str, tuple[str, Callable, str]] = {
    "half a file": ("a.pth", half_a_file, "cannot be read: it is no whole file of torch.save"),
    "half a safetensors file": ("a.safetensors", half_a_safetensors_file, "is no whole safetensors file"),
    "no file of torch": ("a.pth", lambda path, model: path.write_text("hello"), "cannot be read: it is no whole file"),
    "an empty file": ("a.pth", lambda path, model: path.write_bytes(b""), "cannot be read: it is no whole file"),
    "other objects": (
        "a.pth",
        holding({"model": argparse.Namespace()}),
        "it holds objects of argparse.Namespace, and only tensors and plain data are read",
    ),
    "a tensor": ("a.pth", holding(torch.zeros(3)), "holds a Tensor, expected parameters by name"),
    "no tensors": ("a.pth", holding({"model": {"a.weight": 3}}), "a.weight are not tensors"),
    "another family": (
        "a.pth",
        lambda path, model: torch.save(build("mvit_v2_tiny", 0).state_dict(), path),
        "has the weights of MViT, the model is a BoatSwin",
    ),
    "something else": ("a.pth", holding({"conv1.weight": torch.zeros(1)}), "weights of none of CrossFormer, BOAT-Swin"),
    "nothing": ("a.pth", holding({}), "names begin with nothing"),
    **{
        f"an entry that is {name}": ("a.pth", last_as(change), rf"1 of another kind: {LAST} {message}.*must hold each")
        for name, change, message in (
            ("sparse", lambda x: x.to_sparse(), "is a torch.sparse_coo tensor"),
            ("nested", lambda x: torch.nested.nested_tensor([x, x]), "is a nested tensor"),
            ("sparse rows", lambda x: x.to_sparse_csr(), "is a torch.sparse_csr tensor"),
            ("meta", lambda x: x.to("meta"), "is on the meta device and has no values"),
            ("quantised", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is torch.qint8, expected fl"),
            ("complex", lambda x: x.to(torch.complex64), "is torch.complex64, expected floating-point"),
            ("bool", lambda x: x > 0, "is torch.bool, expected floating-point"),
            ("int", lambda x: x.int(), "is torch.int32, expected floating-point"),
            ("float8", lambda x: x.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, expected floating-point"),
        )
    },
    "several entries of other kinds": (
        "a.pth",
        lambda path, model: torch.save({n: v.bool() for n, v in model.state_dict().items()}, path),
        r"\d+ of another kind: patch_embed.proj.weight is torch.bool.* and \d+ more\.",
    ),
    "a block less": (
        "a.pth",
        without("layers.1.blocks.1.norm"),
        r"do not fit this BoatSwin: 6 absent from the file: layers.1.blocks.1.norm1.bias, .* and 1 more",
    ),
    "other depths": (
        "a.pth",
        lambda path, model: torch.save(build("boat_swin_tiny", 0, depths=(2, 4, 1, 1)).state_dict(), path),
        r"unknown to the model: layers.1.blocks.2.*the arguments of create_model \(depths",
    ),
    "another width": (
        "a.pth",
        lambda path, model: torch.save(build("boat_swin_tiny", 0, embed_dim=32).state_dict(), path),
        r"of another shape: patch_embed.proj.weight is \[32, 3, 4, 4\] in the file, \[16, 3, 4, 4\] in the model",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
@pytest.mark.parametrize("what", REFUSED)
def test_refusals_change_nothing(what, tmp_path):
    name, write, message = REFUSED[what]
    model = build("boat_swin_tiny", 0)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    write(tmp_path / name, model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, tmp_path / name)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_refused_models(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*weights.pth"):
        load_checkpoint(build("boat_swin_tiny", 0), path)
    torch.save(timm_maxvit(build("maxvit_tiny", 0)), path)
    with pytest.raises(ValueError, match=r"MaxViT \(tf\), the model computes in the style 'rw'; .*style='tf'"):
        load_checkpoint(build("maxvit_tiny", 0, style="rw"), path)
    with pytest.raises(TypeError, match="model must be one of vitkernels.models, got Linear"):
        load_checkpoint(nn.Linear(1, 1), path)
    with torch.device("meta"):
        model = create_model("maxvit_tiny")
    with pytest.raises(ValueError, match="the model are on the meta device; model.to_empty"):
        load_checkpoint(model, path)


def inference_head(model):
    with torch.inference_mode():
        model.head = nn.Linear(128, 5)


def expanded_bias(model):
    model.head.bias = nn.Parameter(torch.zeros(1).expand(5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "change, message",
    [
        (inference_head, "were made under inference_mode: make the model outside of it: head.weight, head.bias"),
        (expanded_bias, "are expanded, several of their elements one in memory: clone them: head.bias"),
        (
            lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True),
            "are not dense tensors: load the weights before the model is quantised or sharded",
        ),
    ],
    ids=["inference mode", "expanded", "quantised"],
)
def test_models_that_cannot_be_written_to_are_refused_unchanged(change, message, tmp_path):
    model = build("boat_swin_tiny", 0).eval()
    torch.save(build("boat_swin_tiny", 1).state_dict(), tmp_path / "weights.pth")
    change(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, tmp_path / "weights.pth")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_two_entries_for_one_parameter_are_refused(tmp_path):
    model = build("mvit_v2_tiny", 0)
    state = slowfast(build("mvit_v2_tiny", 1))["model_state"]
    torch.save({**state, "head.weight": torch.zeros(5, 128)}, tmp_path / "weights.pth")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="head.weight stands for head.weight, and so does another entry"):
        load_checkpoint(model, tmp_path / "weights.pth")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_half_precision_entries_and_counters_are_converted(tmp_path):
    theirs, ours = build("maxvit_tiny", 1), build("maxvit_tiny", 2)
    state = {n: v.bfloat16() if v.is_floating_point() else v.int() + 3 for n, v in theirs.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    load_checkpoint(ours, tmp_path / "weights.pth")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


def test_tables_that_were_kept_are_made_anew(tmp_path):
    theirs, ours = build("crossformer_pp_small", 1).eval(), build("crossformer_pp_small", 2).eval()
    torch.save(same(theirs), tmp_path / "weights.pth")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours(images)
        load_checkpoint(ours, tmp_path / "weights.pth")
        assert torch.equal(ours(images), theirs(images))
