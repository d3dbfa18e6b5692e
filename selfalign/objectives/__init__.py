"""The objectives that selfalign has, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from .._checks import check_choice
from ..objective import Objective
from ..typing import Settings
from .layersync import LayerSyncLoss
from .repa import REPALoss
from .sra import SRALoss

__all__ = ["KINDS", "LayerSyncLoss", "REPALoss", "SRALoss", "from_settings"]

KINDS: Mapping[str, type[Objective]] = {
    kind.kind: kind for kind in (SRALoss, LayerSyncLoss, REPALoss)
}


def from_settings(settings: Settings) -> Objective:
    """The objective that `settings()` of any of these kinds describes.

    Raises:
        ValueError: an unknown kind, or settings that do not fit it.

    Example:
        >>> import selfalign
        >>> loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=16)
        >>> selfalign.objectives.from_settings(loss.settings()) == loss
        True
    """
    kind = settings.get("kind") if isinstance(settings, Mapping) else settings
    check_choice("kind", kind, tuple(KINDS))
    return KINDS[str(kind)].from_settings(settings)
