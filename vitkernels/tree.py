"""The tree map: how an order of tokens is cut into a balanced binary tree.

Node j of level l covers places ``[j * N // 2**l, (j + 1) * N // 2**l)`` of the order of N tokens: nodes are nested, and
those of one level differ by at most one token. The leaves are the last level whose nodes all have ``leaf_size`` tokens
or more; the order itself (which token stands at which place) is data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """A balanced binary tree over N tokens.

    Args:
        tokens: N, at least 1.
        levels: doublings between the root and the leaves.
    """

    tokens: int
    levels: int

    @classmethod
    def of(cls, tokens: int, leaf_size: int) -> Tree:
        """The deepest tree whose leaves have at least ``leaf_size`` tokens; one leaf where N is below twice that."""
        levels = 0
        while tokens >> (levels + 1) >= leaf_size:
            levels += 1
        return cls(tokens, levels)

    @property
    def smallest(self) -> int:
        """Tokens of the smallest leaf."""
        return self.tokens >> self.levels

    @property
    def largest(self) -> int:
        """Tokens of the largest leaf."""
        return -(-self.tokens >> self.levels)

    def bounds(self, level: int, device=None) -> Tensor:
        """First places of the nodes of a level, and N: ``[2**level + 1]`` int64."""
        return torch.arange((1 << level) + 1, device=device) * self.tokens >> level

    def nodes(self, level: int, device=None) -> Tensor:
        """Places of every node of a level, ``[nodes, largest node]`` int64; -1 beyond a node."""
        bounds = self.bounds(level, device)
        return _runs(bounds[:-1], bounds[1:], -(-self.tokens >> level))

    def slots(self, level: int, device=None) -> Tensor:
        """Where every place stands in ``nodes(level)``, flattened: ``[N]`` int64."""
        bounds, places = self.bounds(level, device), torch.arange(self.tokens, device=device)
        node = torch.bucketize(places, bounds[1:], right=True)
        return node * -(-self.tokens >> level) + places - bounds[node]

    def keys(self, overlap: int, device=None) -> Tensor:
        """Places that each leaf attends to, ``[leaves, places]`` int64; -1 beyond.

        Its own, and the ``overlap`` of its sibling that are nearest to the split; without a sibling its own.
        """
        bounds, overlap = self.bounds(self.levels, device), overlap if self.levels else 0
        second = torch.arange(len(bounds) - 1, device=device) % 2
        return _runs(bounds[:-1] - overlap * second, bounds[1:] + overlap * (1 - second), self.largest + overlap)


def _runs(first: Tensor, last: Tensor, width: int) -> Tensor:
    """``[first, last)`` of each, -1 beyond: ``[runs, width]``."""
    places = first[:, None] + torch.arange(width, device=first.device)
    return places.where(places < last[:, None], -1)
