"""MViT's pooling of queries, keys and values and its attention: cases, inputs, and both in PyTorch alone.

A contender has three methods, of which a case times one: ``pool(qkv, pools)`` of a packed projection ``[B, N, 3, heads,
head_dim]`` and three `vitkernels.Pool`, None for tokens that are handed on as they are; ``attend(q, k, v, tables)`` of
``[B, N', heads, head_dim]`` each; and ``both(qkv, pools, tables)``. What is pooled is ``[B, N', heads, head_dim]`` to
the outside; plain PyTorch keeps it heads first, and transposes without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
import workload
from libraries import LIBRARIES, Run
from torch import Tensor
from workload import OURS, Contract

import vitkernels
from vitkernels import Pool

KERNEL = 3  # tokens along every axis
EPS = 1e-6


class Eager:
    """The usual code: select q, k, v, every head's map to channels first and back, all scores, position by position."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device

    def rows(self) -> list[Tensor]:
        """``[queries, keys]``: the table's row for each pair along an axis, counted in every call, as published."""
        return [self._rows(*axis).to(self.device) for axis in zip(self.case.q_thw, self.case.k_thw)]

    @staticmethod
    def _rows(queries: int, keys: int) -> Tensor:
        """Of one axis, whose lengths divide each other."""
        across = torch.arange(queries)[:, None] * max(keys // queries, 1)
        return across + torch.arange(keys - 1, -1, -1) * max(queries // keys, 1)

    def pool(self, qkv: Tensor, pools: Sequence[Pool | None]) -> tuple[Tensor, ...]:
        heads_first = qkv.permute(2, 0, 3, 1, 4)
        parts = (heads_first[0], heads_first[1], heads_first[2])  # each backward fills a tensor of zeros
        return tuple(self._pooled(x, pool).transpose(1, 2) for x, pool in zip(parts, pools))

    def _pooled(self, x: Tensor, pool: Pool | None) -> Tensor:
        """``[B, heads, N, head_dim]``, which is as it was without a pool."""
        if pool is None:
            return x
        cls, x = x[:, :, : self.case.cls], x[:, :, self.case.cls :]
        batch, heads, _, head_dim = x.shape
        x = x.reshape(-1, *self.case.thw, head_dim).movedim(-1, 1).contiguous()  # [B * heads, head_dim, *thw]
        x = self._convolution(x, pool.weight, pool.stride)
        x = x.reshape(batch, heads, head_dim, -1).transpose(2, 3)
        return self._norm(torch.cat((cls, x), 2) if self.case.cls else x, pool)

    def _convolution(self, x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
        convolve = F.conv2d if len(stride) == 2 else F.conv3d
        return convolve(x, weight.to(x.dtype), None, stride, KERNEL // 2, groups=x.shape[1])

    def _norm(self, x: Tensor, pool: Pool) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], pool.norm_weight.to(x.dtype), pool.norm_bias.to(x.dtype), EPS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, N', head_dim]
        out = self._attention(q, k, v, tables)
        out = out + q if self.case.v2 else out
        heads = out.shape[1]
        return out.transpose(1, 2).reshape(out.shape[0], -1, self.case.dim).unflatten(-1, (heads, -1))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if tables:
            along_h, along_w = self._relative(q, tables)
            logits = logits.view(*along_h.shape[:4], *self.case.k_thw) + along_h + along_w
            logits = logits.view(*q.shape[:3], -1)
        return logits.softmax(-1) @ v

    def _relative(self, q: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What height and what width add to the logits ``[B, heads, qh, qw, kh, kw]``."""
        q = q.reshape(*q.shape[:2], *self.case.q_thw, -1)
        height, width = (table.to(q.dtype)[rows] for table, rows in zip(tables, self.rows()))
        along_h = torch.einsum("bnhwc,hkc->bnhwk", q, height)
        along_w = torch.einsum("bnhwc,wkc->bnhwk", q, width)
        return along_h[..., :, None], along_w[..., None, :]

    def both(self, qkv: Tensor, pools: Sequence[Pool | None], tables: Sequence[Tensor]) -> Tensor:
        return self.attend(*self.pool(qkv, pools), tables)


class EagerUnbind(Eager):
    """The same with q, k, v by unbind and convolutions of channels last, which need one copy at most, and rows kept.

    Heads go to the batch in images and to the channels in videos: whichever PyTorch is faster at.
    """

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.kept = super().rows() if case.v2 else []

    def rows(self) -> list[Tensor]:
        return self.kept

    def pool(self, qkv: Tensor, pools: Sequence[Pool | None]) -> tuple[Tensor, ...]:
        return tuple(x if pool is None else self._pooled(x, pool) for x, pool in zip(qkv.unbind(2), pools))

    def _pooled(self, x: Tensor, pool: Pool) -> Tensor:
        """``[B, N, heads, head_dim]``."""
        cls, x = x[:, : self.case.cls], x[:, self.case.cls :]
        batch, _, heads, head_dim = x.shape
        if self.case.v2:
            x = x.transpose(1, 2).reshape(-1, *self.case.thw, head_dim).movedim(-1, 1)
            x = self._convolution(x, pool.weight, pool.stride).movedim(1, -1)
            x = x.reshape(batch, heads, -1, head_dim).transpose(1, 2)
        else:
            x = x.flatten(2).unflatten(1, self.case.thw).movedim(-1, 1)
            weight = pool.weight.repeat(heads, 1, 1, 1, 1)
            x = self._convolution(x, weight, pool.stride).movedim(1, -1)
            x = x.reshape(batch, -1, heads, head_dim)
        return self._norm(torch.cat((cls, x), 1) if self.case.cls else x, pool)


class Library(EagerUnbind):
    """Attention of a library, with relative positions as its bias; pooled as by `EagerUnbind`."""

    def __init__(self, case: Case, device: torch.device, run: Run):
        super().__init__(case, device)
        self.run = run

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Tensor:
        mask = sum(self._relative(q, tables)).reshape(*q.shape[:3], -1) if tables else None
        return self.run(q, k, v, mask)


class Compiled(Eager):
    """torch.compile of `Eager`."""

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        for name in ("pool", "attend", "both"):
            setattr(self, name, workload.compiled(getattr(super(), name)))


BASELINES = {
    "eager": Eager,
    "eager-unbind": EagerUnbind,
    **{name: partial(Library, run=run) for name, run in LIBRARIES.items()},
    "compile": Compiled,
}


class Ours:
    """The public functions as a user of this layer calls them."""

    def __init__(self, case: Case, backend: str):
        self.case, self.options = case, {"has_cls": bool(case.cls), "backend": backend}

    def pool(self, qkv: Tensor, pools: Sequence[Pool | None]) -> tuple[Tensor, ...]:
        return tuple(x for x, _ in vitkernels.pool_qkv(qkv, *pools, thw=self.case.thw, eps=EPS, **self.options))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Tensor:
        maps = {"q_thw": self.case.q_thw, "k_thw": self.case.k_thw}
        residual = "all" if self.case.v2 else "none"
        return vitkernels.pooled_attention(q, k, v, **maps, rel_pos=tables or None, residual=residual, **self.options)

    def both(self, qkv: Tensor, pools: Sequence[Pool | None], tables: Sequence[Tensor]) -> Tensor:
        return self.attend(*self.pool(qkv, pools), tables)


def _heads_first(batch: int, tokens: int, case: Case, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[B, N, heads, head_dim]``, stored heads first, as plain PyTorch would have it: no copy is held against it."""
    return torch.randn(batch, case.heads, tokens, case.head_dim, device=device).to(dtype).transpose(1, 2)


@dataclass
class PoolingAndAttention(workload.Workload):
    """A whole layer between its projections, from random normal qkv; norms and tables that are not fresh ones."""

    baselines: ClassVar = BASELINES
    step: ClassVar[str] = "pooling and attention"

    case: Case
    inputs: dict[str, list[Tensor]]  # what has a gradient, by the name under which the gate compares it
    dout: Tensor | tuple[Tensor, ...]  # [B, Nq, heads, head_dim]

    @classmethod
    def random(cls, case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> PoolingAndAttention:
        torch.manual_seed(0)
        inputs = {name: [x.requires_grad_() for x in xs] for name, xs in cls._inputs(case, batch, device, dtype)}
        return cls(case, inputs, cls._dout(case, batch, device, dtype))

    @staticmethod
    def _inputs(case: Case, batch: int, device: torch.device, dtype: torch.dtype):
        """(name, tensors) of every input."""
        yield from Pooling._inputs(case, batch, device, dtype)
        yield "table", case.random_tables(device)

    @staticmethod
    def _dout(case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(batch, case.queries, case.heads, case.head_dim, device=device).to(dtype)

    def double(self) -> PoolingAndAttention:
        inputs = {k: [x.detach().double().requires_grad_() for x in xs] for k, xs in self.inputs.items()}
        dout = tuple(x.double() for x in self.dout) if isinstance(self.dout, tuple) else self.dout.double()
        return replace(self, inputs=inputs, dout=dout)

    def build(self, name: str) -> Eager | Ours:
        if name.startswith(OURS):
            return Ours(self.case, name.removeprefix(OURS))
        return BASELINES[name](self.case, self.leaves()[0].device)

    def pools(self) -> list[Pool | None]:
        """Of queries, keys and values."""
        norms = self.inputs["norm"]
        pools = [Pool(w, *norm) for w, *norm in zip(self.inputs["convolution"], norms[::2], norms[1::2])]
        pools = [None] * (3 - len(pools)) + pools
        return [pool and pool._replace(stride=s) for pool, s in zip(pools, self.case.strides)]

    def output(self, contender: Eager | Ours) -> Tensor | tuple[Tensor, ...]:
        return contender.both(*self.inputs["qkv"], self.pools(), self.inputs["table"])

    def leaves(self) -> list[Tensor]:
        return [x for tensors in self.inputs.values() for x in tensors]

    def gradients(self, contender: Eager | Ours) -> dict[str, Tensor]:
        """Those of one kind are compared as one vector."""
        found = iter(self.full(contender))
        named = {f"{name} gradient": [next(found).flatten() for _ in xs] for name, xs in self.inputs.items() if xs}
        return {name: torch.cat(gradients) for name, gradients in named.items()}

    def gate(self, gradients: bool) -> Callable[[Eager | Ours], str | None]:
        """Plain PyTorch's convolutions round differently by their layout: beside the reference's error, baselines may
        make eager's, if eager is right in float64.
        """
        contract, eager = Contract(self, gradients), self.build("eager")
        right = contract.judge(self.double().tensors(eager, gradients)) is None
        plain = contract.allowing(self.tensors(eager, gradients)) if right else contract
        return lambda contender: (contract if isinstance(contender, Ours) else plain).objection(contender)


class Attention(PoolingAndAttention):
    """Attention of given queries, keys and values, of the magnitude that a norm leaves."""

    baselines: ClassVar = {name: baseline for name, baseline in BASELINES.items() if name != "eager-unbind"}
    step: ClassVar[str] = "attention of what is pooled"

    @staticmethod
    def _inputs(case: Case, batch: int, device: torch.device, dtype: torch.dtype):
        for name, tokens in (("q", case.queries), ("k", case.keys), ("v", case.keys)):
            yield name, [_heads_first(batch, tokens, case, device, dtype)]
        yield "table", case.random_tables(device)

    def output(self, contender: Eager | Ours) -> Tensor:
        (q,), (k,), (v,), tables = self.inputs.values()
        return contender.attend(q, k, v, tables)


class Pooling(PoolingAndAttention):
    """Queries, keys and values of the packed projection alone."""

    baselines: ClassVar = {name: baseline for name, baseline in BASELINES.items() if name not in LIBRARIES}
    step: ClassVar[str] = "pooling"

    @staticmethod
    def _inputs(case: Case, batch: int, device: torch.device, dtype: torch.dtype):
        head_dim = case.head_dim
        yield "qkv", [torch.randn(batch, case.tokens, 3, case.heads, head_dim, device=device).to(dtype)]
        pools, window = 3 if case.pools_queries else 2, (KERNEL,) * len(case.thw)
        taps = torch.randn(pools, head_dim, 1, *window, device=device) * math.prod(window) ** -0.5
        yield "convolution", list(taps.unbind(0))
        norms = 0.2 * torch.randn(pools, 2, head_dim, device=device) + torch.tensor([[1.0], [0.0]], device=device)
        yield "norm", list(norms.flatten(0, 1).unbind(0))

    @staticmethod
    def _dout(case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        lengths = (case.queries, case.keys, case.keys)
        return tuple(_heads_first(batch, tokens, case, device, dtype) for tokens in lengths)

    def output(self, contender: Eager | Ours) -> tuple[Tensor, ...]:
        return contender.pool(*self.inputs["qkv"], self.pools())

    def tensors(self, contender: Eager | Ours, gradients: bool) -> dict[str, Tensor]:
        outputs = dict(zip(("queries", "keys", "values"), self.forward(contender)))
        return {**outputs, **(self.gradients(contender) if gradients else {})}


@dataclass(frozen=True)
class Case(workload.Layer):
    """A layer of MViT on an image or, with ``frames``, a video.

    Images as in MViTv2: all is pooled, relative positions, the queries on top of the output. Videos as in MViTv1: a
    class token, queries pooled where that has a stride, nothing else.
    """

    kind: type[PoolingAndAttention]
    stride_q: int  # tokens, along height and width
    stride_kv: int  # tokens
    _: KW_ONLY
    frames: int | None = None
    head_dim: int = 96

    @property
    def v2(self) -> bool:
        """Whether there are MViTv2's relative positions and queries on top, else MViTv1's class token."""
        return self.frames is None

    @property
    def thw(self) -> tuple[int, ...]:
        """The map."""
        return (self.height, self.width) if self.v2 else (self.frames, self.height, self.width)

    def _pooled(self, stride: int) -> tuple[int, ...]:
        return (*self.thw[:-2], -(-self.height // stride), -(-self.width // stride))

    @property
    def q_thw(self) -> tuple[int, ...]:
        return self._pooled(self.stride_q)

    @property
    def k_thw(self) -> tuple[int, ...]:
        return self._pooled(self.stride_kv)

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """Of queries, keys and values, along every axis."""
        time = (1,) * (len(self.thw) - 2)
        return [(*time, s, s) for s in (self.stride_q, self.stride_kv, self.stride_kv)]

    @property
    def cls(self) -> int:
        """Class tokens."""
        return int(not self.v2)

    @property
    def pools_queries(self) -> bool:
        return self.v2 or self.stride_q > 1

    @property
    def tokens(self) -> int:
        return math.prod(self.thw) + self.cls

    @property
    def queries(self) -> int:
        return math.prod(self.q_thw) + self.cls

    @property
    def keys(self) -> int:
        return math.prod(self.k_thw) + self.cls

    @property
    def table_lengths(self) -> list[int]:
        """Rows of the tables of height and width."""
        return [2 * max(axis) - 1 for axis in zip(self.q_thw, self.k_thw)] if self.v2 else []

    def random_tables(self, device: torch.device) -> list[Tensor]:
        """Of height and width, so large that they count in the logits."""
        return [0.1 * torch.randn(length, self.head_dim, device=device) for length in self.table_lengths]

    def describe(self) -> str:
        words = [f"map {'x'.join(map(str, self.thw))}{' and a class token' if self.cls else ''}"]
        words += [f"{self.heads} heads x {self.head_dim}", f"{self.queries} queries x {self.keys} keys"]
        words += ["relative positions"] if self.v2 and self.kind is not Pooling else []
        return ", ".join([*words, self.kind.step])
