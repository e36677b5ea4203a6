"""A photograph through CrossFormer's embedding and two attention layers, and a picture of who attends to whom.

Both layers, short and long distance, run fused and as the plain PyTorch reference; the difference and both times are
printed. The picture shows which tokens share a group with one chosen token under four partitions, and where that token
attends. The weights are random but seeded; queries and keys share theirs, so that, even untrained, a token attends to
those that look like it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image
from torch import Tensor, nn

from vitkernels import LongShortDistanceAttention, Partition, info, lsda_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

GROUP, INTERVAL, SHIFT = 7, 4, 3  # tokens
STRIDE = 4  # pixels of a token
DIM, HEADS = 96, 3  # CrossFormer-S, stage 1
GROUP_COLOR, TOKEN_COLOR, TEXT_COLOR, HEAT = "#ffb31a", "#ff2d6f", "#24292f", "inferno"
WIDTH, GAP, CAPTION = 9, 0.1, 0.27  # of the picture, between its panels, above each panel; inches


class CrossScaleEmbedding(nn.Module):
    """Four convolutions of different reach around the same points, side by side in the channels, then a LayerNorm."""

    def __init__(self, dim: int):
        super().__init__()
        reach = {4: dim // 2, 8: dim // 4, 16: dim // 8, 32: dim // 8}
        self.projs = nn.ModuleList(nn.Conv2d(3, d, k, STRIDE, (k - STRIDE) // 2) for k, d in reach.items())
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, H, W] pixels -> [B, H / 4, W / 4, dim]
        return self.norm(torch.cat([proj(image) for proj in self.projs], 1).permute(0, 2, 3, 1))


def load(path: Path | None, height: int) -> np.ndarray:  # [H, W, 3] in 0..1
    """The photograph, resized so that its tokens divide into whole groups."""
    if path is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(load_sample_image("china.jpg"))
    else:
        image = Image.open(path).convert("RGB")
    unit = STRIDE * GROUP
    size = [max(round(pixels * height / image.height / unit), 1) * unit for pixels in image.size]
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / 255


def attend(layer: LongShortDistanceAttention, x: Tensor, backend: str | None) -> Tensor:
    """What ``layer(x)`` computes, with a backend of one's choice."""
    qkv = layer.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS))
    group, interval = layer.partition.group, layer.partition.interval
    out = lsda_attention(qkv, layer.pos, group_size=group, interval=interval, backend=backend)
    return layer.proj(out.flatten(-2))


def attention_of(layer: LongShortDistanceAttention, x: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Raster indices of the tokens in the group of ``token``, and how much it attends to each, mean over heads."""
    partition = layer.partition.on(*x.shape[1:3])
    groups = partition.index(*x.shape[1:3])
    group = groups[(groups == token).any(1)][0]  # [N]
    group = group[group >= 0]
    qkv = layer.qkv(x[0].flatten(0, 1)[group]).unflatten(-1, (3, HEADS, -1))
    q, k, _ = qkv.permute(1, 2, 0, 3)  # [heads, N, head_dim]
    y, x = group // x.shape[2], group % x.shape[2]
    query = (group == token).nonzero().item()
    steps = [(c[query] - c) // i + g - 1 for c, i, g in zip((y, x), partition.interval, partition.group)]
    bias = layer.pos(partition.group)[:, steps[0], steps[1]]  # [heads, N]
    logits = (k @ q[:, query, :, None])[..., 0] * q.shape[-1] ** -0.5 + bias
    return group, logits.softmax(-1).mean(0)


def milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@dataclass
class Scene:
    """The photograph and the chosen token, and how to draw on it in units of tokens."""

    image: np.ndarray  # [H, W, 3]
    token: tuple[int, int]  # (y, x)

    @property
    def map(self) -> tuple[int, int]:
        return self.image.shape[0] // STRIDE, self.image.shape[1] // STRIDE

    def backdrop(self, axes: Axes, light: float = 0.55) -> None:
        """The photograph, greyed and darkened so that colour on it stands out."""
        shade = light * (self.image + self.image.mean(-1, keepdims=True)) / 2
        shade = np.round(shade * 64) / 64  # fewer shades and whole pixels: a third of the file
        axes.imshow(shade, extent=(0, self.map[1], self.map[0], 0), interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlim=(0, self.map[1]), ylim=(self.map[0], 0))
        for spine in axes.spines.values():
            spine.set_visible(False)

    def mark(self, axes: Axes, size: float = 1.0) -> None:
        self.square(axes, *self.token, size, facecolor=TOKEN_COLOR, edgecolor="white", linewidth=0.7, zorder=5)

    @staticmethod
    def frame(axes: Axes, y: int, x: int, height: int, width: int, **style) -> None:
        axes.add_patch(Rectangle((x, y), width, height, facecolor="none", **style))

    @staticmethod
    def square(axes: Axes, y: int, x: int, size: float = 1.0, **style) -> None:
        """A square of ``size`` tokens centred on token (y, x)."""
        axes.add_patch(Rectangle((x + 0.5 - size / 2, y + 0.5 - size / 2), size, size, **style))


def draw_group(scene: Scene, axes: Axes, title: str, detail: str, partition: Partition) -> None:
    """The tokens that share a group with the chosen one, the regions of the partition, and the region they lie in."""
    height, width = scene.map
    partition = partition.on(height, width)
    groups = partition.index(height, width)
    group = groups[(groups == scene.token[0] * width + scene.token[1]).any(1)][0]
    places = [divmod(place, width) for place in group[group >= 0].tolist()]
    scene.backdrop(axes)
    region = [size * interval for size, interval in zip(partition.group, partition.interval)]
    for line, limit, step, shift in zip((axes.axhline, axes.axvline), scene.map, region, partition.shift):
        for position in range(shift, limit, step):
            line(position, color="white", alpha=0.3, linewidth=0.5)
    corner = [(c - shift) // step * step + shift for c, step, shift in zip(scene.token, region, partition.shift)]
    scene.frame(axes, *corner, *region, edgecolor=GROUP_COLOR, linewidth=1.3)
    for y, x in places:
        color = scene.image[y * STRIDE : (y + 1) * STRIDE, x * STRIDE : (x + 1) * STRIDE].mean((0, 1))
        scene.square(axes, y, x, facecolor=0.2 * color + 0.8 * np.array(to_rgb(GROUP_COLOR)), linewidth=0)
    scene.mark(axes)
    caption(axes, title, detail)


def caption(axes: Axes, title: str, detail: str) -> None:
    note(axes, 0, title, ha="left", fontsize=10, fontweight="bold")
    note(axes, 1, detail)


def note(axes: Axes, x: float, text: str, **style) -> None:
    """``text`` above the panel, ending at ``x`` of its width unless ``style`` says otherwise."""
    style = {"ha": "right", "va": "bottom", "fontsize": 8, "color": TEXT_COLOR, **style}
    axes.text(x, 1.027, text, transform=axes.transAxes, **style)


def draw_attention(scene: Scene, axes: Axes, title: str, group: Tensor, weights: Tensor, interval: int) -> None:
    """How much the chosen token attends to each token of its group, each drawn as large as its neighbours allow."""
    scene.backdrop(axes)
    shades = plt.get_cmap(HEAT)((weights / weights.max()).numpy())
    places = [divmod(place, scene.map[1]) for place in group.tolist()]
    if interval > 1:
        for (y, x), shade in zip(places, shades):
            scene.square(axes, y, x, 0.72 * interval, facecolor=shade, linewidth=0)
        scene.square(axes, *scene.token, 0.72 * interval + 0.6, facecolor="none", edgecolor=TOKEN_COLOR, linewidth=1.6)
    else:
        magnify(scene, axes, places, shades)
    caption(axes, title, f"{weights.max():.2f}")
    scale = axes.inset_axes((0.76, 1.045, 0.13, 0.035))
    scale.imshow(np.linspace(0, 1, 64)[None], cmap=HEAT, aspect="auto")
    scale.set_axis_off()
    note(axes, 0.745, "0")


def magnify(scene: Scene, axes: Axes, places: list[tuple[int, int]], shades: np.ndarray) -> None:
    """A group of neighbours in an inset, on the side of the photograph where it is not."""
    (top, left), (bottom, right) = places[0], (places[-1][0] + 1, places[-1][1] + 1)
    to_left, high = left + right > scene.map[1], 0.7
    wide = high * scene.map[0] / scene.map[1]
    inset = axes.inset_axes((0.04 if to_left else 0.96 - wide, (1 - high) / 2, wide, high))
    inset.set(xlim=(left, right), ylim=(bottom, top))
    inset.set_axis_off()
    for (y, x), shade in zip(places, shades):
        scene.square(inset, y, x, 0.9, facecolor=shade, linewidth=0)
    scene.square(inset, *scene.token, 1.0, facecolor="none", edgecolor=TOKEN_COLOR, linewidth=1.6, clip_on=False)
    scene.frame(axes, top, left, bottom - top, right - left, edgecolor="white", linewidth=1)
    near, far = (left, right) if to_left else (right, left)
    for y in (top, bottom):
        ends = {"xyA": (near, y), "coordsA": axes.transData, "xyB": (far, y), "coordsB": inset.transData}
        axes.figure.add_artist(ConnectionPatch(**ends, color="white", linewidth=0.7, alpha=0.8))
    scene.mark(axes)


def draw(scene: Scene, attention: list[tuple[Tensor, Tensor]], out: Path) -> None:
    height, width = scene.map
    panel = (WIDTH - 4 * GAP) / 3  # inches, its width
    tall = panel * height / width
    total = 2 * (tall + CAPTION) + GAP
    figure, panels = plt.subplots(2, 3, figsize=(WIDTH, total), facecolor="white")
    figure.subplots_adjust(GAP / WIDTH, GAP / total, 1 - GAP / WIDTH, 1 - CAPTION / total, GAP / panel, CAPTION / tall)
    far = Partition.grid(GROUP).on(height, width).interval
    draw_group(scene, panels[0, 0], "Window", "Swin, MaxViT, CrossFormer SDA", Partition.window(GROUP))
    draw_group(scene, panels[0, 1], "Shifted window", f"Swin, shift {SHIFT}", Partition.window(GROUP, SHIFT))
    draw_group(scene, panels[1, 0], "LDA", f"CrossFormer, interval {INTERVAL}", Partition.long(GROUP, INTERVAL))
    draw_group(scene, panels[1, 1], "Grid", f"MaxViT, interval {far[0]} x {far[1]}", Partition.grid(GROUP))
    draw_attention(scene, panels[0, 2], "Attention, SDA", *attention[0], 1)
    draw_attention(scene, panels[1, 2], "Attention, LDA", *attention[1], INTERVAL)
    figure.savefig(out, dpi=200)
    plt.close(figure)


def tied_layer(interval: int) -> LongShortDistanceAttention:
    """A layer with random weights whose queries are its keys."""
    made = LongShortDistanceAttention(DIM, HEADS, GROUP, interval).eval()
    with torch.no_grad():
        made.qkv.weight[:DIM] = made.qkv.weight[DIM : 2 * DIM]
        made.qkv.bias[:DIM] = made.qkv.bias[DIM : 2 * DIM]
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python examples/photo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="a photograph; scikit-learn's china.jpg if none is given")
    parser.add_argument("--height", type=int, default=224, help="of the resized photograph, in pixels (224)")
    parser.add_argument("--token", type=int, nargs=2, metavar=("Y", "X"), help="the chosen token, of 4 x 4 pixels")
    parser.add_argument("--out", type=Path, default=Path("photo.png"), help="where the picture goes (photo.png)")
    args = parser.parse_args(argv)

    image = load(args.image, args.height)
    height, width = (pixels // STRIDE for pixels in image.shape[:2])
    token = tuple(args.token or (round(0.44 * height), round(0.405 * width)))
    if not (0 <= token[0] < height and 0 <= token[1] < width):
        parser.error(f"--token must lie on the map of {height} x {width} tokens, got {token[0]} {token[1]}")

    torch.manual_seed(0)
    embedding, layers = CrossScaleEmbedding(DIM), {"SDA": tied_layer(1), "LDA": tied_layer(INTERVAL)}
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    attention = []
    print(info())
    with torch.no_grad():
        x = embedding(((torch.from_numpy(image) - mean) / spread).permute(2, 0, 1)[None])
        print(f"photograph {image.shape[0]} x {image.shape[1]} pixels, map {height} x {width} tokens, {DIM} channels")
        for name, layer in layers.items():
            y = nn.functional.layer_norm(x, (DIM,))
            attention.append(attention_of(layer, y, token[0] * width + token[1]))
            fused, reference = attend(layer, y, None), attend(layer, y, "reference")
            times = [milliseconds(partial(attend, layer, y, backend)) for backend in (None, "reference")]
            difference = (fused - reference).abs().max()
            print(f"{name}: fused {times[0]:.2f} ms, reference {times[1]:.2f} ms, largest difference {difference:.1e}")
            x = x + fused
    draw(Scene(image, token), attention, args.out)
    print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
