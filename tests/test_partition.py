"""Partition: the map against its formula, its constructors, its refusals."""

import itertools
import random

import pytest
import torch

from vitkernels import Partition


def formula(partition: Partition, height: int, width: int) -> list[list[int]]:
    """Raster indices of every group, token by token, from y = ((r*G + g)*I + a + shift) mod H."""
    (gh, gw), (ih, iw), (sh, sw) = partition.group, partition.interval, partition.shift
    rh, rw = -(-height // (gh * ih)), -(-width // (gw * iw))
    groups = []
    for ry, rx, ay, ax in itertools.product(range(rh), range(rw), range(ih), range(iw)):
        group = []
        for gy, gx in itertools.product(range(gh), range(gw)):
            y, x = (ry * gh + gy) * ih + ay, (rx * gw + gx) * iw + ax
            group.append((y + sh) % height * width + (x + sw) % width if y < height and x < width else -1)
        groups.append(group)
    return groups


def random_partitions(count: int) -> list:
    draw, cases = random.Random(0), []
    for _ in range(count):
        group = draw.randint(1, 6), draw.randint(1, 6)
        interval = draw.randint(1, 4), draw.randint(1, 4)
        if draw.random() < 0.3:
            regions = draw.randint(1, 3), draw.randint(1, 3)
            height, width = (g * i * r for g, i, r in zip(group, interval, regions))
            shift = tuple(draw.randint(0, g * i - 1) for g, i in zip(group, interval))
        else:
            height, width, shift = draw.randint(1, 30), draw.randint(1, 30), (0, 0)
        cases.append((Partition(group, interval, shift), height, width))
    return cases


@pytest.mark.parametrize("partition, height, width", random_partitions(60))
def test_index_follows_the_formula(partition, height, width):
    index = partition.on(height, width).index(height, width)
    assert index.tolist() == formula(partition, height, width)


@pytest.mark.parametrize("partition, height, width", random_partitions(30))
def test_every_token_is_in_one_group(partition, height, width):
    index = partition.on(height, width).index(height, width)
    assert index[index >= 0].sort().values.tolist() == list(range(height * width))


@pytest.mark.parametrize("partition, height, width", random_partitions(30))
def test_merge_inverts_split(partition, height, width):
    x = torch.randn(2, height, width, 3)
    partition = partition.on(height, width)
    assert torch.equal(partition.merge(partition.split(x), height, width), x)


def test_constructors():
    assert Partition.window(7, 3) == Partition((7, 7), (1, 1), (3, 3))
    assert Partition.grid((7, 5)).on(28, 21) == Partition((7, 5), (4, 5))
    assert Partition.grid(7).on(30, 20) == Partition(7, (5, 3)), "a grid on a map that does not divide"
    assert Partition.long(7, 8) == Partition(7, 8)
    assert Partition.interval_only(4).on(12, 20) == Partition((3, 5), 4)
    assert Partition.interval_only((4, 8)).on(13, 20) == Partition((4, 3), (4, 8))
    assert Partition.stripes(7).on(14, 28) == Partition((7, 28))
    assert Partition.stripes(7, vertical=True).on(14, 28) == Partition((14, 7))


def test_the_three_long_distance_variants_agree_where_the_map_is_group_times_interval():
    maps = [p.on(28, 28).index(28, 28) for p in (Partition.grid(7), Partition.long(7, 4), Partition.interval_only(4))]
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[1], maps[2])


def test_wrapped_marks_what_the_shift_carried_over_a_border():
    partition = Partition.window(4, (1, 2)).on(8, 8)
    index, wrapped = partition.index(8, 8), partition.wrapped(8, 8)
    assert torch.equal(wrapped[..., 0], index // 8 < 1) and torch.equal(wrapped[..., 1], index % 8 < 2)


def test_partitions_are_values():
    assert len({Partition(7), Partition((7, 7)), Partition.window(7)}) == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0,), ValueError, "group must be at least 1 on both axes, got 0"),
        ((7, 0), ValueError, "interval must be at least 1"),
        ((7, 1, -1), ValueError, "shift must be at least 0"),
        ((7, 1, None), TypeError, "shift must be an int or a pair of ints, got None"),
        ((7.0,), TypeError, "group must be an int or a pair of ints, got 7.0"),
        ((True,), TypeError, "group must be an int"),
        (((7, 7, 7),), ValueError, r"group must be one int or \(height, width\)"),
        ((None, None), ValueError, "cannot both be derived"),
        ((7, 1, 9), ValueError, r"smaller than group \* interval .* \(9, 9\), .* a shift of 2 instead of 9 makes"),
        (((7, 5), (1, 2), (6, 10)), ValueError, "a shift of 0 instead of 10 makes the same groups"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        Partition(*arguments)


def test_a_shift_needs_a_map_that_divides():
    with pytest.raises(ValueError, match=r"multiple of group \* interval: got a 15 x 14 map.*pad the map first"):
        Partition.window(7, 3).on(15, 14)
    assert Partition.window(7, 3).on(14, 14).shift == (3, 3)
    assert Partition.window(7, (0, 6)).on(15, 14).shift == (0, 6)
    with pytest.raises(ValueError, match=r"shift must be smaller than group \* interval"):
        Partition(7, None, 7).on(7, 7)  # an interval of 1


@pytest.mark.parametrize("partition", [Partition.grid(3), Partition.interval_only((2, 3)), Partition.stripes(2)])
def test_sizes_that_the_map_decides(partition):
    """Methods take the map's sizes from their arguments; what has no map says so."""
    x, concrete = torch.randn(2, 7, 10, 4), partition.on(7, 10)
    assert torch.equal(partition.split(x), concrete.split(x))
    assert torch.equal(partition.merge(partition.split(x), 7, 10), x)
    assert torch.equal(partition.index(7, 10), concrete.index(7, 10))
    assert partition.regions(7, 10) == concrete.regions(7, 10)


def test_tokens_of_a_group_that_the_map_decides():
    assert Partition.grid(3).tokens == 9
    with pytest.raises(ValueError, match=r"the map decides .* \.on\(height, width\)\.tokens"):
        Partition.interval_only(2).tokens  # noqa: B018
