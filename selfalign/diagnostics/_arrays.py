"""Features as arrays for the offline analysis, and packages that only some of it needs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from .._backend import dtype_of, ops
from .._checks import check_array, check_switch, invalid
from ..typing import Tensor

TINY = 1e-30  # keeps a quotient of zeros at zero

Features: TypeAlias = Any
"""Features [n, D] or tokens [B, N, D]: a tensor of any framework, or what NumPy can read."""

Labels: TypeAlias = Any
"""Classes [n]: a tensor of any framework, or what NumPy can read."""

Time: TypeAlias = float
"""A noise level, in the path's own time."""


def array(value: Features) -> np.ndarray:
    """A tensor of any framework, or what NumPy can read, in float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double()  # NumPy has no bfloat16
    try:
        return np.asarray(value, "float64")
    except (TypeError, ValueError) as error:
        raise TypeError(
            "Features must be an array of numbers. Received: "
            f"{type(value).__name__} {value!r:.60}. Pass a tensor, or what NumPy can read."
        ) from error


def check_lists(features: object) -> None:
    """{time: [features of each layer]}: raises TypeError otherwise."""
    found = features if isinstance(features, Mapping) else {}
    numbers = all(isinstance(time, Real) for time in found)
    lists = all(isinstance(each, Sequence) for each in found.values())
    if not (isinstance(features, Mapping) and numbers and lists):
        raise TypeError(
            "features must be {time: [features of each layer]}. Received: "
            f"{type(features).__name__} {features!r:.60}. Take them from "
            "selfalign.adapters.torch.features."
        )


def rows(name: str, features: Features) -> np.ndarray:
    """Finite features [n, D] of at least two samples, in float64."""
    found = array(features)
    if found.ndim != 2 or len(found) < 2 or not found.shape[1]:
        raise invalid(
            f"{name} must be an array [n, D] of at least two samples",
            f"shape {found.shape}",
            "Take the mean over tokens, or flatten samples and tokens into one axis.",
        )
    check_finite(name, found)
    return found


def check_finite(name: str, found: np.ndarray) -> None:
    """Numbers without NaN and infinity: raises ValueError otherwise."""
    if not np.isfinite(found).all():
        fix = "Find the layer that gives them first."
        raise invalid(f"{name} must be finite", "NaN or infinity", fix)


def check_rows(name: str, features: Tensor) -> None:
    """Features [n, D] or tokens [B, N, D] of any framework, by their shape alone."""
    check_array(name, features)
    if not dtype_of(features).startswith(("float", "bfloat", "int", "uint", "bool")):
        raise TypeError(
            f"{name} must be an array of real numbers. Received: dtype {dtype_of(features)}. Pass "
            "a block's features."
        )
    shape = tuple(features.shape)
    if len(shape) < 2 or 0 in shape:
        raise invalid(
            f"{name} must be features [n, D] or tokens [B, N, D], not empty",
            f"shape {shape}",
            "Pass features with the width as the last axis.",
        )


def matrix(features: Tensor, center: bool = False) -> Tensor:
    """Checked features as rows [n, D], float32, without gradient, on their device."""
    center = check_switch("center", center)
    features = ops.stop_gradient(ops.cast(features, "float32"))
    features = ops.reshape(features, (-1, features.shape[-1]))
    if center:
        features = features - ops.mean(features, axis=0, keepdims=True)
    return features


def scaled(features: Tensor) -> Tensor:
    """With 1 as the largest entry: fourth powers soon leave float32."""
    return features / ops.maximum(ops.max(ops.abs(features)), TINY)


def optional_import(module: str) -> Any:
    """A module of scikit-learn or matplotlib.

    Raises:
        ImportError: the package is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        package = {"sklearn": "scikit-learn"}.get(root, root)
        raise ImportError(
            f"This diagnostic needs {package}. Received: {error}. "
            'Install it with: pip install "selfalign[diagnostics]"'
        ) from error
