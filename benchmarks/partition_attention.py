"""Partition attention: its cases and inputs, and the operator as one writes it with PyTorch alone.

A contender is called as ``attend(qkv, position_bias)`` with qkv ``[B, H, W, 3, heads, head_dim]`` and a table
``[heads, 2Gh-1, 2Gw-1]``, a DynamicPositionBias or None; the result is ``[B, H, W, heads, head_dim]``. A baseline is
built for one partition of one map: what a module would keep in buffers (relative index, masks, offsets) is made then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
import workload
from libraries import LIBRARIES, Run, neighborhood
from torch import Tensor, nn
from workload import OURS

import vitkernels
from vitkernels import Partition

Attend = Callable[[Tensor, "Tensor | nn.Module | None"], Tensor]


class Grouping:
    """Constants of a partition on a map, and the copies into groups and back."""

    def __init__(self, partition: Partition, height: int, width: int, device: torch.device, dtype: torch.dtype):
        self.partition = partition = partition.on(height, width)
        self.height, self.width, self.dtype = height, width, dtype
        self.regions = partition.regions(height, width)
        gh, gw = partition.group
        token = torch.arange(gh * gw, device=device)
        y, x = token // gw, token % gw
        self.index = (y[:, None] - y + gh - 1) * (2 * gw - 1) + x[:, None] - x + gw - 1  # [N, N]
        axes = [torch.arange(1 - n, n, device=device, dtype=torch.float32) for n in (gh, gw)]
        self.offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # [2Gh-1, 2Gw-1, 2]
        self.mask = self._mask(device)

    def _mask(self, device: torch.device) -> Tensor | None:
        """``[groups, 1, N, N]``, added to the logits: padded keys, and pairs that only the shift brought together."""
        mask = torch.zeros((), dtype=self.dtype, device=device)
        outside = self.partition.index(self.height, self.width, device) < 0
        if outside.any():
            low = max(-1e6, torch.finfo(self.dtype).min / 2)  # finite: a group may lie outside the map as a whole
            mask = mask + low * outside[:, None, None, :]
        if any(self.partition.shift):
            over = self.partition.wrapped(self.height, self.width, device)
            mask = mask - 100.0 * (over[:, :, None] != over[:, None, :]).any(-1)[:, None]
        if not mask.dim():
            return None
        tokens = self.partition.tokens
        return mask.to(self.dtype).expand(-1, 1, tokens, tokens).contiguous()

    def table(self, position_bias: Tensor | nn.Module) -> Tensor:
        """``[heads, 2Gh-1, 2Gw-1]``; CrossFormer's MLP is run layer by layer, as its code does in every forward."""
        if isinstance(position_bias, nn.Module):
            mlp = position_bias
            offsets = self.offsets.to(mlp.pos_proj.weight.dtype)
            position_bias = mlp.pos3(mlp.pos2(mlp.pos1(mlp.pos_proj(offsets)))).movedim(-1, 0)
        return position_bias.to(self.dtype)

    def dense_bias(self, position_bias: Tensor | nn.Module | None) -> Tensor | None:
        """``[heads, N, N]``."""
        return None if position_bias is None else self.table(position_bias).flatten(1)[:, self.index]

    def _to_blocks(self, x: Tensor) -> Tensor:
        """``[B, H, W, ...]`` rolled, padded and viewed as ``[B, ry, gy, ay, rx, gx, ax, ...]``."""
        (gy, gx), (ay, ax), (sy, sx), (ry, rx) = (*self._geometry(), self.regions)
        if sy or sx:
            x = x.roll((-sy, -sx), (1, 2))
        below, right = ry * gy * ay - self.height, rx * gx * ax - self.width
        if below or right:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, right, 0, below))
        return x.view(x.shape[0], ry, gy, ay, rx, gx, ax, *x.shape[3:])

    def _from_blocks(self, x: Tensor) -> Tensor:
        """``[B, ry, gy, ay, rx, gx, ax, ...]`` to ``[B, H, W, ...]``."""
        x = x.flatten(1, 3).flatten(2, 4)[:, : self.height, : self.width]
        return x.roll(self.partition.shift, (1, 2)) if any(self.partition.shift) else x

    def _geometry(self) -> tuple:
        return self.partition.group, self.partition.interval, self.partition.shift

    def split(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B * groups, N, C]``: the usual window partition."""
        return self._to_blocks(x).permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, self.partition.tokens, x.shape[-1])

    def merge(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of `split`."""
        (gy, gx), (ay, ax), (ry, rx) = self.partition.group, self.partition.interval, self.regions
        return self._from_blocks(x.view(batch, ry, rx, ay, ax, gy, gx, -1).permute(0, 1, 5, 3, 2, 6, 4, 7))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, H, W, 3, heads, head_dim]`` to q, k, v ``[B * groups, heads, N, head_dim]``, by a single copy."""
        heads, head_dim = qkv.shape[-2:]
        blocks = self._to_blocks(qkv).permute(7, 0, 1, 4, 3, 6, 8, 2, 5, 9)
        return blocks.reshape(3, -1, heads, self.partition.tokens, head_dim).unbind(0)

    def merge_heads(self, out: Tensor, batch: int) -> Tensor:
        """``[B * groups, heads, N, head_dim]`` to ``[B, H, W, heads, head_dim]``, by a single copy."""
        (gy, gx), (ay, ax), (ry, rx) = self.partition.group, self.partition.interval, self.regions
        blocks = out.reshape(batch, ry, rx, ay, ax, out.shape[1], gy, gx, out.shape[-1])
        return self._from_blocks(blocks.permute(0, 1, 6, 3, 2, 7, 4, 5, 8))

    def biased(self, logits: Tensor, position_bias: Tensor | nn.Module | None) -> Tensor:
        """``[B * groups, heads, N, N]`` with the bias and the mask of each group added."""
        if position_bias is not None:
            logits = logits + self.dense_bias(position_bias)
        if self.mask is None:
            return logits
        return (logits.unflatten(0, (-1, self.mask.shape[0])) + self.mask).flatten(0, 1)


def eager(grouping: Grouping) -> Attend:
    """The usual code: partition, q, k, v by indexing, logits, bias, mask, softmax, values, reverse."""

    def attend(qkv: Tensor, position_bias: Tensor | nn.Module | None) -> Tensor:
        batch, _, _, _, heads, head_dim = qkv.shape
        qkv = grouping.split(qkv.flatten(3)).unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # each backward fills a tensor of zeros, and the three are added
        logits = (q * head_dim**-0.5) @ k.transpose(-1, -2)
        out = grouping.biased(logits, position_bias).softmax(-1) @ v
        return grouping.merge(out.transpose(1, 2).flatten(2), batch).unflatten(-1, (heads, head_dim))

    return attend


def eager_unbind(grouping: Grouping) -> Attend:
    """The same without its detours: q, k, v by unbind, partition and heads by one copy in and one copy out."""

    def attend(qkv: Tensor, position_bias: Tensor | nn.Module | None) -> Tensor:
        q, k, v = grouping.split_heads(qkv)
        logits = (q * qkv.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return grouping.merge_heads(grouping.biased(logits, position_bias).softmax(-1) @ v, qkv.shape[0])

    return attend


def library(grouping: Grouping, run: Run) -> Attend:
    """Attention of a library between the same copies, with bias and mask as its bias."""

    def attend(qkv: Tensor, position_bias: Tensor | nn.Module | None) -> Tensor:
        q, k, v = grouping.split_heads(qkv)
        bias = grouping.dense_bias(position_bias)
        shape, batch = q.shape, qkv.shape[0]
        if grouping.mask is not None:  # groups beside heads, so that one mask serves the batch
            bias = (grouping.mask + (0 if bias is None else bias)).expand(-1, shape[1], -1, -1).flatten(0, 1)
            q, k, v = (x.reshape(batch, -1, *shape[2:]) for x in (q, k, v))
        out = run(q, k, v, None if bias is None else bias[None].expand(q.shape[0], -1, -1, -1))
        return grouping.merge_heads(out.reshape(shape), batch)

    return attend


def natten(grouping: Grouping) -> Attend:
    """NATTEN's windows, as far apart as they are wide, or dilated: of maps that divide, without a bias."""
    partition = grouping.partition
    if grouping.mask is not None:
        raise NotImplementedError("NATTEN has neither shifted windows nor maps that do not divide")
    geometry = dict(kernel_size=partition.group, stride=partition.group, dilation=partition.interval)

    def attend(qkv: Tensor, position_bias: Tensor | nn.Module | None) -> Tensor:
        if position_bias is not None:
            raise NotImplementedError("NATTEN takes no bias")
        return neighborhood(*qkv.unbind(3), **geometry)

    return attend


def flex(grouping: Grouping, compiled: bool = True) -> Attend:
    """FlexAttention with bias and mask in its score function."""
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    mask = None if grouping.mask is None else grouping.mask[:, 0]  # [groups, N, N]

    def attend(qkv: Tensor, position_bias: Tensor | nn.Module | None) -> Tensor:
        q, k, v = grouping.split_heads(qkv)
        bias = grouping.dense_bias(position_bias)

        def score(logit, b, h, i, j):
            logit = logit if bias is None else logit + bias[h, i, j]
            return logit if mask is None else logit + mask[b % mask.shape[0], i, j]

        return grouping.merge_heads(run(q, k, v, score_mod=score), qkv.shape[0])

    return attend


def compiled(grouping: Grouping) -> Attend:
    """torch.compile of `eager`."""
    return workload.compiled(eager(grouping))


BASELINES: dict[str, Callable[[Grouping], Attend]] = {
    "eager": eager,
    "eager-unbind": eager_unbind,
    **{name: partial(library, run=run) for name, run in LIBRARIES.items()},
    "compile": compiled,
    "flex": flex,
    "natten": natten,
}


def vitkernels_on(backend: str, case: Case) -> Attend:
    """The public function as a user of this layer calls it."""
    if case.bias == "dpb":
        group, interval = case.partition.group, case.partition.interval
        return partial(vitkernels.lsda_attention, group_size=group, interval=interval, backend=backend)
    return lambda qkv, table: vitkernels.partition_attention_qkvpacked(qkv, case.partition, table, backend=backend)


@dataclass
class Workload(workload.Workload):
    """Random normal qkv; a position MLP, a random table, or neither."""

    baselines: ClassVar = BASELINES

    case: Case
    qkv: Tensor  # [B, H, W, 3, heads, head_dim]
    position_bias: Tensor | nn.Module | None
    dout: Tensor  # [B, H, W, heads, head_dim]

    @classmethod
    def random(cls, case: Case, batch: int, device: torch.device, dtype: torch.dtype) -> Workload:
        torch.manual_seed(0)
        shape = (batch, case.height, case.width, case.heads, case.head_dim)
        qkv = torch.randn(*shape[:3], 3, *shape[3:], device=device).to(dtype)
        if case.bias == "dpb":
            # in training mode, so that nobody may keep the table of frozen weights from one call to the next
            position_bias = vitkernels.DynamicPositionBias(case.dim, case.heads).to(device)
        elif case.bias == "table":
            table = (case.heads, *(2 * size - 1 for size in case.partition.group))
            position_bias = torch.randn(table, device=device).requires_grad_()
        else:
            position_bias = None
        return cls(case, qkv.requires_grad_(), position_bias, torch.randn(shape, device=device).to(dtype))

    def double(self) -> Workload:
        qkv, dout = self.qkv.detach().double().requires_grad_(), self.dout.double()
        if isinstance(self.position_bias, nn.Module):
            return Workload(self.case, qkv, copy.deepcopy(self.position_bias).double(), dout)
        bias = None if self.position_bias is None else self.position_bias.detach().double().requires_grad_()
        return Workload(self.case, qkv, bias, dout)

    def build(self, name: str) -> Attend:
        case = self.case
        if name.startswith(OURS):
            return vitkernels_on(name.removeprefix(OURS), case)
        return BASELINES[name](Grouping(case.partition, case.height, case.width, self.qkv.device, self.qkv.dtype))

    def output(self, contender: Attend) -> Tensor:
        return contender(self.qkv, self.position_bias)

    def leaves(self) -> list[Tensor]:
        bias = self.position_bias
        return [self.qkv, *(bias.parameters() if isinstance(bias, nn.Module) else [] if bias is None else [bias])]

    def gradients(self, contender: Attend) -> dict[str, Tensor]:
        """Those of a position MLP are compared as one vector."""
        qkv, *bias = self.full(contender)
        found = {"qkv gradient": qkv}
        return found | ({"position bias gradient": torch.cat([x.flatten() for x in bias])} if bias else {})


@dataclass(frozen=True)
class Case(workload.Layer):
    """Attention inside the groups of a partition."""

    kind: ClassVar = Workload

    partition: Partition  # concrete
    bias: str  # "dpb": a DynamicPositionBias, evaluated in every call; "table": a learned table; "none"

    def describe(self) -> str:
        (gh, gw), (iy, ix), (sy, sx) = self.partition.group, self.partition.interval, self.partition.shift
        words = [f"map {self.height}x{self.width}", f"{self.heads} heads x {self.head_dim}", f"groups {gh}x{gw}"]
        words += [f"interval {iy}x{ix}"] if iy * ix > 1 else []
        words += [f"shift {sy},{sx}"] if sy or sx else []
        return ", ".join(
            [*words, {"dpb": "dynamic position bias", "table": "bias table", "none": "no bias"}[self.bias]]
        )
