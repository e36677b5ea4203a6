"""What the picture of photo.py is made of: one panel for a group, for all leaves, for one leaf, for attention."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from vitkernels import Partition

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

STRIDE = 4  # pixels of a token
GROUP_COLOR, BORROWED_COLOR, TOKEN_COLOR, TEXT_COLOR, HEAT = "#ffb31a", "#35d0ee", "#ff2d6f", "#24292f", "inferno"
LEAVES = LinearSegmentedColormap.from_list(
    "leaves", ["#5b3fa8", "#3f6fd0", "#22a3b8", "#45bd7a", "#b5d24a", "#f7c13d", "#f5813f", "#e2436b", "#a63d9c"]
)


@dataclass
class Scene:
    """The photograph and the chosen token, and how to draw on it in units of tokens."""

    image: np.ndarray  # [H, W, 3] in 0..1
    token: tuple[int, int]  # (y, x)

    @property
    def map(self) -> tuple[int, int]:
        return self.image.shape[0] // STRIDE, self.image.shape[1] // STRIDE

    @property
    def grey(self) -> np.ndarray:  # [H, W, 1]
        return self.image.mean(-1, keepdims=True)

    def backdrop(self, axes: Axes, light: float = 0.55) -> None:
        """The photograph, greyed and darkened so that colour on it stands out."""
        self.show(axes, light * (self.image + self.grey) / 2)

    def show(self, axes: Axes, shade: np.ndarray) -> None:  # [H, W, 3]
        """An image of the photograph's size, without anything around it."""
        shade = np.round(shade * 64) / 64  # fewer shades and whole pixels: a third of the file
        axes.imshow(shade, extent=(0, self.map[1], self.map[0], 0), interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlim=(0, self.map[1]), ylim=(self.map[0], 0))
        for spine in axes.spines.values():
            spine.set_visible(False)

    def mark(self, axes: Axes, size: float = 1.0) -> None:
        self.square(axes, *self.token, size, facecolor=TOKEN_COLOR, edgecolor="white", linewidth=0.7, zorder=5)

    def tint(self, axes: Axes, places: list[tuple[int, int]], color: str) -> None:
        """Tokens in ``color``, with a fifth of the photograph in it."""
        for y, x in places:
            under = self.image[y * STRIDE : (y + 1) * STRIDE, x * STRIDE : (x + 1) * STRIDE].mean((0, 1))
            self.square(axes, y, x, facecolor=0.2 * under + 0.8 * np.array(to_rgb(color)), linewidth=0)

    @staticmethod
    def frame(axes: Axes, y: int, x: int, height: int, width: int, **style) -> None:
        axes.add_patch(Rectangle((x, y), width, height, facecolor="none", **style))

    @staticmethod
    def square(axes: Axes, y: int, x: int, size: float = 1.0, **style) -> None:
        """A square of ``size`` tokens centred on token (y, x)."""
        axes.add_patch(Rectangle((x + 0.5 - size / 2, y + 0.5 - size / 2), size, size, **style))

    def places(self, tokens: Tensor) -> list[tuple[int, int]]:
        """(y, x) of raster indices; -1 is none."""
        return [divmod(token, self.map[1]) for token in tokens.tolist() if token >= 0]


def draw_group(scene: Scene, axes: Axes, title: str, detail: str, partition: Partition) -> None:
    """The tokens that share a group with the chosen one, the regions of the partition, and the region they lie in."""
    height, width = scene.map
    partition = partition.on(height, width)
    groups = partition.index(height, width)
    group = groups[(groups == scene.token[0] * width + scene.token[1]).any(1)][0]
    scene.backdrop(axes)
    region = [size * interval for size, interval in zip(partition.group, partition.interval)]
    for line, limit, step, shift in zip((axes.axhline, axes.axvline), scene.map, region, partition.shift):
        for position in range(shift, limit, step):
            line(position, color="white", alpha=0.3, linewidth=0.5)
    corner = [(c - shift) // step * step + shift for c, step, shift in zip(scene.token, region, partition.shift)]
    scene.frame(axes, *corner, *region, edgecolor=GROUP_COLOR, linewidth=1.3)
    scene.tint(axes, scene.places(group), GROUP_COLOR)
    scene.mark(axes)
    caption(axes, title, detail)


def draw_leaves(scene: Scene, axes: Axes, title: str, detail: str, leaves: Tensor) -> None:
    """Every token in the colour of its leaf, ``leaves [H * W]``; leaves that parted late have like colours."""
    colors = LEAVES((leaves / max(leaves.max().item(), 1)).numpy())[:, :3].reshape(*scene.map, 3)
    scene.show(axes, colors.repeat(STRIDE, 0).repeat(STRIDE, 1) * (0.6 + 0.4 * scene.grey))
    scene.mark(axes)
    caption(axes, title, detail)


def draw_leaf(scene: Scene, axes: Axes, title: str, own: Tensor, borrowed: Tensor) -> None:
    """The tokens of one leaf, and those that it borrows of its sibling."""
    scene.backdrop(axes)
    scene.tint(axes, scene.places(own), GROUP_COLOR)
    scene.tint(axes, scene.places(borrowed), BORROWED_COLOR)
    scene.mark(axes)
    caption(axes, title, "")
    note(axes, 0.66, f"{len(own)} tokens", color="#c47f00")
    note(axes, 1, f"and {len(borrowed)} borrowed", color="#0891b2")


def caption(axes: Axes, title: str, detail: str) -> None:
    note(axes, 0, title, ha="left", fontsize=10, fontweight="bold")
    note(axes, 1, detail)


def note(axes: Axes, x: float, text: str, **style) -> None:
    """``text`` above the panel, ending at ``x`` of its width unless ``style`` says otherwise."""
    style = {"ha": "right", "va": "bottom", "fontsize": 8, "color": TEXT_COLOR, **style}
    axes.text(x, 1.027, text, transform=axes.transAxes, **style)


def draw_attention(
    scene: Scene,
    axes: Axes,
    title: str,
    tokens: Tensor,  # [n] raster indices
    weights: Tensor,  # [n]
    size: float,  # of a token as it is drawn, in tokens; 0: neighbours, magnified
) -> None:
    """How much the chosen token attends to each of ``tokens``, drawn as large as its neighbours allow."""
    scene.backdrop(axes)
    shades = plt.get_cmap(HEAT)((weights / weights.max()).numpy())
    places = scene.places(tokens)
    if size:
        for (y, x), shade in zip(places, shades):
            scene.square(axes, y, x, size, facecolor=shade, linewidth=0)
        scene.square(axes, *scene.token, size + 0.6, facecolor="none", edgecolor=TOKEN_COLOR, linewidth=1.6)
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
