"""Keras: a model around your backbone for `compile` and `fit`, on every backend that trains."""

from .aligned import SelfAligned
from .features import features

__all__ = ["SelfAligned", "features"]
