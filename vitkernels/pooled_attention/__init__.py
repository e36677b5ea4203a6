from .module import MultiScaleAttention
from .op import pooled_attention
from .pool import Pool, pool_qkv, pool_tokens

__all__ = ["MultiScaleAttention", "Pool", "pool_qkv", "pool_tokens", "pooled_attention"]
