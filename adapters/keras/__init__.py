"""Keras: a model around your backbone for `compile` and `fit`, on every backend that trains."""

from .aligned import SelfAligned

__all__ = ["SelfAligned"]
