"""The heads' variables, which are trained beside the backbone's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import keras
from keras import ops

from selfalign.adapting import Objective, Tensor, Tokens, head_shapes, init_head, invalid

from .forwards import Forwards

Head: TypeAlias = dict[str, keras.Variable]
"""The variables of one head, by the core's names."""


def add_heads(
    model: keras.Model,
    objectives: Mapping[str, Objective],
    forwards: Forwards,
    draws: keras.random.SeedGenerator,
) -> dict[str, Head]:
    """Add the heads of all objectives to `model`, which trains and saves them.

    Raises:
        ValueError: a head whose width is not known.
    """
    heads = {}
    for name, objective in objectives.items():
        width = forwards.width(name)
        if width is None and objective.head.names:
            raise invalid(
                "The width of the tapped blocks must be known",
                f"a backbone that does not tell it, and the objective {name!r}, which has a head",
                "Pass width=D.",
            )
        heads[name] = _add_head(model, name, objective, width, draws) if width else {}
    return heads


def _add_head(
    model: keras.Model,
    name: str,
    objective: Objective,
    width: int,
    draws: keras.random.SeedGenerator,
) -> Head:
    shapes = head_shapes(objective, width)
    drawn = {part: keras.random.uniform(shape, seed=draws) for part, shape in shapes.items()}
    head = {}
    for part, value in init_head(objective, drawn).items():
        shape = tuple(value.shape)
        head[part] = model.add_weight(shape=shape, dtype="float32", name=f"{name}_{part}")
        head[part].assign(value)
    return head


def values(head: Head, tokens: Tokens) -> dict[str, Tensor]:
    """A head's parameters in the precision of the tokens that it is applied to."""
    return {part: ops.cast(variable, tokens.dtype) for part, variable in head.items()}
