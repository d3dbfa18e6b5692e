"""Where a functional backbone is tapped: its blocks by name, and the tokens that a layer gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import keras

from selfalign.adapting import EMATeacher, LaterLayer, Objective, Tokens, invalid

from .options import Options, Select


class Tapped(NamedTuple):
    """The layers of one objective.

    Attributes:
        student: name of the layer that is pulled.
        target: name of the layer that gives the target; None where it comes from elsewhere.
    """

    student: str
    target: str | None = None


def is_functional(backbone: keras.Model) -> bool:
    """Whether the backbone is a graph of layers, whose outputs can be tapped."""
    return hasattr(backbone, "inputs") and hasattr(backbone, "operations")


# Blocks by name


def block_names(backbone: keras.Model, pattern: str | None) -> list[str]:
    """The names of a functional backbone's blocks in the order of their numbers.

    Without a pattern: the only kind of layers with numbered names of the user's, or the only class
    of layers that is not Keras's own and occurs more than once.
    """
    found = numbered(backbone) if pattern is None else {pattern: _matching(backbone, pattern)}
    kinds = {kind: names for kind, names in found.items() if names}
    if len(kinds) != 1:
        described = [f"{kind!r} ({_range(names)})" for kind, names in kinds.items()]
        raise invalid(
            "The backbone must have exactly one kind of numbered blocks, or the caller names it",
            f"blocks={pattern!r}; found {', '.join(described) or 'none'}",
            f'Pass blocks="name_{{}}", or taps=. Its layers: {_names(backbone.layers)}.',
        )
    return next(iter(kinds.values()))


def numbered(backbone: keras.Model) -> dict[str, list[str]]:
    """Kinds of layers that may be the blocks, and the names of each kind."""
    kinds: dict[str, list[str]] = {}
    for layer in backbone.layers:
        kind = _kind(layer)
        if kind is not None:
            kinds.setdefault(kind, []).append(layer.name)
    return {kind: names for kind, names in kinds.items() if len(names) > 1}


def _kind(layer: keras.Layer) -> str | None:
    """A class of the user's own, or the stem of a name that is the user's own; None otherwise."""
    name = type(layer).__name__
    if not type(layer).__module__.startswith("keras."):
        return name
    stem = re.sub(r"_\d+$", "", layer.name)
    automatic = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    return None if stem in (layer.name, automatic) else f"{stem}_{{}}"


def _matching(backbone: keras.Model, pattern: str) -> list[str]:
    if not isinstance(pattern, str) or pattern.count("{}") != 1:
        raise invalid(
            "blocks= must have one {} where the number stands",
            repr(pattern),
            'Pass for instance blocks="block_{}".',
        )
    expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    numbers = {}
    for layer in backbone.layers:
        match = expression.fullmatch(layer.name)
        if match:
            numbers[int(match[1])] = layer.name
    return [numbers[n] for n in sorted(numbers)]


def _range(names: list[str]) -> str:
    return f"{len(names)}: {names[0]} ... {names[-1]}"


def _names(layers: Iterable[keras.Layer]) -> str:
    return ", ".join(layer.name for layer in layers)


# Taps


def find_taps(
    backbone: keras.Model, objectives: Mapping[str, Objective], options: Options
) -> dict[str, Tapped]:
    """The tapped layers of each objective: by its layer numbers, or as the user gave them.

    None for a backbone that is not functional: it hands out its features itself.

    Raises:
        ValueError: layers that the backbone does not have, or not as many as needed.
    """
    if not is_functional(backbone):
        if options.blocks is not None or options.taps is not None:
            raise invalid(
                "blocks= and taps= must come with a functional backbone, whose layers they name",
                f"{type(backbone).__name__}, which is not functional",
                "Leave them out: the objective's layers count the features that it returns.",
            )
        return {}
    if options.taps is not None:
        return _given_taps(backbone, objectives, options)
    names = block_names(backbone, options.blocks)
    found = {}
    for name, objective in objectives.items():
        numbers = objective.layers(len(names))
        found[name] = Tapped(*(names[number - 1] for number in numbers))
    return found


def _given_taps(
    backbone: keras.Model, objectives: Mapping[str, Objective], options: Options
) -> dict[str, Tapped]:
    taps = options.taps
    named = taps if isinstance(taps, Mapping) else dict.fromkeys(objectives, taps)
    if options.blocks is not None or set(named) != set(objectives):
        raise _wrong_taps(objectives, options)
    found = {}
    for name, objective in objectives.items():
        layers = named[name]
        count = 2 if isinstance(objective.source, (EMATeacher, LaterLayer)) else 1
        if not isinstance(layers, (list, tuple)) or len(layers) != count:
            raise _wrong_taps(objectives, options)
        found[name] = Tapped(*(_layer_name(backbone, layer) for layer in layers))
    return found


def _wrong_taps(objectives: Mapping[str, Objective], options: Options) -> ValueError:
    example = '("block_2", "block_4")'
    if len(objectives) > 1:
        example = f'{{"{next(iter(objectives))}": {example}, ...}}'
    return invalid(
        "taps= must be the student's layer and the target's, without blocks= (one layer where the "
        "target is not a layer of the backbone)",
        f"taps={options.taps!r}, blocks={options.blocks!r}",
        f"Pass taps={example}, or leave it out and let the objective's layers decide.",
    )


def _layer_name(backbone: keras.Model, layer: str | int) -> str:
    """A layer's name, given as such or as its index in `backbone.layers`."""
    if isinstance(layer, str):
        return layer
    if not isinstance(layer, int) or not 0 <= layer < len(backbone.layers):
        raise invalid(
            "A tapped layer must be a name or an index of backbone.layers",
            repr(layer),
            f"Its {len(backbone.layers)} layers: {_names(backbone.layers)}.",
        )
    return str(backbone.layers[layer].name)


def layer_tokens(backbone: keras.Model, name: str, select: Select | None) -> Tokens:
    """The symbolic tokens [B, N, D] of one layer."""
    layer = next((layer for layer in backbone.layers if layer.name == name), None)
    if layer is None:
        raise invalid(
            "A tapped layer must exist in the backbone",
            repr(name),
            f"Its layers: {_names(backbone.layers)}.",
        )
    output = layer.output if select is None else select(layer.output)
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) not in (3, 4, 5):
        several = isinstance(output, (list, tuple))
        received = [tuple(part.shape) for part in output] if several else shape
        raise invalid(
            "A tapped layer must give tokens [B, N, D], or [B, ..., D] on a grid",
            f"{name}: {received}",
            "Pass select=, for instance select=lambda output: output[0].",
        )
    return output if len(shape) == 3 else keras.layers.Reshape((-1, shape[-1]))(output)
