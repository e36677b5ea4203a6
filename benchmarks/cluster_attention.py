"""Clustering by features and attention inside the clusters: cases, inputs, and BOAT's attention in PyTorch alone.

A contender has three methods, of which a case times one: ``clusters(q)``, the order ``[B, heads, N]`` of the queries
``[B, N, heads, head_dim]``; ``attend(qkv, order)`` with qkv ``[B, N, 3, heads, head_dim]``, which gives ``[B, N, heads,
head_dim]``; and ``both(qkv)``. The baselines take one level of the tree after the other, all its nodes in one batch.

When is a contender right? Attention under a given order is held to the numerical contract. An order cannot be: where
two ratios nearly tie, rounding decides which token comes first, and the levels below magnify that. So an order must be
a permutation that leaves 99.5 % of the tokens in the leaf where eager in float64 has them; and attention after
clustering must have such an order, and meet the contract under it. In 16-bit arithmetic far fewer tokens agree, so that
the baselines cluster in float32, whatever the dtype, as vitkernels does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
import workload
from libraries import LIBRARIES, Run
from torch import Tensor
from workload import OURS, Contract

import vitkernels

AGREEMENT = 0.995  # of the tokens in the leaf where float64 has them
ITERATIONS, TEMPERATURE = 2, 0.01


class Eager:
    """The usual code."""

    def __init__(self, case: Case, batch: int, device: torch.device):
        self.case = case

    @torch.no_grad()
    def clusters(self, q: Tensor) -> Tensor:
        """Features and their order, sorted again at every level."""
        batch, tokens, heads, head_dim = q.shape
        x = q.permute(0, 2, 1, 3).to(torch.promote_types(q.dtype, torch.float32))
        order = torch.arange(tokens, device=q.device).expand(batch, heads, tokens)
        for level in range(self.case.levels):
            nodes = x.reshape(-1, tokens >> level, head_dim)  # [B * heads * nodes, n, D]
            units = F.normalize(nodes, dim=-1)
            centroids = F.normalize(nodes.unflatten(1, (2, -1)).mean(2), dim=-1)  # [B * heads * nodes, 2, D]
            for _ in range(ITERATIONS):
                weights = (units @ centroids.mT / TEMPERATURE).softmax(-1)
                centroids = F.normalize(weights.mT @ nodes, dim=-1)
            near = units @ centroids.mT + 1
            places = (near[..., 0] / near[..., 1]).sort(-1).indices
            x = nodes.gather(1, places[..., None].expand_as(nodes))
            order = order.reshape(places.shape).gather(1, places)
        return order.reshape(batch, heads, tokens)

    def attend(self, qkv: Tensor, order: Tensor) -> Tensor:
        """Sort q, k and v, borrow keys, logits, softmax, values, sort back."""
        heads, head_dim = qkv.shape[-2:]
        qkv = qkv.permute(2, 0, 3, 1, 4)
        order = order.long()
        # [B, heads, pairs, 2, n, head_dim] each
        q, k, v = (self._sorted(qkv[part], order).unflatten(2, (-1, 2, self.case.leaf)) for part in range(3))
        logits = (q @ self._with_borrowed(k).mT) * head_dim**-0.5
        out = (logits.softmax(-1) @ self._with_borrowed(v)).flatten(2, 4)
        return self._sorted(out, order.argsort(-1)).transpose(1, 2).flatten(2).unflatten(-1, (heads, head_dim))

    def both(self, qkv: Tensor) -> Tensor:
        return self.attend(qkv, self.clusters(qkv[:, :, 0].detach()))

    def _sorted(self, x: Tensor, order: Tensor) -> Tensor:
        """``[B, heads, N, head_dim]`` in the order ``[B, heads, N]``."""
        return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))

    def _with_borrowed(self, x: Tensor) -> Tensor:
        """``[..., 2, n, head_dim]``, each with the sibling's nearest: ``[..., 2, n + overlap, head_dim]``."""
        first, second = x.unbind(-3)
        leaf, overlap = self.case.leaf, self.case.overlap
        keys_of_first = torch.cat((first, second[..., :overlap, :]), -2)
        keys_of_second = torch.cat((second, first[..., leaf - overlap :, :]), -2)
        return torch.stack((keys_of_first, keys_of_second), -3)


class EagerUnbind(Eager):
    """The same without its detours: rows copied whole, q, k and v by one copy in, one copy out, no second sort."""

    def __init__(self, case: Case, batch: int, device: torch.device):
        super().__init__(case, batch, device)
        tokens = case.height * case.width
        self.first_tokens = torch.arange(batch, device=device)[:, None, None] * tokens  # [B, 1, 1]
        self.first_rows = torch.arange(batch * case.heads, device=device)[:, None] * tokens  # [B * heads, 1]
        self.parts = torch.arange(3, device=device)[:, None, None, None]  # [3, 1, 1, 1]
        self.heads = torch.arange(case.heads, device=device)[:, None]  # [heads, 1]

    @torch.no_grad()
    def clusters(self, q: Tensor) -> Tensor:
        """Only the order is sorted; similarities of unit length by a division of the products."""
        batch, tokens, heads, head_dim = q.shape
        x = q.permute(0, 2, 1, 3).to(torch.promote_types(q.dtype, torch.float32)).reshape(-1, head_dim)
        scales = x.norm(dim=-1).clamp_min(1e-12).reciprocal()  # [B * heads * N]
        rows = torch.arange(len(x), device=q.device)
        for level in range(self.case.levels):
            rows = rows.view(-1, tokens >> level)  # [B * heads * nodes, n]
            nodes = x.index_select(0, rows.flatten()).view(*rows.shape, head_dim)
            scale = scales[rows][..., None]
            centroids = F.normalize(nodes.unflatten(1, (2, -1)).mean(2), dim=-1)
            for _ in range(ITERATIONS):
                weights = (nodes @ centroids.mT * scale / TEMPERATURE).softmax(-1)
                centroids = F.normalize(weights.mT @ nodes, dim=-1)
            near = nodes @ centroids.mT * scale + 1
            rows = rows.gather(1, (near[..., 0] / near[..., 1]).argsort(-1))
        return (rows.view(-1, tokens) - self.first_rows).view(batch, heads, tokens)

    def attend(self, qkv: Tensor, order: Tensor) -> Tensor:
        """`Eager.attend` between the copies."""
        tokens = self.first_tokens + order  # [B, heads, N]
        rows = (tokens * 3 + self.parts) * self.case.heads + self.heads  # [3, B, heads, N]
        picked = qkv.flatten(0, 3).index_select(0, rows.flatten()).view(*rows.shape, qkv.shape[-1])
        q, kv = picked.split((1, 2))
        out = self._attention(q[0].unflatten(2, (-1, self.case.leaf)), *self._keys(kv))
        to = (tokens * self.case.heads + self.heads).flatten()
        out = out.new_empty(len(to), qkv.shape[-1]).index_copy_(0, to, out.reshape(len(to), -1))
        return out.view(*qkv.shape[:2], *qkv.shape[3:])

    def _keys(self, kv: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of every leaf: two overlapping runs of each pair ``[2, B, heads, pairs, 2n, head_dim]``."""
        leaf, overlap = self.case.leaf, self.case.overlap
        pairs = kv.unflatten(3, (-1, 2 * leaf))
        runs = torch.stack((pairs[..., : leaf + overlap, :], pairs[..., leaf - overlap :, :]), -3)
        return runs.flatten(3, 4).unbind(0)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, heads, leaves, n, head_dim]``, ``[B, heads, leaves, n + overlap, head_dim]``."""
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


class Library(EagerUnbind):
    """Attention of a library on the leaves, in clusters and between copies as of `EagerUnbind`."""

    def __init__(self, case: Case, batch: int, device: torch.device, run: Run):
        super().__init__(case, batch, device)
        self.run = run

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.run(*(x.flatten(1, 2) for x in (q, k, v)), None)


class Compiled(Eager):
    """torch.compile of `Eager`: a graph that clusters and one that attends, so that the order can be had."""

    def __init__(self, case: Case, batch: int, device: torch.device):
        super().__init__(case, batch, device)
        self.clusters = workload.compiled(super().clusters)
        self.attend = workload.compiled(super().attend)


BASELINES = {
    "eager": Eager,
    "eager-unbind": EagerUnbind,
    **{name: partial(Library, run=run) for name, run in LIBRARIES.items()},
    "compile": Compiled,
}


class Ours:
    """The public functions as a user of this layer calls them."""

    def __init__(self, case: Case, backend: str, clustering: str | None):
        self.case, self.clustering = case, clustering
        self.options = {"leaf_size": case.leaf_size, "overlap": case.overlap, "backend": backend}

    def clusters(self, q: Tensor) -> Tensor:
        return vitkernels.balanced_clusters(q, leaf_size=self.case.leaf_size, backend=self.clustering)

    def attend(self, qkv: Tensor, order: Tensor) -> Tensor:
        return vitkernels.feature_space_attention(qkv, order=order, **self.options)

    def both(self, qkv: Tensor) -> Tensor:
        return vitkernels.feature_space_attention(qkv, **self.options)


def objection_to_order(order: Tensor, expected: Tensor, levels: int) -> str | None:
    """Why ``order`` is not a right one, or None; both ``[B, heads, N]``."""
    tokens = torch.arange(order.shape[-1], device=order.device)
    if order.shape != expected.shape or not torch.equal(order.sort(-1).values.long(), tokens.expand_as(order)):
        return "the order is not a permutation of the tokens"
    leaves = [_leaf_of_tokens(x, levels) for x in (order, expected)]
    agreement = (leaves[0] == leaves[1]).double().mean().item()
    if agreement < AGREEMENT:
        return f"{agreement:.2%} of the tokens are in the leaf where float64 has them, asked are {AGREEMENT:.1%}"
    return None


def _leaf_of_tokens(order: Tensor, levels: int) -> Tensor:
    """``[B, heads, N]``: the leaf that holds each token."""
    places = torch.arange(order.shape[-1], device=order.device)
    leaves = places // (order.shape[-1] >> levels)
    return torch.empty_like(order, dtype=torch.int64).scatter_(-1, order.long(), leaves.expand_as(order))


@dataclass
class Attention(workload.Workload):
    """Attention under a given order; inputs that look like a network's, and their order by eager in float64.

    Features are smooth over the map with detail of their own at every token: random normal numbers on a grid of 4 x 4,
    bicubic in between, plus half as much random normal noise; so that clusters are there, and follow the image.
    """

    baselines: ClassVar = BASELINES
    step: ClassVar[str] = "attention in a given order"

    case: Case
    qkv: Tensor  # [B, N, 3, heads, head_dim]
    order: Tensor  # [B, heads, N] int32
    dout: Tensor  # [B, N, heads, head_dim]

    @classmethod
    def random(cls, case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> Attention:
        torch.manual_seed(0)
        size = (case.height, case.width)
        smooth = F.interpolate(torch.randn(batch, 3 * case.dim, 4, 4, device=device), size, mode="bicubic")
        features = smooth + 0.5 * torch.randn(batch, 3 * case.dim, *size, device=device)
        qkv = features.flatten(2).mT.unflatten(-1, (3, case.heads, case.head_dim)).to(dtype).contiguous()
        order = Eager(case, batch, device).clusters(qkv[:, :, 0].double()).int()
        return cls(case, qkv.requires_grad_(), order, torch.randn_like(qkv[:, :, 0]))

    def double(self) -> Attention:
        return replace(self, qkv=self.qkv.detach().double().requires_grad_(), dout=self.dout.double())

    def build(self, name: str) -> Eager | Ours:
        if name.startswith(OURS):
            return self.ours(name.removeprefix(OURS))
        return BASELINES[name](self.case, len(self.qkv), self.qkv.device)

    def ours(self, backend: str) -> Ours:
        return Ours(self.case, backend, backend)

    def output(self, contender: Eager | Ours) -> Tensor:
        return contender.attend(self.qkv, self.order)

    def leaves(self) -> list[Tensor]:
        return [self.qkv]


class Clustering(Attention):
    """The order of the same features. It has no gradient."""

    modes: ClassVar = ("fwd",)
    gpu: ClassVar[str] = "cuda"
    baselines: ClassVar = {name: baseline for name, baseline in BASELINES.items() if name not in LIBRARIES}
    step: ClassVar[str] = "clustering"

    def output(self, contender: Eager | Ours) -> Tensor:
        return contender.clusters(self.qkv[:, :, 0])

    def gate(self, gradients: bool) -> Callable[[Eager | Ours], str | None]:
        return lambda contender: objection_to_order(self.forward(contender), self.order, self.case.levels)


class ClusteringAndAttention(Attention):
    """Attention of the same features in the contender's own clusters."""

    step: ClassVar[str] = "clustering and attention"

    def ours(self, backend: str) -> Ours:
        # as feature_space_attention chooses: Triton has no clustering
        return Ours(self.case, backend, None if backend == "triton" else backend)

    def output(self, contender: Eager | Ours) -> Tensor:
        return contender.both(self.qkv)

    def gate(self, gradients: bool) -> Callable[[Eager | Ours], str | None]:
        def objection(contender: Eager | Ours) -> str | None:
            order = contender.clusters(self.qkv[:, :, 0].detach())
            if why := objection_to_order(order, self.order, self.case.levels):
                return why
            attention = Attention(self.case, self.qkv, order, self.dout)
            return Contract(attention, gradients).judge(self.tensors(contender, gradients))

        return objection


@dataclass(frozen=True)
class Case(workload.Layer):
    """BOAT's feature-space attention, or one of its two steps, on a map whose leaves are all of one size."""

    kind: type[Attention]
    leaf_size: int = 49
    overlap: int = 20

    def __post_init__(self):
        if not self.levels or self.height * self.width % (1 << self.levels):
            raise ValueError(f"{self.name}: its {self.height * self.width} tokens are not several leaves of one size")

    @property
    def levels(self) -> int:
        """Doublings from the map to its leaves of ``leaf_size`` tokens or more."""
        return (self.height * self.width // self.leaf_size).bit_length() - 1

    @property
    def leaf(self) -> int:
        """Tokens of a leaf."""
        return self.height * self.width >> self.levels

    def describe(self) -> str:
        words = [f"map {self.height}x{self.width}", f"{self.heads} heads x {self.head_dim}", f"leaves of {self.leaf}"]
        words += [] if self.kind is Clustering else [f"overlap {self.overlap}"]
        return ", ".join([*words, self.kind.step])
