"""SRA: the teacher's time, the EMA's decay, and the whole method at a glance."""

import numpy as np
import pytest
from support import PATHS, array, tensor

from selfalign import SRALoss, heads, paths, schedules, sources
from selfalign.time_gap import teacher_time

ALL = pytest.mark.parametrize("name", PATHS)


def make(**settings):
    return SRALoss(**({"student_layer": 1, "teacher_layer": 2} | settings))


@ALL
def test_the_loss_moves_time_with_its_own_settings(name):
    path, _ = PATHS[name]
    t = tensor(np.array([7, 500]) if path.discrete else np.array([0.3, 0.5], "float32"))
    u = tensor([0.1, 0.9])
    loss = make(path=path, max_gap=0.3)
    assert np.array_equal(array(loss.teacher_time(t, u)), array(teacher_time(path, t, u, 0.3)))
    fixed = make(path=path, max_gap=0.3, random_gap=False)
    wanted = teacher_time(path, t, None, 0.3, random_gap=False)
    assert np.array_equal(array(fixed.teacher_time(t, u)), array(wanted))


def test_gap_zero_same_layer_same_weights_no_projector_is_zero():
    loss = make(student_layer=2, allow_same_layer=True, max_gap=0)
    rng = np.random.default_rng(0)
    x0, noise, t, u = (tensor(rng.random(shape)) for shape in ((4, 3), (4, 3), (4,), (4,)))
    weight = tensor(rng.normal(size=(3, 6)))

    def network(x):
        return (x @ weight).reshape((4, 2, 3))

    moved = loss.teacher_time(t, u)
    student = network(loss.path.add_noise(x0, noise, t))
    teacher = network(loss.path.add_noise(x0, noise, moved))
    assert array(loss(student, teacher)) == 0


def test_the_decay_follows_the_step():
    assert make().decay_at(3) == 0.9999
    loss = make(decay=schedules.DecayWarmup(0.999))
    assert (loss.decay_at(0), loss.decay_at(10**9)) == (0.1, 0.999)
    assert make(decay=schedules.Every(2, 0.9)).decay_at(0) == 1.0


def test_a_constant_decay_keeps_its_digits_at_tensor_steps():
    """As a float32 tensor, 1 - 0.9999 would be wrong in the fourth digit."""
    assert make().decay_at(tensor(np.array(3))) == 0.9999


def test_the_source_is_an_ema_teacher_with_the_losss_settings():
    loss = make(path="cosine", max_gap=0.3, random_gap=False, decay=0.99)
    wanted = sources.EMATeacher(layer=2, path=paths.Cosine(), max_gap=0.3, random_gap=False)
    assert loss.source == sources.EMATeacher(**{**vars_of(wanted), "decay": 0.99})
    assert loss.head == heads.PROJECTOR


def vars_of(source):
    return {name: getattr(source, name) for name in ("layer", "path", "max_gap", "random_gap")}


def test_settings_are_checked_and_plain_after_construction():
    loss = make(path="discrete", weight=1, decay=0.5)
    assert loss.path == paths.Discrete()
    assert loss.weight == schedules.Constant(1)
    assert loss.decay == schedules.Constant(0.5)
