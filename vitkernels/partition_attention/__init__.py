from .module import CrossShapedWindowAttention, LongShortDistanceAttention, MaxSA, WindowAttention
from .op import (
    block_attention,
    grid_attention,
    lsda_attention,
    partition_attention,
    partition_attention_qkvpacked,
    window_attention,
)

__all__ = [
    "CrossShapedWindowAttention",
    "LongShortDistanceAttention",
    "MaxSA",
    "WindowAttention",
    "block_attention",
    "grid_attention",
    "lsda_attention",
    "partition_attention",
    "partition_attention_qkvpacked",
    "window_attention",
]
