"""Formulas of Python numbers, without tensors and without Keras."""

from __future__ import annotations


class PythonNumbers:
    """The functions of formulas for Python numbers: without tensors, and without Keras."""

    minimum = min
    maximum = max

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        return x if condition else y

    @staticmethod
    def cast(x: float, dtype: str) -> float:
        return x
