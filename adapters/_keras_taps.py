"""Where a Keras backbone is tapped: its blocks by name, forwards that hand out a block's tokens, and a second backbone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from selfalign._checks import invalid
from selfalign.loss import SRALoss

Forward = Callable[..., Any]


def is_functional(backbone: keras.Model) -> bool:
    """Whether the backbone is a graph of layers, whose outputs can be tapped."""
    return hasattr(backbone, "inputs") and hasattr(backbone, "operations")


def block_names(backbone: keras.Model, pattern: str | None) -> list[str]:
    """The names of a functional backbone's blocks in the order of their numbers.

    Without a pattern: the only kind of layers with numbered names of the user's, or the only class of layers that is not
    Keras's own and occurs more than once.
    """
    found = numbered(backbone) if pattern is None else {pattern: _matching(backbone, pattern)}
    listed = ", ".join(f"{kind!r} ({len(names)}: {names[0]} ... {names[-1]})" for kind, names in found.items() if names)
    if len(found) != 1 or not next(iter(found.values())):
        raise invalid("The backbone must have exactly one kind of numbered blocks, or the caller names it",
                      f"blocks={pattern!r}; found {listed or 'none'}",
                      f'Pass blocks="name_{{}}", or student= and teacher=. Its layers: {_names(backbone)}.')  # fmt: skip
    return next(iter(found.values()))


def _matching(backbone: keras.Model, pattern: str) -> list[str]:
    if not isinstance(pattern, str) or pattern.count("{}") != 1:
        raise invalid("blocks= must have one {} where the number stands", repr(pattern), 'Pass for instance blocks="block_{}".')
    expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    numbers = {int(m[1]): layer.name for layer in backbone.layers if (m := expression.fullmatch(layer.name))}
    return [numbers[n] for n in sorted(numbers)]


def numbered(backbone: keras.Model) -> dict[str, list[str]]:
    """Candidates: {kind: names}."""
    kinds: dict[str, list[str]] = {}
    for layer in backbone.layers:
        own = not type(layer).__module__.startswith("keras.")
        stem = re.sub(r"_\d+$", "", layer.name)
        automatic = re.sub(r"(?<!^)(?=[A-Z])", "_", type(layer).__name__).lower()
        if own or (stem != layer.name and stem != automatic):
            kinds.setdefault(type(layer).__name__ if own else f"{stem}_{{}}", []).append(layer.name)
    return {kind: names for kind, names in kinds.items() if len(names) > 1}


def _names(backbone: keras.Model) -> str:
    return ", ".join(layer.name for layer in backbone.layers)


def layer_name(backbone: keras.Model, layer: str | int) -> str:
    """A layer's name, given as such or as its index in `backbone.layers`."""
    if isinstance(layer, str):
        return layer
    if not isinstance(layer, int) or not 0 <= layer < len(backbone.layers):
        raise invalid("A tapped layer must be a name or an index of backbone.layers", repr(layer),
                      f"Its {len(backbone.layers)} layers: {_names(backbone)}.")  # fmt: skip
    return str(backbone.layers[layer].name)


def layer_tokens(backbone: keras.Model, name: str, select: Callable[[Any], Any] | None) -> Any:
    """The symbolic tokens [B, N, D] of one layer."""
    layer = next((layer for layer in backbone.layers if layer.name == name), None)
    if layer is None:
        raise invalid("A tapped layer must exist in the backbone", repr(name), f"Its layers: {_names(backbone)}.")
    output = layer.output if select is None else select(layer.output)
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) not in (3, 4, 5):
        received = f"{name}: {[tuple(o.shape) for o in output]}" if isinstance(output, (list, tuple)) else f"{name}: {shape}"
        raise invalid("A tapped layer must give tokens [B, N, D], or [B, ..., D] on a grid", received,
                      "Pass select=, for instance select=lambda output: output[0].")  # fmt: skip
    return output if len(shape) == 3 else keras.layers.Reshape((-1, shape[-1]))(output)


def functional_forwards(
    backbone: keras.Model, teacher: keras.Model, names: list[str], select: Any
) -> tuple[Forward, Forward, int]:
    """The student's forward, (prediction, tokens); the teacher's, tokens, which runs to its layer only; and the width."""
    student_tokens, teacher_tokens = (layer_tokens(m, n, select) for m, n in zip((backbone, teacher), names, strict=True))
    student = keras.Model(backbone.input, [backbone.output, student_tokens])
    prefix = keras.Model(teacher.input, teacher_tokens)  # runs what the tokens depend on, and nothing else
    return (
        lambda inputs, training: student(inputs, training=training),
        lambda inputs: prefix(inputs, training=False),
        int(student_tokens.shape[-1]),
    )


def subclassed_forwards(backbone: keras.Model, teacher: keras.Model, loss: SRALoss, select: Any) -> tuple[Forward, Forward]:
    """The same for a model that returns (prediction, features), features being its blocks' outputs in order."""

    def run(model: keras.Model, inputs: Any, training: bool) -> tuple[Any, list[Any]]:
        outputs = model(inputs, training=training)
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 2 or not isinstance(outputs[1], (tuple, list)):
            raise invalid("A backbone that is not functional must return (prediction, features), a list of its blocks' outputs",
                          _described(outputs), "Return them from its call, or build it with the functional API.")  # fmt: skip
        return outputs[0], [feature if select is None else select(feature) for feature in outputs[1]]

    def student(inputs: Any, training: bool) -> tuple[Any, Any]:
        prediction, features = run(backbone, inputs, training)
        return prediction, features[loss.layers(len(features))[0] - 1]

    def prefix(inputs: Any) -> Any:
        _, features = run(teacher, inputs, False)
        return features[loss.layers(len(features))[1] - 1]

    return student, prefix


def _described(outputs: Any) -> str:
    if isinstance(outputs, (tuple, list)):
        return f"{type(outputs).__name__} of ({', '.join(map(_described, outputs))})"
    return f"shape {tuple(outputs.shape)}" if hasattr(outputs, "shape") else type(outputs).__name__


def rebuilt(backbone: keras.Model) -> keras.Model:
    """A second backbone from the first one's configuration, built, with weights of its own."""
    try:
        second = type(backbone).from_config(backbone.get_config())
        if not second.built:
            second.build_from_config(backbone.get_build_config() or {})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise invalid("The teacher is a second backbone, built from the first one's configuration",
                      f"{type(backbone).__name__}, which gives none: {error}",
                      "Give it get_config(), or pass teacher=, a second instance that is built.") from error  # fmt: skip
    return second


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Make one backbone's weights those of another."""
    for mine, theirs in zip(target.weights, source.weights, strict=True):
        mine.assign(ops.copy(theirs.value))  # not the same buffer: JAX donates both
