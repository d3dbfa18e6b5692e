"""Features as they come, as arrays for the offline analysis; and the packages it needs, when it needs them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .._backend import ops
from .._checks import check_array, invalid

TINY = 1e-30  # keeps a quotient of zeros at zero


def array(value: Any) -> np.ndarray:
    """A tensor of any framework, or what NumPy can read, in float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double()  # NumPy has no bfloat16
    return np.asarray(value, "float64")


def rows(name: str, features: Any) -> np.ndarray:
    """Finite features [n, D] of at least two samples, in float64."""
    found = array(features)
    if found.ndim != 2 or len(found) < 2 or not found.shape[1]:
        raise invalid(f"{name} must be an array [n, D] of at least two samples", f"shape {found.shape}",
                      "Take the mean over tokens, or flatten samples and tokens into one axis.")  # fmt: skip
    if not np.isfinite(found).all():
        raise invalid(f"{name} must be finite", "NaN or infinity", "Find the layer that gives them first.")
    return found


def check_rows(name: str, features: Any) -> None:
    """Features [n, D] or tokens [B, N, D] of any framework, by their shape alone."""
    check_array(name, features)
    shape = tuple(features.shape)
    if len(shape) < 2 or 0 in shape:
        raise invalid(f"{name} must be features [n, D] or tokens [B, N, D], not empty", f"shape {shape}",
                      "Pass features with the width as the last axis.")  # fmt: skip


def matrix(features: Any, center: bool = False) -> Any:
    """Checked features as rows [n, D], float32, without gradient, on their device."""
    features = ops.stop_gradient(ops.cast(features, "float32"))
    features = ops.reshape(features, (-1, features.shape[-1]))
    return features - ops.mean(features, axis=0, keepdims=True) if center else features


def scaled(features: Any) -> Any:
    """With 1 as the largest entry: fourth powers soon leave float32."""
    return features / ops.maximum(ops.max(ops.abs(features)), TINY)


def need(module: str) -> Any:
    """A module of scikit-learn or matplotlib."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise ImportError(f"This diagnostic needs {package}. Received: {error}. "
                          'Install it with: pip install "selfalign[diagnostics]"') from error  # fmt: skip
