"""What `fit` hands to a step: samples, condition, target tokens and a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
from keras import ops

from selfalign.adapting import Given, Mask, Objective, Tensor, Tokens, invalid, with_source

from .blocks import is_functional
from .options import Options

NAMES = ("target_tokens", "loss_mask")
_FIX = 'Pass them beside the labels: fit(x0, (labels, {"target_tokens": tokens})).'


class Batch(NamedTuple):
    """One batch.

    Attributes:
        x0: clean samples [B, ...].
        condition: what the backbone takes beside sample and time.
        targets: the caller's target tokens, by the names of their objectives.
        mask: of the terms, over samples [B] or tokens [B, N], or None.
    """

    x0: Tensor
    condition: list[Tensor]
    targets: dict[str, Tokens]
    mask: Mask


def read_batch(x: Any, y: Any, objectives: Mapping[str, Objective], listed: bool) -> Batch:
    """A batch from the two parts of the data, both of which may be tuples.

    A dict among the parts holds target tokens and a mask. The others are samples and condition.

    Args:
        x, y: as Keras hands them to `compute_loss`.
        objectives: by name.
        listed: whether the user passed a list of objectives.

    Raises:
        ValueError: no samples, or target tokens that do not fit the objectives.
    """
    parts = [*_parts(x), *_parts(y)]
    named = _named([part for part in parts if isinstance(part, dict)])
    tensors = [ops.convert_to_tensor(part) for part in parts if not isinstance(part, dict)]
    if isinstance(x, dict) or not tensors:
        raise invalid(
            "fit takes samples, or (samples, labels, ...)",
            type(x).__name__,
            "Pass a tuple, and arrange= for names.",
        )
    targets = _targets(named.get("target_tokens"), objectives, listed)
    mask = named.get("loss_mask")
    mask = None if mask is None else ops.convert_to_tensor(mask)
    return Batch(tensors[0], tensors[1:], targets, mask)


def _parts(side: Any) -> list[Any]:
    if side is None:
        return []
    return list(side) if isinstance(side, (list, tuple)) else [side]


def _named(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The data by name, from all dicts together."""
    keys = [key for part in parts for key in part]
    if len(set(keys)) < len(keys) or not set(keys) <= set(NAMES):
        raise invalid(
            f"Data by name must be {' and '.join(NAMES)}, each once",
            ", ".join(map(repr, keys)),
            "Pass samples and labels by their places, and arrange= for inputs by name.",
        )
    return {key: value for part in parts for key, value in part.items()}


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
