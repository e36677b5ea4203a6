from .accelerate import Report, accelerate

__all__ = ["Report", "accelerate"]
