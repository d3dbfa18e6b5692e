"""REPA: the tokens of a frozen encoder, which the caller runs, are the target."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .. import heads
from .._checks import check_number, set_frozen
from ..objective import TokenObjective
from ..sources import Given


@dataclasses.dataclass(frozen=True, kw_only=True)
class REPALoss(TokenObjective):
    """Representation Alignment (REPA): a layer is pulled toward the tokens of a frozen encoder.

        weight * mean_i (1 - cos( head(student_i), stop_gradient(encoder_i) ))

    The encoder is yours: run it on the clean images, and pass its tokens [B, N, width] with each
    batch. It must give as many tokens as the model has.

    Args:
        student_layer: after block n, counted from 1, or a fraction of the depth such as 0.3.
        width: of the encoder's tokens.
        weight: weight of the term, a number or a schedule of the step.
        distance: see `SRALoss`.
        beta: see `SRALoss`.
        normalise: of the target, see `SRALoss`.
        hidden: hidden width of the head, Linear - SiLU - Linear - SiLU - Linear.
        name: tells two objectives of one model apart; default "repa".

    Raises:
        ValueError: a setting outside its range, or a name that does not exist.
        TypeError: a setting of the wrong type.

    Example:
        >>> import numpy as np, selfalign
        >>> loss = selfalign.REPALoss(student_layer=8, width=2, weight=0.5)
        >>> projected, encoder = np.array([[[1.0, 0.0]]]), np.array([[[0.0, 1.0]]])  # [B, N, width]
        >>> float(loss(projected, encoder))
        0.5

    Reference: Yu et al., "Representation Alignment for Generation: Training Diffusion Transformers
    Is Easier Than You Think", 2024, arXiv 2410.06940.
    """

    kind: ClassVar[str] = "repa"
    source: ClassVar[Given]

    width: int
    hidden: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        source = Given(width=self.width)
        hidden = check_number("hidden", self.hidden, 1, integer=True)
        head = heads.MLP(layers=3, hidden=hidden)
        set_frozen(self, source=source, head=head, width=source.width, hidden=head.hidden)
