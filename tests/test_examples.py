"""The examples run end to end, briefly."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from vitkernels import FeatureSpaceAttention, LongShortDistanceAttention, _dispatch, balanced_clusters

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture
def photo(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module("photo")


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_photo_draws_the_sample_photograph(photo, tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "photo.png"
    assert photo.main(["--height", "112", "--out", str(out)]) == 0
    assert Image.open(out).size[0] == 200 * photo.WIDTH and out.stat().st_size > 50_000
    printed = capsys.readouterr().out
    assert "112 x 168 pixels, map 28 x 42 tokens" in printed
    for name in ("SDA: ", "LDA: ", "BOAT: "):
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert float(line.split()[-1]) < 1e-5  # fused against reference


@pytest.mark.parametrize("token", [(0, 0), (20, 34)], ids=["first", "last"])
def test_photo_takes_any_picture_and_token(photo, picture, tmp_path, token):
    out = tmp_path / "photo.png"
    arguments = ["--image", str(picture), "--height", "84", "--token", *map(str, token), "--out", str(out)]
    assert photo.main(arguments) == 0 and out.exists()


def test_photo_refuses_a_token_outside_the_map(photo, picture, capsys):
    with pytest.raises(SystemExit):
        photo.main(["--image", str(picture), "--height", "84", "--token", "21", "0"])
    assert "21 x 35 tokens, got 21 0" in capsys.readouterr().err


HEIGHT, WIDTH, TOKEN = 21, 35, 10 * 35 + 17


def numbered(photo, layer: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor]:
    """The layer, tied, with a token's own number / 100 as its value and no output projection; its input."""
    torch.manual_seed(0)
    x = torch.randn(1, HEIGHT, WIDTH, photo.DIM)
    x[..., 0] = torch.arange(HEIGHT * WIDTH).view(HEIGHT, WIDTH) / 100
    layer = photo.tied(layer)
    with torch.no_grad():
        layer.qkv.weight[2 * photo.DIM :] = 0
        layer.qkv.weight[2 * photo.DIM :, 0] = 1
        layer.qkv.bias[2 * photo.DIM :] = 0
        layer.proj.weight.copy_(torch.eye(photo.DIM))
        layer.proj.bias.zero_()
    return layer, x


@pytest.mark.parametrize("interval", [1, 4])
@torch.no_grad()
def test_photo_attention_is_what_the_layer_computes(photo, interval):
    """The layer's output is the mean of the tokens' numbers under the weights."""
    layer, x = numbered(photo, LongShortDistanceAttention(photo.DIM, photo.HEADS, photo.GROUP, interval))
    group, weights = photo.attention_of(layer, x, TOKEN)
    attended = layer(x)[0].flatten(0, 1)[TOKEN].mean()  # over heads
    assert TOKEN in group and weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert attended.item() == pytest.approx((weights * group / 100).sum().item(), rel=1e-4)


@pytest.mark.parametrize("leaf_size", [49, 100, 400], ids=["several leaves", "fewer", "a single leaf"])
@torch.no_grad()
def test_photo_leaves_are_those_the_layer_attends_in(photo, leaf_size):
    layer, x = numbered(photo, FeatureSpaceAttention(photo.DIM, photo.HEADS, leaf_size))
    layer.get_v.weight.zero_()
    layer.get_v.bias.zero_()
    order = balanced_clusters(photo.project(layer, x)[..., 0, :, :].flatten(1, 2), leaf_size=leaf_size)[0, 0]
    leaves = photo.leaves_of(layer, order)
    attended = layer(x)[0].flatten(0, 1)[:, 0]  # of the first head
    for token in (0, TOKEN, int(order[-1])):
        own, borrowed = photo.leaf_of(layer, order, token)
        assert torch.equal(own.sort().values, (leaves == leaves[token]).nonzero()[:, 0])
        assert len(borrowed) == (layer.overlap if leaves.max() else 0)
        keys = torch.cat((own, borrowed))
        weights = photo.attention_in(layer, x, token, keys, head=0)
        assert attended[token].item() == pytest.approx((weights * keys / 100).sum().item(), rel=1e-4)


@pytest.fixture
def accelerate_timm(monkeypatch, torchvision):
    """The program, on one thread."""
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("accelerate_timm")
    torch.set_num_threads(threads)


SMALL = ["test_maxvit", "--device", "cpu", "--size", "64", "--batch", "2", "--seconds", "0.1"]
needs_kernels = pytest.mark.skipif(_dispatch.absent("cpu") is not None, reason=str(_dispatch.absent("cpu")))


@needs_kernels
def test_accelerate_timm_compares_both_ways(accelerate_timm, capsys):
    assert accelerate_timm.main([*SMALL, "--training"]) == 0
    printed = capsys.readouterr().out
    for said in ("8 modules run fused attention, 0 left alone", "images 2 x 3 x 64 x 64, float32, cpu"):
        assert said in printed
    difference = re.search(r"largest difference of the outputs: (\S+) of", printed)
    assert 0 < float(difference[1]) < 1e-5
    for name in ("inference", "training step"):
        shipped, ours, ratio, rounds = re.search(rf"^{name} +(\S+) +(\S+) +(\S+)x +(\d+)$", printed, re.M).groups()
        assert float(ratio) == pytest.approx(float(ours) / float(shipped), rel=0.05) and int(rounds) >= 3


@needs_kernels
@pytest.mark.parametrize("steps, said", [(4, "before anything was measured"), (9, r"inference .+x +2\n")])
def test_accelerate_timm_says_what_it_measured_when_interrupted(accelerate_timm, monkeypatch, capsys, steps, said):
    step, left = accelerate_timm.step, iter(range(3 + steps))  # three of them before it measures

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(accelerate_timm, "step", interrupted)
    assert accelerate_timm.main([*SMALL, "--seconds", "100"]) == 130
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    "options, said",
    [
        (["swin_tiny_patch4_window7_225"], r"no model swin_tiny_patch4_window7_225: try swin_tiny_patch4_window7_224 "),
        ([*SMALL, "--size", "100"], r"run test_maxvit \(AssertionError: height .*\): leave --size 100 out"),
        (["test_maxvit", "--batch", "0"], r"--batch: must be an integer of at least 1, got '0'"),
        (["test_maxvit", "--device", "meta"], r"--device meta must be one that is there"),
    ],
)  # fmt: skip
def test_accelerate_timm_refuses_in_one_line(accelerate_timm, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        accelerate_timm.main(options)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and re.search(said, printed)


def test_accelerate_timm_says_when_there_is_nothing_to_accelerate(accelerate_timm, capsys):
    assert accelerate_timm.main(["test_vit", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "nothing to accelerate in VisionTransformer" in printed.out and "test_vit" in printed.err
