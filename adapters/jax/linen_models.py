"""Models of Flax Linen, tapped as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .by_name import ByName, Loss
from .marks import Traced
from .tapped import EVALUATION, Blocks, Paths, Select, Tapped


def tap_linen(
    loss: Loss,
    model: Any,
    blocks: Paths,
    *,
    select: Select = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Tapped:
    """Tap a Linen model that nobody edited: the student's call, and the teacher's `apply`.

    The teacher runs in evaluation mode, whatever mode the student's call is in: `train`,
    `training`, `is_training`, `deterministic`, `inference` and `use_running_average` are set in all
    modules, where they are arguments and where they are fields. It stops at its layer, also in a
    model that scans over its blocks.

    Args:
        loss, select: see `tap_nnx`.
        model: the module.
        blocks: the path of the blocks, with {} for their numbers, "block_{}", "blocks/layer_{}", or
            as in `tap_nnx`.
        evaluation: further arguments or fields by which modules are in evaluation mode.

    Returns:
        `student` and `apply`, see `Tapped`. They take the parameters, or variables in which
        "params" is one of the collections, then the inputs and what else `model.apply` takes:
        `rngs=`, `mutable=`, `method=`.

    Raises:
        ValueError, TypeError: as in `tap_nnx`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, t):
        ...         for i in range(3):
        ...             x = nn.Dense(4, name=f"block_{i}")(x) + t[:, None, None]
        ...         return x
        >>> model, inputs = Model(), (jnp.ones((2, 5, 4)), jnp.ones(2))
        >>> params = model.init(jax.random.key(0), *inputs)["params"]
        >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
        >>> student, apply = sra.tap_linen(loss, model, "block_{}")
        >>> prediction, tokens = student(params, *inputs)
        >>> prediction.shape, tokens.shape
        ((2, 5, 4), (2, 5, 4))
    """
    _check_module(model)
    tapped = Blocks(loss, blocks, select)
    set_to = EVALUATION | dict(evaluation or {})

    def traced(
        params: Any, inputs: Any, named: Any, set_to: Mapping[str, Any]
    ) -> tuple[Traced, set[str]]:
        import flax.linen as nn

        ran: set[str] = set()

        def forward(params: Any, inputs: Any, named: Any) -> Any:
            variables = params if "params" in params else {"params": params}
            with nn.intercept_methods(_interceptor(tapped, set_to, ran)):
                return model.apply(variables, *inputs, **named)

        return Traced(forward, params, inputs, named), ran

    def student(params: Any, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        return tapped.student(*traced(params, inputs, named, {}))

    def apply(params: Any, *inputs: Any, **named: Any) -> ByName:
        tapped.check_teacher()
        return tapped.teacher(*traced(params, inputs, named, set_to))

    return Tapped(student, apply)


def _check_module(model: Any) -> None:
    import flax.linen as nn

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a flax.linen.Module. Received: {type(model).__name__}. Pass the module "
            "itself, without its variables."
        )


def _interceptor(blocks: Blocks, set_to: Mapping[str, Any], ran: set[str]) -> Callable[..., Any]:
    """What runs around each method: sets a module's mode, and marks what blocks return."""
    running: list[str] = []

    def intercept(call: Any, inputs: Any, named: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*inputs, **named)
        path = "/".join(context.module.path)
        ran.add(path)
        given = _in_mode(context, inputs, named, set_to)
        if not blocks.have(path) or path in running:  # a transformed module runs in itself
            return call(*given.args, **given.kwargs)
        running.append(path)
        try:
            output = call(*given.args, **given.kwargs)
        finally:
            running.pop()
        blocks.marked(output, path)
        return output

    return intercept


def _in_mode(
    context: Any, inputs: Any, named: Any, set_to: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The module's arguments in this mode; fields that say one are set."""
    signature = inspect.signature(context.orig_method)
    given = signature.bind_partial(*inputs, **named)
    for name, value in set_to.items():
        if getattr(context.module, name, None) is not None:
            object.__setattr__(context.module, name, value)
        elif name in signature.parameters:
            given.arguments[name] = value
    return given
