"""The heads' first parameters: a projector, or what else an objective has on the student's side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

from selfalign.adapting import PROJECTOR, head_shapes, init_head, named_objectives, on_backend

from .by_name import Loss, is_list
from .keys import check_key, own_stream


def init_projector(
    key: jax.Array, width: int, dtype: DTypeLike = "float32", loss: Loss | None = None
) -> dict[str, Any]:
    """The head's first parameters, to be trained beside the model's.

    SRA's is the projector: Linear(D, 2D) - SiLU - Linear(2D, D).

    Args:
        key: a JAX key.
        width: feature width D of the tapped blocks; a Python int, also inside jit.
        dtype: of the parameters; `term` computes in the tokens' dtype whatever it is.
        loss: the objective, or a list of them, whose head it is; None stands for SRA's projector.

    Returns:
        "hidden_kernel" [D, 2D], "hidden_bias" [2D], "output_kernel" [2D, D] and "output_bias" [D];
        other heads have other parameters, and an objective without a head has {}. For a list, a
        dict of these, by the objectives' names.

    Raises:
        TypeError: no JAX key, a width that is no Python int (a traced one, say), no objective.
        ValueError: a width below 1, an empty list, two objectives of one name.

    Example:
        >>> import jax, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> key = jax.random.key(0)
        >>> sra.init_projector(key, width=8)["hidden_kernel"].shape
        (8, 16)
        >>> repa = selfalign.REPALoss(student_layer=2, width=768, hidden=32)
        >>> sra.init_projector(key, width=8, loss=repa)["output_kernel"].shape
        (32, 768)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    check_key(key)
    key = own_stream(key)
    if loss is None:
        draws = _draw(key, PROJECTOR.draw_shapes(width, width))
        return _cast(on_backend(PROJECTOR.init)(draws), dtype)
    heads = {}
    for place, (name, objective) in enumerate(named_objectives(loss).items()):
        own_key = jax.random.fold_in(key, place) if is_list(loss) else key
        draws = _draw(own_key, head_shapes(objective, width))
        heads[name] = _cast(init_head(objective, draws), dtype)
    return heads if is_list(loss) else next(iter(heads.values()))


def _draw(key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Numbers uniform in [0, 1)."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(own_key, shape, "float32")
        for own_key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _cast(params: Mapping[str, jax.Array], dtype: DTypeLike) -> dict[str, jax.Array]:
    return {name: value.astype(dtype) for name, value in params.items()}
