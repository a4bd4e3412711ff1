"""From a trained model to one that is shared."""

from .merge import merge_adapter

__all__ = ["merge_adapter"]
