"""The EMA: the laws of a convex combination, on any structure and in any precision."""

import collections

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    BACKEND,
    FLOATS,
    MODULES,
    array,
    dtype_of,
    floats,
    framework,
    generators,
    is_tensor,
    tensor,
    vectors,
)

import selfalign

decays = st.one_of(st.sampled_from([0.0, 0.5, 0.999, 0.9999, 1.0]), floats(0, 1))
values = vectors(-1e6, 1e6)
EPSILON = 2.0**-23


def moved(old, new, decay):
    """One leaf after a step, as an array."""
    return array(selfalign.ema_update([tensor(old)], [tensor(new)], decay)[0])


# The value


@given(values, values, decays)
def test_equals_the_oracle(old, new, decay):
    got = selfalign.ema_update({"w": tensor(old)}, {"w": tensor(new)}, decay)["w"]
    wanted = oracle.ema(old.astype("float64"), new.astype("float64"), decay)
    assert is_tensor(got)
    assert (abs(array(got) - wanted) <= 4 * EPSILON * np.maximum(abs(old), abs(new))).all()


@given(values, decays)
def test_equal_weights_stay_equal_to_the_last_bit(w, decay):
    assert np.array_equal(moved(w, w, decay), w)


@given(values, values, decays)
def test_the_result_lies_between_the_two(old, new, decay):
    got = moved(old, new, decay)
    slack = 2 * EPSILON * np.maximum(abs(old), abs(new))
    assert (got >= np.minimum(old, new) - slack).all()
    assert (got <= np.maximum(old, new) + slack).all()


@given(values, values)
def test_the_ends_of_the_decay_are_exact(old, new):
    """Decay 0 is the paper's ablation teacher = student: equal, not almost equal."""
    assert np.array_equal(moved(old, new, 0.0), new)
    assert np.array_equal(moved(old, new, 1.0), old)


@given(generators, st.sampled_from([0.1, 0.9, 0.9999]))
def test_linear_in_both(rng, decay):
    a, b, c, d = rng.normal(size=(4, 8))
    together = moved(a + 2 * b, c + 2 * d, decay)
    apart = moved(a, c, decay) + 2 * moved(b, d, decay)
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_ten_thousand_steps_forget_as_the_formula_says():
    weight, zero = tensor([1.0]), tensor([0.0])
    for step in range(1, 10_001):
        weight = selfalign.ema_update(weight, zero, 0.9999)
        if step == 6931:
            np.testing.assert_allclose(array(weight), 0.5, rtol=2e-3)
    np.testing.assert_allclose(array(weight), 0.36786, rtol=2e-3)


# Dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_comes_back_as_float32_and_moves(dtype):
    teacher, student = {"w": tensor([1.0], dtype)}, {"w": tensor([2.0], dtype)}
    got = selfalign.ema_update(teacher, student, 0.9999)["w"]
    assert dtype_of(got) == "float32"
    np.testing.assert_allclose(array(got), 1.0001, rtol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_wide_teacher_stays_wide_beside_any_student(dtype):
    got = selfalign.ema_update([tensor([1.0], "float32")], [tensor([2.0], dtype)], 0.75)[0]
    assert dtype_of(got) == "float32"
    assert array(got).tolist() == [1.25]


@pytest.mark.only("numpy", "torch")
def test_float64_stays_float64():
    got = selfalign.ema_update([tensor([1.0], "float64")], [tensor([2.0], "float64")], 0.9999)[0]
    assert dtype_of(got) == "float64"
    np.testing.assert_allclose(array(got), 1.0001, rtol=1e-15)


@pytest.mark.parametrize("value", [np.array([3, 4]), np.array([True, False])])
def test_integers_and_booleans_are_the_teachers_own(value):
    teacher = {"count": tensor(value), "w": tensor([1.0])}
    student = {"count": tensor(value[::-1].copy()), "w": tensor([3.0])}
    got = selfalign.ema_update(teacher, student, 0.5)
    assert np.array_equal(array(got["count"]), value)
    assert dtype_of(got["count"]) == dtype_of(teacher["count"])
    assert array(got["w"]).tolist() == [2]


# Structures


def test_nested_structures_keep_their_shape():
    def nest(x):
        leaf = {"kernel": tensor(np.full((2, 3), x)), "bias": tensor([x])}
        return {
            "blocks": [leaf, (leaf, tensor(np.array(x)))],
            "empty": {},
            "none": (),
            "order": {"b": leaf, "a": tensor([x])},
        }

    got = selfalign.ema_update(nest(0.0), nest(1.0), 0.75)
    assert list(got) == ["blocks", "empty", "none", "order"]
    assert isinstance(got["blocks"], list)
    assert isinstance(got["blocks"][1], tuple)
    assert (got["empty"], got["none"]) == ({}, ())
    assert np.array_equal(array(got["blocks"][0]["kernel"]), np.full((2, 3), 0.25))
    assert array(got["blocks"][1][0]["bias"]).tolist() == [0.25]
    assert array(got["blocks"][1][1]).tolist() == 0.25
    assert array(got["order"]["a"]).tolist() == [0.25]


def test_entries_are_matched_by_name_not_by_order():
    teacher = {"a": tensor([1.0]), "b": tensor([2.0])}
    student = {"b": tensor([4.0]), "a": tensor([3.0])}
    got = selfalign.ema_update(teacher, student, 0.5)
    assert {name: array(x).tolist() for name, x in got.items()} == {"a": [2], "b": [3]}


def test_ordered_dicts_and_bare_arrays():
    names = collections.OrderedDict(z=tensor([1.0]), a=tensor([2.0]))
    got = selfalign.ema_update(names, names, 0.5)
    assert list(got) == ["z", "a"]
    assert [array(x).tolist() for x in got.values()] == [[1], [2]]
    assert array(selfalign.ema_update(tensor([1.0]), tensor([0.0]), 0.25)).tolist() == [0.25]


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_leaves_may_be_plain_numbers(kind):
    got = selfalign.ema_update({"scale": kind(1), "count": 3}, {"scale": kind(3), "count": 4}, 0.5)
    assert (float(got["scale"]), got["count"]) == (2, 3)


@pytest.mark.parametrize("decay", [0.75, np.float32(0.75), np.float64(0.75), 1])
def test_decays_of_every_kind_of_number(decay):
    expected = [float(decay)]
    assert moved([1.0], [0.0], decay).tolist() == expected
    assert moved([1.0], [0.0], tensor(np.float32(decay))).tolist() == expected


# What is left alone


def test_the_inputs_are_not_changed():
    teacher, student = {"w": tensor([1.0])}, {"w": tensor([3.0])}
    selfalign.ema_update(teacher, student, 0.5)
    assert (array(teacher["w"]).tolist(), array(student["w"]).tolist()) == ([1], [3])


@pytest.mark.only("torch")
def test_the_teacher_carries_no_graph_of_the_student():
    """No gradient reaches the teacher; each step's graph would also fill the memory."""
    import torch

    got = selfalign.ema_update([torch.ones(2)], [torch.nn.Parameter(torch.zeros(2))], 0.5)[0]
    assert not got.requires_grad


@pytest.mark.only("torch", "jax")
def test_results_belong_to_the_framework_of_the_arrays():
    got = selfalign.ema_update([np.ones(2, "float32")], [tensor([0.0, 0.0])], 0.5)[0]
    assert framework(got) in MODULES[BACKEND]
