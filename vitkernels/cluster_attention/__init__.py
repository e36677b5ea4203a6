from .clusters import balanced_clusters
from .module import FeatureSpaceAttention
from .op import cluster_attention, feature_space_attention

__all__ = ["FeatureSpaceAttention", "balanced_clusters", "cluster_attention", "feature_space_attention"]
