"""Metrics: what an objective logs of the tokens that it compares."""

import dataclasses

import numpy as np
import oracle
import pytest
from support import FLOATS, array, dtype_of, is_tensor, tensor

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, schedules

NAMES = {
    "distance",
    "cosine",
    "student_norm",
    "teacher_norm",
    "student_finite",
    "teacher_finite",
}
KINDS = {
    "sra": lambda **options: SRALoss(student_layer=1, teacher_layer=2, **options),
    "layersync": lambda **options: LayerSyncLoss(student_layer=1, teacher_layer=2, **options),
    "repa": lambda **options: REPALoss(student_layer=1, width=4, hidden=8, **options),
}
EACH_KIND = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def tensors(dtype=None):
    rng = np.random.default_rng(0)
    return [tensor(x, dtype) for x in rng.normal(size=(2, 2, 3, 4))]


@EACH_KIND
@pytest.mark.parametrize("dtype", FLOATS)
def test_metrics_equal_the_oracle(make, dtype):
    student, target = tensors(dtype)
    s, t = array(student), array(target)
    info = make(distance="l2", weight=7).metrics(student, target)
    assert set(info) == NAMES
    wanted = {
        "distance": oracle.l2(s, t).mean(),
        "cosine": 1 - oracle.cosine(s, t).mean(),
        "student_norm": np.linalg.norm(s, axis=-1).mean(),
        "teacher_norm": np.linalg.norm(t, axis=-1).mean(),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(array(info[name]), value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert array(info["student_finite"]).all()
    assert array(info["teacher_finite"]).all()
    assert all(is_tensor(value) and tuple(value.shape) == () for value in info.values())
    assert {dtype_of(value) for value in info.values()} == {"float32", "bool"}


@EACH_KIND
def test_metrics_do_not_depend_on_the_weight_or_need_a_step(make):
    scheduled = make(weight=schedules.Stop(0)).metrics(*tensors())
    plain = make(weight=0.5).metrics(*tensors())
    assert array(scheduled["distance"]) == array(plain["distance"]) > 0


@pytest.mark.parametrize("normalise", ["standardise", "centre"])
def test_the_distance_is_that_of_the_term_and_the_norms_are_the_models(normalise):
    """A normalised target changes the distance; what is logged of the tokens is what they are."""
    student, target = tensors()
    loss = KINDS["sra"](normalise=normalise, weight=1.0)
    info = loss.metrics(student, target)
    plain = KINDS["sra"]().metrics(student, target)
    assert array(info["distance"]) == array(loss(student, target))
    assert array(info["distance"]) != array(plain["distance"])
    for name in NAMES - {"distance"}:
        assert array(info[name]) == array(plain[name]), name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Short(selfalign.Objective):
    """An objective without a target: tokens shall be short."""

    kind = "short"
    source = selfalign.sources.Nothing()

    def compare(self, student, target, mask=None):
        from keras import ops

        assert target is None
        return ops.mean(ops.cast(student, "float32") ** 2)


def test_metrics_without_a_target_are_the_students():
    student, _ = tensors()
    info = Short(student_layer=1).metrics(student, None)
    assert set(info) == {"distance", "student_norm", "student_finite"}
    np.testing.assert_allclose(array(info["distance"]), (array(student) ** 2).mean(), rtol=1e-5)


@EACH_KIND
def test_evaluate_logs_what_metrics_give(make):
    """Of projected tokens; nothing where nothing is logged."""
    student, target = tensors()
    loss = dataclasses.replace(make(), weight=0.5)
    params = {}
    if loss.head.names:
        rng = np.random.default_rng(1)
        shapes = loss.head.draw_shapes(4, 4)
        params = loss.head.init({n: tensor(rng.random(s)) for n, s in shapes.items()})
    distance, info = loss.evaluate(params, student, target, logged=True)
    projected = loss.head.apply(params, student)
    wanted = loss.metrics(projected, target)
    assert {name: array(value) for name, value in info.items()} == {
        name: array(value) for name, value in wanted.items()
    }
    assert array(info["distance"]) == array(distance)
    unlogged, nothing = loss.evaluate(params, student, target)
    assert nothing == {}
    assert array(unlogged) == array(distance)


@pytest.mark.only("torch")
@EACH_KIND
def test_metrics_carry_no_gradient(make):
    student, target = (x.requires_grad_() for x in tensors())
    assert not any(value.requires_grad for value in make().metrics(student, target).values())
