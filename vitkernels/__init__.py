"""Fused attention for hierarchical vision transformers, on NVIDIA GPUs (Triton) and CPUs (C++).

A partition is an index map; attention inside a group is one kernel; everything else is vocabulary.
"""

from ._dispatch import info, use_backend
from .cluster_attention import (
    FeatureSpaceAttention,
    balanced_clusters,
    cluster_attention,
    feature_space_attention,
)
from .integrations import accelerate
from .partition import Partition
from .partition_attention import (
    CrossShapedWindowAttention,
    LongShortDistanceAttention,
    MaxSA,
    WindowAttention,
    block_attention,
    grid_attention,
    lsda_attention,
    partition_attention,
    partition_attention_qkvpacked,
    window_attention,
)
from .pooled_attention import MultiScaleAttention, Pool, pool_qkv, pool_tokens, pooled_attention
from .position_bias import DynamicPositionBias, dynamic_position_bias

__version__ = "0.1.0"

__all__ = [
    "CrossShapedWindowAttention",
    "DynamicPositionBias",
    "FeatureSpaceAttention",
    "LongShortDistanceAttention",
    "MaxSA",
    "MultiScaleAttention",
    "Partition",
    "Pool",
    "WindowAttention",
    "accelerate",
    "balanced_clusters",
    "block_attention",
    "cluster_attention",
    "dynamic_position_bias",
    "feature_space_attention",
    "grid_attention",
    "info",
    "lsda_attention",
    "partition_attention",
    "partition_attention_qkvpacked",
    "pool_qkv",
    "pool_tokens",
    "pooled_attention",
    "use_backend",
    "window_attention",
]
