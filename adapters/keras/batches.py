"""What `fit` hands to a step: samples, condition, target tokens and a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
from keras import ops

from selfalign.adapting import Given, Mask, Objective, Tensor, Tokens, invalid, with_source

from .blocks import is_functional
from .options import Options
from .weights import WEIGHTS, parts_of

NAMES = ("target_tokens", "loss_mask")
Names: TypeAlias = Sequence[str]

_FIX = 'Pass them beside the labels: fit(x0, (labels, {"target_tokens": tokens})).'


class Batch(NamedTuple):
    """One batch.

    Attributes:
        x0: clean samples [B, ...].
        condition: what the backbone takes beside sample and time.
        targets: the caller's target tokens, by the names of their objectives.
        mask: of the terms, over samples [B] or tokens [B, N], or None.
        weights: of samples [B], or of places in them [B, ...], or None.
    """

    x0: Tensor
    condition: list[Tensor]
    targets: dict[str, Tokens]
    mask: Mask
    weights: Tensor | None


def read_batch(
    x: Any, y: Any, weights: Any, objectives: Mapping[str, Objective], listed: bool, names: Names
) -> Batch:
    """A batch from the parts of the data, which may be tuples and dicts.

    Dicts hold target tokens, a mask, and what has the name of an input. The other parts are samples
    and condition in their order.

    Args:
        x, y, weights: as Keras hands them to `compute_loss`.
        objectives: by name.
        listed: whether the user passed a list of objectives.
        names: of the backbone's inputs but for the time.

    Raises:
        ValueError: no samples, names of nothing, or target tokens that do not fit the objectives.
    """
    parts = [*parts_of(x), *parts_of(y)]
    named = _named([part for part in parts if isinstance(part, dict)], names)
    if weights is not None:
        named[WEIGHTS] = weights
    tensors = _in_order([part for part in parts if not isinstance(part, dict)], named, names)
    if not tensors or (isinstance(x, dict) and not set(names[:1]) & set(x)):
        raise invalid(
            "fit takes samples, or (samples, labels, ...)",
            type(x).__name__,
            f"Pass a tuple, or a dict by the names of inputs: {', '.join(names) or 'none'}.",
        )
    targets = _targets(named.get("target_tokens"), objectives, listed)
    return Batch(
        tensors[0],
        tensors[1:],
        targets,
        _tensor(named.get("loss_mask")),
        _tensor(_one_array(named.get(WEIGHTS))),
    )


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else ops.convert_to_tensor(value)


def _one_array(weights: Any) -> Any:
    if isinstance(weights, (list, tuple, dict)):
        raise invalid(
            "Sample weights must be one array",
            f"a {type(weights).__name__} of {len(weights)}",
            "Pass one weight for each sample.",
        )
    return weights


def _named(parts: list[dict[str, Any]], names: Names) -> dict[str, Any]:
    """The data by name, from all dicts together."""
    keys = [key for part in parts for key in part]
    if len(set(keys)) < len(keys) or not set(keys) <= {*NAMES, WEIGHTS, *names}:
        raise invalid(
            f"Data by name must be {' and '.join(NAMES)}, each once",
            ", ".join(map(repr, keys)),
            "Pass samples and labels by their places, or by the names of the backbone's inputs: "
            f"{', '.join(names) or 'with arrange= or a subclassed backbone there are none'}.",
        )
    return {key: value for part in parts for key, value in part.items()}


def _in_order(by_place: list[Any], named: Mapping[str, Any], names: Names) -> list[Tensor]:
    """Samples and condition: those with a name at its place, the others where places are left."""
    left = iter(by_place)
    found = []
    for name in names:
        value = named[name] if name in named else next(left, None)
        if value is None:
            break
        found.append(value)
    return [ops.convert_to_tensor(value) for value in (*found, *left)]


def _targets(given: Any, objectives: Mapping[str, Objective], listed: bool) -> dict[str, Tokens]:
    """The caller's target tokens, by the names of the objectives that take them."""
    wanted = with_source(objectives, Given)
    if not wanted and given is None:
        return {}
    if not wanted:
        raise invalid(
            "target_tokens must be of an objective that takes them",
            f"target_tokens, with {', '.join(objectives)}",
            "Leave them out of the data.",
        )
    if given is None:
        rule = f"The objective {wanted[0]!r} needs target_tokens with each batch"
        raise invalid(rule, "None", _FIX)
    if not listed and not isinstance(given, Mapping):
        given = {wanted[0]: given}
    if not isinstance(given, Mapping) or set(given) != set(wanted):
        received = f"those of {', '.join(given)}" if isinstance(given, Mapping) else "one array"
        entries = ", ".join(f'"{name}": tokens' for name in wanted)
        raise invalid(
            "target_tokens of a list of objectives must be a dict by their names",
            received,
            f'Pass {{"target_tokens": {{{entries}}}}}.',
        )
    return {name: ops.convert_to_tensor(tokens) for name, tokens in given.items()}


def check_inputs(backbone: keras.Model, batch: Batch, options: Options) -> None:
    """The batch fits the inputs of a functional backbone: raises ValueError otherwise."""
    if options.arrange is not None or not is_functional(backbone):
        return
    inputs = [tuple(each.shape) for each in backbone.inputs]
    if len(inputs) != len(batch.condition) + 2:
        raise invalid(
            "The backbone's inputs are x, t and the condition's parts",
            f"{len(batch.condition)} part(s) of a condition, for inputs of shapes {inputs}",
            "Pass labels: fit(x0, labels), or arrange=.",
        )
    if len(batch.x0.shape) != len(inputs[0]):
        raise invalid(
            "Samples must have the rank of the backbone's first input",
            f"shape {tuple(batch.x0.shape)} for {inputs[0]}",
            "Add or remove axes.",
        )


def input_names(backbone: keras.Model, options: Options) -> Names:
    """The names of a functional backbone's inputs, the sample's first, but for the time's.

    None where `arrange` says what the inputs are, or where they have no names.
    """
    if options.arrange is not None or not is_functional(backbone):
        return ()
    names = [each.name for each in backbone.inputs]
    return (*names[:1], *names[2:])
