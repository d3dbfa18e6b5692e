"""selfalign: Self-Representation Alignment (SRA) for diffusion transformers, in any framework.

The core is pure arithmetic on `keras.ops`; importing it imports no framework. Adapters live in `selfalign.adapters`, what looks
at a model's features in `selfalign.diagnostics`.
"""

from . import distances, paths, plateau, projector, schedules, targets, time_gap
from .loss import SRALoss
from .projector import init_projector, project
from .targets import preset_layers
from .teacher import ema_update
from .time_gap import teacher_time

__version__ = "0.1.0"

__all__ = [
    "SRALoss",
    "distances",
    "ema_update",
    "init_projector",
    "paths",
    "plateau",
    "preset_layers",
    "project",
    "projector",
    "schedules",
    "targets",
    "teacher_time",
    "time_gap",
]
