"""Keras's entries `compile`, `fit` and `evaluate`, for a model that draws its inputs and targets.

Every backend's train step calls `compute_loss`, which gets samples and labels. What Keras does with
inputs and targets on the way there is done here instead.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import keras

from selfalign.adapting import Tensor, invalid

from .counting import StepCounter, count_of
from .drawing import FixedDraws
from .losses import sample_weighted
from .weights import arguments_of


class Fitting(keras.Model):
    """A model whose `compute_loss` gets the data as it is, and runs the backbone.

    Attributes:
        held_out: the draws of validation, the same in each `evaluate`.
    """

    _counter: StepCounter

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.held_out = FixedDraws()
        self._measures = False
        self._unbuilt = False
        self._begun = False  # looked at before what lies on the device

    @abstractmethod
    def begin(self) -> None:
        """What is due before the first step after each `compile`, and before evaluations."""

    def _begin(self, training: bool) -> None:
        if not self._begun:
            self.begin()
            self._begun = training

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **options: Any,
    ) -> None:
        """Keras's compile. Loss and metrics compare what the backbone is to predict with what it
        predicts; without a loss it is the mean square."""
        measures = metrics is not None or weighted_metrics is not None
        self._measures = self._measures or measures
        self._unbuilt = measures
        self._begun = False
        loss = sample_weighted(loss)
        super().compile(optimizer, loss, loss_weights, metrics, weighted_metrics, **options)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the model in a file was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **options: Any) -> Any:
        """Keras's fit.

        Raises:
            ValueError: not compiled, or data that does not fit backbone and objectives.
        """
        arguments = arguments_of(super().fit, args, options)
        self._begin(training=True)
        return super().fit(**arguments)

    def train_on_batch(self, *args: Any, **options: Any) -> Any:
        """Keras's train_on_batch; raises as `fit` does."""
        arguments = arguments_of(super().train_on_batch, args, options)
        self._begin(training=True)
        return super().train_on_batch(**arguments)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """Keras's evaluate, on the same draws each time; raises as `fit` does."""
        arguments = arguments_of(super().evaluate, args, options)
        self._begin(training=False)
        self.held_out.restart()
        return super().evaluate(**arguments)

    def test_on_batch(self, *args: Any, **options: Any) -> Any:
        """Keras's test_on_batch, on the same draws each time; raises as `fit` does."""
        arguments = arguments_of(super().test_on_batch, args, options)
        self._begin(training=False)
        self.held_out.restart()
        return super().test_on_batch(**arguments)

    def compute_loss_and_updates(
        self, *args: Any, optimizer_variables: Any = None, **options: Any
    ) -> Any:
        """Of the jax backend: tells the counter the optimizer's count, which is traced here."""
        if optimizer_variables is not None:
            state = zip(self.optimizer.variables, optimizer_variables, strict=True)
            with keras.StatelessScope(state):
                self._counter.traced = count_of(self.optimizer)
        try:
            return super().compute_loss_and_updates(
                *args, optimizer_variables=optimizer_variables, **options
            )
        finally:
            self._counter.traced = None

    def predict(self, *args: Any, **options: Any) -> Any:
        """Refused: what to predict with is `backbone` or `ema_backbone()`."""
        raise invalid(
            "SelfAligned trains; it does not predict",
            "predict()",
            "Sample with ema_backbone(), or call backbone.",
        )

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The batch as it is: a step needs the labels too, which only `compute_loss` gets."""
        if training is None:
            raise invalid(
                "SelfAligned trains; it is not called",
                "a call of the model",
                "Call backbone, or what ema_backbone() gives.",
            )
        return inputs

    @property
    def losses(self) -> list[Tensor]:
        """None: `compute_loss` adds those of the student's forward, and not the teacher's."""
        return []

    def measure(self, target: Tensor, prediction: Tensor, weights: Tensor | None) -> None:
        """Update the metrics of `compile`."""
        if self._measures:
            prediction = keras.ops.stop_gradient(prediction)
            super().compute_metrics(None, target, prediction, weights)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Tensor | None = None
    ) -> dict[str, Any]:
        """What `fit` logs; `compute_loss` has updated it."""
        if self._unbuilt:  # Keras asks once with symbols, before the first step
            self._unbuilt = False
            samples = self.samples(x, y)
            return super().compute_metrics(x, samples, samples)
        return self.get_metrics_result()

    @abstractmethod
    def samples(self, x: Any, y: Any) -> Tensor:
        """The clean samples of a batch."""
