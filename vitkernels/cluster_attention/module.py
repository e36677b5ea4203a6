"""BOAT's attention layer on token maps: projection, clustering, attention inside the leaves, LePE, projection."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._layer import AttentionLayer, LocalPosition
from .._sizes import smaller
from .clusters import check_clustering
from .op import feature_space_attention


class FeatureSpaceAttention(AttentionLayer):
    """BOAT's feature-space local attention layer: tokens that look alike attend to each other, wherever they lie.

    "BOAT: Bilateral Local Attention Vision Transformer" (Yu et al., BMVC 2022). The queries of every head are
    clustered and attend inside their leaf and a little beyond (`feature_space_attention`); a depthwise 3 x 3
    convolution of v over the map (LePE) is added before the output projection. Parameters are named as in the official
    code: ``qkv``, ``proj``, ``get_v``. Maps of any size; where they have ``leaf_size * 2**K`` tokens, the published
    rule.

    The weights published for BOAT-CSWin were trained with two slips of the official code. Give ``scale=1.0`` and
    ``pair_across_batch=True`` to compute what they expect; those for BOAT-Swin expect the defaults.

    Args:
        dim: channels C.
        heads: attention heads; head_dim is ``dim // heads``.
        leaf_size: tokens that a leaf has at least; a map of less than twice as many is a single leaf.
        overlap: tokens that a leaf borrows of its sibling as keys, at most ``leaf_size``.
        iterations, temperature: of the clustering, as in `balanced_clusters`.
        qkv_bias: whether the fused projection has a bias.
        scale: multiplies ``q k^T``; ``head_dim ** -0.5`` if None. 1.0 is the first slip: an argument moved one
            place, and the logits of BOAT-CSWin were not scaled.
        proj_drop: dropout after the output projection.
        pair_across_batch: the second slip: where the map is a single leaf, images 0 and 1, 2 and 3 ... of the batch
            are each other's sibling, in raster order, so that an image's output depends on its neighbour in the
            batch. The batch must be even there. Maps of more leaves are not affected.

    Shape:
        ``[B, H, W, C]`` to ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        leaf_size: int = 49,
        overlap: int = 20,
        *,
        iterations: int = 2,
        temperature: float = 0.01,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        pair_across_batch: bool = False,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop)
        check_clustering(leaf_size, iterations, temperature)
        _checks.check_ints(overlap=overlap)
        if not 0 <= overlap <= leaf_size:
            raise ValueError(f"overlap must be between 0 and leaf_size, {leaf_size}, got {overlap}")
        self.leaf_size, self.overlap = leaf_size, overlap
        self.iterations, self.temperature = iterations, temperature
        self.pair_across_batch = pair_across_batch
        self.get_v = LocalPosition(dim)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        qkv = self._project(x)  # [B, H, W, 3, heads, head_dim]
        tokens = qkv.flatten(1, 2)
        paired = self.pair_across_batch and tokens.shape[1] < 2 * self.leaf_size  # a single leaf
        out = self._attend_in_pairs(tokens) if paired else self._attend(tokens)
        return self._merge(out.unflatten(1, x.shape[1:3]) + self.get_v(qkv[:, :, :, 2]))

    def _attend(self, qkv: Tensor) -> Tensor:  # [B, N, 3, heads, head_dim] -> [B, N, heads, head_dim]
        return feature_space_attention(
            qkv,
            leaf_size=self.leaf_size,
            overlap=self.overlap,
            iterations=self.iterations,
            temperature=self.temperature,
            scale=self.scale,
            backend=self.backend,
        )

    def _attend_in_pairs(self, qkv: Tensor) -> Tensor:  # [B, N, 3, heads, head_dim] -> [B, N, heads, head_dim]
        """Two images are the two leaves of one sequence, in raster order."""
        batch, tokens = qkv.shape[:2]
        if batch % 2:
            raise ValueError(
                f"pair_across_batch pairs the images of a batch where the map is a single leaf: the batch must be "
                f"even, got {batch} images of {tokens} tokens; repeat one, or give pair_across_batch=False"
            )
        order = torch.arange(2 * tokens, dtype=torch.int32, device=qkv.device).expand(batch // 2, 1, 2 * tokens)
        out = feature_space_attention(
            qkv.unflatten(0, (batch // 2, 2)).flatten(1, 2),
            leaf_size=tokens,
            overlap=smaller(self.overlap, tokens),
            order=order,
            scale=self.scale,
            backend=self.backend,
            check=False,
        )
        return out.unflatten(1, (2, tokens)).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, leaf_size={self.leaf_size}, overlap={self.overlap}"
