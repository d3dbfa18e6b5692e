"""selfalign: self-alignment of diffusion transformers, in any framework.

The core is pure arithmetic on `keras.ops`; importing it imports no framework. Adapters live in
`selfalign.adapters`, what looks at a model's features in `selfalign.diagnostics`.
"""

from typing import NoReturn

from . import (
    distances,
    heads,
    layers,
    metrics,
    normalise,
    objectives,
    paths,
    plateau,
    presets,
    schedules,
    sources,
    time_gap,
)
from .ema import ema_update
from .heads import init_projector, project
from .objective import Objective, TokenObjective
from .objectives import LayerSyncLoss, REPALoss, SRALoss
from .presets import preset_layers
from .time_gap import teacher_time

__version__ = "0.1.0"

__all__ = [
    "LayerSyncLoss",
    "Objective",
    "REPALoss",
    "SRALoss",
    "TokenObjective",
    "distances",
    "ema_update",
    "heads",
    "init_projector",
    "layers",
    "metrics",
    "normalise",
    "objectives",
    "paths",
    "plateau",
    "preset_layers",
    "presets",
    "project",
    "schedules",
    "sources",
    "teacher_time",
    "time_gap",
]

_RENAMED = {"targets": "layers", "projector": "heads", "teacher": "ema", "loss": "objectives"}


def __getattr__(name: str) -> NoReturn:
    if name in _RENAMED:
        raise AttributeError(
            "A module must be called by its present name. Received: "
            f"selfalign.{name}. Write selfalign.{_RENAMED[name]}."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
