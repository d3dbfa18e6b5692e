"""Sources: where a target comes from, as settings that adapters read."""

import dataclasses

import numpy as np
import pytest
from support import PATHS, array, tensor

from selfalign import paths, schedules, sources
from selfalign.sources import EMATeacher, Given, LaterLayer, Nothing
from selfalign.time_gap import gap_range, teacher_time

ALL = {
    "teacher": EMATeacher(layer=20),
    "later": LaterLayer(layer=16),
    "given": Given(width=768),
    "nothing": Nothing(),
}
EACH = pytest.mark.parametrize("source", ALL.values(), ids=ALL)


@EACH
def test_sources_are_settings(source):
    assert isinstance(source, sources.Source)
    assert dataclasses.replace(source) == source
    assert hash(dataclasses.replace(source)) == hash(source)


def test_the_targets_width_is_the_models_or_the_callers():
    widths = {name: source.target_width(384) for name, source in ALL.items()}
    assert widths == {"teacher": 384, "later": 384, "given": 768, "nothing": 384}


def test_a_frozen_source():
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'layer'"):
        ALL["later"].layer = 3


# The EMA teacher


@pytest.mark.parametrize("name", PATHS)
def test_the_largest_gap_is_in_the_paths_own_unit(name):
    path, _ = PATHS[name]
    source = EMATeacher(layer=20, path=path, max_gap=0.3)
    assert source.largest_gap == gap_range(path, 0.3)
    assert EMATeacher(layer=20, path=path, max_gap=0).largest_gap == 0


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("random_gap", [True, False])
def test_its_time_is_the_rules(name, random_gap):
    path, _ = PATHS[name]
    source = EMATeacher(layer=20, path=path, max_gap=0.3, random_gap=random_gap)
    t = tensor(np.array([7, 500]) if path.discrete else np.array([0.3, 0.5], "float32"))
    u = tensor([0.1, 0.9])
    wanted = teacher_time(path, t, u, 0.3, random_gap)
    assert np.array_equal(array(source.teacher_time(t, u)), array(wanted))


@pytest.mark.parametrize("random_gap", [True, False])
def test_what_an_adapter_reads_gives_the_same_time(random_gap):
    """`path.add_less_noise` with the source's settings, as adapters call it."""
    source = EMATeacher(layer=20, path="discrete", max_gap=0.3, random_gap=random_gap)
    rng = np.random.default_rng(0)
    x0, noise, u = (tensor(rng.random(shape)) for shape in ((3, 2), (3, 2), (3,)))
    t = tensor(np.array([0, 500, 999]))
    _, moved = source.path.add_less_noise(x0, noise, t, u, source.largest_gap, source.random_gap)
    assert array(moved).tolist() == array(source.teacher_time(t, u)).tolist()


def test_plain_settings_become_objects():
    source = EMATeacher(layer=0.7, path="cosine", decay=0.5)
    assert source.path == paths.Cosine()
    assert source.decay == schedules.Constant(0.5)
    assert EMATeacher(layer=0.7, path={"name": "cosine", "noise_at": 1}, decay=0.5) == source


def test_the_decay_of_a_step():
    assert EMATeacher(layer=20).decay_at(10**6) == 0.9999
    warmed = EMATeacher(layer=20, decay=schedules.DecayWarmup(0.999))
    assert (warmed.decay_at(0), warmed.decay_at(10**6)) == (0.1, 0.999)
    np.testing.assert_allclose(array(warmed.decay_at(tensor(np.array(0)))), 0.1, rtol=1e-6)
    mine = EMATeacher(layer=20, decay=lambda step: 1 - 1 / (step + 2))
    assert mine.decay_at(8) == pytest.approx(0.9)


def test_numpy_numbers_are_plain():
    source = EMATeacher(layer=np.int64(8), max_gap=np.float32(0.25), decay=np.float32(0.5))
    assert source == EMATeacher(layer=8, max_gap=0.25, decay=0.5)
    assert type(source.max_gap) is float
    assert LaterLayer(layer=np.int32(3)) == LaterLayer(layer=3)
    assert Given(width=np.int64(6)) == Given(width=6)
