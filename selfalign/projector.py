"""The projector: a small network on the student's side, used in training only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ._backend import dtype_of, on_backend, ops
from ._checks import check_features, check_number, invalid

_NAMES = ("hidden_kernel", "hidden_bias", "output_kernel", "output_bias")


@on_backend
def project(params: Mapping[str, Any], tokens: Any) -> Any:
    """Project the student's tokens: Linear(D, 2D) - SiLU - Linear(2D, D).

    Args:
        params: "hidden_kernel" [D, H], "hidden_bias" [H], "output_kernel" [H, D'], "output_bias" [D'].
        tokens: the student's tokens [B, N, D].

    Returns:
        Tokens [B, N, D'].

    Raises:
        ValueError: tokens of another width than the projector's, not of shape [B, N, D], or empty.
        TypeError: integer tokens, or tensors of another framework.

    Example:
        >>> import numpy as np, selfalign
        >>> shapes = selfalign.projector.draw_shapes(width=4)
        >>> params = selfalign.init_projector(*(np.random.default_rng(0).random(shape) for shape in shapes))
        >>> selfalign.project(params, np.ones((2, 3, 4), "float32")).shape == (2, 3, 4)
        True

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831: without a projector its FID falls from 29.10 to 34.23.
    """
    if set(params) != set(_NAMES):
        raise invalid(f"The projector's parameters must be {', '.join(_NAMES)}", ", ".join(sorted(params)) or "none",
                      "Take them from selfalign.init_projector.")  # fmt: skip
    check_features("student", tokens)
    width = params["hidden_kernel"].shape[0]
    if tokens.shape[-1] != width:
        raise invalid("Tokens must have the projector's width", f"width {tokens.shape[-1]}, projector of width {width}",
                      "Build the projector with width= the student block's output width.")  # fmt: skip
    hidden = ops.silu(ops.matmul(tokens, params["hidden_kernel"]) + params["hidden_bias"])
    return ops.matmul(hidden, params["output_kernel"]) + params["output_bias"]


def draw_shapes(width: int, hidden: int | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the two draws that `init_projector` needs: (D, H) and (H, D), with H = 2D unless given.

    Example:
        >>> import selfalign
        >>> selfalign.projector.draw_shapes(768)
        ((768, 1536), (1536, 768))
    """
    width = check_number("width", width, 1, fix="It is the feature width D of the student's block.", integer=True)
    hidden = 2 * width if hidden is None else check_number("hidden", hidden, 1, integer=True)
    return (width, hidden), (hidden, width)


@on_backend
def init_projector(hidden_draws: Any, output_draws: Any) -> dict[str, Any]:
    """Initial projector parameters: Xavier-uniform kernels from passed-in draws, zero biases; 4D^2 + 3D numbers.

    Args:
        hidden_draws: uniform in [0, 1), [D, H]; see `draw_shapes`.
        output_draws: uniform in [0, 1), [H, D].

    Returns:
        The `params` of `project`, in the dtype of the draws.

    Raises:
        ValueError: draws that are not matrices, or do not fit each other.

    Example:
        >>> import numpy as np, selfalign
        >>> params = selfalign.init_projector(np.zeros((2, 4)), np.zeros((4, 2)))
        >>> sorted(params), float(params["hidden_kernel"][0, 0])
        (['hidden_bias', 'hidden_kernel', 'output_bias', 'output_kernel'], -1.0)

    Reference: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.
    """
    shapes = tuple(hidden_draws.shape), tuple(output_draws.shape)
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][0]:
        raise invalid("The projector's draws must be matrices [D, H] and [H, D]", f"shapes {shapes[0]} and {shapes[1]}",
                      "Draw them with the shapes of selfalign.projector.draw_shapes(width).")  # fmt: skip
    hidden_kernel, output_kernel = _xavier(hidden_draws), _xavier(output_draws)
    return {
        "hidden_kernel": hidden_kernel,
        "hidden_bias": ops.zeros_like(hidden_kernel[0]),
        "output_kernel": output_kernel,
        "output_bias": ops.zeros_like(output_kernel[0]),
    }


def _xavier(draws: Any) -> Any:
    return ops.cast((2.0 * draws - 1.0) * math.sqrt(6.0 / sum(draws.shape)), dtype_of(draws))
