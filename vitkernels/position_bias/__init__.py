from .module import DynamicPositionBias
from .op import dynamic_position_bias

__all__ = ["DynamicPositionBias", "dynamic_position_bias"]
