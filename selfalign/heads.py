"""Heads: small networks between the student's tokens and the target, used in training only.

A head holds settings, not weights. It names its parameters and their shapes, makes their initial
values out of draws that are passed in, and applies them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import ClassVar

from ._backend import dtype_of, is_floating, on_backend, ops
from ._checks import check_array, check_kind, check_mapping, check_number, invalid, set_frozen
from .distances import check_features
from .typing import Draws, Parameters, Tensor, Tokens

Shape = tuple[int, ...]


class Head:
    """Base of the heads, and the head that is none: tokens pass as they are.

    A head of your own overrides these four.

    Attributes:
        names: the names of its parameters.

    Example:
        >>> import selfalign
        >>> selfalign.heads.Head().apply({}, "tokens")
        'tokens'
    """

    names: ClassVar[tuple[str, ...]] = ()

    def draw_shapes(self, width: int, target_width: int) -> dict[str, Shape]:
        """Shapes of the draws that `init` needs, by name, in the order in which they are drawn.

        Args:
            width: feature width of the student's tokens.
            target_width: feature width of the target.
        """
        return {}

    def init(self, draws: Mapping[str, Draws]) -> dict[str, Tensor]:
        """The parameters' initial values, from draws uniform in [0, 1)."""
        return {}

    def apply(self, params: Parameters, tokens: Tokens) -> Tokens:
        """Tokens [B, N, target_width] from tokens [B, N, width]. No checks: see `project`."""
        return tokens


@dataclasses.dataclass(frozen=True)
class MLP(Head):
    """Linear layers with SiLU between them: Linear(D, H) - SiLU - ... - Linear(H, D').

    Kernels begin Xavier-uniform, biases at 0.

    Args:
        layers: number of linear layers, 2 in SRA and 3 in REPA.
        hidden: hidden width H; None: twice the width of the tokens.

    Raises:
        ValueError: fewer than two layers, or a hidden width below 1.

    Example:
        >>> import selfalign
        >>> selfalign.heads.MLP().draw_shapes(width=8, target_width=8)
        {'hidden_kernel': (8, 16), 'output_kernel': (16, 8)}

    Reference: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010.
    """

    names: ClassVar[tuple[str, ...]]  # of the object, but no setting
    _linear: ClassVar[tuple[str, ...]]  # the layers' names

    layers: int = 2
    hidden: int | None = None

    def __post_init__(self) -> None:
        layers = check_number("layers", self.layers, 2, integer=True)
        linear = ("hidden", *(f"hidden_{n}" for n in range(2, layers)), "output")
        names = tuple(f"{name}_{part}" for name in linear for part in ("kernel", "bias"))
        set_frozen(self, layers=layers, names=names, _linear=linear)
        if self.hidden is not None:
            set_frozen(self, hidden=check_number("hidden", self.hidden, 1, integer=True))

    def draw_shapes(self, width: int, target_width: int) -> dict[str, Shape]:
        """Shapes of the kernels, see `Head.draw_shapes`."""
        fix = "It is the feature width D of the student's block."
        width = check_number("width", width, 1, fix=fix, integer=True)
        target_width = check_number("target_width", target_width, 1, integer=True)
        hidden = self.hidden or 2 * width
        sizes = [width, *[hidden] * (self.layers - 1), target_width]
        names = [f"{name}_kernel" for name in self._linear]
        return dict(zip(names, itertools.pairwise(sizes), strict=True))

    def init(self, draws: Mapping[str, Draws]) -> dict[str, Tensor]:
        """Kernels and biases in the dtype of the draws, see `Head.init`."""
        made = {}
        for name in self._linear:
            kernel = _xavier(draws[f"{name}_kernel"])
            made[f"{name}_kernel"] = kernel
            made[f"{name}_bias"] = ops.zeros_like(kernel[0])
        return made

    def apply(self, params: Parameters, tokens: Tokens) -> Tokens:
        """The layers, with SiLU between them, see `Head.apply`."""
        for name in self._linear:
            if name != "hidden":
                tokens = ops.silu(tokens)
            tokens = ops.matmul(tokens, params[f"{name}_kernel"]) + params[f"{name}_bias"]
        return tokens


def _xavier(draws: Draws) -> Tensor:
    bound = math.sqrt(6.0 / sum(draws.shape))
    return ops.cast((2.0 * draws - 1.0) * bound, dtype_of(draws))


NONE = Head()
PROJECTOR = MLP()


@on_backend
def project(params: Parameters, tokens: Tokens) -> Tokens:
    """Apply an `MLP` head, such as SRA's projector: Linear(D, 2D) - SiLU - Linear(2D, D).

    Args:
        params: "hidden_kernel" [D, H], "hidden_bias" [H], "output_kernel" [H, D'], "output_bias"
            [D']; of a deeper head "hidden_2_kernel" [H, H] and so on between them.
        tokens: the student's tokens [B, N, D].

    Returns:
        Tokens [B, N, D'].

    Raises:
        ValueError: tokens of another width than the head's, not of shape [B, N, D], or empty.
        TypeError: integer tokens, or tensors of another framework.

    Example:
        >>> import numpy as np, selfalign
        >>> shapes = selfalign.heads.draw_shapes(width=4)
        >>> draws = [np.random.default_rng(0).random(shape) for shape in shapes]
        >>> params = selfalign.init_projector(*draws)
        >>> selfalign.project(params, np.ones((2, 3, 4), "float32")).shape == (2, 3, 4)
        True

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831: without a projector its FID rises from
    29.10 to 34.23.
    """
    check_features("student", tokens)
    check_mapping("params", params)
    head = MLP(max(2, len(params) // 2))
    check_params(head, params, tokens)
    return head.apply(params, tokens)


def check_params(head: Head, params: Parameters, tokens: Tokens) -> None:
    """The parameters are the head's, and fit the tokens: raises ValueError otherwise.

    Example:
        >>> import numpy as np, selfalign
        >>> selfalign.heads.check_params(selfalign.heads.NONE, {}, np.ones((2, 3, 4)))
    """
    if not isinstance(head, Head):
        check_kind("head", head, Head, "Pass one of selfalign.heads.")
    if not isinstance(params, Mapping):
        check_mapping("The head's parameters", params)
    if params.keys() != set(head.names):
        raise invalid(
            f"The head's parameters must be {', '.join(head.names) or 'none'}",
            ", ".join(sorted(map(str, params))) or "none",
            "Take them from selfalign.init_projector, or from the head's own init.",
        )
    for name in head.names:
        if not hasattr(params[name], "shape"):
            check_array(f"The head's {name}", params[name])
    kernel = params.get("hidden_kernel")
    if kernel is not None and tokens.shape[-1] != kernel.shape[0]:
        raise invalid(
            "Tokens must have the head's width",
            f"width {tokens.shape[-1]}, head of width {kernel.shape[0]}",
            "Build the head with width= the student block's output width.",
        )


def draw_shapes(width: int, hidden: int | None = None) -> tuple[Shape, ...]:
    """Shapes of the two draws of `init_projector`: (D, H) and (H, D), with H = 2D unless given.

    Example:
        >>> import selfalign
        >>> selfalign.heads.draw_shapes(768)
        ((768, 1536), (1536, 768))
    """
    return tuple(MLP(2, hidden).draw_shapes(width, width).values())


@on_backend
def init_projector(hidden_draws: Draws, output_draws: Draws) -> dict[str, Tensor]:
    """Initial parameters of SRA's projector, from draws; 4D^2 + 3D numbers.

    Args:
        hidden_draws: uniform in [0, 1), [D, H]; see `draw_shapes`.
        output_draws: uniform in [0, 1), [H, D].

    Returns:
        The `params` of `project`, in the dtype of the draws: Xavier-uniform kernels, zero biases.

    Raises:
        ValueError: draws that are not matrices, or do not fit each other.

    Example:
        >>> import numpy as np, selfalign
        >>> params = selfalign.init_projector(np.zeros((2, 4)), np.zeros((4, 2)))
        >>> sorted(params), float(params["hidden_kernel"][0, 0])
        (['hidden_bias', 'hidden_kernel', 'output_bias', 'output_kernel'], -1.0)

    Reference: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010.
    """
    for name, draws in (("hidden_draws", hidden_draws), ("output_draws", output_draws)):
        check_array(name, draws)
        if not is_floating(draws):
            raise TypeError(
                f"{name} must be floating point. Received: dtype {dtype_of(draws)}. Draw them "
                "uniform in [0, 1)."
            )
    hidden = tuple(hidden_draws.shape)
    output = tuple(output_draws.shape)
    if 0 in hidden + output or len(hidden) != 2 or len(output) != 2 or hidden[1] != output[0]:
        raise invalid(
            "The projector's draws must be matrices [D, H] and [H, D]",
            f"shapes {hidden} and {output}",
            "Draw them with the shapes of selfalign.heads.draw_shapes(width).",
        )
    return PROJECTOR.init({"hidden_kernel": hidden_draws, "output_kernel": output_draws})
