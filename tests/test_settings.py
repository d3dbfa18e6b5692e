"""Settings: every objective as plain values, through JSON and back."""

import itertools
import json

import numpy as np
import pytest
from support import PATHS

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, objectives, paths, schedules

MODELS = [f"{family}-{size}/2" for family in ("SiT", "DiT") for size in ("S", "B", "L", "XL")]
WEIGHTS = [
    None,
    0.3,
    0.5 * schedules.Warmup(10),
    schedules.Stop(7) * schedules.PaperDecay(10, 99, 800),
]
DECAYS = [None, 0.99, schedules.DecayWarmup(0.999), schedules.Every(4, 0.99)]


def make(**settings):
    return SRALoss(**({"student_layer": 1, "teacher_layer": 2} | settings))


def through_json(loss):
    return json.loads(json.dumps(loss.settings()))


def chebyshev(student, target):
    """A distance of the user's own."""
    return abs(student - target).max(-1)


def given(**values):
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("recipe", ["default", "short", "paper", "official-2026-07"])
@pytest.mark.parametrize("name", MODELS)
def test_settings_round_trip_through_json(name, recipe):
    for weight, decay in itertools.product(WEIGHTS, DECAYS):
        loss = SRALoss.preset(name, recipe=recipe, **given(weight=weight, decay=decay))
        again = SRALoss.from_settings(through_json(loss))
        assert again == loss
        assert hash(again) == hash(loss)


OWN_PATHS = [paths.Discrete((0.9, 0.5)), paths.EDM(0.01, 50)]


@pytest.mark.parametrize("path", [path for path, _ in PATHS.values()] + OWN_PATHS)
@pytest.mark.parametrize("layers", [(1, 2), (0.25, 0.7), (3, 0.7)])
def test_settings_of_every_path_round_trip_through_json(path, layers):
    student, teacher = layers
    loss = make(
        path=path,
        student_layer=student,
        teacher_layer=teacher,
        max_gap=0.2 if path.span != 2 else 0.5,
        random_gap=False,
        beta=0.1,
    )
    assert SRALoss.from_settings(through_json(loss)) == loss


OTHERS = {
    "layersync": LayerSyncLoss(student_layer=0.3, teacher_layer=0.7),
    "layersync, changed": LayerSyncLoss(
        student_layer=8,
        teacher_layer=16,
        projector=True,
        normalise="centre",
        distance="smooth_l1",
        beta=0.1,
        weight=0.2 * schedules.Stop(5),
        name="deep",
    ),
    "repa": REPALoss(student_layer=8, width=768),
    "repa, changed": REPALoss(
        student_layer=0.3, width=6, hidden=12, normalise="standardise", name="encoder"
    ),
}


@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS)
def test_settings_of_other_objectives_round_trip_through_json(loss):
    assert type(loss).from_settings(through_json(loss)) == loss
    assert objectives.from_settings(through_json(loss)) == loss


def test_any_objective_comes_back_as_its_own_kind():
    for loss in (make(), *OTHERS.values()):
        again = objectives.from_settings(through_json(loss))
        assert type(again) is type(loss)
        assert loss.settings()["kind"] == loss.kind


def test_settings_without_a_kind_are_those_of_the_class():
    """As the first edition wrote them."""
    settings = through_json(make())
    del settings["kind"]
    assert SRALoss.from_settings(settings) == make()


@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS)
def test_changes_override_settings(loss):
    changed = type(loss).from_settings(loss.settings(), weight=0.125, student_layer=1)
    assert (changed.weight_at(), changed.student_layer) == (0.125, 1)
    assert changed.distance == loss.distance


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
    assert SRALoss.from_settings(through_json(loss)) == loss
    repa = REPALoss(student_layer=np.int64(3), width=np.int32(6), hidden=np.int64(4))
    assert REPALoss.from_settings(through_json(repa)) == repa


@pytest.mark.parametrize("kind", [SRALoss, LayerSyncLoss])
def test_callables_of_your_own_are_named_and_passed_again(kind):
    loss = kind(student_layer=1, teacher_layer=2, distance=chebyshev)
    settings = through_json(loss)
    assert settings["distance"]["callable"].endswith(".chebyshev")
    assert kind.from_settings(settings, distance=chebyshev) == loss


def test_the_kinds_are_those_of_the_package():
    assert set(objectives.KINDS) == {"sra", "layersync", "repa"}
    for kind in objectives.KINDS.values():
        assert getattr(selfalign, kind.__name__) is kind
