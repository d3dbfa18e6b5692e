"""LayerSync: a later layer of the same forward is the target."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from .. import heads, layers
from .._checks import check_switch, set_frozen
from ..objective import TokenObjective
from ..schedules import Schedule
from ..sources import LaterLayer
from ..typing import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSyncLoss(TokenObjective):
    """LayerSync: an early layer is pulled toward a later one of the same forward.

        weight * mean_i (1 - cos( student_i, stop_gradient(later_i) ))

    It needs no teacher, no second forward and no head.

    Args:
        student_layer: after block n, counted from 1, or a fraction of the depth such as 0.33.
        teacher_layer: the target's layer; later than the student's.
        weight: weight of the term, a number or a schedule of the step.
        distance: see `SRALoss`.
        beta: see `SRALoss`.
        normalise: of the target, see `SRALoss`.
        projector: True puts SRA's projector on the student's side.
        name: tells two objectives of one model apart; default "layersync".

    Raises:
        ValueError: a setting outside its range, or a name that does not exist.
        TypeError: a setting of the wrong type.

    Example:
        >>> import numpy as np, selfalign
        >>> loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=16, weight=0.5)
        >>> student, later = np.array([[[1.0, 0.0]]]), np.array([[[0.0, 1.0]]])  # [B, N, D]
        >>> float(loss(student, later))
        0.5

    Reference: Haghighi et al., "LayerSync: Self-aligning Intermediate Layers", 2025, arXiv
    2510.12581.
    """

    kind: ClassVar[str] = "layersync"
    source: ClassVar[LaterLayer]

    teacher_layer: Layer
    weight: Schedule | float | Any = 0.2
    projector: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        source = LaterLayer(layer=self.teacher_layer)
        layers.check_order_where_known(self.student_layer, source.layer, allow_same_layer=False)
        projector = check_switch("projector", self.projector)
        head = heads.PROJECTOR if projector else heads.NONE
        set_frozen(self, projector=projector)
        set_frozen(self, source=source, head=head, teacher_layer=source.layer)
