"""What all objectives do: weights by step, evaluation, names, layers, and kinds of one's own."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import oracle
import pytest
import third_party
from hypothesis import given
from hypothesis import strategies as st
from support import array, dtype_of, floats, generators, tensor, tree

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, adapting, heads, schedules, sources

KINDS = {
    "sra": lambda **options: SRALoss(student_layer=1, teacher_layer=2, **options),
    "layersync": lambda **options: LayerSyncLoss(student_layer=1, teacher_layer=2, **options),
    "repa": lambda **options: REPALoss(student_layer=1, width=4, hidden=8, **options),
    "log_cosh": lambda **options: third_party.LogCoshLoss(
        student_layer=1, teacher_layer=2, **options
    ),
}
EACH_KIND = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Short(selfalign.Objective):
    """An objective without a target: tokens shall be short."""

    kind = "short"
    source = sources.Nothing()

    def compare(self, student, target, mask=None):
        from keras import ops

        values = ops.mean(ops.square(ops.cast(student, "float32")), axis=-1)
        return selfalign.distances.masked_mean(values, mask)


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return [tensor(x) for x in rng.normal(size=(2, 2, 3, 4))]


# Weight and step


@EACH_KIND
def test_the_weight_follows_the_step(make):
    student, target = tensors()
    full = array(make(weight=0.5)(student, target))
    scheduled = make(weight=0.5 * schedules.Warmup(10) * schedules.Stop(20))
    for step, fraction in ((0, 0), (5, 0.5), (10, 1), (19, 1), (20, 0)):
        for kind in (step, tensor(np.array(step))):
            got = array(scheduled(student, target, step=kind))
            np.testing.assert_allclose(got, fraction * full, rtol=1e-6)


@EACH_KIND
@pytest.mark.parametrize(
    "weight",
    [0.5, 1, np.float32(0.5), np.float64(0.5), schedules.Warmup(10), lambda step: np.float64(0.5)],
)
@pytest.mark.parametrize("step", [3, np.int64(3)])
def test_a_float32_scalar_for_every_kind_of_weight(make, weight, step):
    assert dtype_of(make(weight=weight)(*tensors(), step=step)) == "float32"


@EACH_KIND
def test_weight_at_is_a_float_for_a_python_step(make):
    assert make(weight=0.25).weight_at() == 0.25
    assert make(weight=schedules.Warmup(10)).weight_at(5) == 0.5
    assert make(weight=lambda step: 0.1 * step).weight_at(5) == 0.5
    assert dtype_of(make(weight=schedules.Warmup(10)).weight_at(tensor(np.array(5)))) == "float32"


@EACH_KIND
@given(floats(0, 100), st.integers(0, 40))
def test_weigh_is_the_product(make, distance, step):
    loss = make(weight=0.25 * schedules.Warmup(20))
    got = loss.weigh(distance, step)
    assert dtype_of(got) == "float32"
    np.testing.assert_allclose(array(got), distance * loss.weight_at(step), rtol=1e-6)


# Evaluation: what adapters call


def head_of(loss, rng, width=4, target_width=4):
    """Parameters of a loss's head, as NumPy."""
    shapes = loss.head.draw_shapes(width, target_width)
    drawn = {name: tensor(rng.random(shape)) for name, shape in shapes.items()}
    params = {name: array(value) for name, value in loss.head.init(drawn).items()}
    return {name: value + 0.1 * rng.normal(size=value.shape) for name, value in params.items()}


@EACH_KIND
def test_evaluate_is_the_unweighted_term_of_projected_tokens(make):
    @given(generators)
    def law(rng):
        loss = make(weight=0.5)
        student, target = rng.normal(size=(2, 2, 3, 4))
        params = tree(head_of(loss, rng))
        distance, metrics = loss.evaluate(params, tensor(student), tensor(target))
        projected = loss.head.apply(params, tensor(student))
        wanted = loss(projected, tensor(target))
        assert metrics == {}
        np.testing.assert_allclose(0.5 * array(distance), array(wanted), rtol=1e-6)
        np.testing.assert_allclose(array(loss.weigh(distance)), array(wanted), rtol=1e-6)

    law()


def test_evaluate_equals_the_oracle_through_heads_and_masks():
    rng = np.random.default_rng(0)
    student, target = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 5))
    mask = np.array([[1, 0, 1], [0, 1, 1]])
    loss = REPALoss(student_layer=1, width=5, hidden=6)
    params = head_of(loss, rng, target_width=5)
    got, _ = loss.evaluate(tree(params), tensor(student), tensor(target), tensor(mask))
    wanted = oracle.term(oracle.mlp(3, params, student), target, mask=mask)
    np.testing.assert_allclose(array(got), wanted, rtol=1e-4)


# Objectives without a target


def test_an_objective_without_a_target_takes_none():
    student, _ = tensors()
    loss = Short(student_layer=1, weight=2.0)
    values = (array(student) ** 2).mean(-1)
    np.testing.assert_allclose(array(loss(student, None)), 2 * values.mean(), rtol=1e-5)
    mask = np.array([True, False])
    masked = loss(student, None, mask=tensor(mask))
    np.testing.assert_allclose(array(masked), 2 * values[mask].mean(), rtol=1e-5)
    distance, _ = loss.evaluate({}, student, None)
    np.testing.assert_allclose(array(distance), values.mean(), rtol=1e-5)
    assert loss.layers(depth=12) == (1,)


# Kinds of one's own


def test_a_third_partys_objective_equals_its_formula():
    rng = np.random.default_rng(0)
    student, target = 3 * rng.normal(size=(2, 2, 3, 4))
    loss = KINDS["log_cosh"](weight=1.0)
    wanted = np.log(np.cosh(student - target)).mean()
    np.testing.assert_allclose(array(loss(tensor(student), tensor(target))), wanted, rtol=1e-5)
    params = {"down": rng.normal(size=(4, 2)), "up": rng.normal(size=(2, 4))}
    distance, _ = loss.evaluate(tree(params), tensor(student), tensor(target))
    projected = student @ params["down"] @ params["up"]
    wanted = np.log(np.cosh(projected - target)).mean()
    np.testing.assert_allclose(array(distance), wanted, rtol=1e-4)


def test_a_third_partys_objective_is_short():
    """As short as docs/extending.md promises."""
    assert len(Path(third_party.__file__).read_text().splitlines()) <= 40


def test_a_third_partys_objective_has_what_ours_have():
    loss = KINDS["log_cosh"](weight=0.5 * schedules.Stop(3))
    assert loss.layers(depth=12) == (1, 2)
    assert third_party.LogCoshLoss.from_settings(loss.settings()) == loss
    assert loss.settings()["kind"] == "log_cosh"
    assert adapting.named_objectives(loss) == {"log_cosh": loss}
    assert adapting.head_shapes(loss, 8) == {"down": (8, 2), "up": (2, 8)}


def test_without_a_head_the_students_tokens_are_compared_as_they_are():
    student, target = tensors()
    loss = KINDS["layersync"](weight=1.0)
    assert loss.head is heads.NONE
    distance, _ = loss.evaluate({}, student, target)
    assert array(distance) == array(loss(student, target))


# Objects


@EACH_KIND
def test_objectives_are_immutable_hashable_and_can_be_pickled(make):
    loss = make(weight=0.3)
    assert hash(loss) == hash(make(weight=0.3))
    assert dataclasses.replace(loss, weight=0.1).weight_at() == 0.1
    assert pickle.loads(pickle.dumps(loss)) == loss
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'weight'"):
        loss.weight = 1.0


@EACH_KIND
def test_the_name_is_the_kinds_unless_given(make):
    assert list(adapting.named_objectives(make())) == [make().kind]
    assert list(adapting.named_objectives(make(name="deep"))) == ["deep"]


@pytest.mark.parametrize(
    ("kind", "weight"), [(SRALoss, 0.5), (LayerSyncLoss, 0.2), (REPALoss, 0.5)]
)
def test_default_weights(kind, weight):
    options = {"width": 4} if kind is REPALoss else {"teacher_layer": 2}
    assert kind(student_layer=1, **options).weight_at() == weight
