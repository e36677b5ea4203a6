"""A photograph through CrossFormer's embedding and three attention layers, and a picture of who attends to whom.

The layers, CrossFormer's short and long distance and BOAT's feature space, run fused and as the plain PyTorch
reference; the difference and both times are printed. The picture shows which tokens share a group with one chosen token
under four partitions and under BOAT's clusters, and where that token attends. The weights are random but seeded;
queries and keys share theirs, so that, even untrained, a token attends to those that look like it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from panels import STRIDE, Scene, draw_attention, draw_group, draw_leaf, draw_leaves, plt
from PIL import Image
from torch import Tensor, nn

from vitkernels import (
    FeatureSpaceAttention,
    LongShortDistanceAttention,
    Partition,
    balanced_clusters,
    feature_space_attention,
    info,
    lsda_attention,
)

GROUP, INTERVAL, SHIFT = 7, 4, 3  # tokens
DIM, HEADS = 96, 3  # CrossFormer-S, stage 1
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


def project(layer: nn.Module, x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, H, W, 3, heads, head_dim]
    return layer.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS))


def attend(layer: nn.Module, x: Tensor, backend: str | None, order: Tensor | None = None) -> Tensor:
    """What ``layer(x)`` computes, with a backend and, if it clusters, an order of one's choice."""
    qkv = project(layer, x)
    if isinstance(layer, FeatureSpaceAttention):
        out = feature_space_attention(qkv.flatten(1, 2), order=order, backend=backend)
        out = out.unflatten(1, x.shape[1:3]) + layer.get_v(qkv[:, :, :, 2])
    else:
        group, interval = layer.partition.group, layer.partition.interval
        out = lsda_attention(qkv, layer.pos, group_size=group, interval=interval, backend=backend)
    return layer.proj(out.flatten(-2))


def attention_of(layer: LongShortDistanceAttention, x: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Raster indices of the tokens in the group of ``token``, and how much it attends to each, mean over heads."""
    partition = layer.partition.on(*x.shape[1:3])
    groups = partition.index(*x.shape[1:3])
    group = groups[(groups == token).any(1)][0]  # [N]
    group = group[group >= 0]
    q, k, _ = project(layer, x)[0].flatten(0, 1)[group].permute(1, 2, 0, 3)  # [heads, N, head_dim]
    y, x = group // x.shape[2], group % x.shape[2]
    query = (group == token).nonzero().item()
    steps = [(c[query] - c) // i + g - 1 for c, i, g in zip((y, x), partition.interval, partition.group)]
    bias = layer.pos(partition.group)[:, steps[0], steps[1]]  # [heads, N]
    logits = (k @ q[:, query, :, None])[..., 0] * q.shape[-1] ** -0.5 + bias
    return group, logits.softmax(-1).mean(0)


def bounds(tokens: int, layer: FeatureSpaceAttention) -> list[int]:
    """Where the leaves of an order begin, and its end."""
    levels = max(tokens // layer.leaf_size, 1).bit_length() - 1
    return [leaf * tokens >> levels for leaf in range((1 << levels) + 1)]


def leaves_of(layer: FeatureSpaceAttention, order: Tensor) -> Tensor:
    """The leaf of every token in raster order, counted along ``order [N]``."""
    edges = torch.tensor(bounds(len(order), layer))
    numbers = torch.repeat_interleave(torch.arange(len(edges) - 1), edges.diff())
    return torch.empty_like(numbers).scatter_(0, order.long(), numbers)


def leaf_of(layer: FeatureSpaceAttention, order: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Raster indices of the tokens in the leaf of ``token``, and of those that it borrows of its sibling."""
    edges = bounds(len(order), layer)
    leaf = bisect_right(edges, (order == token).nonzero().item()) - 1
    first, last = edges[leaf : leaf + 2]
    if len(edges) == 2:
        return order, order[:0]
    return order[first:last], order[first - layer.overlap : first] if leaf % 2 else order[last : last + layer.overlap]


def attention_in(layer: FeatureSpaceAttention, x: Tensor, token: int, keys: Tensor, head: int) -> Tensor:
    """How much ``token`` attends to each of the tokens ``keys``."""
    q, k, _ = project(layer, x)[0].flatten(0, 1)[:, :, head].unbind(1)  # [H * W, head_dim]
    return (k[keys.long()] @ q[token] * q.shape[-1] ** -0.5).softmax(-1)


def milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def tied(layer: nn.Module) -> nn.Module:
    """A layer, its weights random, whose queries are its keys."""
    with torch.no_grad():
        layer.qkv.weight[:DIM] = layer.qkv.weight[DIM : 2 * DIM]
        layer.qkv.bias[:DIM] = layer.qkv.bias[DIM : 2 * DIM]
    return layer.eval()


def compare(name: str, layer: nn.Module, x: Tensor, order: Tensor | None = None) -> Tensor:
    """The fused output; its difference from the reference, and both times, are printed.

    An ``order`` is for both, so that tokens whose places nearly tie do not count; the times include the clustering.
    """
    fused, reference = attend(layer, x, None, order), attend(layer, x, "reference", order)
    times = [milliseconds(partial(attend, layer, x, backend)) for backend in (None, "reference")]
    difference = (fused - reference).abs().max()
    print(f"{name}: fused {times[0]:.2f} ms, reference {times[1]:.2f} ms, largest difference {difference:.1e}")
    return fused


def draw(scene: Scene, near: tuple, far: tuple, alike: tuple, leaves: Tensor, out: Path) -> None:
    """The picture. ``near``, ``far``: tokens and weights of SDA, LDA; ``alike``: own and borrowed tokens, weights."""
    height, width = scene.map
    panel = (WIDTH - 4 * GAP) / 3  # inches, its width
    tall = panel * height / width
    total = 3 * (tall + CAPTION) + GAP
    figure, panels = plt.subplots(3, 3, figsize=(WIDTH, total), facecolor="white")
    figure.subplots_adjust(GAP / WIDTH, GAP / total, 1 - GAP / WIDTH, 1 - CAPTION / total, GAP / panel, CAPTION / tall)
    spread = Partition.grid(GROUP).on(height, width).interval
    draw_group(scene, panels[0, 0], "Window", "Swin, MaxViT, CrossFormer SDA", Partition.window(GROUP))
    draw_group(scene, panels[0, 1], "Shifted window", f"Swin, shift {SHIFT}", Partition.window(GROUP, SHIFT))
    draw_attention(scene, panels[0, 2], "Attention, SDA", *near, 0)
    draw_group(scene, panels[1, 0], "LDA", f"CrossFormer, interval {INTERVAL}", Partition.long(GROUP, INTERVAL))
    draw_group(scene, panels[1, 1], "Grid", f"MaxViT, interval {spread[0]} x {spread[1]}", Partition.grid(GROUP))
    draw_attention(scene, panels[1, 2], "Attention, LDA", *far, 0.72 * INTERVAL)
    own, borrowed, weights = alike
    draw_leaves(scene, panels[2, 0], "Leaves", f"BOAT, {int(leaves.max()) + 1} clusters of one head", leaves)
    draw_leaf(scene, panels[2, 1], "Leaf", own, borrowed)
    draw_attention(scene, panels[2, 2], "Attention, BOAT", torch.cat((own, borrowed)), weights, 1)
    figure.savefig(out, dpi=200)
    plt.close(figure)
    picture = Image.open(out).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=0)
    picture.save(out, optimize=True)  # less than half the bytes, no visible difference


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python examples/photo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="a photograph; scikit-learn's china.jpg if none is given")
    parser.add_argument("--height", type=int, default=224, help="of the resized photograph, in pixels (224)")
    parser.add_argument("--token", type=int, nargs=2, metavar=("Y", "X"), help="the chosen token, of 4 x 4 pixels")
    parser.add_argument("--out", type=Path, default=Path("photo.png"), help="where the picture goes (photo.png)")
    args = parser.parse_args(argv)

    image = load(args.image, args.height)
    height, width = (pixels // STRIDE for pixels in image.shape[:2])
    y, x = args.token or (round(0.44 * height), round(0.405 * width))
    if not (0 <= y < height and 0 <= x < width):
        parser.error(f"--token must lie on the map of {height} x {width} tokens, got {y} {x}")
    scene, token = Scene(image, (y, x)), y * width + x

    torch.manual_seed(0)
    embedding = CrossScaleEmbedding(DIM)
    short, long = (tied(LongShortDistanceAttention(DIM, HEADS, GROUP, interval)) for interval in (1, INTERVAL))
    cluster = tied(FeatureSpaceAttention(DIM, HEADS))
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normed = partial(nn.functional.layer_norm, normalized_shape=(DIM,))
    print(info())
    with torch.no_grad():
        x = embedding(((torch.from_numpy(image) - mean) / spread).permute(2, 0, 1)[None])
        print(f"photograph {image.shape[0]} x {image.shape[1]} pixels, map {height} x {width} tokens, {DIM} channels")
        near = attention_of(short, normed(x), token)
        x = x + compare("SDA", short, normed(x))
        far = attention_of(long, normed(x), token)
        x = x + compare("LDA", long, normed(x))
        order = balanced_clusters(project(cluster, normed(x))[..., 0, :, :].flatten(1, 2))  # [1, heads, H * W]
        own, borrowed = leaf_of(cluster, order[0, 0], token)
        alike = own, borrowed, attention_in(cluster, normed(x), token, torch.cat((own, borrowed)), head=0)
        compare("BOAT", cluster, normed(x), order)
    draw(scene, near, far, alike, leaves_of(cluster, order[0, 0]), args.out)
    print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
