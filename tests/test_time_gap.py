"""The time gap: the teacher is never noisier than the student, whatever the path and direction."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    CONTINUOUS,
    FLOATS,
    INTEGERS,
    PATHS,
    UNIT_TIME,
    array,
    draws,
    dtype_of,
    is_tensor,
    tensor,
    times,
)

from selfalign import paths
from selfalign.time_gap import gap_range, teacher_time

ALL = pytest.mark.parametrize("name", PATHS)
gaps = st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0])
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def exact(path, t):
    return array(t) if path.discrete else array(t).astype("float64")


def dtypes(path):
    return st.sampled_from(["int32"] if path.discrete else FLOATS)


@ALL
def test_equals_the_oracle(name):
    path, expected = PATHS[name]

    @given(
        times(name),
        st.lists(st.integers(0, 199), min_size=8, max_size=8),
        st.sampled_from([0.2, 0.4]),
    )
    def law(t, k, max_gap):
        u = (np.array(k) + 0.25) / 200  # inside a step, so that rounding cannot change the step
        got = teacher_time(path, tensor(t), tensor(u), max_gap)
        wide = t if path.discrete else t.astype("float64")
        wanted = oracle.teacher_time(expected, wide, u, max_gap)
        np.testing.assert_allclose(array(got), wanted, rtol=1e-5, atol=1e-6)

    law()


@ALL
def test_the_teacher_is_never_noisier(name):
    path, expected = PATHS[name]

    @given(times(name), draws, gaps, st.booleans(), dtypes(path))
    def law(t, u, max_gap, random_gap, dtype):
        t = tensor(t, dtype)
        moved = teacher_time(path, t, tensor(u), max_gap, random_gap)
        signal = oracle.snr(expected, exact(path, t))
        assert (oracle.snr(expected, exact(path, moved)) >= signal).all()
        assert (array(path.snr(moved)) >= array(path.snr(t)) * (1 - 1e-6)).all()

    law()


@ALL
def test_the_teacher_stays_inside_and_within_the_gap(name):
    path, _ = PATHS[name]

    @given(times(name), draws, gaps, dtypes(path))
    def law(t, u, max_gap, dtype):
        t = tensor(t, dtype)
        before = exact(path, t)
        moved = exact(path, teacher_time(path, t, tensor(u), max_gap))
        if path.discrete:
            assert (moved >= 0).all()
            assert (before - moved <= max(round(1000 * max_gap) - 1, 0)).all()
        elif name == "edm":
            assert (moved >= np.minimum(before, 0.002 * (1 - EPSILON[dtype]))).all()
            assert (np.log(before / moved) <= max_gap * path.span + 4 * EPSILON[dtype]).all()
        else:
            assert (abs(moved - path.clean_at) <= abs(before - path.clean_at)).all()
            assert ((moved >= 0) & (moved <= 1)).all()
            assert (abs(before - moved) <= max_gap + EPSILON[dtype]).all()

    law()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_times_keep_their_dtype(name, dtype):
    moved = teacher_time(PATHS[name][0], tensor([0.25, 0.5], dtype), tensor([0.5, 0.5], dtype))
    assert is_tensor(moved)
    assert dtype_of(moved) == dtype


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype_counts_steps_alike(dtype):
    """Small and unsigned integers neither wrap below 0 nor overflow at a gap of 199."""
    t, u = np.array([0, 1, 50, 100, 127]), np.array([0.999, 0.999, 0.1, 0.05, 0.0])
    moved = teacher_time(paths.Discrete(), tensor(t, dtype), tensor(u))
    assert array(moved).tolist() == [0, 0, 30, 90, 127]
    assert dtype_of(moved) == dtype


def test_statistics_of_the_linear_path():
    rng = np.random.default_rng(0)
    for path in (paths.Linear(), paths.Linear(noise_at=0)):
        t, u = tensor(rng.random(1_000_000)), tensor(rng.random(1_000_000))
        moved = array(teacher_time(path, t, u))
        noisiness, before = abs(moved - path.clean_at), abs(array(t) - path.clean_at)
        assert abs((noisiness == 0).mean() - 0.1) < 0.0015
        assert abs(noisiness.mean() - 0.406667) < 0.0015
        assert abs((before - noisiness).mean() - 0.093333) < 0.0003


def test_statistics_of_the_discrete_path():
    rng = np.random.default_rng(0)
    t, u = rng.integers(0, 1000, 1_000_000), rng.random(1_000_000)
    moved = array(teacher_time(paths.Discrete(), tensor(t), tensor(u)))
    assert abs((moved < 1).mean() - 0.1005) < 0.0015
    assert (moved <= t).all()


def test_discrete_gaps_are_uniform_over_whole_steps():
    u = np.random.default_rng(0).random(1_000_000)
    gap = 999 - array(teacher_time(paths.Discrete(), tensor(np.full(1_000_000, 999)), tensor(u)))
    counts = np.bincount(gap, minlength=200)
    assert len(counts) == 200
    np.testing.assert_allclose(counts, 5000, atol=6 * 5000**0.5)


def test_the_largest_draw_does_not_reach_the_discrete_gap():
    """u * 200 rounds up to 200 in float32 for the u just below 1; the gap is still below 200.

    Draws that are cast to half precision may even become 1.
    """
    for u in (np.nextafter(np.float32(1), np.float32(0)), 1.0):
        moved = teacher_time(paths.Discrete(), tensor([999, 500]), tensor([u, u]))
        assert array(moved).tolist() == [800, 301]


def test_a_student_at_the_cleanest_step_gets_no_noisier_teacher():
    """The authors' code clamps at step 1: noisier than a student at step 0."""
    u = tensor([0.0, 0.5, 0.999])
    assert array(teacher_time(paths.Discrete(), tensor([0, 0, 0]), u)).tolist() == [0, 0, 0]


@ALL
def test_no_gap_means_the_students_own_time(name):
    path, _ = PATHS[name]

    @given(times(name), draws, st.booleans())
    def law(t, u, random_gap):
        assert np.array_equal(array(teacher_time(path, tensor(t), tensor(u), 0, random_gap)), t)

    law()


@ALL
def test_a_fixed_gap_needs_no_draw(name):
    path, expected = PATHS[name]
    steps, fractions = np.array([999, 500, 100, 0]), np.array([0.9, 0.5, 0.1, 0.01])
    t = steps if path.discrete else fractions
    got = teacher_time(path, tensor(t), None, 0.2, random_gap=False)
    gap = 200 if path.discrete else 0.2 * expected.span
    np.testing.assert_allclose(array(got), expected.toward_data(t, gap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", UNIT_TIME)
def test_the_whole_gap_ends_at_the_data(name):
    path, _ = PATHS[name]
    moved = teacher_time(path, tensor([0.0, 0.3, 1.0]), None, 1.0, random_gap=False)
    assert array(moved).tolist() == [path.clean_at] * 3


def test_edm_divides_sigma():
    path = paths.EDM()
    moved = teacher_time(path, tensor([80.0]), tensor([0.5]), max_gap=0.2)
    np.testing.assert_allclose(array(moved), 80 * (0.002 / 80) ** 0.1, rtol=1e-5)


def test_edm_leaves_a_student_below_the_clean_end_alone():
    moved = teacher_time(paths.EDM(), tensor([1e-3, 1e-6]), tensor([0.9, 0.1]))
    assert np.array_equal(array(moved), np.float32([1e-3, 1e-6]))


@pytest.mark.parametrize(
    ("name", "expected"), [("linear", 0.2), ("discrete", 200), ("edm", 0.2 * np.log(40000))]
)
def test_the_gap_in_the_paths_own_unit(name, expected):
    np.testing.assert_allclose(gap_range(PATHS[name][0], 0.2), expected, rtol=1e-12)
