"""Forwards that hand out tokens: of the student, and of its average up to the tapped layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
from keras import ops

from selfalign.adapting import (
    EMATeacher,
    LaterLayer,
    Objective,
    Scalar,
    Tensor,
    Tokens,
    invalid,
    with_source,
)

from .blocks import Tapped, is_functional, layer_tokens
from .law import check_condition
from .options import Options, Select


class StudentOutput(NamedTuple):
    """What a forward of the student gives.

    Attributes:
        prediction: of the backbone.
        tokens: of each objective, by its name.
        targets: of the objectives whose target is a later layer, without gradient.
        added: scalars that the backbone adds to the loss: its regularizers, and its `add_loss`.
    """

    prediction: Tensor
    tokens: dict[str, Tokens]
    targets: dict[str, Tokens]
    added: list[Scalar]


class Forwards(ABC):
    """Forwards of one backbone and, where an objective has an EMA teacher, of its average."""

    @abstractmethod
    def student(self, inputs: Any, training: bool) -> StudentOutput:
        """The prediction, and the tokens of all objectives, in one forward."""

    @abstractmethod
    def teacher(self, inputs: Any) -> dict[str, Tokens]:
        """The average's tokens for each objective with an EMA teacher, without gradient."""

    @abstractmethod
    def check(self, options: Options) -> None:
        """The backbone drops no condition inside, as far as that can be seen."""

    @abstractmethod
    def width(self, name: str) -> int | None:
        """The feature width of an objective's tokens; None where it is not known."""


class FunctionalForwards(Forwards):
    """Of a functional backbone, whose layers are outputs of a second model on the same weights.

    The teacher's forward runs what its tokens depend on, and nothing else.
    """

    def __init__(
        self,
        backbone: keras.Model,
        average: keras.Model | None,
        objectives: Mapping[str, Objective],
        taps: Mapping[str, Tapped],
        select: Select | None,
    ) -> None:
        self.backbone = backbone
        self.taps = taps
        self.target_places = {name: str(tapped.target) for name, tapped in taps.items()}
        self.later = with_source(objectives, LaterLayer)
        self.taught = with_source(objectives, EMATeacher)
        wanted = [tapped.student for tapped in taps.values()]
        wanted += [self.target_places[name] for name in self.later]
        self.symbolic = {place: layer_tokens(backbone, place, select) for place in wanted}
        # a dict of outputs: Keras gives a list of one output as that output
        self._student = keras.Model(backbone.input, [backbone.output, self.symbolic])
        if average is not None:
            wanted = [self.target_places[name] for name in self.taught]
            tokens = {place: layer_tokens(average, place, select) for place in wanted}
            self._teacher = keras.Model(average.input, tokens)

    def student(self, inputs: Any, training: bool) -> StudentOutput:
        (prediction, at), added = run_with_losses(self._student, inputs, training)
        tokens = {name: at[tapped.student] for name, tapped in self.taps.items()}
        targets = {name: ops.stop_gradient(at[self.target_places[name]]) for name in self.later}
        return StudentOutput(prediction, tokens, targets, added)

    def teacher(self, inputs: Any) -> dict[str, Tokens]:
        at = self._teacher(inputs, training=False)
        return {name: ops.stop_gradient(at[self.target_places[name]]) for name in self.taught}

    def check(self, options: Options) -> None:
        if options.checks == "on":
            check_condition(self.backbone, self.symbolic)

    def width(self, name: str) -> int | None:
        width: int | None = self.symbolic[self.taps[name].student].shape[-1]
        return width


class SubclassedForwards(Forwards):
    """Of a model that returns (prediction, features), its blocks' outputs in their order."""

    def __init__(
        self,
        backbone: keras.Model,
        average: keras.Model | None,
        objectives: Mapping[str, Objective],
        options: Options,
    ) -> None:
        self.backbone = backbone
        self.average: Any = average
        self.objectives = objectives
        self.later = with_source(objectives, LaterLayer)
        self.taught = with_source(objectives, EMATeacher)
        self.select = options.select
        self.given_width = options.width

    def student(self, inputs: Any, training: bool) -> StudentOutput:
        outputs, added = run_with_losses(self.backbone, inputs, training)
        prediction, features = _checked(outputs)
        tokens = {name: self._feature(features, name, 0) for name in self.objectives}
        later = {name: self._feature(features, name, 1) for name in self.later}
        targets = {name: ops.stop_gradient(target) for name, target in later.items()}
        return StudentOutput(prediction, tokens, targets, added)

    def teacher(self, inputs: Any) -> dict[str, Tokens]:
        _, features = _checked(self.average(inputs, training=False))
        tokens = {name: self._feature(features, name, 1) for name in self.taught}
        return {name: ops.stop_gradient(target) for name, target in tokens.items()}

    def _feature(self, features: list[Tensor], name: str, side: int) -> Tokens:
        """The tokens of one objective: of the student's layer (side 0), or of the target's (1)."""
        number = self.objectives[name].layers(len(features))[side]
        feature = features[number - 1]
        return feature if self.select is None else self.select(feature)

    def check(self, options: Options) -> None:
        """Nothing is looked at: the inputs' shapes are not known."""

    def width(self, name: str) -> int | None:
        return self.given_width


def make_forwards(
    backbone: keras.Model,
    average: keras.Model | None,
    objectives: Mapping[str, Objective],
    taps: Mapping[str, Tapped],
    options: Options,
) -> Forwards:
    """The forwards of a backbone of either kind; `taps` are empty where it is not functional."""
    if is_functional(backbone):
        return FunctionalForwards(backbone, average, objectives, taps, options.select)
    return SubclassedForwards(backbone, average, objectives, options)


def run_with_losses(model: Any, inputs: Any, training: bool) -> tuple[Any, list[Scalar]]:
    """What a model returns, and what its layers add to the loss.

    On the jax backend layers may add to the loss in a scope that collects it, and nowhere else.
    """
    if keras.backend.backend() != "jax":
        return model(inputs, training=training), model.losses
    state = [(variable, variable.value) for variable in model.variables]
    with keras.StatelessScope(state, collect_losses=True) as scope:
        outputs = model(inputs, training=training)
        added = model.losses
    for variable in model.non_trainable_variables:
        variable.assign(scope.get_current_value(variable))
    return outputs, added


def _checked(outputs: Any) -> tuple[Tensor, list[Tensor]]:
    """The prediction and the features that a model returned; raises ValueError otherwise."""
    pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2
    if not pair or not isinstance(outputs[1], (tuple, list)):
        raise invalid(
            "A backbone that is not functional must return (prediction, features), a list of its "
            "blocks' outputs",
            _described(outputs),
            "Return them from its call, or build it with the functional API.",
        )
    return outputs[0], list(outputs[1])


def _described(outputs: Any) -> str:
    if isinstance(outputs, (tuple, list)):
        parts = ", ".join(_described(part) for part in outputs)
        return f"{type(outputs).__name__} of ({parts})"
    if hasattr(outputs, "shape"):
        return f"shape {tuple(outputs.shape)}"
    return type(outputs).__name__
