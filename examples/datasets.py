"""What train.py learns from: scikit-learn's handwritten digits, or a folder of images by class.

A dataset is indexed by a batch: the numbers of its images and, in training, a row of random numbers for each of them,
which alone decide about its augmentation. So an image looks the same whatever process loads it, beside whatever others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor | None]  # numbers of images [B], random numbers in 0..1 [B, DRAWS]

DRAWS = 5  # random numbers of an image in an epoch
HELD_OUT = 0.2  # for the test, of images that come in one piece
MEAN, SPREAD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of photographs, by channel


class Unreadable(Exception):
    """An image file that cannot be decoded."""


@dataclass
class Data:
    classes: list[str]
    channels: int
    train: Dataset
    test: Dataset


def load(folder: Path | None, size: int, limit: int | None) -> Data:
    """The digits, or the images of a folder, as squares of ``size`` pixels; ``limit`` images at most of each split.

    Raises:
        ValueError: the folder is not one of images by class.
    """
    return load_digits(size, limit) if folder is None else load_folder(folder, size, limit)


def split(images: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images for training and for the test, the same in every run."""
    order, held_out = shuffled(images), max(round(HELD_OUT * images), 1)
    return order[held_out:], order[:held_out]


def shuffled(images: int) -> Tensor:
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))


def training_batches(images: int, size: int, seed: int, epoch: int, rank: int, world: int) -> list[Batch]:
    """This process's share of every batch of an epoch; images that fill no whole batch wait for another epoch."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order, draws = torch.randperm(images, generator=generator), torch.rand(images, DRAWS, generator=generator)
    shares = [whole[rank::world] for whole in order[: images // size * size].split(size)]
    return [(share, draws[share]) for share in shares]


def test_batches(images: int, size: int, rank: int, world: int) -> list[Batch]:
    """This process's share of the test. All have as many images: the last one of some is a repetition."""
    order = torch.arange(-(-images // world) * world) % images
    return [(share, None) for share in order[rank::world].split(-(-size // world))]


class Digits(Dataset):
    def __init__(self, images: Tensor, labels: Tensor):  # [N, 1, H, W] in 0..1, [N]
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows, draws = batch
        images = self.images[rows]
        return 2 * (images if draws is None else jitter(images, draws)) - 1, self.labels[rows]


def load_digits(size: int, limit: int | None) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16  # [1797, 1, 8, 8]
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.from_numpy(digits.target).long()
    train, test = (Digits(images[rows[:limit]], labels[rows[:limit]]) for rows in split(len(labels)))
    return Data([str(name) for name in digits.target_names], 1, train, test)


def jitter(images: Tensor, draws: Tensor) -> Tensor:  # [B, C, H, W], [B, DRAWS]
    """Every image turned, scaled and shifted a little: by up to 12 degrees, 12 %, and 1/10 of its side."""
    turn, scale, down, right = (2 * draws[:, :4] - 1).unbind(1)
    angle, scale = turn * math.radians(12), 1 + 0.12 * scale
    across, along = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack((across, -along, 0.2 * right, along, across, 0.2 * down), 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Photographs(Dataset):
    def __init__(self, paths: list[Path], labels: list[int], size: int):
        self.paths, self.labels, self.size = paths, torch.tensor(labels), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows, draws = batch
        draws = [None] * len(rows) if draws is None else draws.tolist()
        images = [photograph(self.paths[row], self.size, draw) for row, draw in zip(rows, draws)]
        return torch.stack(images), self.labels[rows]


def photograph(path: Path, size: int, draws: list[float] | None) -> Tensor:  # [3, H, W]
    """The largest square in the middle of an image; in training, a random part of it, mirrored every other time."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # Pillow's decoders have many
        raise Unreadable(f"{path} cannot be read as an image ({error}): remove or replace it") from None
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=part(*image.size, draws))
    if draws is not None and draws[4] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy((np.asarray(image, dtype=np.float32) / 255 - MEAN) / SPREAD).permute(2, 0, 1)


def part(width: int, height: int, draws: list[float] | None) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what training sees: a quarter to all of the area, 3:4 to 4:3 in shape."""
    if draws is None:
        wide = tall = min(width, height)
        left, top = (width - wide) / 2, (height - tall) / 2
    else:
        area, shape = (0.25 + 0.75 * draws[0]) * width * height, (4 / 3) ** (2 * draws[1] - 1)
        wide, tall = min(math.sqrt(area * shape), width), min(math.sqrt(area / shape), height)
        left, top = draws[2] * (width - wide), draws[3] * (height - tall)
    return left, top, left + wide, top + tall


def load_folder(folder: Path, size: int, limit: int | None) -> Data:
    """Of a folder with a folder of images for each class, or of one with two such folders, train and val."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; it must be one that holds a folder of images for each class")
    parts = [folder / "train", folder / "val"]
    if not all(path.is_dir() for path in parts):
        parts = [folder]
    classes = subfolders(parts[0])
    if len(classes) < 2:
        raise ValueError(
            f"{parts[0]} must hold folders of images for at least 2 classes, it holds {len(classes)}: "
            f"images of cats go to {parts[0] / 'cat'}"
        )
    found = [pictures(path, classes) for path in parts]
    if len(found) == 1:
        found, orders = 2 * found, split(len(found[0]))
    else:  # in a random order too, so that a limit leaves images of every class
        orders = [shuffled(len(images)) for images in found]
    train, test = ([images[i] for i in order[:limit]] for images, order in zip(found, orders))
    if not train or not test:
        raise ValueError(
            f"{folder} must hold images for training and for the test, "
            f"found {len(train)} and {len(test)} files with a suffix that Pillow knows"
        )
    return Data(classes, 3, *(Photographs(*zip(*images), size) for images in (train, test)))


def subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def pictures(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The image files in the folders of the classes, and their labels."""
    from PIL import Image

    if strange := sorted(set(subfolders(folder)) - set(classes)):
        raise ValueError(f"{folder} has classes without images for training: {', '.join(strange)}")
    suffixes = Image.registered_extensions()
    files = ((path, label) for label, name in enumerate(classes) for path in sorted((folder / name).rglob("*")))
    return [(path, label) for path, label in files if path.suffix.lower() in suffixes]
