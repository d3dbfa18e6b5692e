"""Weights of samples: on their way through Keras's calls, and what they do to the terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy
from keras import ops

from selfalign.adapting import Mask, Scalar, Tensor, invalid

WEIGHTS = "sample_weight"
"""The name that weights have in the data."""


def arguments_of(
    method: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call such as `fit`, by name, the weights of samples moved into the data.

    Keras's own way for weights expects y to be one array: it drops them where there is no y, and
    copies them for each part of a tuple.

    Raises:
        ValueError: weights that are negative or not finite, or class weights without labels.
    """
    bound = inspect.signature(method).bind_partial(*arguments, **options).arguments
    named = {**bound.pop("kwargs", {}), **bound}
    validation = named.get("validation_data")
    if isinstance(validation, (tuple, list)) and len(validation) == 3:
        x, y, weights = validation
        named["validation_data"] = (x, _with_weights(y, weights))
    if not is_arrays(named.get("x")):
        return named  # a dataset brings its weights along
    weights = _weights(named)
    if weights is not None:
        named["y"] = _with_weights(named.get("y"), weights)
    return named


def is_arrays(x: Any) -> bool:
    """Whether data is an array or a nest of arrays, and no dataset."""
    return isinstance(x, (tuple, list, dict)) or hasattr(x, "shape")


def parts_of(side: Any) -> list[Any]:
    """The parts of x or y, which may be one array, several or none."""
    if side is None:
        return []
    return list(side) if isinstance(side, (list, tuple)) else [side]


def _with_weights(y: Any, weights: Any) -> tuple[Any, ...]:
    if hasattr(weights, "shape"):
        _check_values(weights)
    return (*parts_of(y), {WEIGHTS: weights})


def _check_values(weights: Any) -> None:
    values = ops.convert_to_numpy(weights)
    if not (numpy.isfinite(values).all() and (values >= 0).all()):
        raise invalid(
            "Sample weights must be finite numbers of at least 0",
            f"values from {values.min():g} to {values.max():g}",
            "Pass 0 for a sample that is to be left out.",
        )


def _weights(named: dict[str, Any]) -> Any:
    """The weights of samples that a call was given, by themselves or by class; None: none."""
    weights = named.pop("sample_weight", None)
    by_class = named.pop("class_weight", None)
    if by_class is None:
        return weights
    if weights is not None:
        raise invalid(
            "Samples are weighed by themselves or by their class",
            "sample_weight and class_weight",
            "Pass one of the two.",
        )
    return _weights_of_classes([*parts_of(named["x"]), *parts_of(named.get("y"))], by_class)


def _weights_of_classes(parts: list[Any], by_class: Mapping[int, float]) -> numpy.ndarray:
    """The weight of each sample's class; 1 where a class has none, as in Keras."""
    conditions = [part for part in parts[1:] if not isinstance(part, dict)]
    if not conditions:
        raise invalid(
            "class_weight must come with labels, the first part of the condition",
            "samples without a condition by its place",
            "Pass labels: fit(x0, labels), or sample_weight=.",
        )
    labels = ops.convert_to_numpy(conditions[0])
    if labels.ndim > 1:
        labels = labels.argmax(-1) if labels.shape[-1] > 1 else labels[..., 0]
    return numpy.array([by_class.get(int(label), 1.0) for label in labels], "float32")


def of_samples(weights: Tensor | None) -> Tensor | None:
    """Weights [B] of whole samples; None where there are none, or of places in a sample."""
    if weights is None or any(length != 1 for length in weights.shape[1:]):
        return None
    return ops.cast(ops.reshape(weights, (-1,)), "float32")


def weighed(mask: Mask, weights: Tensor | None) -> tuple[Mask, Scalar]:
    """A mask with sample weights [B] in it, and a factor that undoes its norm.

    A term is a mean over its mask. Keras's losses divide by the number of samples, not by the sum
    of their weights; times the factor a term does so, too.
    """
    if weights is None:
        return mask, None
    if mask is None:
        return weights, ops.mean(weights)
    places = ops.cast(mask, "float32")
    both = places * ops.reshape(weights, (-1, *[1] * (len(places.shape) - 1)))
    total = ops.sum(places)
    return both, ops.sum(both) / ops.where(total == 0, 1.0, total)
