"""Models of Flax NNX, tapped as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .by_name import ByName, Loss
from .marking import set_marking
from .marks import Traced
from .tapped import Blocks, Paths, Select, Tapped, evaluation_arguments, itself


def tap_nnx(
    loss: Loss,
    blocks: Paths,
    *,
    select: Select = None,
    module: Callable[[Any], Any] = itself,
    call: Callable[[Any], Callable[..., Any]] = itself,
    evaluation: Mapping[str, Any] | None = None,
) -> Tapped:
    """Tap an NNX model that nobody edited: the student's call, and the teacher's `apply`.

    The teacher runs in evaluation mode, whatever mode the model is in, on a copy: dropout is off,
    batch norm has its running averages, and no random stream moves. It stops at its layer, also in
    a model that scans over its blocks.

    Args:
        loss: the objective, which has the layers, or a list of them.
        blocks: the path of the blocks, with {} for their numbers, "blocks/{}". Layers are counted
            from 1, in the order in which blocks run. Without {} it is one module that runs often:
            the stacked blocks of `nnx.scan`. Two paths name the student's module and the target's.
        select: of blocks that return several arrays, which one the tokens are: its place or name,
            or a function of what the block returns.
        module: (params) -> the module, where you differentiate with respect to something else:
            lambda params: nnx.merge(graph, params, rest).
        call: (model) -> what is called, where that is not the model itself: a method, say.
        evaluation: arguments by which the model's call is in evaluation mode. `train`, `training`,
            `is_training`, `deterministic` and `inference` are known.

    Returns:
        `student` and `apply`, see `Tapped`; they take the module and its inputs.

    Raises:
        ValueError: no block runs there, and the message lists the model's modules; layers that do
            not fit their number; a block that returns several arrays.
        TypeError: `blocks` or `select` of another type, or no NNX module.

    Example:
        >>> import jax, jax.numpy as jnp, selfalign
        >>> from flax import nnx
        >>> from selfalign.adapters import jax as sra
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        ...     def __call__(self, x, t):
        ...         for block in self.blocks:
        ...             x = block(x) + t[:, None, None]
        ...         return x
        >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
        >>> student, apply = sra.tap_nnx(loss, "blocks/{}")
        >>> prediction, tokens = student(Model(nnx.Rngs(0)), jnp.ones((2, 5, 4)), jnp.ones(2))
        >>> prediction.shape, tokens.shape
        ((2, 5, 4), (2, 5, 4))
    """
    tapped = Blocks(loss, blocks, select)

    def student(params: Any, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        model = module(params)
        nnx = _nnx_of(model)
        graph, state = nnx.split(model)

        def forward(state: Any, inputs: Any, named: Any) -> tuple[Any, Any]:
            before = {path: each.get_value() for path, each in nnx.to_flat_state(state)}
            copied = nnx.merge(graph, state)
            _mark(nnx, copied, tapped)
            output = call(copied)(*inputs, **named)
            return output, _changed(nnx, copied, before)

        traced = Traced(forward, state, inputs, named)
        (output, changed), *tokens = tapped.student(traced, _modules(nnx, model))
        nnx.update(model, changed)
        return (output, *tokens)

    def apply(params: Any, *inputs: Any, **named: Any) -> ByName:
        model = module(params)
        nnx = _nnx_of(model)
        tapped.check_teacher()
        graph, state = nnx.split(model)
        own = evaluation_arguments(type(model).__call__, evaluation or {})

        def forward(state: Any, inputs: Any, named: Any) -> Any:
            copied = nnx.merge(graph, state)
            copied.eval(train=False, training=False)
            _mark(nnx, copied, tapped)
            return call(copied)(*inputs, **named)

        traced = Traced(forward, state, inputs, named | own)
        return tapped.teacher(traced, _modules(nnx, model))

    return Tapped(student, apply)


def _nnx_of(model: Any) -> Any:
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"The model must be an nnx.Module. Received: {type(model).__name__}. For a "
            "state pass module=lambda params: nnx.merge(graph, params, rest)."
        )
    return nnx


def _modules(nnx: Any, model: Any) -> dict[str, Any]:
    """All modules by their paths."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _mark(nnx: Any, model: Any, blocks: Blocks) -> None:
    for path, module in _modules(nnx, model).items():
        if blocks.have(path):
            set_marking(module, blocks, path)


def _changed(nnx: Any, model: Any, before: Mapping[Any, Any]) -> Any:
    """What the forward changed: counts of random streams, running averages."""

    def is_new(path: Any, each: Any) -> bool:
        return path in before and each.get_value() is not before[path]

    return nnx.filter_state(nnx.state(model), is_new)
