"""The loss: settings, presets, and the laws of the term."""

import dataclasses
import itertools
import json
import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, PATHS, array, dtype_of, generators, gradients, is_tensor, tensor, token_pairs

import selfalign
from selfalign import SRALoss, distances, paths, schedules

DISTANCES = list(distances.NAMES)
PER_TOKEN = [name for name in DISTANCES if name != "official-2026-07"]
EACH_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)
MODELS = [f"{family}-{size}/2" for family in ("SiT", "DiT") for size in ("S", "B", "L", "XL")]


def make(**settings):
    return SRALoss(**({"student_layer": 1, "teacher_layer": 2} | settings))


def pair(seed=0, shape=(2, 3, 4)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


def chebyshev(student, teacher):
    """A distance of the user's own."""
    return _largest(student - teacher)


def _largest(x):
    from keras import ops

    return ops.max(ops.abs(x), axis=-1)


# The value


@EACH_DISTANCE
def test_equals_the_oracle(distance):
    @given(generators, st.sampled_from([0.5, 0.2, 2]))
    def law(rng, weight):
        student, teacher = rng.normal(size=(2, 2, 3, 4))
        got = make(distance=distance, weight=weight)(tensor(student), tensor(teacher))
        np.testing.assert_allclose(array(got), oracle.loss(distance, weight, student, teacher), rtol=1e-5, atol=1e-6)

    law()


@EACH_DISTANCE
def test_exactly_zero_for_equal_tokens_and_never_negative(distance):
    @given(token_pairs)
    def law(both):
        a, b = map(tensor, both)
        assert array(make(distance=distance)(a, a)) == 0
        assert array(make(distance=distance)(a, b)) >= 0

    law()


@EACH_DISTANCE
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_float32_scalar_for_every_dtype(distance, dtype):
    student, teacher = (tensor(x, dtype) for x in pair())
    term = make(distance=distance)(student, teacher)
    assert is_tensor(term)
    assert (dtype_of(term), tuple(term.shape)) == ("float32", ())
    wide = make(distance=distance)(tensor(array(student)), tensor(array(teacher)))
    assert array(term) == array(wide)


@pytest.mark.parametrize(
    "weight", [0.5, 1, np.float32(0.5), np.float64(0.5), schedules.Warmup(10), lambda step: np.float64(0.5)]
)
@pytest.mark.parametrize("step", [3, np.int64(3)])
def test_a_float32_scalar_for_every_kind_of_weight(weight, step):
    assert dtype_of(make(weight=weight)(*map(tensor, pair()), step=step)) == "float32"


def test_sides_of_two_precisions():
    student, teacher = pair()
    mixed = make()(tensor(student, "bfloat16"), tensor(teacher))
    assert dtype_of(mixed) == "float32"
    assert array(mixed) == array(make()(tensor(array(tensor(student, "bfloat16"))), tensor(teacher)))


def test_beta_reaches_smooth_l1():
    student, teacher = pair()
    got = make(distance="smooth_l1", beta=1.0, weight=1)(tensor(student), tensor(teacher))
    np.testing.assert_allclose(array(got), oracle.smooth_l1(student, teacher, 1.0).mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_distance_of_your_own_gets_float32(dtype):
    seen = []

    def distance(student, teacher):
        seen.extend((dtype_of(student), dtype_of(teacher)))
        return _largest(student - teacher)

    student, teacher = (tensor(x, dtype) for x in pair())
    got = make(distance=distance, weight=2)(student, teacher)
    assert seen == ["float32", "float32"]
    np.testing.assert_allclose(array(got), 2 * abs(array(student) - array(teacher)).max(-1).mean(), rtol=1e-5)


# Weight and step


def test_the_weight_follows_the_step():
    student, teacher = map(tensor, pair())
    full = array(make(weight=0.5)(student, teacher))
    scheduled = make(weight=0.5 * schedules.Warmup(10) * schedules.Stop(20))
    for step, share in ((0, 0), (5, 0.5), (10, 1), (19, 1), (20, 0)):
        for kind in (step, tensor(np.array(step))):
            np.testing.assert_allclose(array(scheduled(student, teacher, step=kind)), share * full, rtol=1e-6)


def test_weight_at_is_a_float_for_a_python_step():
    assert make(weight=0.25).weight_at() == 0.25
    assert make(weight=schedules.Warmup(10)).weight_at(5) == 0.5
    assert make(weight=lambda step: 0.1 * step).weight_at(5) == 0.5
    assert dtype_of(make(weight=schedules.Warmup(10)).weight_at(tensor(np.array(5)))) == "float32"


# Masks


@pytest.mark.parametrize("distance", [*DISTANCES, _largest])
@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
def test_a_mask_of_ones_is_no_mask(distance, kind):
    distance = (lambda a, b: _largest(a - b)) if callable(distance) else distance
    loss, (student, teacher) = make(distance=distance), map(tensor, pair())
    plain = array(loss(student, teacher))
    np.testing.assert_allclose(array(loss(student, teacher, mask=tensor(np.ones(2), kind))), plain, rtol=1e-6)
    if distance != "official-2026-07":
        np.testing.assert_allclose(array(loss(student, teacher, mask=tensor(np.ones((2, 3)), kind))), plain, rtol=1e-6)


@pytest.mark.parametrize("distance", PER_TOKEN)
def test_leaving_tokens_out_is_the_loss_of_the_others(distance):
    loss, (student, teacher) = make(distance=distance), pair()
    mask = np.array([[True, False, True], [False, False, True]])
    got = loss(tensor(student), tensor(teacher), mask=tensor(mask))
    np.testing.assert_allclose(array(got), array(loss(tensor(student[mask][None]), tensor(teacher[mask][None]))), rtol=1e-5)


@EACH_DISTANCE
def test_leaving_samples_out_is_the_loss_of_the_others(distance):
    loss, (student, teacher) = make(distance=distance), pair(shape=(3, 3, 4))
    got = loss(tensor(student), tensor(teacher), mask=tensor([True, False, True]))
    np.testing.assert_allclose(array(got), array(loss(tensor(student[[0, 2]]), tensor(teacher[[0, 2]]))), rtol=1e-5)


@EACH_DISTANCE
def test_a_mask_of_zeros_gives_zero(distance):
    assert array(make(distance=distance)(*map(tensor, pair()), mask=tensor([False, False]))) == 0


@pytest.mark.only("torch", "jax")
def test_what_is_left_out_gets_no_gradient():
    mask = np.array([[True, False, True], [False, False, False]])
    student, teacher = pair()
    found, _ = gradients(lambda s, t: make()(s, t, mask=tensor(mask)), student, teacher)
    assert not found[~mask].any()
    assert found[mask].any(axis=-1).all()
    nothing, _ = gradients(lambda s, t: make()(s, t, mask=tensor(np.zeros(2))), student, teacher)
    assert not nothing.any()


# Broken numbers


@EACH_DISTANCE
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_feature_breaks_the_loss_and_metrics_name_the_side(distance, bad, side):
    both = dict(zip(("student", "teacher"), pair(), strict=True))
    for index in ((0, 0, 0), (1, 2, 3)):
        broken = {name: x.copy() for name, x in both.items()}
        broken[side][index] = bad
        loss = make(distance=distance)
        with np.errstate(all="ignore"):
            student, teacher = tensor(broken["student"]), tensor(broken["teacher"])
            assert not np.isfinite(array(loss(student, teacher)))
            assert not np.isfinite(array(make(distance=distance, weight=0)(student, teacher)))
            info = loss.metrics(student, teacher)
        assert {name: bool(array(info[f"{name}_finite"])) for name in both} == {name: name != side for name in both}


@EACH_DISTANCE
def test_both_sides_broken_alike_is_still_broken(distance):
    x = pair()[0]
    x[0, 0, 0] = math.inf
    with np.errstate(all="ignore"):
        info = make(distance=distance).metrics(tensor(x), tensor(x))
        assert not np.isfinite(array(make(distance=distance)(tensor(x), tensor(x))))
    assert not array(info["student_finite"]).any()
    assert not array(info["teacher_finite"]).any()


# Metrics


@pytest.mark.parametrize("dtype", FLOATS)
def test_metrics_equal_the_oracle(dtype):
    student, teacher = (tensor(x, dtype) for x in pair())
    s, t = array(student), array(teacher)
    info = make(distance="l2", weight=7).metrics(student, teacher)
    assert set(info) == {"distance", "cosine", "student_norm", "teacher_norm", "student_finite", "teacher_finite"}
    np.testing.assert_allclose(array(info["distance"]), oracle.l2(s, t).mean(), rtol=1e-5)
    np.testing.assert_allclose(array(info["cosine"]), 1 - oracle.cosine(s, t).mean(), atol=1e-6)
    np.testing.assert_allclose(array(info["student_norm"]), np.linalg.norm(s, axis=-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(array(info["teacher_norm"]), np.linalg.norm(t, axis=-1).mean(), rtol=1e-5)
    assert array(info["student_finite"]).all()
    assert array(info["teacher_finite"]).all()
    assert all(is_tensor(value) and tuple(value.shape) == () for value in info.values())
    assert {dtype_of(value) for value in info.values()} == {"float32", "bool"}


def test_metrics_do_not_depend_on_the_weight_or_need_a_step():
    student, teacher = map(tensor, pair())
    scheduled = make(weight=schedules.Stop(0)).metrics(student, teacher)
    assert array(scheduled["distance"]) == array(make(weight=0.5).metrics(student, teacher)["distance"]) > 0


@pytest.mark.only("torch")
def test_metrics_carry_no_gradient():
    student, teacher = (tensor(x).requires_grad_() for x in pair())
    assert not any(value.requires_grad for value in make().metrics(student, teacher).values())


# Gradients


@pytest.mark.only("torch", "jax")
@EACH_DISTANCE
def test_no_gradient_reaches_the_teacher_and_the_students_is_right(distance):
    student, teacher = pair()
    to_student, to_teacher = gradients(make(distance=distance), student, teacher)
    assert to_teacher is None or not to_teacher.any()
    wanted = oracle.gradient(lambda x: oracle.loss(distance, 0.5, x, teacher), student)
    np.testing.assert_allclose(to_student, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.only("torch", "jax")
def test_no_gradient_reaches_the_teacher_through_a_distance_of_your_own():
    _, to_teacher = gradients(make(distance=lambda s, t: _largest(s * t)), *pair())
    assert to_teacher is None or not to_teacher.any()


@pytest.mark.only("torch", "jax")
@EACH_DISTANCE
def test_gradients_of_equal_and_zero_tokens_are_zero(distance):
    """An EMA teacher equals the student at step 0: neither NaN nor a push."""
    for x in (pair()[0], np.zeros((2, 3, 4))):
        found, _ = gradients(make(distance=distance), x, x)
        assert not found.any()


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("weight", [0, 0.0, schedules.Stop(0)])
def test_weight_zero_keeps_the_students_gradient_defined(weight):
    found, _ = gradients(lambda s, t: make(weight=weight)(s, t, step=5), *pair())
    assert found is not None
    assert not found.any()


@pytest.mark.only("torch", "jax")
def test_the_projector_gets_the_gradient():
    rng = np.random.default_rng(0)
    student, teacher = pair()
    shapes = {"hidden_kernel": (4, 8), "hidden_bias": (8,), "output_kernel": (8, 4), "output_bias": (4,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def term(*values):
        projected = selfalign.project(dict(zip(params, values, strict=True)), tensor(student))
        return make()(projected, tensor(teacher))

    for name, found in zip(params, gradients(term, *params.values()), strict=True):
        wanted = oracle.gradient(
            lambda x, name=name: oracle.loss("cosine", 0.5, oracle.project(params | {name: x}, student), teacher), params[name]
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


# The whole method at a glance


def test_gap_zero_same_layer_same_weights_no_projector_is_zero():
    loss = make(student_layer=2, allow_same_layer=True, max_gap=0)
    rng = np.random.default_rng(0)
    x0, noise, t, u = (tensor(rng.random(shape)) for shape in ((4, 3), (4, 3), (4,), (4,)))
    weight = tensor(rng.normal(size=(3, 6)))

    def network(x):
        return (x @ weight).reshape((4, 2, 3))

    moved = loss.teacher_time(t, u)
    student, teacher = network(loss.path.add_noise(x0, noise, t)), network(loss.path.add_noise(x0, noise, moved))
    assert array(loss(student, teacher)) == 0


# Presets and settings


@pytest.mark.parametrize("name", MODELS)
def test_default_recipe(name):
    loss = SRALoss.preset(name)
    layers = selfalign.preset_layers(name)
    path = paths.Discrete() if name.startswith("DiT") else paths.Linear()
    assert loss == SRALoss(student_layer=layers[0], teacher_layer=layers[1], path=path)
    assert (loss.distance, loss.weight_at(), loss.max_gap, loss.random_gap) == ("cosine", 0.5, 0.2, True)
    assert loss.decay == schedules.Constant(0.9999)


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize("name", MODELS)
def test_paper_recipe(name, resolution):
    loss = SRALoss.preset(name, recipe="paper", resolution=resolution, steps_per_epoch=10)
    base = {"SiT": 0.2, "DiT": 0.04}[name[:3]]
    assert (loss.distance, loss.beta, loss.max_gap) == ("smooth_l1", 0.05, 0.2)
    assert loss.path.name == {"SiT": "linear", "DiT": "discrete"}[name[:3]]
    for epoch in (0, 99, 100, 149, 150, 400, 800):
        np.testing.assert_allclose(loss.weight_at(10 * epoch), oracle.paper_weight(base, epoch, resolution), rtol=1e-12)


def test_numbers_of_the_paper():
    sit, dit = (SRALoss.preset(name, recipe="paper") for name in ("SiT-XL/2", "DiT-XL/2"))
    weights = {149: 0.2, 150: 0.19954, 200: 0.17784, 400: 0.11221, 800: 0.04467}
    assert {epoch: round(sit.weight_at(5004 * epoch), 5) for epoch in weights} == weights
    assert {epoch: round(dit.weight_at(5004 * epoch), 5) for epoch in (0, 400)} == {0: 0.04, 400: 0.02244}


@pytest.mark.parametrize("name", MODELS)
def test_official_recipe(name):
    loss = SRALoss.preset(name, recipe="official-2026-07")
    assert (loss.distance, loss.weight_at()) == ("official-2026-07", 0.5)


@pytest.mark.parametrize("name", MODELS)
def test_short_recipe(name):
    """The default's layers, path and distance; a smaller weight, and an EMA that soon forgets the start."""
    loss, default = SRALoss.preset(name, recipe="short"), SRALoss.preset(name)
    assert (loss.weight_at(), default.weight_at()) == (0.1, 0.5)
    assert dataclasses.replace(loss, weight=default.weight, decay=default.decay) == default
    left = lambda loss, steps: np.prod([loss.decay_at(step) for step in range(steps)])  # noqa: E731
    assert left(loss, 5000) < 0.01 < 0.5 < left(default, 5000)


def test_changes_override_the_recipe():
    loss = SRALoss.preset("SiT-B/2", recipe="paper", weight=0.1, path=paths.Linear(noise_at=0), teacher_layer=10)
    assert (loss.weight_at(), loss.path.clean_at, loss.teacher_layer, loss.distance) == (0.1, 1, 10, "smooth_l1")


WEIGHTS = [None, 0.3, 0.5 * schedules.Warmup(10), schedules.Stop(7) * schedules.PaperDecay(10, 99, 800)]
DECAYS = [None, 0.99, schedules.DecayWarmup(0.999)]


@pytest.mark.parametrize("recipe", ["default", "short", "paper", "official-2026-07"])
@pytest.mark.parametrize("name", MODELS)
def test_settings_round_trip_through_json(name, recipe):
    for weight, decay in itertools.product(WEIGHTS, DECAYS):
        changes = {key: value for key, value in (("weight", weight), ("decay", decay)) if value is not None}
        loss = SRALoss.preset(name, recipe=recipe, **changes)
        again = SRALoss.from_settings(json.loads(json.dumps(loss.settings())))
        assert again == loss
        assert hash(again) == hash(loss)


@pytest.mark.parametrize("path", [path for path, _ in PATHS.values()] + [paths.Discrete((0.9, 0.5)), paths.EDM(0.01, 50)])
@pytest.mark.parametrize("layers", [(1, 2), (0.25, 0.7), (3, 0.7)])
def test_settings_of_every_path_round_trip_through_json(path, layers):
    max_gap = 0.2 if path.span != 2 else 0.5
    loss = make(path=path, student_layer=layers[0], teacher_layer=layers[1], max_gap=max_gap, random_gap=False, beta=0.1)
    assert SRALoss.from_settings(json.loads(json.dumps(loss.settings()))) == loss


def test_settings_from_numpy_numbers_are_plain():
    loss = make(
        student_layer=np.int64(3),
        teacher_layer=np.int32(8),
        weight=np.float32(0.5),
        decay=np.float32(0.5),
        max_gap=np.float32(0.25),
        beta=np.float32(0.5),
        path=paths.EDM(np.float32(0.5), np.float32(64)),
    )
    assert SRALoss.from_settings(json.loads(json.dumps(loss.settings()))) == loss


def test_callables_of_your_own_are_named_and_passed_again():
    loss = make(distance=chebyshev)
    settings = json.loads(json.dumps(loss.settings()))
    assert settings["distance"]["callable"].endswith(".chebyshev")
    assert SRALoss.from_settings(settings, distance=chebyshev) == loss


def test_the_loss_is_immutable_and_hashable():
    loss = make()
    assert hash(loss) == hash(make())
    assert dataclasses.replace(loss, weight=0.1).weight_at() == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'weight'"):
        loss.weight = 1.0
