"""MaxViT (Tu et al., ECCV 2022), as timm and torchvision write it.

They refuse maps that do not divide, and so does what runs here: it leaves such a call to them. Of a fused projection
timm's own models ("rw") have a head's queries, keys and values beside each other, its models from TensorFlow ("tf") all
queries first; the tables of the latter count from key to query. torchvision scales by the width of the layer, not of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._layer import bias_from_table
from ..partition import Partition
from .recipe import (
    Pair,
    Recipe,
    Unsuitable,
    attend,
    channels,
    check_index,
    check_kind,
    check_methods,
    check_projections,
    check_scale,
    expect,
    expect_shape,
    expect_values,
    on_a_map,
    packed,
    pair_of,
    random,
    silent,
    takes_maps,
    times,
)


def _partition(block: bool, size: Pair) -> Partition:
    return Partition.window(tuple(size)) if block else Partition.grid(tuple(size))


# timm


@on_a_map
def _attention(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    return attn.proj_drop(attn.proj(_values(attn, attn.qkv(x), partition)))


@on_a_map
def _attention_2d(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, C, H, W]
    qkv = attn.qkv(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
    return attn.proj_drop(attn.proj(_values(attn, qkv, partition).permute(0, 3, 1, 2)))


def _values(attn: nn.Module, qkv: Tensor, partition: Partition) -> Tensor:  # [B, H, W, 3C] -> [B, H, W, C]
    if attn.head_first:
        qkv = qkv.unflatten(-1, (attn.num_heads, 3, -1)).transpose(-3, -2)
    else:
        qkv = packed(qkv, attn.num_heads)
    return attend(qkv, partition, _bias(attn.rel_pos), attn.scale)


def _bias(rel_pos: nn.Module | None) -> Tensor | None:  # [heads, 2Gh-1, 2Gw-1], query minus key
    if rel_pos is None:
        return None
    if hasattr(rel_pos, "mlp"):  # on log offsets
        bias = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).permute(2, 0, 1))
        return bias if rel_pos.bias_gain is None else rel_pos.bias_gain * bias
    table = rel_pos.relative_position_bias_table
    return table.flip(1, 2) if table.dim() == 3 else bias_from_table(table, rel_pos.window_size)


def _timm_attn(block: nn.Module, x: Tensor) -> Tensor | None:  # [B, H, W, C]
    return _on_map(block, x, x.shape[1:3], ((block.attn, block.partition_block),))


def _timm_attn_2d(block: nn.Module, x: Tensor) -> Tensor | None:  # [B, C, H, W]
    return _on_map(block, x, x.shape[2:], ((block.attn, block.partition_block),))


def _timm_parallel_attn(block: nn.Module, x: Tensor) -> Tensor | None:  # [B, H, W, C]
    return _on_map(block, x, x.shape[1:3], ((block.attn_block, True), (block.attn_grid, False)))


def _on_map(block: nn.Module, x: Tensor, size: Pair, attentions: Sequence[tuple[nn.Module, bool]]) -> Tensor | None:
    """Attention modules, on blocks or on a grid, side by side."""
    if not all(takes_maps(attn) for attn, _ in attentions) or any(
        n % part for n, part in zip(size, block.partition_size)
    ):
        return None
    outs = [attn(x, _partition(on_blocks, block.partition_size)) for attn, on_blocks in attentions]
    return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def _check_timm_attention(attn: nn.Module, size: Pair) -> None:
    check_kind(attn, "AttentionCl", "Attention2d")
    heads, rel_pos = attn.num_heads, attn.rel_pos
    check_projections(attn.qkv, attn.proj, heads, attn.dim_head)
    check_scale(attn, attn.scale, attn.dim_head)
    if rel_pos is None:
        return
    check_kind(rel_pos, "RelPosBias", "RelPosBiasTf", "RelPosMlp")
    check_methods(rel_pos)
    expect(not getattr(rel_pos, "prefix_tokens", 0), "its bias has a place for prefix tokens")
    expect(pair_of(rel_pos.window_size, "bias's window_size") == size, f"its bias is for {rel_pos.window_size} tokens")
    sides = tuple(2 * n - 1 for n in size)
    check_index(rel_pos, size)
    for name, n in zip(("height_lookup", "width_lookup"), size):
        if hasattr(rel_pos, name):
            _check_lookup(rel_pos, name, n)
    if hasattr(rel_pos, "mlp"):
        expect_shape(rel_pos.rel_coords_log, (*sides, 2))
        expect(rel_pos.num_heads == heads, f"its bias is for {rel_pos.num_heads} heads, its attention has {heads}")
    else:
        table = rel_pos.relative_position_bias_table
        expect_shape(table, (heads, *sides) if table.dim() == 3 else (sides[0] * sides[1], heads))


def _check_lookup(rel_pos: nn.Module, name: str, length: int) -> None:
    """Raise `Unsuitable` unless its one-hot rows address the table by key minus query along one axis."""
    lookup = getattr(rel_pos, name)
    place = torch.arange(length, device=lookup.device)
    one = place - place[:, None] + length - 1  # [query, key]
    rows = one[:, :, None] == torch.arange(2 * length - 1, device=lookup.device)
    expect_values(name, lookup, rows, f"{length} tokens along that axis have")


def _describe(block: bool, size: Pair) -> str:
    return f"partition_attention, {'blocks' if block else 'grid'} {times(size)}"


def _check_timm(block: nn.Module) -> str:
    size = pair_of(block.partition_size, "partition_size")
    expect(isinstance(block.partition_block, bool), f"its partition_block is {block.partition_block!r}")
    _check_timm_attention(block.attn, size)
    return _describe(block.partition_block, size)


def _check_timm_parallel(block: nn.Module) -> str:
    size = pair_of(block.partition_size, "partition_size")
    for attn in (block.attn_block, block.attn_grid):
        _check_timm_attention(attn, size)
    return f"partition_attention, blocks and grid {times(size)}"


def _of_timm(block: nn.Module) -> list[tuple]:
    height, width = pair_of(block.partition_size, "partition_size")
    return [(random(1, 2 * height, 3 * width, block.norm1.weight.shape[0]),)]


def _of_timm_2d(block: nn.Module) -> list[tuple]:
    return [(maps.permute(0, 3, 1, 2),) for (maps,) in _of_timm(block)]


def _whole_map(block: nn.Module) -> str:
    raise Unsuitable("it attends over the whole map (CoAtNet), with a bias for each pair of tokens")


# torchvision


@on_a_map
def _torchvision_attention(attn: nn.Module, x: Tensor, partition: Partition) -> Tensor:  # [B, H, W, C]
    bias = bias_from_table(attn.relative_position_bias_table, partition.group)
    return attn.merge(attend(packed(attn.to_qkv(x), attn.n_heads), partition, bias, attn.scale_factor))


def _torchvision_layer(layer: nn.Module, x: Tensor) -> Tensor | None:  # [B, C, H, W]
    layers = layer.attn_layer
    if tuple(x.shape[2:]) != tuple(layer.grid_size) or type(layers) is not nn.Sequential or len(layers) != 3:
        return None
    norm, attn, drop = layers
    moves = (layer.partition_op, layer.partition_swap, layer.departition_swap, layer.departition_op)
    if not takes_maps(attn) or not silent(layers, *moves):
        return None
    x = x.permute(0, 2, 3, 1)
    partition = _partition(layer.partition_type == "window", (attn.size, attn.size))
    x = x + layer.stochastic_dropout(drop(attn(norm(x), partition)))
    x = x + layer.stochastic_dropout(layer.mlp_layer(x))
    return x.permute(0, 3, 1, 2)


def _check_torchvision(layer: nn.Module) -> str:
    kinds = [type(part).__name__ for part in layer.attn_layer]
    expect(len(kinds) == 3, f"its attn_layer is {', '.join(kinds)}, expected a norm, the attention and a dropout")
    attn, grid = layer.attn_layer[1], pair_of(layer.grid_size, "grid_size")
    check_kind(attn, "RelativePositionalMultiHeadAttention")
    size = attn.size
    expect(attn.max_seq_len == size**2, f"its attention is for {attn.max_seq_len} tokens, which are no square")
    expect(layer.partition_type in ("window", "grid"), f"its partition_type is {layer.partition_type!r}")
    expect(grid[0] % size == 0 and grid[1] % size == 0, f"its map, {times(grid)}, is no multiple of {size} tokens")
    p, g = (size, grid[0] // size) if layer.partition_type == "window" else (grid[0] // size, size)
    expect((layer.p, layer.g) == (p, g), f"it divides its map into {layer.g} parts of {layer.p}, expected {g} of {p}")
    expect(grid[0] == grid[1] or p == size, f"its grid is on a map of {times(grid)}, expected a square")
    check_projections(attn.to_qkv, attn.merge, attn.n_heads, attn.head_dim)
    expect_shape(attn.relative_position_bias_table, ((2 * size - 1) ** 2, attn.n_heads))
    check_scale(attn, attn.scale_factor, attn.head_dim)
    check_index(attn, (size, size))
    return _describe(layer.partition_type == "window", (size, size))


def _of_torchvision(layer: nn.Module) -> list[tuple]:
    return [(random(1, channels(layer.attn_layer[1].to_qkv)[0], *layer.grid_size),)]


RECIPES = (
    Recipe(
        "timm",
        "timm.models.maxxvit.PartitionAttentionCl",
        {"_partition_attn": _timm_attn, "attn.forward": _attention},
        _check_timm,
        _of_timm,
    ),
    Recipe(
        "timm",
        "timm.models.maxxvit.PartitionAttention2d",
        {"_partition_attn": _timm_attn_2d, "attn.forward": _attention_2d},
        _check_timm,
        _of_timm_2d,
    ),
    Recipe(
        "timm",
        "timm.models.maxxvit.ParallelPartitionAttention",
        {"_partition_attn": _timm_parallel_attn, "attn_block.forward": _attention, "attn_grid.forward": _attention},
        _check_timm_parallel,
        _of_timm,
        attention=("attn_block", "attn_grid"),
    ),
    Recipe("timm", "timm.models.maxxvit.TransformerBlock2d", {}, _whole_map, _of_timm_2d),
    Recipe(
        "torchvision",
        "torchvision.models.maxvit.PartitionAttentionLayer",
        {"forward": _torchvision_layer, "attn_layer.1.forward": _torchvision_attention},
        _check_torchvision,
        _of_torchvision,
        attention=("attn_layer.1",),
    ),
)
