"""What the tables of refusals share: short ways to call the core, and sentences that recur."""

import numpy as np
from support import tensor

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, heads, paths, time_gap

NUMBER = "Pass a Python int or float."
BOUNDS = "Pass a value inside these bounds."
SETTINGS = "Take them from settings()."
SPELLING = "Check the spelling."
SKIP = "Skip empty batches in the training loop."
CONVERT = "Convert it first."
OLD_VALUE = "It is the weight of the old value, 0.9999 in the paper."
GAP = "It is a fraction of the path's time axis, 0.2 in the paper."


class Foreign:
    """An array of a framework that Keras does not run on."""


class Other:
    """An array of one more."""


def sra(**settings):
    return SRALoss(**({"student_layer": 1, "teacher_layer": 2} | settings))


def layersync(**settings):
    return LayerSyncLoss(**({"student_layer": 1, "teacher_layer": 2} | settings))


def repa(**settings):
    return REPALoss(**({"student_layer": 1, "width": 4, "hidden": 6} | settings))


def tokens(*shape, dtype="float32"):
    return tensor(np.ones(shape), dtype)


def ones(*shape):
    return tensor(np.ones(shape))


def both(*shape):
    """Tokens of the student and of the target."""
    return tokens(*shape), tokens(*shape)


def move(t, u=(0.5, 0.5), path=None, **options):
    """The teacher's time of `t`."""
    path = path or paths.Linear()
    return time_gap.teacher_time(path, tensor(np.array(t)), tensor(np.array(u)), **options)


def mix(x0=(2, 3), noise=(2, 3), t=(0.5, 0.5), path=None):
    """The noisy sample of ones."""
    return (path or paths.Linear()).add_noise(ones(*x0), ones(*noise), tensor(np.array(t)))


def less(x0=(2, 3), noise=(2, 3), t=(0.5, 0.5), u=(0.5, 0.5), path=None):
    """What a teacher sees of ones."""
    u = None if u is None else tensor(np.array(u))
    path = path or paths.Linear()
    return path.add_less_noise(ones(*x0), ones(*noise), tensor(np.array(t)), u, 0.2)


def ema(teacher, student, decay=0.5):
    return selfalign.ema_update(teacher, student, decay)


def projector(width):
    return selfalign.init_projector(*(ones(*shape) for shape in heads.draw_shapes(width)))


def project(width, tokens_width):
    return selfalign.project(projector(width), ones(2, 3, tokens_width))
