"""Self-alignment for JAX models: pure functions on pytrees.

    projector = init_projector(key, width)             trained beside the model's parameters
    teacher = init_teacher(params)                     the EMA, in float32, and the number of steps
    value = align(loss, ..., x0, noise, t, y, key=key) the term, inside your own loss function
    teacher = update_teacher(loss, teacher, params)    after each optimizer step

An objective without an EMA teacher needs one function:

    value = term(loss, projector, student_tokens, target_tokens, step=step)

`params` is the pytree that your library has for a model: Linen's dicts, an `nnx.State` or a whole
`nnx.Module`, an `equinox.Module`, lists of arrays. Nothing here holds state. So everything can be
jitted, differentiated, mapped, donated, sharded and saved.

`loss` is one objective or a list of them. For a list, what belongs to one objective (tokens, the
head's parameters) is in a dict, by the objective's name.
"""

from .alignment import align
from .blocks import split_blocks
from .checking import check
from .equinox_models import tap_equinox
from .heads import init_projector
from .linen_models import tap_linen
from .nnx_models import tap_nnx
from .restoring import restore_teacher, teacher_state
from .tapped import Tapped
from .taps import tap
from .targets import teacher_tokens
from .teacher import Teacher, init_teacher, teacher_params, update_teacher
from .terms import metrics, term

__all__ = [
    "Tapped",
    "Teacher",
    "align",
    "check",
    "init_projector",
    "init_teacher",
    "metrics",
    "restore_teacher",
    "split_blocks",
    "tap",
    "tap_equinox",
    "tap_linen",
    "tap_nnx",
    "teacher_params",
    "teacher_state",
    "teacher_tokens",
    "term",
    "update_teacher",
]
