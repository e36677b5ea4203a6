from .clusters import balanced_clusters
from .op import cluster_attention, feature_space_attention

__all__ = ["balanced_clusters", "cluster_attention", "feature_space_attention"]
