"""Models of Equinox, tapped as they are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from .by_name import ByName, Loss
from .marking import set_marking
from .marks import Traced
from .tapped import Blocks, Paths, Select, Tapped, evaluation_arguments, itself
from .trees import path_of


def tap_equinox(
    loss: Loss,
    blocks: Paths,
    *,
    select: Select = None,
    module: Callable[[Any], Any] = itself,
    call: Callable[[Any], Callable[..., Any]] = itself,
    evaluation: Mapping[str, Any] | None = None,
) -> Tapped:
    """Tap an Equinox model that nobody edited: the student's call, and the teacher's `apply`.

    The teacher runs in inference mode, whatever mode the model is in. It stops at its layer, also
    in a model that scans over its blocks.

    Args:
        loss, blocks, select: see `tap_nnx`. Blocks are modules, not functions; without {} the
            path is that of stacked blocks, over which a `jax.lax.scan` runs.
        module: (params) -> the module, where you differentiate with respect to something else:
            lambda params: eqx.combine(params, static).
        call: (model) -> what is called with the batch; `jax.vmap` for a model of one sample.
        evaluation: arguments by which the model's call is in evaluation mode, such as
            {"key": None}. `inference`, `train`, `deterministic` and the like are known.

    Returns:
        `student` and `apply`, see `Tapped`; they take the module and its inputs.

    Raises:
        ValueError, TypeError: as in `tap_nnx`.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> class Model(eqx.Module):  # of one sample [N, D]
        ...     blocks: list
        ...     def __call__(self, x, t):
        ...         for block in self.blocks:
        ...             x = jax.vmap(block)(x) + t
        ...         return x
        >>> model = Model([eqx.nn.Linear(4, 4, key=jax.random.key(i)) for i in range(3)])
        >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
        >>> student, apply = sra.tap_equinox(loss, "blocks/{}", call=jax.vmap)
        >>> prediction, tokens = student(model, jnp.ones((2, 5, 4)), jnp.ones(2))
        >>> prediction.shape, tokens.shape
        ((2, 5, 4), (2, 5, 4))
    """
    tapped = Blocks(loss, blocks, select)

    def student(params: Any, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        model = module(params)
        modules = _modules(model)

        def forward(model: Any, inputs: Any, named: Any) -> Any:
            return call(_marked(model, modules, tapped))(*inputs, **named)

        return tapped.student(Traced(forward, model, inputs, named), modules)

    def apply(params: Any, *inputs: Any, **named: Any) -> ByName:
        import equinox as eqx

        tapped.check_teacher()
        model = module(params)
        modules = _modules(model)
        own = evaluation_arguments(type(model).__call__, evaluation or {})

        def forward(model: Any, inputs: Any, named: Any) -> Any:
            still = _marked(eqx.nn.inference_mode(model), modules, tapped)
            # bound before the call is mapped: they are none of a sample's
            bound = functools.partial(still, **own) if own else still
            return call(bound)(*inputs, **named)

        return tapped.teacher(Traced(forward, model, inputs, named), modules)

    return Tapped(student, apply)


def _modules(model: Any) -> dict[str, Any]:
    """All modules by the paths at which the model holds them."""
    import equinox as eqx

    if not isinstance(model, eqx.Module):
        raise TypeError(
            f"The model must be an equinox.Module. Received: {type(model).__name__}. For its "
            "arrays pass module=lambda params: eqx.combine(params, static)."
        )
    found: dict[str, Any] = {}

    def walk(node: Any, before: tuple[Any, ...]) -> None:
        def is_below(each: Any) -> bool:
            return each is not node and isinstance(each, eqx.Module)

        for path, each in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_below):
            if is_below(each):
                found[path_of((*before, *path))] = each
                walk(each, (*before, *path))

    walk(model, ())
    return found


def _marked(model: Any, modules: Mapping[str, Any], blocks: Blocks) -> Any:
    """The model with copies of its blocks in their places, which mark what they return."""
    import equinox as eqx

    paths = [path for path in modules if blocks.have(path)]
    if not paths:
        return model

    def places(model: Any) -> list[Any]:
        found = _modules(model)
        return [found[path] for path in paths]

    copies = [copy.copy(each) for each in places(model)]
    for path, each in zip(paths, copies, strict=True):
        set_marking(each, blocks, path)
    return eqx.tree_at(places, model, copies)
