"""The loss of `compile`, weighed sample by sample."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from selfalign.adapting import Scalar, Tensor, invalid


@keras.saving.register_keras_serializable(package="selfalign")
class SampleWeighted(keras.losses.Loss):
    """A Keras loss whose sample weights begin at the axis of the samples.

    Keras lays weights [B] along the last axis of the values that a loss gives, which for images is
    an axis of the image.

    Args:
        loss: whatever `compile` takes for one output.
    """

    def __init__(self, loss: Any) -> None:
        self.given = keras.losses.get(loss)
        self.is_object = isinstance(self.given, keras.losses.Loss)
        names = ("name", "reduction", "dtype") if self.is_object else ()
        super().__init__(**{name: getattr(self.given, name) for name in names})
        self.values = self.given.call if self.is_object else self.given

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> Scalar:
        if sample_weight is None and self.is_object:
            return self.given(y_true, y_pred)
        values = ops.convert_to_tensor(self.values(y_true, y_pred))
        if sample_weight is not None:
            sample_weight = fitted(sample_weight, values)
        return super().__call__(values, values, sample_weight)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The values, which are computed already: Keras's own call then weighs and reduces them."""
        return y_pred

    def get_config(self) -> dict[str, Any]:
        return {"loss": keras.saving.serialize_keras_object(self.given)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SampleWeighted:
        return cls(keras.saving.deserialize_keras_object(config["loss"]))


def sample_weighted(loss: Any) -> Any:
    """What `compile` was given as its loss, weighed by samples; without one the mean square."""
    if loss is None:
        return SampleWeighted("mse")
    return keras.tree.map_structure(
        lambda each: each if isinstance(each, SampleWeighted) else SampleWeighted(each), loss
    )


def fitted(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [B, ...] in the shape of the values of a loss, axis by axis from the first one on.

    Raises:
        ValueError: weights of other axes.
    """
    weights = ops.convert_to_tensor(weights)
    shape = list(weights.shape)
    while len(shape) > len(values.shape) and shape[-1] == 1:
        shape.pop()
    shape += [1] * (len(values.shape) - len(shape))
    pairs = zip(shape, values.shape, strict=False)
    fits = len(shape) == len(values.shape) and all(a in (1, b, None) for a, b in pairs)
    if not fits or not shape:
        raise invalid(
            "Sample weights must be [B], or fit the values that the loss gives, axis by axis",
            f"weights of shape {tuple(weights.shape)}, for values of shape {tuple(values.shape)}",
            "Pass one weight for each sample, and a loss that gives a value for each sample.",
        )
    shape = [-1 if length is None else length for length in shape]
    weights = ops.cast(ops.reshape(weights, shape), values.dtype)
    return weights * ops.ones_like(values)
